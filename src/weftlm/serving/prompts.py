"""Texts and chats to token ids, and token ids to the text they stand for."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache

from tokenizers import Tokenizer as Backend
from transformers import PreTrainedTokenizerFast

from weftlm.pipeline.any_model import OpenModel
from weftlm.serving.chat_template import Renderer
from weftlm.serving.detokenise import BROKEN
from weftlm.serving.request import PromptError

MARK = "\ufdd0"
"""A noncharacter, which has no meaning in any text; left out of messages that hold it, and put around quoted ones."""
QUOTED = re.compile(f"{MARK}(\\d+){MARK}")


class Prompts:
    """One model's way from text to ids and back.

    Attributes:
        renderer: Renderer of its chat template.
        lock: To be held during `chat`.
    """

    def __init__(self, opened: OpenModel) -> None:
        self.opened = opened
        self.renderer = Renderer()
        self.lock = asyncio.Lock()
        hf = self._hf = opened.tokenizer.hf
        self._backend: Backend | None = None
        if isinstance(hf, PreTrainedTokenizerFast) and hf.chat_template:
            self._backend = Backend.from_str(hf.backend_tokenizer.to_str())
            self._backend.no_truncation()
            self._backend.no_padding()
        plain, whole = (list(hf("a", add_special_tokens=special)["input_ids"]) for special in (False, True))
        starts = [place for place in range(len(whole)) if whole[place : place + len(plain)] == plain]
        self._front = whole[: starts[0]] if starts else []
        self._control = {token for token, added in hf.added_tokens_decoder.items() if added.special}
        self.shown = lru_cache(maxsize=65_536)(self._shown)

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

        The tokenizer's chat template writes it, if the tokenizer brings one and is of the `tokenizers` library. Control
        tokens are those that the template itself writes: a text of a message that spells one is put in after the
        template was rendered, as ordinary text. A model without a template gets a line `role: text` for each message
        and `assistant:` as the last line.

        Args:
            messages: `role`, `content` and perhaps `name` of each.
        Raises:
            PromptError: The template refuses the messages.
            RuntimeError: The template does not end, or ends the process that renders it.
        """
        backend = self._backend
        if backend is None:
            lines = [f"{message['role']}: {message['content']}" for message in messages]
            return self.text("\n".join([*lines, "assistant:"]))
        spelling: list[str] = []

        def quoted(text: str) -> str:
            text = text.replace(MARK, "")
            if self._control.isdisjoint(backend.encode(text, add_special_tokens=False).ids):
                return text
            spelling.append(text)
            return f"{MARK}{len(spelling) - 1}{MARK}"

        given = [
            {key: text if key == "role" else quoted(text) for key, text in message.items()} for message in messages
        ]
        try:
            written = self.renderer.render(self._hf.get_chat_template(), given, self._hf.special_tokens_map)
        except ValueError as error:
            raise PromptError(f"messages: the model's chat template refuses them: {error}") from None
        ids: list[int] = []
        for place, piece in enumerate(QUOTED.split(written)):
            if place % 2:
                ids += self._plain(spelling[int(piece)])
            else:
                ids += backend.encode(piece.replace(MARK, ""), add_special_tokens=False).ids
        return ids or [self.opened.tokenizer.eos_id]

    def _plain(self, text: str) -> list[int]:
        ids: list[int] = self.opened.tokenizer.encode_batch([text])[0].tolist()
        return ids

    def _shown(self, token: int) -> tuple[str, list[int] | None]:
        """A token as text, and its bytes; one that is part of a character as its vocabulary has it, and None."""
        piece, text = self._hf.convert_ids_to_tokens(token), self.opened.tokenizer.decode([token])
        if isinstance(piece, str) and token not in self._control:
            if "\u2581" in piece:  # decoders drop the blank it stands for at the start of a text
                text = piece.replace("\u2581", " ")
            elif BROKEN in text:
                return piece, None
        return text, list(text.encode("utf-8"))
