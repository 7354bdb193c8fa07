"""Documents to token stores: encoded in parallel, in constant memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from weftlm.corpora.source import Document
from weftlm.corpora.store import TokenStore, open_stores
from weftlm.corpora.store_writer import write_stores
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
