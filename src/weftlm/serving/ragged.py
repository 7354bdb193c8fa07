"""One pass over a token of each of several requests, none of whose numbers reaches another's.

A row of a matrix product may come out with other last bits when the product has another number of rows, and a sum over
keys when the keys are padded to another length. So:

- A pass always has the same number of rows, used or not; what a row holds then depends on that row alone. On a CPU
  elementwise functions work through memory several numbers at a time and finish what is left over one by one, with
  other last bits: the number of rows is a multiple of 8, which leaves nothing over at usual widths.
- Attention runs request by request, over the request's own keys and values and no others.
- Prompts are read alone, and of a routed product no token is laid out beside others (`tokens_apart`).

With 8 rows and requests a (5 tokens so far) and b (9), a step is one pass of the model over the column of tokens
[a6, b10, 0, 0, 0, 0, 0, 0] at positions [5, 9, 0, ...]. In each layer the new keys of row 0 go to a's cache, those of
row 1 to b's, and attention runs twice: row 0 over a's 6 keys, row 1 over b's 10. The other rows are not attended to.

That this holds for a model on a machine is tried before it is relied on (`stepping.trial`).
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.cache_utils import Cache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from weftlm.routing.kernels import tokens_apart

ATTENTION = "weftlm_ragged"
_LAYERS = frozenset({"full_attention", "sliding_attention"})
_FOLLOWS_LENGTH = frozenset({"dynamic", "longrope"})
"""Kinds of rotary embeddings that depend on the longest text of a pass."""
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
"""Settings of models that sort the tokens of a pass by expert."""
_BYPASSED = "the model's attention bypasses `ragged_attention`"


class RaggedCache(Cache):
    """The caches of several requests for one pass over a token of each.

    Args:
        requests: Rows and cache of each request; rows of no request are idle.
    """

    def __init__(self, requests: Sequence[tuple[slice, Cache]]) -> None:
        super().__init__(layers=[])
        self.requests = tuple(requests)
        self.unread: list[tuple[Tensor, Tensor]] | None = None
        self._longest = max(cache.get_seq_length() for _, cache in requests)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write a layer's new keys and values, and have those of every request ready for `ragged_attention`."""
        if self.unread is not None:
            raise RuntimeError(_BYPASSED)
        self.unread = [
            cache.update(key_states[rows], value_states[rows], layer_idx) for rows, cache in self.requests
        ]  # fmt: skip
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Length of the longest request."""
        return self._longest

    def get_mask_sizes(self, query_length: Any, layer_idx: int) -> tuple[int, int]:
        """Those of the longest request; no mask is read."""
        return self._longest + 1, 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """None."""
        return -1


_PASS = threading.local()
"""Its attribute `cache` is that of the ragged pass under way in a thread."""


def ragged_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Attention of each request over its own keys; outside a ragged pass that of transformers' `sdpa`."""
    cache: RaggedCache | None = getattr(_PASS, "cache", None)
    if cache is None:
        found: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
        return found
    if cache.unread is None:
        raise RuntimeError("a layer's attention wants keys that it has not written")
    window = kwargs.pop("sliding_window", None)
    output: Tensor | None = None
    for (rows, _), (keys, values) in zip(cache.requests, cache.unread, strict=True):
        if window is not None:
            keys, values = keys[:, :, -window:], values[:, :, -window:]
        mixed, _ = sdpa_attention_forward(module, query[rows], keys, values, None, **kwargs)
        if output is None:
            output = mixed.new_zeros((query.shape[0], *mixed.shape[1:]))
        output[rows] = mixed
    cache.unread = None
    assert output is not None
    return output, None


AttentionInterface.register(ATTENTION, ragged_attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


@contextmanager
def ragged_pass(cache: RaggedCache) -> Iterator[None]:
    """Models run inside attend request by request, over the caches in `cache`.

    Raises:
        RuntimeError: A model's last attention did not.
    """
    _PASS.cache = cache
    try:
        with tokens_apart():
            yield
    finally:
        _PASS.cache = None
    if cache.unread is not None:
        raise RuntimeError(_BYPASSED)


def cannot_be_ragged(model: Any) -> str:
    """Why a model cannot take part in a ragged pass, where a trial might not show it; empty if nothing is known."""
    config: Any = model.config
    if kinds := set(getattr(config, "layer_types", None) or ()) - _LAYERS:
        return f"it has layers of kind {', '.join(sorted(kinds))}"
    if not model._supports_attention_backend or config._attn_implementation not in ("sdpa", ATTENTION):
        return f"its attention ({config._attn_implementation}) cannot be exchanged"
    if any((getattr(config, name, None) or 0) > 1 for name in _EXPERTS):
        return "it sorts the tokens of a pass by expert"
    rotary = [getattr(config, name, None) for name in ("rope_parameters", "rope_scaling")]
    if found := _FOLLOWS_LENGTH & set(re.findall(r"\w+", str(rotary))):
        return f"its positions ({', '.join(sorted(found))}) depend on the longest text of a pass"
    return ""
