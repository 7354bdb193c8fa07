"""Records out of files: JSON Lines, JSON arrays, CSV, text and Parquet, plain or compressed, in bounded memory.

Every reader yields `(place, record)`, where the place is `path:line` or `path[row]` and the record is either the text
itself or a mapping that holds it. Faults go to `fail`, which counts them or raises; whatever else goes wrong while a
reader advances goes there too (`guarded`), so a damaged file is never a crash.

Bounds, checked before memory is taken: one document holds at most 256 MiB, and a compressed file that has given more
than 64 MiB must not have grown more than 250 times.
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
import os
import re
import stat
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import zstandard

from weftlm.corpora.config import Format
from weftlm.corpora.reading_report import Reason
from weftlm.files import cause

if TYPE_CHECKING:
    import pyarrow.parquet as pq

Record = str | Mapping[str, Any]
Fail = Callable[[Reason, str, str], None]
"""Called with reason, place and detail; returns when the record is to be skipped, raises when reading stops."""

JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
CSV_SUFFIXES = (".csv", ".tsv")
TEXT_SUFFIXES = (".txt", ".text", ".md", ".rst", ".tex", ".log")
PARQUET_SUFFIXES = (".parquet", ".pq")
CODE_SUFFIXES = tuple(
    ".bash .c .cc .clj .cpp .cs .cu .cuh .css .cxx .dart .erl .ex .exs .f90 .fs .go .h .hh .hpp .hs .html .java .jl .js"
    " .jsx .kt .lean .lisp .lua .m .ml .mli .nim .php .pl .proto .ps1 .py .pyi .pyx .r .rb .rs .scala .scm .sh .sql"
    " .svelte .swift .toml .ts .tsx .v .vhd .vue .xml .yaml .yml .zig".split()
)
COMPRESSIONS = (".gz", ".zst", ".xz", ".bz2")
FORMATS: dict[str, Format] = {
    **dict.fromkeys(JSON_SUFFIXES, "jsonl"),
    **dict.fromkeys(CSV_SUFFIXES, "csv"),
    **dict.fromkeys(PARQUET_SUFFIXES, "parquet"),
    **dict.fromkeys(TEXT_SUFFIXES, "text"),
    **dict.fromkeys(CODE_SUFFIXES, "code"),
}
"""How a file is read, by suffix."""
SAVED_OBJECTS = {
    **dict.fromkeys((".pt", ".pth", ".ckpt"), "a saved torch object"),
    **dict.fromkeys((".npy", ".npz"), "a saved numpy array"),
    **dict.fromkeys((".pkl", ".pickle", ".joblib"), "a pickle"),
    **dict.fromkeys((".safetensors", ".gguf"), "a file of model weights"),
    **dict.fromkeys((".arrow", ".feather"), "an Arrow file"),
    **dict.fromkeys((".h5", ".hdf5"), "an HDF5 file"),
}
"""Formats that hold no text, or code that would run when they are opened, by suffix."""

DOCUMENT_BYTES = 1 << 28
GROWTH = 250
GROWTH_FROM = 1 << 26
_CELL_CHARACTERS = 1 << 26
_WINDOW_BYTES = 1 << 31
_BLOCK = 1 << 20
_PARQUET_BATCH_BYTES = 1 << 30
_EXPORT = "write its text as JSON Lines or Parquet first"
_ENCODING = "{0} text; convert it to UTF-8 (iconv -f {0} -t UTF-8)"
_SIGNATURES: tuple[tuple[re.Pattern[bytes], str], ...] = tuple(
    (re.compile(pattern, re.DOTALL), what)
    for pattern, what in (
        (rb"\x1f\x8b", "gzip data; let its name end in .gz"),
        (rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18", "zstd data; let its name end in .zst"),
        (rb"\xfd7zXZ\x00", "xz data; let its name end in .xz"),
        (rb"BZh[1-9](1AY&SY|\x17rE8P\x90)", "bzip2 data; let its name end in .bz2"),
        (rb"PAR1", "Parquet; let its name end in .parquet"),
        (rb"ARROW1", f"an Arrow file; {_EXPORT}"),
        (rb"\x93NUMPY", f"a saved numpy array; {_EXPORT}"),
        (rb"PK\x03\x04", f"a zip archive, as torch and numpy save objects; unpack it, or {_EXPORT}"),
        (rb"\x80[\x02-\x05]", f"a pickle, which is never opened because it can run code; {_EXPORT}"),
        (rb"\x89HDF", f"an HDF5 file; {_EXPORT}"),
        (rb"%PDF-", f"a PDF file; {_EXPORT}"),
        (rb"SQLite format 3\x00", f"an SQLite database; {_EXPORT}"),
        (rb"\xff\xfe\x00\x00|\x00\x00\xfe\xff", _ENCODING.format("UTF-32")),
        (rb"\xff\xfe|\xfe\xff|([^\x00]\x00){8}|(\x00[^\x00]){8}", _ENCODING.format("UTF-16")),
    )
)
"""How files begin that are no UTF-8 text, and what they are."""
_ONE_ARRAY = "; a file that holds one JSON array must end in .json"
_SPACE = re.compile(r"[ \t\r\n]*")
_COMPRESSED = dict(zip(COMPRESSIONS, (pattern for pattern, _ in _SIGNATURES), strict=False))
"""How a compressed file begins, by suffix."""

log = logging.getLogger(__name__)
csv.field_size_limit(_CELL_CHARACTERS)


@dataclass
class Cursor:
    """The record a reader is at, for messages: `path:line`, or `path[row]`.

    Attributes:
        path: of the file or data set.
        number: of the record; lines are counted from 1, rows from 0.
        rows: whether rows are counted.
    """

    path: Path | str
    number: int = 1
    rows: bool = False

    def __str__(self) -> str:
        return f"{self.path}[{self.number}]" if self.rows else f"{self.path}:{self.number}"


def guarded(
    records: Iterator[tuple[str, Record]], cursor: Cursor, fail: Fail, kind: str = ""
) -> Iterator[tuple[str, Record]]:
    """The records of a reader; any error it raises while it advances becomes a fault at the cursor, and ends it.

    Errors of weftlm's own making pass (`weftlm.files.cause`).

    Args:
        records: what the reader yields.
        cursor: kept by the reader at the record it works on.
        fail: takes the fault.
        kind: what the file is read as, for the message.
    """
    try:
        yield from records
    except Exception as error:  # noqa: BLE001 - what readers of damaged files raise is not to be listed
        _fail(error, str(cursor), fail, kind)


def _fail(error: Exception, place: str, fail: Fail, kind: str = "") -> None:
    """Report an error met while a user's file was read."""
    why = cause(error)
    log.debug("%s cannot be read", place, exc_info=error)
    if isinstance(error, EOFError):
        fail("truncated", place, f"the file ends too early ({why}); the rest of it is missing")
    else:
        fail("unreadable", place, f"cannot be read{f' as {kind}' if kind else ''}: {why}")


