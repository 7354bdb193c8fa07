"""A ragged pass gives what the model gives, and leaves the model as it was."""

from __future__ import annotations

import pytest
import torch
from support import experts as tiny
from support.asking import ask, collect, held
from support.gated import mixed_pool
from support.in_memory import gated, plain, routed, sliding
from torch import nn

from weftlm.gating.bayes import FixedShareGate
from weftlm.pipeline.any_model import OpenModel
from weftlm.serving.engine import Engine
from weftlm.serving.ragged import ATTENTION, Attention, Ragged
from weftlm.serving.ragged_gated import RaggedGated
from weftlm.serving.request import Sampling
from weftlm.serving.stepping import Stepper

LENGTHS = (3, 21, 1, 12)


def check_steps(stepper: Stepper, opened: OpenModel, steps: int) -> None:
    """Requests of different lengths step together; compare with the model's pass over each whole text."""
    generator = torch.Generator().manual_seed(1)
    texts = [torch.randint(tiny.VOCAB, (length + steps,), generator=generator) for length in LENGTHS]
    with torch.inference_mode():
        states = [stepper.begin() for _ in texts]
        for state, text, length in zip(states, texts, LENGTHS, strict=True):
            for first in range(0, length, 8):
                stepper.read(state, text[first : min(length, first + 8)].tolist())
        for step in range(steps):
            found = stepper.step(
                states, [int(text[length + step]) for text, length in zip(texts, LENGTHS, strict=True)]
            )
        stepper.close()
        for text, logits_V in zip(texts, found, strict=True):
            own_V = opened.model(input_ids=text[None]).logits[0, -1]
            torch.testing.assert_close(logits_V.log_softmax(-1), own_V.log_softmax(-1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("make", [tiny.llama, tiny.qwen2, tiny.gpt2, sliding])
def test_plain_models(make: type[nn.Module]) -> None:
    opened = plain(make())  # type: ignore[arg-type]
    check_steps(Ragged(opened, 8), opened, 6)


@pytest.mark.parametrize("router", ["phatgoose", "arrow", "blend", "prefix", "merged", "uniform"])
def test_routed_models(router: str) -> None:
    opened = routed(router)
    check_steps(Ragged(opened, 8), opened, 6)


@pytest.mark.parametrize("top_m", [None, 1, 3])
def test_gated_models(top_m: int | None) -> None:
    """With every expert caught up at every token, sparse serving is what one pass gives."""
    opened = gated(mixed_pool(), FixedShareGate.of([0.25] * 4, 0.2), top_m=top_m, refresh_every=1)
    check_steps(RaggedGated(opened, 8), opened, 4)


@pytest.mark.parametrize("top_m", [1, 2])
def test_sparse_models_do_what_they_do_token_by_token(top_m: int) -> None:
    """Gates, sleepers and refreshes as in the model's own passes of one token."""
    opened = gated(mixed_pool(), FixedShareGate.of([0.25] * 4, 0.3), top_m=top_m, refresh_every=6)
    ids = torch.randint(tiny.VOCAB, (30,), generator=torch.Generator().manual_seed(2)).tolist()
    stepper = RaggedGated(opened, 8)
    with torch.inference_mode():
        state = stepper.begin()
        stepper.read(state, ids[:8])
        own = opened.model(input_ids=torch.tensor([ids[:8]]), use_cache=True).past_key_values
        for token in ids[8:]:
            logits_V = stepper.step([state], [token])[0]
            output = opened.model(input_ids=torch.tensor([[token]]), past_key_values=own, use_cache=True)
            torch.testing.assert_close(logits_V, output.logits[0, -1], rtol=1e-4, atol=1e-4)
            assert state.cache is not None
            assert torch.equal(state.cache.done_EB, own.done_EB)
            assert state.cache.anchor == own.anchor
    stepper.close()


def test_the_model_is_left_as_it_was() -> None:
    """While an engine has it, its own passes give the same bits; closed, its settings are what they were."""
    model = tiny.llama()
    ids_BT = tiny.prompts(3, 9)
    with torch.no_grad():
        before = model(input_ids=ids_BT).logits
        generated = model.generate(ids_BT, attention_mask=torch.ones_like(ids_BT), max_new_tokens=5, do_sample=False)
    engine = Engine(plain(model))
    assert model.config._attn_implementation == ATTENTION
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids_BT).logits, before)
        found = model.generate(ids_BT, attention_mask=torch.ones_like(ids_BT), max_new_tokens=5, do_sample=False)
    assert torch.equal(found, generated)
    engine.close()
    assert model.config._attn_implementation == "sdpa"


def test_attention_that_is_passed_by_is_an_error_not_an_answer() -> None:
    """Whoever exchanges the model's attention under a running engine gets no wrong tokens."""
    opened = plain(tiny.llama())
    engine = Engine(opened)
    sampling = Sampling(max_tokens=30, temperature=0.0, ignore_eos=True)
    expected = ask(engine, [3, 4], sampling)
    with held(engine):
        ticket = engine.submit([3, 4], sampling)
        opened.model.config._attn_implementation = "sdpa"
    end = collect(ticket).end
    assert end.reason == "error"
    assert "passes `ragged_attention` by" in end.message
    again = Attention([opened.model])
    assert ask(engine, [3, 4], sampling) == expected
    again.restore()
    engine.close()
