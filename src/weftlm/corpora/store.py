"""Token stores: a domain's tokens in memory-mapped shards, written atomically and checked when opened.

A store is a folder:

    index.json          what is in it, with the size and BLAKE2b of every file, and a checksum over itself
    tokens-00000.bin    `shard_tokens` tokens each (the last one fewer), little-endian uint16 or uint32
    documents.bin       three little-endian uint64 per document: its end in tokens, UTF-8 bytes of its text, and the
                        end of its origin in origins.bin
    origins.bin         where each document came from, UTF-8, one after another
    prompts.bin         of a store of examples alone: two little-endian uint64 per document, the tokens of its prompt
                        (the first of its tokens) and the UTF-8 bytes of its prompt

Tokens of the documents follow each other, each document closed by the end-of-document token. A writer works in a hidden
sibling folder and renames it when everything is on disk, so a half-written store is never opened. How the files are
written is in `store_files.py`.
"""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from weftlm.corpora.examples import Examples
from weftlm.corpora.labels import folder_name
from weftlm.corpora.store_files import (
    DOCUMENT,
    DOCUMENTS,
    FORMAT,
    INDEX,
    ORIGINS,
    PROMPT,
    PROMPTS,
    PartialFolder,
    StoreFiles,
    Vocabulary,
    file_digest,
    make_folder,
    map_file,
    write_json,
)
from weftlm.errors import DataError, reason
from weftlm.files import parse_json, read_object

__all__ = ["MultiStoreWriter", "TokenStore", "TokenStoreWriter", "Vocabulary", "open_stores"]

SHARD_TOKENS = 1 << 26

_REMEDY = "restore it, or delete the folder and prepare the data again"
_log = logging.getLogger(__name__)
_verified: set[tuple[Path, str, tuple[int, ...]]] = set()
"""Stores whose contents this process has compared with their index: path, fingerprint, times of modification."""


