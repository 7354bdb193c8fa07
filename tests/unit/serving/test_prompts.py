"""A prompt begins with what the model's own tokenizer puts before a text."""

from __future__ import annotations

from types import SimpleNamespace

import tokenizers
from support.served import tokenizer
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from weftlm.corpora.tokens import Tokenizer
from weftlm.serving.prompts import Prompts


def prompts(*, begins: bool) -> Prompts:
    """Over the tests' tokenizer, or one that puts a beginning-of-text token first and an end of text last."""
    words = tokenizer(fewer=1)
    if begins:
        backend = tokenizers.Tokenizer.from_str(words.hf.backend_tokenizer.to_str())
        backend.add_special_tokens(["<s>"])
        first, last = backend.token_to_id("<s>"), words.eos_id
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A <|endoftext|>", special_tokens=[("<s>", first), ("<|endoftext|>", last)]
        )
        words = Tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>", bos_token="<s>"))
    return Prompts(SimpleNamespace(tokenizer=words))  # type: ignore[arg-type]


def test_a_prompt_begins_as_the_tokenizer_begins_a_text() -> None:
    made = prompts(begins=True)
    words = made.opened.tokenizer
    first = words.hf.bos_token_id
    assert first is not None
    plain = words.encode_batch(["a ring"])[0].tolist()
    assert made.text("a ring") == [first, *plain]
    assert made.text("a ring", special=False) == plain
    assert made.text("") == [first]
    assert made.text("", special=False) == [words.eos_id]
    assert first not in made.text("a <s> ring", special=False)


def test_a_tokenizer_that_puts_nothing_first_adds_nothing() -> None:
    made = prompts(begins=False)
    assert made.text("a ring") == made.opened.tokenizer.encode_batch(["a ring"])[0].tolist()
    assert made.text("") == [made.opened.tokenizer.eos_id]
