"""Documents out of files, Hugging Face datasets and the built-in corpora, in a fixed order and in constant memory."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from weftlm.corpora import formats
from weftlm.corpora.builtin import builtin_documents, builtin_fingerprint, builtin_names
from weftlm.corpora.config import CorpusConfig, Format
from weftlm.corpora.formats import DOCUMENT_BYTES, Cursor, Record, guarded, is_unicode, split_suffix
from weftlm.corpora.paths import corpus_files, dataset_files
from weftlm.corpora.reading_report import ReadingReport, Reason
from weftlm.corpora.source import Document
from weftlm.errors import ConfigError, DataError
from weftlm.files import cause
from weftlm.places import locate

__all__ = ["CorpusConfig", "ReadingReport", "corpus_fingerprint", "known_labels", "read_documents"]


def read_documents(config: CorpusConfig, report: ReadingReport) -> Iterator[Document]:
    """The documents of one input, in the same order every time.

    Args:
        config: the input.
        report: counts what is read and every fault; fills up as the iterator advances.
    Raises:
        DataError: at once, a path that matches nothing; while iterating, a fault under `on_error: stop`, naming file
            and line, or a dataset that cannot be opened.
        ConfigError: at once, an unknown built-in corpus, or a file whose format cannot be told.
    """
    if config.builtin is not None:
        more = () if config.max_bytes is None else (config.max_bytes,)
        return _builtin(config, [builtin_documents(name, *more) for name in _builtin_selection(config)], report)
    if config.dataset is not None:
        return _limited(config, _documents(config, _dataset_rows(config, report), report), report)
    files = _files(config, report)
    return _limited(config, _file_documents(config, files, report), report)


def corpus_fingerprint(config: CorpusConfig) -> str:
    """A hash that changes when the files of an input do, without reading them: names, sizes and times.

    Nothing is known of a dataset on the hub beside its settings: fix a `revision` to have it name the contents.

    Raises:
        DataError: a path that matches nothing.
    """
    facts: list[Any] = []
    if config.builtin is not None:
        facts.append(builtin_fingerprint(_builtin_selection(config)))
    elif config.path is not None:
        facts += map(_state_of, (path for path, _ in _files(config, ReadingReport())))
    elif Path(str(config.dataset)).is_dir():
        facts += map(_state_of, dataset_files(Path(str(config.dataset))))
    return hashlib.blake2b(json.dumps(facts, sort_keys=True).encode("utf-8"), digest_size=16).hexdigest()


def known_labels(config: CorpusConfig) -> set[str] | None:
    """The labels that an input's documents will carry; None where only reading them tells.

    Raises:
        DataError: a path that matches nothing.
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
        raise DataError(f"{path} cannot be read: {cause(error)}") from error
    return [str(path), found.st_size, found.st_mtime_ns]


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
    config: CorpusConfig, records: Iterator[tuple[str, Record]], report: ReadingReport, label: str | None = None
) -> Iterator[Document]:
    """Documents out of records: the label found, the text checked."""
    stop = config.on_error == "stop"
    for place, record in records:
        label_here = config.label if config.label is not None else label
        if config.label_field is not None:
            assert not isinstance(record, str)
            value = _at(record, config.label_field)
            if isinstance(value, int) and not isinstance(value, bool):
                value = str(value)
            if not isinstance(value, str) or not value or not is_unicode(value):
                detail = f"field {config.label_field!r} holds {_shown(value)}; a label must be text or a whole number"
                report.fail("missing_label", place, detail, stop=stop)
                continue
            label_here = value
        text = _text(record, config.text_field, place, report, label_here, stop=stop)
        if text is None:
            continue
        prompt = ""
        if config.prompt_field is not None:
            found = _text(record, config.prompt_field, place, report, label_here, stop=stop)
            if found is None:
                continue
            prompt = found
        yield Document(prompt + text, place, label_here, None if config.prompt_field is None else len(prompt))


def _shown(value: Any) -> str:
    return "nothing" if value is None else f"{value!r:.60}"


