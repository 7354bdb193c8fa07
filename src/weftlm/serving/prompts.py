"""Texts and chats to token ids, and token ids to the bytes they stand for."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache

from tokenizers import Tokenizer as Backend
from tokenizers import pre_tokenizers
from transformers import PreTrainedTokenizerFast

from weftlm.pipeline.any_model import OpenModel
from weftlm.serving.chat_template import RefusedError, Renderer
from weftlm.serving.request import PromptError

MARK = "\ufdd0"
"""A noncharacter, which has no meaning in any text; left out of messages that hold it."""
BREAKS = 4
BROKEN = "\N{REPLACEMENT CHARACTER}"

_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Prompts:
    """One model's way from text to ids and back.

    Attributes:
        opened: The model.
        has_template: Whether its tokenizer brings a chat template, and is of the `tokenizers` library.
        renderer: Renderer of its chat template.
        lock: To be held during `chat`.
    """

    def __init__(self, opened: OpenModel) -> None:
        self.opened = opened
        self.renderer = Renderer()
        self.lock = asyncio.Lock()
        hf = self._hf = opened.tokenizer.hf
        self.has_template = isinstance(hf, PreTrainedTokenizerFast) and bool(hf.chat_template)
        if isinstance(hf, PreTrainedTokenizerFast):
            self._backend = Backend.from_str(hf.backend_tokenizer.to_str())
            self._backend.no_truncation()
            self._backend.no_padding()
        plain, whole = (list(hf("a", add_special_tokens=special)["input_ids"]) for special in (False, True))
        starts = [place for place in range(len(whole)) if whole[place : place + len(plain)] == plain]
        self._front = whole[: starts[0]] if starts else []
        self._control = {token for token, added in hf.added_tokens_decoder.items() if added.special}
        self.bytes_of = lru_cache(maxsize=65_536)(self._bytes_of)
        self.name_of = lru_cache(maxsize=65_536)(self._name_of)

    def text(self, text: str, *, special: bool = True) -> list[int]:
        """Ids of a text; an empty text without tokens before it begins a document, after the end of another.

        Args:
            text: Text to continue; what spells a special token in it is ordinary text.
            special: Whether the tokens come first that the tokenizer itself puts before a text, as those of Llama,
                Mistral and Gemma do; one that puts none adds none.
        """
        return [*(self._front if special else ()), *self._plain(text)] or [self.opened.tokenizer.eos_id]

    def chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Ids of a conversation that the assistant is to continue.

        The tokenizer's chat template writes it. Control tokens are those that the template itself writes: where a
        message spells one, it is ordinary text. A model without a template gets a line `role: text` for each message
        and `assistant:` as the last line.

        Args:
            messages: `role`, `content` and perhaps `name` of each.
        Raises:
            PromptError: The template refuses the messages, or they cannot be quoted.
            TimeoutError: The template does not end.
            RuntimeError: It ends the process that renders it.
        """
        if not self.has_template:
            lines = [f"{message['role']}: {message['content']}" for message in messages]
            return self.text("\n".join([*lines, "assistant:"]))
        quoted = [
            {key: text if key == "role" else self._broken(text.replace(MARK, "")) for key, text in message.items()}
            for message in messages
        ]
        return self._written(self._rendered(quoted))

    def _rendered(self, messages: list[dict[str, str]]) -> str:
        """What the chat template writes."""
        try:
            return self.renderer.render(self._hf.get_chat_template(), messages, self._hf.special_tokens_map)
        except (RefusedError, ValueError) as error:
            raise PromptError(f"messages: the model's chat template refuses them: {error}") from None

    def _written(self, text: str) -> list[int]:
        """Ids of what a template wrote: its own control tokens, and everything else as text."""
        if MARK not in text:
            return list(self._backend.encode(text, add_special_tokens=False).ids) or [self.opened.tokenizer.eos_id]
        ids: list[int] = []
        place = 0
        for token, start, end in [*self._spelt(text), (None, len(text), len(text))]:
            if piece := text[place:start].replace(MARK, ""):
                ids += self._plain(piece)
            ids += [] if token is None else [token]
            place = end
        return ids

    def _plain(self, text: str) -> list[int]:
        ids: list[int] = self.opened.tokenizer.encode_batch([text])[0].tolist()
        return ids

    def _spelt(self, text: str) -> list[tuple[int | None, int, int]]:
        """Control tokens that a text spells: id, first character and the one after the last."""
        read = self._backend.encode(text, add_special_tokens=False)
        pairs = zip(read.ids, read.offsets, strict=True)
        return [(token, start, end) for token, (start, end) in pairs if token in self._control]

    def _broken(self, text: str) -> str:
        """A text with a mark inside each control token that it spells."""
        for _ in range(BREAKS):
            spelt = self._spelt(text)
            if not spelt:
                return text
            for _, start, end in reversed(spelt):
                first = start + len(text[start:end]) - len(text[start:end].lstrip()) + 1
                text = text[:first] + MARK + text[first:]
        raise PromptError("messages: a text spells a control token of the model in a way that cannot be quoted")

    def _bytes_of(self, token: int) -> bytes:
        """The bytes a token adds to a text; a special token is written out."""
        text = self.opened.tokenizer.decode([token])
        piece = self._hf.convert_ids_to_tokens(token)
        if not isinstance(piece, str) or token in self._control:
            return text.encode("utf-8")
        if single := _BYTE_PIECE.fullmatch(piece):
            return bytes([int(single[1], 16)])
        if "\u2581" in piece:  # decoders drop the blank it stands for at the start of a text
            return piece.replace("\u2581", " ").encode("utf-8")
        if BROKEN in text and all(character in _BYTE_OF for character in piece):
            return bytes(_BYTE_OF[character] for character in piece)
        return text.encode("utf-8")

    def _name_of(self, token: int) -> str:
        r"""The token as text; `bytes:\xe2\x96` if its bytes are no text by themselves."""
        value = self._bytes_of(token)
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in value)


def _bytes_by_character() -> dict[str, int]:
    """The characters byte-level tokenizers write bytes as: itself if visible, else one from U+0100 on, in order."""
    hidden = [byte for byte in range(256) if chr(byte) not in pre_tokenizers.ByteLevel.alphabet()]
    table = {chr(byte): byte for byte in range(256) if byte not in hidden}
    return table | {chr(0x100 + place): byte for place, byte in enumerate(hidden)}


_BYTE_OF = _bytes_by_character()
