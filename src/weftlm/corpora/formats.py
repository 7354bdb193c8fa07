"""Records out of files: JSON Lines, JSON arrays, CSV, text and Parquet, plain or compressed, in bounded memory.

`read_file` yields `(place, record)`, where the place is `path:line` or `path[row]` and the record is either the text
itself or a mapping that holds it. Faults go to `fail`, which counts them or raises; whatever else goes wrong while a
reader advances goes there too (`guarded`), so a damaged file is never a crash.

Bounds, checked before memory is taken: one document, and one JSON array, holds at most 256 MiB, and a compressed file
that has given more than 64 MiB must not have grown more than 250 times.
"""

from __future__ import annotations

import bz2
import codecs
import csv
import gzip
import io
import json
import logging
import lzma
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import IO, Any, Literal

import zstandard

from weftlm.corpora.config import Format
from weftlm.errors import WeftError, reason

Reason = Literal[
    "undecodable", "broken_json", "broken_csv", "not_an_object", "missing_field", "not_text", "empty", "missing_label",
    "too_large", "truncated", "unreadable",
]  # fmt: skip
"""Kinds of faults."""
Record = str | Mapping[str, Any]
Fail = Callable[[Reason, str, str], None]
"""Called with reason, place and detail; returns when the record is to be skipped, raises when reading stops."""

_CODE = (
    ".bash .c .cc .clj .cpp .cs .cu .cuh .css .cxx .dart .erl .ex .exs .f90 .fs .go .h .hh .hpp .hs .html .java .jl .js"
    " .jsx .kt .lean .lisp .lua .m .ml .mli .nim .php .pl .proto .ps1 .py .pyi .pyx .r .rb .rs .scala .scm .sh .sql"
    " .svelte .swift .toml .ts .tsx .v .vhd .vue .xml .yaml .yml .zig"
)
COMPRESSIONS = (".gz", ".zst", ".xz", ".bz2")
FORMATS: dict[str, Format] = {
    **dict.fromkeys((".jsonl", ".ndjson", ".json"), "jsonl"),
    **dict.fromkeys((".csv", ".tsv"), "csv"),
    **dict.fromkeys((".parquet", ".pq"), "parquet"),
    **dict.fromkeys((".txt", ".text", ".md", ".rst", ".tex", ".log"), "text"),
    **dict.fromkeys(_CODE.split(), "code"),
}
"""How a file is read, by suffix."""

DOCUMENT_BYTES = 1 << 28
GROWTH = 250
GROWTH_FROM = 1 << 26
_WINDOW_BYTES = 1 << 31
_BLOCK = 1 << 20
_BINARY = re.compile(rb"[\x00-\x08\x0e-\x1a\x1c-\x1f]|\xff\xfe|\xfe\xff")
"""What the first bytes of a text do not hold: control characters and the marks of UTF-16. They tell archives, arrays,
databases, pickles and text of wide characters from UTF-8."""

log = logging.getLogger(__name__)
csv.field_size_limit(DOCUMENT_BYTES)


@dataclass
class Cursor:
    """The record a reader is at, for messages: `path:line`, counted from 1, or with `rows` `path[row]`, from 0."""

    path: Path | str
    number: int = 1
    rows: bool = False

    def __str__(self) -> str:
        return f"{self.path}[{self.number}]" if self.rows else f"{self.path}:{self.number}"


def guarded(records: Iterator[tuple[str, Record]], cursor: Cursor, fail: Fail) -> Iterator[tuple[str, Record]]:
    """The records of a reader; any error it raises while it advances becomes a fault at the cursor, and ends it."""
    try:
        yield from records
    except WeftError:
        raise
    except Exception as error:  # noqa: BLE001 - what readers of damaged files raise is not to be listed
        _fail(error, str(cursor), fail)


def _fail(error: Exception, place: str, fail: Fail) -> None:
    """Report an error met while a user's file was read."""
    why = reason(error)
    log.debug("%s cannot be read", place, exc_info=error)
    if isinstance(error, EOFError):
        fail("truncated", place, f"the file ends too early ({why}); the rest of it is missing")
    else:
        fail("unreadable", place, f"cannot be read: {why}")


def split_suffix(path: Path) -> tuple[str, str]:
    """The format suffix and the compression suffix of a file, lower case: `a.jsonl.gz` gives `.jsonl`, `.gz`."""
    compression = path.suffix.lower()
    if compression in COMPRESSIONS:
        return Path(path.stem).suffix.lower(), compression
    return compression, ""