def split_suffix(path: Path) -> tuple[str, str]:
    """The format suffix and the compression suffix of a file, lower case: `a.jsonl.gz` gives `.jsonl`, `.gz`."""
    compression = path.suffix.lower()
    if compression in COMPRESSIONS:
        return Path(path.stem).suffix.lower(), compression
    return compression, ""


def read_jsonl(path: Path, fail: Fail, blank: Callable[[], None]) -> Iterator[tuple[str, Record]]:
    """One JSON object per line, or the objects of one JSON array in a file that ends in `.json`.

    Lines of white space are allowed and told to `blank`. The objects of an array have the places `path[0]`, `path[1]`.
    """
    cursor = Cursor(path)
    return guarded(_jsonl(path, cursor, fail, blank), cursor, fail)


def read_csv(path: Path, fields: tuple[str, ...], fail: Fail) -> Iterator[tuple[str, Record]]:
    """Rows of a CSV file (`.tsv`: of tab-separated values) as mappings; its first row names the columns."""
    cursor = Cursor(path)
    return guarded(_csv(path, cursor, fields, fail), cursor, fail)


def read_text(path: Path, fail: Fail) -> Iterator[tuple[str, Record]]:
    """A whole file as one document."""
    cursor = Cursor(path)
    return guarded(_text(path, cursor, fail), cursor, fail)


def read_paragraphs(path: Path, fail: Fail) -> Iterator[tuple[str, Record]]:
    """Runs of lines between blank lines, each a document; one with undecodable bytes is left out whole."""
    cursor = Cursor(path)
    return guarded(_paragraphs(path, cursor, fail), cursor, fail)


