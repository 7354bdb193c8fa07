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
from tokenizers import models, normalizers, pre_tokenizers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

from weftlm.corpora.config import TrainConfig
from weftlm.corpora.tokens import Tokenizer, train_tokenizer
from weftlm.errors import ConfigError, DataError, NumericsError
from weftlm.evaluation.choices import (
    ChoiceQuestion,
    QuestionScores,
    choice_result,
    choice_scores,
    read_choices,
    score_choices,
)
from weftlm.models.hf import HFLanguageModel

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
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=11,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        attention_dropout=0.5,
        max_position_embeddings=64,
        initializer_range=0.5,
    )
    return LlamaForCausalLM(config)


@pytest.fixture(scope="module")
def t5() -> T5ForConditionalGeneration:
    torch.manual_seed(1)
    config = T5Config(
        vocab_size=11,
        d_model=32,
        d_kv=16,
        d_ff=48,
        num_layers=1,
        num_heads=2,
        dropout_rate=0.5,
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=EOS,
        initializer_factor=1.0,
    )
    return T5ForConditionalGeneration(config)


def ids(text: str) -> list[int]:
    return [WORDS[word] for word in text.split()]


def ask(prompt: str, *choices: str, answer: int = 0, **more: str) -> ChoiceQuestion:
    return ChoiceQuestion(prompt, choices, answer, **more)


def random_questions(count: int = 4, seed: int = 0) -> list[ChoiceQuestion]:
    rng = np.random.default_rng(seed)

    def text(low: int, high: int) -> str:
        return " ".join(rng.choice(list(WORDS), size=rng.integers(low, high)))

    result = []
    for _ in range(count):
        choices = list(dict.fromkeys(text(1, 6) for _ in range(rng.integers(2, 6))))
        result.append(ask(text(1, 14), *choices, "a b c d e f g", answer=int(rng.integers(len(choices)))))
    return result


def causal_by_hand(model: Any, prompt: list[int], choice: list[int]) -> float:
    model.eval()
    with torch.no_grad():
        logp_TV = torch.log_softmax(model(input_ids=torch.tensor([prompt + choice])).logits[0].double(), -1)
    return sum(float(logp_TV[len(prompt) - 1 + j, token]) for j, token in enumerate(choice))


def t5_by_hand(model: Any, prompt: list[int], choice: list[int]) -> float:
    model.eval()
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt]), decoder_input_ids=torch.tensor([[0, *choice[:-1]]])).logits
    logp_TV = torch.log_softmax(logits[0].double(), -1)
    return sum(float(logp_TV[j, token]) for j, token in enumerate(choice))


def flat(scores: list[QuestionScores]) -> list[float]:
    return [value for score in scores for value in score.log_probs]


# ------------------------------------------------------------------------------------------------------ by hand


def test_a_bigram_model_ranks_what_its_table_says(words: Tokenizer) -> None:
    """p(next | last): after a, b 0.5, c 0.2 and a 0.3; after b, b or a; after c, always c."""
    table = np.full((11, 11), 1e-9)
    table[0, [1, 2, 0]] = 0.5, 0.2, 0.3
    table[1, [1, 0]] = 0.5, 0.5
    table[2, 2] = 1.0

    class Bigram:
        vocab_size = 11

        def log_probs(self, tokens_BT: Tensor) -> Tensor:
            return torch.tensor(np.log(table))[tokens_BT]

    questions = [
        ask("b a", "b", "c c c", answer=0),  # p 0.5 and 0.2; per token 0.5 and 0.2^(1/3) = 0.58: wrong
        ask("a", "b b", "c", "a", answer=0),  # p 0.25, 0.2 and 0.3; per token 0.5, 0.2 and 0.3: right
    ]
    scores = choice_scores(Bigram(), words, questions, batch_size=4, max_length=8)
    half, fifth = math.log(0.5), math.log(0.2)
    assert scores[0].log_probs == pytest.approx((half, fifth))
    assert scores[1].log_probs == pytest.approx((2 * half, fifth, math.log(0.3)))
    assert scores[0].per_token == pytest.approx((half, fifth / 3))
    assert scores[0].per_byte == pytest.approx((half, fifth / 5))
    assert scores[0].tokens == (1, 3)
    assert scores[0].bytes == (1, 5)
    assert [score.prediction for score in scores] == [1, 0]
    result = choice_result(questions, scores)
    assert result.correct == (False, True)
    assert result.accuracy == 0.5
    assert result.accuracy_se == pytest.approx(np.std([0, 1], ddof=1) / math.sqrt(2))
    assert result.accuracy_sum == 0.5  # the other one
    assert result.accuracy_per_byte == 0.5
    assert result.answer_log_prob == pytest.approx(half)
    assert result.answer_log_prob_se == pytest.approx(0.0, abs=1e-9)
    assert result.chance == pytest.approx((1 / 2 + 1 / 3) / 2)
    assert (result.questions, result.truncated_prompts) == (2, 0)
    assert score_choices(Bigram(), words, questions, batch_size=1, max_length=8) == result


