"""Choosing documents by digest: counts are exact, order does not matter, smaller choices nest in larger ones."""

import hashlib
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weftlm.config import validate
from weftlm.domains.split import ALL, Budget, HeldoutPlan, Lowest, SplitConfig, heldout_count, position
from weftlm.errors import ConfigError


def digests(count: int, salt: str = "") -> list[bytes]:
    return [hashlib.blake2b(f"{salt}{i}".encode(), digest_size=16).digest() for i in range(count)]


def chosen(documents: list[bytes], config: SplitConfig, seed: int = 0) -> set[bytes]:
    plan = HeldoutPlan(config, seed)
    for digest in documents:
        plan.observe("d", digest)
    return {digest for digest in documents if plan.is_heldout("d", digest)}


@settings(deadline=None, derandomize=True)
@given(
    st.integers(1, 300), st.floats(0.0, 0.99), st.integers(0, 20), st.integers(0, 60), st.integers(0, 3), st.randoms()
)
def test_the_split_is_exact_and_blind_to_order(
    count: int, fraction: float, low: int, extra: int, seed: int, rng: random.Random
) -> None:
    config = SplitConfig(fraction=fraction, min_documents=low, max_documents=low + extra)
    documents = digests(count)
    held = chosen(documents, config, seed)
    assert len(held) == heldout_count(count, config)
    assert len(held) < count
    assert len(held) <= config.max_documents
    shuffled = list(documents)
    rng.shuffle(shuffled)
    assert chosen(shuffled, config, seed) == held


def test_seeds_and_purposes_choose_differently() -> None:
    documents = digests(400)
    config = SplitConfig(fraction=0.25)
    assert chosen(documents, config, 0) != chosen(documents, config, 1)
    assert position(documents[0], 0, "heldout") != position(documents[0], 0, "sample")
    assert position(documents[0], 0, "p" * 200) < ALL


def test_smaller_choices_nest_in_larger_ones() -> None:
    documents = digests(200)
    small = chosen(documents, SplitConfig(fraction=0.1))
    large = chosen(documents, SplitConfig(fraction=0.3))
    assert small < large


def test_no_fraction_holds_nothing_out_and_one_document_is_never_held_out() -> None:
    assert heldout_count(100, SplitConfig(fraction=0.0, min_documents=5)) == 0
    assert heldout_count(1, SplitConfig(fraction=0.9)) == 0
    assert heldout_count(2, SplitConfig(fraction=0.9)) == 1


def test_senseless_bounds_are_refused() -> None:
    with pytest.raises(ConfigError, match="min_documents 5 exceeds max_documents 2"):
        validate(SplitConfig, {"min_documents": 5, "max_documents": 2}, "data.split")


@settings(deadline=None, derandomize=True)
@given(st.lists(st.integers(0, ALL - 1), unique=True, max_size=60), st.integers(0, 30))
def test_lowest_is_the_sorted_prefix(places: list[int], count: int) -> None:
    lowest = Lowest(count)
    for place in places:
        lowest.add(place)
    assert lowest.seen == len(places)
    assert [place for place in sorted(places) if place < lowest.threshold()] == sorted(places)[:count]


@settings(deadline=None, derandomize=True)
@given(st.dictionaries(st.integers(0, ALL - 1), st.integers(1, 50), max_size=40), st.integers(1, 400), st.randoms())
def test_a_budget_is_filled_by_the_shortest_sorted_prefix(
    sizes: dict[int, int], limit: int, rng: random.Random
) -> None:
    budget = Budget(limit)
    items = list(sizes.items())
    rng.shuffle(items)
    for place, size in items:
        budget.add(place, size)
    kept = [place for place in sorted(sizes) if place < budget.threshold()]
    expected = []
    total = 0
    for place in sorted(sizes):
        if total >= limit:
            break
        expected.append(place)
        total += sizes[place]
    assert kept == expected
    assert budget.total == total