def read_parquet(path: Path, fields: tuple[str, ...], fail: Fail) -> Iterator[tuple[str, Record]]:
    """Rows of a Parquet file, only the columns that `fields` (dotted paths) need, a few hundred rows at a time."""
    cursor = Cursor(path, 0, rows=True)
    return guarded(_parquet(path, cursor, fields, fail), cursor, fail, "Parquet")


def _jsonl(path: Path, cursor: Cursor, fail: Fail, blank: Callable[[], None]) -> Iterator[tuple[str, Record]]:
    if split_suffix(path)[0] == ".json":
        with open_binary(path) as file:
            head = file.peek(1).removeprefix(codecs.BOM_UTF8).lstrip()
        if head[:1] == b"[":
            yield from _json_array(path, cursor, fail)
            return
    for line in _lines(path, cursor, fail):
        place = str(cursor)
        if not line.strip():
            blank()
            continue
        text = _decode(line, place, fail)
        if text is None:
            continue
        try:
            record = json.loads(text)
        except (ValueError, RecursionError) as error:
            hint = _ONE_ARRAY if text.lstrip()[:1] == "[" else "; every line must be one whole JSON object"
            fail("broken_json", place, f"not valid JSON: {_json_fault(error)}{hint if cursor.number == 1 else ''}")
            continue
        if isinstance(record, dict):
            yield place, record
        else:
            hint = _ONE_ARRAY if isinstance(record, list) else ""
            fail("not_an_object", place, f"holds a JSON {_kind(record)}; every line must be a JSON object{hint}")


def _json_array(path: Path, cursor: Cursor, fail: Fail) -> Iterator[tuple[str, Record]]:
    """The objects of a file that holds one array, decoded one by one as the file is read."""
    cursor.number, cursor.rows = 0, True
    decoder = json.JSONDecoder()
    with open_binary(path) as file:
        text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
        held, at = text.read(_BLOCK), 0

        def refill() -> bool:
            nonlocal held, at
            more = text.read(max(_BLOCK, len(held) - at))
            held, at = held[at:] + more, 0
            return bool(more)

        at = _space(held, at) + 1  # past the bracket
        first, ended = True, False
        while True:
            at = _space(held, at)
            if at == len(held):
                if not refill():
                    raise EOFError("the JSON array has no end")
                continue
            if held[at] == "]" and (first or ended):
                if held[at + 1 :].strip() or text.read(_BLOCK).strip():
                    fail("broken_json", str(cursor), "there is more text after the end of the JSON array")
                return
            if ended:
                if held[at] != ",":
                    fail("broken_json", str(cursor), "no comma before this object of the JSON array; the rest is left")
                    return
                at, ended = at + 1, False
                continue
            try:
                value, end = decoder.raw_decode(held, at)
            except (ValueError, RecursionError) as error:
                ends_at = len(held)
                if _is_cut(error, ends_at - 16) and len(held) - at > DOCUMENT_BYTES:
                    _too_large(str(cursor), fail)
                    return
                if _is_cut(error, ends_at - 16) and refill():
                    continue
                if _is_cut(error, ends_at):
                    raise EOFError("the JSON array has no end") from None
                fail("broken_json", str(cursor), f"not valid JSON: {_json_fault(error)}; the rest is left out")
                return
            if end == len(held) and not isinstance(value, dict | list) and refill():
                continue
            if isinstance(value, dict):
                yield str(cursor), value
            else:
                fail("not_an_object", str(cursor), f"holds a JSON {_kind(value)}; a list must hold JSON objects")
            at, first, ended = end, False, True
            cursor.number += 1


def _space(text: str, at: int) -> int:
    """The first position from `at` on that is not white space."""
    found = _SPACE.match(text, at)
    assert found is not None
    return found.end()


def _is_cut(error: Exception, end: int) -> bool:
    """Whether a JSON value is faulty because the text ends within it: at `end` or later, or in a string."""
    return isinstance(error, json.JSONDecodeError) and (error.msg.startswith("Unterminated string") or error.pos >= end)


