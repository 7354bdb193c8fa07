"""Documents kept on disk between the steps of preparation: read once, gone through as often as needed.

A spool is one compressed file of texts and one flat file of facts (digest, size, label), in the same order. Both are
written and read as streams, so memory does not depend on their length.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType

import numpy as np
import zstandard
from numpy.typing import NDArray

from weftlm.corpora.source import Document
from weftlm.errors import DataError
from weftlm.files import whole, write_whole

NO_LABEL = np.iinfo(np.uint32).max
FACTS = np.dtype([("digest", "V16"), ("bytes", "<u8"), ("label", "<u4")])
_FACTS_AT_A_TIME = 4096


class SpoolWriter:
    """Appends documents; use as a context manager. The spool counts only once `labels.json` is written, at the end.

    Args:
        folder: where to put it; emptied files of an interrupted run are overwritten.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        (folder / "labels.json").unlink(missing_ok=True)
        self._labels: dict[str, int] = {}
        self._facts: list[tuple[bytes, int, int]] = []
        self.documents = self.bytes = 0

    def __enter__(self) -> SpoolWriter:
        self._facts_file = (self._folder / "facts.bin").open("wb")
        self._raw = (self._folder / "texts.zst").open("wb")
        self._texts = io.TextIOWrapper(zstandard.ZstdCompressor(level=1).stream_writer(self._raw), encoding="utf-8")
        return self

    def add(self, document: Document) -> None:
        """Append one document.

        Raises:
            DataError: the disk is full.
        """
        label = NO_LABEL if document.label is None else self._labels.setdefault(document.label, len(self._labels))
        size = len(document.text.encode("utf-8"))
        self._facts.append((document.digest(), size, label))
        self.documents += 1
        self.bytes += size
        try:
            prompt = [] if document.prompt is None else [document.prompt]
            self._texts.write(json.dumps([document.text, document.origin, document.label, *prompt]) + "\n")
            if len(self._facts) == _FACTS_AT_A_TIME:
                self._flush()
        except OSError as error:
            raise DataError(f"cannot write {self._folder}: {error.strerror}; free some space and run again") from error

    def _flush(self) -> None:
        self._facts_file.write(np.array(self._facts, dtype=FACTS).tobytes())
        self._facts = []

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            if kind is None:
                self._flush()
            self._texts.close()
        except OSError as problem:
            raise DataError(
                f"cannot write {self._folder}: {problem.strerror}; free some space and run again"
            ) from problem
        finally:
            self._raw.close()
            self._facts_file.close()
        if kind is None:
            write_whole(self._folder / "labels.json", json.dumps(list(self._labels)))


class Spool:
    """A finished spool.

    Attributes:
        labels: label names, by number.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.labels: list[str] = json.loads((folder / "labels.json").read_text(encoding="utf-8"))

    @staticmethod
    def is_finished(folder: Path) -> bool:
        """Whether a writer finished there."""
        return (folder / "labels.json").exists()

    def __len__(self) -> int:
        return (self._folder / "facts.bin").stat().st_size // FACTS.itemsize

    def __iter__(self) -> Iterator[Document]:
        with (self._folder / "texts.zst").open("rb") as raw:
            stream = zstandard.ZstdDecompressor().stream_reader(raw)
            for line in io.TextIOWrapper(stream, encoding="utf-8"):
                yield Document(*json.loads(line))

    def facts(self) -> Iterator[NDArray[np.void]]:
        """Records of digest, bytes and label number (`NO_LABEL` where there is none), some thousands at a time."""
        with (self._folder / "facts.bin").open("rb") as file:
            while block := file.read(FACTS.itemsize * _FACTS_AT_A_TIME):
                yield np.frombuffer(block, dtype=FACTS)

    def digests(self) -> Iterator[tuple[bytes, int]]:
        """Digest and UTF-8 bytes of every document."""
        for block in self.facts():
            yield from zip((digest.tobytes() for digest in block["digest"]), block["bytes"].tolist(), strict=True)


class Numbers:
    """One number per document of a spool in a flat file: which domain it is in."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def write(self, batches: Iterable[NDArray[np.int64]]) -> None:
        """Write batch after batch; the file appears when all is on disk."""
        with whole(self._path) as temporary, temporary.open("wb") as file:
            for batch in batches:
                file.write(batch.astype("<u4").tobytes())

    def exists(self) -> bool:
        """Whether they have been written."""
        return self._path.exists()

    def __iter__(self) -> Iterator[int]:
        with self._path.open("rb") as file:
            while block := file.read(4 * _FACTS_AT_A_TIME):
                yield from np.frombuffer(block, dtype="<u4").tolist()
