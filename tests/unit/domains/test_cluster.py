"""Clusters: planted ones are found, on one level and on two."""

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from weftlm.domains.cluster import fit_clusters, nearest
from weftlm.domains.config import ClusterConfig
from weftlm.domains.embed import unit_rows
from weftlm.errors import ConfigError, DataError


def planted(kinds: int, per_kind: int) -> tuple[Any, Any]:
    rng = np.random.default_rng(0)
    centres = unit_rows(rng.normal(size=(kinds, 16)))
    truth = rng.permutation(np.repeat(np.arange(kinds), per_kind))
    return unit_rows(centres[truth] + 0.02 * rng.normal(size=(len(truth), 16))), truth


def purity(found: NDArray[np.int64], truth: NDArray[np.int64]) -> float:
    return sum(np.bincount(truth[found == cluster]).max() for cluster in np.unique(found)) / len(truth)


@pytest.mark.parametrize("flat_limit", [256, 4])
def test_planted_clusters_are_found_on_one_level_and_on_two(flat_limit: int) -> None:
    rows, truth = planted(9, 30)
    config = ClusterConfig(n=18, flat_limit=flat_limit)
    clusters, again = fit_clusters(rows, config, seed=0), fit_clusters(rows, config, seed=0)
    assert np.array_equal(clusters.centroids_CE, again.centroids_CE)
    assert not np.array_equal(clusters.centroids_CE, fit_clusters(rows, config, seed=6).centroids_CE)
    assert (len(clusters.groups_GE) > 1) == (flat_limit == 4)
    found = clusters.assign(rows)
    assert purity(found, truth) > 0.97
    assert set(found) == set(range(len(clusters)))
    assert 9 <= len(clusters) <= 18
    parts = [clusters.assign(rows[start : start + 7]) for start in range(0, len(rows), 7)]
    assert np.array_equal(np.concatenate(parts), found)
    assert len(clusters.assign(rows[:0])) == 0


def test_repeated_documents_leave_no_empty_cluster_and_more_clusters_than_documents_are_refused() -> None:
    repeated = np.repeat(unit_rows(np.eye(3)), 10, axis=0)
    for limit in (256, 2):
        clusters = fit_clusters(repeated, ClusterConfig(n=8, flat_limit=limit), seed=0)
        assert len(clusters) == 3
        assert set(clusters.assign(repeated)) == {0, 1, 2}
    rows, _ = planted(6, 1)
    assert np.allclose(fit_clusters(rows, ClusterConfig(n=1), 0).centroids_CE[0], rows.mean(axis=0), atol=1e-6)
    with pytest.raises(ConfigError, match="n is 7 but there are only 6 documents"):
        fit_clusters(rows, ClusterConfig(n=7), 0)


def test_dissolved_clusters_give_their_documents_to_the_nearest_other() -> None:
    rows, _ = planted(9, 20)
    clusters = fit_clusters(rows, ClusterConfig(n=12, flat_limit=4), seed=0)
    kept = clusters.group_C != clusters.group_C[-1]
    fewer = clusters.keep(kept)
    assert len(fewer) == kept.sum()
    assert len(fewer.groups_GE) == len(clusters.groups_GE) - 1
    before, found = clusters.assign(rows), fewer.assign(rows)
    assert found.max() < len(fewer)
    unmoved = kept[before]
    assert np.array_equal(found[unmoved], (np.cumsum(kept) - 1)[before[unmoved]])
    with pytest.raises(DataError, match="no cluster is left"):
        clusters.keep(np.zeros(len(clusters), bool))


def test_nearest_is_by_distance_not_by_dot_product(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    rows, centroids = rng.normal(size=(50, 4)).astype(np.float32), 3 * rng.normal(size=(7, 4)).astype(np.float32)
    expected = np.linalg.norm(rows[:, None] - centroids[None], axis=2).argmin(axis=1)
    assert np.array_equal(nearest(rows, centroids), expected)
    monkeypatch.setattr("weftlm.domains.cluster._BLOCK_FLOATS", 21)
    assert np.array_equal(nearest(rows, centroids), expected)
