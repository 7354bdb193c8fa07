"""Writing token stores: one per label, thousands at once, in bounded memory; from tokens, or from documents."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
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

_OVERHEAD = 3 * 64 + 2 * 96
"""Bytes of the objects that hold a document in memory, beside its tokens."""


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
        bytes: UTF-8 bytes of their text.
        waiting_bytes: Memory of what is not on disk yet.
    """

    def __init__(self, folder: Path, vocabulary: Vocabulary, buffer_bytes: int) -> None:
        self._folder, self._vocabulary, self._buffer_bytes = folder, vocabulary, buffer_bytes
        self._stores: dict[str, _GrowingStore] = {}
        self._names: set[str] = set()
        self.documents = self.bytes = self.waiting_bytes = 0

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
            DataError: An id is outside the vocabulary, or some documents of a store are examples and some not.
        """
        store = self._stores.get(label) or self._open(label)
        self.waiting_bytes += store.append(tokens, text_bytes, origin, prompt)
        self.documents += 1
        self.bytes += text_bytes
        if self.waiting_bytes >= self._buffer_bytes:
            for each in self._stores.values():
                each.flush()
            self.waiting_bytes = 0

    def close(self) -> None:
        """Put everything on disk, an index into each store, and the list of the labels beside them."""
        for store in self._stores.values():
            store.close()
        write_object(self._folder / STORES, {"labels": sorted(self._stores)})
        os.sync()  # one flush of everything is far cheaper than thousands of single ones

    def _open(self, label: str) -> _GrowingStore:
        name = folder_name(label)
        if name.casefold() in self._names:
            raise DataError(f"label {label!r} would share its folder {name!r} with another label; rename one of them")
        self._names.add(name.casefold())
        self._stores[label] = _GrowingStore(self._folder / name, self._vocabulary)
        return self._stores[label]


class _GrowingStore:
    """One store while it is written: rows of its files that wait in memory."""

    def __init__(self, folder: Path, vocabulary: Vocabulary) -> None:
        folder.mkdir()
        self._folder, self._vocabulary = folder, vocabulary
        self._documents = self._tokens = self._bytes = 0
        self._examples: bool | None = None
        self._eos = np.array([vocabulary.eos_id], dtype=vocabulary.dtype)
        self._waiting: dict[str, list[NDArray[Any]]] = {TOKENS: [], DOCUMENTS: [], PROMPTS: []}

    def append(self, tokens: ArrayLike, text_bytes: int, origin: str, prompt: tuple[int, int] | None) -> int:
        """Append a document; returns the bytes of memory it takes until `flush`."""
        ids = np.asarray(tokens)
        if ids.ndim != 1 or (len(ids) and ids.dtype.kind not in "iu"):
            raise DataError(f"document {origin}: tokens must be a row of integers, not {ids.dtype} {ids.shape}")
        if len(ids) and (int(ids.min()) < 0 or int(ids.max()) >= self._vocabulary.size):
            raise DataError(
                f"document {origin}: token ids {int(ids.min())} .. {int(ids.max())} do not fit a vocabulary of "
                f"{self._vocabulary.size}; was it encoded with another tokenizer?"
            )
        if self._examples not in (None, prompt is not None):
            raise DataError(
                f"document {origin} has {'no' if prompt is None else 'a'} prompt, unlike those before it in domain "
                f"{self._folder.name}; the documents of a domain must all be examples, or none: set prompt_field on "
                "all of its corpora, or on none"
            )
        self._examples = prompt is not None
        if prompt is not None:
            self._waiting[PROMPTS].append(np.array([prompt], dtype=PROMPT))
        self._tokens += len(ids) + 1
        self._bytes += int(text_bytes)
        self._documents += 1
        self._waiting[TOKENS] += [ids.astype(self._vocabulary.dtype), self._eos]
        self._waiting[DOCUMENTS].append(np.array([(self._tokens, int(text_bytes))], dtype=DOCUMENT))
        return (len(ids) + 1) * self._vocabulary.dtype.itemsize + _OVERHEAD

    def flush(self) -> None:
        """Append to the files what waits."""
        for name, rows in self._waiting.items():
            if rows:
                with open(self._folder / name, "ab") as file:
                    file.write(np.concatenate(rows).tobytes())
                rows.clear()

    def close(self) -> None:
        """Write what waits, and the index. The fingerprint follows tokenizer and contents, not their way here."""
        self.flush()
        digests = [describe(self._folder / name)["blake2b"] for name in self._waiting if (self._folder / name).exists()]
        index = {
            "format": FORMAT,
            "tokenizer": self._vocabulary.fingerprint,
            "vocab_size": self._vocabulary.size,
            "eos_id": self._vocabulary.eos_id,
            "documents": self._documents,
            "tokens": self._tokens,
            "bytes": self._bytes,
            "fingerprint": checksum([self._vocabulary.fingerprint, *digests]),
        }
        write_object(self._folder / INDEX, index)


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
        batch_bytes: UTF-8 bytes encoded at a time.
        progress: Called after every batch with the UTF-8 bytes encoded so far.
    Raises:
        DataError: There are no documents, or one has no label. An error out of the stream itself passes through.
        ConfigError: The folder holds something already.
    """
    with write_stores(path, tokenizer.vocabulary) as writer:
        for batch in _batches(documents, batch_bytes):
            for document, (tokens_N, prompt) in zip(batch, encode_documents(tokenizer, batch), strict=True):
                if document.label is None:
                    raise DataError(
                        f"document {document.origin or '(no origin)'} has no label; set label, label_field or "
                        f"label_from"
                    )
                size = len(document.text.encode("utf-8"))
                writer.append(tokens_N, size, document.label, document.origin, prompt)
            if progress is not None:
                progress(writer.bytes)
    return open_stores(path, verify=False)


def _batches(documents: Iterable[Document], batch_bytes: int) -> Iterator[list[Document]]:
    """Documents to encode together."""
    batch: list[Document] = []
    total = 0
    for document in documents:
        batch.append(document)
        total += len(document.text.encode("utf-8")) + 64
        if total >= batch_bytes:
            yield batch
            batch, total = [], 0
    if batch:
        yield batch
