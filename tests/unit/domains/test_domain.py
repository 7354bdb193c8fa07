"""The exact cap of a source."""

import numpy as np
import pytest

from weftlm.corpora.source import ArraySource, Source
from weftlm.domains.domain import TokenPrefix
from weftlm.errors import DataError


def test_a_prefix_is_a_source_that_ends_where_it_says() -> None:
    prefix = TokenPrefix(ArraySource(np.arange(10)), 6)
    assert isinstance(prefix, Source)
    assert len(prefix) == 6
    assert prefix.read(2, 4).tolist() == [2, 3, 4, 5]
    assert prefix.read_many(np.array([0, 3]), 3).tolist() == [[0, 1, 2], [3, 4, 5]]
    with pytest.raises(IndexError):
        prefix.read(3, 4)
    with pytest.raises(IndexError):
        prefix.read_many(np.array([0, 4]), 3)
    assert prefix.fingerprint != TokenPrefix(ArraySource(np.arange(10)), 7).fingerprint
    with pytest.raises(DataError, match="first 11 tokens are asked of a source that holds 10"):
        TokenPrefix(ArraySource(np.arange(10)), 11)