class _Writer:
    """Writes one store or many into a folder that appears all at once; use as a context manager.

    Tokens wait in memory up to `buffer_bytes`, whatever the size of the stores: when it is used up, the fullest buffers
    are written. One file is open at a time. With `resume=True` an interrupted writer's folder is taken up at its last
    `commit`: skip `documents` documents of the stream and append the rest. `mark` is whatever the last `commit` was
    given, to recognise the stream by.

    Args:
        path: the folder; must not exist unless `overwrite`.
        vocabulary: size, end-of-document id and fingerprint of the tokenizer.
        shard_tokens: tokens in one file.
        buffer_bytes: memory for tokens not yet on disk.
        resume: continue an interrupted writer's work instead of starting anew.
        overwrite: replace what exists when finished.
    Attributes:
        documents: documents appended so far over all stores, those of an interrupted run included.
        tokens: tokens, counted the same way; end-of-document tokens included.
        bytes: UTF-8 bytes of text, counted the same way.
    Raises:
        DataError: the folder exists already, another process is writing it, or the disk is full.
    """

    def __init__(
        self,
        path: str | Path,
        vocabulary: Vocabulary,
        *,
        shard_tokens: int = SHARD_TOKENS,
        buffer_bytes: int = 64 << 20,
        resume: bool = False,
        overwrite: bool = False,
    ) -> None:
        self._partial = PartialFolder(Path(path), resume=resume, overwrite=overwrite)
        self._vocabulary = vocabulary
        self._shard_tokens = shard_tokens
        self._buffer_bytes = buffer_bytes
        self._pending_bytes = 0
        self._stores: dict[str, StoreFiles] = {}
        self.documents = self.tokens = self.bytes = 0
        self.mark = ""
        journal = self._partial.read_journal()
        if journal is None:
            return
        states = journal.get("stores")
        if isinstance(states, dict) and all(self._open(label).restore(states[label]) for label in states):
            self.mark = str(journal["mark"])
            self.documents = sum(store.documents for store in self._stores.values())
            self.tokens = sum(store.tokens for store in self._stores.values())
            self.bytes = sum(store.bytes for store in self._stores.values())
            self._remove_strangers()
        else:
            _log.warning("%s does not hold what its journal says; starting again", self._partial.path)
            self._partial.clear()
            self._stores = {}

    def append(
        self,
        tokens: ArrayLike,
        text_bytes: int,
        origin: str = "",
        label: str | None = None,
        prompt: tuple[int, int] | None = None,
    ) -> None:
        """Append one document; the end-of-document token is added here.

        Args:
            tokens: token ids without special tokens, shape (tokens,).
            text_bytes: length of the document's text in UTF-8 bytes.
            origin: where the document came from.
            label: the store it goes to; ignored where there is one store only.
            prompt: of an example, how many of the tokens, and of the bytes, are its prompt's.
        Raises:
            DataError: no label, an id outside the vocabulary, some documents of a store are examples and some not, or
                the disk is full.
        """
        name = self._store_of(label, origin)
        store = self._stores.get(name) or self._open(name)
        pending, length = store.pending_bytes, store.tokens
        store.append(tokens, text_bytes, origin, prompt)
        self._pending_bytes += store.pending_bytes - pending
        self.documents += 1
        self.tokens += store.tokens - length
        self.bytes += text_bytes
        if self._pending_bytes >= self._buffer_bytes:
            self._flush_fullest()

    def commit(self, mark: str) -> None:
        """Put everything appended so far on record: a later writer with `resume=True` continues from here."""
        for store in self._stores.values():
            store.flush()
        self._pending_bytes = 0
        states = {label: store.state() for label, store in self._stores.items()}
        self._partial.write_journal({"mark": mark, "stores": states})

    def abort(self, keep: bool = False) -> None:
        """Stop without stores; `keep` leaves the committed part for a later `resume=True`."""
        self._partial.abandon(keep=keep)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is not None:
            self.abort(keep=self._partial.resume)
        elif not self._partial.closed:
            self._publish()

    def _publish(self) -> None:
        """Close the stores and rename the folder into place."""
        if not self._stores:
            self.abort()
            raise DataError(f"token store {self._partial.final} would hold no document")
        with self._partial.kept_on_failure():
            for store in self._stores.values():
                store.close()
            self._list_stores()
            os.sync()  # one flush of everything is far cheaper than thousands of single ones
            self._partial.publish()

    def _open(self, name: str) -> StoreFiles:
        folder = self._folder_of(name)
        make_folder(folder)
        self._stores[name] = StoreFiles(folder, self._vocabulary, self._shard_tokens)
        return self._stores[name]

    def _flush_fullest(self) -> None:
        """Write the fullest buffers until half of the memory is free: few, long writes."""
        for store in sorted(self._stores.values(), key=lambda store: store.pending_bytes, reverse=True):
            if self._pending_bytes <= self._buffer_bytes // 2:
                break
            self._pending_bytes -= store.pending_bytes
            store.flush()

    def _store_of(self, label: str | None, origin: str) -> str:
        """The store of a document."""
        return ""

    def _folder_of(self, name: str) -> Path:
        """The folder of a store that is opened for the first time."""
        return self._partial.path

    def _list_stores(self) -> None:
        """Write which stores there are."""

    def _remove_strangers(self) -> None:
        """Delete the stores that an interrupted run began after its last commit."""


class TokenStoreWriter(_Writer):
    """Writes one store; see `_Writer` for the arguments."""

    def finish(self) -> TokenStore:
        """Close the store, rename it into place and open it.

        Raises:
            DataError: no document was appended, or the disk is full.
        """
        self._publish()
        return TokenStore(self._partial.final, verify="sizes")


class MultiStoreWriter(_Writer):
    """Writes a store per label, thousands of them at once; see `_Writer` for the arguments.

    Each store is the subfolder `folder_name(label)`; `stores.json` lists labels and folders in order of name.
    """

    def finish(self) -> dict[str, TokenStore]:
        """Close all stores, rename the folder into place and open them, by label in order of name.

        Raises:
            DataError: no document was appended, or the disk is full.
        """
        self._publish()
        return open_stores(self._partial.final, verify="sizes")

    def _store_of(self, label: str | None, origin: str) -> str:
        if label is None:
            raise DataError(f"document {origin or '(no origin)'} has no label; set label, label_field or label_from")
        return label

    def _folder_of(self, name: str) -> Path:
        folder = folder_name(name)
        if folder.casefold() in {store.folder.name.casefold() for store in self._stores.values()}:
            raise DataError(f"label {name!r} would share its folder {folder!r} with another label; rename one of them")
        return self._partial.path / folder

    def _list_stores(self) -> None:
        write_json(self._partial.path / "stores.json", {label: folder_name(label) for label in sorted(self._stores)})

    def _remove_strangers(self) -> None:
        known = {folder_name(label) for label in self._stores}
        for child in self._partial.path.iterdir():
            if child.is_dir() and child.name not in known:
                shutil.rmtree(child)


