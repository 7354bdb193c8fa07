"""The contestants of the sampler benchmark that live in weftlm's own environment.

Each draws batches of B rows of T + 1 tokens from D domains, in shuffled order within a domain, and delivers them as an
int64 tensor with the rows' domains. Every peer is set up the fastest way its documentation offers that we found; what
was tried and slower is said beside it.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchdata.nodes import (
    BaseNode,
    Batcher,
    Loader,
    Mapper,
    MapStyleWrapper,
    MultiNodeWeightedSampler,
    SamplerWrapper,
    StopCriteria,
)

from weftlm.corpora.source import Source
from weftlm.corpora.store import TokenStore, Vocabulary
from weftlm.corpora.store_writer import write_stores
from weftlm.mixture.loader import MixtureLoader, sequence_counts
from weftlm.mixture.sampler import MixtureSampler


@dataclass(frozen=True)
class Task:
    """One mixture: D folders of tokens on disk, the weights, B, T and the seed."""

    folder: Path
    weights: list[float]
    batch: int
    length: int
    seed: int
    rows_per_domain: int

    @property
    def domains(self) -> int:
        return len(self.weights)

    @property
    def epoch_rows(self) -> int:
        """Rows a peer that plans whole epochs plans at a time: each domain on average once."""
        return self.rows_per_domain * self.domains

    def rows(self, domain: int) -> NDArray[np.uint16]:
        rows: NDArray[np.uint16] = np.load(self.folder / f"rows-{domain}.npy", allow_pickle=False)
        return rows


def write(task: Task) -> None:
    """The same random tokens as weftlm's token stores, as rows, and as Arrow tables with fixed-size lists."""
    rng = np.random.default_rng(task.seed)
    for domain in range(task.domains):
        tokens = rng.integers(1, 32_000, size=task.rows_per_domain * task.length + 1, dtype=np.uint16)
        with write_stores(task.folder / f"store-{domain}", Vocabulary(32_000, 0, "random")) as writer:
            writer.append(tokens, len(tokens), "d")
        rows = np.lib.stride_tricks.sliding_window_view(tokens, task.length + 1)[:: task.length]
        np.save(task.folder / f"rows-{domain}.npy", rows, allow_pickle=False)
        column = pa.FixedSizeListArray.from_arrays(pa.array(rows.reshape(-1)), task.length + 1)
        table = pa.table({"tokens": column, "domain": pa.array(np.full(len(rows), domain))})
        datasets.Dataset(table).save_to_disk(str(task.folder / f"arrow-{domain}"))


class Weftlm:
    """`MixtureLoader` over memory-mapped uint16 token stores."""

    def __init__(self, task: Task) -> None:
        sources: list[Source] = [TokenStore(task.folder / f"store-{domain}/d") for domain in range(task.domains)]
        counts = sequence_counts(sources, task.length)
        # The rows are those of the peers: one more token at the end of a store makes no further row.
        sampler = MixtureSampler(counts, task.batch, task.seed, weights_D=task.weights)
        self._loader = MixtureLoader(sources, sampler, task.length)

    def next(self) -> tuple[Tensor, list[int]]:
        batch = self._loader.next()
        return batch.tokens_BT1, batch.domains_B.tolist()

    def set_weights(self, weights: list[float]) -> None:
        self._loader.sampler.set_weights(self._loader.sampler.step, weights)

    def state(self) -> Any:
        return json.loads(json.dumps(self._loader.sampler.state_dict()))

    def load(self, state: Any) -> None:
        self._loader.sampler.load_state_dict(state)


class Interleave:
    """`datasets.interleave_datasets` of map-style data sets, memory-mapped, shuffled, read in batches.

    It has no call to change probabilities and a map-style data set has no state: the mixture is built anew, and the
    position is kept by hand. `format` is numpy (faster here than torch, and than iterable data sets by 4 times), or
    arrow, where the caller unpacks the table by hand.
    """

    def __init__(self, task: Task, format: str = "numpy") -> None:
        self._batch = task.batch
        self._length = task.length
        self._seed = task.seed
        self._format = format
        self._parts = [
            datasets.load_from_disk(str(task.folder / f"arrow-{domain}")).shuffle(seed=task.seed)
            for domain in range(task.domains)
        ]
        self._build(task.weights, 0)

    def _build(self, weights: list[float], position: int) -> None:
        self._weights, self._position = weights, position
        mixed = datasets.interleave_datasets(
            self._parts, probabilities=weights, seed=self._seed, stopping_strategy="first_exhausted"
        ).with_format(self._format)
        self._mixed = mixed
        self._batches = self._iterate(position)

    def _iterate(self, position: int) -> Iterator[tuple[Tensor, list[int]]]:
        mixed = self._mixed.select(range(position * self._batch, len(self._mixed))) if position else self._mixed
        for rows in mixed.iter(batch_size=self._batch, drop_last_batch=True):
            if self._format == "arrow":
                flat = rows["tokens"].combine_chunks().flatten().to_numpy()
                tokens = flat.reshape(-1, self._length + 1).astype(np.int64)
            else:
                tokens = rows["tokens"]
            yield (
                torch.from_numpy(tokens),
                rows["domain"].tolist() if self._format != "arrow" else rows["domain"].to_pylist(),
            )

    def next(self) -> tuple[Tensor, list[int]]:
        batch = next(self._batches, None)
        if batch is None:
            self._batches = self._iterate(0)
            batch = next(self._batches)
        self._position += 1
        return batch

    def set_weights(self, weights: list[float]) -> None:
        self._build(weights, 0)

    def state(self) -> Any:
        return {"weights": self._weights, "position": self._position}

    def load(self, state: Any) -> None:
        self._build(state["weights"], state["position"])


