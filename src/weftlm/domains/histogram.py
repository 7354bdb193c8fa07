"""Where the target's documents fall among the domains, and distributions over domains to reweight.

The histogram is the importance-sampling mixture (arXiv 2410.03735); a basis of N such histograms lets a policy choose
among D >> N domains with N probes (distribution reweighting, arXiv 2410.02498).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from weftlm.corpora.source import Document
from weftlm.domains.cluster import fit_clusters
from weftlm.domains.config import ClusterConfig
from weftlm.domains.embed import unit_rows
from weftlm.errors import ConfigError, DataError

_EXCERPT_CHARS = 160


def domain_means(embeddings_NE: NDArray[np.float32], domain_N: NDArray[np.int64], domains: int) -> NDArray[np.float32]:
    """Mean embedding of each of D domains, shape (D, E).

    Raises:
        DataError: A domain has no document.
    """
    counts_D = np.bincount(domain_N, minlength=domains)
    if (counts_D == 0).any():
        raise DataError(f"domain number {int(counts_D.argmin())} has no document to embed")
    sums_DE = np.zeros((domains, embeddings_NE.shape[1]), np.float64)
    np.add.at(sums_DE, domain_N, embeddings_NE.astype(np.float64))
    means: NDArray[np.float32] = (sums_DE / counts_D[:, None]).astype(np.float32)
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


def typical_documents(
    embeddings_NE: NDArray[np.float32],
    domain_N: NDArray[np.int64],
    centroids_DE: NDArray[np.float32],
    documents: Sequence[Document],
    count: int,
) -> list[list[dict[str, Any]]]:
    """For each domain the documents nearest to its centroid, nearest first.

    Returns:
        Of each document its Euclidean `distance` to the centroid, its `origin`, and as `excerpt` its beginning on one
        line.
    """
    distances_N = np.linalg.norm(embeddings_NE - centroids_DE[domain_N], axis=1)
    found: list[list[dict[str, Any]]] = [[] for _ in centroids_DE]
    for number in np.argsort(distances_N, kind="stable"):
        typical, document = found[domain_N[number]], documents[number]
        if len(typical) < count:
            excerpt = " ".join(document.text[: 4 * _EXCERPT_CHARS].split())[:_EXCERPT_CHARS]
            typical.append({"distance": float(distances_N[number]), "origin": document.origin, "excerpt": excerpt})
    return found
