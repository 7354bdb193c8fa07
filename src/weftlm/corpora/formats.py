"""Records out of files: JSON Lines, text, Parquet, plain or compressed, in memory that does not grow with the file.

Every reader yields `(place, record)`, where the place is `path:line` or `path[row]` and the record is either the text
itself or a mapping that holds it. Faults go to the report, which counts them or raises.
"""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, cast

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from weftlm.corpora.reading_report import Reason

Record = str | Mapping[str, Any]
Fail = Callable[[Reason, str, str], None]
"""Called with reason, place and detail; returns when the record is to be skipped, raises when reading stops."""

JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
TEXT_SUFFIXES = (".txt", ".text", ".md", ".rst", ".tex", ".log")
PARQUET_SUFFIXES = (".parquet", ".pq")
CODE_SUFFIXES = tuple(
    ".bash .c .cc .clj .cpp .cs .cu .cuh .css .cxx .dart .erl .ex .exs .f90 .fs .go .h .hh .hpp .hs .html .java .jl .js"
    " .jsx .kt .lean .lisp .lua .m .ml .mli .nim .php .pl .proto .ps1 .py .pyi .pyx .r .rb .rs .scala .scm .sh .sql"
    " .svelte .swift .toml .ts .tsx .v .vhd .vue .xml .yaml .yml .zig".split()
)
COMPRESSIONS = (".gz", ".zst")

_BOM = b"\xef\xbb\xbf"
_BLOCK = 1 << 20


def split_suffix(path: Path) -> tuple[str, str]:
    """The format suffix and the compression suffix of a file, lower case: `a.jsonl.gz` gives `.jsonl`, `.gz`."""
    compression = path.suffix.lower()
    if compression in COMPRESSIONS:
        return Path(path.stem).suffix.lower(), compression
    return compression, ""


def read_jsonl(path: Path, fail: Fail, blank: Callable[[], None]) -> Iterator[tuple[str, Record]]:
    """One JSON object per line; lines of white space are allowed and told to `blank`."""
    for number, line in _lines(path, fail):
        place = f"{path}:{number}"
        if not line.strip():
            blank()
            continue
        text = _decode(line, place, fail)
        if text is None:
            continue
        try:
            record = json.loads(text)
        except (ValueError, RecursionError) as error:
            hint = "; every line must be one whole JSON object" if number == 1 else ""
            fail("broken_json", place, f"not valid JSON: {error}{hint}")
            continue
        if isinstance(record, dict):
            yield place, record
        else:
            fail("not_an_object", place, f"holds a JSON {_kind(record)}; every line must be a JSON object")


def read_text(path: Path, fail: Fail) -> Iterator[tuple[str, Record]]:
    """A whole file as one document."""
    try:
        with open_binary(path) as file:
            data = file.read()
    except (EOFError, OSError, zlib.error, zstandard.ZstdError) as error:
        _fail_file(path, f"{path}:1", error, fail)
        return
    try:
        yield f"{path}:1", data.removeprefix(_BOM).decode("utf-8")
    except UnicodeDecodeError as error:
        start = error.start + (len(_BOM) if data.startswith(_BOM) else 0)
        line = data.count(b"\n", 0, start) + 1
        fail("undecodable", f"{path}:{line}", f"byte 0x{data[start]:02x} at offset {start} is not UTF-8")


def read_paragraphs(path: Path, fail: Fail) -> Iterator[tuple[str, Record]]:
    """Runs of lines between blank lines, each a document; one with undecodable bytes is left out whole."""
    lines: list[str] = []
    start = 1
    sound = True
    for number, line in _lines(path, fail):
        if not line.strip():
            if lines and sound:
                yield f"{path}:{start}", "".join(lines).rstrip("\r\n")
            lines, sound = [], True
            continue
        if not lines and sound:
            start = number
        text = _decode(line, f"{path}:{number}", fail) if sound else None
        if text is None:
            sound, lines = False, []
        else:
            lines.append(text)
    if lines and sound:
        yield f"{path}:{start}", "".join(lines).rstrip("\r\n")


def read_parquet(path: Path, fields: tuple[str, ...], fail: Fail) -> Iterator[tuple[str, Record]]:
    """Rows of a Parquet file, only the columns that `fields` (dotted paths) need, a few hundred rows at a time."""
    row = 0
    try:
        with pq.ParquetFile(path, pre_buffer=False) as file:
            names = file.schema_arrow.names
            columns = sorted({name for wanted in fields for name in (wanted, wanted.split(".")[0]) if name in names})
            if not columns:
                fail("missing_field", str(path), f"has no column for {' or '.join(fields)}; it has {', '.join(names)}")
                return
            for batch in file.iter_batches(batch_size=256, columns=columns):
                for offset in range(batch.num_rows):
                    place = f"{path}[{row}]"
                    row += 1
                    try:
                        record = {name: batch.column(name)[offset].as_py() for name in columns}
                    except UnicodeDecodeError as error:
                        fail("undecodable", place, f"byte 0x{error.object[error.start]:02x} is not UTF-8")
                        continue
                    yield place, record
    except (pa.ArrowException, OSError) as error:
        fail("unreadable", f"{path}[{row}]", f"cannot be read as Parquet: {str(error).splitlines()[0]}")


def open_binary(path: Path) -> IO[bytes]:
    """Open a plain, gzip or zstd file for reading bytes; a file that ends too early raises EOFError."""
    compression = split_suffix(path)[1]
    if compression == ".gz":
        return cast(IO[bytes], gzip.open(path, "rb"))
    if compression == ".zst":
        return io.BufferedReader(_ZstdFile(open(path, "rb")), _BLOCK)
    return open(path, "rb", buffering=_BLOCK)


class _ZstdFile(io.RawIOBase):
    """A zstd file, several frames or one, that notices an end inside a frame (zstandard's own reader does not)."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._decompressor = zstandard.ZstdDecompressor()
        self._frame: zstandard.ZstdDecompressionObj | None = None
        self._input = b""
        self._output = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
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

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()


def _lines(path: Path, fail: Fail) -> Iterator[tuple[int, bytes]]:
    """Numbered lines with their ends; what is wrong with the file goes to `fail` with the line it happened at."""
    number = 0
    try:
        with open_binary(path) as file:
            for number, line in enumerate(file, start=1):
                yield number, line.removeprefix(_BOM) if number == 1 else line
    except (EOFError, OSError, zlib.error, zstandard.ZstdError) as error:
        _fail_file(path, f"{path}:{number + 1}", error, fail)


def _fail_file(path: Path, place: str, error: Exception, fail: Fail) -> None:
    if isinstance(error, EOFError):
        fail("truncated", place, f"{path.name} ends too early ({error}); the rest of the file is missing")
    else:
        detail = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        fail("unreadable", place, f"cannot be read: {detail}")


def _decode(line: bytes, place: str, fail: Fail) -> str | None:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        fail("undecodable", place, f"byte 0x{line[error.start]:02x} at column {error.start + 1} is not UTF-8")
        return None


def _kind(value: Any) -> str:
    names = {type(None): "null", bool: "boolean", int: "number", float: "number", str: "string", list: "array"}
    return names[type(value)]
