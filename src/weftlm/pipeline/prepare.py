"""Text in, prepared data out: read, de-duplicate, find domains, split, tokenise, check for leaks.

The folder appears when everything is on disk and checked; an interrupted preparation begins again.

A folder that is prepared already and whose configuration and inputs are unchanged is reused. If either changed, nothing
is touched: `prepare` raises and says what changed, because other runs may train on the folder. With `rebuild=True` the
new data takes its place once it is complete.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from weftlm.artifact import Artifact, locked
from weftlm.corpora.config import CorpusConfig
from weftlm.corpora.dedup import SeenDocuments
from weftlm.corpora.reading import ReadingReport, read_documents
from weftlm.corpora.source import Document
from weftlm.corpora.store import TokenStore
from weftlm.corpora.store_writer import encode_documents, tokenise_by_label
from weftlm.corpora.tokens import TextLoss, Tokenizer, make_tokenizer
from weftlm.domains.cluster import nearest
from weftlm.domains.embed import make_embedder
from weftlm.domains.histogram import (
    basis_from_groups,
    basis_from_sets,
    basis_from_shards,
    domain_means,
    histogram,
    neighbours,
    typical_documents,
)
from weftlm.domains.split import SplitConfig, first_within, heldout_count
from weftlm.errors import DataError
from weftlm.files import SEAL, seal, whole_folder
from weftlm.pipeline.data_config import OTHER_DOMAIN, REMEDY, SETS, TARGET_DOMAIN, DataConfig, prepared_artifact
from weftlm.pipeline.discovery import Discovered, batches, by_clusters, by_label
from weftlm.pipeline.documents import Documents, write_documents
from weftlm.pipeline.prepared import FATES, LOST_ACCEPTED, TARGET_SET, PreparedData
from weftlm.progress import ProgressBar

log = logging.getLogger(__name__)

_BYTES_PER_TOKEN_AT_MOST = 16
_NO_LABEL = "(no label)"
_SHOWN_LOSS = 0.2
"""Share of a domain's documents whose absence from training is a warning."""
LOST_REFUSED = 0.2
"""Share of bytes or tokens lost by the tokenizer from which data is refused."""
_LOSS_DOCUMENTS, _LOSS_CHARACTERS = 1024, 1 << 14
"""The tokenizer's loss is measured on so many documents over all domains (64 per domain at most, 1 at least), each cut
to so many characters: at most about 16 MB of text and, measured, 16 s on one core."""
_SAMPLE_PER_DOMAIN, _TYPICAL, _NEIGHBOURS = 400, 5, 3
"""Documents of each domain that are embedded for its centroid; typical documents and neighbours that are listed."""

Chosen = NDArray[np.bool_]


def prepare(config: DataConfig, folder: str | Path, *, rebuild: bool = False, progress: bool = True) -> PreparedData:
    """Prepare data, or reuse what is prepared and unchanged.

    Args:
        config: Section `data` of a recipe.
        folder: Folder of the prepared data.
        rebuild: Whether to replace data of another configuration or of changed inputs, or a damaged folder.
        progress: Whether to show progress on stderr.
    Raises:
        DataError: inputs are missing or faulty, a set is empty, sets share a document, or the folder holds data of
            another configuration or of changed inputs and `rebuild` is not set.
        ConfigError: the configuration does not fit the data.
    """
    folder = Path(folder)
    artifact = prepared_artifact(config, folder)
    if (found := _reuse(artifact, rebuild)) is not None:
        return found

    def wait(holder: str) -> None:
        log.warning("%s is preparing %s; waiting for it", holder, folder)

    with locked(folder.with_name(f".{folder.name}.lock"), DataError, patience_s=math.inf, waiting=wait):
        if (found := _reuse(artifact, rebuild)) is not None:
            return found
        if not artifact.record.exists() and folder.exists() and any(folder.iterdir()):
            raise DataError(f"{folder} holds files but no prepared data; choose another folder, or empty it")
        with whole_folder(folder, "data", replace=True) as making:
            manifest = _Preparation(config, making, progress).run()
            made = Artifact(making / artifact.record.name, artifact.identity, artifact.cure)
            made.finish(manifest, [f"tokenizer/{SEAL}"], nan=True)
    return PreparedData.load(folder)