def _text(
    record: Record, field: str, place: str, report: ReadingReport, label: str | None, *, stop: bool
) -> str | None:
    """The text in a field of a record, or the record itself if it is text; None where the report was told why not."""

    def fail(reason: Reason, detail: str) -> None:
        report.fail(reason, place, detail, label=label, stop=stop)

    text = record if isinstance(record, str) else _at(record, field)
    if isinstance(text, bytes):
        try:
            text = text.decode("utf-8")
        except UnicodeDecodeError as error:
            fail("undecodable", f"byte {error.start} of {field} is not UTF-8")
            return None
    if text is None:
        assert not isinstance(record, str)
        known = ", ".join(map(str, list(record)[:10])) or "none"
        fail("missing_field", f"field {field!r} is missing; fields: {known}")
    elif not isinstance(text, str):
        fail("not_text", f"field {field!r} is of type {type(text).__name__}, not text")
    elif not text or text.isspace():
        fail("empty", "the document is empty")
    elif not is_unicode(text):
        fail("undecodable", "the text holds half a surrogate pair, which UTF-8 cannot hold")
    elif len(text) > DOCUMENT_BYTES:
        fail("too_large", f"a document may hold {DOCUMENT_BYTES >> 20} MiB; split it")
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
    stop = config.on_error == "stop"

    label: str | None = None

    def fail(reason: Reason, place: str, detail: str) -> None:
        report.fail(reason, place, detail, label=label, stop=stop)

    def blank() -> None:
        report.blank_lines += 1

    fields = tuple(filter(None, (config.text_field, config.prompt_field, config.label_field)))
    for path, kind in files:
        if kind in ("text", "code") and config.prompt_field is not None:
            raise ConfigError(f"{path} is a text file and has no field {config.prompt_field!r}; give JSON Lines")
        if kind in ("text", "code") and config.label_field is not None:
            raise ConfigError(f"{path} is a text file and has no field {config.label_field!r}; use label or label_from")
        report.files += 1
        found = _label_of(path, config)
        label = config.label if config.label is not None else found
        records: Iterator[tuple[str, Record]]
        if kind == "jsonl":
            records = formats.read_jsonl(path, fail, blank)
        elif kind == "csv":
            records = formats.read_csv(path, fields, fail)
        elif kind == "parquet":
            records = formats.read_parquet(path, fields, fail)
        elif kind == "text" and config.split_documents == "blank_lines":
            records = formats.read_paragraphs(path, fail)
        else:
            records = formats.read_text(path, fail)
        yield from _documents(config, records, report, found)


def _label_of(path: Path, config: CorpusConfig) -> str | None:
    if config.label_from == "folder":
        return path.absolute().parent.name
    if config.label_from == "file":
        suffix, compression = split_suffix(path)
        return path.name[: len(path.name) - len(suffix) - len(compression)]
    return None


def _files(config: CorpusConfig, report: ReadingReport) -> list[tuple[Path, Format]]:
    """The files of an input with their formats, sorted by path.

    Raises:
        DataError: nothing matches.
        ConfigError: the format of a file that was asked for cannot be told from its suffix.
    """
    assert config.path is not None
    found, searched = corpus_files(config.path, report.ignore)
    if searched and _is_saved_dataset(Path(config.path).expanduser()):
        raise DataError(f"{config.path} is a data set written by save_to_disk; give it as dataset, not path")
    result: list[tuple[Path, Format]] = []
    for path in found:
        kind = _format(path, config)
        if kind is not None:
            result.append((path, kind))
            continue
        suffix = split_suffix(path)[0]
        if searched:
            report.ignore(str(path))
        elif config.suffixes is not None:
            raise ConfigError(f"{path} does not have one of the suffixes {' '.join(config.suffixes)}")
        elif suffix in formats.SAVED_OBJECTS:
            raise ConfigError(
                f"{path} is {formats.SAVED_OBJECTS[suffix]}, which is not read; write its text as JSON Lines, CSV or "
                f"Parquet first"
            )
        else:
            raise ConfigError(
                f"the format of {path} cannot be told from its suffix; set format: jsonl, csv, text, code or parquet"
            )
    if not result:
        wanted = f"suffix {' '.join(config.suffixes)}" if config.suffixes else f"format {config.format}"
        left = f"{report.ignored_files} left out"
        if report.ignored_examples:
            left += f", such as {report.ignored_examples[0]}"
        raise DataError(
            f"folder {config.path} holds no file of {wanted} ({left}); check the path, or set format and suffixes"
        )
    return result


