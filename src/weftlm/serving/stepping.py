"""How a model is driven: prompts read in pieces, then token by token; here the way that works for every model."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from weftlm.models.stepping import stepping_of
from weftlm.pipeline.any_model import OpenModel


class Stepper(Protocol):
    """Drives a model for several requests; what is known of a request lies in its state, made by `begin`.

    Attributes:
        together: `step` takes several requests in one pass; else it is given one at a time.
    """

    together: bool

    def begin(self) -> Any:
        """The state of a request of which nothing was read."""

    def read(self, state: Any, ids: Sequence[int]) -> Tensor:
        """Read the next piece of a prompt; logits_V after its last token, up to a constant."""

    def step(self, states: Sequence[Any], tokens: Sequence[int]) -> Sequence[Tensor]:
        """Read one token of each request; logits_V after each, up to a constant."""

    def close(self) -> None:
        """Leave the model as it was."""


@dataclass
class Reading:
    """What `OneByOne` keeps of a request: its text so far and the cache the model gave."""

    ids: list[int] = field(default_factory=list)
    prompt: int = 0
    cache: Any = None


class OneByOne:
    """One request per pass, with the cache the model itself makes. Works for every model.

    A pass sees nothing of other requests, so that what is generated beside others equals what is generated alone, bit
    for bit. A model that keeps no cache of keys and values reads the whole text again for each token.

    Args:
        opened: the model.
    """

    together = False

    def __init__(self, opened: OpenModel) -> None:
        self._model = opened.model
        self._device = opened.model.device
        self._stepping = stepping_of(opened.model)
        forward = inspect.signature(self._stepping.inner[0].forward).parameters
        self._last = {"logits_to_keep": 1} if "logits_to_keep" in forward else {}

    def begin(self) -> Reading:
        return Reading()

    def read(self, state: Reading, ids: Sequence[int]) -> Tensor:
        state.prompt += len(ids)
        return self._pass(state, ids)

    def step(self, states: Sequence[Reading], tokens: Sequence[int]) -> list[Tensor]:
        return [self._pass(state, [token]) for state, token in zip(states, tokens, strict=True)]

    def close(self) -> None:
        """Nothing was changed."""

    def _pass(self, state: Reading, ids: Sequence[int]) -> Tensor:
        if self._stepping.keeps_cache:
            ids_1T = torch.tensor([ids], device=self._device)
            output = self._model(input_ids=ids_1T, past_key_values=state.cache, use_cache=True, **self._last)
            state.cache = output.past_key_values
        else:
            state.ids += ids
            ids_1T = torch.tensor([state.ids], device=self._device)
            told: dict[str, Any] = dict(self._last)
            if self._stepping.takes_prompt_mask:  # what decides once per text reads the prompt alone
                told["routing_mask"] = torch.arange(len(state.ids), device=self._device)[None] < state.prompt
            output = self._model(input_ids=ids_1T, use_cache=False, **told)
        logits_V: Tensor = output.logits[0, -1]
        return logits_V
