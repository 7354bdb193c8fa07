"""Ranked answers against plain loops: one choice at a time, no batch, no padding."""

import gzip
import itertools
import json
import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
import zstandard
from support import experts as tiny
from tokenizers import models, normalizers, pre_tokenizers
from torch import nn
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast, T5ForConditionalGeneration

from weftlm.corpora.config import TrainConfig
from weftlm.corpora.tokens import Tokenizer, train_tokenizer
from weftlm.errors import ConfigError, DataError, NumericsError
from weftlm.evaluation.choices import ChoiceQuestion, QuestionScores, choice_scores, read_choices, score_choices
from weftlm.models.prompted import Prompted, target_nats

WORDS = {word: index for index, word in enumerate("abcdefghij")}
EOS = 10


@pytest.fixture(scope="module")
def words() -> Tokenizer:
    """Ids 0 to 9 are the words a to j, 10 ends a document; anything else is dropped."""
    backend = tokenizers.Tokenizer(models.WordLevel({**WORDS, "</s>": EOS}, unk_token=None))
    backend.normalizer = normalizers.Replace(tokenizers.Regex("[^a-j ]"), "")
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>"))


@pytest.fixture(scope="module")
def llama() -> LlamaForCausalLM:
    return tiny.llama(vocab_size=11, attention_dropout=0.5, initializer_range=0.5)


@pytest.fixture(scope="module")
def t5() -> T5ForConditionalGeneration:
    return tiny.t5(vocab_size=11, eos_token_id=EOS, dropout_rate=0.5, num_layers=1)


def ids(text: str) -> list[int]:
    return [WORDS[word] for word in text.split()]


def ask(prompt: str, *choices: str, answer: int = 0) -> ChoiceQuestion:
    return ChoiceQuestion(prompt, choices, answer)


def random_questions(seed: int = 0) -> list[ChoiceQuestion]:
    rng = np.random.default_rng(seed)

    def text(low: int, high: int) -> str:
        return " ".join(rng.choice(list(WORDS), size=rng.integers(low, high)))

    choices = [list(dict.fromkeys(text(1, 6) for _ in range(rng.integers(2, 6)))) for _ in range(4)]
    return [ask(text(1, 14), *each, "a b c d e f g", answer=int(rng.integers(len(each)))) for each in choices]


def flat(scores: list[QuestionScores]) -> list[float]:
    return [value for score in scores for value in score.log_probs.tolist()]


def test_a_bigram_model_ranks_what_its_table_says(words: Tokenizer, bigram: Any) -> None:
    """p(next | last): after a, b 0.5, c 0.2 and a 0.3; after b, b or a; after c, always c."""
    table = np.full((11, 11), 1e-9)
    table[0, [1, 2, 0]] = 0.5, 0.2, 0.3
    table[1, [1, 0]] = 0.5, 0.5
    table[2, 2] = 1.0
    bigram = type(bigram)(table / table.sum(axis=1, keepdims=True))
    questions = [
        ask("b a", "b", "c c c", answer=0),  # p 0.5 and 0.2; per token 0.5 and 0.2^(1/3) = 0.58: wrong
        ask("a", "b b", "c", "a", answer=0),  # p 0.25, 0.2 and 0.3; per token 0.5, 0.2 and 0.3: right
    ]
    scores = choice_scores(bigram, words, questions, batch_size=4, max_length=8)
    half, fifth = math.log(0.5), math.log(0.2)
    assert flat(scores) == pytest.approx([half, fifth, 2 * half, fifth, math.log(0.3)])
    assert [score.tokens.tolist() for score in scores] == [[1, 3], [2, 1, 1]]
    result = score_choices(bigram, words, questions, batch_size=1, max_length=8)
    assert (result.accuracy, result.accuracy_sum, result.questions) == (0.5, 0.5, 2)
    assert result.accuracy_se == pytest.approx(np.std([0, 1], ddof=1) / math.sqrt(2))
    assert result.chance == pytest.approx((1 / 2 + 1 / 3) / 2)


@pytest.mark.parametrize("encoder", [False, True])
def test_a_choice_costs_what_it_costs_alone_whatever_its_batch(
    llama: LlamaForCausalLM, t5: T5ForConditionalGeneration, words: Tokenizer, encoder: bool
) -> None:
    model, end = (t5, [EOS]) if encoder else (llama, [])
    questions = random_questions()
    rows = [
        Prompted(np.array(ids(question.prompt) + end), np.array(ids(choice) + end))
        for question in questions
        for choice in question.choices
    ]
    model.eval()
    with torch.no_grad():
        expected = [-float(target_nats(model, [row], torch.device("cpu"), encoder=encoder)) for row in rows]
    model.train()
    for batch_size in (1, 3, 64):
        scores = choice_scores(model, words, questions[::-1], batch_size=batch_size, max_length=64)[::-1]
        assert flat(scores) == pytest.approx(expected, rel=1e-5)
    assert model.training, "evaluated without dropout, and its mode put back"
    assert [length for score in scores for length in score.tokens.tolist()] == [len(row.target_C) for row in rows]


