"""How a model is driven: prompts read in pieces, then token by token, of one request or of several at once."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from weftlm.experts.low_rank import Rows
from weftlm.gating.experts import Backbone
from weftlm.gating.modular_cache import ModularCache
from weftlm.gating.modular_lm import ModularLM
from weftlm.models.stepping import stepping_of
from weftlm.pipeline.any_model import OpenModel
from weftlm.routing.calls import _MEMORY as MEMORY
from weftlm.routing.router import Memory
from weftlm.serving.ragged import ATTENTION, RaggedCache, ragged_pass


@dataclass
class ModelState:
    """What a stepper keeps of a request: the model's cache, or the whole text of a model that keeps none."""

    cache: Any = None
    ids: list[int] = field(default_factory=list)
    prompt: int = 0


class OneByOne:
    """One request per pass, with the cache the model itself makes. Works for every model.

    A pass sees nothing of other requests, so that what is generated beside others equals what is generated alone, bit
    for bit. A model that keeps no cache of keys and values reads the whole text again for each token.

    Attributes:
        together: Whether `step` takes several requests in one pass; else it is given one at a time.

    Args:
        opened: The model.
    """

    together: ClassVar[bool] = False

    def __init__(self, opened: OpenModel) -> None:
        self._model: Any = opened.model
        self._device = opened.model.device
        self._stepping = stepping_of(opened.model)
        forward = inspect.signature(self._stepping.inner[0].forward).parameters
        self._last = {"logits_to_keep": 1} if "logits_to_keep" in forward else {}

    def begin(self) -> ModelState:
        """The state of a request of which nothing was read."""
        return ModelState()

    def read(self, state: ModelState, ids: Sequence[int]) -> Tensor:
        """Read the next piece of a prompt; logits_V after its last token, up to a constant."""
        state.prompt += len(ids)
        return self._pass(state, ids)

    def step(self, states: Sequence[ModelState], tokens: Sequence[int]) -> Sequence[Tensor]:
        """Read one token of each request; logits_V after each, up to a constant."""
        return [self._pass(state, [token]) for state, token in zip(states, tokens, strict=True)]

    def close(self) -> None:
        """Leave the model as it was."""

    def _pass(self, state: ModelState, ids: Sequence[int]) -> Tensor:
        options: dict[str, Any] = dict(self._last)
        if self._stepping.keeps_cache:
            options |= {"past_key_values": state.cache, "use_cache": True}
        else:
            ids = state.ids = [*state.ids, *ids]
            options["use_cache"] = False
            if self._stepping.takes_prompt_mask:  # what decides once per text reads the prompt alone
                options["routing_mask"] = torch.arange(len(ids), device=self._device)[None] < state.prompt
        output = self._model(input_ids=torch.tensor([ids], device=self._device), **options)
        if self._stepping.keeps_cache:
            state.cache = output.past_key_values
        logits_V: Tensor = output.logits[0, -1]
        return logits_V


class Ragged(OneByOne):
    """Plain and routed models, one ragged pass for all running requests.

    Until `close` the model attends through `ragged_attention`, which outside ragged passes changes nothing.

    Args:
        opened: The model.
        rows: Rows of every pass; a multiple of 8.
    """

    together = True

    def __init__(self, opened: OpenModel, rows: int) -> None:
        super().__init__(opened)
        self._rows = rows
        configs: list[Any] = [model.config for model in self._stepping.inner]
        self._before = [(config, config._attn_implementation) for config in configs]
        for config in configs:
            config._attn_implementation = ATTENTION

    def close(self) -> None:
        for config, before in self._before:
            config._attn_implementation = before

    def step(self, states: Sequence[ModelState], tokens: Sequence[int]) -> Sequence[Tensor]:
        caches = [state.cache for state in states]
        cache = RaggedCache([(slice(row, row + 1), own) for row, own in enumerate(caches)])
        idle = [0] * (self._rows - len(states))
        lengths = [own.get_seq_length() for own in caches]
        inputs = torch.tensor([[*tokens, *idle], [*lengths, *idle]], device=self._device)
        memories = [getattr(own, MEMORY) for own in caches if getattr(own, MEMORY, None) is not None]
        if memories:
            object.__setattr__(cache, MEMORY, self._joined(memories))
        with ragged_pass(cache):
            logits_BV: Tensor = self._model(
                input_ids=inputs[0, :, None], position_ids=inputs[1, :, None], past_key_values=cache, use_cache=True
            ).logits[:, -1]
        memory: Memory | None = getattr(cache, MEMORY, None)
        for row, own in enumerate(caches if memory is not None else ()):
            assert memory is not None
            apart = Memory(follows_tokens=memory.follows_tokens)
            apart.tensors = {name: value[row : row + 1].clone() for name, value in memory.tensors.items()}
            object.__setattr__(own, MEMORY, apart)
        return logits_BV[: len(states)].unbind()

    def _joined(self, memories: Sequence[Memory]) -> Memory:
        """The memories of all rows; idle rows have that of the last request."""
        joined = Memory(follows_tokens=memories[0].follows_tokens)
        for name in memories[0].tensors:
            joined.tensors[name] = torch.cat([memory.tensors[name] for memory in memories])
        joined.select(torch.arange(self._rows).clamp_max(len(memories) - 1))
        return joined


