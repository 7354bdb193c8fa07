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

from weftlm.corpora import store_files
from weftlm.corpora.source import Source
from weftlm.corpora.store import MultiStoreWriter, TokenStore, TokenStoreWriter, Vocabulary, open_stores
from weftlm.corpora.store_files import StoreFiles
from weftlm.errors import DataError
from weftlm.files import write_object

VOCABULARY = Vocabulary(size=50, eos_id=0, fingerprint="tok")


def write(path: Path, rows: list[list[int]], vocabulary: Vocabulary = VOCABULARY, **options: int) -> TokenStore:
    with TokenStoreWriter(path, vocabulary, **options) as writer:
        for number, row in enumerate(rows):
            writer.append(row, 10 * len(row), f"file:{number}")
    return TokenStore(path)


ROWS = [[1, 2, 3], [4], [], [5, 6, 7, 8, 9]]


def test_a_store_says_what_is_in_it(tmp_path: Path) -> None:
    store = write(tmp_path / "s", ROWS, shard_tokens=4)
    assert isinstance(store, Source)
    assert store.read(0, len(store)).tolist() == [1, 2, 3, 0, 4, 0, 0, 5, 6, 7, 8, 9, 0]
    assert (store.documents, store.bytes, store.vocab_size, store.eos_id, store.tokenizer) == (4, 90, 50, 0, "tok")
    assert store.document_spans.tolist() == [[0, 4], [4, 6], [6, 7], [7, 13]]
    assert store.document_bytes.tolist() == [30, 10, 0, 50]
    assert [store.document_at(token) for token in range(len(store))] == [0] * 4 + [1] * 2 + [2] + [3] * 6
    assert [store.origin(number) for number in range(4)] == [f"file:{number}" for number in range(4)]
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(("size", "dtype"), [(1 << 16, "<u2"), ((1 << 16) + 1, "<u4")])
def test_the_width_follows_the_vocabulary(tmp_path: Path, size: int, dtype: str) -> None:
    store = write(tmp_path / "s", [[size - 1, 3]], Vocabulary(size, 2, "t"))
    assert store.read(0, 3).tolist() == [size - 1, 3, 2]
    assert (tmp_path / "s" / "tokens-00000.bin").stat().st_size == 3 * np.dtype(dtype).itemsize


def test_reading_outside_the_store_is_an_error(tmp_path: Path) -> None:
    store = write(tmp_path / "s", ROWS, shard_tokens=4)
    for start, count in ((-1, 2), (12, 2), (14, 0), (0, -1)):
        with pytest.raises(IndexError):
            store.read(start, count)
    for starts in ([-1, 3], [3, 12]):
        with pytest.raises(IndexError):
            store.read_many(np.array(starts), 2)
    assert store.read_many(np.array([], dtype=np.int64), 3).shape == (0, 3)
    for call in (store.origin, store.document_at):
        with pytest.raises(IndexError):
            call(13)


def test_the_caller_may_change_what_was_read(tmp_path: Path) -> None:
    store = write(tmp_path / "s", ROWS)
    store.read(0, 4)[:] = 9
    store.read_many(np.array([0, 1]), 4)[:] = 9
    assert store.read(0, 4).tolist() == [1, 2, 3, 0]


@pytest.mark.parametrize("row", [[50], [-1], [1.5], [[1]]])
def test_ids_that_do_not_fit_are_refused(tmp_path: Path, row: list[int]) -> None:
    with pytest.raises(DataError), TokenStoreWriter(tmp_path / "s", VOCABULARY) as writer:
        writer.append(row, 1, "here")
    assert not list(tmp_path.iterdir())


def test_the_fingerprint_follows_contents_and_tokenizer_not_layout(tmp_path: Path) -> None:
    first = write(tmp_path / "a", ROWS).fingerprint
    assert write(tmp_path / "b", ROWS, shard_tokens=3, buffer_bytes=1).fingerprint == first
    others = [
        write(tmp_path / "c", ROWS, Vocabulary(50, 0, "other")),
        write(tmp_path / "d", [[1, 2, 3], [4], [], [5, 6, 7, 8, 8]]),
        write(tmp_path / "e", [*ROWS[:3], [5, 6, 7], [9]]),
        write(tmp_path / "f", ROWS[::-1]),
    ]
    assert len({first, *(store.fingerprint for store in others)}) == 5


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(bytes(data))