def read_file(
    path: Path, kind: Format, fail: Fail, fields: tuple[str, ...] = (), *, paragraphs: bool = False
) -> Iterator[tuple[str, Record]]:
    """The records of a file.

    Args:
        path: Path of the file.
        kind: `jsonl`: one JSON object per line, or the objects of one JSON array in a file that ends in `.json`; `csv`
            (`.tsv`: tab-separated values): rows as mappings, the first row names the columns; `parquet`: rows, some at
            a time; `text` and `code`: the whole file as one document.
        fail: Function that takes faults.
        fields: Fields that are wanted, dotted paths; other columns of Parquet are not read.
        paragraphs: Whether each run of lines between blank lines of a text is a document.
    """
    cursor = Cursor(path, 0, rows=True) if kind == "parquet" else Cursor(path)
    if kind == "jsonl":
        records = _jsonl(path, cursor, fail)
    elif kind == "csv":
        records = _csv(path, cursor, fail, fields)
    elif kind == "parquet":
        records = _parquet(path, cursor, fail, fields)
    else:
        records = (_paragraphs if paragraphs else _text)(path, cursor, fail)
    return guarded(records, cursor, fail)


def _jsonl(path: Path, cursor: Cursor, fail: Fail) -> Iterator[tuple[str, Record]]:
    if split_suffix(path)[0] == ".json" and _is_array(path):
        text = _whole(path, cursor, fail)
        records = [] if text is None else json.loads(text)
        cursor.number, cursor.rows = 0, True
        for record in records:
            yield from _object(record, cursor, fail)
            cursor.number += 1
        return
    for line in _lines(path, cursor, fail):
        text = _decode(line, str(cursor), fail)
        if text is None or not text.strip():
            continue
        try:
            record = json.loads(text)
        except (ValueError, RecursionError) as error:
            fail(
                "broken_json", str(cursor), f"{reason(error).removeprefix('it is ')}; every line must be a JSON object"
            )
            continue
        yield from _object(record, cursor, fail)


def _is_array(path: Path) -> bool:
    with open_binary(path) as file:
        return file.peek(1).removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b"["


def _object(record: Any, cursor: Cursor, fail: Fail) -> Iterator[tuple[str, Record]]:
    if isinstance(record, dict):
        yield str(cursor), record
        return
    hint = "" if cursor.rows else " on every line (a file that holds one array of them must end in .json)"
    fail("not_an_object", str(cursor), f"holds a JSON {type(record).__name__}; give JSON objects{hint}")


def _csv(path: Path, cursor: Cursor, fail: Fail, fields: tuple[str, ...]) -> Iterator[tuple[str, Record]]:
    lines = (line.decode("utf-8", errors="surrogateescape") for line in _lines(path, cursor, fail))
    rows = csv.reader(lines, delimiter="\t" if split_suffix(path)[0] == ".tsv" else ",", strict=True)
    names: list[str] | None = None
    while True:
        place = f"{path}:{rows.line_num + 1}"
        try:
            row = next(rows, None)
        except csv.Error as error:
            fail("broken_csv", place, f"not valid CSV: {reason(error)}")
            continue
        if row is None:
            return
        if names is None:
            names = row
            if _is_named_twice(names, fields, place, fail):
                return
        elif row and len(row) != len(names):
            fail("broken_csv", place, f"the row has {len(row)} cells and the header {len(names)}")
        elif row:
            yield place, dict(zip(names, row, strict=True))


def _is_named_twice(names: list[str], wanted: tuple[str, ...], place: str, fail: Fail) -> bool:
    twice = sorted({name for name in wanted if names.count(name) > 1})
    if twice:
        fail("missing_field", place, f"{names.count(twice[0])} columns are named {twice[0]!r}; keep one of them")
    return bool(twice)


def _text(path: Path, cursor: Cursor, fail: Fail) -> Iterator[tuple[str, Record]]:
    text = _whole(path, cursor, fail)
    if text is not None:
        yield str(cursor), text


def _whole(path: Path, cursor: Cursor, fail: Fail) -> str | None:
    """The text of a file; None where a fault was reported."""
    blocks: list[bytes] = []
    with open_binary(path) as file:
        while block := file.read(_BLOCK):
            blocks.append(block)
            if len(blocks) > DOCUMENT_BYTES // _BLOCK:
                _too_large(str(cursor), fail)
                return None
    data = b"".join(blocks)
    del blocks
    try:
        return data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        fail("undecodable", f"{path}:{line}", f"byte 0x{data[error.start]:02x} at offset {error.start} is not UTF-8")
        return None


def _paragraphs(path: Path, cursor: Cursor, fail: Fail) -> Iterator[tuple[str, Record]]:
    """Runs of lines between blank lines; one with undecodable bytes is left out whole."""
    for blank, group in groupby(_lines(path, cursor, fail), key=lambda line: not line.strip()):
        place, size, lines = str(cursor), 0, []
        for line in group:
            size += len(line)
            if size > DOCUMENT_BYTES:
                _too_large(place, fail)
                break
            text = _decode(line, str(cursor), fail)
            if text is None:
                break
            lines.append(text)
        else:
            if not blank:
                yield place, "".join(lines).rstrip("\r\n")


