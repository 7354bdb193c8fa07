"""An engine gives every request what the model gives, in turn, and ends each as it should."""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.asking import Answer, Ticket, ask, collect, held
from support.served import KINDS
from torch.utils.hooks import RemovableHandle

from weftlm.errors import ConfigError
from weftlm.pipeline.any_model import OpenModel, open_model
from weftlm.serving import engine as engine_module
from weftlm.serving.engine import Engine
from weftlm.serving.request import Event, Finished, QueueFullError, Sampling

GREEDY = Sampling(max_tokens=12, temperature=0.0, ignore_eos=True)
LONG = Sampling(max_tokens=200, temperature=0.0, ignore_eos=True)
PROMPT = [72, 101, 30, 108, 12, 17, 250, 3]


@pytest.fixture(scope="module")
def engine(opened: OpenModel) -> Iterator[Engine]:
    made = Engine(opened, slots=2, max_waiting=2)
    yield made
    made.close()


@pytest.mark.parametrize("slots", [1, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_what_generate_gives(
    folders: dict[str, Path], kind: str, slots: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_module, "PREFILL_TOKENS", 5)
    opened = open_model(folders[kind])
    prompts = [[(7 * place + 13 * length) % 256 for place in range(length)] for length in (1, 2, 40)]
    expected = []
    for prompt in prompts:
        ids_1T = torch.tensor([prompt])
        found = opened.model.generate(
            ids_1T, attention_mask=torch.ones_like(ids_1T), do_sample=False, max_new_tokens=12, pad_token_id=0
        )
        expected.append(found[0, len(prompt) :].tolist())
    engine = Engine(opened, slots=slots)
    answers = [ask(engine, prompt, Sampling(max_tokens=12, temperature=0.0)) for prompt in prompts]
    drawn = ask(engine, PROMPT, Sampling(max_tokens=8, temperature=1.5, seed=1, logprobs=4, ignore_eos=True))
    engine.close()
    for answer, ids in zip(answers, expected, strict=True):
        ended = ids[-1] == opened.tokenizer.eos_id
        assert answer.ids == (ids[:-1] if ended else ids)
        assert answer.end.reason == ("stop" if ended else "length")
    with torch.no_grad():
        logits_TV = opened.model(input_ids=torch.tensor([PROMPT + drawn.ids])).logits[0, len(PROMPT) - 1 :]
    for token, logp_V in zip(drawn.tokens, torch.log_softmax(logits_TV.float(), dim=-1)[:-1], strict=True):
        assert token.logprob == pytest.approx(float(logp_V[token.id]), abs=1e-4)
        assert [nats for _, nats in token.top] == pytest.approx(logp_V.topk(4).values.tolist(), abs=1e-4)


def test_end_of_text_ends_the_answer_and_is_no_token(opened: OpenModel, engine: Engine) -> None:
    """Generation settings may name several; the tokenizer's own counts too."""
    free = ask(engine, PROMPT, GREEDY)
    second = next(token for token in free.ids if token != free.ids[0])
    settings = opened.model.generation_config
    before, settings.eos_token_id = settings.eos_token_id, [second, 319]
    try:
        ending = Engine(opened)
    finally:
        settings.eos_token_id = before
    answer = ask(ending, PROMPT, Sampling(max_tokens=12, temperature=0.0))
    ignoring = ask(ending, PROMPT, GREEDY)
    ending.close()
    assert (answer.ids, answer.end.reason) == (free.ids[: free.ids.index(second)], "stop")
    assert answer.text == opened.tokenizer.decode(answer.ids)
    assert ignoring == free


# -- the queue ------------------------------------------------------------------------------------------------------


def test_more_than_may_wait_are_refused(engine: Engine) -> None:
    with held(engine):
        tickets = [Ticket(engine, PROMPT, GREEDY) for _ in range(4)]
        with pytest.raises(QueueFullError, match="wait already"):
            Ticket(engine, PROMPT, GREEDY)
        assert engine.waiting == 4
    answers = [collect(ticket) for ticket in tickets]
    assert all(answer == answers[0] for answer in answers)
    assert engine.waiting == engine.running == 0
    collect(Ticket(engine, PROMPT, GREEDY))


def test_a_long_prompt_does_not_starve_those_that_run(opened: OpenModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two pieces of a prompt every running request gets a token; a short request ends before a long one."""
    monkeypatch.setattr(engine_module, "PREFILL_TOKENS", 8)
    engine = Engine(opened, slots=2)
    events: list[str] = []
    running = Ticket(engine, PROMPT, LONG, on_event=lambda: events.append("running")).begun()
    with held(engine):
        events.clear()
        long = Ticket(engine, [5] * 96, GREEDY, on_event=lambda: events.append("long"))
    assert collect(long).end.reason == "length"
    assert events.index("long") == 11, "one token beside each of 11 pieces; with the 12th the long one has a token"
    assert running.request.finished is None
    engine.close()


def test_giving_up(engine: Engine) -> None:
    """Running or waiting, an ended batch slot is free for the next; giving up twice, or after the end, is harmless."""
    running = [Ticket(engine, PROMPT, LONG).begun() for _ in range(2)]
    waiting = [Ticket(engine, PROMPT, GREEDY) for _ in range(2)]
    with held(engine):
        cache = weakref.ref(running[0].request.state)
    waiting[0].cancel()
    assert collect(waiting[0]) == Answer((), Finished("cancelled"))
    running[0].cancel()
    assert collect(running[0]).end.reason == "cancelled"
    assert collect(waiting[1]).end.reason == "length"
    running[1].cancel()
    running[1].cancel()
    assert collect(running[1]).end.reason == "cancelled"
    waiting[1].cancel()
    assert ask(engine, PROMPT, GREEDY).end.reason == "length"
    gc.collect()
    assert cache() is None, "what a request kept of the model is freed"


def test_time_limits_count_the_wait_too(opened: OpenModel, monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = [0.0]
    monkeypatch.setattr(engine_module, "monotonic", lambda: now_s[0])
    engine = Engine(opened, slots=1, timeout_seconds=10)
    running = Ticket(engine, PROMPT, LONG).begun()
    with held(engine):
        waiting = Ticket(engine, PROMPT, GREEDY, timeout_s=3.0)
        patient = Ticket(engine, PROMPT, GREEDY, timeout_s=30.0)
        now_s[0] = 5.0
    assert collect(waiting) == Answer((), Finished("timeout"))
    running.begun()
    now_s[0] = 10.0
    assert collect(running).end.reason == "timeout"
    assert collect(patient).end.reason == "length"
    engine.close()


# -- when things go wrong -------------------------------------------------------------------------------------------


def test_a_receiver_that_fails_stops_no_other(engine: Engine, caplog: pytest.LogCaptureFixture) -> None:
    def fail() -> None:
        raise ZeroDivisionError

    assert collect(Ticket(engine, PROMPT, GREEDY, on_event=fail)) == ask(engine, PROMPT, GREEDY)
    assert "receiver of a request's events failed" in caplog.text


@pytest.mark.parametrize("shared", [True, False])
def test_an_error_ends_the_requests_of_its_pass(
    folders: dict[str, Path], shared: bool, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = open_model(folders["plain"])
    engine = Engine(opened, slots=2)
    monkeypatch.setattr(type(engine._stepper), "together", shared)
    expected = ask(engine, PROMPT, GREEDY)
    tickets = [Ticket(engine, PROMPT, LONG).begun() for _ in range(2)]

    def fail_at(tokens: int) -> None:
        def fail(_: Any, __: Any, arguments: dict[str, Any]) -> None:
            if arguments["input_ids"].shape[1] == tokens:
                hook.remove()
                raise RuntimeError("out of memory")

        hook: RemovableHandle = opened.model.register_forward_pre_hook(fail, with_kwargs=True)

    with held(engine):
        fail_at(1)
    ends = []
    for ticket in tickets:
        if not shared and ends:
            ticket.cancel()
        ends.append(collect(ticket).end)
    assert [end.reason for end in ends] == (["error", "error"] if shared else ["error", "cancelled"])
    assert ends[0].message == "RuntimeError: out of memory"
    assert "out of memory" in caplog.text
    # A prompt that fails ends its own request alone.
    running = Ticket(engine, PROMPT, LONG).begun()
    with held(engine):
        failing = Ticket(engine, PROMPT, GREEDY)
        fail_at(len(PROMPT))
    assert collect(failing) == Answer((), Finished("error", "", "RuntimeError: out of memory"))
    running.begun()
    assert ask(engine, PROMPT, GREEDY) == expected
    with held(engine), torch.no_grad():
        opened.model.get_input_embeddings().weight[319] = torch.nan
    assert "cannot be drawn" in ask(engine, [319], GREEDY).end.message
    engine.close()


def test_closing_ends_everything(opened: OpenModel, caplog: pytest.LogCaptureFixture) -> None:
    """Closing twice is closing once, and a receiver may close too."""
    engine = Engine(opened, slots=1)
    with held(engine):
        closing = Ticket(engine, PROMPT, LONG, on_event=engine.close)
        tickets = [closing, *(Ticket(engine, PROMPT, LONG) for _ in range(2))]
    assert [collect(ticket).end.reason for ticket in tickets] == ["cancelled"] * 3
    engine.close()
    assert engine.running == engine.waiting == 0
    with pytest.raises(ConfigError, match="the engine is closed"):
        Ticket(engine, PROMPT, GREEDY)
    assert not caplog.records


def test_no_request_waits_for_an_engine_whose_worker_was_stopped(opened: OpenModel) -> None:
    engine = Engine(opened, slots=1)
    with held(engine):
        tickets = [Ticket(engine, PROMPT, LONG) for _ in range(2)]
        engine._sweep = sys.exit  # type: ignore[method-assign]
    ends = [collect(ticket).end for ticket in tickets]
    assert [end.reason for end in ends] == ["error", "error"]
    assert "the engine has stopped: SystemExit" in ends[0].message
    engine.close()


@pytest.mark.parametrize(
    ("prompt", "most", "message"),
    [([], 1, "empty"), ([320], 1, "from 0 to 319"), ([-1], 1, "holds -1"), ([1] * 200, 57, "reads 256 tokens at most")],
)
def test_prompts_out_of_range_are_refused(engine: Engine, prompt: list[int], most: int, message: str) -> None:
    sent: list[Event] = []
    with pytest.raises(ConfigError, match=message):
        engine.submit(prompt, Sampling(max_tokens=most), sent.append)
    assert sent == []
