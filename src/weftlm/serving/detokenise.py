"""Text of an answer while its tokens arrive: whole characters only, and nothing of a stop text."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

BROKEN = "\N{REPLACEMENT CHARACTER}"
"""What decoders write for bytes that are no character, or not yet one."""
PROMPT_TAIL = 4
"""Tokens of the prompt that an answer is decoded after."""
LONG = 16
"""Tokens without a whole character at their end after which a place to go on from is looked for among them."""

Decode = Callable[[Sequence[int]], str]


class Detokeniser:
    """The text each token adds.

    What has been given out after any number of tokens, with the rest from `finish`, is the decoder's text of all of
    them. A token that ends within a character adds nothing until the character is whole. Of the tokens before, only
    the last few are decoded again: decoders may treat a token at the start of a text differently. Decoders that write a
    whole run of byte tokens anew when one of them makes no character may differ there: what was given out stays.

    Args:
        decode: token ids to text.
        before: tokens of the prompt: of a text that goes on, decoders keep the blank that they take from its beginning.
    """

    def __init__(self, decode: Decode, before: Sequence[int] = ()) -> None:
        self._decode = decode
        self._ids = list(before[-PROMPT_TAIL:])
        if self._ids and decode(self._ids).endswith(BROKEN):
            self._ids = []
        self._given = len(self._ids)  # of self._ids, those whose text was given out

    def push(self, token: int) -> str:
        """The text that is complete with this token."""
        self._ids.append(token)
        text = self._decode(self._ids)
        if not text.endswith(BROKEN):
            new = text[len(self._before()) :]
            self._ids = self._ids[self._given :]
            self._given = len(self._ids)
            return new
        return self._cut(text) if len(self._ids) - self._given > LONG else ""

    def finish(self) -> str:
        """What is left: characters that were never completed, as the decoder writes them."""
        left = self._decode(self._ids)[len(self._before()) :]
        self._ids, self._given = [], 0
        return left

    def _before(self) -> str:
        return self._decode(self._ids[: self._given]) if self._given else ""

    def _cut(self, text: str) -> str:
        """Give out the front of a long run of broken characters, where what follows does not read differently alone."""
        for cut in range(len(self._ids) - LONG // 2, len(self._ids) - LONG // 4):
            front = self._decode(self._ids[:cut])
            if front + self._decode(self._ids[cut:]) == text:
                new = front[len(self._before()) :]
                self._ids, self._given = self._ids[cut:], 0
                return new
        return ""


class StopTexts:
    """Text on its way out, ended by the first stop text that is complete in it.

    Which one is first does not depend on the pieces the text comes in.

    Attributes:
        found: a stop text came; nothing more goes out.
    """

    def __init__(self, stop: Iterable[str]) -> None:
        self._stop = tuple(stop)
        self._held = ""
        self.found = False

    def push(self, text: str) -> str:
        """What can be given out now: not what might become a stop text."""
        if self.found or not text:
            return ""
        self._held += text
        ends = [(place + len(stop), place) for stop in self._stop if (place := self._held.find(stop)) >= 0]
        if ends:
            self.found = True
            return self._give(min(ends)[1])
        return self._give(len(self._held) - self._open())

    def finish(self) -> str:
        """What was held back."""
        return self._give(len(self._held)) if not self.found else ""

    def _give(self, count: int) -> str:
        given, self._held = self._held[:count], self._held[count:]
        return given

    def _open(self) -> int:
        """Characters at the end with which a stop text may have begun."""
        longest = min(len(self._held), max((len(stop) for stop in self._stop), default=1) - 1)
        for count in range(longest, 0, -1):
            if any(len(stop) > count and stop.startswith(self._held[-count:]) for stop in self._stop):
                return count
        return 0


class AnswerText:
    """The text of an answer, token by token, up to its stop text.

    Args:
        decode: token ids to text.
        stop: texts that end the answer and are not part of it.
        before: tokens of the prompt, as `Detokeniser` takes them.
    """

    def __init__(self, decode: Decode, stop: Iterable[str], before: Sequence[int] = ()) -> None:
        self._characters = Detokeniser(decode, before)
        self._stop = StopTexts(stop)

    @property
    def stopped(self) -> bool:
        """Whether a stop text came."""
        return self._stop.found

    def push(self, token: int) -> str:
        """The text to give out with a token; may be empty."""
        return self._stop.push(self._characters.push(token))

    def finish(self) -> str:
        """The text left at the end; a stop text may be found in it."""
        return self._stop.push(self._characters.finish()) + self._stop.finish()
