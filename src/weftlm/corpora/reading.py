"""Documents out of files, Hugging Face datasets and the built-in corpora, in a fixed order and in constant memory."""

from __future__ import annotations

import dataclasses
import glob
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from weftlm.config import Section
from weftlm.corpora import formats
from weftlm.corpora.builtin import builtin_documents, builtin_fingerprint, builtin_names
from weftlm.corpora.formats import CODE_SUFFIXES, JSON_SUFFIXES, PARQUET_SUFFIXES, TEXT_SUFFIXES, Record, split_suffix
from weftlm.corpora.reading_report import ReadingReport, Reason
from weftlm.corpora.source import Document
from weftlm.errors import ConfigError, DataError

__all__ = ["CorpusConfig", "ReadingReport", "corpus_fingerprint", "read_documents"]

Format = Literal["auto", "jsonl", "text", "code", "parquet"]


class CorpusConfig(Section):
    """One input: exactly one of `path`, `dataset` and `builtin`.

    Attributes:
        path: a file, a glob (`**` allowed) or a folder, which is searched with its subfolders; hidden entries are left.
        dataset: a Hugging Face dataset: a name on the hub, a local folder, or a folder saved by `save_to_disk`.
        builtin: `all`, or names of built-in corpora; each document is labelled with its corpus.
        config: configuration of a `dataset`.
        split: split of a `dataset`.
        revision: branch, tag or commit of a `dataset` on the hub.
        streaming: read a `dataset` as a stream rather than download it first.
        format: of the files: `jsonl` (JSON Lines), `text`, `code` (a file per document), `parquet`, or `auto`: by
            suffix. Any but Parquet may end in `.gz` or `.zst`.
        split_documents: what a document of a text file is: the whole `file`, or what stands between `blank_lines`.
        suffixes: of the files of a folder to read, such as `[".py"]` (`""`: files without one);
            default those of the format.
        text_field: where the text is in a JSON object, Parquet row or dataset row; may be dotted (`data.text`).
        prompt_field: where the prompt is whose answer the text is, likewise; each document is then an example, a prompt
            and a target, and its text is the two one after the other, with nothing put between them.
        label: the domain of every document.
        label_field: where the domain is in a record; may be dotted. A whole number is taken as its decimal form.
        label_from: the domain is the name of the `file` without suffixes, or of the `folder` it lies in.
        max_documents: stop after so many documents (of each, for `builtin`).
        max_bytes: stop before exceeding so many UTF-8 bytes of text (of each, for `builtin`).
        on_error: what to do about a faulty record: `stop` with an error that names file and line, or `skip` and count.
    """

    path: str | None = None
    dataset: str | None = None
    builtin: Literal["all"] | tuple[str, ...] | None = None
    config: str | None = None
    split: str = "train"
    revision: str | None = None
    streaming: bool = True
    format: Format = "auto"
    split_documents: Literal["file", "blank_lines"] = "file"
    suffixes: tuple[str, ...] | None = None
    text_field: str = Field(default="text", min_length=1)
    prompt_field: str | None = Field(default=None, min_length=1)
    label: str | None = Field(default=None, min_length=1)
    label_field: str | None = Field(default=None, min_length=1)
    label_from: Literal["file", "folder"] | None = None
    max_documents: int | None = Field(default=None, ge=1)
    max_bytes: int | None = Field(default=None, ge=1)
    on_error: Literal["stop", "skip"] = "stop"

    @model_validator(mode="after")
    def _consistent(self) -> CorpusConfig:
        kinds = [kind for kind in ("path", "dataset", "builtin") if getattr(self, kind) is not None]
        if len(kinds) != 1:
            raise ValueError(f"set exactly one of path, dataset and builtin, not {' and '.join(kinds) or 'none'}")
        labels = [name for name in ("label", "label_field", "label_from") if getattr(self, name) is not None]
        if len(labels) > 1:
            raise ValueError(f"set at most one of label, label_field and label_from, not {' and '.join(labels)}")
        only = {
            "path": ("format", "split_documents", "suffixes", "label_from"),
            "dataset": ("config", "split", "revision", "streaming"),
            "builtin": (),
        }
        changed = {name for name, field in type(self).model_fields.items() if getattr(self, name) != field.default}
        for kind, names in only.items():
            wrong = sorted(changed & set(names)) if kind != kinds[0] else []
            if wrong:
                raise ValueError(f"{', '.join(wrong)} goes with {kind}, not with {kinds[0]}")
        if kinds[0] == "builtin" and (self.label_field or self.prompt_field or self.text_field != "text"):
            raise ValueError("built-in corpora have no fields; leave text_field, prompt_field and label_field out")
        if self.format in ("text", "code") and self.prompt_field is not None:
            raise ValueError(f"prompt_field needs records; files of format {self.format} have none")
        if self.format in ("text", "code") and self.label_field is not None:
            raise ValueError(f"label_field needs records; files of format {self.format} have none: use label_from")
        if self.split_documents != "file" and self.format not in ("auto", "text"):
            raise ValueError(f"split_documents goes with format text, not {self.format}")
        if self.suffixes is not None and not all(suffix[:1] in ("", ".") for suffix in self.suffixes):
            raise ValueError(
                f"suffixes {list(self.suffixes)} must each begin with a dot, or be empty for files without one"
            )
        return self

    @property
    def name(self) -> str:
        """The input in a word, for messages."""
        if self.builtin is not None:
            return f"builtin:{self.builtin if self.builtin == 'all' else ','.join(self.builtin)}"
        return str(self.path or self.dataset)


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
    """A hash that changes when the input does, without reading it: settings, and names, sizes and times of files.

    For a dataset on the hub only its name and settings count: fix a `revision` to have it name the contents.

    Raises:
        DataError: a path that matches nothing.
    """
    settings = config.model_dump(mode="json")
    if config.prompt_field is None:
        del settings["prompt_field"]  # younger than data that is prepared already
    facts: list[Any] = [settings]
    if config.builtin is not None:
        facts.append(builtin_fingerprint(_builtin_selection(config)))
    elif config.path is not None:
        for path, _ in _files(config, ReadingReport()):
            stat = path.stat()
            facts.append([str(path), stat.st_size, stat.st_mtime_ns])
    elif Path(str(config.dataset)).is_dir():
        for path in _walk(Path(str(config.dataset))):
            stat = path.stat()
            facts.append([str(path), stat.st_size, stat.st_mtime_ns])
    return hashlib.blake2b(json.dumps(facts, sort_keys=True).encode("utf-8"), digest_size=16).hexdigest()


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
    """Documents out of records: the text field checked, the label found."""
    stop = config.on_error == "stop"
    for place, record in records:
        label_here = config.label if config.label is not None else label
        text = _text(record, config.text_field, place, report, stop=stop)
        if text is None:
            continue
        prompt = ""
        if config.prompt_field is not None:
            found = _text(record, config.prompt_field, place, report, stop=stop)
            if found is None:
                continue
            prompt = found
        if config.label_field is not None:
            assert not isinstance(record, str)
            value = _at(record, config.label_field)
            if isinstance(value, int) and not isinstance(value, bool):
                value = str(value)
            if not isinstance(value, str) or not value or not _is_unicode(value):
                detail = f"field {config.label_field!r} holds {value!r:.60}; a label must be text or a whole number"
                report.fail("missing_label", place, detail, stop=stop)
                continue
            label_here = value
        yield Document(prompt + text, place, label_here, None if config.prompt_field is None else len(prompt))


