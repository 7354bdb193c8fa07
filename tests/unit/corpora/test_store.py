"""Stores on disk: what is refused, what a message says, many domains at once."""

import errno
import json
import os
import re
import shutil
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import IO, Any

import numpy as np
import pytest

from weftlm.corpora import store as module
from weftlm.corpora import store_writer
from weftlm.corpora.source import Source
from weftlm.corpora.store import TokenStore, Vocabulary, open_stores
from weftlm.corpora.store_writer import StoreWriter
from weftlm.errors import CheckpointError, DataError
from weftlm.files import room, write_object

VOCABULARY = Vocabulary(size=50, eos_id=0, fingerprint="tok")
ROWS = [[1, 2, 3], [4], [], [5, 6, 7, 8, 9]]
FILES = ["tokens.bin", "documents.bin"]


def write(path: Path, rows: list[list[int]], vocabulary: Vocabulary = VOCABULARY, **options: int) -> TokenStore:
    with StoreWriter(path, vocabulary, **options) as writer:
        for row in rows:
            writer.append(row, 10 * len(row), "d")
    return TokenStore(path / "d")


def test_a_store_says_what_is_in_it(tmp_path: Path) -> None:
    store = write(tmp_path / "s", ROWS)
    assert isinstance(store, Source)
    assert store.read(0, len(store)).tolist() == [1, 2, 3, 0, 4, 0, 0, 5, 6, 7, 8, 9, 0]
    assert (store.documents, store.bytes, store.vocab_size, store.eos_id, store.tokenizer) == (4, 90, 50, 0, "tok")
    assert store.document_spans.tolist() == [[0, 4], [4, 6], [6, 7], [7, 13]]
    assert store.document_bytes.tolist() == [30, 10, 0, 50]
    assert not list(tmp_path.glob(".*"))
    store.read(0, 4)[:] = 9  # the caller may change what was read
    store.read_many(np.array([0, 1]), 4)[:] = 9
    assert store.read(0, 4).tolist() == [1, 2, 3, 0]


@pytest.mark.parametrize(("size", "dtype"), [(1 << 16, "<u2"), ((1 << 16) + 1, "<u4")])
def test_the_width_follows_the_vocabulary(tmp_path: Path, size: int, dtype: str) -> None:
    store = write(tmp_path / "s", [[size - 1, 3]], Vocabulary(size, 2, "t"))
    assert store.read(0, 3).tolist() == [size - 1, 3, 2]
    assert (store.path / "tokens.bin").stat().st_size == 3 * np.dtype(dtype).itemsize


def test_reading_outside_the_store_is_an_error(tmp_path: Path) -> None:
    store = write(tmp_path / "s", ROWS)
    for start, count in ((-1, 2), (12, 2), (14, 0), (0, -1)):
        with pytest.raises(IndexError):
            store.read(start, count)
    for starts in ([-1, 3], [3, 12]):
        with pytest.raises(IndexError):
            store.read_many(np.array(starts), 2)
    assert store.read_many(np.array([], dtype=np.int64), 3).shape == (0, 3)


@pytest.mark.parametrize("row", [[50], [-1], [1.5], [[1]]])
def test_ids_that_do_not_fit_are_refused(tmp_path: Path, row: list[int]) -> None:
    with pytest.raises(DataError, match="document here"), StoreWriter(tmp_path / "s", VOCABULARY) as writer:
        writer.append(row, 1, "d", "here")
    assert not list(tmp_path.iterdir())


def test_the_fingerprint_follows_contents_and_tokenizer_not_the_way_of_writing(tmp_path: Path) -> None:
    first = write(tmp_path / "a", ROWS).fingerprint
    assert write(tmp_path / "b", ROWS, buffer_bytes=1).fingerprint == first
    others = [
        write(tmp_path / "c", ROWS, Vocabulary(50, 0, "other")),
        write(tmp_path / "d", [[1, 2, 3], [4], [], [5, 6, 7, 8, 8]]),
        write(tmp_path / "e", [*ROWS[:3], [5, 6, 7], [9]]),
        write(tmp_path / "f", ROWS[::-1]),
    ]
    assert len({first, *(store.fingerprint for store in others)}) == 5


@pytest.mark.parametrize("name", FILES)
def test_a_cut_or_missing_file_is_named(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / "s", ROWS).path / name
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match=rf"{name} has \d+ bytes, \d+ when it was written; restore it"):
        TokenStore(path.parent)
    path.unlink()
    with pytest.raises(DataError, match=rf"{name} is missing"):
        TokenStore(path.parent)


def test_a_changed_index_is_noticed(tmp_path: Path) -> None:
    path = write(tmp_path / "s", ROWS).path / "index.json"
    index = json.loads(path.read_text())
    path.write_text(json.dumps({**index, "documents": 3}))
    with pytest.raises(DataError, match=r"index.json was altered"):
        TokenStore(path.parent)
    del index["checksum"]
    write_object(path, {**index, "format": "weftlm token store 9"})
    with pytest.raises(DataError, match="not of the format"):
        TokenStore(path.parent)
    path.unlink()
    with pytest.raises(DataError, match=r"it has no index\.json"):
        TokenStore(path.parent)
    with pytest.raises(DataError, match=r"stores\.json is missing"):
        open_stores(tmp_path)


