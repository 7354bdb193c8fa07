"""Two gloo ranks for all files of a session."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from support.ranks import Ranks


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    """`ranks(__file__, "case", folder)` gives what `case(rank, world, folder)` of the file returned on each rank."""
    found = Ranks(tmp_path_factory.mktemp("ranks"))
    yield found
    found.close()
