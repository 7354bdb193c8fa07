"""From documents to domains: by label, or by clusters."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from weftlm.corpora.labels import folder_name
from weftlm.domains.cluster import Clusters, fit_clusters
from weftlm.domains.embed import Embedder, make_embedder
from weftlm.domains.split import first_within
from weftlm.errors import DataError
from weftlm.pipeline.data_config import DataConfig, refuse_reserved
from weftlm.pipeline.documents import Documents
from weftlm.progress import ProgressBar

Item = TypeVar("Item")


@dataclass(frozen=True)
class Discovered:
    """Which domain each document is in.

    Attributes:
        names: Names of the domains, in order.
        domain_N: Number of each document's domain; -1 for those of the target's sets and of domains left out.
        embedder: What clustering embedded with; None where the domains are labelled.
        clusters: The clusters; None where the domains are labelled.
    """

    names: tuple[str, ...]
    domain_N: NDArray[np.int64]
    embedder: Embedder | None = None
    clusters: Clusters | None = None

    def merged(self, small: Iterable[str], into: str | None) -> Discovered:
        """The same domains, the documents of the `small` ones left out or put into one domain."""
        names = tuple(sorted((set(self.names) - set(small)) | ({into} if into else set())))
        numbers = {name: number for number, name in enumerate(names)}
        other = numbers[into] if into else -1
        table = np.array([*(numbers.get(name, other) for name in self.names), -1], dtype=np.int64)
        return dataclasses.replace(self, names=names, domain_N=table[self.domain_N])


def by_label(documents: Documents) -> Discovered:
    """Domains as labelled, in order of name.

    Raises:
        DataError: a document has no label, a label is reserved, held-out text has a label the corpora lack, or two
            domains would share a folder on some file system.
    """
    corpus_N, heldout_N = documents.of("corpora"), documents.of("heldout")
    without_N = (corpus_N | heldout_N) & (documents.label_N < 0)
    for _, document in documents.stream(without_N):
        raise DataError(
            f"document {document.origin} has no label to make a domain of; set label, label_field or label_from on "
            f"its corpus, or use domains.by: clusters"
        )
    names, held = (
        sorted(documents.labels[number] for number in np.unique(documents.label_N[set_N]))
        for set_N in (corpus_N, heldout_N)
    )
    refuse_reserved(names)
    if unknown := sorted(set(held) - set(names)):
        raise DataError(
            f"held-out documents have the label {unknown[0]!r}, which no corpus has; labels of the corpora: "
            f"{', '.join(names[:20])}"
        )
    by_folder: dict[str, list[str]] = {}
    for name in names:
        by_folder.setdefault(folder_name(name).casefold(), []).append(name)
    if colliding := [group for group in by_folder.values() if len(group) > 1]:
        shown = "; ".join(" and ".join(map(repr, group)) for group in colliding[:10])
        raise DataError(f"{len(colliding)} names of domains differ in the case of letters only: {shown}; rename them")
    numbers = {name: number for number, name in enumerate(names)}
    table = np.array([*(numbers.get(label, -1) for label in documents.labels), -1], dtype=np.int64)
    return Discovered(tuple(names), np.where(corpus_N | heldout_N, table[documents.label_N], -1))


def by_clusters(documents: Documents, config: DataConfig, progress: bool) -> Discovered:
    """Domains discovered: fit on a bounded sample, assign every document, dissolve clusters with too little text.

    Raises:
        ConfigError: more clusters than documents.
        DataError: nothing to embed.
    """
    options, embedding = config.domains.clusters, config.domains.embedder
    assert options is not None
    corpus_N = documents.of("corpora")
    count = max(embedding.sample_documents, options.sample_documents)
    positions_N = documents.positions(config.seed, "clusters")
    sampled_N = corpus_N & first_within(positions_N, np.where(corpus_N, 0, 1), count)
    sample = [document.text for _, document in documents.stream(sampled_N)]
    embedder = make_embedder(embedding, sample[: embedding.sample_documents], config.seed)
    fitted_on = batches(sample[: options.sample_documents], embedding.batch_documents)
    rows_NE = np.concatenate([embedder.embed(batch) for batch in fitted_on])
    clusters = fit_clusters(rows_NE, options, config.seed)
    del sample, rows_NE
    domain_N = np.full(len(documents), -1, np.int64)

    def assign(chosen_N: NDArray[np.bool_], to: Clusters) -> None:
        for batch in batches(documents.stream(chosen_N), embedding.batch_documents):
            texts = [document.text for _, document in batch]
            domain_N[[number for number, _ in batch]] = to.assign(embedder.embed(texts))
            counter.advance(len(batch))

    with ProgressBar("cluster", total=int(corpus_N.sum()), unit="documents", enabled=progress) as counter:
        assign(corpus_N, clusters)
        sizes_C = np.bincount(domain_N[corpus_N], documents.bytes_N[corpus_N], len(clusters))
        kept_C = (sizes_C > 0) & (sizes_C >= options.min_bytes)
        kept = clusters.keep(kept_C)
        dissolved_N = corpus_N & ~kept_C[domain_N]
        domain_N[corpus_N] = (np.cumsum(kept_C) - 1)[domain_N[corpus_N]]
        assign(dissolved_N | documents.of("heldout"), kept)
    width = len(str(len(kept) - 1))
    names = tuple(f"cluster_{number:0{width}d}" for number in range(len(kept)))
    return Discovered(names, domain_N, embedder, kept)


def batches(items: Iterable[Item], count: int) -> Iterator[list[Item]]:
    """Items, some at a time."""
    rest = iter(items)
    while batch := list(islice(rest, count)):
        yield batch
