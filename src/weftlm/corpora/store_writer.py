"""Writing token stores: one per label, thousands at once, in bounded memory; interrupted work is resumed.

A writer works in a hidden sibling folder (`.train.partial` beside `train`) and renames it when everything is on disk,
so a half-written store is never opened. It appends to files and keeps a digest of what each holds; `commit` writes
sizes and digests into a journal, at which the next writer of the same folder cuts the files off and goes on.
"""

from __future__ import annotations

import hashlib
import logging
import os
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from weftlm.corpora.labels import folder_name
from weftlm.corpora.store import DOCUMENT, DOCUMENTS, FORMAT, INDEX, PROMPT, PROMPTS, STORES, TOKENS, Vocabulary
from weftlm.errors import DataError
from weftlm.files import checksum, read_object, remove, sweep, write_object

log = logging.getLogger(__name__)

JOURNAL = "journal.json"
_OVERHEAD = 3 * 64 + 2 * 96
"""Bytes of the objects that hold a document in memory, beside its tokens."""


class StoreWriter:
    """Writes a token store per label into a folder that appears all at once; a context manager.

        with StoreWriter(folder, tokenizer.vocabulary) as writer:
            writer.append(token_ids, text_bytes=120, label="code")
        stores = open_stores(folder)

    An interrupted writer's folder is resumed at its last `commit`: skip `documents` documents of the stream and append
    the rest. What was not committed is lost.

    Args:
        path: Folder to write; must not exist.
        vocabulary: Size, end-of-document id and fingerprint of the tokenizer.
        buffer_bytes: Memory for tokens not yet on disk, over all stores.
    Attributes:
        documents: Documents appended so far over all stores, those of an interrupted run included.
        bytes: UTF-8 bytes of text, counted the same way.
        mark: What the last `commit` was given, to recognise the stream by.
    Raises:
        DataError: The folder exists already.
    """

    def __init__(self, path: str | Path, vocabulary: Vocabulary, *, buffer_bytes: int = 64 << 20) -> None:
        self.path = Path(path)
        self._vocabulary = vocabulary
        self._buffer_bytes = buffer_bytes
        self._stores: dict[str, _GrowingStore] = {}
        self.documents = self.bytes = self._waiting_bytes = 0
        self.mark = ""
        if self.path.exists():
            raise DataError(f"{self.path} already exists; delete it or choose another path")
        self.partial = self.path.with_name(f".{self.path.name}.partial")
        if not self._resume():
            self._stores = {}
            if self.partial.exists():
                remove(self.partial)
            self.partial.mkdir(parents=True)

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
        self._waiting_bytes += store.append(tokens, text_bytes, origin, prompt)
        self.documents += 1
        self.bytes += text_bytes
        if self._waiting_bytes >= self._buffer_bytes:
            self._flush()

    def commit(self, mark: str) -> None:
        """Put everything appended so far on record: a later writer continues from here."""
        self._flush()
        states = {label: store.state() for label, store in self._stores.items()}
        write_object(self.partial / JOURNAL, {"made by": self._maker(), "mark": mark, "stores": states})

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Close the stores and rename the folder into place; after an error keep what is committed.

        Raises:
            DataError: No document was appended.
        """
        if kind is None and self._stores:
            for store in self._stores.values():
                store.close()
            write_object(self.partial / STORES, {"labels": sorted(self._stores)})
            (self.partial / JOURNAL).unlink(missing_ok=True)
            os.sync()  # one flush of everything is far cheaper than thousands of single ones
            self.partial.rename(self.path)
            return
        if not (self.partial / JOURNAL).exists():
            remove(self.partial)
        if kind is None:
            raise DataError(f"token stores {self.path} would hold no document")

    def _flush(self) -> None:
        for store in self._stores.values():
            store.flush()
        self._waiting_bytes = 0

    def _maker(self) -> list[Any]:
        return [FORMAT, self._vocabulary.fingerprint, self._vocabulary.size, self._vocabulary.eos_id]

    def _resume(self) -> bool:
        """Continue from an interrupted writer's journal; False where there is none, or its files do not hold it."""
        try:
            journal = read_object(self.partial / JOURNAL, "starting again")
        except DataError as error:
            log.warning("%s", error)
            return False
        if journal is None:
            return False
        states = journal["stores"]
        if journal["made by"] != self._maker() or not all(self._open(each).restore(states[each]) for each in states):
            log.warning("%s does not hold what its journal says; starting again", self.partial)
            return False
        known = {store.folder.name for store in self._stores.values()}
        sweep(self.partial)
        for child in self.partial.iterdir():
            sweep(child)
            if child.is_dir() and child.name not in known:  # begun after the last commit
                remove(child)
        self.documents = sum(store.documents for store in self._stores.values())
        self.bytes = sum(store.bytes for store in self._stores.values())
        self.mark = str(journal["mark"])
        return True

    def _open(self, label: str) -> _GrowingStore:
        name = folder_name(label)
        if name.casefold() in {store.folder.name.casefold() for store in self._stores.values()}:
            raise DataError(f"label {label!r} would share its folder {name!r} with another label; rename one of them")
        self._stores[label] = _GrowingStore(self.partial / name, self._vocabulary)
        return self._stores[label]


