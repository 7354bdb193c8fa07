"""The choice of how a model is driven: several requests per pass where that changes no bit, else one."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from weftlm.models.stepping import stepping_of
from weftlm.pipeline.any_model import OpenModel
from weftlm.serving.ragged import Ragged, cannot_be_ragged, mixes_rows
from weftlm.serving.ragged_gated import RaggedGated
from weftlm.serving.stepping import OneByOne, Stepper

log = logging.getLogger(__name__)

STEPS = 3
TOLERANCE_NATS = {torch.float32: 1e-2, torch.float64: 1e-2}
"""By which a ragged pass may differ from the model's own on a likely token: rounding alone, never another result."""
TOLERANCE_COARSE_NATS = 0.5
LIKELY_NATS = -12.0


def stepper_for(opened: OpenModel, slots: int, *, batching: bool = True) -> Stepper:
    """How an engine drives a model.

    Several requests share a pass where the model's kind allows it and a trial on this machine finds every bit as it is
    alone; else each has passes of its own, and the log says why.

    Args:
        opened: the model.
        slots: requests at a time.
        batching: false for passes of one request in any case.
    """
    single = OneByOne(opened)
    if not batching or slots == 1:
        return single
    reason = ""
    for rows in dict.fromkeys((_up(slots, 8), _up(slots, 64))):
        stepper, reason = _made(opened, rows)
        if stepper is None:
            break
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


def _made(opened: OpenModel, rows: int) -> tuple[Stepper | None, str]:
    for inner in stepping_of(opened.model).inner:
        if (reason := cannot_be_ragged(inner)) is not None:
            return None, reason
    if opened.kind == "gated":
        return RaggedGated(opened, rows), ""
    if opened.kind == "routed" and (reason := mixes_rows(opened.model, rows)) is not None:
        return None, reason
    return Ragged(opened, rows), ""


def trial(stepper: Stepper, single: Stepper, slots: int, vocab_size: int, max_length: int | None) -> str:
    """Compare what requests get together, in every place, with what they get alone.

    To be called in inference mode, as engines step.

    Returns:
        What differs; empty if nothing does.
    """
    texts = list(_texts(vocab_size, max_length))
    alone = [_answers(stepper, text) for text in texts]
    for text, found in zip(texts, alone, strict=True):
        for own, other in zip(_answers(single, text), found, strict=True):
            if not _near(own, other):
                return "its passes over several requests do not give what the model gives"
    for first in range(len(texts)):  # every text in every place, beside itself and beside others
        chosen = [(first + place) % len(texts) for place in range(slots)]
        states = [_begun(stepper, texts[which])[0] for which in chosen]
        for step in range(STEPS):
            logits = stepper.step(states, [texts[which][1][step] for which in chosen])
            for which, logits_V in zip(chosen, logits, strict=True):
                if not torch.equal(logits_V, alone[which][step + 1]):
                    return "a request's numbers depend on its place in a pass or on the requests beside it"
            if step == 0:
                states.reverse()
                chosen.reverse()
    return ""


Text = tuple[list[int], list[int]]
"""A prompt and the tokens that follow it."""


def _texts(vocab_size: int, max_length: int | None) -> Iterator[Text]:
    generator = torch.Generator().manual_seed(0)
    for length in (1, 9):
        if max_length is None or length + STEPS < max_length:
            ids = torch.randint(vocab_size, (length + STEPS,), generator=generator).tolist()
            yield ids[:length], ids[length:]


def _begun(stepper: Stepper, text: Text) -> tuple[Any, Tensor]:
    state = stepper.begin()
    return state, stepper.read(state, text[0])


def _answers(stepper: Stepper, text: Text) -> list[Tensor]:
    """Logits after the prompt and after each token that follows."""
    state, logits_V = _begun(stepper, text)
    return [logits_V, *(stepper.step([state], [token])[0] for token in text[1])]


def _near(own_V: Tensor, other_V: Tensor) -> bool:
    tolerance = TOLERANCE_NATS.get(own_V.dtype, TOLERANCE_COARSE_NATS)
    own_V, other_V = torch.log_softmax(own_V.float(), dim=-1), torch.log_softmax(other_V.float(), dim=-1)
    apart_V = torch.where(own_V > LIKELY_NATS, (own_V - other_V).abs(), 0.0)
    return bool(apart_V.max() <= tolerance)


def _up(count: int, multiple: int) -> int:
    return math.ceil(count / multiple) * multiple
