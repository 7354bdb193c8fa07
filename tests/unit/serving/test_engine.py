"""An engine gives every request what the model says, in turn, and ends each as it should."""

from __future__ import annotations

import gc
import sys
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.asking import PATIENCE_S, Answer, ask, collect, held
from support.served import KINDS, write_model
from torch.utils.hooks import RemovableHandle

from weftlm.errors import ConfigError
from weftlm.pipeline.any_model import OpenModel, open_model
from weftlm.serving.engine import Engine
from weftlm.serving.request import Finished, QueueFullError, Sampling, Token
from weftlm.serving.serve_config import EngineConfig

GREEDY = Sampling(max_tokens=12, temperature=0.0, ignore_eos=True)
LONG = Sampling(max_tokens=200, temperature=0.0, ignore_eos=True)
PROMPT = [72, 101, 30, 108, 12, 17, 250, 3]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {kind: write_model(folder / kind, kind) for kind in KINDS}


@pytest.fixture(scope="module")
def plain(folders: dict[str, Path]) -> OpenModel:
    return open_model(folders["plain"])


@pytest.fixture(scope="module")
def engine(plain: OpenModel) -> Iterator[Engine]:
    made = Engine(plain, EngineConfig(slots=2, max_waiting=2))
    yield made
    made.close()


class Clock:
    """Time that stands still until it is told to go on."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


# -- what is generated ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batching", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_greedy_is_what_generate_gives(folders: dict[str, Path], kind: str, batching: bool) -> None:
    opened = open_model(folders[kind])
    lengths = (1, 2, 7, 40)
    prompts = [[(7 * place + 13 * length) % 256 for place in range(length)] for length in lengths]
    expected = []
    for prompt in prompts:
        ids_1T = torch.tensor([prompt])
        found = opened.model.generate(
            ids_1T, attention_mask=torch.ones_like(ids_1T), do_sample=False, max_new_tokens=20, pad_token_id=0
        )
        expected.append(found[0, len(prompt) :].tolist())
    engine = Engine(opened, EngineConfig(batching=batching))
    try:
        answers = [ask(engine, prompt, Sampling(max_tokens=20, temperature=0.0)) for prompt in prompts]
    finally:
        engine.close()
    for answer, ids in zip(answers, expected, strict=True):
        ended = ids[-1] == opened.tokenizer.eos_id
        assert answer.ids == (ids[:-1] if ended else ids)
        assert answer.end.reason == ("stop" if ended else "length")


@pytest.mark.parametrize("kind", KINDS)
def test_log_probabilities_are_the_models(folders: dict[str, Path], kind: str) -> None:
    opened = open_model(folders[kind])
    engine = Engine(opened, EngineConfig(prompt_piece_tokens=3))
    answer = ask(engine, PROMPT, Sampling(max_tokens=8, temperature=1.5, seed=1, logprobs=4, ignore_eos=True))
    engine.close()
    with torch.no_grad():
        logits_TV = opened.model(input_ids=torch.tensor([PROMPT + answer.ids])).logits[0, len(PROMPT) - 1 :]
    logp_TV = torch.log_softmax(logits_TV.float(), dim=-1)
    for token, logp_V in zip(answer.tokens, logp_TV[:-1], strict=True):
        assert token.logprob == pytest.approx(float(logp_V[token.id]), abs=1e-4)
        assert [nats for _, nats in token.top] == pytest.approx(logp_V.topk(4).values.tolist(), abs=1e-4)


def test_the_texts_make_the_text_of_the_ids(engine: Engine) -> None:
    for seed in range(6):
        answer = ask(engine, PROMPT, Sampling(max_tokens=30, temperature=2.0, seed=seed, ignore_eos=True))
        assert answer.text == engine.opened.tokenizer.decode(answer.ids)
        assert len(answer.ids) == 30
        assert answer.end.reason == "length"


def test_a_stop_text_ends_the_answer(engine: Engine) -> None:
    whole = ask(engine, PROMPT, Sampling(max_tokens=30, temperature=1.0, seed=4, ignore_eos=True))
    stop = whole.text[10:13]
    assert stop
    answer = ask(engine, PROMPT, Sampling(max_tokens=30, temperature=1.0, seed=4, ignore_eos=True, stop=("\0\0", stop)))
    assert answer.end.reason == "stop"
    assert answer.text == whole.text[: whole.text.index(stop)]
    assert answer.ids == whole.ids[: len(answer.ids)]
    assert len(answer.ids) < 30


def test_end_of_text_ends_the_answer_and_is_no_token(plain: OpenModel) -> None:
    """Generation settings may name several; the tokenizer's own counts too."""
    engine = Engine(plain)
    free = ask(engine, PROMPT, GREEDY)
    engine.close()
    second = next(token for token in free.ids if token != free.ids[0])
    place = free.ids.index(second)
    settings = plain.model.generation_config
    before, settings.eos_token_id = settings.eos_token_id, [second, 319]
    try:
        engine = Engine(plain)
        answer = ask(engine, PROMPT, Sampling(max_tokens=12, temperature=0.0))
        ignoring = ask(engine, PROMPT, GREEDY)
        engine.close()
    finally:
        settings.eos_token_id = before
    assert (answer.ids, answer.end.reason) == (free.ids[:place], "stop")
    assert answer.text == plain.tokenizer.decode(answer.ids)
    assert ignoring == free


