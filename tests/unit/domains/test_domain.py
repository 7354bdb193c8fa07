"""The exact cap of a source."""

import numpy as np
import pytest
from numpy.typing import NDArray

from weftlm.corpora.source import Source
from weftlm.domains.domain import TokenPrefix
from weftlm.errors import DataError


class Numbers:
    fingerprint = "numbers"

    def __len__(self) -> int:
        return 10

    def read(self, start: int, count: int) -> NDArray[np.int64]:
        return np.arange(start, start + count, dtype=np.int64)

    def read_many(self, starts_N: NDArray[np.int64], count: int) -> NDArray[np.int64]:
        return np.asarray(starts_N)[:, None] + np.arange(count)


def test_a_prefix_is_a_source_that_ends_where_it_says() -> None:
    prefix = TokenPrefix(Numbers(), 6)
    assert isinstance(prefix, Source)
    assert len(prefix) == 6
    assert prefix.read(2, 4).tolist() == [2, 3, 4, 5]
    assert prefix.read_many(np.array([0, 3]), 3).tolist() == [[0, 1, 2], [3, 4, 5]]
    with pytest.raises(IndexError):
        prefix.read(3, 4)
    with pytest.raises(IndexError):
        prefix.read_many(np.array([0, 4]), 3)
    assert prefix.fingerprint != TokenPrefix(Numbers(), 7).fingerprint


def test_a_prefix_longer_than_its_source_is_refused() -> None:
    with pytest.raises(DataError, match="first 11 tokens are asked of a source that holds 10"):
        TokenPrefix(Numbers(), 11)
