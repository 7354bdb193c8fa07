"""Text that arrives token by token is the text of all tokens, in whole characters, without its stop texts."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weftlm.serving.detokenise import BROKEN, AnswerText, Detokeniser, StopTexts


def decode_bytes(ids: Sequence[int]) -> str:
    """Every token one byte, as byte-level tokenizers decode."""
    return bytes(ids).decode("utf-8", errors="replace")


def decode_words(ids: Sequence[int]) -> str:
    """Every token a word; the space before the first is dropped, as SentencePiece's decoders do."""
    return "".join(f" w{token}" for token in ids)[1:]


def streamed(ids: Sequence[int], decode: object = decode_bytes) -> list[str]:
    text = Detokeniser(decode)  # type: ignore[arg-type]
    return [*(text.push(token) for token in ids), text.finish()]


@given(st.text())
def test_pieces_are_whole_characters(text: str) -> None:
    pieces = streamed(text.encode())
    assert "".join(pieces) == text
    assert BROKEN in text or not any(BROKEN in piece for piece in pieces)


@given(st.binary(max_size=60))
def test_pieces_of_any_bytes_make_the_text_of_all(data: bytes) -> None:
    assert "".join(streamed(data)) == decode_bytes(data)


@given(st.binary(max_size=12), st.integers(0x80, 0xBF), st.integers(17, 60), st.binary(max_size=12))
def test_long_runs_of_broken_bytes_are_not_held_for_ever(before: bytes, byte: int, count: int, after: bytes) -> None:
    data = before + bytes([byte] * count) + after
    pieces = streamed(data)
    assert "".join(pieces) == decode_bytes(data)
    assert "".join(pieces[: len(before) + count])


@given(st.lists(st.integers(0, 9), max_size=9), st.lists(st.integers(0, 9), min_size=1, max_size=9))
def test_an_answer_goes_on_from_its_prompt(prompt: list[int], ids: list[int]) -> None:
    text = Detokeniser(decode_words, prompt)
    answer = "".join([*(text.push(token) for token in ids), text.finish()])
    assert decode_words(prompt) + answer == decode_words([*prompt, *ids])


def test_a_prompt_that_ends_within_a_character_is_left_out() -> None:
    text = Detokeniser(decode_bytes, list("日".encode())[:2])
    assert [text.push(byte) for byte in b"ab"] == ["a", "b"]


def test_a_long_run_is_not_decoded_again_and_again() -> None:
    decoded: list[int] = []

    def decode(ids: Sequence[int]) -> str:
        decoded.append(len(ids))
        return decode_bytes(ids)

    streamed([0x80] * 500, decode)
    assert max(decoded) < 40


def test_a_character_comes_with_its_last_byte() -> None:
    assert streamed("a日b".encode()) == ["a", "", "", "日", "b", ""]
    assert streamed("日".encode()[:2]) == ["", "", BROKEN]


@given(st.lists(st.integers(0, 99), max_size=30))
def test_a_decoder_that_drops_leading_spaces(ids: list[int]) -> None:
    assert "".join(streamed(ids, decode_words)) == decode_words(ids)


def cut(text: str, stops: Sequence[str]) -> str:
    """What goes out of a text that comes a character at a time, by definition."""
    for end in range(len(text) + 1):
        ended = [stop for stop in stops if text[:end].endswith(stop)]
        if ended:
            return text[: end - max(map(len, ended))]
    return text


@given(st.lists(st.text("ab", max_size=4), max_size=8), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_stop_texts_end_the_text_however_it_is_cut(pieces: list[str], stops: list[str]) -> None:
    gate = StopTexts(stops)
    out, text = "", ""
    for piece in pieces:
        out += gate.push(piece)
        text += piece
        # No more is held than what may still become a stop text.
        assert gate.found or any(stop.startswith(text[len(out) :]) for stop in (*stops, ""))
    out += gate.finish()
    assert out == cut(text, stops)
    assert gate.found == any(stop in text for stop in stops)


def test_nothing_of_a_stop_text_goes_out() -> None:
    gate = StopTexts(["END", "\n\n"])
    assert [gate.push(piece) for piece in ("on E", "N", "E", "ND", "more")] == ["on ", "", "EN", "", ""]
    assert gate.found
    assert gate.finish() == ""


def test_what_might_have_become_a_stop_text_is_told_at_the_end() -> None:
    answer = AnswerText(decode_bytes, ["日記"])
    assert [answer.push(byte) for byte in b"x\xe6\x97\xa5"] == ["x", "", "", ""]
    assert (answer.finish(), answer.stopped) == ("日", False)


@pytest.mark.parametrize("stop", [f"{BROKEN}", f"a{BROKEN}"])
def test_a_stop_text_may_be_found_at_the_end(stop: str) -> None:
    answer = AnswerText(decode_bytes, [stop])
    given_out = "".join(answer.push(byte) for byte in b"xa\xe6\x97")
    assert given_out + answer.finish() == "xa"[: 3 - len(stop)]
    assert answer.stopped