def test_a_causal_model_costs_what_one_choice_at_a_time_costs(llama: LlamaForCausalLM, words: Tokenizer) -> None:
    questions = random_questions()
    scores = choice_scores(llama, words, questions, batch_size=5, max_length=64)
    for question, score in zip(questions, scores, strict=True):
        expected = [causal_by_hand(llama, ids(question.prompt), ids(choice)) for choice in question.choices]
        assert score.log_probs == pytest.approx(expected, rel=1e-5)
        assert score.tokens == tuple(len(choice.split()) for choice in question.choices)


def test_an_encoder_decoder_reads_the_prompt_in_its_encoder(t5: T5ForConditionalGeneration, words: Tokenizer) -> None:
    questions = random_questions(seed=4)
    plain = choice_scores(t5, words, questions, batch_size=5, max_length=64, end_choices=False)
    ended = choice_scores(t5, words, questions, batch_size=5, max_length=64)  # trained with an end: the default
    for question, first, second in zip(questions, plain, ended, strict=True):
        prompt, choices = ids(question.prompt), [ids(choice) for choice in question.choices]
        assert first.log_probs == pytest.approx([t5_by_hand(t5, prompt, choice) for choice in choices], rel=1e-5)
        expected = [t5_by_hand(t5, [*prompt, EOS], [*choice, EOS]) for choice in choices]
        assert second.log_probs == pytest.approx(expected, rel=1e-5)
        assert second.tokens == tuple(len(choice) + 1 for choice in choices)
        assert second.bytes == first.bytes


# ----------------------------------------------------------------------------------------- batches, padding, contracts


@pytest.mark.parametrize("kind", ["causal", "encoder-decoder", "language model"])
@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_neither_batch_size_nor_order_matters(
    llama: LlamaForCausalLM, t5: T5ForConditionalGeneration, words: Tokenizer, kind: str, batch_size: int
) -> None:
    model = {"causal": llama, "encoder-decoder": t5, "language model": HFLanguageModel(llama)}[kind]
    questions = random_questions(seed=2)
    reference = choice_scores(model, words, questions, batch_size=7, max_length=64)
    order = np.random.default_rng(1).permutation(len(questions))
    shuffled = choice_scores(model, words, [questions[i] for i in order], batch_size=batch_size, max_length=64)
    assert flat(shuffled) == pytest.approx(flat([reference[i] for i in order]), rel=1e-5)


def test_a_language_model_agrees_with_its_module_and_never_sees_padding(
    llama: LlamaForCausalLM, words: Tokenizer, bigram: Any
) -> None:
    questions = random_questions(seed=3)
    module = choice_scores(llama, words, questions, batch_size=4, max_length=64)
    wrapped = choice_scores(HFLanguageModel(llama), words, questions, batch_size=4, max_length=64)
    assert flat(wrapped) == pytest.approx(flat(module), rel=1e-5)
    choice_scores(bigram, words, questions, batch_size=4, max_length=64)
    lengths = [
        len(ids(question.prompt)) + len(ids(choice)) - 1 for question in questions for choice in question.choices
    ]
    for length in set(lengths):
        assert sum(rows for rows, width in bigram.batches if width == length) == lengths.count(length)
    assert sum(rows for rows, _ in bigram.batches) == len(lengths)
    assert max(rows for rows, _ in bigram.batches) == 4


