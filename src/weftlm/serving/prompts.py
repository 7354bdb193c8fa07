"""Texts and chats to token ids, and token ids to the bytes they stand for."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import tokenizers
from jinja2.exceptions import TemplateError
from tokenizers import Tokenizer as Backend
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from weftlm.errors import ConfigError
from weftlm.pipeline.any_model import OpenModel

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

    def chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Ids of a conversation that the assistant is to continue.

        The tokenizer's chat template writes it, special tokens included. A tokenizer without one gets a line
        `role: text` for each message and `assistant:` as the last line.

        Raises:
            ConfigError: the template refuses the messages.
        """
        if not self.has_template:
            lines = [f"{message['role']}: {message['content']}" for message in messages]
            return self.text("\n".join([*lines, "assistant:"]))
        hf = self.opened.tokenizer.hf
        try:
            written: Any = hf.apply_chat_template(
                [dict(message) for message in messages], tokenize=False, add_generation_prompt=True
            )
        except (TemplateError, TypeError, ValueError) as error:
            raise ConfigError(f"messages: the model's chat template refuses them: {error}") from error
        if self._marked is not None:
            ids: list[int] = self._marked.encode(written, add_special_tokens=False).ids
        else:
            ids = list(hf(written, add_special_tokens=False, verbose=False)["input_ids"])
        return ids or [self.opened.tokenizer.eos_id]

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
