"""k-means over document embeddings: flat up to a few hundred clusters, two levels above.

Fitting sees a bounded sample; assigning streams. Grangier et al., arXiv 2410.03735, cluster in two levels too.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sklearn.cluster import MiniBatchKMeans
from sklearn.exceptions import ConvergenceWarning

from weftlm.domains.config import ClusterConfig
from weftlm.errors import ConfigError, DataError

_BLOCK_FLOATS = 1 << 24


@dataclass(frozen=True)
class Clusters:
    """Centroids, in one or two levels.

    Attributes:
        centroids_CE: float32.
        groups_GE: centroids of the upper level, float32; shape (1, E) when there is one level.
        group_C: group of each cluster, int64, non-decreasing.
    """

    centroids_CE: NDArray[np.float32]
    groups_GE: NDArray[np.float32]
    group_C: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.centroids_CE)

    def assign(self, embeddings_NE: NDArray[np.float32]) -> NDArray[np.int64]:
        """Nearest cluster of each row, down the levels; ties go to the lower number.

        Returns:
            cluster_N, int64.
        """
        if len(self.groups_GE) == 1:
            return nearest(embeddings_NE, self.centroids_CE)
        result = np.empty(len(embeddings_NE), np.int64)
        group_N = nearest(embeddings_NE, self.groups_GE)
        for group in np.unique(group_N):
            rows = np.flatnonzero(group_N == group)
            first, last = np.searchsorted(self.group_C, [group, group + 1])
            result[rows] = first + nearest(embeddings_NE[rows], self.centroids_CE[first:last])
        return result

    def keep(self, kept_C: NDArray[np.bool_]) -> Clusters:
        """Only some of the clusters, renumbered; groups left empty go too.

        Raises:
            DataError: none would be left.
        """
        if not kept_C.any():
            raise DataError("no cluster is left; lower clusters.min_bytes or ask for fewer clusters")
        groups, group_C = np.unique(self.group_C[kept_C], return_inverse=True)
        return Clusters(self.centroids_CE[kept_C], self.groups_GE[groups], group_C.astype(np.int64))


def nearest(rows_NE: NDArray[np.float32], centroids_CE: NDArray[np.float32]) -> NDArray[np.int64]:
    """Number of the nearest centroid of each row by Euclidean distance, in blocks; ties go to the lower number."""
    half_C = 0.5 * np.einsum("ce,ce->c", centroids_CE, centroids_CE, dtype=np.float64).astype(np.float32)
    result = np.empty(len(rows_NE), np.int64)
    block = max(1, _BLOCK_FLOATS // max(1, len(centroids_CE)))
    for start in range(0, len(rows_NE), block):
        scores = rows_NE[start : start + block] @ centroids_CE.T - half_C
        result[start : start + block] = scores.argmax(axis=1)
    return result


def fit_clusters(sample_NE: NDArray[np.float32], config: ClusterConfig, seed: int) -> Clusters:
    """Fit centroids; every cluster returned is the nearest of at least one row of the sample.

    Args:
        sample_NE: unit rows.
        config: how many, how.
        seed: the same sample and seed give the same clusters.
    Raises:
        ConfigError: More clusters than documents.
    """
    if config.n > len(sample_NE):
        raise ConfigError(
            f"domains.clusters.n is {config.n} but there are only {len(sample_NE)} documents to cluster; ask for at "
            f"most that many, or raise clusters.sample_documents"
        )
    if config.n <= config.flat_limit:
        centroids = _kmeans(sample_NE, config.n, seed)
        fitted = Clusters(centroids, centroids.mean(axis=0, keepdims=True), np.zeros(len(centroids), np.int64))
        return fitted.keep(np.bincount(fitted.assign(sample_NE), minlength=len(fitted)) > 0)
    groups = _kmeans(sample_NE, round(config.n**0.5), seed)
    group_N = nearest(sample_NE, groups)
    sizes = np.bincount(group_N, minlength=len(groups))
    parts: list[NDArray[np.float32]] = []
    for group, count in enumerate(_shares(sizes, config.n)):
        rows = sample_NE[group_N == group]
        parts.append(_kmeans(rows, count, seed + 1 + group) if count else rows[:0])
    numbers = np.repeat(np.arange(len(groups)), [len(part) for part in parts])
    fitted = Clusters(np.concatenate(parts), groups, numbers.astype(np.int64))
    fitted = fitted.keep(np.ones(len(fitted), bool))
    return fitted.keep(np.bincount(fitted.assign(sample_NE), minlength=len(fitted)) > 0)


def _shares(sizes_G: NDArray[np.int64], total: int) -> list[int]:
    """Split `total` clusters over groups by size: one at least where a group has members, never more than members."""
    shares_G = np.where(sizes_G > 0, 1, 0)
    while shares_G.sum() < total:
        wanted_G = np.where(shares_G < sizes_G, sizes_G / np.maximum(shares_G, 1), -1.0)
        shares_G[int(wanted_G.argmax())] += 1
    return [int(share) for share in shares_G]


def _kmeans(rows_NE: NDArray[np.float32], count: int, seed: int) -> NDArray[np.float32]:
    if count == 1:
        mean: NDArray[np.float32] = rows_NE.mean(axis=0, keepdims=True, dtype=np.float64).astype(np.float32)
        return mean
    model = MiniBatchKMeans(
        count, random_state=seed % (1 << 32), n_init=3, batch_size=max(1024, 4 * count), max_iter=100, init="k-means++"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer distinct rows than clusters: the empty ones go
        model.fit(rows_NE)
    found: NDArray[np.float32] = model.cluster_centers_.astype(np.float32)
    return found
