"""Text in, prepared data out: read, de-duplicate, find domains, split, tokenise, check for leaks.

Preparation works in a hidden sibling of the folder (`.data.preparing` beside `data`) and renames it when everything is
on disk and checked, so a prepared folder is always whole. An interrupted preparation is taken up where it was: what has
been read is not read again, finished token stores stay, half-written ones continue.

A folder that is prepared already and whose configuration and inputs are unchanged is reused. If either changed, nothing
is touched: `prepare` raises and says what changed, because other runs may train on the folder. With `rebuild=True` the
new data is made beside the old and takes its place only when it is complete.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from weftlm.artifact import Artifact, locked
from weftlm.corpora.config import CorpusConfig
from weftlm.corpora.dedup import SeenDocuments, check_no_leak
from weftlm.corpora.reading import ReadingReport, read_documents
from weftlm.corpora.source import Document
from weftlm.corpora.store import TokenStore, open_stores
from weftlm.corpora.tokenise import encode_documents, tokenise_by_label
from weftlm.corpora.tokens import TextLoss, Tokenizer, make_tokenizer
from weftlm.domains.split import ALL, Budget, HeldoutPlan, Lowest, SplitConfig, position
from weftlm.errors import DataError
from weftlm.files import SEAL, check_sealed, read_object, remove, room, seal, sweep, write_object
from weftlm.pipeline.data_config import OTHER_DOMAIN, TARGET_DOMAIN, BasisConfig, DataConfig, DomainsConfig
from weftlm.pipeline.discovery import Described, Discovered, by_clusters, by_label, describe, merged
from weftlm.pipeline.identity import MANIFEST, SETS, prepared_artifact
from weftlm.pipeline.prepared import LOST_ACCEPTED, TARGET_SET, PreparedData, assemble
from weftlm.pipeline.spool import NO_LABEL, Spool, SpoolWriter
from weftlm.progress import progress as show_progress

__all__ = ["BasisConfig", "DataConfig", "DomainsConfig", "PreparedData", "prepare"]

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
    sweep(folder.parent)
    if not _sibling(folder, "old").exists() and (found := _reuse(artifact, rebuild)) is not None:
        return found
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _alone(folder):
        _finish_swap(folder)
        if (found := _reuse(artifact, rebuild)) is not None:
            return found
        if folder.exists() and not artifact.record.exists() and any(folder.iterdir()):
            raise DataError(f"{folder} holds files but no prepared data; choose another folder, or empty it")
        work = _sibling(folder, "preparing")
        with room(folder):
            _Preparation(config, Artifact(work / MANIFEST, artifact.identity, artifact.cure), progress).run()
        _publish(work, folder)
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
        changed = artifact.changed()
        if changed is None:
            return PreparedData.load(folder)
    except DataError:
        if rebuild:
            return None
        raise
    if rebuild:
        log.info("%s is prepared again: %s", folder, changed)
        return None
    raise DataError(
        f"{folder} was prepared from something else ({changed}). Prepare again with rebuild (weftlm prepare "
        f"--rebuild), which replaces it, or choose another folder"
    )


def _sibling(folder: Path, what: str) -> Path:
    return folder.with_name(f".{folder.name}.{what}")


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keep a second process from preparing the same folder; it waits, then finds the work done."""
    told = "%s is preparing %s; waiting for it"
    with locked(
        _sibling(folder, "lock"), DataError, patience_s=math.inf, waiting=lambda who: log.warning(told, who, folder)
    ):
        yield


def _publish(work: Path, folder: Path) -> None:
    """Put the finished folder in place; an interruption in between is mended by `_finish_swap`."""
    old = _sibling(folder, "old")
    if folder.exists():
        folder.rename(old)
    work.rename(folder)
    remove(old)


def _finish_swap(folder: Path) -> None:
    """After an interrupted replacement: the new folder goes in if it is whole, else the old one comes back."""
    old, work = _sibling(folder, "old"), _sibling(folder, "preparing")
    if not old.exists():
        return
    if not folder.exists():
        (work if (work / MANIFEST).exists() else old).rename(folder)
    remove(old)


