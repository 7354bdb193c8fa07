"""Text that arrives token by token is the text of all tokens, in whole characters, without its stop texts."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weftlm.serving.detokenise import BROKEN, AnswerText


def decode_bytes(ids: Sequence[int]) -> str:
    """Every token one byte, as byte-level tokenizers decode."""
    return bytes(ids).decode("utf-8", errors="replace")


def decode_words(ids: Sequence[int]) -> str:
    """Every token a word; the space before the first is dropped, as SentencePiece's decoders do."""
    return "".join(f" w{token}" for token in ids)[1:]


def streamed(
    ids: Sequence[int],
    decode: Callable[[Sequence[int]], str] = decode_bytes,
    stop: Sequence[str] = (),
    before: Sequence[int] = (),
) -> list[str]:
    text = AnswerText(decode, stop, before)
    return [*(text.push(token) for token in ids), text.finish()]


@given(st.text().map(str.encode) | st.binary(max_size=60))
def test_pieces_are_whole_characters_and_make_the_text_of_all(data: bytes) -> None:
    pieces = streamed(data)
    assert "".join(pieces) == decode_bytes(data)
    assert BROKEN in decode_bytes(data) or not any(BROKEN in piece for piece in pieces)


@given(st.lists(st.integers(0, 9), max_size=9), st.lists(st.integers(0, 9), max_size=9))
def test_an_answer_goes_on_from_its_prompt(prompt: list[int], ids: list[int]) -> None:
    answer = "".join(streamed(ids, decode_words, before=prompt))
    assert decode_words(prompt) + answer == decode_words([*prompt, *ids])


def test_a_character_comes_with_its_last_byte() -> None:
    assert streamed("a日b".encode()) == ["a", "", "", "日", "b", ""]
    assert streamed("日".encode()[:2]) == ["", "", BROKEN]
    assert streamed(b"ab", before=list("日".encode())[:2]) == ["a", "b", ""], "a prompt that ends within a character"


def cut(text: str, stops: Sequence[str]) -> str:
    """What goes out of a text that comes a character at a time, by definition."""
    for end in range(len(text) + 1):
        ended = [stop for stop in stops if text[:end].endswith(stop)]
        if ended:
            return text[: end - max(map(len, ended))]
    return text


@given(st.text("ab", max_size=20), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_the_first_complete_stop_text_ends_the_text(text: str, stops: list[str]) -> None:
    answer = AnswerText(decode_bytes, stops)
    out = ""
    for end, letter in enumerate(map(ord, text), 1):
        out += answer.push(letter)
        # No more is held than what may still become a stop text.
        assert answer.stopped or any(stop.startswith(text[len(out) : end]) for stop in (*stops, ""))
    out += answer.finish()
    assert out == cut(text, stops)
    assert answer.stopped == any(stop in text for stop in stops)


@pytest.mark.parametrize("stop", [f"{BROKEN}", f"a{BROKEN}", "日記"])
def test_a_stop_text_may_be_found_or_missed_at_the_end(stop: str) -> None:
    text = AnswerText(decode_bytes, [stop])
    given_out = "".join(text.push(byte) for byte in b"xa\xe6\x97")
    assert given_out + text.finish() == {"日記": f"xa{BROKEN}"}.get(stop, "xa"[: 3 - len(stop)])
    assert text.stopped == (stop != "日記")