def test_a_seed_is_drawn_where_none_is_given(engine: Engine) -> None:
    free = Sampling(max_tokens=12, temperature=3.0, ignore_eos=True)
    assert ask(engine, PROMPT, free).ids != ask(engine, PROMPT, free).ids


# -- the queue ------------------------------------------------------------------------------------------------------


def test_more_than_may_wait_are_refused(engine: Engine) -> None:
    with held(engine):
        tickets = [engine.submit(PROMPT, GREEDY) for _ in range(4)]
        with pytest.raises(QueueFullError, match="wait already") as refused:
            engine.submit(PROMPT, GREEDY)
        assert 0.1 <= refused.value.retry_after_s <= 60
        assert engine.load().waiting == 4
    answers = [collect(ticket) for ticket in tickets]
    assert all(answer == answers[0] for answer in answers)
    assert engine.load().waiting == engine.load().running == 0
    collect(engine.submit(PROMPT, GREEDY))


def test_the_guess_at_when_there_is_room_follows_the_throughput(engine: Engine) -> None:
    ask(engine, PROMPT, GREEDY)
    with held(engine):
        engine._turn_s = 0.5
    tickets = [engine.submit(PROMPT, LONG) for _ in range(2)]
    assert all(isinstance(ticket.next(PATIENCE_S), Token) for ticket in tickets)
    with held(engine):
        engine._turn_s = 0.01
        waiting = [engine.submit(PROMPT, GREEDY) for _ in range(2)]
        with pytest.raises(QueueFullError) as refused:
            engine.submit(PROMPT, GREEDY)
        left = min(LONG.max_tokens - request.generated for request in engine._running)
        assert refused.value.retry_after_s == pytest.approx(max(0.1, 0.01 * left))
    for ticket in (*tickets, *waiting):
        ticket.cancel()
        collect(ticket)


def test_requests_join_while_others_run(engine: Engine) -> None:
    """A short request asked later ends before a long one asked first."""
    long = engine.submit(PROMPT, LONG)
    assert isinstance(long.next(PATIENCE_S), Token)
    short = ask(engine, PROMPT, GREEDY)
    assert short.end.reason == "length"
    with held(engine):
        assert engine.load().running == 1
    long.cancel()
    assert collect(long).end.reason == "cancelled"


def test_a_long_prompt_does_not_starve_those_that_run(plain: OpenModel) -> None:
    """Between two pieces of a prompt every running request gets a token."""
    engine = Engine(plain, EngineConfig(slots=2, prompt_piece_tokens=8))
    events: list[str] = []
    with held(engine):
        running = engine.submit(PROMPT, LONG, on_event=lambda: events.append("running"))
    assert isinstance(running.next(PATIENCE_S), Token)
    with held(engine):
        events.clear()
        long = engine.submit([5] * 96, GREEDY, on_event=lambda: events.append("long"))
    long.next(PATIENCE_S)
    engine.close()
    # The turn in which it was asked, and those of 11 pieces; with the 12th the long one has a token.
    assert events.index("long") == 12


