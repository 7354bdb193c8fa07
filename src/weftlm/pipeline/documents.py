"""The documents of a preparation, read once into one Parquet file.

Texts stay on disk and are streamed, as often as needed; what a choice of documents looks at (set, digest, size, label)
is held in memory, about 60 bytes per document.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from weftlm.corpora.source import Document
from weftlm.domains.split import positions
from weftlm.pipeline.data_config import SETS

_SCHEMA = pa.schema(
    {
        "set": pa.uint8(),
        "digest": pa.binary(16),
        "bytes": pa.int64(),
        "label": pa.binary(),
        "text": pa.large_string(),
        "origin": pa.binary(),
        "prompt": pa.uint64(),
    }
)
_BATCH_DOCUMENTS, _BATCH_BYTES = 4096, 1 << 23


def write_documents(path: Path, documents: Iterable[tuple[str, Document]]) -> None:
    """Write a stream of documents, each with the name of its set, some megabytes at a time."""
    with path.open("wb") as file, pq.ParquetWriter(file, _SCHEMA, compression="zstd", write_statistics=False) as writer:
        rows: list[dict[str, Any]] = []
        waiting = 0
        for name, document in documents:
            size = len(document.text.encode("utf-8"))
            label = None if document.label is None else _encoded(document.label)
            facts = {"set": SETS.index(name), "digest": document.digest(), "bytes": size, "label": label}
            text = {"text": document.text, "origin": _encoded(document.origin), "prompt": document.prompt}
            rows.append({**facts, **text})
            waiting += size
            if len(rows) == _BATCH_DOCUMENTS or waiting > _BATCH_BYTES:
                writer.write_table(pa.Table.from_pylist(rows, _SCHEMA))
                rows, waiting = [], 0
        writer.write_table(pa.Table.from_pylist(rows, _SCHEMA))


class Documents:
    """Documents that `write_documents` wrote, in order.

    Attributes:
        set_N: Number of each document's set in `SETS`.
        digests: `Document.digest()` of each.
        bytes_N: UTF-8 bytes of its text.
        label_N: Number of its label in `labels`; -1 where it has none.
        labels: Names of the labels.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        with path.open("rb") as raw, pq.ParquetFile(raw) as file:  # a path with a colon would be read as a URI
            table = file.read(["set", "digest", "bytes", "label"])
        self.set_N: NDArray[np.uint8] = table["set"].to_numpy()
        self.bytes_N: NDArray[np.int64] = table["bytes"].to_numpy()
        labels = table["label"].combine_chunks().dictionary_encode()
        self.labels = [_decoded(label) for label in labels.dictionary.to_pylist()]
        self.label_N: NDArray[np.int64] = labels.indices.fill_null(-1).to_numpy().astype(np.int64)
        self.digests: list[bytes] = table["digest"].to_pylist()

    def __len__(self) -> int:
        return len(self.set_N)

    def of(self, name: str) -> NDArray[np.bool_]:
        """Which documents are of a set."""
        found: NDArray[np.bool_] = self.set_N == SETS.index(name)
        return found

    def positions(self, seed: int, purpose: str) -> NDArray[np.uint64]:
        """The position of every document in the order of one choice; see `weftlm.domains.split`."""
        return positions(self.digests, seed, purpose)

    def stream(self, chosen_N: NDArray[np.bool_]) -> Iterator[tuple[int, Document]]:
        """The chosen documents in order, each with its number."""
        start = 0
        with self._path.open("rb") as raw, pq.ParquetFile(raw) as file:
            for group in range(file.num_row_groups):  # of a few MB each: a batch may span several
                rows = file.metadata.row_group(group).num_rows
                numbers = np.flatnonzero(chosen_N[start : start + rows])
                if len(numbers):
                    (batch,) = file.iter_batches(rows, [group], ["label", "text", "origin", "prompt"])
                    for number, row in zip(numbers.tolist(), batch.take(pa.array(numbers)).to_pylist(), strict=True):
                        label = None if row["label"] is None else _decoded(row["label"])
                        yield start + number, Document(row["text"], _decoded(row["origin"]), label, row["prompt"])
                start += rows


def _encoded(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _decoded(text: bytes) -> str:
    return text.decode("utf-8", "surrogatepass")
