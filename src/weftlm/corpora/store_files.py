"""How the files of a token store come to be: buffered appends with running digests, and the folder they wait in.

`store.py` describes the layout and is what to use; this file is its engine room.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from weftlm.errors import DataError
from weftlm.files import checksum, parse_json, remove, write_object, write_whole

FORMAT = "weftlm token store 1"
INDEX = "index.json"
DOCUMENTS = "documents.bin"
ORIGINS = "origins.bin"
PROMPTS = "prompts.bin"
JOURNAL = "journal.json"
_NO_ROOM = "see that there is space and permission, then run again"
DOCUMENT = np.dtype([("end", "<u8"), ("text_bytes", "<u8"), ("origin_end", "<u8")])
PROMPT = np.dtype([("tokens", "<u8"), ("text_bytes", "<u8")])


@dataclass(frozen=True)
class Vocabulary:
    """What a store must know of the tokenizer.

    Attributes:
        size: highest id + 1; up to 65536 is stored as uint16, more as uint32.
        eos_id: the token the writer appends to every document.
        fingerprint: the tokenizer's fingerprint.
    """

    size: int
    eos_id: int
    fingerprint: str

    @property
    def dtype(self) -> np.dtype[Any]:
        """Little-endian type of a stored token."""
        return np.dtype("<u2") if self.size <= 1 << 16 else np.dtype("<u4")


class StoreFiles:
    """The files of one store in the making: buffers, appends, running digests."""

    def __init__(self, folder: Path, vocabulary: Vocabulary, shard_tokens: int) -> None:
        if shard_tokens < 1:
            raise ValueError(f"shard_tokens is {shard_tokens}; must be at least 1")
        self.folder = folder
        self.vocabulary = vocabulary
        self.shard_tokens = shard_tokens
        self.documents = self.tokens = self.bytes = 0
        self.pending_bytes = 0
        self._eos = np.array([vocabulary.eos_id], dtype=vocabulary.dtype)
        self._tokens: list[NDArray[Any]] = []
        self._records: list[tuple[int, int, int]] = []
        self._origins: list[bytes] = []
        self._origin_bytes = 0
        self._prompts: list[tuple[int, int]] = []
        self.examples = False
        self._written_tokens = 0
        self._shard_digests: list[str] = []
        self._shard_hash = new_hash()
        self._content_hash = new_hash()
        self._records_hash = new_hash()
        self._origins_hash = new_hash()
        self._prompts_hash = new_hash()

    def append(self, tokens: ArrayLike, text_bytes: int, origin: str, prompt: tuple[int, int] | None = None) -> None:
        ids = np.asarray(tokens)
        if ids.ndim != 1 or (len(ids) and ids.dtype.kind not in "iu"):
            raise DataError(f"document {origin}: tokens must be a row of integers, not {ids.dtype} {ids.shape}")
        if len(ids) and (int(ids.min()) < 0 or int(ids.max()) >= self.vocabulary.size):
            raise DataError(
                f"document {origin}: token ids {int(ids.min())} .. {int(ids.max())} do not fit a vocabulary of "
                f"{self.vocabulary.size}; was it encoded with another tokenizer?"
            )
        if self.documents and self.examples != (prompt is not None):
            raise DataError(
                f"document {origin} has {'no' if prompt is None else 'a'} prompt, unlike those before it in "
                f"{self.folder}; the documents of a domain must all be examples, or none: set prompt_field on all of "
                f"its corpora, or on none"
            )
        if prompt is not None:
            self.examples = True
            self._prompts.append(prompt)
        self._tokens += [ids.astype(self.vocabulary.dtype), self._eos]
        self.tokens += len(ids) + 1
        self.bytes += int(text_bytes)
        self.documents += 1
        name = origin.encode("utf-8", errors="backslashreplace")
        self._origins.append(name)
        self._origin_bytes += len(name)
        self._records.append((self.tokens, int(text_bytes), self._origin_bytes))
        self.pending_bytes += (len(ids) + 1) * self.vocabulary.dtype.itemsize + len(name) + 3 * 64 + 2 * 96

    def flush(self) -> None:
        """Write what waits in memory."""
        if self.pending_bytes == 0:
            return
        waiting = np.concatenate(self._tokens)
        self._tokens = []
        while len(waiting):
            shard, used = divmod(self._written_tokens, self.shard_tokens)
            part, waiting = waiting[: self.shard_tokens - used], waiting[self.shard_tokens - used :]
            self._write(shard_name(shard), part.tobytes(), self._shard_hash)
            self._content_hash.update(part)
            self._written_tokens += len(part)
            if used + len(part) == self.shard_tokens:
                self._shard_digests.append(self._shard_hash.hexdigest())
                self._shard_hash = new_hash()
        self._write(DOCUMENTS, np.array(self._records, dtype=DOCUMENT).tobytes(), self._records_hash)
        self._write(ORIGINS, b"".join(self._origins), self._origins_hash)
        if self.examples:
            self._write(PROMPTS, np.array(self._prompts, dtype=PROMPT).tobytes(), self._prompts_hash)
        self._records, self._origins, self._prompts = [], [], []
        self.pending_bytes = 0

    def _write(self, name: str, data: bytes, digest: Any) -> None:
        try:
            with open(self.folder / name, "ab", buffering=0) as file:
                left = memoryview(data)
                while left:
                    left = left[file.write(left) :]
        except OSError as error:
            raise DataError(
                f"cannot write {self.folder / name}: {error.strerror}; free some space and run again"
            ) from error
        digest.update(data)

    def state(self) -> dict[str, Any]:
        """What `restore` needs to take up the files as they are now; call after `flush`."""
        return {
            "format": FORMAT,
            "tokenizer": self.vocabulary.fingerprint,
            "vocab_size": self.vocabulary.size,
            "eos_id": self.vocabulary.eos_id,
            "shard_tokens": self.shard_tokens,
            "documents": self.documents,
            "tokens": self.tokens,
            "bytes": self.bytes,
            "origin_bytes": self._origin_bytes,
            "examples": self.examples,
            "digests": [
                digest.hexdigest()
                for digest in (self._content_hash, self._records_hash, self._origins_hash, self._prompts_hash)
            ],
        }

    def restore(self, state: Any) -> bool:
        """Cut the files back to a recorded state and rebuild the digests; False if they do not hold it."""
        if not isinstance(state, dict):
            return False
        mine = self.state()
        if any(state.get(key) != mine[key] for key in ("format", "tokenizer", "vocab_size", "eos_id", "shard_tokens")):
            return False
        self.documents, self.tokens, self.bytes = state["documents"], state["tokens"], state["bytes"]
        self._origin_bytes, self._written_tokens = state["origin_bytes"], state["tokens"]
        self.examples = bool(state.get("examples"))
        item = self.vocabulary.dtype.itemsize
        full, rest = divmod(self.tokens, self.shard_tokens)
        try:
            for number in range(full + (rest > 0)):
                size = (self.shard_tokens if number < full else rest) * item
                self._take_up(shard_name(number), size, self._shard_hash, self._content_hash)
                if number < full:
                    self._shard_digests.append(self._shard_hash.hexdigest())
                    self._shard_hash = new_hash()
            self._take_up(DOCUMENTS, self.documents * DOCUMENT.itemsize, self._records_hash)
            self._take_up(ORIGINS, self._origin_bytes, self._origins_hash)
            if self.examples:
                self._take_up(PROMPTS, self.documents * PROMPT.itemsize, self._prompts_hash)
            else:
                (self.folder / PROMPTS).unlink(missing_ok=True)
            for stray in self.folder.glob("tokens-*.bin"):
                if stray.name not in {shard_name(number) for number in range(full + (rest > 0))}:
                    stray.unlink()
        except (OSError, EOFError):
            return False
        return bool(self.state()["digests"] == state["digests"])

    def _take_up(self, name: str, size: int, *digests: Any) -> None:
        path = self.folder / name
        if path.stat().st_size < size:
            raise EOFError(name)
        os.truncate(path, size)
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                for digest in digests:
                    digest.update(block)

    def close(self) -> None:
        """Write the rest and the index."""
        self.flush()
        digests = list(self._shard_digests)
        if self._written_tokens % self.shard_tokens:
            digests.append(self._shard_hash.hexdigest())
        named = {shard_name(number): digest for number, digest in enumerate(digests)}
        named[DOCUMENTS] = self._records_hash.hexdigest()
        named[ORIGINS] = self._origins_hash.hexdigest()
        contents = [
            self.vocabulary.fingerprint, self._content_hash.hexdigest(), self._records_digest_without_origins()
        ]  # fmt: skip
        if self.examples:
            named[PROMPTS] = self._prompts_hash.hexdigest()
            contents.append(named[PROMPTS])
        files = {
            name: {"size": (self.folder / name).stat().st_size, "blake2b": digest} for name, digest in named.items()
        }
        index = {
            "format": FORMAT,
            "tokenizer": self.vocabulary.fingerprint,
            "vocab_size": self.vocabulary.size,
            "eos_id": self.vocabulary.eos_id,
            "dtype": self.vocabulary.dtype.str,
            "shard_tokens": self.shard_tokens,
            "tokens": self.tokens,
            "documents": self.documents,
            "bytes": self.bytes,
            "fingerprint": checksum(contents),
            "files": files,
        }
        try:
            write_object(self.folder / INDEX, index)
        except OSError as error:
            raise DataError(f"cannot write {self.folder / INDEX}: {error.strerror}; {_NO_ROOM}") from error

    def _records_digest_without_origins(self) -> str:
        """Digest of the documents' ends and sizes, so that the fingerprint does not depend on names of files."""
        records = map_file(self.folder / DOCUMENTS, DOCUMENT)
        digest = new_hash()
        for start in range(0, len(records), 1 << 16):
            block = records[start : start + (1 << 16)]
            digest.update(np.stack([block["end"], block["text_bytes"]], axis=1).tobytes())
        value: str = digest.hexdigest()
        return value


