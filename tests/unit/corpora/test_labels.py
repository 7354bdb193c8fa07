"""Labels and names are one and the same thing in two spellings, whatever a corpus is labelled."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weftlm.corpora.labels import MAX_NAME, folder_name, is_name, label_of

HOSTILE = [
    "", " ", ".", "..", "...", "~", "%", "%2F", "%-", "a/b", "a%2Fb", "a\\b", "../x", "-rf", "_x", ".net", "net.",
    "c++", "c#", "c", "C", "con", "CON", "con.txt", "nul", "lpt1", "com\u00b9", "console", "\u200b", "\x00", "\n",
    "\x1b[31mred", "[/news]", "<b>", "日本語", "한국어", "русский", "médecine", "me\u0301decine", "🙂", "\ud800", "law",
    "law ", "cs.RO", "x" * 300, "x" * 299 + "y", "é" * 60, "a:b", "a|b", "a*", "?", '"', "'",
]  # fmt: skip


def test_hostile_labels_have_names_of_their_own_that_any_file_system_takes(tmp_path: Path) -> None:
    names = [folder_name(label) for label in HOSTILE]
    assert len(set(names)) == len(HOSTILE)
    for label, name in zip(HOSTILE, names, strict=True):
        assert is_name(name), name
        assert label_of(name) == (None if "%-" in name else label)
        (tmp_path / name).mkdir()
    assert sorted(os.listdir(tmp_path)) == sorted(names)
    assert folder_name("c++") == "c%2B%2B"


@given(st.text(st.characters(), max_size=40))
def test_a_name_and_its_label_are_told_from_each_other(label: str) -> None:
    name = folder_name(label)
    assert len(name) <= MAX_NAME
    assert is_name(name)
    if "%-" not in name:
        assert label_of(name) == label


@given(st.text("abC%-._2F~ é0", max_size=12), st.text("abC%-._2F~ é0", max_size=12))
def test_two_labels_have_two_names(one: str, other: str) -> None:
    assert (folder_name(one) == folder_name(other)) == (one == other)


@pytest.mark.parametrize(
    "text", ["", "con", "a b", "a/b", "law.", ".x", "%zz", "%2f", "%61", "a~2", "é", "%FF", "%-0", "x" * 200]
)
def test_what_is_no_label_s_name_is_known_as_such(text: str) -> None:
    assert not is_name(text)