class Recorder(nn.Module):
    """Notes every forward pass; its logits are zero."""

    def __init__(self, vocabulary: int = 11, **attributes: Any) -> None:
        super().__init__()
        self.calls: list[dict[str, Any]] = []
        self.vocabulary = vocabulary
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, **inputs: Any) -> SimpleNamespace:
        self.calls.append(inputs)
        positions = inputs["labels"] if "labels" in inputs else inputs["input_ids"]
        return SimpleNamespace(logits=torch.zeros(*positions.shape, self.vocabulary))


QUESTIONS = [ask("a b c", "d", "e f"), ask("g", "h i", "j")]
ENCODER = SimpleNamespace(is_encoder_decoder=True)


def test_a_model_that_routes_sequences_gets_the_places_of_the_prompts(words: Tokenizer) -> None:
    inner = Recorder(accepts_routing_mask=True)
    wrapper = nn.DataParallel(inner)  # without a GPU it hands its call on
    choice_scores(wrapper, words, QUESTIONS, batch_size=4, max_length=9)
    assert inner.calls[0]["routing_mask"].tolist() == [[True] * 3 + [False]] * 2 + [[True, False, False, False]] * 2
    model = Recorder(accepts_routing_mask=True, config=ENCODER)
    choice_scores(model, words, QUESTIONS, batch_size=4, max_length=9)
    (call,) = model.calls
    assert call["input_ids"].tolist() == [[0, 1, 2, EOS]] * 2 + [[6, EOS, 0, 0]] * 2
    assert call["attention_mask"].tolist() == [[1, 1, 1, 1]] * 2 + [[1, 1, 0, 0]] * 2
    assert call["routing_mask"].tolist() == call["attention_mask"].bool().tolist()
    assert call["labels"].tolist() == [[4, 5, EOS], [3, EOS, -100], [7, 8, EOS], [9, EOS, -100]]


def test_the_boundary_does_not_depend_on_the_choice() -> None:
    tokenizer = train_tokenizer(["a cat and a dog " * 20], TrainConfig(vocab_size=270))
    prompt, *pieces = (each.tolist() for each in tokenizer.encode_batch(["a", " cat", " dog and"]))
    found = []
    for questions, separator in (([ask("a", " cat", " dog and")], ""), ([ask("a", "cat", "dog and")], " ")):
        model = Recorder(tokenizer.vocab_size)
        (score,) = choice_scores(model, tokenizer, questions, batch_size=9, max_length=64, separator=separator)
        assert score.tokens.tolist() == list(map(len, pieces))
        rows = zip(model.calls[0]["input_ids"], model.calls[0]["attention_mask"], strict=True)
        found.append(sorted(row[: int(mask.sum())].tolist() for row, mask in rows))
    assert found[0] == sorted(prompt + piece[:-1] for piece in pieces)
    assert found[0] == found[1], "the separator belongs to the choice: tokenised and scored with it"


def test_a_long_prompt_loses_its_beginning_alike_for_every_choice(llama: LlamaForCausalLM, words: Tokenizer) -> None:
    asked = [ask("a b c d e f g", "h", "i j a"), ask("a b", "c", "d")]
    scores = choice_scores(llama, words, asked, batch_size=3, max_length=6)
    cut = choice_scores(llama, words, [ask("e f g", "h", "i j a")], batch_size=3, max_length=64)
    assert flat(scores[:1]) == pytest.approx(flat(cut), rel=1e-5)
    model = Recorder(config=ENCODER)
    choice_scores(model, words, asked[:1], batch_size=3, max_length=4)
    assert model.calls[0]["input_ids"].tolist() == [[4, 5, 6, EOS]] * 2, "an encoder's prompt is cut by itself"


class Last(Recorder):
    """Gives the logits of the last place alone."""

    def forward(self, **inputs: Any) -> SimpleNamespace:
        return SimpleNamespace(logits=super().forward(**inputs).logits[:, -1:])


class Broken(Recorder):
    """Has no loss for one word."""

    def forward(self, **inputs: Any) -> SimpleNamespace:
        logits = super().forward(**inputs).logits
        logits[inputs["input_ids"].eq(WORDS["g"])] = math.nan
        return SimpleNamespace(logits=logits)


TWO = ask("a", "b", "c")


