"""Choosing documents by digest: counts are exact, order does not matter, smaller choices nest in larger ones."""

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weftlm.config import validate
from weftlm.domains.split import SplitConfig, first_within, heldout_count, positions
from weftlm.errors import ConfigError

DIGESTS = [hashlib.blake2b(b"%d" % i, digest_size=16).digest() for i in range(400)]


def chosen(digests: list[bytes], config: SplitConfig, seed: int = 0) -> set[bytes]:
    groups = np.zeros(len(digests), np.int64)
    held = first_within(positions(digests, seed, "heldout"), groups, [heldout_count(len(digests), config)])
    return {digest for digest, one in zip(digests, held, strict=True) if one}


@settings(deadline=None, derandomize=True)
@given(st.integers(1, 300), st.floats(0.0, 0.99), st.integers(0, 20), st.integers(0, 60), st.randoms())
def test_the_split_is_exact_and_blind_to_order(count, fraction, low, extra, rng) -> None:  # type: ignore[no-untyped-def]
    config = SplitConfig(fraction=fraction, min_documents=low, max_documents=low + extra)
    held = chosen(DIGESTS[:count], config)
    assert len(held) == heldout_count(count, config) <= min(count - 1, config.max_documents)
    shuffled = list(DIGESTS[:count])
    rng.shuffle(shuffled)
    assert chosen(shuffled, config) == held


def test_choices_nest_and_differ_by_seed_and_purpose() -> None:
    large = chosen(DIGESTS, SplitConfig(fraction=0.3))
    assert chosen(DIGESTS, SplitConfig(fraction=0.1)) < large
    assert chosen(DIGESTS, SplitConfig(fraction=0.3), seed=1) != large
    one, other, long = (positions(DIGESTS, 0, purpose) for purpose in ("heldout", "sample", "p" * 200))
    assert len({*one.tolist(), *other.tolist(), *long.tolist()}) == 1200


def test_no_fraction_holds_nothing_out_and_one_document_is_never_held_out() -> None:
    assert heldout_count(100, SplitConfig(fraction=0.0, min_documents=5)) == 0
    assert heldout_count(1, SplitConfig(fraction=0.9)) == 0
    assert heldout_count(2, SplitConfig(fraction=0.9)) == 1
    with pytest.raises(ConfigError, match="min_documents 5 exceeds max_documents 2"):
        validate(SplitConfig, {"min_documents": 5, "max_documents": 2}, "data.split")


@settings(deadline=None, derandomize=True)
@given(
    st.dictionaries(st.integers(0, 2**64 - 1), st.tuples(st.integers(0, 2), st.integers(1, 50)), max_size=40),
    st.lists(st.integers(0, 400), min_size=3, max_size=3),
)
def test_a_limit_is_filled_by_the_shortest_sorted_prefix_of_each_group(
    documents: dict[int, tuple[int, int]], limits: list[int]
) -> None:
    expected, total = set(), [0, 0, 0]
    for place in sorted(documents):
        group, size = documents[place]
        if total[group] < limits[group]:
            expected.add(place)
            total[group] += size
    places = np.array(list(documents), np.uint64)
    groups, sizes = np.array(list(documents.values()), np.int64).reshape(-1, 2).T
    found = first_within(places, groups, limits, sizes)
    assert set(places[found].tolist()) == expected