def _text(record: Record, field: str, place: str, report: ReadingReport, *, stop: bool) -> str | None:
    """The text in a field of a record, or the record itself if it is text; None where the report was told why not."""
    text = record if isinstance(record, str) else _at(record, field)
    if isinstance(text, bytes):
        try:
            text = text.decode("utf-8")
        except UnicodeDecodeError as error:
            report.fail("undecodable", place, f"byte {error.start} of {field} is not UTF-8", stop=stop)
            return None
    if text is None:
        assert not isinstance(record, str)
        known = ", ".join(map(str, list(record)[:10])) or "none"
        report.fail("missing_field", place, f"field {field!r} is missing; fields: {known}", stop=stop)
    elif not isinstance(text, str):
        report.fail("not_text", place, f"field {field!r} is of type {type(text).__name__}, not text", stop=stop)
    elif not text or text.isspace():
        report.fail("empty", place, "the document is empty", stop=stop)
    elif not _is_unicode(text):
        report.fail("undecodable", place, "the text holds half a surrogate pair, which UTF-8 cannot hold", stop=stop)
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


def _is_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _file_documents(
    config: CorpusConfig, files: list[tuple[Path, Format]], report: ReadingReport
) -> Iterator[Document]:
    stop = config.on_error == "stop"

    def fail(reason: Reason, place: str, detail: str) -> None:
        report.fail(reason, place, detail, stop=stop)

    def blank() -> None:
        report.blank_lines += 1

    fields = tuple(filter(None, (config.text_field, config.prompt_field, config.label_field)))
    for path, kind in files:
        if kind in ("text", "code") and config.prompt_field is not None:
            raise ConfigError(f"{path} is a text file and has no field {config.prompt_field!r}; give JSON Lines")
        if kind in ("text", "code") and config.label_field is not None:
            raise ConfigError(f"{path} is a text file and has no field {config.label_field!r}; use label or label_from")
        report.files += 1
        records: Iterator[tuple[str, Record]]
        if kind == "jsonl":
            records = formats.read_jsonl(path, fail, blank)
        elif kind == "parquet":
            records = formats.read_parquet(path, fields, fail)
        elif kind == "text" and config.split_documents == "blank_lines":
            records = formats.read_paragraphs(path, fail)
        else:
            records = formats.read_text(path, fail)
        yield from _documents(config, records, report, _label_of(path, config))


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
    here = Path(config.path).expanduser()
    result: list[tuple[Path, Format]] = []
    if here.is_dir():
        for path in _walk(here):
            kind = _format(path, config)
            if kind is None:
                report.ignore(str(path))
            else:
                result.append((path, kind))
        if not result:
            wanted = f"suffix {' '.join(config.suffixes)}" if config.suffixes else f"format {config.format}"
            raise DataError(
                f"folder {config.path} holds no file of {wanted} (files of other kinds: "
                f"{report.ignored_files}); check the path, or set format and suffixes"
            )
        return result
    if here.is_file():
        found = [here]
    else:
        found = sorted(Path(name) for name in glob.glob(str(here), recursive=True) if os.path.isfile(name))
    if not found:
        raise DataError(f"path {config.path!r} matches no file (looked from {Path.cwd()}); check the spelling")
    for path in found:
        kind = _format(path, config)
        if kind is None:
            raise ConfigError(
                f"the format of {path} cannot be told from its suffix; set format: jsonl, text, code or parquet"
                if config.suffixes is None
                else f"{path} does not have one of the suffixes {' '.join(config.suffixes)}"
            )
        result.append((path, kind))
    return result