FILES = ["tokens-00000.bin", "tokens-00001.bin", "documents.bin", "origins.bin"]


@pytest.mark.parametrize("name", FILES)
def test_a_changed_file_is_named(tmp_path: Path, name: str) -> None:
    write(tmp_path / "s", ROWS, shard_tokens=8)
    flip(tmp_path / "s" / name, 3)
    with pytest.raises(DataError, match=rf"{name} has changed since it was written.*prepare the data again"):
        TokenStore(tmp_path / "s")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("verify", ["full", "sizes"])
def test_a_cut_or_missing_file_is_named(tmp_path: Path, name: str, verify: str) -> None:
    write(tmp_path / "s", ROWS, shard_tokens=8)
    path = tmp_path / "s" / name
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match=rf"{name} has \d+ bytes, index says \d+; restore it"):
        TokenStore(tmp_path / "s", verify=verify)
    path.unlink()
    with pytest.raises(DataError, match=rf"{name} is missing"):
        TokenStore(tmp_path / "s", verify=verify)


def test_a_changed_index_is_noticed(tmp_path: Path) -> None:
    write(tmp_path / "s", ROWS)
    path = tmp_path / "s" / "index.json"
    index = json.loads(path.read_text())
    path.write_text(json.dumps({**index, "documents": 3}))
    with pytest.raises(DataError, match=r"index.json was altered"):
        TokenStore(tmp_path / "s")
    del index["checksum"]
    write_object(path, {**index, "format": "weftlm token store 9"})
    with pytest.raises(DataError, match="not of the format"):
        TokenStore(tmp_path / "s")
    path.write_text("{")
    with pytest.raises(DataError, match="cannot be read"):
        TokenStore(tmp_path / "s")
    path.unlink()
    with pytest.raises(DataError, match=r"it has no index\.json"):
        TokenStore(tmp_path / "s")


def test_contents_are_compared_at_the_first_opening_in_a_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from weftlm.corpora import store as module

    write(tmp_path / "s", ROWS)
    monkeypatch.setattr(module, "_verified", set())
    hashed = []
    real = module.file_digest
    monkeypatch.setattr(module, "file_digest", lambda path: hashed.append(path.name) or real(path))
    TokenStore(tmp_path / "s")
    assert sorted(hashed) == ["documents.bin", "origins.bin", "tokens-00000.bin"]
    hashed.clear()
    TokenStore(tmp_path / "s")
    assert hashed == []
    path = tmp_path / "s" / "documents.bin"
    os.utime(path, ns=(1, 1))
    TokenStore(tmp_path / "s").verify()
    assert len(hashed) == 6


@pytest.mark.parametrize("name", ["tokens-00000.bin", "documents.bin", "origins.bin", "index.json"])
def test_one_changed_bit_is_found_though_size_and_time_are_as_before(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "s", ROWS)
    TokenStore(tmp_path / "s")
    path = tmp_path / "s" / name
    data, times = bytearray(path.read_bytes()), path.stat()
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    monkeypatch.setattr("weftlm.corpora.store._verified", set())  # as another process
    with pytest.raises(DataError, match=re.escape(str(path))):
        TokenStore(tmp_path / "s")


def test_a_store_that_knows_no_bytes_says_so_in_other_processes_too(tmp_path: Path) -> None:
    store = write(tmp_path / "s", ROWS)
    store.forget_bytes()
    assert ForkingPickler.loads(ForkingPickler.dumps(store)).bytes == store.bytes == 0


def test_tokens_of_another_tokenizer_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "s", ROWS)
    TokenStore(tmp_path / "s", tokenizer="tok")
    with pytest.raises(DataError, match="made with tokenizer tok, not other; prepare"):
        TokenStore(tmp_path / "s", tokenizer="other")


def test_a_pickled_store_maps_its_files_anew(tmp_path: Path) -> None:
    store = write(tmp_path / "s", ROWS)
    data = bytes(ForkingPickler.dumps(store))
    assert len(data) < 500
    np.testing.assert_array_equal(ForkingPickler.loads(data).read(2, 6), store.read(2, 6))
    shutil.rmtree(tmp_path / "s")
    write(tmp_path / "s", ROWS[:2])
    with pytest.raises(DataError, match="was replaced while in use"):
        ForkingPickler.loads(data)