def _csv(path: Path, cursor: Cursor, fields: tuple[str, ...], fail: Fail) -> Iterator[tuple[str, Record]]:
    lines = (line.decode("utf-8", errors="surrogateescape") for line in _lines(path, cursor, fail))
    rows = csv.reader(lines, delimiter="\t" if split_suffix(path)[0] == ".tsv" else ",", strict=True)
    names: list[str] | None = None
    while True:
        place = f"{path}:{rows.line_num + 1}"
        try:
            row = next(rows, None)
        except csv.Error as error:
            fail("broken_csv", place, f"not valid CSV: {error}")
            continue
        if row is None:
            return
        if names is None:
            names = row
            if twice := sorted({name for name in names if name in fields and names.count(name) > 1}):
                fail("missing_field", place, f"the header names the column {twice[0]!r} twice; keep one of them")
                return
            continue
        if not row:
            continue
        if len(row) != len(names):
            fail("broken_csv", place, f"the row has {len(row)} cells and the header {len(names)}")
            continue
        record = dict(zip(names, row, strict=True))
        faulty = next((name for name in fields if not is_unicode(record.get(name, ""))), None)
        if faulty is not None:
            fail("undecodable", place, f"column {faulty!r} holds bytes that are not UTF-8")
            continue
        yield place, record


def _text(path: Path, cursor: Cursor, fail: Fail) -> Iterator[tuple[str, Record]]:
    blocks: list[bytes] = []
    with open_binary(path) as file:
        while block := file.read(_BLOCK):
            blocks.append(block)
            if len(blocks) > DOCUMENT_BYTES // _BLOCK:
                _too_large(str(cursor), fail)
                return
    data = b"".join(blocks)
    del blocks
    try:
        text = data.removeprefix(codecs.BOM_UTF8).decode("utf-8")
    except UnicodeDecodeError as error:
        start = error.start + (len(codecs.BOM_UTF8) if data.startswith(codecs.BOM_UTF8) else 0)
        cursor.number += data.count(b"\n", 0, start)
        fail("undecodable", str(cursor), f"byte 0x{data[start]:02x} at offset {start} is not UTF-8")
        return
    yield str(cursor), text


def _paragraphs(path: Path, cursor: Cursor, fail: Fail) -> Iterator[tuple[str, Record]]:
    lines: list[str] = []
    place = str(cursor)
    size = 0
    sound = True
    for line in _lines(path, cursor, fail):
        if not line.strip():
            if lines and sound:
                yield place, "".join(lines).rstrip("\r\n")
            lines, size, sound = [], 0, True
            continue
        if not lines and sound:
            place = str(cursor)
        size += len(line)
        if sound and size > DOCUMENT_BYTES:
            _too_large(place, fail)
            sound, lines = False, []
        text = _decode(line, str(cursor), fail) if sound else None
        if text is None:
            sound, lines = False, []
        else:
            lines.append(text)
    if lines and sound:
        yield place, "".join(lines).rstrip("\r\n")


