"""Reading what was drawn: rows, shards and probes."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from weftlm.corpora.source import ArraySource
from weftlm.errors import ConfigError, DataError
from weftlm.mixture.loader import Batch, MixtureLoader, sequence_counts
from weftlm.mixture.sampler import MixtureSampler, SamplerExhausted

T = 4
SIZES = (41, 60, 17)


def sources() -> list[ArraySource]:
    """Token j of source i is 1000 i + j, so that a row tells where it came from."""
    return [ArraySource(1000 * index + np.arange(size)) for index, size in enumerate(SIZES)]


def loader(batch: int = 6, world: int = 1, rank: int = 0, **options: object) -> MixtureLoader:
    parts = sources()
    sampler = MixtureSampler(sequence_counts(parts, T), batch, 5, names=["a", "b", "c"], **options)  # type: ignore[arg-type]
    return MixtureLoader(parts, sampler, T, rank=rank, world=world)


def rows(batch: Batch) -> list[list[int]]:
    return batch.tokens_BT1.tolist()


def test_sequence_counts_leave_room_for_the_last_label() -> None:
    assert sequence_counts(sources(), T) == [10, 14, 4]
    with pytest.raises(DataError, match=r"of 51 tokens: domain 'a' \(41 tokens\), 'c' \(17 tokens\); give"):
        sequence_counts(sources(), 50, ["a", "b", "c"])
    with pytest.raises(ConfigError, match="sequence_length is 0"):
        sequence_counts(sources(), 0)


def test_rows_are_the_sequences_drawn_and_those_of_a_probe() -> None:
    batches = loader()
    for step in range(10):
        batch = batches.next(min_per_domain=step % 2)
        assert (batch.step, batch.tokens_BT1.dtype) == (step, torch.int64)
        first_B = 1000 * batch.draw.domains_B + T * batch.draw.sequences_B
        assert rows(batch) == (first_B[:, None] + np.arange(T + 1)).tolist()
        assert batch.domains_B.tolist() == batch.draw.domains_B.tolist()
    probe = batches.sampler.probe(0, None, 3)
    first_N = 1000 * probe.domains_N + T * probe.sequences_N
    assert batches.probe_tokens(probe).tolist() == (first_N[:, None] + np.arange(T + 1)).tolist()


def test_ranks_share_a_batch_and_state_is_the_samplers() -> None:
    whole, ranks = loader(), [loader(world=3, rank=rank) for rank in range(3)]
    for _ in range(5):
        parts = [part.next() for part in ranks]
        assert [row for part in parts for row in rows(part)] == rows(whole.next())
        assert [len(part.domains_B) for part in parts] == [2, 2, 2]
    state = json.loads(json.dumps(whole.sampler.state_dict()))
    expected = [rows(whole.next()) for _ in range(6)]
    other = loader()
    other.sampler.load_state_dict(state)
    assert [rows(other.next()) for _ in range(6)] == expected


@pytest.mark.parametrize("exhaustion", ["drop", "stop"])
def test_iteration_ends_when_the_caps_say_so(exhaustion: str) -> None:
    batches = loader(exhaustion=exhaustion)
    steps = [batch.step for batch in batches]
    assert steps == list(range(len(steps)))
    assert 0 < len(steps) <= 28 // 6
    with pytest.raises(SamplerExhausted):
        batches.next()
    assert batches.sampler.step == len(steps)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 2, "world": 2}, "no rank 2 of 2"),
        ({"rank": 0, "world": 4}, "multiple of the number of processes"),
        ({"sequence_length": 5}, r"domain 'a' has 8 sequences of 5 tokens, the sampler was made for 10"),
        ({"sources": sources()[:2]}, "2 sources for a sampler of 3 domains"),
    ],
)
def test_arguments_are_checked(options: dict[str, object], message: str) -> None:
    sampler = MixtureSampler(sequence_counts(sources(), T), 6, 0, names=["a", "b", "c"])
    given = {"sources": sources(), "sampler": sampler, "sequence_length": T, **options}
    with pytest.raises(ConfigError, match=message):
        MixtureLoader(**given)  # type: ignore[arg-type]
