"""Documents kept on disk between the steps of preparation: read once, gone through as often as needed.

A spool is one Parquet file of documents, each with its digest, size and label. It is written and read in batches, so
that memory does not depend on its length, and a step that needs digests alone does not read the texts.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from weftlm.corpora.source import Document
from weftlm.files import sweep, whole

NO_LABEL = np.iinfo(np.uint32).max
_FILE = "documents.parquet"
_LABELS = "labels"
_SCHEMA = pa.schema(
    {
        "digest": pa.binary(16),
        "bytes": pa.uint64(),
        "label": pa.uint32(),
        "text": pa.large_string(),
        "origin": pa.binary(),
        "prompt": pa.uint64(),
    }
)
_BATCH_DOCUMENTS, _BATCH_BYTES = 4096, 1 << 23


class SpoolWriter:
    """Appends documents; use as a context manager. The file appears at the end, when all is on disk.

    Args:
        folder: Folder of the spool.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._stack = ExitStack()
        self._labels: dict[str, int] = {}
        self._rows: list[dict[str, Any]] = []
        self._bytes = 0

    def __enter__(self) -> SpoolWriter:
        self._folder.mkdir(parents=True, exist_ok=True)
        sweep(self._folder)
        temporary = self._stack.enter_context(whole(self._folder / _FILE))
        file = self._stack.enter_context(temporary.open("wb"))
        self._writer = self._stack.enter_context(
            pq.ParquetWriter(file, _SCHEMA, compression="zstd", write_statistics=False)
        )
        return self

    def add(self, document: Document) -> None:
        """Append one document."""
        label = NO_LABEL if document.label is None else self._labels.setdefault(document.label, len(self._labels))
        size = len(document.text.encode("utf-8"))
        self._rows.append(
            {
                "digest": document.digest(),
                "bytes": size,
                "label": label,
                "text": document.text,
                "origin": document.origin.encode("utf-8", "surrogatepass"),
                "prompt": document.prompt,
            }
        )
        self._bytes += size
        if len(self._rows) == _BATCH_DOCUMENTS or self._bytes > _BATCH_BYTES:
            self._flush()

    def _flush(self) -> None:
        self._writer.write_table(pa.Table.from_pylist(self._rows, _SCHEMA))
        self._rows, self._bytes = [], 0

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is None:
            with self._stack:
                self._flush()
                self._writer.add_key_value_metadata({_LABELS: json.dumps(list(self._labels))})
        else:
            self._stack.__exit__(kind, error, at)


class Spool:
    """A finished spool.

    Attributes:
        labels: Names of the labels, by number.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / _FILE
        with self._path.open("rb") as file:
            facts = pq.read_metadata(file)
        self._documents: int = facts.num_rows
        self.labels: list[str] = json.loads(facts.metadata[_LABELS.encode()])

    def __len__(self) -> int:
        return self._documents

    def __iter__(self) -> Iterator[Document]:
        for batch in self._batches("text", "origin", "label", "prompt"):
            for text, origin, label, prompt in zip(*(column.to_pylist() for column in batch), strict=True):
                name = None if label == NO_LABEL else self.labels[label]
                yield Document(text, origin.decode("utf-8", "surrogatepass"), name, prompt)

    def label_numbers(self) -> Iterator[NDArray[np.uint32]]:
        """Number of the label of every document (`NO_LABEL` where there is none), some thousands at a time."""
        for (labels,) in self._batches("label"):
            yield labels.to_numpy()

    def digests(self) -> Iterator[tuple[bytes, int]]:
        """Digest and UTF-8 bytes of every document."""
        for digests, sizes in self._batches("digest", "bytes"):
            yield from zip(digests.to_pylist(), sizes.to_pylist(), strict=True)

    def _batches(self, *columns: str) -> Iterator[list[Any]]:
        with self._path.open("rb") as raw, pq.ParquetFile(raw) as file:
            for group in range(file.num_row_groups):  # of a few MB each: a batch may span several
                for batch in file.iter_batches(_BATCH_DOCUMENTS, row_groups=[group], columns=list(columns)):
                    yield [batch.column(name) for name in columns]


class Numbers:
    """One number per document of a spool in a flat file: which domain it is in."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def write(self, batches: Iterable[NDArray[Any]]) -> None:
        """Write batch after batch; the file appears when all is on disk."""
        with whole(self._path) as temporary, temporary.open("wb") as file:
            for batch in batches:
                file.write(batch.astype("<u4").tobytes())

    def exists(self) -> bool:
        """Whether they have been written."""
        return self._path.exists()

    def __iter__(self) -> Iterator[int]:
        with self._path.open("rb") as file:
            while block := file.read(4 * _BATCH_DOCUMENTS):
                yield from np.frombuffer(block, dtype="<u4").tolist()