class TorchData:
    """torchdata's `MultiNodeWeightedSampler` and `Batcher`; weights are changed through its attribute `weights`.

    As documented, a node per domain yields rows (`MapStyleWrapper` over a map-style data set and a random sampler), and
    a `Mapper` stacks them. By hand (`numbers=True`) the nodes yield row numbers only, and the `Mapper` reads the rows
    of a whole batch: torchdata draws, and code like weftlm's own reads.
    """

    def __init__(self, task: Task, numbers: bool = False) -> None:
        rows = [np.load(task.folder / f"rows-{domain}.npy", mmap_mode="r") for domain in range(task.domains)]
        size = task.rows_per_domain

        def gather(numbers: list[int]) -> tuple[Tensor, list[int]]:
            tokens_BT1 = np.empty((len(numbers), task.length + 1), dtype=np.int64)
            domains = [number // size for number in numbers]
            for slot, number in enumerate(numbers):
                tokens_BT1[slot] = rows[domains[slot]][number % size]
            return torch.from_numpy(tokens_BT1), domains

        def stack(samples: list[tuple[NDArray[np.uint16], int]]) -> tuple[Tensor, list[int]]:
            tokens_BT1 = np.stack([tokens for tokens, _ in samples]).astype(np.int64)
            return torch.from_numpy(tokens_BT1), [domain for _, domain in samples]

        nodes: dict[str, BaseNode[Any]] = {}
        for domain in range(task.domains):
            if numbers:
                nodes[str(domain)] = SamplerWrapper(_Shuffled(domain * size, size, task.seed))
            else:
                nodes[str(domain)] = MapStyleWrapper(_Rows(rows[domain], domain), _Shuffled(0, size, task.seed))
        self._sampler = MultiNodeWeightedSampler(
            nodes, {str(domain): weight for domain, weight in enumerate(task.weights)}, seed=task.seed,
            stop_criteria=StopCriteria.CYCLE_FOREVER, rank=0, world_size=1,
        )  # fmt: skip
        self._loader = Loader(Mapper(Batcher(self._sampler, task.batch), gather if numbers else stack))
        self._batches: Iterator[tuple[Tensor, list[int]]] | None = None

    def next(self) -> tuple[Tensor, list[int]]:
        if self._batches is None:
            self._batches = iter(self._loader)
        return next(self._batches)

    def set_weights(self, weights: list[float]) -> None:
        self._sampler.weights = {str(domain): weight for domain, weight in enumerate(weights)}

    def state(self) -> Any:
        return copy.deepcopy(self._loader.state_dict())

    def load(self, state: Any) -> None:
        self._loader.load_state_dict(state)


class _Rows(torch.utils.data.Dataset[tuple[NDArray[np.uint16], int]]):
    """A map-style data set: one row and its domain."""

    def __init__(self, rows: NDArray[np.uint16], domain: int) -> None:
        self._rows, self._domain = rows, domain

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> tuple[NDArray[np.uint16], int]:
        return self._rows[index], self._domain


class _Shuffled(torch.utils.data.Sampler[int]):
    """Row numbers of one domain, in a new order each time round, as `RandomSampler` gives them."""

    def __init__(self, first: int, size: int, seed: int) -> None:
        self._first, self._size = first, size
        self._generator = torch.Generator().manual_seed(seed)

    def __iter__(self) -> Iterator[int]:
        return iter((torch.randperm(self._size, generator=self._generator) + self._first).tolist())


IN_PROCESS: dict[str, Callable[[Task], Any]] = {
    "weftlm": Weftlm,
    "datasets.interleave_datasets": Interleave,
    "datasets.interleave_datasets, Arrow unpacked by hand": lambda task: Interleave(task, "arrow"),
    "torchdata MultiNodeWeightedSampler": TorchData,
    "torchdata MultiNodeWeightedSampler, rows read by hand": lambda task: TorchData(task, numbers=True),
}
