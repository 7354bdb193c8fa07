"""Text of an answer while its tokens arrive: whole characters only, and nothing of a stop text."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

BROKEN = "\N{REPLACEMENT CHARACTER}"
"""What decoders write for bytes that are no character, or not yet one."""
CONTEXT = 4
"""Tokens of the prompt that an answer is decoded after."""


class AnswerText:
    """The text each token adds to an answer, up to its first stop text.

    A token that ends within a character adds nothing until the character is whole; text that may be the beginning of a
    stop text is held back. All pieces, with that of `finish`, join to the decoder's text of all tokens, up to the stop
    text that is complete first. Only the last few tokens are decoded again: decoders may treat a token at the start of
    a text differently.

    Attributes:
        stopped: Whether a stop text came; nothing more is given out.

    Args:
        decode: Function from token ids to text.
        stop: Texts that end the answer and are not part of it.
        before: Tokens of the prompt. Decoders that drop the blank at the start of a text keep it after them.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stop: Iterable[str], before: Sequence[int] = ()) -> None:
        self.stopped = False
        self._decode = decode
        self._stop = tuple(stop)
        self._ids = list(before[-CONTEXT:])
        if decode(self._ids).endswith(BROKEN):
            self._ids = []
        self._given = len(self._ids)  # of self._ids, those whose text was given out
        self._held = ""  # may become a stop text

    def push(self, token: int) -> str:
        """The text to give out with a token."""
        self._ids.append(token)
        text = self._decode(self._ids)
        return "" if text.endswith(BROKEN) else self._release(text)

    def finish(self) -> str:
        """The text left at the end, broken characters included; a stop text may be found in it."""
        text = self._release(self._decode(self._ids))
        held, self._held = self._held, ""
        return text + held

    def _release(self, text: str) -> str:
        """What can be given out of the text of all tokens held; the newest become the context of the next."""
        new = self._held + text[len(self._decode(self._ids[: self._given])) :]
        self._ids = self._ids[self._given :]
        self._given, self._held = len(self._ids), ""
        if self.stopped:
            return ""
        found = [(place + len(stop), place) for stop in self._stop if (place := new.find(stop)) >= 0]
        if found:
            self.stopped = True
            return new[: min(found)[1]]
        begun = (count for stop in self._stop for count in range(1, len(stop)) if new.endswith(stop[:count]))
        kept = len(new) - max(begun, default=0)
        self._held = new[kept:]
        return new[:kept]
