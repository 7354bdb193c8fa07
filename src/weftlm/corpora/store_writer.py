"""Writing token stores: one per label, thousands at once, in bounded memory; from tokens, or from documents."""

from __future__ import annotations

import math
import os
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from weftlm.corpora.labels import folder_name
from weftlm.corpora.source import Document
from weftlm.corpora.store import (
    DOCUMENT,
    DOCUMENTS,
    FORMAT,
    INDEX,
    PROMPT,
    PROMPTS,
    STORES,
    TOKENS,
    TokenStore,
    Vocabulary,
    open_stores,
)  # fmt: skip
from weftlm.corpora.tokens import Tokenizer
from weftlm.errors import DataError
from weftlm.files import checksum, describe, whole_folder, write_object

_OVERHEAD = 128
"""Bytes of the objects that hold a row of a file in memory, beside the row."""


@contextmanager
def write_stores(path: str | Path, vocabulary: Vocabulary, *, buffer_bytes: int = 64 << 20) -> Iterator[StoreWriter]:
    """Give a writer of token stores, one per label, into a folder that appears whole at the end or not at all.

        with write_stores(folder, tokenizer.vocabulary) as writer:
            writer.append(token_ids, text_bytes=120, label="code")
        stores = open_stores(folder)

    Args:
        path: Folder to write, new.
        vocabulary: Size, end-of-document id and fingerprint of the tokenizer.
        buffer_bytes: Memory for tokens not yet on disk, over all stores.
    Raises:
        ConfigError: The folder holds something already.
        CheckpointError: The disk is full.
        DataError: No document was appended.
    """
    with whole_folder(Path(path), "token stores") as folder:
        writer = StoreWriter(folder, vocabulary, buffer_bytes)
        yield writer
        if not writer.documents:
            raise DataError(f"token stores {path} would hold no document")
        writer.close()


class StoreWriter:
    """What `write_stores` gives.

    Attributes:
        documents: Documents appended so far over all stores.
        waiting_bytes: Memory of what is not on disk yet.
    """

    def __init__(self, folder: Path, vocabulary: Vocabulary, buffer_bytes: int) -> None:
        self._folder, self._vocabulary, self._buffer_bytes = folder, vocabulary, buffer_bytes
        self._counts: dict[str, dict[str, int]] = {}  # by label, as in the index
        self._names: dict[str, str] = {}
        self._examples: dict[str, bool] = {}
        self._waiting: defaultdict[Path, list[bytes]] = defaultdict(list)
        self.documents = self.waiting_bytes = 0

    def append(
        self, tokens: ArrayLike, text_bytes: int, label: str, origin: str = "", prompt: tuple[int, int] | None = None
    ) -> None:
        """Append one document; the end-of-document token is added here.

        Args:
            tokens: Token ids without special tokens, shape (tokens,).
            text_bytes: Length of the document's text in UTF-8 bytes.
            label: Store it goes to.
            origin: Where the document came from, for messages.
            prompt: Of an example, how many of the tokens, and of the bytes, are its prompt's.
        Raises:
            DataError: An id is outside the vocabulary, some documents of a store are examples and some not, or two
                labels differ in case only.
        """
        ids = np.asarray(tokens)
        if ids.ndim != 1 or (len(ids) and ids.dtype.kind not in "iu"):
            raise DataError(f"document {origin}: tokens must be a row of integers, not {ids.dtype} {ids.shape}")
        if len(ids) and (int(ids.min()) < 0 or int(ids.max()) >= self._vocabulary.size):
            raise DataError(
                f"document {origin}: token ids {int(ids.min())} .. {int(ids.max())} do not fit a vocabulary of "
                f"{self._vocabulary.size}; was it encoded with another tokenizer?"
            )
        name = folder_name(label)
        if self._names.setdefault(name.casefold(), label) != label:
            raise DataError(f"label {label!r} would share its folder {name!r} with another label; rename one of them")
        if self._examples.setdefault(label, prompt is not None) != (prompt is not None):
            raise DataError(
                f"document {origin} has {'no' if prompt is None else 'a'} prompt, unlike those before it in domain "
                f"{name}; the documents of a domain must all be examples, or none: set prompt_field on all of its "
                "corpora, or on none"
            )
        counts = self._counts.setdefault(label, {"documents": 0, "tokens": 0, "bytes": 0})
        counts["documents"] += 1
        counts["tokens"] += len(ids) + 1
        counts["bytes"] += int(text_bytes)
        self._wait(name, TOKENS, np.append(ids, self._vocabulary.eos_id).astype(self._vocabulary.dtype))
        self._wait(name, DOCUMENTS, np.array((counts["tokens"], int(text_bytes)), DOCUMENT))
        if prompt is not None:
            self._wait(name, PROMPTS, np.array(prompt, PROMPT))
        self.documents += 1
        if self.waiting_bytes >= self._buffer_bytes:
            self._flush()

    def tokens(self, label: str) -> int:
        """Tokens appended so far to one store, those that close documents included."""
        return self._counts[label]["tokens"] if label in self._counts else 0

    def close(self) -> None:
        """Put everything on disk, an index into each store, and the list of the labels beside them.

        The fingerprint of a store follows tokenizer and contents, not their way here.
        """
        self._flush()
        made_with = self._vocabulary.fingerprint
        for label, counts in self._counts.items():
            folder = self._folder / folder_name(label)
            files = [folder / name for name in (TOKENS, DOCUMENTS, PROMPTS)]
            index = {
                "format": FORMAT,
                "tokenizer": made_with,
                "vocab_size": self._vocabulary.size,
                "eos_id": self._vocabulary.eos_id,
                **counts,
                "fingerprint": checksum([made_with, *(describe(file)["blake2b"] for file in files if file.exists())]),
            }
            write_object(folder / INDEX, index)
        write_object(self._folder / STORES, {"labels": sorted(self._counts)})
        os.sync()  # one flush of everything is far cheaper than thousands of single ones

    def _wait(self, folder: str, file: str, row: NDArray[Any]) -> None:
        self._waiting[self._folder / folder / file].append(row.tobytes())
        self.waiting_bytes += row.nbytes + _OVERHEAD

    def _flush(self) -> None:
        """Append to the files what waits, one file open at a time."""
        for path, rows in self._waiting.items():
            path.parent.mkdir(exist_ok=True)
            with open(path, "ab") as file:
                file.write(b"".join(rows))
        self._waiting.clear()
        self.waiting_bytes = 0


