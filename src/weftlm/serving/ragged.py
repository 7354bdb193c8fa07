"""One pass over a token of each of several requests, none of whose numbers reaches another's.

A row of a matrix product may come out with other last bits when the product has another number of rows, and a sum over
keys when the keys are padded to another length. So:

- A pass always has the same number of rows, wanted or not; what a row holds then depends on that row alone. On a CPU
  elementwise functions work through memory several numbers at a time and finish what is left over one by one, with
  other last bits: the number of rows is a multiple of 8, which leaves nothing over at usual widths.
- Attention runs request by request, over the request's own keys and values and no others.
- Prompts are read alone.

That this holds for a model on a machine is tried before it is relied on (`trial.py`).
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from weftlm.gating.slots import SlotStore
from weftlm.models.stepping import stepping_of
from weftlm.pipeline.any_model import OpenModel
from weftlm.routing.kernels import FEW_ASSIGNMENTS, packed_delta
from weftlm.routing.kernels import _cheapest as cheapest
from weftlm.routing.pool import ModulePool
from weftlm.routing.routed_model import RoutedModel
from weftlm.routing.router import Memory, Routing, TargetModule

ATTENTION = "weftlm_ragged"
_MEMORY = "weftlm_memory"
"""Attribute of a cache that carries a router's memory, as `routing.calls` names it."""
_LAYERS = frozenset({"full_attention", "sliding_attention"})
_FOLLOWS_LENGTH = frozenset({"dynamic", "longrope"})
"""Kinds of rotary embeddings that depend on the longest text of a pass."""
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
"""Settings of models that sort the tokens of a pass by expert."""


@dataclass(frozen=True)
class Lane:
    """The rows of one request in a pass.

    Attributes:
        rows: of the pass.
        store: the request's keys and values.
        held: the store's rows, as many.
        start: slots the store has of them.
    """

    rows: slice
    store: SlotStore
    held: slice
    start: int


class RaggedCache(Cache):
    """The caches of several requests for one pass over a token of each.

    Args:
        lanes: one per request, or more.
    """

    def __init__(self, lanes: Sequence[Lane]) -> None:
        super().__init__(layers=[])
        self.lanes = tuple(lanes)
        self.unread: list[tuple[Tensor, Tensor]] | None = None
        self._longest = max(lane.start for lane in lanes)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write a layer's new keys and values, and have those of every lane ready for `ragged_attention`."""
        if self.unread is not None:
            raise RuntimeError("the model's attention passes `ragged_attention` by")
        self.unread = [
            lane.store.write(layer_idx, lane.held, lane.start, key_states[lane.rows], value_states[lane.rows])  # type: ignore[misc]
            for lane in self.lanes
        ]
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Of the longest."""
        return self._longest

    def get_mask_sizes(self, query_length: Any, layer_idx: int) -> tuple[int, int]:
        """Of the longest; no mask is read."""
        return self._longest + 1, 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """None."""
        return -1


class _Pass(threading.local):
    """The pass under way; each thread has its own."""

    def __init__(self) -> None:
        self.cache: RaggedCache | None = None


_PASS = _Pass()


def ragged_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Attention of each lane over its own keys; outside a ragged pass that of transformers' `sdpa`."""
    cache = _PASS.cache
    if cache is None:
        found: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
        return found
    if cache.unread is None:
        raise RuntimeError("a layer's attention wants keys that it has not written")
    window = kwargs.pop("sliding_window", None)
    output: Tensor | None = None
    for lane, (keys, values) in zip(cache.lanes, cache.unread, strict=True):
        if window is not None:
            keys, values = keys[:, :, -window:], values[:, :, -window:]
        mixed, _ = sdpa_attention_forward(module, query[lane.rows], keys, values, None, **kwargs)
        if output is None:
            output = mixed.new_zeros((query.shape[0], *mixed.shape[1:]))
        output[lane.rows] = mixed
    cache.unread = None
    assert output is not None
    return output, None


