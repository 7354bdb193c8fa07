"""Texts and chats to token ids, and token ids to the bytes they stand for."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import tokenizers
from tokenizers import Tokenizer as Backend
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from weftlm.errors import ConfigError
from weftlm.pipeline.any_model import OpenModel

MARKS = (*range(0xFDD0, 0xFDF0), *range(0xF0000, 0xFFFFE))
"""Characters that no text means anything by: noncharacters and those for private use."""
BREAKS = 4

Render = Callable[[str, Mapping[str, Any], Sequence[Mapping[str, str]]], str]

_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Prompts:
    """One model's way from text to ids and back.

    Attributes:
        opened: the model.
        has_template: whether its tokenizer brings a chat template; the plain one is used otherwise.
    """

    def __init__(self, opened: OpenModel) -> None:
        self.opened = opened
        hf = opened.tokenizer.hf
        self.has_template = bool(getattr(hf, "chat_template", None))
        self._marked: Backend | None = None
        if isinstance(hf, PreTrainedTokenizerFast):
            self._marked = Backend.from_str(hf.backend_tokenizer.to_str())
            self._marked.no_truncation()
            self._marked.no_padding()
        self._front = _front(hf)
        self._characters = _byte_characters() if _is_byte_level(self._marked) else None
        self._control = {token: str(added) for token, added in hf.added_tokens_decoder.items() if added.special}
        self._special = {int(token) for token in hf.all_special_ids}
        self.bytes_of = lru_cache(maxsize=65_536)(self._bytes_of)
        self.name_of = lru_cache(maxsize=65_536)(self._name_of)

    def text(self, text: str, *, special: bool = True) -> list[int]:
        """Ids of a text; a text of none begins a document, after the end of another.

        Args:
            text: to continue; what spells a special token in it is ordinary text.
            special: whether the tokens come first that the tokenizer itself puts before a text, as those of Llama,
                Mistral and Gemma do; one that puts none adds none.
        """
        ids: list[int] = self.opened.tokenizer.encode_batch([text])[0].tolist()
        return [*(self._front if special else ()), *ids] or [self.opened.tokenizer.eos_id]

    def chat(self, messages: Sequence[Mapping[str, str]], render: Render | None = None) -> list[int]:
        """Ids of a conversation that the assistant is to continue.

        The tokenizer's chat template writes it. Control tokens are those that the template itself writes: where a
        message spells one, it is ordinary text. A tokenizer without a template gets a line `role: text` for each
        message and `assistant:` as the last line.

        Args:
            messages: `role`, `content` and perhaps `name` of each.
            render: runs a template, given its special tokens and the messages; needed where there is one.
        Raises:
            ConfigError: the template refuses the messages.
        """
        if not self.has_template:
            lines = [f"{message['role']}: {message['content']}" for message in messages]
            return self.text("\n".join([*lines, "assistant:"]))
        assert render is not None
        hf = self.opened.tokenizer.hf
        said = "".join(text for message in messages for text in message.values())
        mark = next((mark for mark in map(chr, MARKS) if mark not in said), None)
        if mark is None:
            raise ConfigError("messages: they hold every private character there is; leave some out")
        broken = [
            {key: text if key == "role" else self._broken(text, mark) for key, text in message.items()}
            for message in messages
        ]
        template = hf.get_chat_template()
        return self._written(render(template, dict(hf.special_tokens_map), broken), mark) or [
            self.opened.tokenizer.eos_id
        ]

    def _spelt(self, text: str) -> list[tuple[int, int, int]]:
        """Control tokens that a text spells: id, first character and the one after the last."""
        if self._marked is None:
            names = sorted(self._control.values(), key=len, reverse=True)
            ids = {name: token for token, name in self._control.items()}
            found = re.finditer("|".join(map(re.escape, names)), text) if names else ()
            return [(ids[match.group()], match.start(), match.end()) for match in found]
        read = self._marked.encode(text, add_special_tokens=False)
        pairs = zip(read.ids, read.offsets, strict=True)
        return [(token, start, end) for token, (start, end) in pairs if token in self._control]

    def _broken(self, text: str, mark: str) -> str:
        """A text with a mark inside each control token that it spells."""
        for _ in range(BREAKS):
            spelt = self._spelt(text)
            if not spelt:
                return text
            for _, start, end in reversed(spelt):
                first = start + len(text[start:end]) - len(text[start:end].lstrip()) + 1
                text = text[:first] + mark + text[first:]
        raise ConfigError("messages: a text spells a control token of the model in a way that cannot be quoted")

    def _written(self, text: str, mark: str) -> list[int]:
        """Ids of what a template wrote: its own control tokens, and everything else as text."""
        if mark not in text and self._marked is not None:
            ids: list[int] = self._marked.encode(text, add_special_tokens=False).ids
            return ids
        ids, place = [], 0
        for token, start, end in [*self._spelt(text), (-1, len(text), len(text))]:
            if piece := text[place:start].replace(mark, ""):
                ids += self.opened.tokenizer.encode_batch([piece])[0].tolist()
            ids += [token] if token >= 0 else []
            place = end
        return ids

    def _bytes_of(self, token: int) -> bytes:
        """The bytes a token adds to a text; a special token is written out."""
        piece = self.opened.tokenizer.hf.convert_ids_to_tokens(token)
        if not isinstance(piece, str):
            return b""
        if token not in self._special:
            if self._characters is not None and all(character in self._characters for character in piece):
                return bytes(self._characters[character] for character in piece)
            if single := _BYTE_PIECE.fullmatch(piece):
                return bytes([int(single[1], 16)])
            if "\u2581" in piece:
                return piece.replace("\u2581", " ").encode("utf-8")
        return self.opened.tokenizer.decode([token]).encode("utf-8")

    def _name_of(self, token: int) -> str:
        r"""The token as text; `bytes:\xe2\x96` where its bytes are no text by themselves."""
        value = self._bytes_of(token)
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in value)


def _front(hf: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The special tokens a tokenizer puts before a text."""
    plain, whole = (list(hf("a", add_special_tokens=special)["input_ids"]) for special in (False, True))
    for place in range(len(whole) - len(plain) + 1):
        if whole[place : place + len(plain)] == plain:
            return tuple(whole[:place])
    return ()


def _is_byte_level(backend: tokenizers.Tokenizer | None) -> bool:
    return backend is not None and type(backend.decoder).__name__ == "ByteLevel"


def _byte_characters() -> dict[str, int]:
    """The characters byte-level tokenizers write bytes as.

    A printable one of Latin-1 stands for itself; the others follow from U+0100 on, in the order of the bytes.
    """
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(byte): byte for byte in visible}
    hidden = [byte for byte in range(256) if byte not in set(visible)]
    table.update({chr(0x100 + place): byte for place, byte in enumerate(hidden)})
    return table