# -- from documents -----------------------------------------------------------------------------------------------

EncodedDocument = tuple[NDArray[np.uint32], tuple[int, int] | None]
"""A document's token ids, and of an example how many of its tokens and of its UTF-8 bytes are the prompt's."""


def encode_documents(tokenizer: Tokenizer, documents: Sequence[Document]) -> list[EncodedDocument]:
    """Encode documents; the prompt and the target of an example apart, so that no token spans both."""
    parts = [[d.text] if d.prompt is None else [d.text[: d.prompt], d.text[d.prompt :]] for d in documents]
    encoded = iter(tokenizer.encode_batch([text for texts in parts for text in texts]))
    found: list[EncodedDocument] = []
    for texts in parts:
        ids = [next(encoded) for _ in texts]
        prompt = (len(ids[0]), len(texts[0].encode("utf-8"))) if len(texts) == 2 else None
        found.append((np.concatenate(ids), prompt))
    return found


def tokenise_by_label(
    documents: Iterable[Document],
    tokenizer: Tokenizer,
    path: str | Path,
    *,
    limits: Mapping[str, int] | None = None,
    lossy: Collection[str] = (),
    batch_bytes: int = 2 << 20,
    progress: Callable[[int], None] | None = None,
) -> dict[str, TokenStore]:
    """Write one token store per label from a stream of documents.

    Memory depends on `batch_bytes` and on the longest document, not on the length of the stream. The folder appears
    when all of it is on disk; interrupted work begins again.

    Args:
        documents: Stream of documents.
        tokenizer: Tokenizer to encode with.
        path: Folder of the stores, new.
        limits: Largest number of tokens by label; the document that would exceed it is cut, an example left out.
        lossy: Labels of which the tokens do not hold the text; 0 bytes are noted for their documents.
        batch_bytes: UTF-8 bytes encoded at a time.
        progress: Called after every batch with the UTF-8 bytes encoded so far.
    Raises:
        DataError: There are no documents, or one has no label. An error out of the stream itself passes through.
        ConfigError: The folder holds something already.
    """
    encoded = 0
    with write_stores(path, tokenizer.vocabulary) as writer:
        for batch in _batches(documents, batch_bytes):
            for document, (tokens_N, prompt) in zip(batch, encode_documents(tokenizer, batch), strict=True):
                if document.label is None:
                    raise DataError(f"document {document.origin} has no label; set label, label_field or label_from")
                size = len(document.text.encode("utf-8"))
                encoded += size
                if document.label in lossy:
                    size, prompt = 0, None if prompt is None else (prompt[0], 0)
                left = (limits or {}).get(document.label, math.inf) - writer.tokens(document.label)
                if left > len(tokens_N) or (left >= 1 and prompt is None):
                    kept_N = tokens_N[: int(min(len(tokens_N), left - 1))]
                    writer.append(kept_N, size, document.label, document.origin, prompt)
            if progress is not None:
                progress(encoded)
    return open_stores(path, verify=False)


def _batches(documents: Iterable[Document], batch_bytes: int) -> Iterator[list[Document]]:
    """Documents to encode together."""
    total = 0

    def number(document: Document) -> int:
        nonlocal total
        total += len(document.text.encode("utf-8")) + 64
        return total // batch_bytes

    return (list(batch) for _, batch in groupby(documents, number))