class RaggedGated(Ragged):
    """Gated models, one ragged pass per backbone for all running requests.

    A pass has a row for each expert of each request: over a backbone of three experts and 8 rows, row 8 e + r is expert
    e on request r. Gates are small and are computed request by request, at the shapes they have alone. Models that run
    fewer experts per token than they have (`sparse`) get passes of their own.

    Args:
        opened: The model.
        rows: Requests of every pass, idle ones included; a multiple of 8.
    """

    _model: ModularLM

    def step(self, states: Sequence[ModelState], tokens: Sequence[int]) -> Sequence[Tensor]:
        gate, caches = self._model.gate, [state.cache for state in states]
        one_1 = torch.ones(1, dtype=torch.bool, device=self._device)
        advanced = []
        for cache, token in zip(caches, tokens, strict=True):
            advanced.append(gate.advance(cache.state, cache.logq_EBV[:, 0, token][None], one_1))
            cache.append(torch.tensor([[token]], device=self._device), one_1[None])
        logq_ERV = self._log_probs(caches, tokens)
        mixed = []
        for row, (cache, state) in enumerate(zip(caches, advanced, strict=True)):
            # What the model itself keeps after a token that all experts have read.
            logq_EV = torch.stack([logq_RV[row] for logq_RV in logq_ERV])
            cache.logq_EBV = logq_EV[:, None]
            cache.settle(state)
            logw_E = gate.current(state)[0].float()
            mixed.append(logq_EV[0] if len(logq_EV) == 1 else torch.logsumexp(logq_EV + logw_E[:, None], dim=0))
            cache.mixed_BV = mixed[-1][None]
        return mixed

    def _log_probs(self, caches: Sequence[ModularCache], tokens: Sequence[int]) -> list[Tensor]:
        """Log-probabilities after each request's token by each expert, RV in the pool's order."""
        found: dict[int, Tensor] = {}
        inputs = torch.zeros((2, self._rows), dtype=torch.int64)
        inputs[:, : len(tokens)] = torch.tensor([tokens, [cache.length - 1 for cache in caches]])
        for number, backbone in enumerate(self._model.pool.backbones):
            assert isinstance(backbone, Backbone)
            size = len(backbone)
            ids_X, positions_X = inputs.repeat(1, size).to(self._device)
            windows = [cache.stores[number].window(slice(0, size), cache.length - 1) for cache in caches]
            shared = RaggedCache([(slice(row, None, self._rows), window) for row, window in enumerate(windows)])
            with ragged_pass(shared):
                logits_XV = backbone.run(
                    Rows(one=0) if size == 1 else Rows(blocks=tuple(range(size))),
                    ids_X[:, None],
                    cache=shared,
                    position_ids=positions_X[:, None],
                )[:, -1]
            logq_XV = torch.log_softmax(logits_XV.float(), dim=-1)
            found |= dict(zip(backbone.experts, logq_XV.split(self._rows), strict=True))
        return [found[expert] for expert in range(len(found))]
