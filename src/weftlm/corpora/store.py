"""Token stores: a domain's tokens in memory-mapped files, checked when they are opened.

A folder holds a store per label, each a folder of its own, the list of the labels (`stores.json`), and the digests of
all files (`weftlm.files.seal`):

    index.json       what is in the store
    tokens.bin       the tokens, little-endian uint16 or uint32
    documents.bin    two little-endian uint64 per document: its end in tokens, and the UTF-8 bytes of its text
    prompts.bin      in a store of examples alone: two little-endian uint64 per document, the tokens of its prompt (the
                     first of its tokens) and the UTF-8 bytes of its prompt

Tokens of the documents follow each other, each document closed by the end-of-document token.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from weftlm.corpora.examples import Examples
from weftlm.corpora.labels import folder_name
from weftlm.corpora.source import TokenReader
from weftlm.errors import DataError
from weftlm.files import SEAL, check_sealed, read_object

FORMAT = "weftlm token store 3"
INDEX = "index.json"
STORES = "stores.json"
TOKENS, DOCUMENTS, PROMPTS = "tokens.bin", "documents.bin", "prompts.bin"
DOCUMENT = np.dtype([("end", "<u8"), ("text_bytes", "<u8")])
PROMPT = np.dtype([("tokens", "<u8"), ("text_bytes", "<u8")])

_CURE = "restore it, or delete the folder and prepare the data again"


@dataclass(frozen=True)
class Vocabulary:
    """What a store must know of the tokenizer.

    Attributes:
        size: Highest id + 1; up to 65536 is stored as uint16, more as uint32.
        eos_id: Token that closes every document.
        fingerprint: Fingerprint of the tokenizer.
    """

    size: int
    eos_id: int
    fingerprint: str

    @property
    def dtype(self) -> np.dtype[Any]:
        """Little-endian type of a stored token."""
        return np.dtype("<u2") if self.size <= 1 << 16 else np.dtype("<u4")


class TokenStore(TokenReader):
    """A store opened for reading; a `Source`. Pickling keeps the path alone: the copy maps the files again.

    Args:
        path: Folder of the store.
        tokenizer: Fingerprint the tokens must have been made with; None accepts any.
    Attributes:
        bytes: UTF-8 bytes of the text; 0 where the tokens do not hold the text, so that there are no bits per byte.
    Raises:
        DataError: It is no store of this version of weftlm, or another tokenizer made the tokens.
    """

    def __init__(self, path: str | Path, tokenizer: str | None = None) -> None:
        self.path = Path(path)
        index = read_object(self.path / INDEX, _CURE)
        if index is None or index.get("format") != FORMAT:
            raise DataError(f"{path} is no token store of this version of weftlm; prepare the data again")
        self.tokenizer: str = index["tokenizer"]
        if tokenizer is not None and tokenizer != self.tokenizer:
            raise DataError(
                f"token store {self.path} was made with tokenizer {self.tokenizer}, not {tokenizer}; prepare the data "
                f"again with this tokenizer"
            )
        self.fingerprint: str = index["fingerprint"]
        self.documents: int = index["documents"]
        self.bytes: int = index["bytes"]
        self.vocab_size: int = index["vocab_size"]
        self.eos_id: int = index["eos_id"]
        self._length: int = index["tokens"]

    def __len__(self) -> int:  # without mapping the file, of which a process may hold but so many
        return self._length

    def __repr__(self) -> str:
        return f"TokenStore({str(self.path)!r}, tokens={len(self)}, documents={self.documents})"

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, (str(self.path), self.fingerprint)

    @property
    def document_bytes(self) -> NDArray[np.uint64]:
        """UTF-8 bytes of each document's text, mapped from disk, shape (documents,)."""
        sizes: NDArray[np.uint64] = self._map(DOCUMENTS, DOCUMENT)["text_bytes"]
        return sizes

    @property
    def document_spans(self) -> NDArray[np.int64]:
        """Start and end of each document in tokens, its end-of-document token included, shape (documents, 2)."""
        ends = self._map(DOCUMENTS, DOCUMENT)["end"].astype(np.int64)
        return np.stack([np.concatenate([np.zeros(1, dtype=np.int64), ends[:-1]]), ends], axis=1)

    @property
    def examples(self) -> Examples | None:
        """The documents as prompts and targets; None where they are plain text."""
        if not (self.path / PROMPTS).exists():
            return None
        prompts = self._map(PROMPTS, PROMPT)
        targets_N = self.document_bytes - prompts["text_bytes"]
        return Examples(self, self.document_spans, prompts["tokens"], targets_N, self.eos_id)

    @cached_property
    def _tokens(self) -> NDArray[Any]:  # type: ignore[override]
        return self._map(TOKENS, Vocabulary(self.vocab_size, self.eos_id, self.tokenizer).dtype)

    def _map(self, name: str, dtype: np.dtype[Any]) -> NDArray[Any]:
        return np.asarray(np.memmap(self.path / name, dtype=dtype, mode="r"))


def open_stores(root: str | Path, verify: bool = True, tokenizer: str | None = None) -> dict[str, TokenStore]:
    """The stores in a folder that `write_stores` wrote, by label in order of name.

    Args:
        root: Folder of the stores.
        verify: Whether to compare every file with its digest, at the first opening in this process (measured: 1 to 2 s
            per gigabyte, which is half a billion tokens).
        tokenizer: As in `TokenStore`.
    Raises:
        DataError: A file is missing, cut off or altered, or as `TokenStore`; the message names it.
    """
    root = Path(root)
    found = read_object(root / STORES, _CURE)
    if found is None or not isinstance(labels := found.get("labels"), list):
        raise DataError(f"{root / STORES} is missing, or of another version of weftlm; prepare the data again")
    if verify:
        if not (root / SEAL).is_file():
            raise DataError(f"{root / SEAL} is missing; {_CURE}")
        files = ((path, path.stat()) for path in sorted(root.rglob("*")) if path.is_file())
        _compare(root.resolve(), tuple((str(path), stat.st_mtime_ns, stat.st_size) for path, stat in files))
    return {label: TokenStore(root / folder_name(label), tokenizer) for label in labels}


@lru_cache(maxsize=64)
def _compare(root: Path, files: tuple[tuple[str, int, int], ...]) -> None:
    """Compare files with their digests once per process, as long as their times and sizes stay."""
    check_sealed(root, _CURE, closed=True)


def _reopen(path: str, fingerprint: str) -> TokenStore:
    store = TokenStore(path)
    if store.fingerprint != fingerprint:
        raise DataError(f"token store {path} was replaced while in use; start again")
    return store