def test_giving_up(engine: Engine) -> None:
    """Running or waiting, an ended place is free for the next; giving up twice, or after the end, is harmless."""
    running = [engine.submit(PROMPT, LONG) for _ in range(2)]
    assert all(isinstance(ticket.next(PATIENCE_S), Token) for ticket in running)
    waiting = [engine.submit(PROMPT, GREEDY) for _ in range(2)]
    waiting[0].cancel()
    assert waiting[0].next(0) == Finished("cancelled")
    running[0].cancel()
    assert collect(running[0]).end == Finished("cancelled", collect(running[0]).end.text)
    assert collect(waiting[1]).end.reason == "length"
    running[1].cancel()
    running[1].cancel()
    assert collect(running[1]).end.reason == "cancelled"
    waiting[1].cancel()
    assert collect(waiting[1]).end.reason == "length"


def test_time_limits_count_the_wait_too(plain: OpenModel) -> None:
    clock = Clock()
    engine = Engine(plain, EngineConfig(slots=1, timeout_seconds=10), clock=clock)
    running = engine.submit(PROMPT, LONG)
    assert isinstance(running.next(PATIENCE_S), Token)
    with held(engine):
        waiting = engine.submit(PROMPT, GREEDY, timeout_s=3.0)
        patient = engine.submit(PROMPT, GREEDY, timeout_s=30.0)
        clock.now_s = 5.0
    assert collect(waiting) == Answer((), Finished("timeout"))
    assert isinstance(running.next(PATIENCE_S), Token)
    clock.now_s = 10.0
    ended = collect(running)
    assert ended.end.reason == "timeout"
    assert collect(patient).end.reason == "length"
    load = engine.load()
    assert load.finished == {"stop": 0, "length": 1, "timeout": 2, "cancelled": 0, "error": 0}
    assert load.prompt_tokens == 2 * len(PROMPT)
    assert load.generated_tokens == 2 + len(ended.tokens) + 12
    engine.close()


def test_tickets_do_not_block_for_nothing(engine: Engine) -> None:
    with held(engine):
        ticket = engine.submit(PROMPT, GREEDY)
        with pytest.raises(TimeoutError, match="the request goes on"):
            ticket.next(0)
        with pytest.raises(TimeoutError):
            ticket.next(0.001)
    answer = collect(ticket)
    assert ticket.next(0) == ticket.next() == answer.end


def test_whoever_asks_to_is_told_of_every_event(engine: Engine) -> None:
    told: list[Token | Finished] = []
    ended = threading.Event()

    def listen() -> None:
        told.append(ticket.next(0))
        engine.load()  # no lock is held
        if isinstance(told[-1], Finished):
            ended.set()

    with held(engine):
        ticket = engine.submit(PROMPT, GREEDY, on_event=listen)
    assert ended.wait(PATIENCE_S)
    assert Answer(tuple(told[:-1]), told[-1]) == ask(engine, PROMPT, GREEDY)  # type: ignore[arg-type]


# -- when things go wrong -------------------------------------------------------------------------------------------


def test_a_listener_that_fails_stops_nobody(engine: Engine, caplog: pytest.LogCaptureFixture) -> None:
    def listen() -> None:
        raise ZeroDivisionError

    assert collect(engine.submit(PROMPT, GREEDY, on_event=listen)) == ask(engine, PROMPT, GREEDY)
    assert "listens" in caplog.text


@pytest.mark.parametrize("batching", [True, False])
def test_an_error_ends_the_requests_of_its_pass(
    folders: dict[str, Path], batching: bool, caplog: pytest.LogCaptureFixture
) -> None:
    opened = open_model(folders["plain"])
    engine = Engine(opened, EngineConfig(slots=2, batching=batching))
    expected = ask(engine, PROMPT, GREEDY)
    tickets = [engine.submit(PROMPT, LONG) for _ in range(2)]
    assert all(isinstance(ticket.next(PATIENCE_S), Token) for ticket in tickets)

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
        if not batching and ends:
            ticket.cancel()
        ends.append(collect(ticket).end)
    assert [end.reason for end in ends] == (["error", "error"] if batching else ["error", "cancelled"])
    assert ends[0].message == "RuntimeError: out of memory"
    assert "out of memory" in caplog.text
    # A prompt that fails ends its own request alone.
    running = engine.submit(PROMPT, LONG)
    assert isinstance(running.next(PATIENCE_S), Token)
    with held(engine):
        failing = engine.submit(PROMPT, GREEDY)
        fail_at(len(PROMPT))
    assert collect(failing) == Answer((), Finished("error", "", "RuntimeError: out of memory"))
    assert isinstance(running.next(PATIENCE_S), Token)
    assert ask(engine, PROMPT, GREEDY) == expected
    engine.close()