def _parquet(path: Path, cursor: Cursor, fields: tuple[str, ...], fail: Fail) -> Iterator[tuple[str, Record]]:
    import pyarrow.parquet as pq  # noqa: PLC0415  (a quarter of a second, and most inputs are text)

    _check_parquet(path)
    with pq.ParquetFile(path, pre_buffer=False) as file:
        names = file.schema_arrow.names
        columns = sorted({name for wanted in fields for name in (wanted, wanted.split(".")[0]) if name in names})
        if not columns:
            fail("missing_field", str(path), f"has no column for {' or '.join(fields)}; it has {', '.join(names)}")
            return
        if twice := [name for name in columns if names.count(name) > 1]:
            fail(
                "missing_field", str(path), f"has {names.count(twice[0])} columns named {twice[0]!r}; keep one of them"
            )
            return
        for group in range(file.num_row_groups):
            size = _group_bytes(file, group, columns)
            rows = min(256, max(16, _PARQUET_BATCH_BYTES // max(size, 1)))
            for batch in file.iter_batches(batch_size=rows, row_groups=[group], columns=columns):
                for offset in range(batch.num_rows):
                    place = str(cursor)
                    try:
                        record = {name: batch.column(name)[offset].as_py() for name in columns}
                    except UnicodeDecodeError as error:
                        fail("undecodable", place, f"byte 0x{error.object[error.start]:02x} is not UTF-8")
                    except Exception as error:  # noqa: BLE001 - values beyond what Python's types hold, of any type
                        _fail(error, place, fail, "Parquet")
                    else:
                        yield place, record
                    cursor.number += 1


def _check_parquet(path: Path) -> None:
    with _regular(path) as raw:
        head = raw.read(4)
        raw.seek(-min(4, len(head)), os.SEEK_END)
        tail = raw.read(4)
    if head != b"PAR1":
        raise ValueError("it does not begin as Parquet files do; let its name end in the suffix of what it holds")
    if tail != b"PAR1":
        raise ValueError("it is cut off, or still being written: the index at its end is missing")


def _group_bytes(file: pq.ParquetFile, group: int, columns: list[str]) -> int:
    """Bytes of the wanted columns of a row group once they are decompressed.

    Raises:
        ValueError: so many more than are in the file that the group is a bomb.
    """
    facts = file.metadata.row_group(group)
    chunks = [facts.column(number) for number in range(facts.num_columns)]
    wanted = [chunk for chunk in chunks if chunk.path_in_schema.split(".")[0] in {c.split(".")[0] for c in columns}]
    size = sum(int(chunk.total_uncompressed_size) for chunk in wanted)
    _check_growth(size, sum(int(chunk.total_compressed_size) for chunk in wanted))
    return size


def open_binary(path: Path) -> io.BufferedReader:
    """Open a plain or compressed file of text for reading bytes; one that ends too early raises EOFError.

    Raises:
        ValueError: it is no regular file, or begins as something else than text, or than its suffix says.
    """
    compression = split_suffix(path)[1]
    raw = _regular(path)
    try:
        file = raw
        if compression:
            head = raw.peek(16)
            if head and not _COMPRESSED[compression].match(head):
                raise ValueError(f"it is not compressed as its name ({compression}) says")
            file = io.BufferedReader(_Decompressed(raw, compression), _BLOCK)
        head = file.peek(16)
        for pattern, what in _SIGNATURES:
            if pattern.match(head):
                raise ValueError(f"it holds {what}")
    except BaseException:
        raw.close()
        raise
    return file


def _regular(path: Path) -> io.BufferedReader:
    """Open a regular file; anything else, on which reading might wait for ever, is an error."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise ValueError("it is no regular file")
    return io.BufferedReader(io.FileIO(path), _BLOCK)


def _check_growth(size: int, compressed: int) -> None:
    if size > GROWTH_FROM and size > GROWTH * compressed:
        raise ValueError(
            f"{compressed:,} compressed bytes give {size:,} and more, over {GROWTH} times as many; if that is meant, "
            f"decompress the file first"
        )


class _Decompressed(io.RawIOBase):
    """A compressed file read as a stream, which ends with an error where it grows too much."""

    def __init__(self, raw: io.BufferedReader, compression: str) -> None:
        self._raw = raw
        self._size = 0
        kinds: dict[str, Callable[[Any], Any]] = {
            ".gz": lambda file: gzip.GzipFile(fileobj=file, mode="rb"),
            ".zst": _ZstdFile,
            ".xz": lzma.LZMAFile,
            ".bz2": bz2.BZ2File,
        }
        self._stream = kinds[compression](raw)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        # One read at a time: a longer one would lose what precedes the end of a truncated file.
        count: int = self._stream.readinto1(memoryview(buffer)[:_BLOCK])
        self._size += count
        _check_growth(self._size, self._raw.tell())
        return count

    def close(self) -> None:
        if not self.closed:
            self._raw.close()
        super().close()


class _ZstdFile:
    """A zstd file, several frames or one, that notices an end inside a frame (zstandard's own reader does not)."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._decompressor = zstandard.ZstdDecompressor(max_window_size=_WINDOW_BYTES)
        self._frame: zstandard.ZstdDecompressionObj | None = None
        self._input = b""
        self._output = memoryview(b"")

    def readinto1(self, buffer: Any) -> int:
        while not self._output:
            data = self._input or self._file.read(1 << 10)  # little, for it may hold 30 000 times its size
            self._input = b""
            if not data:
                if self._frame is not None:
                    raise EOFError("the zstd stream ends inside a frame")
                return 0
            if self._frame is None:
                self._frame = self._decompressor.decompressobj()
            self._output = memoryview(self._frame.decompress(data))
            if self._frame.eof:
                self._input = self._frame.unused_data
                self._frame = None
        count = min(len(buffer), len(self._output))
        buffer[:count] = self._output[:count]
        self._output = self._output[count:]
        return count


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


def _json_fault(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "its lists and objects are nested too deeply"
    if isinstance(error, json.JSONDecodeError):
        return str(error)
    return f"a number has more than {sys.get_int_max_str_digits():,} digits"


def _kind(value: Any) -> str:
    names = {type(None): "null", bool: "boolean", int: "number", float: "number", str: "string", list: "array"}
    return names[type(value)]
