"""From the arguments of a Hugging Face model's `forward` to the `Call` a router gets; memory beside caches."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from weftlm.errors import ConfigError
from weftlm.routing.router import Call, Memory

_STATES = ("cache_params", "state")
"""Arguments that hold the memory of models that keep no keys and values."""
_MEMORY = "weftlm_memory"
"""Attribute of a cache, or of an encoder's output, that carries a router's memory."""


def arguments_of(forward: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """A forward's arguments by name, whether given by place or by name."""
    by_place = dict(zip(inspect.signature(forward).parameters, args, strict=False)) if args else {}
    return {**by_place, **kwargs}


def decoder_call(arguments: Mapping[str, Any], decisive_BT: Tensor | None) -> Call:
    """The call of a decoder-only model.

    Args:
        arguments: Arguments of its forward, by name.
        decisive_BT: tokens a sequence-level decision may read; None for all real ones.
    Raises:
        ConfigError: neither ids nor embeddings were given, masks of another shape, or a memory that is no cache of
            keys and values.
    """
    ids_BT, device, shape = _read(arguments)
    cache = arguments.get("past_key_values")
    try:
        past = 0 if cache is None else int(cache.get_seq_length())
    except (ValueError, AttributeError):
        past = None
    if past is None or any(arguments.get(name) is not None for name in _STATES):
        raise ConfigError(
            "this model carries a state from token to token that is no cache of keys and values, and a router's memory "
            "has no place beside it; give the whole text, with use_cache=False"
        )
    continues = past > 0
    mask_BT = _mask(arguments.get("attention_mask"), shape, device, past)
    memory = getattr(cache, _MEMORY, None) if continues else None
    return Call(
        input_ids_BT=ids_BT,
        mask_BT=mask_BT,
        decisive_BT=_decisive(decisive_BT, mask_BT),
        memory=Memory() if memory is None else memory.expanded(shape[0]),
        continues=continues,
    )


def encoder_call(arguments: Mapping[str, Any], decisive_BT: Tensor | None) -> Call:
    """The call of an encoder run alone, as `generate` runs it before the decoder."""
    ids_BT, device, shape = _read(arguments)
    mask_BT = _mask(arguments.get("attention_mask"), shape, device)
    return Call(ids_BT, mask_BT, _decisive(decisive_BT, mask_BT), Memory())


def encoder_decoder_call(arguments: Mapping[str, Any], decisive_BT: Tensor | None) -> Call:
    """The call of an encoder-decoder model, or of its decoder alone; what was decided for ready outputs still holds."""
    outputs, mask = arguments.get("encoder_outputs"), arguments.get("attention_mask")
    if (alone_BTH := arguments.get("encoder_hidden_states")) is not None:  # given to the decoder alone
        outputs, mask = (alone_BTH,), arguments.get("encoder_attention_mask")
    if outputs is None:
        return encoder_call(arguments, decisive_BT)
    hidden_BTH = outputs[0]
    mask_BT = _mask(mask, hidden_BTH.shape[:2], hidden_BTH.device)
    memory = getattr(outputs, _MEMORY, getattr(hidden_BTH, _MEMORY, None))
    memory = Memory() if memory is None else memory.expanded(len(hidden_BTH))
    return Call(input_ids_BT=None, mask_BT=mask_BT, decisive_BT=mask_BT, memory=memory, continues=True)


def remember(call: Call, output: Any) -> None:
    """Let a router's memory travel with the cache (or the encoder's output) that continues this pass."""
    if not call.memory.tensors:
        return
    if isinstance(output, tuple):
        cache, hidden_BTH = next((part for part in output if isinstance(part, Cache)), None), output[0]
    else:
        cache, hidden_BTH = (getattr(output, name, None) for name in ("past_key_values", "last_hidden_state"))
    if isinstance(cache, Cache):
        _follow(cache, call.memory)
    elif hidden_BTH is not None:
        setattr(hidden_BTH, _MEMORY, call.memory)  # what a decoder that is called alone is given of an encoder's output
        if not isinstance(output, tuple):
            object.__setattr__(output, _MEMORY, call.memory)


