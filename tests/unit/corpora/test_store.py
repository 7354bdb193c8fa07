"""Token stores: what is written is read, whole or not at all; what is damaged or of another tokenizer is refused."""

import errno
import os
import shutil
from collections.abc import Iterator
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import IO, Any

import numpy as np
import pytest
from support.faults import Killed, flip, killing

from weftlm.corpora import store as module
from weftlm.corpora import store_writer
from weftlm.corpora.config import TrainConfig
from weftlm.corpora.source import Document, Source
from weftlm.corpora.store import TokenStore, Vocabulary, open_stores
from weftlm.corpora.store_writer import tokenise_by_label, write_stores
from weftlm.corpora.tokens import train_tokenizer
from weftlm.errors import CheckpointError, ConfigError, DataError
from weftlm.files import SEAL

VOCABULARY = Vocabulary(size=50, eos_id=0, fingerprint="tok")
ROWS = [[1, 2, 3], [4], [], [5, 6, 7, 8, 9]]
DOCUMENTS = [
    Document(f"document {i} says {i * 7919 % 1000} times hello, é", f"here:{i}", f"d{i % 3}") for i in range(60)
]


def write(path: Path, rows: list[list[int]], vocabulary: Vocabulary = VOCABULARY, **options: int) -> TokenStore:
    with write_stores(path, vocabulary, **options) as writer:
        for row in rows:
            writer.append(row, 10 * len(row), "d")
    return open_stores(path)["d"]


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
    for start, count in ((-1, 2), (12, 2), (14, 0), (0, -1)):
        with pytest.raises(IndexError):
            store.read(start, count)
        if count > 0:
            with pytest.raises(IndexError):
                store.read_many(np.array([3, start]), count)
    assert store.read_many(np.array([], dtype=np.int64), 3).shape == (0, 3)


@pytest.mark.parametrize(("size", "dtype"), [(1 << 16, "<u2"), ((1 << 16) + 1, "<u4")])
def test_the_width_follows_the_vocabulary(tmp_path: Path, size: int, dtype: str) -> None:
    store = write(tmp_path / "s", [[size - 1, 3]], Vocabulary(size, 2, "t"))
    assert store.read(0, 3).tolist() == [size - 1, 3, 2]
    assert (store.path / "tokens.bin").stat().st_size == 3 * np.dtype(dtype).itemsize


@pytest.mark.parametrize("row", [[50], [-1], [1.5], [[1]]])
def test_ids_that_do_not_fit_are_refused(tmp_path: Path, row: list[int]) -> None:
    with pytest.raises(DataError, match="document here"), write_stores(tmp_path / "s", VOCABULARY) as writer:
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


@pytest.mark.parametrize("name", ["d/tokens.bin", "d/documents.bin", "d/index.json", "stores.json", SEAL])
@pytest.mark.parametrize("damage", ["gone", "cut", "one bit, size and time as before"])
def test_a_damaged_file_is_named(tmp_path: Path, name: str, damage: str) -> None:
    path = write(tmp_path / "s", ROWS).path.parent / name
    module._compare.cache_clear()  # as another process
    times = path.stat()
    if damage == "gone":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:-2])
    else:
        flip(path, len(path.read_bytes()) // 2)
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(DataError, match=path.name):
        open_stores(tmp_path / "s")


def test_contents_are_compared_once_in_a_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compared = []
    real = module.check_sealed
    monkeypatch.setattr(module, "check_sealed", lambda *args, **options: compared.append(1) or real(*args, **options))
    path = write(tmp_path / "s", ROWS).path
    open_stores(tmp_path / "s")
    assert len(compared) == 1
    os.utime(path / "documents.bin", ns=(1, 1))
    open_stores(tmp_path / "s", verify=False)
    open_stores(tmp_path / "s")
    assert len(compared) == 2


def test_tokens_of_another_tokenizer_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "s", ROWS).path
    TokenStore(path, tokenizer="tok")
    with pytest.raises(DataError, match="made with tokenizer tok, not other; prepare"):
        TokenStore(path, tokenizer="other")
    with pytest.raises(DataError, match="is no token store"):
        TokenStore(tmp_path)