class _GrowingFile:
    """A file that is only appended to, with size and digest of what it holds."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.bytes = 0
        self._digest = hashlib.blake2b(digest_size=16)

    def append(self, data: bytes) -> None:
        if data:
            with open(self.path, "ab") as file:
                file.write(data)
            self._digest.update(data)
            self.bytes += len(data)

    def state(self) -> dict[str, Any]:
        """Size and digest, as `weftlm.files.describe` gives them."""
        return {"bytes": self.bytes, "blake2b": self._digest.hexdigest()}

    def restore(self, state: dict[str, Any] | None) -> bool:
        """Cut the file back to a recorded size, or remove it; False if it does not hold what was recorded."""
        if state is None:
            self.path.unlink(missing_ok=True)
            return True
        try:
            os.truncate(self.path, state["bytes"])
            with open(self.path, "rb") as file:
                while block := file.read(1 << 20):
                    self._digest.update(block)
                    self.bytes += len(block)
        except OSError:
            return False
        return self.state() == state


class _GrowingStore:
    """One store while it is written: buffers over its files."""

    def __init__(self, folder: Path, vocabulary: Vocabulary) -> None:
        folder.mkdir(exist_ok=True)
        self.folder = folder
        self.documents = self.tokens = self.bytes = 0
        self._vocabulary = vocabulary
        self._files = {name: _GrowingFile(folder / name) for name in (TOKENS, DOCUMENTS, PROMPTS)}
        self._eos = np.array([vocabulary.eos_id], dtype=vocabulary.dtype)
        self._tokens: list[NDArray[Any]] = []
        self._documents: list[tuple[int, int]] = []
        self._prompts: list[tuple[int, int]] = []

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
        examples = bool(self._prompts or self._files[PROMPTS].bytes)
        if self.documents and examples != (prompt is not None):
            raise DataError(
                f"document {origin} has {'no' if prompt is None else 'a'} prompt, unlike those before it in "
                f"{self.folder}; the documents of a domain must all be examples, or none: set prompt_field on all of "
                f"its corpora, or on none"
            )
        if prompt is not None:
            self._prompts.append(prompt)
        self._tokens += [ids.astype(self._vocabulary.dtype), self._eos]
        self.tokens += len(ids) + 1
        self.bytes += int(text_bytes)
        self.documents += 1
        self._documents.append((self.tokens, int(text_bytes)))
        return (len(ids) + 1) * self._vocabulary.dtype.itemsize + _OVERHEAD

    def flush(self) -> None:
        """Write the buffers."""
        if self._documents:
            self._files[TOKENS].append(np.concatenate(self._tokens).tobytes())
            self._files[DOCUMENTS].append(np.array(self._documents, dtype=DOCUMENT).tobytes())
            self._files[PROMPTS].append(np.array(self._prompts, dtype=PROMPT).tobytes())
        self._tokens, self._documents, self._prompts = [], [], []

    def state(self) -> dict[str, Any]:
        """What `restore` needs; call it after `flush`."""
        files = {name: file.state() for name, file in self._files.items() if file.bytes}
        return {"documents": self.documents, "tokens": self.tokens, "bytes": self.bytes, "files": files}

    def restore(self, state: dict[str, Any]) -> bool:
        """Cut the files back to a recorded state; False if they do not hold it."""
        self.documents, self.tokens, self.bytes = state["documents"], state["tokens"], state["bytes"]
        return all(file.restore(state["files"].get(name)) for name, file in self._files.items())

    def close(self) -> None:
        """Write the buffers and the index. The fingerprint follows tokenizer and contents, not their way here."""
        self.flush()
        state = self.state()
        digests = [file["blake2b"] for file in state["files"].values()]
        index = {
            "format": FORMAT,
            "tokenizer": self._vocabulary.fingerprint,
            "vocab_size": self._vocabulary.size,
            "eos_id": self._vocabulary.eos_id,
            **state,
            "fingerprint": checksum([self._vocabulary.fingerprint, *digests]),
        }
        write_object(self.folder / INDEX, index)
