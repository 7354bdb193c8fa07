"""Histograms and bases over domains are the distributions their definitions say."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weftlm.corpora.source import Document
from weftlm.domains.cluster import nearest
from weftlm.domains.embed import unit_rows
from weftlm.domains.histogram import (
    basis_from_groups,
    basis_from_sets,
    basis_from_shards,
    domain_means,
    histogram,
    neighbours,
    typical_documents,
)
from weftlm.errors import ConfigError, DataError


@settings(deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=40), st.floats(0.0, 1.0))
def test_a_histogram_counts(domains: list[int], smoothing: float) -> None:
    shares = histogram(np.array(domains), 6, smoothing)
    assert shares.dtype == np.float64
    assert shares.sum() == pytest.approx(1.0, abs=1e-12)
    plain = [domains.count(number) / len(domains) for number in range(6)]
    assert shares == pytest.approx([(1 - smoothing) * share + smoothing / 6 for share in plain], abs=1e-12)


def test_planted_target_is_found_by_mean_embeddings() -> None:
    rng = np.random.default_rng(0)
    centres, truth = unit_rows(rng.normal(size=(4, 12))), np.repeat(np.arange(4), 25)
    rows = unit_rows(centres[truth] + 0.1 * rng.normal(size=(100, 12)))
    means = domain_means(rows, truth, 4)
    assert np.allclose(means, [rows[truth == kind].mean(axis=0) for kind in range(4)], atol=1e-6)
    target = unit_rows(centres[[0, 2, 2, 2, 3, 2, 0, 2]] + 0.1 * rng.normal(size=(8, 12)))
    assert histogram(nearest(target, means), 4).tolist() == [0.25, 0.0, 0.625, 0.125]
    with pytest.raises(DataError, match="domain number 4"):
        domain_means(rows, truth, 5)
    with pytest.raises(DataError, match="at least one target document"):
        histogram(np.zeros(0, np.int64), 3)


def test_bases_from_shards_average_to_the_histogram_and_from_groups_cover_every_domain_by_size() -> None:
    domains = np.array([0, 1, 2, 0, 1, 2, 0, 0, 0])
    basis = basis_from_shards(domains, 3, 4)
    assert basis[0].tolist() == [1.0, 0.0, 0.0, 0.0]
    assert np.allclose(basis.mean(axis=0), histogram(domains, 4))
    assert np.array_equal(basis_from_sets([domains[:2], domains[2:]], 4)[0], [0.5, 0.5, 0.0, 0.0])
    centroids = unit_rows(np.array([[1, 0.1], [1, 0.0], [0.0, 1], [0.1, 1], [1, 0.05]]))
    sizes = np.array([1.0, 2.0, 3.0, 1.0, 1.0])
    basis = basis_from_groups(centroids, sizes, 2, seed=0)
    expected = [[0.25, 0.5, 0, 0, 0.25], [0, 0, 0.75, 0.25, 0]]
    assert np.allclose(basis[np.argsort(-basis[:, 0])], expected)
    assert np.allclose(basis_from_groups(centroids, sizes, 2, seed=0, smoothing=0.5), 0.5 * basis + 0.1)
    with pytest.raises(ConfigError, match="count is 10 but the target has 9"):
        basis_from_shards(domains, 10, 4)
    with pytest.raises(ConfigError, match="only 5 domains"):
        basis_from_groups(centroids, sizes, 6, seed=0)


def test_neighbours_are_ordered_by_cosine_and_typical_documents_by_distance() -> None:
    found = neighbours(np.array([[2.0, 0.0], [1.0, 1.0], [0.0, 5.0]], np.float32), 5)
    assert [number for number, _ in found[0]] == [1, 2]
    assert found[0][0][1] == pytest.approx(0.5**0.5, abs=1e-6)
    assert neighbours(np.ones((1, 2), np.float32), 3) == [[]]
    rng = np.random.default_rng(2)
    centroids, domains = np.eye(2, dtype=np.float32), rng.integers(0, 2, size=40)
    rows = (centroids[domains] + rng.normal(size=(40, 2))).astype(np.float32)
    documents = [Document("line one\n two " * 50, f"d{i}") for i in range(40)]
    order = np.argsort(np.linalg.norm(rows - centroids[domains], axis=1))
    typical = typical_documents(rows, domains, centroids, documents, 4)
    for domain in range(2):
        assert [item["origin"] for item in typical[domain]] == [f"d{i}" for i in order if domains[i] == domain][:4]
        assert all("\n" not in item["excerpt"] and len(item["excerpt"]) <= 160 for item in typical[domain])
