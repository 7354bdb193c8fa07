"""Laws of token stores: what is written is read, however it is cut into buffers and batches."""

import tempfile
from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from weftlm.corpora.config import TrainConfig
from weftlm.corpora.source import Document
from weftlm.corpora.store import TokenStore, Vocabulary, open_stores
from weftlm.corpora.store_writer import tokenise_by_label, write_stores
from weftlm.corpora.tokens import train_tokenizer

DOCUMENTS = st.lists(st.lists(st.integers(0, 70_000), max_size=12), min_size=1, max_size=20)
TOKENIZER = train_tokenizer(["the cat sat on the mat, the cat sat"] * 5, TrainConfig(vocab_size=270))
VOCABULARY = Vocabulary(70_001, 70_000, "t")


def write(path: Path, rows: list[list[int]], **options: int) -> TokenStore:
    with write_stores(path, VOCABULARY, **options) as writer:
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
        np.testing.assert_array_equal(many, np.array([flat[s : s + count] for s in starts]).reshape(len(starts), count))
        assert write(Path(folder) / "whole", rows).fingerprint == store.fingerprint, "whatever the buffer"


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(st.text("the cat\n", max_size=12), st.sampled_from("abc")), min_size=1, max_size=25),
    st.integers(1, 200),
)
def test_the_stores_do_not_depend_on_the_batches(rows: list[tuple[str, str]], batch: int) -> None:
    documents = [Document(text, f"o{i}", label) for i, (text, label) in enumerate(rows)]
    with tempfile.TemporaryDirectory() as folder:
        whole = tokenise_by_label(documents, TOKENIZER, Path(folder) / "whole")
        found = tokenise_by_label(documents, TOKENIZER, Path(folder) / "s", batch_bytes=batch)
        assert {label: s.fingerprint for label, s in found.items()} == {
            label: s.fingerprint for label, s in whole.items()
        }


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from("abcd"), st.lists(st.integers(0, 9), max_size=5)), min_size=1, max_size=30),
    st.integers(1, 2000),
)
def test_many_stores_hold_what_single_ones_would(rows: list[tuple[str, list[int]]], buffer: int) -> None:
    vocabulary = Vocabulary(10, 0, "t")
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        with write_stores(root / "many", vocabulary, buffer_bytes=buffer) as many:
            for label, row in rows:
                many.append(row, len(row), label)
        stores = open_stores(root / "many")
        assert list(stores) == sorted({label for label, _ in rows})
        for label, store in stores.items():
            with write_stores(root / label, vocabulary) as single:
                for other, row in rows:
                    if other == label:
                        single.append(row, len(row), label)
            assert TokenStore(root / label / label).fingerprint == store.fingerprint
