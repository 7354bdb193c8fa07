"""Small held-out sets and models whose losses are known in closed form."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass
class ArraySource:
    """Tokens in memory."""

    tokens_N: NDArray[np.int64]
    bytes: int
    fingerprint: str = "array"

    def __len__(self) -> int:
        return len(self.tokens_N)

    def read(self, start: int, count: int) -> NDArray[np.int64]:
        assert 0 <= start <= len(self) - count, "read past the end"
        return self.tokens_N[start : start + count].copy()

    def read_many(self, starts_N: NDArray[np.int64], count: int) -> NDArray[np.int64]:
        return np.stack([self.read(int(start), count) for start in starts_N])


class BigramModel:
    """p(v | u) from a table: the context beyond one token changes nothing, so windows cannot either."""

    def __init__(self, table_VV: NDArray[np.float64]) -> None:
        self.vocab_size = len(table_VV)
        self.log_table_VV = torch.tensor(np.log(table_VV), dtype=torch.float32)
        self.batches: list[tuple[int, int]] = []

    def log_probs(self, tokens_BT: Tensor) -> Tensor:
        self.batches.append((tokens_BT.shape[0], tokens_BT.shape[1]))
        return self.log_table_VV[tokens_BT]


def bigram_nats(table_VV: NDArray[np.float64], tokens_N: NDArray[np.int64]) -> NDArray[np.float64]:
    """Loss of each token but the first, by a plain loop in float64."""
    return np.array([-math.log(table_VV[a, b]) for a, b in pairwise(tokens_N)])


@pytest.fixture
def table_VV() -> NDArray[np.float64]:
    return np.random.default_rng(3).dirichlet(np.ones(11) * 0.5 + 0.5, size=11)


@pytest.fixture
def bigram(table_VV: NDArray[np.float64]) -> BigramModel:
    return BigramModel(table_VV)


@pytest.fixture
def nats_by_hand() -> Any:
    return bigram_nats


@pytest.fixture
def array_source() -> type[ArraySource]:
    return ArraySource


@pytest.fixture
def source() -> ArraySource:
    return ArraySource(np.random.default_rng(0).integers(0, 11, 203), bytes=640)
