"""Where the target's documents fall among the domains, and distributions over domains to reweight.

The histogram is the importance-sampling mixture (arXiv 2410.03735); a basis of N such histograms lets a policy choose
among D >> N domains with N probes (distribution reweighting, arXiv 2410.02498).
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from weftlm.domains.cluster import fit_clusters, nearest
from weftlm.domains.config import ClusterConfig
from weftlm.domains.embed import unit_rows
from weftlm.errors import ConfigError, DataError

_EXCERPT_CHARS = 160


class DomainMeans:
    """Streaming mean embedding of each of D domains, and its most typical documents.

    Args:
        domains: D.
        dimensions: E.
    """

    def __init__(self, domains: int, dimensions: int) -> None:
        self._sums_DE = np.zeros((domains, dimensions), np.float64)
        self._counts_D = np.zeros(domains, np.int64)

    def add(self, embeddings_NE: NDArray[np.float32], domain_N: NDArray[np.int64]) -> None:
        """Count a batch of documents."""
        np.add.at(self._sums_DE, domain_N, embeddings_NE.astype(np.float64))
        self._counts_D += np.bincount(domain_N, minlength=len(self._counts_D))

    def means(self) -> NDArray[np.float32]:
        """Mean embedding of each domain, shape (D, E).

        Raises:
            DataError: a domain has no document.
        """
        if (self._counts_D == 0).any():
            raise DataError(f"domain number {int(self._counts_D.argmin())} has no document to embed")
        means: NDArray[np.float32] = (self._sums_DE / self._counts_D[:, None]).astype(np.float32)
        return means


def histogram(domain_N: NDArray[np.int64], domains: int, smoothing: float = 0.0) -> NDArray[np.float64]:
    """Share of N documents in each of D domains.

        h_i = (1 - s) count_i / N + s / D

    Args:
        domain_N: nearest domain of each document.
        domains: D.
        smoothing: s, the share of the uniform distribution.
    Returns:
        float64, sums to 1.
    Raises:
        DataError: there is no document.
    """
    if len(domain_N) == 0:
        raise DataError("a histogram over domains needs at least one target document")
    counts_D = np.bincount(domain_N, minlength=domains).astype(np.float64)
    return (1.0 - smoothing) * counts_D / len(domain_N) + smoothing / domains


def basis_from_sets(sets: Sequence[NDArray[np.int64]], domains: int, smoothing: float = 0.0) -> NDArray[np.float64]:
    """One histogram per set of documents: basis_ND, float64 rows that sum to 1."""
    return np.stack([histogram(domain_N, domains, smoothing) for domain_N in sets])


def basis_from_shards(
    domain_N: NDArray[np.int64], count: int, domains: int, smoothing: float = 0.0
) -> NDArray[np.float64]:
    """Histograms of `count` shards of the target's documents, dealt out in turn: basis_ND.

    Raises:
        ConfigError: fewer documents than shards.
    """
    if count > len(domain_N):
        raise ConfigError(
            f"domains.basis.count is {count} but the target has {len(domain_N)} training documents; ask for at most "
            f"that many shards, or take the basis from sets or groups"
        )
    return basis_from_sets([domain_N[start::count] for start in range(count)], domains, smoothing)


def basis_from_groups(
    centroids_DE: NDArray[np.float32], sizes_D: NDArray[np.float64], count: int, seed: int, smoothing: float = 0.0
) -> NDArray[np.float64]:
    """Group similar domains by k-means over their centroids; within a group, domains weigh as their sizes.

        p_n(i) = (1 - s) size_i [i in group n] / sum_{j in group n} size_j + s / D

    Together the groups cover every domain once. Groups that stay empty are dropped, so N may be less than `count`.

    Returns:
        basis_ND, float64 rows that sum to 1.
    Raises:
        ConfigError: more groups than domains.
    """
    domains = len(centroids_DE)
    if count > domains:
        raise ConfigError(f"domains.basis.count is {count} but there are only {domains} domains; ask for fewer groups")
    rows_DE = unit_rows(centroids_DE)
    groups = fit_clusters(rows_DE, ClusterConfig(n=count, flat_limit=max(count, 1)), seed)
    group_D = groups.assign(rows_DE)
    basis_ND = np.where(group_D[None, :] == np.arange(len(groups))[:, None], sizes_D[None, :], 0.0)
    basis_ND /= basis_ND.sum(axis=1, keepdims=True)
    mixed: NDArray[np.float64] = (1.0 - smoothing) * basis_ND + smoothing / domains
    return mixed


def neighbours(centroids_DE: NDArray[np.float32], count: int) -> list[list[tuple[int, float]]]:
    """For each domain its nearest others by cosine of the centroids, nearest first: (number, cosine)."""
    rows_DE = unit_rows(centroids_DE)
    result = []
    for number, row_E in enumerate(rows_DE):
        cosines_D = rows_DE @ row_E
        cosines_D[number] = -np.inf
        order = np.argsort(-cosines_D, kind="stable")[: min(count, len(rows_DE) - 1)]
        result.append([(int(other), float(cosines_D[other])) for other in order])
    return result


@dataclass(frozen=True, order=True)
class TypicalDocument:
    """A document near its domain's centroid.

    Attributes:
        distance: Euclidean distance to the centroid.
        origin: where the document came from.
        excerpt: its beginning, on one line.
    """

    distance: float
    origin: str
    excerpt: str


class TypicalDocuments:
    """The documents nearest to the centroid of each domain, gathered from a stream.

    Args:
        centroids_DE: float32.
        count: documents to keep per domain.
    """

    def __init__(self, centroids_DE: NDArray[np.float32], count: int) -> None:
        self._centroids_DE = centroids_DE
        self._count = count
        self._kept: list[list[tuple[float, str, str]]] = [[] for _ in centroids_DE]

    def add(
        self,
        embeddings_NE: NDArray[np.float32],
        domain_N: NDArray[np.int64],
        origins: Sequence[str],
        texts: Sequence[str],
    ) -> None:
        """Look at a batch of documents."""
        distances_N = np.linalg.norm(embeddings_NE - self._centroids_DE[domain_N], axis=1)
        for distance, domain, origin, text in zip(distances_N, domain_N, origins, texts, strict=True):
            kept = self._kept[domain]
            if len(kept) == self._count and -distance <= kept[0][0]:
                continue
            heapq.heappush(
                kept, (-float(distance), origin, " ".join(text[: 4 * _EXCERPT_CHARS].split())[:_EXCERPT_CHARS])
            )
            if len(kept) > self._count:
                heapq.heappop(kept)

    def of(self, domain: int) -> list[TypicalDocument]:
        """The typical documents of one domain, nearest first."""
        return sorted(TypicalDocument(-negative, origin, excerpt) for negative, origin, excerpt in self._kept[domain])


def nearest_domains(embeddings_NE: NDArray[np.float32], centroids_DE: NDArray[np.float32]) -> NDArray[np.int64]:
    """Number of the domain whose centroid is nearest to each document, int64."""
    return nearest(embeddings_NE, centroids_DE)
