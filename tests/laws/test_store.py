"""Laws of token stores: what is written is read, however it is cut into shards, batches and interrupted runs."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weftlm.corpora.config import TrainConfig
from weftlm.corpora.source import Document
from weftlm.corpora.store import TokenStore, Vocabulary, open_stores
from weftlm.corpora.store_writer import StoreWriter
from weftlm.corpora.tokenise import tokenise_by_label
from weftlm.corpora.tokens import train_tokenizer

DOCUMENTS = st.lists(st.lists(st.integers(0, 70_000), max_size=12), min_size=1, max_size=20)
TOKENIZER = train_tokenizer(["the cat sat on the mat, the cat sat"] * 5, TrainConfig(vocab_size=270))


VOCABULARY = Vocabulary(70_001, 70_000, "t")


def write(path: Path, rows: list[list[int]], **options: int) -> TokenStore:
    with StoreWriter(path, VOCABULARY, **options) as writer:
        for row in rows:
            writer.append(row, len(row), "d")
    return TokenStore(path / "d")


@settings(max_examples=60, deadline=None)
@given(DOCUMENTS, st.integers(1, 2000), st.data())
def test_what_is_written_is_read(rows: list[list[int]], buffer: int, data: st.DataObject) -> None:
    flat = np.array([token for row in rows for token in [*row, 70_000]], dtype=np.int64)
    with tempfile.TemporaryDirectory() as folder:
        store = write(Path(folder) / "s", rows, buffer_bytes=buffer)
        assert len(store) == len(flat)
        np.testing.assert_array_equal(store.read(0, len(flat)), flat)
        for (start, end), row in zip(store.document_spans, rows, strict=True):
            assert store.read(int(start), int(end - start)).tolist() == [*row, 70_000]
        count = data.draw(st.integers(0, len(flat)))
        starts = np.array(data.draw(st.lists(st.integers(0, len(flat) - count), max_size=8)), dtype=np.int64)
        many = store.read_many(starts, count)
        assert many.dtype == np.int64
        expected = np.array([store.read(int(start), count) for start in starts], dtype=np.int64)
        np.testing.assert_array_equal(many, expected.reshape(len(starts), count))
        np.testing.assert_array_equal(many, np.array([flat[s : s + count] for s in starts]).reshape(len(starts), count))


@settings(max_examples=25, deadline=None)
@given(DOCUMENTS, st.integers(1, 2000))
def test_the_fingerprint_does_not_depend_on_the_buffer(rows: list[list[int]], buffer: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        one = write(Path(folder) / "a", rows)
        assert write(Path(folder) / "b", rows, buffer_bytes=buffer).fingerprint == one.fingerprint


@settings(max_examples=25, deadline=None)
@given(DOCUMENTS, st.data())
def test_an_interrupted_writer_goes_on_from_its_last_commit(rows: list[list[int]], data: st.DataObject) -> None:
    committed = data.draw(st.integers(0, len(rows)))
    lost = data.draw(st.integers(committed, len(rows)))
    with tempfile.TemporaryDirectory() as folder:
        whole = write(Path(folder) / "whole", rows)
        writer = StoreWriter(Path(folder) / "s", VOCABULARY, buffer_bytes=1)
        for number, row in enumerate(rows[:lost]):
            writer.append(row, len(row), "d")
            if number + 1 == committed:
                writer.commit("here")
        with StoreWriter(Path(folder) / "s", VOCABULARY) as writer:
            assert (writer.documents, writer.mark) == ((committed, "here") if committed else (0, ""))
            for row in rows[committed:]:
                writer.append(row, len(row), "d")
        again = TokenStore(Path(folder) / "s/d")
        assert again.fingerprint == whole.fingerprint
        assert again.bytes == whole.bytes


class StreamBrokeError(Exception):
    pass


def breaking(documents: list[Document], after: int) -> Iterator[Document]:
    yield from documents[:after]
    raise StreamBrokeError


@settings(max_examples=20, deadline=None)
@given(
    st.lists(st.tuples(st.text("the cat\n", max_size=12), st.sampled_from("abc")), min_size=1, max_size=25),
    st.lists(st.integers(0, 25), max_size=3),
    st.integers(1, 200),
    st.integers(1, 60),
)
def test_tokenising_through_interruptions_gives_the_same_stores(
    rows: list[tuple[str, str]], breaks: list[int], batch: int, commit: int
) -> None:
    documents = [Document(text, f"o{i}", label) for i, (text, label) in enumerate(rows)]
    sizes = {"batch_bytes": batch, "commit_bytes": commit}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        whole = tokenise_by_label(documents, TOKENIZER, root / "whole")
        for after in breaks:
            with pytest.raises(StreamBrokeError):
                tokenise_by_label(breaking(documents, after), TOKENIZER, root / "s", **sizes)
            assert not (root / "s").exists()
        result = tokenise_by_label(documents, TOKENIZER, root / "s", **sizes)
        assert not list(root.glob(".*"))
        assert {label: s.fingerprint for label, s in result.items()} == {
            label: s.fingerprint for label, s in whole.items()
        }


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abcd"), st.lists(st.integers(0, 9), max_size=5)), min_size=1, max_size=30))
def test_many_stores_hold_what_single_ones_would(rows: list[tuple[str, list[int]]]) -> None:
    vocabulary = Vocabulary(10, 0, "t")
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        with StoreWriter(root / "many", vocabulary, buffer_bytes=300) as many:
            for label, row in rows:
                many.append(row, len(row), label)
        stores = open_stores(root / "many")
        assert list(stores) == sorted({label for label, _ in rows})
        for label, store in stores.items():
            with StoreWriter(root / label, vocabulary) as single:
                for other, row in rows:
                    if other == label:
                        single.append(row, len(row), label)
            assert TokenStore(root / label / label).fingerprint == store.fingerprint