def test_an_existing_store_is_only_replaced_on_request(tmp_path: Path) -> None:
    write(tmp_path / "s", ROWS)
    with pytest.raises(DataError, match="already exists"):
        TokenStoreWriter(tmp_path / "s", VOCABULARY)
    with TokenStoreWriter(tmp_path / "s", VOCABULARY, overwrite=True) as writer:
        writer.append([7], 1)
        assert len(TokenStore(tmp_path / "s")) == 13
    assert TokenStore(tmp_path / "s").read(0, 2).tolist() == [7, 0]


def test_two_writers_of_one_store_exclude_each_other(tmp_path: Path) -> None:
    with TokenStoreWriter(tmp_path / "s", VOCABULARY) as writer:
        with pytest.raises(DataError, match="being written by another process"):
            TokenStoreWriter(tmp_path / "s", VOCABULARY)
        writer.append([1], 1)


def test_an_empty_store_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no document"), TokenStoreWriter(tmp_path / "s", VOCABULARY):
        pass
    with pytest.raises(DataError, match="no document"), MultiStoreWriter(tmp_path / "s", VOCABULARY):
        pass
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_a_clear_error_and_leaves_no_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    for buffer_bytes in (1, 1 << 20):  # fails in append, fails in finish
        writer = TokenStoreWriter(tmp_path / "s", VOCABULARY, buffer_bytes=buffer_bytes)
        with monkeypatch.context() as patch:
            patch.setattr(store_files, "open", full, raising=False)
            with pytest.raises(DataError, match=r"tokens-00000.bin: No space left on device.*run again"), writer:
                writer.append([1], 1)
        assert not list(tmp_path.iterdir())
    assert len(write(tmp_path / "s", ROWS)) == 13


def test_a_disk_that_fills_while_finishing_costs_only_what_was_not_on_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = TokenStoreWriter(tmp_path / "s", VOCABULARY, resume=True)
    writer.append([1], 1)
    writer.commit("one")
    writer.append([2], 1)
    with monkeypatch.context() as patch:
        patch.setattr(StoreFiles, "close", lambda self: (_ for _ in ()).throw(DataError("full")))
        with pytest.raises(DataError, match="full"):
            writer.finish()
    with TokenStoreWriter(tmp_path / "s", VOCABULARY, resume=True) as again:
        assert (again.documents, again.mark) == (1, "one")
        again.append([3], 1)
    assert TokenStore(tmp_path / "s").read(0, 4).tolist() == [1, 0, 3, 0]


def test_thousands_of_domains_at_once_in_bounded_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waiting: list[int] = []
    opened: list[IO[bytes]] = []
    real = open

    def watched(*arguments: Any, **options: Any) -> IO[bytes]:
        assert all(file.closed for file in opened), "two files are open at once"
        opened[:] = [real(*arguments, **options)]
        return opened[0]

    monkeypatch.setattr(store_files, "open", watched, raising=False)
    with MultiStoreWriter(tmp_path / "m", VOCABULARY, buffer_bytes=1_000_000) as writer:
        for number in range(6_000):
            writer.append([number % 49 + 1] * (number % 5), 1, f"o:{number}", f"topic/{number * 7 % 1000}")
            waiting.append(writer._pending_bytes)
    assert max(waiting) < 1_000_000
    stores = open_stores(tmp_path / "m")
    assert list(stores) == sorted(f"topic/{number}" for number in range(1000))
    assert sum(store.documents for store in stores.values()) == 6_000
    for label in ("topic/0", "topic/7", "topic/999"):
        wanted = [number for number in range(6_000) if f"topic/{number * 7 % 1000}" == label]
        expected = [token for number in wanted for token in [number % 49 + 1] * (number % 5) + [0]]
        assert stores[label].read(0, len(stores[label])).tolist() == expected
        assert stores[label].origin(1) == f"o:{wanted[1]}"


def test_a_document_without_label_is_refused_by_many(tmp_path: Path) -> None:
    with (
        pytest.raises(DataError, match="document here has no label"),
        MultiStoreWriter(tmp_path / "m", VOCABULARY) as w,
    ):
        w.append([1], 1, "here")


def test_labels_that_differ_only_in_case_cannot_share_a_disk(tmp_path: Path) -> None:
    writer = MultiStoreWriter(tmp_path / "m", VOCABULARY)
    writer.append([1], 1, "", "Code")
    with pytest.raises(DataError, match="rename one"), writer:
        writer.append([1], 1, "", "code")