@pytest.mark.parametrize(
    ("model", "questions", "how", "error", "message"),
    [
        (Recorder(), QUESTIONS, {"batch_size": 0}, ConfigError, "batch_size is 0; it must be at least 1"),
        (Recorder(), QUESTIONS, {"max_length": 0}, ConfigError, "max_length is 0; it must be at least 1"),
        (Recorder(), [], {}, DataError, "there is no question to score"),
        (Recorder(), [TWO, ask("", "a", "b")], {}, DataError, "question 1: the prompt or a choice has no tokens"),
        (Recorder(), [TWO, ask("a", "b", "???")], {}, DataError, "no tokens; the tokenizer drops all of it"),
        (Recorder(), [ask("a b", "c", "d e f g h i")], {"max_length": 6}, DataError, "never cut; 8 keeps all"),
        (Recorder(config=ENCODER), [ask("a", "b c d", "e")], {"max_length": 3}, DataError, "takes 4 tokens, and a"),
        (Recorder(config=SimpleNamespace(vocab_size=5)), QUESTIONS, {}, ConfigError, "the model knows ids from 0 to 4"),
        (Last(), QUESTIONS, {}, ConfigError, "scores of shape (4, 1, 11) for 4 sequences of 4 positions"),
        (Broken(), QUESTIONS, {}, NumericsError, "the loss is not a number on 2 of 4 held-out choices"),
    ],
)
def test_what_cannot_be_scored_is_said(
    words: Tokenizer, model: nn.Module, questions: list[ChoiceQuestion], how: dict[str, int], error: Any, message: str
) -> None:
    with pytest.raises(error, match=re.escape(message)):
        score_choices(model, words, questions, **{"batch_size": 9, "max_length": 9, **how})


# ------------------------------------------------------------------------------------------------------------ reading

GOOD = {"prompt": "2 + 2 =", "choices": ["3", "4"], "answer": 1}


def write(path: Path, *records: Any) -> Path:
    data = b"".join((r if isinstance(r, bytes) else json.dumps(r).encode()) + b"\n" for r in records)
    compress = {".gz": gzip.compress, ".zst": zstandard.compress}.get(path.suffix, bytes)
    path.write_bytes(compress(data))
    return path


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_questions_come_out_of_json_lines(tmp_path: Path, suffix: str) -> None:
    other = {"prompt": "", "choices": ["é", "e", "0"], "answer": "0", "group": "g", "licence": [1]}
    path = write(tmp_path / f"q.jsonl{suffix}", GOOD, b"", other)
    assert read_choices(str(path)) == [ask("2 + 2 =", "3", "4", answer=1), ask("", "é", "e", "0", answer=2)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": ...}, "field 'prompt' is missing; it must be text"),
        ({"answer": None}, "field 'answer' is missing; it must be the index of a choice or its text"),
        ({"prompt": 4}, "field 'prompt' holds 4; it must be text"),
        ({"choices": "34"}, "field 'choices' holds '34'; it must be a list of texts"),
        ({"choices": [3, 4]}, "field 'choices' holds [3, 4]; it must be a list of texts (in quotes)"),
        ({"choices": []}, "choices are []; give two or more"),
        ({"choices": ["4", ""]}, "choices are ['4', '']; give two or more, all different and none empty"),
        ({"choices": ["3", "4", "3"]}, "all different and none empty"),
        ({"answer": 2}, "answer is 2; 2 choices have indices 0 to 1"),
        ({"answer": True}, "field 'answer' holds True; it must be the index of a choice or its text"),
        ({"answer": "5"}, "answer '5' is none of the choices; allowed: 3, 4"),
        ({"choices": ["seven", "eight"], "answer": "sevn"}, "is none of the choices; did you mean 'seven'?"),
        ({"prompt": "half \ud800"}, "holds half a surrogate pair, which UTF-8 cannot hold"),
    ],
)
def test_an_unsound_question_is_named_by_file_and_line(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    record = {name: value for name, value in (GOOD | change).items() if value is not ...}
    path = write(tmp_path / "q.jsonl", GOOD, record)
    with pytest.raises(DataError, match=f"^{re.escape(str(path))}:2: .*{re.escape(message)}"):
        read_choices(path)


def test_a_file_that_is_not_json_lines_is_named_by_line(tmp_path: Path) -> None:
    for lines, message in (
        ((GOOD, b"{"), r"q\.jsonl:2: .*not valid JSON"),
        (([GOOD],), r"q\.jsonl:1: .*JSON objects on every line"),
        ((b"",), r"q\.jsonl holds no question; give one JSON object with prompt"),
    ):
        with pytest.raises(DataError, match=message):
            read_choices(write(tmp_path / "q.jsonl", *lines))
    whole = write(tmp_path / "q.jsonl.gz", *itertools.repeat(GOOD, 50))
    whole.write_bytes(whole.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"q\.jsonl\.gz:\d+: .*ends too early"):
        read_choices(whole)
