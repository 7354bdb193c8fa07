"""Small held-out sets and models whose losses are known in closed form."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from weftlm.corpora.source import ArraySource


class BigramModel(nn.Module):
    """p(v | u) from a table: the context beyond one token changes nothing, so windows cannot either."""

    def __init__(self, table_VV: NDArray[np.float64]) -> None:
        super().__init__()
        self.log_table_VV = torch.tensor(np.log(table_VV), dtype=torch.float32)
        self.batches: list[tuple[int, ...]] = []

    def forward(self, input_ids: Tensor, **how: Any) -> SimpleNamespace:
        self.batches.append(tuple(input_ids.shape))
        return SimpleNamespace(logits=self.log_table_VV[input_ids])

    def nats(self, source: Any) -> NDArray[np.float64]:
        """Loss of each token but the first, in float64."""
        tokens_N = source.read(0, len(source))
        return -self.log_table_VV.double().numpy()[tokens_N[:-1], tokens_N[1:]]


@pytest.fixture
def table_VV() -> NDArray[np.float64]:
    return np.random.default_rng(3).dirichlet(np.ones(11), size=11)


@pytest.fixture
def bigram(table_VV: NDArray[np.float64]) -> BigramModel:
    return BigramModel(table_VV)


@pytest.fixture
def source() -> ArraySource:
    return ArraySource(np.random.default_rng(0).integers(0, 11, 203), text_bytes=640)
