"""How a model is driven: prompts read in pieces, then token by token, of one request or of several at once.

Several requests share a pass if the model's kind allows it and a trial on this machine finds every bit as it is alone;
else each has passes of its own (`stepper_for`).
"""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from weftlm.experts.low_rank import Rows
from weftlm.gating.modular_cache import ModularCache, SlotWindow
from weftlm.gating.modular_lm import ModularLM
from weftlm.gating.modular_reader import ModularReader
from weftlm.models.open import stepping_of
from weftlm.pipeline.any_model import OpenModel
from weftlm.routing.calls import _MEMORY as MEMORY
from weftlm.routing.router import Memory
from weftlm.serving.ragged import ATTENTION, RaggedCache, cannot_be_ragged, ragged_pass

log = logging.getLogger(__name__)

STEPS = 3
PROMPTS = (1, 9)
"""Steps of a trial, and lengths of its prompts."""
TOLERANCE_NATS = {torch.float32: 1e-2, torch.float64: 1e-2}
"""By which a ragged pass may differ from the model's own on a likely token: rounding alone, never another result."""
TOLERANCE_COARSE_NATS = 0.5
LIKELY_NATS = -12.0


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
    """

    together: ClassVar[bool] = False

    def __init__(self, opened: OpenModel) -> None:
        self._model: Any = opened.model
        self._device = opened.model.device
        self._stepping = stepping_of(opened.model)
        forward = inspect.signature(self._stepping.inner[0].forward).parameters
        self._last = {"logits_to_keep": 1} if "logits_to_keep" in forward else {}

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

    Until `close` the model attends through `ragged_attention`, which outside ragged passes changes nothing. The number
    of rows of every pass is a multiple of 8.
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
        inputs = self._inputs(tokens, [own.get_seq_length() for own in caches])
        if hasattr(caches[0], MEMORY):
            object.__setattr__(cache, MEMORY, self._joined([getattr(own, MEMORY) for own in caches]))
        with ragged_pass(cache):
            logits_BV: Tensor = self._model(
                input_ids=inputs[0, :, None], position_ids=inputs[1, :, None], past_key_values=cache, use_cache=True
            ).logits[:, -1]
        memory: Memory | None = getattr(cache, MEMORY, None)
        for row, own in enumerate(caches if memory is not None else ()):
            assert memory is not None
            apart = memory.expanded(self._rows)
            apart.select(torch.tensor([row]))
            object.__setattr__(own, MEMORY, apart)
        return logits_BV[: len(states)].unbind()

    def _inputs(self, tokens: Sequence[int], positions: Sequence[int]) -> Tensor:
        """Tokens and positions of all rows; those of idle rows are 0."""
        inputs = torch.zeros((2, self._rows), dtype=torch.int64)
        inputs[:, : len(tokens)] = torch.tensor([tokens, positions])
        return inputs.to(self._device)

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
    """

    _model: ModularLM

    def step(self, states: Sequence[ModelState], tokens: Sequence[int]) -> Sequence[Tensor]:
        caches, model = [state.cache for state in states], self._model
        passes = self._passes(caches, tokens)
        places = [backbone.experts for backbone in model.pool.backbones]
        mixed = []
        for row, (cache, token) in enumerate(zip(caches, tokens, strict=True)):
            reader = ModularReader(model.gate, places, partial(_of_row, passes, row), model.vocab_size, None, None)
            ids_11 = torch.tensor([[token]], device=self._device)
            mixed.append(reader.read(cache, ids_11, torch.ones_like(ids_11, dtype=torch.bool), 1)[0, -1])
        return mixed

    def _passes(self, caches: Sequence[ModularCache], tokens: Sequence[int]) -> list[Tensor]:
        """Log-probabilities after each row's token by the experts of each backbone, MRV."""
        found = []
        inputs = self._inputs(tokens, [cache.length for cache in caches])
        for number, backbone in enumerate(self._model.pool.backbones):
            size = len(backbone)
            ids_X, positions_X = inputs.repeat(1, size)
            windows = [SlotWindow(cache.stores[number], slice(0, size), cache.length) for cache in caches]
            shared = RaggedCache([(slice(row, None, self._rows), window) for row, window in enumerate(windows)])
            with ragged_pass(shared):
                logits_XV = backbone.run(
                    Rows(one=0) if size == 1 else Rows(blocks=tuple(range(size))),
                    ids_X[:, None],
                    cache=shared,
                    position_ids=positions_X[:, None],
                )[:, -1]
            found.append(torch.log_softmax(logits_XV.float(), dim=-1).unflatten(0, (size, self._rows)))
        return found


