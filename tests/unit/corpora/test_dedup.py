"""Duplicates: the first set wins, counts add up, order is kept, a leak between finished sets is refused."""

from hypothesis import given, settings
from hypothesis import strategies as st

from weftlm.corpora.dedup import SeenDocuments
from weftlm.corpora.source import Document

SETS = st.lists(
    st.tuples(st.sampled_from(["target", "heldout", "train"]), st.lists(st.text("ab", max_size=3))), max_size=6
)


@settings(max_examples=60)
@given(SETS)
def test_the_first_set_in_order_keeps_a_document(sets: list[tuple[str, list[str]]]) -> None:
    owner: dict[str, str] = {}
    dropped: dict[tuple[str, str], int] = {}
    seen = SeenDocuments()
    for name, texts in sets:
        for text in texts:
            assert seen.add(Document(text, "o"), name) == owner.get(text)
            if text in owner:
                dropped[name, owner[text]] = dropped.get((name, owner[text]), 0) + 1
            owner.setdefault(text, name)
    assert dict(seen.dropped) == dropped
    assert sum(seen.kept.values()) == len(owner)


def test_drops_are_counted_by_pair_with_examples() -> None:
    seen = SeenDocuments()
    assert seen.add(Document("x", "t:1"), "target") is None
    assert [seen.add(Document("x", f"c:{i}"), "train") for i in range(9)] == ["target"] * 9
    different = ["y", "y ", " y", "Y", "y\n", "\u00fd", "y\u0301"]
    assert [seen.add(Document(text, "c:10"), "train") for text in different] == [None] * len(different)
    assert seen.add(Document("y", "c:11"), "train") == "train"
    assert seen.to_json() == {
        "kept": {"target": 1, "train": 7},
        "dropped": [
            {"set": "train", "already_in": "target", "documents": 9, "examples": [f"c:{i}" for i in range(5)]},
            {"set": "train", "already_in": "train", "documents": 1, "examples": ["c:11"]},
        ],
    }
