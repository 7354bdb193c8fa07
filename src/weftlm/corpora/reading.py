"""Documents out of files, Hugging Face datasets and the built-in corpora, in a fixed order and in constant memory."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from weftlm.corpora.builtin import builtin_documents, builtin_fingerprint, builtin_names
from weftlm.corpora.config import CorpusConfig, Format
from weftlm.corpora.formats import (
    DOCUMENT_BYTES,
    FORMATS,
    Cursor,
    Fail,
    Reason,
    Record,
    guarded,
    is_unicode,
    read_file,
    split_suffix,
)
from weftlm.corpora.paths import corpus_files, dataset_files
from weftlm.corpora.source import Document
from weftlm.errors import ConfigError, DataError, WeftError, reason
from weftlm.files import checksum
from weftlm.places import locate

__all__ = ["CorpusConfig", "ReadingReport", "corpus_fingerprint", "known_labels", "read_documents"]


KEPT_EXAMPLES = 5
"""Places remembered per reason."""


@dataclasses.dataclass
class ReadingReport:
    """Counts of what was read; one report may serve several inputs.

    Attributes:
        documents: Documents handed on.
        bytes: UTF-8 bytes of their text.
        files: Files opened.
        problems: Faulty records (or files) by reason.
        examples: The first places per reason, as `path:line: what is wrong`.
        faults_by_label: Faulty records (or files) by label; "" where a record has none.
        ignored_files: Entries of a folder that are not read: other suffixes, links that leave the folder, pipes.
        ignored_examples: The first of them.
        stopped_at: Places where `max_documents` or `max_bytes` ended the reading.
    """

    documents: int = 0
    bytes: int = 0
    files: int = 0
    problems: Counter[str] = dataclasses.field(default_factory=Counter)
    examples: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    faults_by_label: Counter[str] = dataclasses.field(default_factory=Counter)
    ignored_files: int = 0
    ignored_examples: list[str] = dataclasses.field(default_factory=list)
    stopped_at: list[str] = dataclasses.field(default_factory=list)

    def fail(self, reason: Reason, place: str, detail: str, *, stop: bool, label: str | None = None) -> None:
        """Count a fault and remember its place.

        Args:
            reason: Kind of fault.
            place: Place of the record.
            detail: What is wrong.
            stop: Whether to raise instead of going on.
            label: Label of the record, where it is known.
        Raises:
            DataError: `stop` is set; the message holds the place.
        """
        self.problems[reason] += 1
        self.faults_by_label[label or ""] += 1
        examples = self.examples.setdefault(reason, [])
        message = f"{place}: {detail}"
        if len(examples) < KEPT_EXAMPLES:
            examples.append(message)
        if stop:
            raise DataError(f"{message}; repair it, or set on_error: skip to leave such records out")

    def ignore(self, path: str) -> None:
        """Count an entry of a folder that is not read."""
        self.ignored_files += 1
        if len(self.ignored_examples) < KEPT_EXAMPLES:
            self.ignored_examples.append(path)

    def to_json(self) -> dict[str, Any]:
        """Everything but the counts by label, as JSON."""
        return {name: value for name, value in vars(self).items() if name != "faults_by_label"}


def read_documents(config: CorpusConfig, report: ReadingReport) -> Iterator[Document]:
    """The documents of one input, in the same order every time.

    Args:
        config: Input to read.
        report: Counts what is read and every fault; fills up as the iterator advances.
    Raises:
        DataError: At once, a path that matches nothing; while iterating, a fault under `on_error: stop`, naming file
            and line, or a dataset that cannot be opened.
        ConfigError: At once, an unknown built-in corpus, or a file of unknown format.
    """
    if config.builtin is not None:
        more = () if config.max_bytes is None else (config.max_bytes,)
        return _builtin(config, [builtin_documents(name, *more) for name in _builtin_selection(config)], report)
    if config.dataset is not None:
        rows = _dataset_rows(config, _fault(config, report, config.label))
        return _limited(config, _documents(config, rows, report, config.label), report)
    return _limited(config, _file_documents(config, _files(config, report), report), report)


def corpus_fingerprint(config: CorpusConfig) -> str:
    """A hash that changes when the files of an input do, without reading them: names, sizes and times.

    Nothing is known of a dataset on the hub beside its settings: fix a `revision` to have it name the contents.

    Raises:
        DataError: A path that matches nothing.
    """
    facts: list[Any] = []
    if config.builtin is not None:
        facts.append(builtin_fingerprint(_builtin_selection(config)))
    elif config.path is not None:
        facts += map(_state_of, (path for path, _ in _files(config, ReadingReport())))
    elif Path(str(config.dataset)).is_dir():
        facts += map(_state_of, dataset_files(Path(str(config.dataset))))
    return checksum(facts)


def known_labels(config: CorpusConfig) -> set[str] | None:
    """The labels that an input's documents will carry; None where only reading them tells.

    Raises:
        DataError: A path that matches nothing.
    """
    if config.label is not None:
        return {config.label}
    if config.builtin is not None:
        return set(_builtin_selection(config))
    if config.label_from is not None:
        return {str(_label_of(path, config)) for path, _ in _files(config, ReadingReport())}
    return None


def _state_of(path: Path) -> list[Any]:
    try:
        found = path.stat()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {reason(error)}") from error
    return [str(path), found.st_size, found.st_mtime_ns]


def _fault(config: CorpusConfig, report: ReadingReport, label: str | None) -> Fail:
    return partial(report.fail, stop=config.on_error == "stop", label=label)


def _limited(config: CorpusConfig, documents: Iterator[Document], report: ReadingReport) -> Iterator[Document]:
    """Count what passes and stop at the limits."""
    count = size = 0
    for document in documents:
        length = len(document.text.encode("utf-8"))
        if config.max_bytes is not None and size + length > config.max_bytes:
            report.stopped_at.append(f"{document.origin}: max_bytes {config.max_bytes}")
            return
        count, size = count + 1, size + length
        report.documents += 1
        report.bytes += length
        yield document
        if count == config.max_documents:
            report.stopped_at.append(f"{document.origin}: max_documents {config.max_documents}")
            return


def _builtin_selection(config: CorpusConfig) -> tuple[str, ...]:
    assert config.builtin is not None
    return builtin_names() if config.builtin == "all" else config.builtin


def _builtin(config: CorpusConfig, streams: list[Iterator[Document]], report: ReadingReport) -> Iterator[Document]:
    for stream in streams:
        if config.label is not None:
            stream = (dataclasses.replace(document, label=config.label) for document in stream)
        yield from _limited(config, stream, report)


def _documents(
    config: CorpusConfig, records: Iterator[tuple[str, Record]], report: ReadingReport, label: str | None
) -> Iterator[Document]:
    """Documents out of records: the label found, the text checked."""
    for place, record in records:
        label_here = label
        if config.label_field is not None:
            assert not isinstance(record, str)
            value = _at(record, config.label_field)
            if isinstance(value, int) and not isinstance(value, bool):
                value = str(value)
            if not isinstance(value, str) or not value or not is_unicode(value):
                shown = "nothing" if value is None else f"{value!r:.60}"
                detail = f"field {config.label_field!r} holds {shown}; a label must be text or a whole number"
                _fault(config, report, label)("missing_label", place, detail)
                continue
            label_here = value
        texts: list[str] = []
        for field in filter(None, (config.prompt_field, config.text_field)):
            text = _text(record, field, place, _fault(config, report, label_here))
            if text is None:
                break
            texts.append(text)
        else:
            yield Document("".join(texts), place, label_here, len(texts[0]) if config.prompt_field else None)


def _text(record: Record, field: str, place: str, fail: Fail) -> str | None:
    """The text in a field of a record, or the record itself if it is text; None where a fault was reported."""
    text = record if isinstance(record, str) else _at(record, field)
    if isinstance(text, bytes):
        text = text.decode("utf-8", errors="surrogateescape")
    if text is None:
        assert not isinstance(record, str)
        known = ", ".join(map(str, list(record)[:10])) or "none"
        fail("missing_field", place, f"field {field!r} is missing; fields: {known}")
    elif not isinstance(text, str):
        fail("not_text", place, f"field {field!r} is of type {type(text).__name__}, not text")
    elif not text or text.isspace():
        fail("empty", place, "the document is empty")
    elif not is_unicode(text):
        fail("undecodable", place, f"field {field!r} holds bytes that are not UTF-8, or half a surrogate pair")
    elif len(text) > DOCUMENT_BYTES:
        fail("too_large", place, f"a document may hold {DOCUMENT_BYTES >> 20} MiB; split it")
    else:
        return text
    return None


def _at(record: Mapping[str, Any], field: str) -> Any:
    """The value of a field, which may be a dotted path unless a key of that very name exists; None if absent."""
    if field in record:
        return record[field]
    here: Any = record
    for part in field.split("."):
        if not isinstance(here, Mapping):
            return None
        here = here.get(part)
    return here


def _file_documents(
    config: CorpusConfig, files: list[tuple[Path, Format]], report: ReadingReport
) -> Iterator[Document]:
    fields = tuple(filter(None, (config.text_field, config.prompt_field, config.label_field)))
    for path, kind in files:
        if kind in ("text", "code") and (field := config.prompt_field or config.label_field) is not None:
            raise ConfigError(
                f"{path} is a text file and has no field {field!r}; give JSON Lines, or label or label_from for the "
                f"domain"
            )
        report.files += 1
        label = config.label if config.label is not None else _label_of(path, config)
        paragraphs = kind == "text" and config.split_documents == "blank_lines"
        records = read_file(path, kind, _fault(config, report, label), fields, paragraphs=paragraphs)
        yield from _documents(config, records, report, label)


def _label_of(path: Path, config: CorpusConfig) -> str | None:
    if config.label_from == "folder":
        return path.absolute().parent.name
    suffixes = "".join(split_suffix(path))
    return path.name[: len(path.name) - len(suffixes)] if config.label_from == "file" else None


def _files(config: CorpusConfig, report: ReadingReport) -> list[tuple[Path, Format]]:
    """The files of an input with their formats, sorted by path.

    Raises:
        DataError: Nothing matches.
        ConfigError: The suffix of a file that was asked for is not known.
    """
    assert config.path is not None
    found, searched = corpus_files(config.path, report.ignore)
    if searched and _is_saved_dataset(Path(config.path).expanduser()):
        raise DataError(f"{config.path} is a data set written by save_to_disk; give it as dataset, not path")
    result: list[tuple[Path, Format]] = []
    for path in found:
        kind = _format(path, config, searched=searched)
        if kind is not None:
            result.append((path, kind))
        elif searched:
            report.ignore(str(path))
        else:
            wanted = "" if config.suffixes is None else f" is none of {' '.join(config.suffixes)}; it"
            raise ConfigError(
                f"the suffix of {path}{wanted} does not tell its format; set format: jsonl, csv, text, code or parquet "
                f"(weights, pickles and arrays are not read: write their text as JSON Lines first)"
            )
    if not result:
        wanted = f"suffix {' '.join(config.suffixes)}" if config.suffixes else f"format {config.format}"
        left = ", such as ".join([f"{report.ignored_files} left out", *report.ignored_examples[:1]])
        raise DataError(
            f"folder {config.path} holds no file of {wanted} ({left}); check the path, or set format and suffixes"
        )
    return result


def _format(path: Path, config: CorpusConfig, *, searched: bool) -> Format | None:
    """How a file is to be read; None where its suffix is not one of those wanted."""
    suffix, compression = split_suffix(path)
    if config.suffixes is not None and not {suffix, suffix + compression} & set(config.suffixes):
        return None
    by_suffix = FORMATS.get(suffix)
    if by_suffix == "parquet" and compression:
        by_suffix = None
    if config.format == "auto":
        return by_suffix if by_suffix is not None or config.suffixes is None else "text"
    if config.suffixes is not None or not searched:
        return config.format
    return config.format if by_suffix == config.format else None


def _is_saved_dataset(folder: Path) -> bool:
    """Whether `save_to_disk` of the `datasets` library wrote a folder."""
    marks = (("state.json", "dataset_info.json"), ("dataset_dict.json",))
    return any(all((folder / name).is_file() for name in names) for names in marks)


def _dataset_rows(config: CorpusConfig, fail: Fail) -> Iterator[tuple[str, Record]]:
    """Rows of a Hugging Face dataset; class labels are given by name.

    Raises:
        DataError: It cannot be opened.
    """
    import datasets  # noqa: PLC0415  (half a second, and most inputs are files)

    cursor = Cursor(str(config.dataset), 0, rows=True)
    loaded = _open_dataset(config)
    features = loaded.features or {}
    feature = None if config.label_field is None else _at(features, config.label_field)
    names = feature.names if isinstance(feature, datasets.ClassLabel) else None
    asked = filter(None, (config.text_field, config.prompt_field, config.label_field))
    wanted = {part for whole in asked for part in (whole, whole.split(".")[0])}
    if wanted & set(features):
        loaded = loaded.select_columns([each for each in features if each in wanted])

    def rows() -> Iterator[tuple[str, Record]]:
        for record in loaded:
            if names is not None:
                number = _at(record, str(config.label_field))
                known = isinstance(number, int) and 0 <= number < len(names)
                record = {**record, str(config.label_field): names[number] if known else None}
            yield str(cursor), record
            cursor.number += 1

    yield from guarded(rows(), cursor, fail)


def _open_dataset(config: CorpusConfig) -> Any:
    import datasets  # noqa: PLC0415

    name = locate(str(config.dataset), "data.corpora: dataset", revision=config.revision, repository="dataset")
    if Path(name).is_dir():
        dataset_files(Path(name))
    asked = f"dataset {str(config.dataset)!r} (config {config.config}, split {config.split}) cannot be opened"
    try:
        if not _is_saved_dataset(Path(name)):
            return datasets.load_dataset(
                name, config.config, split=config.split, streaming=config.streaming, revision=config.revision
            )
        loaded = datasets.load_from_disk(name)
    except WeftError:
        raise
    except Exception as error:
        raise DataError(f"{asked}: {reason(error)}") from error
    if not isinstance(loaded, datasets.DatasetDict):
        return loaded
    if config.split not in loaded:
        raise DataError(f"{asked}: it has the splits {', '.join(map(str, loaded)) or '(none)'}")
    return loaded[config.split]