def _format(path: Path, config: CorpusConfig) -> Format | None:
    """How a file is to be read; None where its suffix is not one of those wanted."""
    suffix, compression = split_suffix(path)
    if config.suffixes is not None and not {suffix, suffix + compression} & set(config.suffixes):
        return None
    told = formats.FORMATS.get(suffix)
    if told == "parquet" and compression:
        told = None
    if config.format == "auto":
        return told if told is not None or config.suffixes is None else "text"
    if config.suffixes is not None or not Path(str(config.path)).expanduser().is_dir():
        return config.format
    return config.format if told == config.format else None


def _is_saved_dataset(folder: Path) -> bool:
    """Whether `save_to_disk` of the `datasets` library wrote a folder."""
    marks = (("state.json", "dataset_info.json"), ("dataset_dict.json",))
    return any(all((folder / name).is_file() for name in names) for names in marks)


def _dataset_rows(config: CorpusConfig, report: ReadingReport) -> Iterator[tuple[str, Record]]:
    """Rows of a Hugging Face dataset; class labels are given by name.

    Raises:
        DataError: it cannot be opened, or the label field holds several labels.
    """
    name = str(config.dataset)
    cursor = Cursor(name, 0, rows=True)
    loaded = _open_dataset(config)
    features = loaded.features or {}
    names = None if config.label_field is None else _class_names(features, config.label_field, name)
    asked = filter(None, (config.text_field, config.prompt_field, config.label_field))
    wanted = {field for whole in asked for field in (whole, whole.split(".")[0])}
    if features and wanted & set(features):
        loaded = loaded.select_columns([field for field in features if field in wanted])

    def rows() -> Iterator[tuple[str, Record]]:
        for record in loaded:
            if names is not None:
                assert config.label_field is not None
                number = _at(record, config.label_field)
                known = isinstance(number, int) and 0 <= number < len(names)
                record = {**record, config.label_field: names[number] if known else None}
            yield str(cursor), record
            cursor.number += 1

    def fail(reason: Reason, place: str, detail: str) -> None:
        report.fail(reason, place, detail, label=config.label, stop=config.on_error == "stop")

    yield from guarded(rows(), cursor, fail)


def _open_dataset(config: CorpusConfig) -> Any:
    import datasets  # noqa: PLC0415  (half a second, and most inputs are files)

    name = str(config.dataset)
    asked = f"dataset {name!r} (config {config.config}, split {config.split})"
    name = locate(name, "data.corpora: dataset", revision=config.revision, repository="dataset")
    if Path(name).is_dir():
        dataset_files(Path(name))
    try:
        if not _is_saved_dataset(Path(name)):
            return datasets.load_dataset(
                name, config.config, split=config.split, streaming=config.streaming, revision=config.revision
            )
        loaded = datasets.load_from_disk(name)
    except Exception as error:
        raise DataError(f"{asked} cannot be opened: {cause(error)}") from error
    if not isinstance(loaded, datasets.DatasetDict):
        return loaded
    if config.split not in loaded:
        raise DataError(f"{asked} cannot be opened: it has the splits {', '.join(map(str, loaded)) or '(none)'}")
    return loaded[config.split]


def _class_names(features: Mapping[str, Any], field: str, name: str) -> list[str] | None:
    """Names of the classes of a label field that holds class labels; None where it holds something else.

    Raises:
        DataError: it holds a list of them.
    """
    import datasets  # noqa: PLC0415

    feature = _at(features, field)
    if isinstance(feature, datasets.ClassLabel):
        return list(feature.names)
    if isinstance(feature, list | datasets.Sequence | datasets.List | datasets.LargeList):
        raise DataError(
            f"dataset {name!r}: label_field {field!r} holds a list of labels per document; a document has one domain: "
            f"write the one wanted into a field of its own"
        )
    return None