def _of_row(passes: Sequence[Tensor], row: int, cache: ModularCache, number: int, *rest: Any) -> Tensor:
    """What a shared pass gave one request by the experts of a backbone, as `ModularReader` wants it."""
    return passes[number][:, row, None]


# -- the choice --------------------------------------------------------------------------------------------------------


def stepper_for(opened: OpenModel, slots: int) -> OneByOne:
    """How an engine drives a model, of at most `slots` requests at a time; the log says why they share no pass."""
    single, stepping = OneByOne(opened), stepping_of(opened.model)
    if slots == 1:
        return single
    reason = next(filter(None, map(cannot_be_ragged, stepping.inner)), "")
    if not stepping.keeps_cache:
        reason = "it keeps no cache of keys and values"
    if opened.kind == "gated" and opened.model.sparse:
        reason = "it runs fewer experts per token than it has"
    for rows in () if reason else dict.fromkeys(math.ceil(slots / multiple) * multiple for multiple in (8, 64)):
        stepper = (RaggedGated if opened.kind == "gated" else Ragged)(opened, rows)
        try:
            reason = trial(stepper, single, slots, int(opened.model.config.vocab_size), opened.max_length)
        except Exception as error:
            log.debug("a trial of shared passes failed", exc_info=True)
            reason = f"{type(error).__name__}: {error}"
        if not reason:
            log.info("%s: up to %d requests share a pass of %d rows", opened.path, slots, rows)
            return stepper
        stepper.close()
    log.warning("%s: every request gets passes of its own, in turn: %s", opened.path, reason)
    return single


@torch.inference_mode()
def trial(stepper: OneByOne, single: OneByOne, slots: int, vocab_size: int, max_length: int | None) -> str:
    """Compare what requests get together, in every batch slot, with what they get alone.

    Returns:
        What differs; empty if nothing does.
    """
    generator = torch.Generator().manual_seed(0)
    lengths = [length + STEPS for length in PROMPTS if max_length is None or length + STEPS < max_length]
    texts = [torch.randint(vocab_size, (length,), generator=generator).tolist() for length in lengths]
    alone = [_answers(stepper, text) for text in texts]
    for text, found in zip(texts, alone, strict=True):
        if not all(map(_near, _answers(single, text), found)):
            return "its passes over several requests do not give what the model gives"
    for first in range(len(texts)):  # every text in every slot, beside itself and beside others
        chosen = [(first + slot) % len(texts) for slot in range(slots)]
        states = [ModelState() for _ in chosen]
        for state, which in zip(states, chosen, strict=True):
            stepper.read(state, texts[which][:-STEPS])
        for step in range(STEPS):
            logits = stepper.step(states, [texts[which][step - STEPS] for which in chosen])
            for which, logits_V in zip(chosen, logits, strict=True):
                if not torch.equal(logits_V, alone[which][step + 1]):
                    return "a request's numbers depend on its place in a pass or on the requests beside it"
            if step == 0:
                states.reverse()
                chosen.reverse()
    return ""


def _answers(stepper: OneByOne, text: Sequence[int]) -> list[Tensor]:
    """Logits after the prompt and after each of the last `STEPS` tokens."""
    state = ModelState()
    first_V = stepper.read(state, text[:-STEPS])
    return [first_V, *(stepper.step([state], [token])[0] for token in text[-STEPS:])]


def _near(own_V: Tensor, other_V: Tensor) -> bool:
    tolerance = TOLERANCE_NATS.get(own_V.dtype, TOLERANCE_COARSE_NATS)
    own_V, other_V = torch.log_softmax(own_V.float(), dim=-1), torch.log_softmax(other_V.float(), dim=-1)
    apart_V = torch.where(own_V > LIKELY_NATS, (own_V - other_V).abs(), 0.0)
    return bool(apart_V.max() <= tolerance)
