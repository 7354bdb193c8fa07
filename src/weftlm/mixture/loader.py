"""Batches of tokens: what the sampler drew, read from the sources.

Sequence i of a source is its tokens i*T .. i*T + T, T + 1 of them, so that inputs and shifted labels come from one row.
Nothing is read ahead: a change of weights takes effect at the step it names, and a checkpoint of the sampler is one of
the loader.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from weftlm.corpora.source import Source
from weftlm.errors import ConfigError, DataError
from weftlm.mixture.sampler import Draw, MixtureSampler, ProbeDraw, SamplerExhausted, check_share


@dataclass(frozen=True)
class Batch:
    """One rank's part of a batch.

    Attributes:
        step: the optimizer step it belongs to.
        tokens_BT1: int64, B this rank's sequences.
        domains_B: index of each sequence's domain, int64.
        loss_weights_B: factor on each sequence's loss, float64; 1 unless the draw was stratified.
        draw: the whole batch over all ranks, by reference.
    """

    step: int
    tokens_BT1: Tensor
    domains_B: NDArray[np.int64]
    loss_weights_B: NDArray[np.float64]
    draw: Draw


def sequence_counts(sources: Sequence[Source], sequence_length: int, names: Sequence[str] | None = None) -> list[int]:
    """Training sequences in each source: (tokens - 1) // T.

    Raises:
        DataError: sources are too short for one; the message names the domains.
    """
    if sequence_length < 1:
        raise ConfigError(f"sequence_length is {sequence_length}; it must be at least 1 token")
    counts = [(len(source) - 1) // sequence_length for source in sources]
    named = zip(names or range(len(sources)), sources, counts, strict=True)
    if short := [f"{str(name)!r} ({len(source)} tokens)" for name, source, count in named if count < 1]:
        raise DataError(
            f"too short for one training sequence of {sequence_length + 1} tokens: domain {', '.join(short[:8])}; "
            "give it more text, shorten the sequences, or have data.domains.min_tokens and data.domains.small drop or "
            "join such domains"
        )
    return counts


class MixtureLoader:
    """Delivers the batches a `MixtureSampler` draws, as tokens.

    Iterate over it, or call `next` to ask for a stratified batch at certain steps. Iteration ends when the sampler's
    caps let no further batch be filled. Weights and state are the sampler's.

    Args:
        sources: one per domain, in the sampler's order.
        sampler: draws the batches.
        sequence_length: T, tokens predicted per sequence.
        rank: this process.
        world: processes sharing each batch.
    Raises:
        ConfigError: the sources are not those the sampler was made for, or B does not divide by `world`.
        DataError: a source is too short for one sequence.
    """

    def __init__(
        self, sources: Sequence[Source], sampler: MixtureSampler, sequence_length: int, rank: int = 0, world: int = 1
    ) -> None:
        if len(sources) != len(sampler.sequences_D):
            raise ConfigError(
                f"{len(sources)} sources for a sampler of {len(sampler.sequences_D)} domains; give one each"
            )
        counts = sequence_counts(sources, sequence_length, sampler.names)
        for name, count, expected in zip(sampler.names, counts, sampler.sequences_D, strict=True):
            if count != expected:
                raise ConfigError(
                    f"domain {name!r} has {count} sequences of {sequence_length} tokens, the sampler was made for "
                    f"{expected}; make it with sequence_counts(sources, sequence_length)"
                )
        check_share(sampler.batch_size, rank, world)
        self.sources, self.sampler, self.sequence_length = tuple(sources), sampler, sequence_length
        self.rank, self.world = rank, world

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        try:
            return self.next()
        except SamplerExhausted:
            raise StopIteration from None

    def next(self, min_per_domain: int = 0) -> Batch:
        """The batch of the next step; `min_per_domain` as in `MixtureSampler.draw`.

        Raises:
            SamplerExhausted: the caps let no further batch be filled; the sampler's state is as before the call.
            Exception: a source cannot be read; the sampler has advanced.
        """
        draw = self.sampler.draw(min_per_domain)
        here = draw.shard(self.rank, self.world)
        tokens_BT1 = self._read(here.domains_B, here.sequences_B)
        return Batch(draw.step, tokens_BT1, here.domains_B, here.loss_weights_B, draw)

    def probe_tokens(self, draw: ProbeDraw) -> Tensor:
        """The tokens of a probe, int64 of shape (N, T + 1)."""
        return self._read(draw.domains_N, draw.sequences_N)

    def _read(self, domains_N: NDArray[np.int64], sequences_N: NDArray[np.int64]) -> Tensor:
        """Any sequences, by one `read_many` per domain."""
        tokens_NT1 = np.empty((len(domains_N), self.sequence_length + 1), dtype=np.int64)
        for domain in np.unique(domains_N):
            rows = np.flatnonzero(domains_N == domain)
            starts = sequences_N[rows] * self.sequence_length
            tokens_NT1[rows] = self.sources[domain].read_many(starts, self.sequence_length + 1)
        return torch.from_numpy(tokens_NT1)
