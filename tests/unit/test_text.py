"""Names are data: what a person reads shows every character and obeys none."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.hostile import NAMES, harmless_line

from weftlm.text import printable, printable_lines, shorten


@given(st.text(st.characters(blacklist_categories=())))
def test_any_text_is_one_line_that_does_nothing(text: str) -> None:
    shown = printable(text)
    assert "\n" not in shown
    assert harmless_line(shown.replace("\u200c", ""))
    shown.encode()
    assert printable(shown) == shown


@pytest.mark.parametrize("name", ["plain", "[/news]", "名前", "می\u200cخواهم", "👨\u200d👩\u200d👧", "a\u00a0b", "é"])
def test_what_can_be_seen_stays(name: str) -> None:
    assert printable(name) == name


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("\x1b[2J", r"\x1b[2J"), ("a\nb", r"a\nb"), ("\u202egnp", r"\u202egnp"), ("a\u200bb", r"a\u200bb"),
        ("a\u200db", r"a\u200db"), ("\ud800", r"\ud800"), ("\x00", r"\x00"), ("\u3164", r"\u3164"),
    ],
)  # fmt: skip
def test_what_hides_or_acts_is_written_out(name: str, shown: str) -> None:
    assert printable(name) == shown


def test_text_of_several_lines_keeps_them() -> None:
    assert printable_lines("a:\n  b\x1b[0m\r\n") == "a:\n  b\\x1b[0m\\r\n"


@pytest.mark.parametrize(
    ("text", "short"),
    [("abc", "abc"), ("abcdefghij", "abcdefghij"), ("abcdefghijklmno", "abcdef…mno"), ("\x1b\x1b\x1b", "\\x1b\\x…x1b")],
)
def test_long_names_lose_their_middle(text: str, short: str) -> None:
    assert shorten(text, 10) == short


def test_the_names_that_the_tests_use_are_harmless_once_printed() -> None:
    assert all(harmless_line(printable(name)) for name in NAMES)
    assert not all(harmless_line(name) for name in NAMES)