class PartialFolder:
    """The hidden sibling a store is written in: locked, journalled, renamed at the end."""

    def __init__(self, final: Path, *, resume: bool, overwrite: bool) -> None:
        self.final = final
        self.resume = resume
        self.overwrite = overwrite
        self.path = final.with_name(f".{final.name}.partial")
        self.closed = False
        if final.exists() and not overwrite:
            raise DataError(f"{final} already exists; delete it, choose another path, or allow overwriting")
        make_folder(self.path)
        self._lock = os.open(self.path / "lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._lock)
            raise DataError(f"{final} is being written by another process; wait for it to end") from error
        if not resume:
            self.clear()

    def read_journal(self) -> dict[str, Any] | None:
        """The journal of an interrupted run; without one the folder is emptied."""
        try:
            journal = parse_json((self.path / JOURNAL).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            self.clear()
            return None
        return journal if isinstance(journal, dict) else {}

    def write_journal(self, journal: Mapping[str, Any]) -> None:
        write_json(self.path / JOURNAL, journal)

    def clear(self) -> None:
        for child in self.path.iterdir():
            if child.is_dir():
                shutil.rmtree(child)
            elif child.name != "lock":
                child.unlink()

    def publish(self) -> None:
        (self.path / JOURNAL).unlink(missing_ok=True)
        (self.path / "lock").unlink()
        sync_file(self.path)
        if self.overwrite and self.final.exists():
            remove(self.final)
        os.rename(self.path, self.final)
        sync_file(self.final.parent)
        os.close(self._lock)
        self.closed = True

    @contextlib.contextmanager
    def kept_on_failure(self) -> Iterator[None]:
        """Let go of the folder when the body fails: what is on record stays for a writer that resumes."""
        try:
            yield
        except BaseException:
            self.abandon(keep=self.resume)
            raise

    def abandon(self, *, keep: bool) -> None:
        if self.closed:
            return
        if not (keep and (self.path / JOURNAL).exists()):
            remove(self.path)
        os.close(self._lock)
        self.closed = True


def shard_name(number: int) -> str:
    """File name of a shard."""
    return f"tokens-{number:05d}.bin"


def new_hash() -> Any:
    """A running BLAKE2b-256, for contents."""
    return hashlib.blake2b(digest_size=32)


def file_digest(path: Path) -> str:
    """BLAKE2b-256 of a file, read in blocks."""
    digest = new_hash()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    value: str = digest.hexdigest()
    return value


def map_file(path: Path, dtype: np.dtype[Any]) -> NDArray[Any]:
    """A file as a read-only array mapped from disk."""
    return np.asarray(np.memmap(path, dtype=dtype, mode="r"))


def make_folder(folder: Path) -> None:
    """Make a folder and its parents, or say why not."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"cannot make folder {folder}: {error.strerror}") from error


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that a reader sees the old file or the new one, never a part."""
    try:
        write_whole(path, json.dumps(value, indent=1))
    except OSError as error:
        raise DataError(f"cannot write {path}: {error.strerror}; {_NO_ROOM}") from error


def sync_file(path: Path) -> None:
    """Force a file or a folder to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