def _follow(cache: Cache, memory: Memory) -> None:
    cls = type(cache)
    if not issubclass(cls, _Followed):
        cache.__class__ = _followed(cls)  # type: ignore[arg-type]
    object.__setattr__(cache, _MEMORY, memory)


class _Followed:
    """Mixed into the class of a cache that carries a memory: whatever reorders its rows reorders the memory's."""

    weftlm_memory: Memory

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)  # type: ignore[misc]
        self.weftlm_memory.select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)  # type: ignore[misc]
        self.weftlm_memory.select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)  # type: ignore[misc]
        rows = next(iter(self.weftlm_memory.tensors.values())).shape[0]
        self.weftlm_memory = self.weftlm_memory.expanded(rows * repeats)

    def crop(self, tokens_to_remove: int) -> None:
        if self.weftlm_memory.follows_tokens:
            raise ConfigError(
                "this router follows the text token by token and cannot take tokens back; for assisted or speculative "
                "generation use a router that decides per token (phatgoose) or once per prompt (retrieval)"
            )
        super().crop(tokens_to_remove)  # type: ignore[misc]


@functools.cache
def _followed(cls: type[Cache]) -> type[Cache]:
    return type(f"Followed{cls.__name__}", (_Followed, cls), {})


def _read(arguments: Mapping[str, Any]) -> tuple[Tensor | None, torch.device, tuple[int, int]]:
    """Token ids, None for embeddings; device and shape of the tokens."""
    ids_BT = arguments.get("input_ids")
    read = arguments.get("inputs_embeds") if ids_BT is None else ids_BT
    if read is None:
        raise ConfigError("the model was given neither input_ids nor inputs_embeds")
    return ids_BT, read.device, (int(read.shape[0]), int(read.shape[1]))


def _mask(attention_mask: Any, shape: tuple[int, ...], device: torch.device, past: int = 0) -> Tensor:
    """True for the real tokens of this pass; a mask over a cached prefix too is cut to its end.

    Of a mask per pair of tokens (B, 1, T, keys), as `generate` makes for static caches, the real tokens are those that
    see themselves.
    """
    batch, tokens = shape
    if isinstance(attention_mask, Mapping):  # one per kind of layer
        attention_mask = attention_mask.get("full_attention")
    if isinstance(attention_mask, Tensor) and attention_mask.dim() == 4:
        seen_BTK = attention_mask[:, 0] if attention_mask.dtype == torch.bool else attention_mask[:, 0] == 0
        if seen_BTK.shape[1] == tokens and seen_BTK.shape[2] >= past + tokens:
            own_BT = seen_BTK[:, :, past : past + tokens].diagonal(dim1=1, dim2=2)
            return own_BT.to(device).expand(batch, tokens)
    if not isinstance(attention_mask, Tensor) or attention_mask.dim() != 2:
        return torch.ones(batch, tokens, dtype=torch.bool, device=device)
    if attention_mask.shape[0] != batch or attention_mask.shape[1] < tokens:
        raise ConfigError(
            f"attention_mask has shape {tuple(attention_mask.shape)} for {batch} sequences of {tokens} tokens; it must "
            "cover them (and the cached prefix, if there is one)"
        )
    return attention_mask[:, attention_mask.shape[1] - tokens :].to(device=device, dtype=torch.bool)


def _decisive(decisive_BT: Tensor | None, mask_BT: Tensor) -> Tensor:
    if decisive_BT is None:
        return mask_BT
    if decisive_BT.shape != mask_BT.shape:
        raise ConfigError(
            f"routing_mask has shape {tuple(decisive_BT.shape)}; it must be that of the tokens, {tuple(mask_BT.shape)}"
        )
    return decisive_BT.to(device=mask_BT.device, dtype=torch.bool) & mask_BT