class Recorder(nn.Module):
    """Notes every forward pass; its logits are zero."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__()
        self.calls: list[dict[str, Any]] = []
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, **inputs: Any) -> SimpleNamespace:
        self.calls.append(inputs)
        positions = inputs["labels"] if "labels" in inputs else inputs["input_ids"]
        return SimpleNamespace(logits=torch.zeros(*positions.shape, 11))


QUESTIONS = [ask("a b c", "d", "e f"), ask("g", "h i", "j")]


def test_batches_are_padded_on_the_right_longest_first(words: Tokenizer) -> None:
    model = Recorder()
    choice_scores(model, words, QUESTIONS, batch_size=3, max_length=9)
    first, second = model.calls
    assert first["input_ids"].tolist() == [[0, 1, 2, 4], [0, 1, 2, 0], [6, 7, 0, 0]]
    assert first["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 0, 0]]
    assert second["input_ids"].tolist() == [[6]]
    assert first.keys() == {"input_ids", "attention_mask", "use_cache"}
    assert first["use_cache"] is False


def test_a_model_that_routes_sequences_is_told_where_the_prompt_is(words: Tokenizer) -> None:
    model = Recorder(accepts_routing_mask=True)
    choice_scores(model, words, QUESTIONS, batch_size=4, max_length=9)
    (call,) = model.calls
    assert call["routing_mask"].dtype == torch.bool
    assert call["routing_mask"].tolist() == [[True] * 3 + [False]] * 2 + [[True, False, False, False]] * 2
    deaf = Recorder(accepts_routing_mask=False)
    choice_scores(deaf, words, QUESTIONS, batch_size=4, max_length=9)
    assert "routing_mask" not in deaf.calls[0]


def test_a_routing_mask_over_an_encoder_is_the_prompt_and_labels_are_padded_with_what_losses_ignore(
    words: Tokenizer,
) -> None:
    model = Recorder(accepts_routing_mask=True, config=SimpleNamespace(is_encoder_decoder=True))
    choice_scores(model, words, QUESTIONS, batch_size=4, max_length=9)
    (call,) = model.calls
    assert call["input_ids"].tolist() == [[0, 1, 2, EOS]] * 2 + [[6, EOS, 0, 0]] * 2
    assert call["attention_mask"].tolist() == [[1, 1, 1, 1]] * 2 + [[1, 1, 0, 0]] * 2
    assert call["routing_mask"].tolist() == call["attention_mask"].bool().tolist()
    assert call["labels"].tolist() == [[4, 5, EOS], [3, EOS, -100], [7, 8, EOS], [9, EOS, -100]]


def test_a_language_model_may_ask_for_the_routing_mask_too(words: Tokenizer) -> None:
    masks = []

    class Routed:
        vocab_size = 11
        accepts_routing_mask = True

        def log_probs(self, tokens_BT: Tensor, routing_mask: Tensor) -> Tensor:
            masks.append(routing_mask.tolist())
            return torch.zeros(*tokens_BT.shape, 11)

    choice_scores(Routed(), words, QUESTIONS, batch_size=9, max_length=9)
    assert masks == [[[True, True, True, False]], [[True, True, True]], [[True, False]], [[True]]]


def test_what_a_wrapper_hides_is_found(words: Tokenizer) -> None:
    class Wrapper(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

        def forward(self, **inputs: Any) -> Any:
            return self.module(**inputs)

    inner = Recorder(accepts_routing_mask=True, config=SimpleNamespace(is_encoder_decoder=True))
    choice_scores(Wrapper(inner), words, QUESTIONS, batch_size=9, max_length=9)
    assert {"labels", "routing_mask"} <= inner.calls[0].keys()


def test_dropout_is_off_and_modes_come_back(llama: LlamaForCausalLM, words: Tokenizer) -> None:
    llama.train()
    questions = random_questions()
    first = choice_scores(llama, words, questions, batch_size=4, max_length=64)
    assert llama.training
    assert first == choice_scores(llama, words, questions, batch_size=4, max_length=64)


def test_half_precision_logits_are_normalised_in_float32(words: Tokenizer) -> None:
    class Half(Recorder):
        def forward(self, **inputs: Any) -> SimpleNamespace:
            return SimpleNamespace(logits=super().forward(**inputs).logits.bfloat16())

    scores = choice_scores(Half(), words, QUESTIONS, batch_size=9, max_length=9)
    assert scores[0].log_probs == pytest.approx((-math.log(11), -2 * math.log(11)), rel=1e-6)


# -------------------------------------------------------------------------------------------- boundary and truncation


def test_the_boundary_does_not_depend_on_the_choice() -> None:
    tokenizer = train_tokenizer(["a cat and a dog " * 20], TrainConfig(vocab_size=270))
    prompt = tokenizer.encode_batch(["a"])[0].tolist()
    model = Recorder()
    scores = choice_scores_over(model, tokenizer, [ask("a", " cat", " dog and")])
    pieces = [tokenizer.encode_batch([text])[0].tolist() for text in (" cat", " dog and")]
    assert scores[0].tokens == tuple(map(len, pieces))
    rows = [row[: int(mask.sum())].tolist() for row, mask in rows_of(model)]
    assert sorted(rows) == sorted(prompt + piece[:-1] for piece in pieces)
    spaced = choice_scores_over(Recorder(), tokenizer, [ask("a", "cat", "dog and")], separator=" ")
    assert spaced == scores  # the separator belongs to the choice: tokenised, counted and scored with it
    assert spaced[0].bytes == (4, 8)


def choice_scores_over(model: Recorder, tokenizer: Tokenizer, questions: Any, **more: Any) -> list[QuestionScores]:
    class Wide(nn.Module):
        def forward(self, **inputs: Any) -> SimpleNamespace:
            model(**inputs)
            return SimpleNamespace(logits=torch.zeros(*inputs["input_ids"].shape, tokenizer.vocab_size))

    return choice_scores(Wide(), tokenizer, questions, batch_size=9, max_length=64, **more)


def rows_of(model: Recorder) -> list[tuple[Tensor, Tensor]]:
    return [pair for call in model.calls for pair in zip(call["input_ids"], call["attention_mask"], strict=True)]


def test_a_long_prompt_loses_its_beginning_alike_for_every_choice(llama: LlamaForCausalLM, words: Tokenizer) -> None:
    long, short = ask("a b c d e f g", "h", "i j a"), ask("a b", "c", "d")
    scores = choice_scores(llama, words, [long, short], batch_size=3, max_length=6)
    cut = choice_scores(llama, words, [ask("e f g", "h", "i j a")], batch_size=3, max_length=64)
    assert flat(scores[:1]) == pytest.approx(flat(cut), rel=1e-5)
    assert [score.truncated for score in scores] == [True, False]
    assert score_choices(llama, words, [long, short], batch_size=3, max_length=6).truncated_prompts == 1
    assert score_choices(llama, words, [long, short], batch_size=3, max_length=10).truncated_prompts == 0


def test_an_encoders_prompt_is_cut_to_max_length_by_itself(words: Tokenizer) -> None:
    model = Recorder(config=SimpleNamespace(is_encoder_decoder=True))
    scores = choice_scores(model, words, [ask("a b c d e f g", "h", "i j a")], batch_size=3, max_length=4)
    assert model.calls[0]["input_ids"].tolist() == [[4, 5, 6, EOS]] * 2
    assert scores[0].truncated
    assert scores[0].tokens == (2, 4)


def test_a_start_token_survives_truncation_and_stands_in_for_an_empty_prompt(words: Tokenizer) -> None:
    model = Recorder()
    questions = [ask("a b c d", "e", "f"), ask("", "e", "f g")]
    choice_scores(model, words, questions, batch_size=1, max_length=4, start_token=EOS)
    assert [call["input_ids"][0].tolist() for call in model.calls] == [[EOS, 2, 3]] * 2 + [[EOS, 5], [EOS]]


def test_a_causal_model_can_be_asked_to_end_its_choices(llama: LlamaForCausalLM, words: Tokenizer) -> None:
    (score,) = choice_scores(llama, words, [ask("a b", "c", "d e")], batch_size=2, max_length=9, end_choices=True)
    expected = [causal_by_hand(llama, [0, 1], [2, EOS]), causal_by_hand(llama, [0, 1], [3, 4, EOS])]
    assert score.log_probs == pytest.approx(expected, rel=1e-5)


# --------------------------------------------------------------------------------------------------- scoring's errors


@pytest.mark.parametrize("name", ["batch_size", "max_length"])
def test_sizes_begin_at_one(words: Tokenizer, name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} is 0; it must be at least 1"):
        choice_scores(Recorder(), words, QUESTIONS, **{"batch_size": 1, "max_length": 9, name: 0})


def test_no_question_is_an_error(words: Tokenizer) -> None:
    with pytest.raises(DataError, match="there is no question to score"):
        score_choices(Recorder(), words, [], batch_size=1, max_length=9)
    with pytest.raises(DataError, match="there is no question to score"):
        choice_result([], [])


@pytest.mark.parametrize(
    ("question", "message"),
    [
        (ask("", "a", "b"), "question 1: the prompt has no tokens and nothing to predict the choice from"),
        (ask("a", "b", "???", name="odd"), "question 1 (odd): choice 1, '???', has no tokens; the tokenizer drops all"),
        (
            ask("a b", "c", "d e f g h i"),
            "question 1: max_length 6 leaves no room: the longest choice takes 6 tokens, and a choice is never cut; "
            "8 keeps all of the prompt too",
        ),
    ],
)
def test_a_question_that_cannot_be_scored_is_named(words: Tokenizer, question: ChoiceQuestion, message: str) -> None:
    with pytest.raises(DataError, match=re.escape(message)):
        choice_scores(Recorder(), words, [ask("a", "b", "c"), question], batch_size=2, max_length=6)


def test_an_encoder_decoders_choice_has_a_limit_too(words: Tokenizer) -> None:
    model = Recorder(config=SimpleNamespace(is_encoder_decoder=True))
    with pytest.raises(DataError, match=r"takes 4 tokens, and a choice is never cut; 4 keeps"):
        choice_scores(model, words, [ask("a", "b c d", "e")], batch_size=2, max_length=3)


def test_ids_outside_the_vocabulary_are_an_error(words: Tokenizer, bigram: Any) -> None:
    small = Recorder(config=SimpleNamespace(vocab_size=5))
    with pytest.raises(ConfigError, match=r"token id 5, and the model knows ids from 0 to 4; use the tokenizer that"):
        choice_scores(small, words, QUESTIONS, batch_size=2, max_length=9)
    with pytest.raises(ConfigError, match=r"token id 11, and the model knows ids from 0 to 10;"):
        choice_scores(bigram, words, QUESTIONS, batch_size=2, max_length=9, start_token=11)
    with pytest.raises(ConfigError, match=r"token id -1, and the model knows ids from 0;"):
        choice_scores(Recorder(), words, QUESTIONS, batch_size=2, max_length=9, start_token=-1)


def test_logits_of_other_positions_are_an_error(words: Tokenizer) -> None:
    class Last(Recorder):
        def forward(self, **inputs: Any) -> SimpleNamespace:
            return SimpleNamespace(logits=super().forward(**inputs).logits[:, -1:])

    with pytest.raises(ConfigError, match=r"scores of shape \(4, 1, 11\) for 4 sequences of 4 positions"):
        choice_scores(Last(), words, QUESTIONS, batch_size=9, max_length=9)


def test_a_score_that_is_not_a_number_is_an_error(words: Tokenizer) -> None:
    class Broken(Recorder):
        def forward(self, **inputs: Any) -> SimpleNamespace:
            logits = super().forward(**inputs).logits
            logits[inputs["input_ids"].eq(WORDS["g"])] = math.nan
            return SimpleNamespace(logits=logits)

    with pytest.raises(NumericsError, match=r"question 1: the log-probability of choice 0 is not a number"):
        choice_scores(Broken(), words, QUESTIONS, batch_size=9, max_length=9)


# ------------------------------------------------------------------------------------------------------------ results


def scores_for(right: list[bool], questions: list[ChoiceQuestion]) -> list[QuestionScores]:
    """Scores that answer each question rightly or wrongly, one token and byte per choice."""
    result = []
    for good, question in zip(right, questions, strict=True):
        chosen = question.answer if good else (question.answer + 1) % len(question.choices)
        values = tuple(-1.0 if index == chosen else -2.0 for index in range(len(question.choices)))
        result.append(QuestionScores(values, (1,) * len(values), (1,) * len(values)))
    return result


def test_the_first_of_equals_is_the_prediction() -> None:
    assert QuestionScores((-3.0, -1.0, -2.0), (3, 1, 2), (1, 1, 1)).prediction == 0
    assert QuestionScores((-3.0, -1.0, -2.0), (2, 1, 2), (1, 1, 1)).prediction == 1


def test_an_impossible_answer_is_infinitely_bad_and_no_error() -> None:
    question = ask("a", "b", "c")
    result = choice_result([question], [QuestionScores((-math.inf, -1.0), (1, 1), (1, 1))])
    assert result.correct == (False,)
    assert result.answer_log_prob == -math.inf
    assert result.to_json()["answer_log_prob"] is None


def test_scores_of_other_questions_are_refused() -> None:
    questions = [ask("a", "b", "c"), ask("a", "b", "c", "d")]
    scores = scores_for([True, True], questions)
    with pytest.raises(DataError, match="the scores of 2 questions do not fit 2 questions choice by choice"):
        choice_result(questions, scores[::-1])


# ------------------------------------------------------------------------------------------------------------ reading


GOOD = {"prompt": "2 + 2 =", "choices": ["3", "4"], "answer": 1}


def write(path: Path, *records: Any) -> Path:
    data = b"".join((r if isinstance(r, bytes) else json.dumps(r).encode()) + b"\n" for r in records)
    if path.suffix == ".gz":
        data = gzip.compress(data)
    elif path.suffix == ".zst":
        data = zstandard.compress(data)
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_questions_come_out_of_json_lines(tmp_path: Path, suffix: str) -> None:
    path = write(
        tmp_path / f"q.jsonl{suffix}",
        GOOD,
        b"",
        {"prompt": "", "choices": ["é", "e", "0"], "answer": "0", "group": "g", "name": "n", "licence": [1]},
    )
    assert read_choices(str(path)) == [
        ChoiceQuestion("2 + 2 =", ("3", "4"), 1),
        ChoiceQuestion("", ("é", "e", "0"), 2, "n"),
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": ...}, "field 'prompt' is missing; fields: choices, answer"),
        ({"choices": ...}, "field 'choices' is missing; fields: prompt, answer"),
        ({"answer": None}, "field 'answer' is missing; fields: prompt, choices, answer"),
        ({"prompt": 4}, "field 'prompt' holds 4; it must be text"),
        ({"name": 4}, "field 'name' holds 4; it must be text"),
        ({"name": ["x"]}, "field 'name' holds ['x']; it must be text"),
        ({"choices": "34"}, "field 'choices' holds '34'; it must be a list of texts"),
        ({"choices": [3, 4]}, "choices[0] is 3; every choice must be text (in quotes)"),
        ({"choices": []}, "choices holds 0; a question needs at least 2"),
        ({"choices": [], "answer": "x"}, "choices holds 0; a question needs at least 2"),
        ({"choices": ["4"], "answer": 0}, "choices holds 1; a question needs at least 2"),
        ({"choices": ["4", ""]}, "choices[1] is empty; every choice needs text to score"),
        ({"choices": ["3", "4", "3"]}, "choices[0] and choices[2] are both '3'; all must differ"),
        ({"answer": 2}, "answer is 2; 2 choices have indices 0 to 1"),
        ({"answer": -1}, "answer is -1; 2 choices have indices 0 to 1"),
        ({"answer": True}, "answer is True; it must be the index of a choice or the choice's own text"),
        ({"answer": 1.0}, "answer is 1.0; it must be the index of a choice or the choice's own text"),
        ({"answer": "5"}, "answer '5' is none of the choices; allowed: 3, 4"),
        ({"choices": ["seven", "eight"], "answer": "sevn"}, "is none of the choices; did you mean 'seven'?"),
        ({"prompt": "half \ud800"}, "holds half a surrogate pair, which UTF-8 cannot hold"),
    ],
)
def test_an_unsound_question_is_named_by_file_and_line(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    record = {name: value for name, value in (GOOD | change).items() if value is not ...}
    path = write(tmp_path / "q.jsonl", GOOD, record)
    with pytest.raises(DataError) as caught:
        read_choices(path)
    assert str(caught.value).startswith(f"{path}:2: ")
    assert message in str(caught.value)


def test_a_file_that_is_not_json_lines_is_named_by_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"q\.jsonl:2: not valid JSON"):
        read_choices(write(tmp_path / "q.jsonl", GOOD, b"{"))
    with pytest.raises(DataError, match=r"q\.jsonl:1: holds a JSON array; every line must be a JSON object"):
        read_choices(write(tmp_path / "q.jsonl", [GOOD]))
    with pytest.raises(DataError, match=r"q\.jsonl:1: byte 0xff at column 2 is not UTF-8"):
        read_choices(write(tmp_path / "q.jsonl", b'"\xff"'))
    with pytest.raises(DataError, match=r"none\.jsonl:1: cannot be read: there is no such file"):
        read_choices(tmp_path / "none.jsonl")
    whole = write(tmp_path / "q.jsonl.gz", *itertools.repeat(GOOD, 50))
    whole.write_bytes(whole.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"q\.jsonl\.gz:\d+: the file ends too early"):
        read_choices(whole)


def test_a_file_without_questions_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"q\.jsonl holds no question; give one JSON object with prompt"):
        read_choices(write(tmp_path / "q.jsonl", b""))