class _Preparation:
    """One preparation, step by step; every step leaves its result on disk and skips itself where that exists.

    Attributes:
        spools: Documents of each set.
        domains: Domain of each spooled document.
        split: What is held out of the corpora.
        target_split: What is held out of the target.
        target_below: Position below which the target's other documents are used.
        tokenizer: The tokenizer.
        caps: Position, by domain, below which the documents of a capped domain are used.
    """

    spools: dict[str, Spool]
    domains: Discovered
    split: HeldoutPlan
    target_split: HeldoutPlan
    target_below: int
    tokenizer: Tokenizer

    def __init__(self, config: DataConfig, artifact: Artifact, progress: bool) -> None:
        self.config = config
        self.artifact = artifact
        self.work = artifact.record.parent
        self.scratch = self.work / "scratch"
        self.progress = progress
        self.warnings: list[str] = []
        self.caps: dict[int, int] = {}

    def run(self) -> None:
        self._start()
        if self.artifact.record.exists():
            remove(self.scratch)
            return
        facts = self._read()
        self.spools = {name: Spool(self.scratch / name) for name in SETS}
        self._need_documents()
        self.domains, known = self._discover()
        self._split()
        self.tokenizer = self._make_tokenizer()
        self._merge_small()
        losses = self._losses()
        self.caps = self._caps()
        stores = self._tokenise()
        check_no_leak(
            {
                "the target's held-out documents": self._target(held=True),
                "the target": self._target(held=False),
                "held-out documents": (document for document, _ in self._heldout()),
                "training documents": (document for document, _ in self._train()),
            },
            self.scratch,
        )
        self._warn_of_documents(facts["counts"])
        self._finish(facts, known, stores, losses)

    def _start(self) -> None:
        """Take up an interrupted preparation of the very same thing, or begin with an empty folder."""
        if self.work.exists() and not self._is_sound():
            remove(self.work)
        sweep(self.work)
        self.scratch.mkdir(parents=True, exist_ok=True)
        if not (self.artifact.resume() or self.artifact.record.exists()):
            self.artifact.begin()

    def _is_sound(self) -> bool:
        """Whether what an interrupted preparation finished is as it was written; its stores are checked at the end."""
        again = "the preparation begins again"
        try:
            if not (self.artifact.resume() or self.artifact.record.exists()) or self.artifact.changed() is not None:
                return False
            for folder in (*(self.scratch / name for name in (*SETS, "domains")), self.work / "tokenizer"):
                check_sealed(folder, again)
            read_object(self.scratch / "read.json", again)
        except DataError as error:
            log.warning("%s", error)
            return False
        return True

    def _read(self) -> dict[str, Any]:
        """Read every input once into spools, each text kept only in the first set that has it."""
        path = self.scratch / "read.json"
        facts = read_object(path, f"delete {self.work}")
        if facts is not None:
            log.info("continuing the interrupted preparation in %s", self.work)
            return facts
        reading = []
        counts: dict[str, dict[str, Counter[str]]] = {name: {} for name in SETS}
        with (
            SeenDocuments(self.scratch) as seen,
            show_progress("read", unit="documents", enabled=self.progress) as counter,
        ):
            for name in SETS:
                with SpoolWriter(self.scratch / name) as writer:
                    for corpus in getattr(self.config, name):
                        report = ReadingReport()
                        for document in read_documents(self._as_domains(corpus, name), report):
                            owner = seen.add(document, name)
                            fate = "kept" if owner is None else "in_target" if "target" in owner else "duplicates"
                            tally = counts[name].setdefault(self._row(document.label), Counter())
                            tally["read"] += 1
                            tally["duplicates" if owner == name else fate] += 1
                            if owner is None:
                                writer.add(document)
                            counter.advance()
                        for label, faults in report.faults_by_label.items():
                            tally = counts[name].setdefault(self._row(label), Counter())
                            tally.update(read=faults, faulty=faults)
                        reading.append({"set": name, "input": corpus.name, **report.to_json()})
            facts = {"reading": reading, "duplicates": seen.to_json(), "counts": counts}
        for name in SETS:
            seal(self.scratch / name)
        write_object(path, facts, sync=True)
        return facts

    def _row(self, label: str | None) -> str:
        """The row of the table of documents that one is counted in."""
        if self.config.domains.by == "clusters":
            return "all corpora"
        return label or _NO_LABEL

    def _warn_of_documents(self, counts: dict[str, dict[str, dict[str, int]]]) -> None:
        """Warn of every domain that loses more than a fifth of its documents, or all of them."""
        for name, tally in sorted(counts["corpora"].items()):
            total, kept = tally["read"], tally.get("kept", 0)
            if total - kept <= _SHOWN_LOSS * total:
                continue
            why = ", ".join(
                f"{tally[key]} {words}"
                for key, words in (
                    ("in_target", "in the target too"),
                    ("duplicates", "duplicates or held-out text"),
                    ("faulty", "faulty"),
                )
                if tally.get(key)
            )
            what = "disappears" if kept == 0 else f"loses {(total - kept) / total:.0%} of its documents"
            of = "text without a label" if name == _NO_LABEL else f"domain {name!r}"
            self.warnings.append(f"{of} {what}: {total} read, {why}, {kept} kept")

    def _as_domains(self, corpus: CorpusConfig, name: str) -> CorpusConfig:
        if self.config.domains.by == "file" and name in ("corpora", "heldout"):
            return corpus.model_copy(update={"label": None, "label_field": None, "label_from": "file"})
        return corpus

    def _need_documents(self) -> None:
        wanted = {
            "corpora": True,
            "target": bool(self.config.target),
            "heldout": bool(self.config.heldout),
            "target_heldout": bool(self.config.target_heldout),
        }
        for name, needed in wanted.items():
            if needed and len(self.spools[name]) == 0:
                raise DataError(
                    f"data.{name} holds no document that is not in another set already; check the inputs (a text that "
                    f"several sets hold stays in the first of {', '.join(SETS)})"
                )

    def _discover(self) -> tuple[Discovered, Any]:
        folder = self.scratch / "domains"
        folder.mkdir(exist_ok=True)
        known = None
        if self.config.domains.by != "clusters":
            found = by_label(self.spools["corpora"], self.spools["heldout"], folder)
        else:
            total = len(self.spools["corpora"])
            with show_progress("cluster", total=total, unit="documents", enabled=self.progress) as counter:
                found, embedder, clusters = by_clusters(
                    self.spools["corpora"], self.spools["heldout"], self.config, folder, counter.advance
                )
            known = (embedder, clusters)
        seal(folder)
        return found, known

    def _split(self) -> None:
        config, seed = self.config, self.config.seed
        none = SplitConfig(fraction=0.0)
        self.split = HeldoutPlan(none if config.heldout else config.split, seed)
        for (digest, _), number in zip(self.spools["corpora"].digests(), self.domains.train, strict=True):
            if number != NO_LABEL:
                self.split.observe(self.domains.names[number], digest)
        self.target_split = HeldoutPlan(none if config.target_heldout else config.target_split, seed)
        for digest, _ in self.spools["target"].digests():
            self.target_split.observe("target", digest)
        if len(self.spools["target"]) == 1 and not config.target_heldout:
            self.warnings.append("the target has one document: nothing of it is held out, so it cannot be evaluated")
        self.target_below = ALL
        wanted = config.target_train_documents
        if wanted is not None:
            lowest = Lowest(wanted)
            for digest, _ in self.spools["target"].digests():
                if not self.target_split.is_heldout("target", digest):
                    lowest.add(position(digest, seed, "target"))
            if lowest.seen < wanted:
                self.warnings.append(
                    f"data.target_train_documents is {wanted} but only {lowest.seen} are left beside the held-out ones"
                )
            self.target_below = lowest.threshold()

    def _train(self, caps: Mapping[int, int] | None = None) -> Iterator[tuple[Document, int]]:
        """Training documents with their domain's number; within `caps`, or those chosen."""
        caps = self.caps if caps is None else caps
        for document, number in zip(self.spools["corpora"], self.domains.train, strict=True):
            digest = document.digest()
            if number == NO_LABEL or self.split.is_heldout(self.domains.names[number], digest):
                continue
            if number in caps and position(digest, self.config.seed, "cap") >= caps[number]:
                continue
            yield document, number

    def _heldout(self) -> Iterator[tuple[Document, int]]:
        if self.config.heldout:
            pairs = zip(self.spools["heldout"], self.domains.heldout, strict=True)
            yield from (pair for pair in pairs if pair[1] != NO_LABEL)
            return
        for document, number in zip(self.spools["corpora"], self.domains.train, strict=True):
            if number != NO_LABEL and self.split.is_heldout(self.domains.names[number], document.digest()):
                yield document, number

    def _target(self, held: bool) -> Iterator[Document]:
        if held and self.config.target_heldout:
            yield from self.spools["target_heldout"]
            return
        for document in self.spools["target"]:
            digest = document.digest()
            if self.target_split.is_heldout("target", digest) != held:
                continue
            if held or position(digest, self.config.seed, "target") < self.target_below:
                yield document

    def _make_tokenizer(self) -> Tokenizer:
        """Trained on an even sample of the training text, or loaded; saved at once."""
        folder = self.work / "tokenizer"
        if folder.is_dir():
            return Tokenizer.load(folder)
        training = self.config.tokenizer.train
        share = 1.0
        if training is not None:
            total = sum(size for _, size in self.spools["corpora"].digests())
            share = min(1.0, training.sample_bytes / max(total, 1))
        below = ALL if share == 1.0 else int(share * ALL)
        texts = (
            document.text
            for document, _ in self._train()
            if position(document.digest(), self.config.seed, "tokenizer") < below
        )
        with show_progress("tokenizer", unit="documents", enabled=self.progress) as counter:
            tokenizer = make_tokenizer(self.config.tokenizer, _counted(texts, counter.advance))
        temporary = self.work / ".tokenizer"
        remove(temporary)
        tokenizer.save(temporary)
        seal(temporary)
        temporary.rename(folder)
        return Tokenizer.load(folder)

    def _merge_small(self) -> None:
        """Domains with fewer than `min_tokens` training tokens named, dropped or merged, as the recipe says.

        Only domains of so little text that they may be too small are encoded.

        Raises:
            DataError: there are some and `small` is `stop`, or what is left is still too small.
        """
        options = self.config.domains
        sizes: Counter[int] = Counter()
        for (digest, size), number in zip(self.spools["corpora"].digests(), self.domains.train, strict=True):
            if not self.split.is_heldout(self.domains.names[number], digest):
                sizes[number] += size
        few = {n for n in range(len(self.domains.names)) if sizes[n] < options.min_tokens * _BYTES_PER_TOKEN_AT_MOST}
        tokens: Counter[int] = Counter(dict.fromkeys(few, 0))
        for batch in _batches((pair for pair in self._train() if pair[1] in few), 256):
            encoded = encode_documents(self.tokenizer, [document for document, _ in batch])
            for (_, number), (tokens_N, _) in zip(batch, encoded, strict=True):
                tokens[number] += len(tokens_N) + 1
        small = {self.domains.names[n]: tokens[n] for n in sorted(few) if tokens[n] < options.min_tokens}
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
        together = sum(small.values()) + (0 if into in small or into not in self.domains.names else options.min_tokens)
        nothing_left = len(small) == len(self.domains.names) if into is None else together < options.min_tokens
        if nothing_left:
            raise DataError(f"{len(small)} domains have {least}; together they are too small as well: give more text")
        what = "dropped" if into is None else f"put into the domain {into!r}"
        self.warnings.append(f"{len(small)} domains are {what}, for they have {least}")
        self.domains = merged(self.domains, small, into, self.scratch / "domains")
        self._split()

    def _losses(self) -> dict[str, TextLoss]:
        """What the tokenizer loses of each domain's text and of the target's, on a sample of bounded size.

        Raises:
            DataError: it loses so much of one that training on the tokens would not be training on the text.
        """
        names = (*self.domains.names, TARGET_SET)
        count = max(1, min(64, _LOSS_DOCUMENTS // len(names)))
        seed = self.config.seed

        def documents() -> Iterator[tuple[Document, int]]:
            yield from self._train()
            yield from self._heldout()
            for held in (False, True):
                for document in self._target(held):
                    yield document, len(names) - 1

        lowest = [Lowest(count) for _ in names]
        for document, number in documents():
            lowest[number].add(position(document.digest(), seed, "loss"))
        thresholds = [kept.threshold() for kept in lowest]
        texts: dict[str, list[str]] = {name: [] for name in names}
        for document, number in documents():
            if position(document.digest(), seed, "loss") < thresholds[number]:
                texts[names[number]].append(document.text[:_LOSS_CHARACTERS])
        losses = {name: self.tokenizer.loss(sample) for name, sample in texts.items() if sample}
        worst = sorted((name for name in losses if losses[name].lost > LOST_ACCEPTED), key=lambda n: -losses[n].lost)
        shown = "; ".join(
            f"{name}: {losses[name].given_back_share:.1%} of the bytes come back, "
            f"{losses[name].unknown_share:.1%} of the tokens are unknown"
            for name in worst[:5]
        ) + (f"; and {len(worst) - 5} more" if len(worst) > 5 else "")
        if worst and losses[worst[0]].lost > LOST_REFUSED:
            raise DataError(
                f"the tokenizer loses text of {len(worst)} sets ({shown}), and over {LOST_REFUSED:.0%} is refused; use "
                f"one that keeps the text: data.tokenizer: {{train: {{}}}}, or a byte-level one"
            )
        if worst:
            self.warnings.append(
                f"the tokenizer loses text of {len(worst)} sets ({shown}): bits per byte is not given for them"
            )
        return losses

    def _caps(self) -> dict[int, int]:
        """Choose at random the documents that fill `max_train_tokens` of each larger domain."""
        cap = self.config.domains.max_train_tokens
        if cap is None:
            return {}
        seed = self.config.seed
        rough: dict[int, Budget] = {}
        for (digest, size), number in zip(self.spools["corpora"].digests(), self.domains.train, strict=True):
            if number != NO_LABEL and not self.split.is_heldout(self.domains.names[number], digest):
                budget = rough.setdefault(number, Budget(cap * _BYTES_PER_TOKEN_AT_MOST))
                budget.add(position(digest, seed, "cap"), size + 1)
        drafted = {number: budget.threshold() for number, budget in rough.items() if budget.total > cap}
        exact = {number: Budget(cap) for number in drafted}
        candidates = (pair for pair in self._train(drafted) if pair[1] in drafted)
        for batch in _batches(candidates, 256):
            encoded = encode_documents(self.tokenizer, [document for document, _ in batch])
            for (document, number), (tokens_N, _) in zip(batch, encoded, strict=True):
                exact[number].add(position(document.digest(), seed, "cap"), len(tokens_N) + 1)
        return {number: min(drafted[number], budget.threshold()) for number, budget in exact.items()}

    def _tokenise(self) -> dict[str, dict[str, TokenStore]]:
        """Write the token stores; finished ones are opened, half-written ones continued."""

        def labelled(pairs: Iterable[tuple[Document, int]]) -> Iterator[Document]:
            for document, number in pairs:
                yield replace(document, label=self.domains.names[number])

        def target() -> Iterator[Document]:
            for held, label in ((False, "train"), (True, "heldout")):
                for document in self._target(held):
                    yield replace(document, label=label)

        with show_progress("tokenise", unit="bytes", enabled=self.progress) as counter:
            finished = 0

            def stores(name: str, documents: Callable[[], Iterator[Document]]) -> dict[str, TokenStore]:
                nonlocal finished
                path = self.work / name
                if not path.exists() and next(documents(), None) is None:
                    return {}
                if path.exists():
                    found = open_stores(path, verify=False)
                else:
                    found = tokenise_by_label(
                        documents(), self.tokenizer, path, progress=lambda size: counter.update(finished + size)
                    )
                finished += sum(store.bytes for store in found.values())
                return found

            return {
                "train": stores("train", lambda: labelled(self._train())),
                "heldout": stores("heldout", lambda: labelled(self._heldout())),
                "target": stores("target", target),
            }

    def _describe(self, known: Any, stores: dict[str, dict[str, TokenStore]]) -> tuple[tuple[str, ...], Described]:
        names = self.domains.names
        include = self.config.domains.include_target
        sizes = [float(stores["train"][name].bytes) for name in names]
        if include:
            names = (*names, TARGET_DOMAIN)
            sizes.append(float(stores["target"]["train"].bytes))

        def documents() -> Iterator[tuple[Document, int]]:
            yield from self._train()
            if include:
                for document in self._target(held=False):
                    yield document, len(names) - 1

        def target() -> Iterator[Document]:
            return self._target(held=False)

        has_target = "train" in stores["target"]
        return names, describe(names, documents, np.array(sizes), target if has_target else None, self.config, known)

    def _finish(
        self, facts: dict[str, Any], known: Any, stores: dict[str, dict[str, TokenStore]], losses: dict[str, TextLoss]
    ) -> None:
        names, described = self._describe(known, stores)
        without = [name for name in self.domains.names if name not in stores["heldout"]]
        if without:
            shown = ", ".join(without[:5]) + (f" and {len(without) - 5} more" if len(without) > 5 else "")
            self.warnings.append(f"no held-out text for {len(without)} domains ({shown}): they are not evaluated")
        manifest = {
            "tokenizer": self.tokenizer.fingerprint,
            "text_loss": {name: asdict(loss) for name, loss in losses.items()},
            "counts": facts["counts"],
            "domains": list(names),
            "max_train_tokens": self.config.domains.max_train_tokens,
            "target_histogram_D": _plain(described.target_histogram_D),
            "basis_ND": _plain(described.basis_ND),
            "embedder": described.embedder,
            "facts": described.facts,
            "reading": facts["reading"] + described.reading,
            "duplicates": facts["duplicates"],
            "warnings": list(dict.fromkeys(self.warnings)),
        }
        for line in manifest["warnings"]:
            log.warning("%s", line)
        manifest["fingerprint"] = assemble(self.work, manifest).fingerprint
        self.artifact.finish(manifest, [f"tokenizer/{SEAL}"], nan=True)
        remove(self.scratch)


def _counted(texts: Iterator[str], advance: Callable[[], None]) -> Iterator[str]:
    for text in texts:
        advance()
        yield text


def _batches(pairs: Iterator[tuple[Document, int]], count: int) -> Iterator[list[tuple[Document, int]]]:
    while batch := list(islice(pairs, count)):
        yield batch


def _plain(values: NDArray[np.float64] | None) -> Any:
    return None if values is None else values.tolist()