def _parquet(path: Path, cursor: Cursor, fail: Fail, fields: tuple[str, ...]) -> Iterator[tuple[str, Record]]:
    import pyarrow.parquet as pq  # noqa: PLC0415  (a quarter of a second, and most inputs are text)

    with pq.ParquetFile(path, pre_buffer=False) as file:
        names = file.schema_arrow.names
        columns = sorted({name for wanted in fields for name in (wanted, wanted.split(".")[0]) if name in names})
        if not columns:
            fail("missing_field", str(path), f"has no column for {' or '.join(fields)}; it has {', '.join(names)}")
            return
        if _is_named_twice(names, tuple(columns), str(path), fail):
            return
        for group in map(file.metadata.row_group, range(file.num_row_groups)):
            chunks = [group.column(number) for number in range(group.num_columns)]
            wanted = [chunk for chunk in chunks if chunk.path_in_schema.split(".")[0] in columns]
            size = sum(chunk.total_uncompressed_size for chunk in wanted)
            _check_growth(size, sum(chunk.total_compressed_size for chunk in wanted))
        for batch in file.iter_batches(batch_size=64, columns=columns):
            for offset in range(batch.num_rows):
                place = str(cursor)
                try:
                    record = {name: batch.column(name)[offset].as_py() for name in columns}
                except UnicodeDecodeError as error:
                    fail("undecodable", place, f"byte 0x{error.object[error.start]:02x} is not UTF-8")
                except Exception as error:  # noqa: BLE001 - values beyond what Python's types hold, of any type
                    _fail(error, place, fail)
                else:
                    yield place, record
                cursor.number += 1


def open_binary(path: Path) -> io.BufferedReader:
    """Open a plain or compressed file of text for reading bytes; one that ends too early raises EOFError.

    Raises:
        ValueError: It begins with what is no UTF-8 text.
    """
    compression = split_suffix(path)[1]
    raw = io.BufferedReader(io.FileIO(path), _BLOCK)
    try:
        file: Any = io.BufferedReader(_Decompressed(raw, compression), _BLOCK) if compression else raw
        if _BINARY.search(file.peek(64)[:64]):
            raise ValueError(
                "it holds binary data, or UTF-16 or UTF-32 text: convert that to UTF-8, or name a compressed file "
                ".gz, .zst, .xz or .bz2; pickles, arrays and archives are never opened"
            )
    except BaseException:
        raw.close()
        raise
    found: io.BufferedReader = file
    return found


def _check_growth(size: int, compressed: int) -> None:
    if size > GROWTH_FROM and size > GROWTH * compressed:
        raise ValueError(
            f"{compressed:,} compressed bytes give {size:,} and more, over {GROWTH} times as many; if that is meant, "
            f"decompress the file first"
        )


class _Decompressed(io.RawIOBase):
    """A compressed file read as a stream, which ends with an error where it grows too much."""

    def __init__(self, raw: IO[bytes], compression: str) -> None:
        self._raw, self._size, self._rest = raw, 0, b""
        if compression == ".zst":
            self._blocks = _zstd_blocks(raw)
        else:
            open_stream: Any = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}[compression]
            # One read at a time: a longer one would lose what precedes the end of a truncated file.
            self._blocks = iter(partial(open_stream(raw).read1, _BLOCK), b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._rest and (block := next(self._blocks, None)) is not None:
            self._rest = block
            self._size += len(block)
            _check_growth(self._size, self._raw.tell())
        count = min(len(buffer), len(self._rest))
        buffer[:count], self._rest = self._rest[:count], self._rest[count:]
        return count

    def close(self) -> None:
        self._raw.close()
        super().close()


def _zstd_blocks(file: IO[bytes]) -> Iterator[bytes]:
    """Blocks of a zstd file, several frames or one; an end inside a frame is an error (zstandard reads on)."""
    frame: zstandard.ZstdDecompressionObj | None = None
    while data := file.read(1 << 10):  # little, for it may hold 30 000 times its size
        while data:
            frame = frame or zstandard.ZstdDecompressor(max_window_size=_WINDOW_BYTES).decompressobj()
            yield frame.decompress(data)
            data, frame = (frame.unused_data, None) if frame.eof else (b"", frame)
    if frame is not None:
        raise EOFError("the zstd stream ends inside a frame")


def _lines(path: Path, cursor: Cursor, fail: Fail) -> Iterator[bytes]:
    """Lines with their ends, the cursor at each; a line too long for a document ends the file."""
    with open_binary(path) as file:
        while line := file.readline(DOCUMENT_BYTES + 1):
            if len(line) > DOCUMENT_BYTES:
                _too_large(str(cursor), fail)
                return
            yield line.removeprefix(codecs.BOM_UTF8) if cursor.number == 1 else line
            cursor.number += 1


def _too_large(place: str, fail: Fail) -> None:
    fail("too_large", place, f"a document may hold {DOCUMENT_BYTES >> 20} MiB; split it, or the rest is left out")


def _decode(line: bytes, place: str, fail: Fail) -> str | None:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        fail("undecodable", place, f"byte 0x{line[error.start]:02x} at column {error.start + 1} is not UTF-8")
        return None


def is_unicode(text: str) -> bool:
    """Whether a text can be written as UTF-8: it holds no half of a surrogate pair."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
