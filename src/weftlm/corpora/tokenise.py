"""Documents to token stores: encoded in parallel, in constant memory, resumed after an interruption."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from weftlm.corpora.source import Document
from weftlm.corpora.store import TokenStore, open_stores
from weftlm.corpora.store_writer import StoreWriter
from weftlm.corpora.tokens import Tokenizer
from weftlm.errors import DataError

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
    commit_bytes: int = 128 << 20,
    progress: Callable[[int], None] | None = None,
) -> dict[str, TokenStore]:
    """Write one token store per label from a stream of documents.

    After an interruption, call again with the same stream: what is on record (every `commit_bytes` of text) is not
    encoded again, only read and compared by a rolling digest. Memory depends on `batch_bytes` and on the longest
    document, not on the length of the stream.

    Args:
        documents: Stream of documents, in the same order at every call.
        tokenizer: Tokenizer to encode with.
        path: Folder of the stores; must not exist.
        batch_bytes: UTF-8 bytes encoded at a time.
        commit_bytes: UTF-8 bytes after which the state is put on record.
        progress: Called after every batch with the UTF-8 bytes stored so far, those of an interrupted run included.
    Raises:
        DataError: There are no documents, one has no label, the folder exists, or the stream is not the one that was
            interrupted. An error out of the stream itself passes through.
    """
    with StoreWriter(path, tokenizer.vocabulary) as writer:
        committed = writer.bytes
        for batch, mark in _batches(_rest(documents, writer), batch_bytes):
            for document, (tokens_N, prompt) in zip(batch, encode_documents(tokenizer, batch), strict=True):
                if document.label is None:
                    raise DataError(
                        f"document {document.origin or '(no origin)'} has no label; set label, label_field or "
                        f"label_from"
                    )
                size = len(document.text.encode("utf-8"))
                writer.append(tokens_N, size, document.label, document.origin, prompt)
            if writer.bytes - committed >= commit_bytes:
                writer.commit(mark)
                committed = writer.bytes
            if progress is not None:
                progress(writer.bytes)
    return open_stores(path, verify=False)


def _rest(documents: Iterable[Document], writer: StoreWriter) -> Iterator[tuple[Document, str]]:
    """The documents an interrupted run has not stored, each with the rolling digest of the stream up to it."""
    known, number, rolling = writer.documents, 0, b""
    changed = (
        f"the documents for {writer.path} are not those of the interrupted run: its first {known} documents differ "
        f"now; restore the corpus, or delete {writer.partial} to start again"
    )
    for number, document in enumerate(documents, start=1):
        label = b"" if document.label is None else b"\x01" + document.label.encode("utf-8", errors="surrogatepass")
        prompt = b"" if document.prompt is None else b"\x02%d" % document.prompt
        rolling = hashlib.blake2b(rolling + document.digest() + label + prompt, digest_size=16).digest()
        if number > known:
            yield document, rolling.hex()
        elif number == known and rolling.hex() != writer.mark:
            raise DataError(changed)
    if number < known:
        raise DataError(changed)


def _batches(marked: Iterable[tuple[Document, str]], batch_bytes: int) -> Iterator[tuple[list[Document], str]]:
    """Documents to encode together, with the digest after the last of them."""
    batch: list[Document] = []
    total, mark = 0, ""
    for document, mark in marked:
        batch.append(document)
        total += len(document.text.encode("utf-8")) + 64
        if total >= batch_bytes:
            yield batch, mark
            batch, total = [], 0
    if batch:
        yield batch, mark