def test_a_model_that_says_nan_ends_the_request(folders: dict[str, Path]) -> None:
    opened = open_model(folders["plain"])
    engine = Engine(opened)
    good = ask(engine, PROMPT, GREEDY)
    with torch.no_grad():
        opened.model.get_input_embeddings().weight[319] = torch.nan
    tickets = [engine.submit(prompt, GREEDY) for prompt in ([319], PROMPT)]
    bad, other = (collect(ticket) for ticket in tickets)
    engine.close()
    assert bad.end.reason == "error"
    assert "cannot be drawn" in bad.end.message
    assert other == good


def test_closing_ends_everything(plain: OpenModel) -> None:
    engine = Engine(plain, EngineConfig(slots=1))
    tickets = [engine.submit(PROMPT, LONG) for _ in range(3)]
    tickets[0].next(PATIENCE_S)
    engine.close()
    engine.close()
    assert [collect(ticket).end.reason for ticket in tickets] == ["cancelled"] * 3
    assert engine.load().running == engine.load().waiting == 0
    with pytest.raises(ConfigError, match="the engine is closed"):
        engine.submit(PROMPT, GREEDY)
    with pytest.raises(ConfigError, match="the engine is closed"):
        engine.call(gc.collect)


def test_nobody_waits_for_an_engine_whose_worker_was_stopped(plain: OpenModel) -> None:
    engine = Engine(plain, EngineConfig(slots=1))
    with held(engine):
        tickets = [engine.submit(PROMPT, LONG) for _ in range(2)]
    with pytest.raises(SystemExit):
        engine.call(sys.exit)
    ends = [collect(ticket).end for ticket in tickets]
    assert [end.reason for end in ends] == ["error", "error"]
    assert "the engine has stopped: SystemExit" in ends[0].message
    with pytest.raises(ConfigError, match="the engine is closed"):
        engine.submit(PROMPT, GREEDY)
    engine.close()


def test_caches_are_freed(plain: OpenModel) -> None:
    engine = Engine(plain, EngineConfig(slots=2))
    tickets = [engine.submit(PROMPT, LONG) for _ in range(2)]
    for ticket in tickets:
        ticket.next(PATIENCE_S)
    states = engine.call(lambda: [weakref.ref(request.state) for request in engine._running])
    assert len(states) == 2
    for ticket in tickets:
        ticket.cancel()
        collect(ticket)
    ask(engine, PROMPT, GREEDY)
    gc.collect()
    assert [state() for state in states] == [None, None]
    engine.close()


def test_work_between_turns(engine: Engine) -> None:
    assert engine.call(threading.current_thread).name == "weftlm-engine"
    with pytest.raises(ZeroDivisionError):
        engine.call(lambda: 1 // 0)
    assert engine.call(lambda: engine.call(lambda: 3)) == 3
    assert ask(engine, PROMPT, GREEDY).end.reason == "length"


def test_requests_out_of_range_are_refused(engine: Engine) -> None:
    with pytest.raises(ConfigError, match="the prompt is empty"):
        engine.submit([], GREEDY)
    with pytest.raises(ConfigError, match="ids are whole numbers from 0 to 319"):
        engine.submit([320], GREEDY)
    with pytest.raises(ConfigError, match="the model reads 256 at most"):
        engine.submit([1] * 200, Sampling(max_tokens=57))
    with pytest.raises(ConfigError, match="timeout_s is 0"):
        engine.submit([1], GREEDY, timeout_s=0)
    assert ask(engine, [1] * 250, Sampling(max_tokens=6, ignore_eos=True, seed=0)).end.reason == "length"
