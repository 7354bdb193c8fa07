"""How a served model is stepped: a prompt read in pieces, then token by token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from weftlm.models.open import keeps_cache


@dataclass(frozen=True)
class Stepping:
    """What an engine must know of a model to run it token by token; a model's `stepper()` gives it.

    Attributes:
        inner: Models of transformers whose `forward` a pass ends in.
        keeps_cache: Whether all that is carried from token to token is a cache passed as `past_key_values`.
        in_pieces: Whether a prompt read in pieces gives what it gives in one pass.
        takes_prompt_mask: Whether `forward` takes `routing_mask`, true for the tokens of the prompt.
    """

    inner: tuple[nn.Module, ...]
    keeps_cache: bool
    in_pieces: bool
    takes_prompt_mask: bool = False


def stepping_of(model: Any) -> Stepping:
    """How a model is stepped: as its `stepper()` says, else as a model of transformers, bare or under PEFT."""
    if hasattr(model, "stepper"):
        found: Stepping = model.stepper()
        return found
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    cached = keeps_cache(inner)
    return Stepping((inner,), keeps_cache=cached, in_pieces=cached)
