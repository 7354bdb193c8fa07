"""From spooled documents to domains: labels or clusters, centroids, the target's histogram, the basis."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from weftlm.corpora.config import CorpusConfig
from weftlm.corpora.labels import folder_name
from weftlm.corpora.reading import ReadingReport, read_documents
from weftlm.corpora.source import Document
from weftlm.domains.cluster import Clusters, fit_clusters, nearest
from weftlm.domains.embed import Embedder, SentenceTransformerEmbedder, TfidfSvd, make_embedder
from weftlm.domains.histogram import (
    basis_from_groups,
    basis_from_sets,
    basis_from_shards,
    domain_means,
    histogram,
    neighbours,
    typical_documents,
)
from weftlm.domains.split import Lowest, position
from weftlm.errors import DataError
from weftlm.files import parse_json, write_whole
from weftlm.pipeline.data_config import RESERVED_NAMES, DataConfig
from weftlm.pipeline.spool import NO_LABEL, Numbers, Spool

Item = TypeVar("Item")
_SAMPLE_PER_DOMAIN = 400
_TYPICAL = 5
_NEIGHBOURS = 3


@dataclass(frozen=True)
class Discovered:
    """Which domain each spooled document is in.

    Attributes:
        names: domain names, in order.
        train: number of the domain of each document of the corpora; `NO_LABEL` for those of a domain left out.
        heldout: likewise of the separate held-out documents.
    """

    names: tuple[str, ...]
    train: Numbers
    heldout: Numbers


def by_label(corpus: Spool, heldout: Spool, folder: Path) -> Discovered:
    """Domains as labelled, in order of name.

    Raises:
        DataError: a document has no label, a label is reserved, held-out text has a label the corpora lack, or two
            domains would share a folder on some file system.
    """
    for spool in (corpus, heldout):
        _need_labels(spool)
    names = tuple(sorted(corpus.labels))
    if reserved := sorted(RESERVED_NAMES.intersection(names)):
        raise DataError(
            f"a domain may not be called {reserved[0]!r}, which names the target's own set; rename the label"
        )
    if unknown := sorted(set(heldout.labels) - set(names)):
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
    found = Discovered(names, Numbers(folder / "train.u4"), Numbers(folder / "heldout.u4"))
    place = {name: number for number, name in enumerate(names)}
    for spool, numbers in ((corpus, found.train), (heldout, found.heldout)):
        table = np.array([place[label] for label in spool.labels], dtype=np.int64)
        numbers.write(table[block] for block in spool.label_numbers())
    return found


def _need_labels(spool: Spool) -> None:
    start = 0
    for block in spool.label_numbers():
        without = np.flatnonzero(block == NO_LABEL)
        if len(without):
            document = next(islice(spool, start + int(without[0]), None))
            raise DataError(
                f"document {document.origin} has no label to make a domain of; set label, label_field or label_from on "
                f"its corpus, or use domains.by: clusters"
            )
        start += len(block)


def merged(found: Discovered, small: Mapping[str, int], into: str | None, folder: Path) -> Discovered:
    """The same domains without the small ones, their documents left out or put `into` one domain.

    Args:
        found: The domains.
        small: Names of the small ones.
        into: Name of the domain that takes their documents; None leaves them out.
        folder: Folder of the new numbers.
    """
    names = tuple(sorted({name for name in found.names if name not in small} | ({into} if into else set())))
    place = {name: number for number, name in enumerate(names)}
    table = np.array([place.get(name, place[into] if into else NO_LABEL) for name in found.names], dtype=np.int64)
    result = Discovered(names, Numbers(folder / "train.merged.u4"), Numbers(folder / "heldout.merged.u4"))
    for old, new in ((found.train, result.train), (found.heldout, result.heldout)):
        new.write(table[block] for block in _batches(old, 1 << 16))
    return result


def by_clusters(
    corpus: Spool, heldout: Spool, config: DataConfig, folder: Path, tick: Callable[[int], None]
) -> tuple[Discovered, Embedder, Clusters]:
    """Domains discovered: fit on a bounded sample, assign every document, dissolve clusters with too little text.

    Raises:
        ConfigError: more clusters than documents.
        DataError: nothing to embed.
    """
    options = config.domains.clusters
    assert options is not None
    embedding = config.domains.embedder
    found = Discovered((), Numbers(folder / "train.u4"), Numbers(folder / "heldout.u4"))
    if (folder / "names.json").exists():
        names = tuple(parse_json((folder / "names.json").read_text(encoding="utf-8")))
        saved = TfidfSvd.load(folder) if embedding.kind == "tfidf" else SentenceTransformerEmbedder(embedding)
        return dataclasses.replace(found, names=names), saved, Clusters.load(folder / "k.npz")
    lowest = Lowest(max(embedding.sample_documents, options.sample_documents))
    for digest, _ in corpus.digests():
        lowest.add(position(digest, config.seed, "clusters"))
    threshold = lowest.threshold()
    sample = [d.text for d in corpus if position(d.digest(), config.seed, "clusters") < threshold]
    embedder = make_embedder(embedding, sample[: embedding.sample_documents], config.seed)
    if isinstance(embedder, TfidfSvd):
        embedder.save(folder)
    rows_NE = np.concatenate(list(_embedded(embedder, sample[: options.sample_documents], embedding.batch_documents)))
    clusters = fit_clusters(rows_NE, options, config.seed)
    del sample, rows_NE

    sizes = np.zeros(len(clusters), np.int64)

    def first() -> Iterator[NDArray[np.int64]]:
        for batch in _batches(corpus, embedding.batch_documents):
            cluster_N = clusters.assign(embedder.embed([document.text for document in batch]))
            np.add.at(sizes, cluster_N, [len(document.text.encode("utf-8")) for document in batch])
            tick(len(batch))
            yield cluster_N

    draft = Numbers(folder / "draft.u4")
    draft.write(first())
    kept = (sizes > 0) & (sizes >= options.min_bytes)
    fewer = clusters.keep(kept)
    renumbered = np.cumsum(kept) - 1

    def second() -> Iterator[NDArray[np.int64]]:
        before = iter(draft)
        for batch in _batches(corpus, embedding.batch_documents):
            cluster_N = np.array([next(before) for _ in batch])
            moved = np.flatnonzero(~kept[cluster_N])
            result = renumbered[cluster_N]
            if len(moved):
                result[moved] = fewer.assign(embedder.embed([batch[number].text for number in moved]))
            yield result

    found.train.write(second())
    found.heldout.write(
        fewer.assign(embedder.embed([document.text for document in batch]))
        for batch in _batches(heldout, embedding.batch_documents)
    )
    fewer.save(folder / "k.npz")
    width = len(str(len(fewer) - 1))
    names = tuple(f"cluster_{number:0{width}d}" for number in range(len(fewer)))
    write_whole(folder / "names.json", json.dumps(names))
    return dataclasses.replace(found, names=names), embedder, fewer


def _batches(items: Iterable[Item], count: int) -> Iterator[list[Item]]:
    rest = iter(items)
    while batch := list(islice(rest, count)):
        yield batch


def _embedded(embedder: Embedder, texts: list[str], count: int) -> Iterator[NDArray[np.float32]]:
    return map(embedder.embed, _batches(texts, count))


@dataclass(frozen=True)
class Described:
    """What embedding tells of the domains.

    Attributes:
        target_histogram_D: None without a target.
        basis_ND: None where none is asked for.
        facts: per domain its name, typical documents and neighbours.
        embedder: fingerprint and dimensions.
        reading: reports of the auxiliary sets of a basis.
    """

    target_histogram_D: NDArray[np.float64] | None
    basis_ND: NDArray[np.float64] | None
    facts: list[dict[str, Any]]
    embedder: dict[str, Any]
    reading: list[dict[str, Any]]


def describe(
    names: tuple[str, ...],
    documents: Callable[[], Iterator[tuple[Document, int]]],
    sizes_D: NDArray[np.float64],
    target: Callable[[], Iterator[Document]] | None,
    config: DataConfig,
    known: tuple[Embedder, Clusters] | None,
) -> Described:
    """Centroids from a bounded sample of training documents, then histogram, basis and facts.

    Args:
        names: Names of the D domains, the target's own (if it is one) last.
        documents: Starts a new pass over training documents with their domain's number.
        sizes_D: UTF-8 bytes of training text per domain.
        target: Starts a new pass over the target's training documents.
        config: The data section.
        known: Embedder and clusters, where the domains were discovered; their centroids are then used.
    """
    embedding = config.domains.embedder
    domains = len(names)
    per_domain = int(np.clip(embedding.sample_documents // domains, 4, _SAMPLE_PER_DOMAIN))
    lowest = [Lowest(per_domain) for _ in names]
    for document, number in documents():
        lowest[number].add(position(document.digest(), config.seed, "centroids"))
    thresholds = [kept.threshold() for kept in lowest]
    sample = [
        (dataclasses.replace(document, text=document.text[: embedding.max_chars]), number)
        for document, number in documents()
        if position(document.digest(), config.seed, "centroids") < thresholds[number]
    ]
    number_N = np.array([number for _, number in sample])
    texts = [document.text for document, _ in sample]
    embedder = make_embedder(embedding, texts, config.seed) if known is None else known[0]
    rows_NE = np.concatenate(list(_embedded(embedder, texts, embedding.batch_documents)))
    centroids_DE = domain_means(rows_NE, number_N, domains)
    if known is not None:
        centroids_DE[: len(known[1])] = known[1].centroids_CE
    typical = typical_documents(rows_NE, number_N, centroids_DE, [document for document, _ in sample], _TYPICAL)
    near = neighbours(centroids_DE, _NEIGHBOURS)
    facts = [
        {
            "name": name,
            "typical": typical[number],
            "neighbours": [{"name": names[other], "cosine": round(cosine, 4)} for other, cosine in near[number]],
        }
        for number, name in enumerate(names)
    ]

    def place(stream: Iterable[Document]) -> NDArray[np.int64]:
        batches = _batches(stream, embedding.batch_documents)
        found = [nearest(embedder.embed([item.text for item in batch]), centroids_DE) for batch in batches]
        return np.concatenate(found) if found else np.zeros(0, np.int64)

    reading: list[dict[str, Any]] = []
    target_N = None if target is None else place(target())
    shares_D = None if target_N is None else histogram(target_N, domains, config.domains.histogram_smoothing)
    basis_ND = None
    options = config.domains.basis
    if options is not None and options.of == "sets":
        sets = [place(_read(corpus, reading)) for corpus in options.sets]
        basis_ND = basis_from_sets(sets, domains, options.smoothing)
    elif options is not None:
        assert options.count is not None
        if options.of == "groups":
            basis_ND = basis_from_groups(centroids_DE, sizes_D, options.count, config.seed, options.smoothing)
        else:
            assert target_N is not None
            basis_ND = basis_from_shards(target_N, options.count, domains, options.smoothing)
    facts_of_embedder = {"fingerprint": embedder.fingerprint, "dimensions": embedder.dimensions, "kind": embedding.kind}
    return Described(shares_D, basis_ND, facts, facts_of_embedder, reading)


def _read(corpus: CorpusConfig, reading: list[dict[str, Any]]) -> Iterator[Document]:
    report = ReadingReport()
    yield from read_documents(corpus, report)
    reading.append({"set": "basis", "input": corpus.name, **report.to_json()})
