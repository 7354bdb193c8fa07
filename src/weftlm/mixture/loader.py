"""Batches of tokens: what the sampler drew, read from the sources, with reading ahead that nobody can notice.

Sequence i of a source is its tokens i*T .. i*T + T, T + 1 of them, so that inputs and shifted labels come from one row.
A background thread may read batches before they are asked for. What it reads is drawn by a copy of the sampler; the
sampler itself only ever stands at the next batch to be delivered. So a checkpoint never contains what was merely read
ahead, and a change of weights takes effect at the step it names: batches read too far are thrown away.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from weftlm.corpora.source import Source
from weftlm.errors import ConfigError, DataError
from weftlm.mixture.sampler import Draw, MixtureSampler, ProbeDraw, SamplerExhausted

BLOCK_TOKENS = 1 << 18
"""Batches smaller than this are read several at a time, which spares calls per domain."""

_log = logging.getLogger(__name__)


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
        DataError: a source is too short for one; the message names the domain.
    """
    if sequence_length < 1:
        raise ConfigError(f"sequence_length is {sequence_length}; it must be at least 1 token")
    counts = [(len(source) - 1) // sequence_length for source in sources]
    for index, (source, count) in enumerate(zip(sources, counts, strict=True)):
        if count < 1:
            raise DataError(
                f"domain {names[index] if names else str(index)!r} has {len(source)} tokens; one training sequence "
                f"needs {sequence_length + 1}; give it more text, shorten the sequences or leave it out"
            )
    return counts


class MixtureLoader:
    """Delivers the batches a `MixtureSampler` draws, as tokens.

    Iterate over it, or call `next` to ask for a stratified batch at certain steps. Iteration ends when the sampler's
    caps let no further batch be filled.

    Args:
        sources: one per domain, in the sampler's order.
        sampler: stands at the next batch to be delivered, always; its weights may be set here or there.
        sequence_length: T, tokens predicted per sequence.
        rank: this process.
        world: processes sharing each batch.
        prefetch_steps: batches read ahead by a background thread; 0 reads on demand, small batches a few at a time.
    Raises:
        ConfigError: the sources are not those the sampler was made for, or B does not divide by `world`.
        DataError: a source is too short for one sequence.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        sampler: MixtureSampler,
        sequence_length: int,
        rank: int = 0,
        world: int = 1,
        prefetch_steps: int = 0,
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
        if world < 1 or not 0 <= rank < world or sampler.batch_size % world:
            raise ConfigError(
                f"rank {rank} of {world} cannot take an equal part of a batch of {sampler.batch_size} sequences; "
                "choose a batch size that is a multiple of the number of processes"
            )
        if prefetch_steps < 0:
            raise ConfigError(f"prefetch_steps is {prefetch_steps}; it must be 0 or more")
        self.sampler = sampler
        self.rank, self.world = rank, world
        self.prefetch_steps = prefetch_steps
        self._reader = _Reader(tuple(sources), sequence_length, rank, world)
        local_tokens = (sampler.batch_size // world) * (sequence_length + 1)
        self._ahead = _ReadAhead(sampler, self._reader, prefetch_steps, max(1, BLOCK_TOKENS // local_tokens))
        self._changes = sampler.changes
        weakref.finalize(self, self._ahead.stop)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        try:
            return self.next()
        except SamplerExhausted:
            self.close()
            raise StopIteration from None

    def next(self, min_per_domain: int = 0) -> Batch:
        """The batch of the next step; `min_per_domain` as in `MixtureSampler.draw`.

        Read-ahead assumes ordinary batches, so asking for a stratified one discards what was read ahead.

        Raises:
            SamplerExhausted: the caps let no further batch be filled; the sampler's state is as before the call.
            Exception: whatever reading a source raised, in the thread too; the same batch comes again at the next call.
        """
        if self._changes != self.sampler.changes or self._ahead.next_step != self.sampler.step:
            self._resume_from_sampler()
        draw, tokens_BT1 = self._ahead.take(min_per_domain, self.sampler)
        self.sampler.advance(draw)
        here = draw.shard(self.rank, self.world)
        return Batch(draw.step, torch.from_numpy(tokens_BT1), here.domains_B, here.loss_weights_B, draw)

    def set_weights(self, step: int, weights_D: ArrayLike) -> None:
        """As `MixtureSampler.set_weights`; only batches read ahead from `step` on are thrown away."""
        follows = self._changes == self.sampler.changes and self._ahead.next_step == self.sampler.step
        self.sampler.set_weights(step, weights_D)
        if follows:
            self._ahead.rewind(self.sampler, keep_before=step)
            self._changes = self.sampler.changes

    def state_dict(self) -> dict[str, Any]:
        """The sampler's state at the next batch to be delivered, whatever was read ahead."""
        return self.sampler.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """As `MixtureSampler.load_state_dict`; everything read ahead is thrown away."""
        self.sampler.load_state_dict(state)
        self._resume_from_sampler()

    def probe_tokens(self, draw: ProbeDraw) -> Tensor:
        """The tokens of a probe, int64 of shape (N, T + 1)."""
        return torch.from_numpy(self._reader.rows(draw.domains_N, draw.sequences_N))

    def close(self) -> None:
        """End the background thread; a later `next` starts it anew."""
        self._ahead.stop()
        self._resume_from_sampler()

    def __enter__(self) -> MixtureLoader:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _resume_from_sampler(self) -> None:
        self._ahead.rewind(self.sampler)
        self._changes = self.sampler.changes


class _Reader:
    """Draws -> tokens, one `read_many` per domain."""

    def __init__(self, sources: tuple[Source, ...], sequence_length: int, rank: int, world: int) -> None:
        self._sources = sources
        self._length = sequence_length
        self._rank, self._world = rank, world

    def batches(self, draws: Sequence[Draw]) -> NDArray[np.int64]:
        """This rank's rows of some draws, shape (draws, B, T + 1)."""
        parts = [draw.shard(self._rank, self._world) for draw in draws]
        domains_N = np.concatenate([part.domains_B for part in parts])
        sequences_N = np.concatenate([part.sequences_B for part in parts])
        return self.rows(domains_N, sequences_N).reshape(len(draws), -1, self._length + 1)

    def rows(self, domains_N: NDArray[np.int64], sequences_N: NDArray[np.int64]) -> NDArray[np.int64]:
        """Any sequences, shape (N, T + 1)."""
        order_N = np.argsort(domains_N, kind="stable")
        sorted_N = domains_N[order_N]
        starts_N = sequences_N[order_N] * self._length
        ends = [*(np.flatnonzero(np.diff(sorted_N)) + 1).tolist(), len(order_N)]
        tokens_NT1 = np.empty((len(order_N), self._length + 1), dtype=np.int64)
        start = 0
        for end in ends:
            if end > start:
                source = self._sources[sorted_N[start]]
                tokens_NT1[order_N[start:end]] = source.read_many(starts_N[start:end], self._length + 1)
            start = end
        return tokens_NT1


class _Entry:
    """One batch drawn: waiting for its tokens, or read, or failed."""

    def __init__(self, draw: Draw) -> None:
        self.draw = draw
        self.tokens_BT1: NDArray[np.int64] | None = None
        self.failed = False

    @property
    def ready(self) -> bool:
        return self.tokens_BT1 is not None or self.failed


class _ReadAhead:
    """A queue of batches in order of step, drawn from a copy of the sampler, read by the consumer or by a thread.

    Invariant, under the lock: the copy stands right behind the last entry, and the sampler at the first. Whatever goes
    wrong in the thread only ends its work: the consumer meets the same batch itself and gets the error first hand.
    """

    def __init__(self, sampler: MixtureSampler, reader: _Reader, depth: int, largest_block: int) -> None:
        self._reader = reader
        self._depth = depth
        self._largest_block = largest_block
        self._block = 1
        self._changed = threading.Condition()
        self._entries: deque[_Entry] = deque()
        self._sampler = sampler.copy()
        self._ended = False
        self._thread: threading.Thread | None = None
        self._stopping = False

    @property
    def next_step(self) -> int:
        """The step `take` delivers next."""
        with self._changed:
            return self._entries[0].draw.step if self._entries else self._sampler.step

    def take(self, min_per_domain: int, sampler: MixtureSampler) -> tuple[Draw, NDArray[np.int64]]:
        """Remove and return the first batch; draw and read it here if the thread has not begun it."""
        with self._changed:
            if min_per_domain:
                self._rewind(sampler)
            if self._entries:
                head = self._entries[0]
                self._changed.wait_for(lambda: head.ready)
                if not head.failed:
                    return self._pop()
                self._rewind(sampler)
            # A thread takes over from the second batch on; without one a few small batches are read together.
            block = self._draw(1 if self._depth or min_per_domain else self._block, min_per_domain)
            self._start()
            self._changed.notify_all()
        try:
            self._read(block)
        except Exception:
            self.rewind(sampler)
            if len(block) == 1:
                raise
            return self.take(min_per_domain, sampler)  # the failure may lie in a later batch of the block
        with self._changed:
            return self._pop()

    def rewind(self, sampler: MixtureSampler, keep_before: int = 0) -> None:
        """Throw away what is queued, from step `keep_before` on, and draw it anew as `sampler` now would."""
        with self._changed:
            self._rewind(sampler, keep_before)
            self._changed.notify_all()

    def stop(self) -> None:
        """End the thread and wait for it."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
            thread, self._thread = self._thread, None
        if thread is not None and thread is not threading.current_thread():  # the collector may run in any thread
            thread.join()

    def _pop(self) -> tuple[Draw, NDArray[np.int64]]:
        entry = self._entries.popleft()
        self._changed.notify_all()
        assert entry.tokens_BT1 is not None
        return entry.draw, entry.tokens_BT1

    def _rewind(self, sampler: MixtureSampler, keep_before: int = 0) -> None:
        kept = [entry for entry in self._entries if entry.draw.step < keep_before and not entry.failed]
        self._entries = deque(kept)
        self._sampler = sampler.copy()
        for entry in kept:
            self._sampler.advance(entry.draw)
        self._ended = False
        self._block = 1

    def _draw(self, steps: int, min_per_domain: int = 0) -> list[_Entry]:
        """Queue up to `steps` batches, at least one."""
        block: list[_Entry] = []
        for _ in range(steps):
            try:
                block.append(_Entry(self._sampler.draw(min_per_domain)))
            except SamplerExhausted:
                if not block:
                    raise
                break
        self._entries.extend(block)
        self._block = min(2 * self._block, self._largest_block)
        return block

    def _read(self, block: list[_Entry]) -> None:
        tokens_SBT1 = self._reader.batches([entry.draw for entry in block])
        with self._changed:
            for entry, tokens_BT1 in zip(block, tokens_SBT1, strict=True):
                entry.tokens_BT1 = tokens_BT1
            self._changed.notify_all()

    def _start(self) -> None:
        if self._depth and self._thread is None:
            self._stopping = False
            self._thread = threading.Thread(target=self._work, name="weftlm-read-ahead", daemon=True)
            self._thread.start()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._stopping or (not self._ended and len(self._entries) < self._depth))
                if self._stopping:
                    return
                try:
                    block = self._draw(min(self._block, self._depth - len(self._entries)))
                except SamplerExhausted:
                    self._ended = True
                    continue
            try:
                self._read(block)
            except Exception as error:  # noqa: BLE001 - the consumer will meet it, whatever it is
                _log.debug("reading ahead from step %d ended: %s", block[0].draw.step, error)
                with self._changed:
                    if any(entry is block[0] for entry in self._entries):  # not thrown away meanwhile
                        self._ended = True
                    for entry in block:
                        entry.failed = True
                    self._changed.notify_all()