def _walk(folder: Path) -> Iterator[Path]:
    """All files below a folder in order of path; hidden ones, and links to folders, are left out."""
    with os.scandir(folder) as entries:
        listed = sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda entry: entry.name)
    for entry in listed:
        if entry.is_dir(follow_symlinks=False):
            yield from _walk(Path(entry.path))
        elif entry.is_file():
            yield Path(entry.path)


def _format(path: Path, config: CorpusConfig) -> Format | None:
    """How a file is to be read; None where its suffix is not one of those wanted."""
    suffix, compression = split_suffix(path)
    if config.suffixes is not None and not {suffix, suffix + compression} & set(config.suffixes):
        return None
    told: Format | None = None
    if suffix in JSON_SUFFIXES:
        told = "jsonl"
    elif suffix in PARQUET_SUFFIXES and not compression:
        told = "parquet"
    elif suffix in TEXT_SUFFIXES:
        told = "text"
    elif suffix in CODE_SUFFIXES:
        told = "code"
    if config.format == "auto":
        return told if told is not None or config.suffixes is None else "text"
    if config.suffixes is not None or not Path(str(config.path)).expanduser().is_dir():
        return config.format
    return config.format if told == config.format else None


def _dataset_rows(config: CorpusConfig, report: ReadingReport) -> Iterator[tuple[str, Record]]:
    """Rows of a Hugging Face dataset; class labels are given by name."""
    import datasets  # noqa: PLC0415  (half a second, and most inputs are files)

    name = str(config.dataset)
    try:
        if any((Path(name) / marker).is_file() for marker in ("state.json", "dataset_dict.json")):
            loaded = datasets.load_from_disk(name)
            if isinstance(loaded, datasets.DatasetDict):
                loaded = loaded[config.split]
        else:
            loaded = datasets.load_dataset(
                name, config.config, split=config.split, streaming=config.streaming, revision=config.revision
            )
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"dataset {name!r} (config {config.config}, split {config.split}) cannot be opened: "
            f"{type(error).__name__}: {error}"
        ) from error
    names = None
    features = loaded.features or {}
    if config.label_field is not None and isinstance(features.get(config.label_field), datasets.ClassLabel):
        names = features[config.label_field].names
    asked = filter(None, (config.text_field, config.prompt_field, config.label_field))
    wanted = {field for whole in asked for field in (whole, whole.split(".")[0])}
    if features and wanted & set(features):
        loaded = loaded.select_columns([field for field in features if field in wanted])
    row = 0
    try:
        for record in loaded:
            if names is not None and isinstance(record[config.label_field], int) and record[config.label_field] >= 0:
                record = {**record, config.label_field: names[record[config.label_field]]}
            yield f"{name}[{row}]", record
            row += 1
    except (OSError, ValueError, RuntimeError, EOFError, datasets.exceptions.DatasetsError) as error:
        detail = f"the dataset cannot be read on: {type(error).__name__}: {error}"
        report.fail("unreadable", f"{name}[{row}]", detail, stop=config.on_error == "stop")