class TokenStore:
    """A store opened for reading; a `Source`. May be pickled: the copy maps the files anew.

    Args:
        path: the store's folder.
        verify: `full` also compares the contents of every file with the index, at the first opening in this process
            (measured: 1 to 2 s per gigabyte, which is half a billion tokens); `sizes` compares sizes only.
        tokenizer: the fingerprint the tokens must have been made with; None accepts any.
    Raises:
        DataError: something is missing, cut off, changed, or of another tokenizer; the message names the file.
    """

    def __init__(
        self, path: str | Path, verify: Literal["full", "sizes"] = "full", tokenizer: str | None = None
    ) -> None:
        self.path = Path(path)
        index = _read_index(self.path)
        self._index = index
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
        self._tokens: int = index["tokens"]
        self._shard_tokens: int = index["shard_tokens"]
        self._dtype = np.dtype(index["dtype"])
        self.shard_names = [name for name in index["files"] if name.startswith("tokens-")]
        self._shards: list[NDArray[Any] | None] = [None] * len(self.shard_names)
        self._windows: dict[tuple[int, int], NDArray[Any]] = {}
        self._bytes_known = True
        self._check_sizes()
        if verify == "full" and (self.path.resolve(), self._index["fingerprint"], self._stamps()) not in _verified:
            self.verify()

    def __len__(self) -> int:
        return self._tokens

    def __repr__(self) -> str:
        return f"TokenStore({str(self.path)!r}, tokens={self._tokens}, documents={self.documents})"

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, (str(self.path), self.fingerprint, self._bytes_known)

    def forget_bytes(self) -> None:
        """Know no bytes from now on, because the tokens do not hold the text: there are no bits per byte of them."""
        self.bytes, self._bytes_known = 0, False

    def read(self, start: int, count: int) -> NDArray[np.int64]:
        """Tokens `start .. start + count`, a fresh int64 array of shape (count,).

        Raises:
            IndexError: the run does not lie within the store.
        """
        if start < 0 or count < 0 or start + count > self._tokens:
            raise IndexError(f"tokens {start} .. {start + count} of a store of {self._tokens} ({self.path})")
        result = np.empty(count, dtype=np.int64)
        done = 0
        while done < count:
            shard, offset = divmod(start + done, self._shard_tokens)
            part = self._shard(shard)[offset : offset + count - done]
            result[done : done + len(part)] = part
            done += len(part)
        return result

    def read_many(self, starts_N: NDArray[np.int64], count: int) -> NDArray[np.int64]:
        """One run of `count` tokens from each start, a fresh int64 array of shape (N, count).

        Raises:
            IndexError: a run does not lie within the store.
        """
        starts_N = np.asarray(starts_N, dtype=np.int64)
        if len(starts_N) == 0 or count == 0:
            return np.empty((len(starts_N), max(count, 0)), dtype=np.int64)
        low, high = int(starts_N.min()), int(starts_N.max())
        if low < 0 or count < 0 or high + count > self._tokens:
            raise IndexError(f"tokens {low} .. {high + count} of a store of {self._tokens} ({self.path})")
        first, last = low // self._shard_tokens, (high + count - 1) // self._shard_tokens
        if first == last:
            windows = self._window(first, count)
            offsets_N = starts_N if first == 0 else starts_N - first * self._shard_tokens
            return windows[offsets_N].astype(np.int64)
        result = np.empty((len(starts_N), count), dtype=np.int64)
        shards_N, offsets_N = np.divmod(starts_N, self._shard_tokens)
        inside_N = offsets_N + count <= self._shard_tokens
        for shard in np.unique(shards_N[inside_N]):
            rows = np.flatnonzero(inside_N & (shards_N == shard))
            result[rows] = self._window(int(shard), count)[offsets_N[rows]]
        for row in np.flatnonzero(~inside_N):
            result[row] = self.read(int(starts_N[row]), count)
        return result

    @property
    def document_ends(self) -> NDArray[np.uint64]:
        """Position after each document's end-of-document token, mapped from disk, shape (documents,)."""
        ends: NDArray[np.uint64] = self._records()["end"]
        return ends

    @property
    def document_bytes(self) -> NDArray[np.uint64]:
        """UTF-8 bytes of each document's text, mapped from disk, shape (documents,)."""
        sizes: NDArray[np.uint64] = self._records()["text_bytes"]
        return sizes

    @property
    def document_spans(self) -> NDArray[np.int64]:
        """Start and end of each document in tokens, its end-of-document token included, shape (documents, 2)."""
        ends = self.document_ends.astype(np.int64)
        return np.stack([np.concatenate([np.zeros(1, dtype=np.int64), ends[:-1]]), ends], axis=1)

    @property
    def examples(self) -> Examples | None:
        """The documents as prompts and targets; None where they are plain text."""
        if PROMPTS not in self._index["files"]:
            return None
        prompts = map_file(self.path / PROMPTS, PROMPT)
        targets_N = (self.document_bytes - prompts["text_bytes"]) * np.uint64(self._bytes_known)
        return Examples.of(self, self.document_spans, prompts["tokens"], targets_N, self.eos_id)

    def document_at(self, token: int) -> int:
        """Number of the document that holds a token."""
        if not 0 <= token < self._tokens:
            raise IndexError(f"token {token} of a store of {self._tokens} ({self.path})")
        return int(np.searchsorted(self.document_ends, np.uint64(token), side="right"))

    def origin(self, document: int) -> str:
        """Where a document came from, as it was told to the writer."""
        if not 0 <= document < self.documents:
            raise IndexError(f"document {document} of a store of {self.documents} ({self.path})")
        records = self._records()
        start = 0 if document == 0 else int(records[document - 1]["origin_end"])
        with open(self.path / ORIGINS, "rb") as file:
            file.seek(start)
            return file.read(int(records[document]["origin_end"]) - start).decode("utf-8")

    def verify(self) -> None:
        """Compare the contents of every file with the index.

        Raises:
            DataError: a file is missing, cut off or changed.
        """
        self._check_sizes()
        stamps = self._stamps()
        for name, facts in self._index["files"].items():
            digest = file_digest(self.path / name)
            if digest != facts["blake2b"]:
                raise DataError(
                    f"{self.path / name} has changed since it was written (BLAKE2b {digest[:16]}..., index says "
                    f"{facts['blake2b'][:16]}...); {_REMEDY}"
                )
        _verified.add((self.path.resolve(), self._index["fingerprint"], stamps))

    def _stamps(self) -> tuple[int, ...]:
        """Times of modification of the files, so that a store replaced meanwhile is read again."""
        return tuple((self.path / name).stat().st_mtime_ns for name in self._index["files"])

    def _check_sizes(self) -> None:
        for name, facts in self._index["files"].items():
            try:
                size = (self.path / name).stat().st_size
            except OSError as error:
                raise DataError(f"{self.path / name} is missing ({error.strerror}); {_REMEDY}") from error
            if size != facts["size"]:
                raise DataError(f"{self.path / name} has {size} bytes, index says {facts['size']}; {_REMEDY}")

    def _shard(self, number: int) -> NDArray[Any]:
        shard = self._shards[number]
        if shard is None:
            shard = map_file(self.path / self.shard_names[number], self._dtype)
            self._shards[number] = shard
        return shard

    def _window(self, number: int, count: int) -> NDArray[Any]:
        """Every run of `count` tokens within a shard, a view of shape (len - count + 1, count)."""
        window = self._windows.get((number, count))
        if window is None:
            shard = self._shard(number)
            window = np.lib.stride_tricks.sliding_window_view(shard, count)
            self._windows[(number, count)] = window
        return window

    def _records(self) -> NDArray[Any]:
        return map_file(self.path / DOCUMENTS, DOCUMENT)