AttentionInterface.register(ATTENTION, ragged_attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


@contextmanager
def ragged_pass(cache: RaggedCache) -> Iterator[None]:
    """Models run inside attend through the lanes of `cache`.

    Raises:
        RuntimeError: a model's last attention did not.
    """
    _PASS.cache = cache
    try:
        yield
    finally:
        _PASS.cache = None
    if cache.unread is not None:
        raise RuntimeError("the model's attention passes `ragged_attention` by")


def cannot_be_ragged(model: nn.Module) -> str | None:
    """Why a transformers model cannot take part in a ragged pass; None where nothing is seen to be against it."""
    if not isinstance(model, PreTrainedModel):
        return f"a {type(model).__name__} is no transformers model"
    config = model.config
    forward = inspect.signature(model.forward).parameters
    missing = {"past_key_values", "position_ids"} - set(forward)
    if missing:
        return f"its forward does not take {' and '.join(sorted(missing))}"
    kinds = set(getattr(config, "layer_types", None) or ()) - _LAYERS
    if kinds:
        return f"it has layers of kind {', '.join(sorted(kinds))}"
    if not model._supports_attention_backend or config._attn_implementation not in ("sdpa", ATTENTION):
        return f"its attention ({config._attn_implementation}) cannot be exchanged"
    if any((getattr(config, name, None) or 0) > 1 for name in _EXPERTS):
        return "it sorts the tokens of a pass by expert"
    rotary = [getattr(config, name, None) for name in ("rope_parameters", "rope_scaling")]
    if found := _FOLLOWS_LENGTH & set(_texts(rotary)):
        return f"its positions ({', '.join(sorted(found))}) depend on the longest text of a pass"
    return None


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from _texts(list(value.values()))
    elif isinstance(value, list):
        for each in value:
            yield from _texts(each)


class Attention:
    """Lets models attend through `ragged_attention` until `restore`.

    Outside ragged passes nothing changes: there it calls what it stands for.

    Args:
        models: whose attention is exchanged.
    """

    def __init__(self, models: Sequence[Any]) -> None:
        self._before = [(model.config, model.config._attn_implementation) for model in models]
        for config, _ in self._before:
            config._attn_implementation = ATTENTION

    def restore(self) -> None:
        """Once is enough."""
        for config, before in self._before:
            config._attn_implementation = before
        self._before = []


@dataclass
class Strand:
    """What `Ragged` keeps of a request.

    Attributes:
        store: keys and values.
        length: tokens read.
        memory: what a router keeps beside them.
    """

    store: SlotStore = field(default_factory=lambda: SlotStore(1))
    length: int = 0
    memory: Memory | None = None


class Ragged:
    """Plain and routed models, one pass for all running requests; see the top of this file.

    Args:
        opened: the model.
        rows: of every pass; a multiple of 8.
    """

    together = True

    def __init__(self, opened: OpenModel, rows: int) -> None:
        self._model = opened.model
        self._device = opened.model.device
        self._rows = rows
        inner = stepping_of(opened.model).inner[0]
        self._last = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(inner.forward).parameters else {}
        self._attention = Attention([inner])

    def begin(self) -> Strand:
        return Strand()

    def read(self, state: Strand, ids: Sequence[int]) -> Tensor:
        window = state.store.window(slice(0, 1), state.length)
        if state.memory is not None:
            object.__setattr__(window, _MEMORY, state.memory)
        places = torch.arange(state.length, state.length + len(ids), device=self._device)
        output = self._model(
            input_ids=torch.tensor([ids], device=self._device),
            position_ids=places[None],
            past_key_values=window,
            use_cache=True,
            **self._last,
        )
        state.length += len(ids)
        state.memory = getattr(window, _MEMORY, None)
        logits_V: Tensor = output.logits[0, -1]
        return logits_V

    def step(self, states: Sequence[Strand], tokens: Sequence[int]) -> Sequence[Tensor]:
        lanes = [Lane(slice(row, row + 1), each.store, slice(0, 1), each.length) for row, each in enumerate(states)]
        cache = RaggedCache(lanes)
        idle = [0] * (self._rows - len(states))
        told = torch.tensor([[*tokens, *idle], [*(each.length for each in states), *idle]], device=self._device)
        if states[0].memory is not None:
            object.__setattr__(
                cache, _MEMORY, self._joined([each.memory for each in states if each.memory is not None])
            )
        with ragged_pass(cache):
            logits_BV: Tensor = self._model(
                input_ids=told[0, :, None], position_ids=told[1, :, None], past_key_values=cache, use_cache=True
            ).logits[:, -1]
        memory: Memory | None = getattr(cache, _MEMORY, None)
        for row, state in enumerate(states):
            state.length += 1
            state.memory = None if memory is None else _row_of(memory, row)
        return logits_BV[: len(states)].unbind()

    def close(self) -> None:
        self._attention.restore()

    def _joined(self, memories: Sequence[Memory]) -> Memory:
        """The memories of all rows; idle ones have that of the last."""
        rows = torch.arange(self._rows).clamp_max(len(memories) - 1)
        joined = Memory(follows_tokens=memories[0].follows_tokens)
        for name in memories[0].tensors:
            joined.tensors[name] = torch.cat([memory.tensors[name] for memory in memories])
        joined.select(rows)
        return joined


def _row_of(memory: Memory, row: int) -> Memory:
    own = Memory(follows_tokens=memory.follows_tokens)
    own.tensors = {name: value[row : row + 1].clone() for name, value in memory.tensors.items()}
    return own


def mixes_rows(model: RoutedModel, rows: int) -> str | None:
    """Why the routed products of a pass over `rows` tokens are not row by row; None where they are.

    On a CPU the way a product is taken depends on its size alone, and all ways but one (`packed_delta`, which lays
    tokens out by expert) take every token by itself. Elsewhere tokens are sorted by expert.
    """
    chosen: dict[str, int] = {}

    def record(target: TargetModule, routing: Routing) -> None:
        chosen[target.name] = routing.experts_BTK.shape[-1]

    with model.recording(record), torch.no_grad():
        model(input_ids=torch.zeros((1, 1), dtype=torch.int64, device=model.device), use_cache=False)
    for target in model.targets:
        pool = model.model.get_submodule(target.name).pool
        assert isinstance(pool, ModulePool)
        assignments = rows * chosen.get(target.name, 0)
        if assignments <= FEW_ASSIGNMENTS:
            continue
        if pool.A_ERI.device.type != "cpu":
            return f"on a {pool.A_ERI.device.type} device the tokens of a pass are sorted by expert"
        if cheapest(rows, assignments, pool.A_ERI, pool.B_ERO) is packed_delta:
            return f"the experts of {target.name} are so many or large that the tokens of a pass are sorted by expert"
    return None