def test_contents_are_compared_at_the_first_opening_in_a_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared = []
    real = module.check_listed
    monkeypatch.setattr(module, "check_listed", lambda *arguments: compared.append(1) or real(*arguments))
    path = write(tmp_path / "s", ROWS).path
    TokenStore(path)
    assert len(compared) == 1
    os.utime(path / "documents.bin", ns=(1, 1))
    TokenStore(path)
    TokenStore(path, verify=False)
    assert len(compared) == 2


@pytest.mark.parametrize("name", [*FILES, "index.json"])
def test_one_changed_bit_is_found_though_size_and_time_are_as_before(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "s", ROWS).path / name
    data, times = bytearray(path.read_bytes()), path.stat()
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    monkeypatch.setattr(module, "_compared", set())  # as another process
    with pytest.raises(DataError, match=re.escape(str(path))):
        TokenStore(path.parent)


def test_tokens_of_another_tokenizer_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "s", ROWS).path
    TokenStore(path, tokenizer="tok")
    with pytest.raises(DataError, match="made with tokenizer tok, not other; prepare"):
        TokenStore(path, tokenizer="other")


def test_a_pickled_store_maps_its_files_again(tmp_path: Path) -> None:
    store = write(tmp_path / "s", ROWS)
    data = bytes(ForkingPickler.dumps(store))
    assert len(data) < 500
    np.testing.assert_array_equal(ForkingPickler.loads(data).read(2, 6), store.read(2, 6))
    store.forget_bytes()
    assert ForkingPickler.loads(ForkingPickler.dumps(store)).bytes == store.bytes == 0
    shutil.rmtree(tmp_path / "s")
    write(tmp_path / "s", ROWS[:2])
    with pytest.raises(DataError, match="was replaced while in use"):
        ForkingPickler.loads(data)


def test_an_existing_folder_and_an_empty_one_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no document"), StoreWriter(tmp_path / "s", VOCABULARY):
        pass
    assert not list(tmp_path.iterdir())
    write(tmp_path / "s", ROWS)
    with pytest.raises(DataError, match="already exists"):
        StoreWriter(tmp_path / "s", VOCABULARY)


@pytest.mark.parametrize("buffer_bytes", [1, 1 << 20])  # fails in append, fails at the end
def test_a_full_disk_costs_only_what_was_not_on_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, buffer_bytes: int
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    writer = StoreWriter(tmp_path / "s", VOCABULARY, buffer_bytes=buffer_bytes)
    writer.append([1], 1, "d")
    writer.commit("one")
    monkeypatch.setattr(store_writer, "open", full, raising=False)
    with pytest.raises(CheckpointError, match="disk is full"), room(tmp_path), writer:
        writer.append([2], 1, "d")
    monkeypatch.undo()
    assert not (tmp_path / "s").exists()
    with StoreWriter(tmp_path / "s", VOCABULARY) as again:
        assert (again.documents, again.mark) == (1, "one")
        again.append([3], 1, "d")
    assert TokenStore(tmp_path / "s/d").read(0, 4).tolist() == [1, 0, 3, 0]


def test_many_domains_at_once_in_bounded_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waiting: list[int] = []
    opened: list[IO[bytes]] = []
    real = open

    def watched(*arguments: Any, **options: Any) -> IO[bytes]:
        assert all(file.closed for file in opened), "two files are open at once"
        opened[:] = [real(*arguments, **options)]
        return opened[0]

    monkeypatch.setattr(store_writer, "open", watched, raising=False)
    with StoreWriter(tmp_path / "m", VOCABULARY, buffer_bytes=300_000) as writer:
        for number in range(1_800):
            writer.append([number % 49 + 1] * (number % 5), 1, f"topic/{number * 7 % 300}")
            waiting.append(writer._waiting_bytes)
    assert max(waiting) < 300_000
    stores = open_stores(tmp_path / "m")
    assert list(stores) == sorted(f"topic/{number}" for number in range(300))
    assert sum(store.documents for store in stores.values()) == 1_800
    for label in ("topic/0", "topic/7", "topic/299"):
        wanted = [number for number in range(1_800) if f"topic/{number * 7 % 300}" == label]
        expected = [token for number in wanted for token in [number % 49 + 1] * (number % 5) + [0]]
        assert stores[label].read(0, len(stores[label])).tolist() == expected


def test_labels_that_differ_only_in_case_cannot_share_a_disk(tmp_path: Path) -> None:
    writer = StoreWriter(tmp_path / "m", VOCABULARY)
    writer.append([1], 1, "Code")
    with pytest.raises(DataError, match="rename one"):
        writer.append([1], 1, "code")