def open_stores(
    root: str | Path, verify: Literal["full", "sizes"] = "full", tokenizer: str | None = None
) -> dict[str, TokenStore]:
    """The stores a `MultiStoreWriter` wrote, by label in order of name.

    Raises:
        DataError: the folder or one of its stores cannot be opened.
    """
    path = Path(root) / "stores.json"
    try:
        names = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {reason(error)}; {_REMEDY}") from error
    if not isinstance(names, dict) or any(folder_name(label) != name for label, name in names.items()):
        raise DataError(f"{path} has changed since it was written; {_REMEDY}")
    return {label: TokenStore(Path(root) / name, verify, tokenizer) for label, name in names.items()}


def _reopen(path: str, fingerprint: str, bytes_known: bool) -> TokenStore:
    store = TokenStore(path, verify="sizes")
    if not bytes_known:
        store.forget_bytes()
    if store.fingerprint != fingerprint:
        raise DataError(f"token store {path} was replaced while in use; start again")
    return store


def _read_index(folder: Path) -> dict[str, Any]:
    path = folder / INDEX
    index = read_object(path, _REMEDY)
    if index is None:
        raise DataError(f"{folder} is not a token store: it has no {INDEX}; prepare the data first")
    if index.get("format") != FORMAT:
        raise DataError(f"{path} is not of the format {FORMAT!r}; prepare the data again with this version of weftlm")
    return index
