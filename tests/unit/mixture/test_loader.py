"""Reading what was drawn: rows, shards, and reading ahead that must not show."""

from __future__ import annotations

import gc
import json
import runpy
import threading
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from weftlm.corpora.source import ArraySource
from weftlm.errors import CheckpointError, ConfigError, DataError
from weftlm.mixture.loader import Batch, MixtureLoader, sequence_counts
from weftlm.mixture.sampler import MixtureSampler, SamplerExhausted

T = 4
SIZES = (41, 60, 17)


class Fragile(ArraySource):
    """A source whose reads can be made to fail, all of them or those of one sequence."""

    failure: Exception | None = None
    bad_start: int | None = None

    def read_many(self, starts_N: NDArray[np.int64], count: int) -> NDArray[np.int64]:
        if self.failure is not None and (self.bad_start is None or self.bad_start in starts_N):
            raise self.failure
        return super().read_many(starts_N, count)


def sources() -> list[Fragile]:
    """Token j of source i is 1000 i + j, so that a row tells where it came from."""
    return [Fragile(1000 * index + np.arange(size)) for index, size in enumerate(SIZES)]


def loader(prefetch: int = 0, batch: int = 6, world: int = 1, rank: int = 0, **options: object) -> MixtureLoader:
    parts = sources()
    sampler = MixtureSampler(sequence_counts(parts, T), batch, 5, names=["a", "b", "c"], **options)  # type: ignore[arg-type]
    return MixtureLoader(parts, sampler, T, rank=rank, world=world, prefetch_steps=prefetch)


def rows(batch: Batch) -> list[list[int]]:
    return batch.tokens_BT1.tolist()


def source(loader: MixtureLoader, index: int = 0) -> Fragile:
    part = loader._reader._sources[index]
    assert isinstance(part, Fragile)
    return part


def wait_until_ahead(loader: MixtureLoader, batches: int) -> None:
    """Wait for the thread to have read so many batches that nobody asked for yet."""
    ahead = loader._ahead
    with ahead._changed:
        assert ahead._changed.wait_for(lambda: sum(entry.ready for entry in ahead._entries) >= batches, timeout=60)


def test_sequence_counts_leave_room_for_the_last_label() -> None:
    assert sequence_counts(sources(), T) == [10, 14, 4]
    with pytest.raises(DataError, match="domain 'c' has 17 tokens; one training sequence needs 18"):
        sequence_counts(sources(), 17, ["a", "b", "c"])
    with pytest.raises(ConfigError, match="sequence_length is 0"):
        sequence_counts(sources(), 0)


@pytest.mark.parametrize("prefetch", [0, 3])
def test_rows_are_the_sequences_drawn(prefetch: int) -> None:
    with loader(prefetch) as batches:
        for step in range(10):
            batch = batches.next()
            assert batch.step == step
            assert batch.tokens_BT1.dtype == torch.int64
            assert batch.tokens_BT1.shape == (6, T + 1)
            first_B = 1000 * batch.draw.domains_B + T * batch.draw.sequences_B
            assert rows(batch) == (first_B[:, None] + np.arange(T + 1)).tolist()
            assert batch.domains_B.tolist() == batch.draw.domains_B.tolist()


@pytest.mark.parametrize("prefetch", [0, 2])
def test_ranks_share_a_batch(prefetch: int) -> None:
    whole = loader()
    with loader(prefetch, world=3, rank=0) as a, loader(prefetch, world=3, rank=1) as b, loader(world=3, rank=2) as c:
        for _ in range(5):
            parts = [part.next() for part in (a, b, c)]
            assert [row for part in parts for row in rows(part)] == rows(whole.next())
            assert [len(part.domains_B) for part in parts] == [2, 2, 2]
            assert [len(part.draw) for part in parts] == [6, 6, 6]


@pytest.mark.parametrize("prefetch", [1, 4])
def test_reading_ahead_does_not_show(prefetch: int) -> None:
    plain = loader()
    with loader(prefetch) as ahead:
        for step in range(40):
            if step % 7 == 3:
                weights = np.array([step, 1, 2]) / (step + 3)
                for each in (plain, ahead):
                    each.set_weights(step, weights)
                    each.set_weights(step + 2, weights[::-1])
            stratified = step % 5 == 4
            assert ahead.state_dict() == plain.state_dict()
            a, b = plain.next(int(stratified)), ahead.next(int(stratified))
            assert rows(a) == rows(b)
            assert a.loss_weights_B.tolist() == b.loss_weights_B.tolist()
            assert ahead.sampler.epochs_D().tolist() == plain.sampler.epochs_D().tolist()


def test_weights_change_at_the_step_named_although_later_batches_were_read() -> None:
    with loader(4) as batches:
        batches.next()
        wait_until_ahead(batches, 4)
        batches.set_weights(2, [0.0, 0.0, 1.0])
        assert set(batches.next().domains_B.tolist()) != {2}
        assert set(batches.next().domains_B.tolist()) == {2}
        assert set(batches.next().domains_B.tolist()) == {2}
        batches.set_weights(4, [1.0, 0.0, 0.0])
        assert set(batches.next().domains_B.tolist()) == {0}
        with pytest.raises(ConfigError, match="earliest step that can change is 5"):
            batches.set_weights(4, [1.0, 0.0, 0.0])


def test_weights_set_behind_the_loaders_back_count_too() -> None:
    with loader(4) as batches:
        batches.next()
        wait_until_ahead(batches, 4)
        batches.sampler.set_weights(1, [0.0, 0.0, 1.0])
        assert set(batches.next().domains_B.tolist()) == {2}
        batches.sampler.draw()
        assert batches.next().step == 3