def test_a_pickled_store_maps_its_files_again(tmp_path: Path) -> None:
    store = write(tmp_path / "s", ROWS)
    data = bytes(ForkingPickler.dumps(store))
    assert len(data) < 500
    np.testing.assert_array_equal(ForkingPickler.loads(data).read(2, 6), store.read(2, 6))
    shutil.rmtree(tmp_path / "s")
    write(tmp_path / "s", ROWS[:2])
    with pytest.raises(DataError, match="was replaced while in use"):
        ForkingPickler.loads(data)


def test_an_existing_folder_and_an_empty_one_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no document"), write_stores(tmp_path / "s", VOCABULARY):
        pass
    assert not list(tmp_path.iterdir())
    write(tmp_path / "s", ROWS)
    with pytest.raises(ConfigError, match="is not empty"):
        write(tmp_path / "s", ROWS)


@pytest.mark.parametrize("buffer_bytes", [1, 1 << 20])  # fails in append, fails at the end
def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, buffer_bytes: int) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(store_writer, "open", full, raising=False)
    with pytest.raises(CheckpointError, match="disk is full"):
        write(tmp_path / "s", ROWS, buffer_bytes=buffer_bytes)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("step", range(0, 40, 3))
def test_a_killed_writer_leaves_whole_stores_or_none(tmp_path: Path, step: int) -> None:
    try:
        with killing(step):
            write(tmp_path / "s", ROWS)
    except Killed:
        assert not (tmp_path / "s").exists() or len(open_stores(tmp_path / "s")["d"]) == 13
    shutil.rmtree(tmp_path / "s", ignore_errors=True)
    assert len(write(tmp_path / "s", ROWS)) == 13


def test_many_domains_at_once_in_bounded_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waiting: list[int] = []
    opened: list[IO[bytes]] = []
    real = open

    def watched(*arguments: Any, **options: Any) -> IO[bytes]:
        assert all(file.closed for file in opened), "two files are open at once"
        opened[:] = [real(*arguments, **options)]
        return opened[0]

    monkeypatch.setattr(store_writer, "open", watched, raising=False)
    with write_stores(tmp_path / "m", VOCABULARY, buffer_bytes=300_000) as writer:
        for number in range(1_800):
            writer.append([number % 49 + 1] * (number % 5), 1, f"topic/{number * 7 % 300}")
            waiting.append(writer.waiting_bytes)
    assert max(waiting) < 300_000 < sum(np.diff(waiting).clip(0))
    stores = open_stores(tmp_path / "m")
    assert list(stores) == sorted(f"topic/{number}" for number in range(300))
    assert sum(store.documents for store in stores.values()) == 1_800


def test_labels_that_differ_only_in_case_cannot_share_a_disk(tmp_path: Path) -> None:
    with write_stores(tmp_path / "m", VOCABULARY) as writer:
        writer.append([1], 1, "Code")
        with pytest.raises(DataError, match="rename one"):
            writer.append([1], 1, "code")


# -- from documents -----------------------------------------------------------------------------------------------

TOKENIZER = train_tokenizer((document.text for document in DOCUMENTS), TrainConfig(vocab_size=300))


def test_progress_is_told_in_bytes_of_text(tmp_path: Path) -> None:
    seen: list[int] = []
    stores = tokenise_by_label(DOCUMENTS, TOKENIZER, tmp_path / "s", batch_bytes=500, progress=seen.append)
    assert len(seen) > 3
    assert seen == sorted(set(seen))
    assert seen[-1] == sum(store.bytes for store in stores.values())


def test_what_cannot_be_tokenised_leaves_nothing(tmp_path: Path) -> None:
    def breaking() -> Iterator[Document]:
        yield from DOCUMENTS[:9]
        raise DataError("the stream broke")

    for documents, says in (
        ([], "no document"), ([Document("text", "here")], "document here has no label"), (breaking(), "broke"),
    ):  # fmt: skip
        with pytest.raises(DataError, match=says):
            tokenise_by_label(documents, TOKENIZER, tmp_path / "s", batch_bytes=100)
    assert not list(tmp_path.iterdir())