def _reuse(artifact: Artifact, rebuild: bool) -> PreparedData | None:
    """The prepared data if it is there and unchanged; None if it is to be made.

    Raises:
        DataError: it is there but of something else, or damaged, and `rebuild` is not set.
    """
    folder = artifact.record.parent
    if not artifact.record.exists():
        return None
    try:
        if (changed := artifact.changed()) is None:
            return PreparedData.load(folder)
        raise DataError(f"{folder} was prepared from something else ({changed}); {REMEDY}, or choose another folder")
    except DataError as error:
        if not rebuild:
            raise
        log.info("%s", error)
        return None


class _Preparation:
    """One preparation, step by step.

    Attributes:
        documents: All documents.
        found: The domains, and the domain of each document.
        train_N: Which documents are trained on.
        heldout_N: Which are held out of the domains.
        target_N: Which are the target's training documents.
        target_heldout_N: Which are held out of the target.
        tokenizer: The tokenizer.
    """

    documents: Documents
    found: Discovered
    train_N: Chosen
    heldout_N: Chosen
    target_N: Chosen
    target_heldout_N: Chosen
    tokenizer: Tokenizer

    def __init__(self, config: DataConfig, folder: Path, progress: bool) -> None:
        self.config, self.folder, self.progress = config, folder, progress
        self.warnings: list[str] = []

    def run(self) -> dict[str, Any]:
        """Prepare into the folder; returns the manifest."""
        path = self.folder / "documents.parquet"
        facts = self._read(path)
        self.documents = Documents(path)
        self._need_documents()
        self.found = self._discover()
        self._split()
        self.tokenizer = self._make_tokenizer()
        self._merge_small()
        losses = self._losses()
        self._cap()
        self._refuse_leaks()
        stores = self._tokenise()
        self._warn_of_documents(facts["counts"])
        manifest = self._manifest(facts, stores, losses)
        path.unlink()
        return manifest

    def _read(self, path: Path) -> dict[str, Any]:
        """Read every input once, each text kept only in the first set that has it."""
        reading: list[dict[str, Any]] = []
        counts: dict[str, dict[str, Counter[str]]] = {name: {} for name in SETS}
        seen = SeenDocuments()
        with ProgressBar("read", unit="documents", enabled=self.progress) as counter:

            def row(name: str, label: str | None) -> Counter[str]:
                """The row of the table of documents that one is counted in."""
                shown = "all corpora" if self.config.domains.by == "clusters" else label or _NO_LABEL
                return counts[name].setdefault(shown, Counter())

            def kept() -> Iterator[tuple[str, Document]]:
                for name in SETS:
                    for corpus in self.config.labelled(name):
                        report = ReadingReport()
                        for document in read_documents(corpus, report):
                            owner = seen.add(document, name)
                            fate = "kept"
                            if owner is not None:
                                fate = "in_target" if owner != name and "target" in owner else "duplicates"
                            row(name, document.label).update(("read", fate))
                            if owner is None:
                                yield name, document
                            counter.advance()
                        for label, faults in report.faults_by_label.items():
                            row(name, label).update(read=faults, faulty=faults)
                        reading.append({"set": name, "input": corpus.name, **report.to_json()})

            write_documents(path, kept())
        return {"reading": reading, "duplicates": seen.to_json(), "counts": counts}

    def _warn_of_documents(self, counts: dict[str, dict[str, dict[str, int]]]) -> None:
        """Warn of every domain that loses more than a fifth of its documents, or all of them."""
        words = {"in_target": "in the target too", "duplicates": "duplicates or held-out text", "faulty": "faulty"}
        for name, tally in sorted(counts["corpora"].items()):
            total, kept = tally["read"], tally.get("kept", 0)
            if total - kept <= _SHOWN_LOSS * total:
                continue
            why = ", ".join(f"{tally[fate]} {words[fate]}" for fate in FATES if fate in words and tally.get(fate))
            what = "disappears" if kept == 0 else f"loses {(total - kept) / total:.0%} of its documents"
            of = "text without a label" if name == _NO_LABEL else f"domain {name!r}"
            self.warnings.append(f"{of} {what}: {total} read, {why}, {kept} kept")

    def _need_documents(self) -> None:
        for name in SETS:
            if getattr(self.config, name) and not self.documents.of(name).any():
                raise DataError(
                    f"data.{name} holds no document that is not in another set already; check the inputs (a text that "
                    f"several sets hold stays in the first of {', '.join(SETS)})"
                )

    def _discover(self) -> Discovered:
        if self.config.domains.by != "clusters":
            return by_label(self.documents)
        total = int(self.documents.of("corpora").sum())
        with ProgressBar("cluster", total=total, unit="documents", enabled=self.progress) as counter:
            return by_clusters(self.documents, self.config, counter.advance)

    # -- which documents are used for what ------------------------------------------------------------------------

    def _first(
        self,
        among_N: Chosen,
        purpose: str,
        limit_G: ArrayLike,
        *,
        groups_N: NDArray[np.int64] | None = None,
        size_N: NDArray[np.int64] | None = None,
    ) -> Chosen:
        """The first of some documents in the order of one choice, of each domain up to a limit; see `first_within`."""
        numbers = np.flatnonzero(among_N)
        groups_N = self.found.domain_N if groups_N is None else groups_N
        chosen_N = np.zeros(len(among_N), bool)
        chosen_N[numbers] = first_within(
            self.documents.positions(self.config.seed, purpose)[numbers],
            groups_N[numbers],
            limit_G,
            None if size_N is None else size_N[numbers],
        )
        return chosen_N

    def _held_out(self, among_N: Chosen, split: SplitConfig, groups_N: NDArray[np.int64]) -> Chosen:
        counts = [heldout_count(int(count), split) for count in np.bincount(groups_N[among_N])]
        return self._first(among_N, "heldout", counts, groups_N=groups_N)

    def _split(self) -> None:
        config, documents = self.config, self.documents
        one_N = np.zeros(len(documents), np.int64)
        of_domains_N = self.found.domain_N >= 0
        corpora_N, target_N = documents.of("corpora") & of_domains_N, documents.of("target")
        if config.heldout:
            self.heldout_N = documents.of("heldout") & of_domains_N
        else:
            self.heldout_N = self._held_out(corpora_N, config.split, self.found.domain_N)
        self.train_N = corpora_N & ~self.heldout_N
        if config.target_heldout:
            self.target_heldout_N = documents.of("target_heldout")
        else:
            self.target_heldout_N = self._held_out(target_N, config.target_split, one_N)
            if target_N.sum() == 1:
                self.warnings.append(
                    "the target has one document: nothing of it is held out, so it cannot be evaluated"
                )
        self.target_N = target_N & ~self.target_heldout_N
        if (wanted := config.target_train_documents) is not None:
            if self.target_N.sum() < wanted:
                self.warnings.append(
                    f"data.target_train_documents is {wanted} but only {self.target_N.sum()} are left beside the "
                    "held-out ones"
                )
            self.target_N = self._first(self.target_N, "target", wanted, groups_N=one_N)

    def _count_tokens(self, chosen_N: Chosen) -> NDArray[np.int64]:
        """Tokens of some documents, with the one that closes each; 0 for the others."""
        counts_N = np.zeros(len(chosen_N), np.int64)
        for batch in batches(self.documents.stream(chosen_N), 256):
            encoded = encode_documents(self.tokenizer, [document for _, document in batch])
            for (number, _), (tokens, _) in zip(batch, encoded, strict=True):
                counts_N[number] = len(tokens) + 1
        return counts_N

    def _make_tokenizer(self) -> Tokenizer:
        """Trained on an even sample of the training text, or loaded; saved at once."""
        sample_N = self.train_N
        if (training := self.config.tokenizer.train) is not None:
            share = training.sample_bytes / max(1, int(self.documents.bytes_N[self.documents.of("corpora")].sum()))
            if share < 1:
                positions_N = self.documents.positions(self.config.seed, "tokenizer")
                sample_N = sample_N & (positions_N < np.uint64(int(share * 2**64)))
        with ProgressBar("tokenizer", unit="documents", enabled=self.progress) as counter:

            def texts() -> Iterator[str]:
                for _, document in self.documents.stream(sample_N):
                    counter.advance()
                    yield document.text

            tokenizer = make_tokenizer(self.config.tokenizer, texts())
        folder = self.folder / "tokenizer"
        tokenizer.save(folder)
        seal(folder)
        return Tokenizer.load(folder)

    def _merge_small(self) -> None:
        """Domains with fewer than `min_tokens` training tokens named, dropped or merged, as the recipe says.

        Only domains of so little text that they may be too small are encoded.

        Raises:
            DataError: there are some and `small` is `stop`, or what is left is still too small.
        """
        options, names, domain_N = self.config.domains, self.found.names, self.found.domain_N
        sizes_D = np.bincount(domain_N[self.train_N], self.documents.bytes_N[self.train_N], len(names))
        few_D = sizes_D < options.min_tokens * _BYTES_PER_TOKEN_AT_MOST
        tokens_N = self._count_tokens(self.train_N & few_D[domain_N])
        tokens_D = np.bincount(domain_N[self.train_N], tokens_N[self.train_N], len(names))
        small = {names[n]: int(tokens_D[n]) for n in np.flatnonzero(few_D & (tokens_D < options.min_tokens))}
        if not small:
            return
        shown = ", ".join(f"{name} ({count})" for name, count in list(small.items())[:50])
        shown += f" and {len(small) - 50} more" if len(small) > 50 else ""
        least = f"fewer training tokens than data.domains.min_tokens, {options.min_tokens}: {shown}"
        if options.small == "stop":
            raise DataError(
                f"{len(small)} domains have {least}; give them more text, lower it, or set data.domains.small to drop, "
                f"or to other, which makes one domain of them"
            )
        into = OTHER_DOMAIN if options.small == "other" else None
        together = sum(small.values()) + (0 if into in small or into not in names else options.min_tokens)
        if len(small) == len(names) if into is None else together < options.min_tokens:
            raise DataError(f"{len(small)} domains have {least}; together they are too small as well: give more text")
        what = "dropped" if into is None else f"put into the domain {into!r}"
        self.warnings.append(f"{len(small)} domains are {what}, for they have {least}")
        self.found = self.found.merged(small, into)
        self._split()

    def _losses(self) -> dict[str, TextLoss]:
        """What the tokenizer loses of each domain's text and of the target's, on a sample of bounded size.

        Raises:
            DataError: it loses so much of one that training on the tokens would not be training on the text.
        """
        names = (*self.found.names, TARGET_SET)
        groups_N = np.where(self.found.domain_N < 0, len(names) - 1, self.found.domain_N)
        used_N = self.train_N | self.heldout_N | self.target_N | self.target_heldout_N
        sample_N = self._first(used_N, "loss", max(1, min(64, _LOSS_DOCUMENTS // len(names))), groups_N=groups_N)
        texts: dict[str, list[str]] = {}
        for number, document in self.documents.stream(sample_N):
            texts.setdefault(names[groups_N[number]], []).append(document.text[:_LOSS_CHARACTERS])
        losses = {name: self.tokenizer.loss(texts[name]) for name in names if name in texts}
        worst = sorted((name for name in losses if losses[name].lost > LOST_ACCEPTED), key=lambda n: -losses[n].lost)
        if not worst:
            return losses
        shown = "; ".join(
            f"{name}: {losses[name].given_back_share:.1%} of the bytes come back, "
            f"{losses[name].unknown_share:.1%} of the tokens are unknown"
            for name in worst[:5]
        ) + (f"; and {len(worst) - 5} more" if len(worst) > 5 else "")
        said = f"the tokenizer loses text of {len(worst)} sets ({shown})"
        if losses[worst[0]].lost > LOST_REFUSED:
            raise DataError(
                f"{said}, and over {LOST_REFUSED:.0%} is refused; use one that keeps the text: data.tokenizer: "
                "{train: {}}, or a byte-level one"
            )
        self.warnings.append(f"{said}: bits per byte is not given for them")
        return losses

    def _cap(self) -> None:
        """Choose at random the documents that fill `max_train_tokens` of each larger domain."""
        cap, domain_N = self.config.domains.max_train_tokens, self.found.domain_N
        if cap is None:
            return
        size_N = self.documents.bytes_N + 1
        rough_N = self._first(self.train_N, "cap", cap * _BYTES_PER_TOKEN_AT_MOST, size_N=size_N)
        larger_D = np.bincount(domain_N[rough_N], size_N[rough_N], len(self.found.names)) > cap
        larger_N = self.train_N & larger_D[domain_N]
        tokens_N = self._count_tokens(rough_N & larger_N)
        exact_N = self._first(rough_N & larger_N, "cap", cap, size_N=tokens_N)
        self.train_N = np.where(larger_N, exact_N, self.train_N)

    def _refuse_leaks(self) -> None:
        """Refuse sets that must be apart and share a text."""
        digests, owners = self.documents.digests(), dict[bytes, str]()
        for name, chosen_N in (
            ("the target's held-out documents", self.target_heldout_N),
            ("the target", self.target_N),
            ("held-out documents", self.heldout_N),
            ("training documents", self.train_N),
        ):
            for number in np.flatnonzero(chosen_N).tolist():
                if (owner := owners.setdefault(digests[number], name)) != name:
                    raise DataError(f"sets that must be apart share documents: one of {name} is in {owner} too")

    # -- what is kept ---------------------------------------------------------------------------------------------

    def _tokenise(self) -> dict[str, dict[str, TokenStore]]:
        """Write the token stores."""
        names, domain_N = self.found.names, self.found.domain_N

        def by_domain(chosen_N: Chosen) -> Iterator[Document]:
            for number, document in self.documents.stream(chosen_N):
                yield replace(document, label=names[domain_N[number]])

        def target() -> Iterator[Document]:
            for label, chosen_N in (("train", self.target_N), ("heldout", self.target_heldout_N)):
                for _, document in self.documents.stream(chosen_N):
                    yield replace(document, label=label)

        found: dict[str, dict[str, TokenStore]] = {}
        with ProgressBar("tokenise", unit="bytes", enabled=self.progress) as counter:

            def stored(size: int) -> None:
                counter.update(size + sum(store.bytes for stores in found.values() for store in stores.values()))

            for name, chosen_N, documents in (
                ("train", self.train_N, by_domain(self.train_N)),
                ("heldout", self.heldout_N, by_domain(self.heldout_N)),
                ("target", self.target_N | self.target_heldout_N, target()),
            ):
                some = bool(chosen_N.any())
                found[name] = (
                    tokenise_by_label(documents, self.tokenizer, self.folder / name, progress=stored) if some else {}
                )
        return found

    def _described(self, stores: dict[str, dict[str, TokenStore]]) -> dict[str, Any]:
        """What embedding tells of the domains: centroids of a sample, then histogram, basis and facts.

        Returns:
            Parts of the manifest: `domains`, their names; `target_histogram_D`, None without a target; `basis_ND`, None
            where none is asked for; `facts`, for each domain its name, typical documents and neighbours; `embedder`,
            its fingerprint and dimensions; `reading`, reports of the auxiliary sets of a basis.
        """
        config, embedding, found = self.config.domains, self.config.domains.embedder, self.found
        names, groups_N, used_N = found.names, found.domain_N, self.train_N
        sizes_D = [float(stores["train"][name].bytes) for name in names]
        if config.include_target:
            groups_N, used_N = np.where(self.target_N, len(names), groups_N), used_N | self.target_N
            names = (*names, TARGET_DOMAIN)
            sizes_D.append(float(stores["target"]["train"].bytes))
        count = int(np.clip(embedding.sample_documents // len(names), 4, _SAMPLE_PER_DOMAIN))
        chosen_N = self._first(used_N, "centroids", count, groups_N=groups_N)
        numbers: list[int] = []
        documents: list[Document] = []
        for part_N in (self.train_N, self.target_N):
            for number, document in self.documents.stream(chosen_N & part_N):
                numbers.append(int(groups_N[number]))
                documents.append(replace(document, text=document.text[: embedding.max_chars]))
        texts = [document.text for document in documents]
        embedder = make_embedder(embedding, texts, self.config.seed) if found.embedder is None else found.embedder
        rows_NE = np.concatenate([embedder.embed(batch) for batch in batches(texts, embedding.batch_documents)])
        centroids_DE = domain_means(rows_NE, np.array(numbers), len(names))
        if found.clusters is not None:
            centroids_DE[: len(found.clusters)] = found.clusters.centroids_CE
        typical = typical_documents(rows_NE, np.array(numbers), centroids_DE, documents, _TYPICAL)
        near = neighbours(centroids_DE, _NEIGHBOURS)

        def place(stream: Iterable[Document]) -> NDArray[np.int64]:
            placed = [
                nearest(embedder.embed([document.text for document in batch]), centroids_DE)
                for batch in batches(stream, embedding.batch_documents)
            ]
            return np.concatenate(placed) if placed else np.zeros(0, np.int64)

        def read(corpus: CorpusConfig) -> Iterator[Document]:
            report = ReadingReport()
            yield from read_documents(corpus, report)
            reading.append({"set": "basis", "input": corpus.name, **report.to_json()})

        reading: list[dict[str, Any]] = []
        basis_ND, options = None, config.basis
        target_N = place(document for _, document in self.documents.stream(self.target_N))
        if options is not None and options.count is None:
            sets = [place(read(corpus)) for corpus in options.sets]
            basis_ND = basis_from_sets(sets, len(names), options.smoothing)
        elif options is not None and options.of == "groups":
            assert options.count is not None
            basis_ND = basis_from_groups(
                centroids_DE, np.array(sizes_D), options.count, self.config.seed, options.smoothing
            )
        elif options is not None:
            assert options.count is not None
            basis_ND = basis_from_shards(target_N, options.count, len(names), options.smoothing)
        shares_D = histogram(target_N, len(names), config.histogram_smoothing) if len(target_N) else None
        return {
            "domains": list(names),
            "target_histogram_D": None if shares_D is None else shares_D.tolist(),
            "basis_ND": None if basis_ND is None else basis_ND.tolist(),
            "embedder": {
                "fingerprint": embedder.fingerprint, "dimensions": embedder.dimensions, "kind": embedding.kind,
            },
            "facts": [
                {
                    "name": name,
                    "typical": typical[number],
                    "neighbours": [
                        {"name": names[other], "cosine": round(cosine, 4)} for other, cosine in near[number]
                    ],
                }
                for number, name in enumerate(names)
            ],
            "reading": reading,
        }  # fmt: skip

    def _manifest(
        self, facts: dict[str, Any], stores: dict[str, dict[str, TokenStore]], losses: dict[str, TextLoss]
    ) -> dict[str, Any]:
        """What prepared.json says."""
        described = self._described(stores)
        without = [name for name in self.found.names if name not in stores["heldout"]]
        if without:
            shown = ", ".join(without[:5]) + (f" and {len(without) - 5} more" if len(without) > 5 else "")
            self.warnings.append(f"no held-out text for {len(without)} domains ({shown}): they are not evaluated")
        manifest = {
            **described,
            "text_loss": {name: asdict(loss) for name, loss in losses.items()},
            "counts": facts["counts"],
            "max_train_tokens": self.config.domains.max_train_tokens,
            "reading": facts["reading"] + described["reading"],
            "duplicates": facts["duplicates"],
            "warnings": list(dict.fromkeys(self.warnings)),
        }
        for line in manifest["warnings"]:
            log.warning("%s", line)
        manifest["fingerprint"] = PreparedData.of(self.folder, manifest).fingerprint
        return manifest