def test_the_state_is_that_of_the_next_batch_to_be_delivered() -> None:
    with loader(4) as batches:
        for _ in range(3):
            batches.next()
        wait_until_ahead(batches, 4)
        state = json.loads(json.dumps(batches.state_dict()))
        assert state["step"] == 3
        expected = [rows(batches.next()) for _ in range(6)]
        with loader(2) as other:
            other.load_state_dict(state)
            assert [rows(other.next()) for _ in range(6)] == expected
        batches.load_state_dict(state)
        assert [rows(batches.next()) for _ in range(6)] == expected
        with pytest.raises(CheckpointError):
            batches.load_state_dict({**state, "seed": 6})
        assert batches.next().step == 9


@pytest.mark.parametrize("prefetch", [0, 3])
@pytest.mark.parametrize("exhaustion", ["drop", "stop"])
def test_iteration_ends_when_the_caps_say_so(prefetch: int, exhaustion: str) -> None:
    batches = loader(prefetch, exhaustion=exhaustion)
    steps = [batch.step for batch in batches]
    assert steps == list(range(len(steps)))
    assert 0 < len(steps) <= 28 // 6
    assert list(batches) == []
    with pytest.raises(SamplerExhausted):
        batches.next()
    assert batches.sampler.step == len(steps)
    assert not any(thread.name == "weftlm-read-ahead" for thread in threading.enumerate())


def test_the_end_found_ahead_is_reconsidered_when_weights_change() -> None:
    with loader(4, batch=2, exhaustion="drop", weights_D=[0.0, 0.0, 1.0]) as batches:
        batches.next()
        wait_until_ahead(batches, 1)  # domain c has two batches; the thread meets the end next
        batches.set_weights(2, [0.5, 0.5, 0.0])
        assert set(batches.next().domains_B.tolist()) == {2}
        assert 2 not in batches.next().domains_B.tolist()


@pytest.mark.parametrize("prefetch", [0, 3])
def test_a_failing_read_reaches_the_consumer_and_can_be_tried_again(prefetch: int) -> None:
    plain = loader(weights_D=[1.0, 0.0, 0.0])
    with loader(prefetch, weights_D=[1.0, 0.0, 0.0]) as batches:
        assert rows(batches.next()) == rows(plain.next())
        wait_until_ahead(batches, prefetch)  # those are good; the failure comes behind them
        good = 1 + prefetch if prefetch else 1
        source(batches).failure = OSError("the disk is gone")
        for _ in range(good - 1):
            assert rows(batches.next()) == rows(plain.next())
        for _ in range(3):
            with pytest.raises(OSError, match="the disk is gone"):
                batches.next()
        assert batches.sampler.step == good
        source(batches).failure = None
        for _ in range(12):
            assert rows(batches.next()) == rows(plain.next())


@pytest.mark.parametrize("prefetch", [0, 8])
def test_a_failing_read_fails_its_own_batch_and_none_before(prefetch: int) -> None:
    plain = loader(weights_D=[0.5, 0.5, 0.0], batch=1)
    expected = [plain.next() for _ in range(30)]
    bad = next(step for step, batch in enumerate(expected) if step > 8 and batch.domains_B[0] == 0)
    start = int(expected[bad].draw.sequences_B[0]) * T
    good = next(
        step
        for step, batch in enumerate(expected)
        if batch.domains_B[0] == 0 and batch.draw.sequences_B[0] * T == start
    )
    with loader(prefetch, weights_D=[0.5, 0.5, 0.0], batch=1) as batches:
        source(batches).failure, source(batches).bad_start = OSError("bad sector"), start
        for step in range(good):
            assert rows(batches.next()) == rows(expected[step])
        with pytest.raises(OSError, match="bad sector"):
            batches.next()
        assert batches.sampler.step == good


def test_closing_ends_the_thread_and_loses_nothing() -> None:
    plain = loader()
    batches = loader(3)
    for _ in range(4):
        assert rows(batches.next()) == rows(plain.next())
    thread = batches._ahead._thread
    assert thread is not None
    assert thread.is_alive()
    batches.close()
    assert not thread.is_alive()
    assert rows(batches.next()) == rows(plain.next())
    batches.close()


def test_a_forgotten_loader_takes_its_thread_along() -> None:
    batches = loader(3)
    batches.next()
    thread, gone = batches._ahead._thread, weakref.ref(batches)
    assert thread is not None
    del batches
    gc.collect()
    assert gone() is None
    assert not thread.is_alive()


def test_probe_tokens_are_the_sequences_of_the_probe() -> None:
    with loader(2) as batches:
        batches.next()
        probe = batches.sampler.probe(0, None, 3)
        first_N = 1000 * probe.domains_N + T * probe.sequences_N
        assert batches.probe_tokens(probe).tolist() == (first_N[:, None] + np.arange(T + 1)).tolist()
        assert batches.sampler.step == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 2, "world": 2}, "rank 2 of 2 cannot take"),
        ({"rank": 0, "world": 4}, "multiple of the number of processes"),
        ({"prefetch_steps": -1}, "prefetch_steps is -1"),
        ({"sequence_length": 5}, r"domain 'a' has 8 sequences of 5 tokens, the sampler was made for 10"),
        ({"sources": sources()[:2]}, "2 sources for a sampler of 3 domains"),
    ],
)
def test_arguments_are_checked(options: dict[str, object], message: str) -> None:
    sampler = MixtureSampler(sequence_counts(sources(), T), 6, 0, names=["a", "b", "c"])
    given = {"sources": sources(), "sampler": sampler, "sequence_length": T, **options}
    with pytest.raises(ConfigError, match=message):
        MixtureLoader(**given)  # type: ignore[arg-type]


def test_the_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(Path(__file__).parents[3] / "examples" / "sampler.py"), run_name="__main__")
    assert "resumes exactly: True" in capsys.readouterr().out
