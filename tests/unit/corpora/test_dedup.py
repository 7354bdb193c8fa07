"""Duplicates: the first set wins, counts add up, order is kept, a leak between finished sets is refused."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weftlm.corpora.dedup import SeenDocuments, check_no_leak
from weftlm.corpora.source import Document
from weftlm.errors import DataError

SETS = st.lists(
    st.tuples(st.sampled_from(["target", "heldout", "train"]), st.lists(st.text("ab", max_size=3))), max_size=6
)


@settings(max_examples=60)
@given(SETS)
def test_the_first_set_in_order_keeps_a_document_and_order_is_kept(sets: list[tuple[str, list[str]]]) -> None:
    owner: dict[str, str] = {}
    expected: list[list[str]] = []
    dropped: dict[tuple[str, str], int] = {}
    for name, texts in sets:
        expected.append([])
        for text in texts:
            if text in owner:
                dropped[name, owner[text]] = dropped.get((name, owner[text]), 0) + 1
            else:
                owner[text] = name
                expected[-1].append(text)
    with SeenDocuments() as seen:
        kept = [
            [document.text for document in seen.unique((Document(text, "o") for text in texts), name)]
            for name, texts in sets
        ]
    assert kept == expected
    assert dict(seen.dropped) == dropped
    assert sum(seen.kept.values()) == len(owner)


def test_drops_are_counted_by_pair_with_examples(tmp_path: Path) -> None:
    with SeenDocuments(tmp_path) as seen:
        assert seen.add(Document("x", "t:1"), "target") is None
        assert [seen.add(Document("x", f"c:{i}"), "train") for i in range(9)] == ["target"] * 9
        assert seen.add(Document("y", "c:10"), "train") is None
        assert seen.add(Document("y", "c:11"), "train") == "train"
        assert list(tmp_path.iterdir())
    assert not list(tmp_path.iterdir())
    assert seen.to_json() == {
        "kept": {"target": 1, "train": 1},
        "dropped": [
            {"set": "train", "already_in": "target", "documents": 9, "examples": [f"c:{i}" for i in range(5)]},
            {"set": "train", "already_in": "train", "documents": 1, "examples": ["c:11"]},
        ],
    }


def test_texts_that_differ_in_one_character_are_different() -> None:
    with SeenDocuments() as seen:
        texts = ["a", "a ", " a", "A", "a\n", "\u00e1", "a\u0301"]
        assert len(list(seen.unique((Document(text, "") for text in texts), "s"))) == len(texts)


def test_more_digests_than_the_cache_holds(tmp_path: Path) -> None:
    with SeenDocuments(tmp_path, cache_bytes=1 << 16) as seen:
        assert len(list(seen.unique((Document(str(i), "") for i in range(20_000)), "a"))) == 20_000
        again = seen.unique((Document(str(i), "") for i in range(19_998, 20_002)), "b")
        assert [document.text for document in again] == ["20000", "20001"]


def test_a_leak_between_finished_documents_names_examples() -> None:
    target = [Document("same", "t:1"), Document("same", "t:2"), Document("mine", "t:3")]
    train = [Document("other", "c:1"), Document("same", "c:2")]
    check_no_leak({"target": target, "train": train[:1]})
    with pytest.raises(DataError, match=r"1 of train are in target too \(c:2\)"):
        check_no_leak({"target": target, "train": train})
