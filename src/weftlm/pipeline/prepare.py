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
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from weftlm.artifact import Artifact, locked
from weftlm.corpora.config import CorpusConfig
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
from weftlm.domains.split import first_within, heldout_count
from weftlm.errors import DataError
from weftlm.files import SEAL, seal, sweep, whole_folder
from weftlm.pipeline.data_config import (
    MANIFEST,
    OTHER_DOMAIN,
    REMEDY,
    SETS,
    TARGET_DOMAIN,
    TARGET_SET,
    DataConfig,
    data_identity,
)
from weftlm.pipeline.discovery import batches, by_clusters, by_label
from weftlm.pipeline.documents import Documents, write_documents
from weftlm.pipeline.prepared import FATES, PreparedData
from weftlm.progress import ProgressBar

log = logging.getLogger(__name__)

_BYTES_PER_TOKEN_AT_MOST = 16
_NO_LABEL = "(no label)"
_OTHER_SETS = {"target": TARGET_SET, "target_heldout": "target, held-out", "heldout": "held-out text"}
_SHOWN_LOSS = 0.2
"""Share of a domain's documents whose absence from training is a warning."""
LOST_ACCEPTED, LOST_REFUSED = 0.001, 0.2
"""Share of bytes or tokens lost by the tokenizer up to which bits per byte holds, and from which data is refused."""
_LOSS_DOCUMENTS, _LOSS_CHARACTERS = 1024, 1 << 14
"""The tokenizer's loss is measured on so many documents over all domains (64 per domain at most, 1 at least), each cut
to so many characters: at most about 16 MB of text and, measured, 16 s on one core."""
_SAMPLE_PER_DOMAIN, _TYPICAL, _NEIGHBOURS, _EXAMPLES = 400, 5, 3, 5
"""Documents of each domain that are embedded for its centroid; typical documents, neighbours and duplicates listed."""

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
    artifact = Artifact(folder / MANIFEST, data_identity(config), REMEDY)
    sweep(folder.parent)
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
            seals = [path.relative_to(making).as_posix() for path in sorted(making.glob(f"*/{SEAL}"))]
            Artifact(making / MANIFEST, artifact.identity, REMEDY).finish(manifest, seals, nan=True)
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
    """One preparation, step by step. The target is one more group of documents, after the domains.

    Attributes:
        documents: All documents.
        found: The domains.
        names: Names of the groups: the domains, then the target.
        group_N: Number of each document's group; -1 where it is not used.
        train_N: Which documents are trained on.
        heldout_N: Which are held out.
        tokenizer: The tokenizer.
        warnings: What to tell the user at the end.
    """

    def __init__(self, config: DataConfig, folder: Path, progress: bool) -> None:
        self.config, self.folder, self.progress = config, folder, progress
        self.warnings: list[str] = []

    def run(self) -> dict[str, Any]:
        """Prepare into the folder; returns the manifest."""
        path = self.folder / "documents.parquet"
        read = self._read(path)
        self.documents = Documents(path)
        by_cluster = self.config.domains.by == "clusters"
        self.found = by_clusters(self.documents, self.config, self.progress) if by_cluster else by_label(self.documents)
        self._split()
        self.tokenizer = self._make_tokenizer()
        self._merge_small()
        losses = self._losses()
        self._cap()
        self._refuse_leaks()
        stores = self._tokenise(losses)
        described = self._described(stores["train"])
        path.unlink()
        for line in (warnings := list(dict.fromkeys(self.warnings))):
            log.warning("%s", line)
        return {
            **read,
            **described,
            "reading": read["reading"] + described["reading"],
            "text_loss": {name: loss._asdict() for name, loss in losses.items()},
            "warnings": warnings,
        }

    def _read(self, path: Path) -> dict[str, Any]:
        """Read every input once, each text kept only in the first set that has it.

        Returns:
            Parts of the manifest: `reading`, a report for each input; `documents`, counts by fate for each domain and
            each other set; `duplicates`, what was dropped by pairs of sets, with the first origins.
        """
        config = self.config
        reading: list[dict[str, Any]] = []
        rows: dict[str, dict[str, Counter[str]]] = {name: {} for name in reversed(SETS)}
        owners: dict[bytes, str] = {}
        dropped: dict[tuple[str, str], list[str]] = {}
        corpus_row = "all corpora" if config.domains.by == "clusters" else None

        def count(name: str, label: str | None, fate: str, documents: int = 1) -> None:
            row = rows[name].setdefault(_OTHER_SETS.get(name) or corpus_row or label or _NO_LABEL, Counter())
            row.update({"read": documents, fate: documents})

        def kept() -> Iterator[tuple[str, Document]]:
            for name in SETS:
                for corpus in config.labelled(name):
                    report = ReadingReport()
                    for document in read_documents(corpus, report):
                        digest = document.digest()
                        owner = owners.get(digest)
                        if owner is None:
                            owners[digest] = name
                            count(name, document.label, "kept")
                            yield name, document
                        else:
                            in_target = owner != name and "target" in owner
                            count(name, document.label, "in_target" if in_target else "duplicates")
                            dropped.setdefault((name, owner), []).append(document.origin)
                        counter.advance()
                    for label, faults in report.faults_by_label.items():
                        count(name, label, "faulty", faults)
                    reading.append({"set": name, "input": corpus.name, **report.to_json()})

        with ProgressBar("read", unit="documents", enabled=self.progress) as counter:
            write_documents(path, kept())
        for name in SETS:
            if getattr(config, name) and "kept" not in sum(rows[name].values(), Counter()):
                raise DataError(
                    f"data.{name} holds no document that is not in another set already; check the inputs (a text that "
                    f"several sets hold stays in the first of {', '.join(SETS)})"
                )
        for shown, row in sorted(rows["corpora"].items()):
            self._warn_of_documents(shown, row)
        return {
            "reading": reading,
            "documents": {
                shown: {fate: row[fate] for fate in FATES} for of in rows.values() for shown, row in sorted(of.items())
            },
            "duplicates": [
                {"set": name, "already_in": owner, "documents": len(origins), "examples": origins[:_EXAMPLES]}
                for (name, owner), origins in sorted(dropped.items())
            ],
        }

    def _warn_of_documents(self, name: str, row: Counter[str]) -> None:
        """Warn of a domain that loses more than a fifth of its documents, or all of them."""
        total, kept = row["read"], row["kept"]
        if total - kept <= _SHOWN_LOSS * total:
            return
        words = {"duplicates": "duplicates or held-out text", "in_target": "in the target too", "faulty": "faulty"}
        why = ", ".join(f"{row[fate]} {said}" for fate, said in words.items() if row[fate])
        what = "disappears" if kept == 0 else f"loses {(total - kept) / total:.0%} of its documents"
        of = "text without a label" if name == _NO_LABEL else f"domain {name!r}"
        self.warnings.append(f"{of} {what}: {total} read, {why}, {kept} kept")

    # -- which documents are used for what ------------------------------------------------------------------------

    def _first(
        self, among_N: Chosen, purpose: str, limit_G: ArrayLike, size_N: NDArray[np.int64] | None = None
    ) -> Chosen:
        """The first of some documents in the order of one choice, of each group up to a limit; see `first_within`."""
        numbers = np.flatnonzero(among_N)
        positions_N = self.documents.positions(self.config.seed, purpose)
        sizes_N = None if size_N is None else size_N[numbers]
        chosen_N = np.zeros(len(among_N), bool)
        chosen_N[numbers] = first_within(positions_N[numbers], self.group_N[numbers], limit_G, sizes_N)
        return chosen_N

    def _split(self) -> None:
        """Put every document into its group, and hold some of each out where no held-out text is given."""
        config, documents, target = self.config, self.documents, len(self.found.names)
        self.names = (*self.found.names, TARGET_SET)
        target_N = documents.of("target") | documents.of("target_heldout")
        self.group_N = np.where(target_N, target, self.found.domain_N)
        used_N = self.group_N >= 0
        pool_N = (documents.of("corpora") | documents.of("target")) & used_N
        counts = np.bincount(self.group_N[pool_N], minlength=len(self.names)).tolist()
        limits = [0 if config.heldout else heldout_count(count, config.split) for count in counts[:target]]
        limits.append(0 if config.target_heldout else heldout_count(counts[target], config.target_split))
        given_N = (documents.of("heldout") | documents.of("target_heldout")) & used_N
        self.heldout_N = given_N | self._first(pool_N, "heldout", limits)
        self.train_N = pool_N & ~self.heldout_N
        if counts[target] == 1 and not config.target_heldout:
            self.warnings.append("the target has one document: nothing of it is held out, so it cannot be evaluated")
        if (wanted := config.target_train_documents) is not None:
            left_N = self.train_N & target_N
            if left_N.sum() < wanted:
                self.warnings.append(
                    f"data.target_train_documents is {wanted} but only {left_N.sum()} are left beside the held-out ones"
                )
            self.train_N &= ~target_N | self._first(left_N, "target", wanted)

    def _make_tokenizer(self) -> Tokenizer:
        """Trained on an even sample of the training text, or loaded; saved at once."""
        corpora_N = self.documents.of("corpora")
        sample_N = self.train_N & corpora_N
        if (training := self.config.tokenizer.train) is not None:
            share = training.sample_bytes / max(1, int(self.documents.bytes_N[corpora_N].sum()))
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

    def _count_tokens(self) -> tuple[Chosen, NDArray[np.int64]]:
        """Tokens of training documents, each with the one that closes it, of as many as sizes and caps can need.

        Returns:
            Which documents of the domains were encoded, the first in the order of the choice `cap`; and their tokens.
        """
        options = self.config.domains
        limit = max(options.min_tokens, options.max_train_tokens or 0) * _BYTES_PER_TOKEN_AT_MOST
        training_N = self.train_N & self.documents.of("corpora")
        counted_N = self._first(training_N, "cap", limit, self.documents.bytes_N + 1)
        tokens_N = np.zeros(len(counted_N), np.int64)
        for batch in batches(self.documents.stream(counted_N), 256):
            encoded = encode_documents(self.tokenizer, [document for _, document in batch])
            tokens_N[[number for number, _ in batch]] = [len(tokens) + 1 for tokens, _ in encoded]
        return counted_N, tokens_N

    def _merge_small(self) -> None:
        """Domains with fewer than `min_tokens` training tokens named, dropped or merged, as the recipe says.

        Raises:
            DataError: there are some and `small` is `stop`, or what is left is still too small.
        """
        options, names = self.config.domains, self.found.names
        counted_N, tokens_N = self._count_tokens()
        tokens_D = np.bincount(self.group_N[counted_N], tokens_N[counted_N], len(names))
        small = {names[n]: int(tokens_D[n]) for n in np.flatnonzero(tokens_D < options.min_tokens)}
        if not small:
            return
        least = (
            f"fewer training tokens than data.domains.min_tokens, {options.min_tokens}: "
            f"{_listed([f'{name} ({count})' for name, count in small.items()], 50)}"
        )
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
        limit = max(1, min(64, _LOSS_DOCUMENTS // len(self.names)))
        texts: dict[str, list[str]] = {}
        for number, document in self.documents.stream(self._first(self.train_N | self.heldout_N, "loss", limit)):
            texts.setdefault(self.names[self.group_N[number]], []).append(document.text[:_LOSS_CHARACTERS])
        losses = {name: self.tokenizer.loss(texts[name]) for name in self.names if name in texts}
        worst = sorted((name for name in losses if losses[name].lost > LOST_ACCEPTED), key=lambda n: -losses[n].lost)
        if worst:
            shown = [
                f"{name}: {losses[name].given_back:.1%} of the bytes come back, "
                f"{losses[name].unknown:.1%} of the tokens are unknown"
                for name in worst
            ]
            said = f"the tokenizer loses text of {len(worst)} sets ({_listed(shown, 5, '; ')})"
            if losses[worst[0]].lost > LOST_REFUSED:
                raise DataError(
                    f"{said}, and over {LOST_REFUSED:.0%} is refused; use one that keeps the text: data.tokenizer: "
                    "{train: {}}, or a byte-level one"
                )
            self.warnings.append(f"{said}: bits per byte is not given for them")
        return losses

    def _cap(self) -> None:
        """Choose at random the documents that fill `max_train_tokens` of each larger domain."""
        if (cap := self.config.domains.max_train_tokens) is not None:
            counted_N, tokens_N = self._count_tokens()
            self.train_N &= ~self.documents.of("corpora") | self._first(counted_N, "cap", cap, tokens_N)

    def _refuse_leaks(self) -> None:
        """Refuse sets that must be apart and share a text."""
        numbers = [*np.flatnonzero(self.train_N).tolist(), *np.flatnonzero(self.heldout_N).tolist()]
        shared = len(numbers) - len({self.documents.digests[number] for number in numbers})
        if shared:
            raise DataError(f"sets that must be apart share documents: {shared} texts are used twice")

    # -- what is kept ---------------------------------------------------------------------------------------------

    def _tokenise(self, losses: Mapping[str, TextLoss]) -> dict[str, dict[str, TokenStore]]:
        """Write the token stores, `train` and `heldout`, by domain; those of the target as `TARGET_DOMAIN`."""
        labels, cap = (*self.found.names, TARGET_DOMAIN), self.config.domains.max_train_tokens
        lost = [
            label
            for label, name in zip(labels, self.names, strict=True)
            if name in losses and losses[name].lost > LOST_ACCEPTED
        ]
        limits = {} if cap is None else dict.fromkeys(self.found.names, cap)
        found: dict[str, dict[str, TokenStore]] = {"train": {}, "heldout": {}}
        for name, chosen_N in (("train", self.train_N), ("heldout", self.heldout_N)):
            documents = (
                replace(document, label=labels[self.group_N[number]])
                for number, document in self.documents.stream(chosen_N)
            )
            with ProgressBar(f"tokenise {name}", unit="bytes", enabled=self.progress) as counter:
                if chosen_N.any():
                    found[name] = tokenise_by_label(
                        documents, self.tokenizer, self.folder / name,
                        limits=limits if name == "train" else None,
                        lossy=lost if name == "heldout" else (),
                        progress=counter.update,
                    )  # fmt: skip
        if empty := [name for name in self.found.names if name not in found["train"]]:
            raise DataError(
                f"no example of {_listed(empty, 5)} fits into data.domains.max_train_tokens, {cap}; raise it"
            )
        without = [name for name in self.found.names if name not in found["heldout"]]
        if without:
            shown = _listed(without, 5)
            self.warnings.append(f"no held-out text for {len(without)} domains ({shown}): they are not evaluated")
        return found

    def _described(self, stores: dict[str, TokenStore]) -> dict[str, Any]:
        """What embedding tells of the domains: centroids of a sample, then histogram, basis and facts.

        Args:
            stores: Training tokens by group.
        Returns:
            Parts of the manifest: `domains`, their names; `target_histogram_D`, None without a target; `basis_ND`, None
            where none is asked for; `facts`, for each domain its name, typical documents and neighbours; `reading`,
            reports of the auxiliary sets of a basis.
        """
        config, found = self.config.domains, self.found
        embedding, target = config.embedder, len(found.names)
        names = [*found.names, *([TARGET_DOMAIN] if config.include_target else [])]
        count = int(np.clip(embedding.sample_documents // len(names), 4, _SAMPLE_PER_DOMAIN))
        chosen_N = self._first(self.train_N & (self.group_N < len(names)), "centroids", count)
        documents = [
            replace(document, text=document.text[: embedding.max_chars])
            for _, document in self.documents.stream(chosen_N)
        ]
        texts = [document.text for document in documents]
        embedder = make_embedder(embedding, texts, self.config.seed) if found.embedder is None else found.embedder
        rows_NE = np.concatenate([embedder.embed(batch) for batch in batches(texts, embedding.batch_documents)])
        centroids_DE = domain_means(rows_NE, self.group_N[chosen_N], len(names))
        if found.clusters is not None:
            centroids_DE[:target] = found.clusters.centroids_CE
        typical = typical_documents(rows_NE, self.group_N[chosen_N], centroids_DE, documents, _TYPICAL)
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
        target_N = place(document for _, document in self.documents.stream(self.train_N & (self.group_N == target)))
        if options is not None and options.of == "sets":
            basis_ND = basis_from_sets([place(read(corpus)) for corpus in options.sets], len(names), options.smoothing)
        elif options is not None and options.of == "groups":
            sizes_D = np.array([float(stores[name].bytes) for name in names])
            basis_ND = basis_from_groups(centroids_DE, sizes_D, options.count or 0, self.config.seed, options.smoothing)
        elif options is not None:
            basis_ND = basis_from_shards(target_N, options.count or 0, len(names), options.smoothing)
        shares_D = histogram(target_N, len(names), config.histogram_smoothing) if len(target_N) else None
        return {
            "domains": names,
            "target_histogram_D": None if shares_D is None else shares_D.tolist(),
            "basis_ND": None if basis_ND is None else basis_ND.tolist(),
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


def _listed(texts: list[str], count: int, between: str = ", ") -> str:
    """The first of some texts, and how many more there are."""
    return between.join(texts[:count]) + (f"{between}and {len(texts) - count} more" if len(texts) > count else "")
