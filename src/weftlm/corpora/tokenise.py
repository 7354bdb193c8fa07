"""Documents to token stores: encoded in parallel, in constant memory, taken up again after an interruption."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from weftlm.corpora.source import Document
from weftlm.corpora.store import SHARD_TOKENS, MultiStoreWriter, TokenStore, TokenStoreWriter
from weftlm.corpora.tokens import Tokenizer
from weftlm.errors import DataError


@dataclass(frozen=True)
class TokeniseProgress:
    """How far a tokenisation is.

    Attributes:
        documents: documents stored so far, those of an interrupted run included.
        tokens: tokens stored so far, likewise.
        bytes: UTF-8 bytes of text stored so far, likewise.
        resumed_documents: how many of the documents an interrupted run had stored.
    """

    documents: int
    tokens: int
    bytes: int
    resumed_documents: int


EncodedDocument = tuple[NDArray[np.uint32], tuple[int, int] | None]
"""A document's token ids, and of an example how many of its tokens and of its UTF-8 bytes are the prompt's."""


def encode_documents(tokenizer: Tokenizer, documents: Sequence[Document]) -> list[EncodedDocument]:
    """Encode documents; the prompt and the target of an example apart, so that no token spans both."""
    texts: list[str] = []
    for document in documents:
        cut = document.prompt or 0
        texts += [document.text[cut:]] if document.prompt is None else [document.text[:cut], document.text[cut:]]
    encoded = iter(tokenizer.encode_batch(texts))
    found: list[EncodedDocument] = []
    for document in documents:
        first_N = next(encoded)
        if document.prompt is None:
            found.append((first_N, None))
        else:
            size = len(document.text[: document.prompt].encode("utf-8"))
            found.append((np.concatenate([first_N, next(encoded)]), (len(first_N), size)))
    return found


def tokenise_documents(
    documents: Iterable[Document],
    tokenizer: Tokenizer,
    path: str | Path,
    *,
    shard_tokens: int = SHARD_TOKENS,
    batch_bytes: int = 2 << 20,
    commit_bytes: int = 32 << 20,
    overwrite: bool = False,
    progress: Callable[[TokeniseProgress], None] | None = None,
) -> TokenStore:
    """Write one token store from a stream of documents.

    After an interruption, call again with the same stream: what is on record (every `commit_bytes` of text) is not
    encoded again, only read and compared by a rolling digest. Memory depends on `batch_bytes` and on the longest
    document, not on the length of the stream.

    Args:
        documents: the stream, in the same order at every call.
        tokenizer: what to encode with.
        path: the store's folder; must not exist unless `overwrite`.
        shard_tokens: tokens in one file of the store.
        batch_bytes: UTF-8 bytes encoded at a time.
        commit_bytes: UTF-8 bytes after which the state is put on record.
        overwrite: replace an existing store.
        progress: called after every batch.
    Raises:
        DataError: there are no documents, the store exists or is being written, the disk is full, or the stream is not
            the one that was interrupted. An error out of the stream itself passes through.
    """
    writer = TokenStoreWriter(path, tokenizer.vocabulary, shard_tokens=shard_tokens, resume=True, overwrite=overwrite)
    _tokenise(documents, tokenizer, writer, Path(path), batch_bytes, commit_bytes, progress)
    return writer.finish()


def tokenise_by_label(
    documents: Iterable[Document],
    tokenizer: Tokenizer,
    path: str | Path,
    *,
    shard_tokens: int = SHARD_TOKENS,
    batch_bytes: int = 2 << 20,
    commit_bytes: int = 128 << 20,
    overwrite: bool = False,
    progress: Callable[[TokeniseProgress], None] | None = None,
) -> dict[str, TokenStore]:
    """Write one token store per label into the folder `path`, as `tokenise_documents` does for one.

    Raises:
        DataError: as `tokenise_documents`, or a document has no label.
    """
    writer = MultiStoreWriter(path, tokenizer.vocabulary, shard_tokens=shard_tokens, resume=True, overwrite=overwrite)
    _tokenise(documents, tokenizer, writer, Path(path), batch_bytes, commit_bytes, progress)
    return writer.finish()


def _tokenise(
    documents: Iterable[Document],
    tokenizer: Tokenizer,
    writer: TokenStoreWriter | MultiStoreWriter,
    path: Path,
    batch_bytes: int,
    commit_bytes: int,
    progress: Callable[[TokeniseProgress], None] | None,
) -> None:
    """Encode one batch in the tokenizer's threads while the next is read and the one before is written."""
    resumed = writer.documents
    committed_bytes = writer.bytes
    mark = ""
    try:
        with ThreadPoolExecutor(max_workers=1) as pool:
            waiting: tuple[_Batch, Future[list[EncodedDocument]]] | None = None
            for batch in _batches(_skip_known(documents, writer, path), batch_bytes):
                encoding = pool.submit(encode_documents, tokenizer, batch.documents)
                if waiting is not None:
                    mark = _store(waiting, writer)
                    if writer.bytes - committed_bytes >= commit_bytes:
                        writer.commit(mark)
                        committed_bytes = writer.bytes
                    if progress is not None:
                        progress(TokeniseProgress(writer.documents, writer.tokens, writer.bytes, resumed))
                waiting = batch, encoding
            if waiting is not None:
                _store(waiting, writer)
        if progress is not None:
            progress(TokeniseProgress(writer.documents, writer.tokens, writer.bytes, resumed))
    except BaseException:
        writer.abort(keep=True)
        raise


@dataclass
class _Batch:
    """Documents to encode together; `mark` is the rolling digest after the last of them."""

    documents: list[Document]
    sizes: list[int]
    mark: str


def _batches(marked: Iterator[tuple[Document, str]], batch_bytes: int) -> Iterator[_Batch]:
    batch = _Batch([], [], "")
    total = 0
    for document, mark in marked:
        size = len(document.text.encode("utf-8"))
        batch.documents.append(document)
        batch.sizes.append(size)
        batch.mark = mark
        total += size + 64
        if total >= batch_bytes:
            yield batch
            batch = _Batch([], [], "")
            total = 0
    if batch.documents:
        yield batch


def _skip_known(
    documents: Iterable[Document], writer: TokenStoreWriter | MultiStoreWriter, path: Path
) -> Iterator[tuple[Document, str]]:
    """The documents an interrupted run has not stored, each with the rolling digest of the stream up to it."""
    known = writer.documents
    rolling = b""
    number = 0
    for number, document in enumerate(documents, start=1):
        label = b"" if document.label is None else b"\x01" + document.label.encode("utf-8", errors="surrogatepass")
        prompt = b"" if document.prompt is None else b"\x02%d" % document.prompt
        rolling = hashlib.blake2b(rolling + document.digest() + label + prompt, digest_size=16).digest()
        if number > known:
            yield document, rolling.hex()
        elif number == known and rolling.hex() != writer.mark:
            raise DataError(_changed(path, known))
    if number < known:
        raise DataError(_changed(path, known))


def _changed(path: Path, known: int) -> str:
    partial = path.with_name(f".{path.name}.partial")
    return (
        f"the documents for {path} are not those of the interrupted run: its first {known} documents differ now; "
        f"restore the corpus, or delete {partial} to start again"
    )


def _store(waiting: tuple[_Batch, Future[Any]], writer: TokenStoreWriter | MultiStoreWriter) -> str:
    batch, encoding = waiting
    for document, (tokens_N, prompt), size in zip(batch.documents, encoding.result(), batch.sizes, strict=True):
        writer.append(tokens_N, size, document.origin, document.label, prompt)
    return batch.mark
