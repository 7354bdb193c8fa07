"""The choice of how a model is driven: several requests per pass if that changes no bit, else one."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from weftlm.models.stepping import stepping_of
from weftlm.pipeline.any_model import OpenModel
from weftlm.serving.ragged import cannot_be_ragged, mixes_rows
from weftlm.serving.stepping import ModelState, OneByOne, Ragged, RaggedGated

log = logging.getLogger(__name__)

STEPS = 3
PROMPTS = (1, 9)
"""Lengths of the prompts tried."""
TOLERANCE_NATS = {torch.float32: 1e-2, torch.float64: 1e-2}
"""By which a ragged pass may differ from the model's own on a likely token: rounding alone, never another result."""
TOLERANCE_COARSE_NATS = 0.5
LIKELY_NATS = -12.0


def stepper_for(opened: OpenModel, slots: int) -> OneByOne:
    """How an engine drives a model.

    Several requests share a pass if the model's kind allows it and a trial on this machine finds every bit as it is
    alone; else each has passes of its own, and the log says why.

    Args:
        opened: The model.
        slots: Maximum number of requests at a time.
    """
    single = OneByOne(opened)
    if slots == 1:
        return single
    reason = next(filter(None, map(cannot_be_ragged, stepping_of(opened.model).inner)), "")
    if opened.kind == "gated" and opened.model.sparse:
        reason = "it runs fewer experts per token than it has"
    for rows in () if reason else dict.fromkeys(math.ceil(slots / multiple) * multiple for multiple in (8, 64)):
        if opened.kind == "routed" and (reason := mixes_rows(opened.model, rows)):
            break
        stepper = (RaggedGated if opened.kind == "gated" else Ragged)(opened, rows)
        try:
            with torch.inference_mode():
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


def trial(stepper: OneByOne, single: OneByOne, slots: int, vocab_size: int, max_length: int | None) -> str:
    """Compare what requests get together, in every batch slot, with what they get alone.

    To be called in inference mode, as engines step.

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
        states = [_begun(stepper, texts[which])[0] for which in chosen]
        for step in range(STEPS):
            logits = stepper.step(states, [texts[which][step - STEPS] for which in chosen])
            for which, logits_V in zip(chosen, logits, strict=True):
                if not torch.equal(logits_V, alone[which][step + 1]):
                    return "a request's numbers depend on its place in a pass or on the requests beside it"
            if step == 0:
                states.reverse()
                chosen.reverse()
    return ""


def _begun(stepper: OneByOne, text: Sequence[int]) -> tuple[ModelState, Tensor]:
    state = stepper.begin()
    return state, stepper.read(state, text[:-STEPS])


def _answers(stepper: OneByOne, text: Sequence[int]) -> list[Tensor]:
    """Logits after the prompt and after each of the last `STEPS` tokens."""
    state, logits_V = _begun(stepper, text)
    return [logits_V, *(stepper.step([state], [token])[0] for token in text[-STEPS:])]


def _near(own_V: Tensor, other_V: Tensor) -> bool:
    tolerance = TOLERANCE_NATS.get(own_V.dtype, TOLERANCE_COARSE_NATS)
    own_V, other_V = torch.log_softmax(own_V.float(), dim=-1), torch.log_softmax(other_V.float(), dim=-1)
    apart_V = torch.where(own_V > LIKELY_NATS, (own_V - other_V).abs(), 0.0)
    return bool(apart_V.max() <= tolerance)
