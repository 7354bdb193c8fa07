"""Score a model on questions with listed answers: every answer is ranked by its likelihood after the prompt.

This is how multiple-choice sets are read without generating text (Sanh et al. 2022, arXiv:2110.08207; Muqeeth et al.
2024, arXiv:2402.05859): log p(choice | prompt) divided by the choice's tokens, and the highest is the prediction.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from weftlm.corpora.formats import read_file
from weftlm.corpora.reading_report import Reason
from weftlm.corpora.tokens import Tokenizer
from weftlm.errors import ConfigError, DataError, NumericsError, did_you_mean
from weftlm.evaluation.perplexity import evaluation_mode
from weftlm.evaluation.result import finite_or_none, ratio_and_error
from weftlm.models.language_model import LanguageModel
from weftlm.models.prompted import (
    Prompted,
    attribute,
    batches_by_length,
    is_encoder_decoder,
    prompted_inputs,
    token_log_probs,
)
from weftlm.threads import follow_load


@dataclass(frozen=True)
class ChoiceQuestion:
    """A prompt and its possible continuations, of which one is right.

    Attributes:
        prompt: the text before the answer.
        choices: two or more different texts, none empty.
        answer: index of the right one.
        name: its own name, for messages.
    Raises:
        DataError: fewer than two choices, an empty or repeated one, an answer out of range, or text that UTF-8 cannot
            hold.
    """

    prompt: str
    choices: tuple[str, ...]
    answer: int
    name: str | None = None

    def __post_init__(self) -> None:
        if len(self.choices) < 2:
            raise DataError(f"choices holds {len(self.choices)}; a question needs at least 2")
        for index, choice in enumerate(self.choices):
            if not choice:
                raise DataError(f"choices[{index}] is empty; every choice needs text to score")
            first = self.choices.index(choice)
            if first < index:
                raise DataError(f"choices[{first}] and choices[{index}] are both {choice!r:.60}; all must differ")
        if not 0 <= self.answer < len(self.choices):
            raise DataError(
                f"answer is {self.answer}; {len(self.choices)} choices have indices 0 to {len(self.choices) - 1}"
            )
        for text in (self.prompt, *self.choices):
            try:
                text.encode("utf-8")
            except UnicodeEncodeError as error:
                raise DataError(f"{text!r:.60} holds half a surrogate pair, which UTF-8 cannot hold") from error


@dataclass(frozen=True)
class QuestionScores:
    """The likelihood of every choice of one question.

    Attributes:
        log_probs: log p(choice | prompt) of each choice, summed over its tokens, nats.
        tokens: tokens of each choice.
        bytes: UTF-8 bytes of each choice with its separator.
        truncated: whether the prompt lost its beginning to `max_length`.
    """

    log_probs: tuple[float, ...]
    tokens: tuple[int, ...]
    bytes: tuple[int, ...]
    truncated: bool = False

    @property
    def per_token(self) -> tuple[float, ...]:
        """Length-normalised log-probabilities: nats per token of the choice."""
        return tuple(value / count for value, count in zip(self.log_probs, self.tokens, strict=True))

    @property
    def per_byte(self) -> tuple[float, ...]:
        """Log-probabilities in nats per byte of the choice: the same ranking whatever the tokenizer's pieces."""
        return tuple(value / count for value, count in zip(self.log_probs, self.bytes, strict=True))

    @property
    def prediction(self) -> int:
        """The choice with the highest `per_token`; the first of equals."""
        return _best(self.per_token)


@dataclass(frozen=True)
class ChoiceResult:
    """How well a model ranks the right answers.

    Standard errors treat questions as independent draws; they say nothing of the spread over seeds or prompt wordings.

    Attributes:
        accuracy: share of questions whose right choice has the highest log-probability per token.
        accuracy_se: its standard error over questions; NaN with a single question.
        accuracy_sum: the same with the log-probability summed over the choice, not normalised: favours short choices.
        accuracy_per_byte: the same with the log-probability per UTF-8 byte of the choice.
        answer_log_prob: mean over questions of the right choice's log-probability per token, nats.
        answer_log_prob_se: its standard error.
        chance: mean over questions of 1 / choices: the accuracy of guessing.
        questions: questions scored.
        truncated_prompts: questions whose prompt lost its beginning to `max_length`.
        fingerprint: hash of the prompts, choices and answers in their order.
        correct: per question, whether it counts for `accuracy`.
    """

    accuracy: float
    accuracy_se: float
    accuracy_sum: float
    accuracy_per_byte: float
    answer_log_prob: float
    answer_log_prob_se: float
    chance: float
    questions: int
    truncated_prompts: int
    fingerprint: str
    correct: tuple[bool, ...] = field(repr=False)

    def to_json(self) -> dict[str, Any]:
        """The numbers under their own names; what is not finite becomes None."""
        found = {name: value for name, value in vars(self).items() if name != "correct"}
        return {
            **{name: finite_or_none(value) if isinstance(value, float) else value for name, value in found.items()},
            "correct": list(self.correct),
        }


def read_choices(path: str | Path) -> list[ChoiceQuestion]:
    """Questions out of a JSON Lines file, plain, `.gz` or `.zst`.

    Every line is an object with `prompt` (text), `choices` (a list of texts) and `answer`: a whole number is the index
    of the right choice, counted from 0; a text is the right choice itself. `name` (text) may be left out; other fields
    are not read. Blank lines are allowed.

    Raises:
        DataError: the file cannot be read or holds no question, a field is missing or of the wrong kind, or a question
            is not sound (see `ChoiceQuestion`); the message names file and line.
    """

    def fail(reason: Reason, place: str, detail: str) -> NoReturn:
        raise DataError(f"{place}: {detail}")

    questions = []
    for place, record in read_file(Path(path), "jsonl", fail):
        assert isinstance(record, Mapping)
        try:
            questions.append(_question(record))
        except DataError as error:
            raise DataError(f"{place}: {error}") from None
    if not questions:
        raise DataError(f"{path} holds no question; give one JSON object with prompt, choices and answer per line")
    return questions


def score_choices(
    model: nn.Module | LanguageModel, tokenizer: Tokenizer, questions: Sequence[ChoiceQuestion], **how: Any
) -> ChoiceResult:
    """Rank every question's choices and sum the ranking up: `choice_result` of `choice_scores`, with its arguments."""
    return choice_result(questions, choice_scores(model, tokenizer, questions, **how))


def choice_scores(
    model: nn.Module | LanguageModel,
    tokenizer: Tokenizer,
    questions: Sequence[ChoiceQuestion],
    *,
    batch_size: int,
    max_length: int,
    device: torch.device | str = "cpu",
    separator: str = "",
    start_token: int | None = None,
    end_choices: bool | None = None,
) -> list[QuestionScores]:
    """The log-probability of every choice of every question.

        log p(c | x) = sum_j log p(c_j | x, c_<j)

    with x the tokens of `prompt` and c the tokens of `separator + choice`. The two are tokenised apart and joined as
    ids, so where the prompt ends does not depend on the choice, and no token spans both. A tokenizer whose pieces carry
    a leading space (byte-level BPE) wants `separator=" "`, or choices that begin with one; a separator that is to be
    read and not predicted goes to the end of the prompts instead.

    A causal model reads x and then c. An encoder-decoder model (`config.is_encoder_decoder`) reads x in the encoder and
    c as the decoder's labels. Torch modules get batches padded on the right with an attention mask, sorted by length; a
    `LanguageModel`, which takes no mask, gets batches of equal lengths. Neither batch size nor order changes a score
    by more than rounding. Log-probabilities are taken in float32 or better, sums in float64.

    A model whose attribute `accepts_routing_mask` is True also gets `routing_mask`, routing_mask_BT of the shape of the
    prompt's ids: True on the tokens of the prompt, False on choice and padding. Who routes whole sequences then decides
    by the prompt alone, and does the same for all choices of a question.

    A prompt that is too long loses its beginning, and as much of it for each choice of a question, so that all are
    judged after the same text. Choices are never cut.

    The model is put in evaluation mode, run without gradient, and every module's mode is put back afterwards.

    Args:
        model: a Hugging Face causal or encoder-decoder language model (bare, or wrapped by accelerate), or a
            `LanguageModel`.
        tokenizer: the model's own.
        questions: what to ask.
        batch_size: choices per forward pass.
        max_length: tokens of a prompt and its longest choice together; for an encoder-decoder, of each by itself.
        device: where the model lives.
        separator: put before every choice, tokenised and scored with it.
        start_token: an id put before every prompt (a beginning-of-sequence token), for models that were trained with
            one; it survives truncation and lets a prompt be empty.
        end_choices: whether the end-of-document token follows every choice and is scored as one of its tokens (and
            follows the prompt in an encoder); None: for encoder-decoder models, which are trained so.
    Returns:
        one entry per question, in their order.
    Raises:
        ConfigError: `batch_size` or `max_length` is below 1, an id lies outside the model's vocabulary, or the model
            returns logits for other positions than it was given.
        DataError: there is no question, a prompt or choice has no tokens, or a choice leaves no room for the prompt.
        NumericsError: a log-probability is not a number.
    """
    for name, value in (("batch_size", batch_size), ("max_length", max_length)):
        if value < 1:
            raise ConfigError(f"{name} is {value}; it must be at least 1")
    if not questions:
        raise DataError("there is no question to score")
    encoder = is_encoder_decoder(model)
    layout = _Layout(
        separator=separator,
        start=() if start_token is None else (start_token,),
        end=(tokenizer.eos_id,) if (encoder if end_choices is None else end_choices) else (),
        max_length=max_length,
        encoder=encoder,
    )
    asked = _tokenise(tokenizer, questions, layout)
    _check_vocabulary(model, asked)

    places = [(question, number) for question, one in enumerate(asked) for number in range(len(one.choices))]
    rows = [Prompted(asked[question].prompt_P, asked[question].choices[number]) for question, number in places]
    sums = [np.zeros(len(one.choices), dtype=np.float64) for one in asked]
    equal = isinstance(model, LanguageModel)
    with evaluation_mode(model), torch.inference_mode():
        for batch_B in batches_by_length(rows, batch_size, encoder=encoder, equal_lengths=equal):
            follow_load()
            inputs = prompted_inputs([rows[index] for index in batch_B], encoder=encoder)
            logp_N = token_log_probs(model, inputs, torch.device(device)).double().cpu().numpy()
            logp_B = np.bincount(inputs.row_N, weights=logp_N, minlength=len(batch_B))
            for index, logp in zip(batch_B, logp_B, strict=True):
                question, number = places[index]
                sums[question][number] = logp
    for index, sum_C in enumerate(sums):
        if np.isnan(sum_C).any():
            raise NumericsError(
                f"{_called(questions[index], index)}: the log-probability of choice {int(np.isnan(sum_C).argmax())} is "
                "not a number; the model's weights or its log-probabilities hold NaN"
            )
    return [
        QuestionScores(
            log_probs=tuple(sum_C.tolist()),
            tokens=tuple(len(choice_C) for choice_C in one.choices),
            bytes=tuple(len((separator + choice).encode("utf-8")) for choice in question.choices),
            truncated=one.truncated,
        )
        for question, one, sum_C in zip(questions, asked, sums, strict=True)
    ]


def choice_result(questions: Sequence[ChoiceQuestion], scores: Sequence[QuestionScores]) -> ChoiceResult:
    """Sum the scores of some questions up.

    Args:
        questions: what was asked.
        scores: of each question, as `choice_scores` gave them.
    Raises:
        DataError: there is no question, or the scores are of other questions.
    """
    if not questions:
        raise DataError("there is no question to score")
    if [len(question.choices) for question in questions] != [len(score.log_probs) for score in scores]:
        raise DataError(
            f"the scores of {len(scores)} questions do not fit {len(questions)} questions choice by choice; give both "
            "in the order in which they were scored"
        )
    pairs = list(zip(questions, scores, strict=True))
    ones_N = np.ones(len(pairs), dtype=np.int64)
    correct_N = np.array([score.prediction == question.answer for question, score in pairs])
    accuracy, accuracy_se = ratio_and_error(correct_N.astype(np.float64), ones_N)
    answer, answer_se = ratio_and_error(np.array([score.per_token[asked.answer] for asked, score in pairs]), ones_N)
    return ChoiceResult(
        accuracy=accuracy,
        accuracy_se=accuracy_se,
        accuracy_sum=sum(_best(score.log_probs) == question.answer for question, score in pairs) / len(pairs),
        accuracy_per_byte=sum(_best(score.per_byte) == question.answer for question, score in pairs) / len(pairs),
        answer_log_prob=answer,
        answer_log_prob_se=answer_se,
        chance=math.fsum(1.0 / len(question.choices) for question in questions) / len(pairs),
        questions=len(pairs),
        truncated_prompts=sum(score.truncated for score in scores),
        fingerprint=_fingerprint(questions),
        correct=tuple(correct_N.tolist()),
    )


# ------------------------------------------------------------------------------------------------------------- reading


def _question(record: Mapping[str, Any]) -> ChoiceQuestion:
    for name in ("prompt", "choices", "answer"):
        if record.get(name) is None:
            known = ", ".join(map(str, list(record)[:10])) or "none"
            raise DataError(f"field {name!r} is missing; fields: {known}")
    for name in ("prompt", "name"):
        if not isinstance(record.get(name, ""), str | None):
            raise DataError(f"field {name!r} holds {record[name]!r:.60}; it must be text")
    choices, answer = record["choices"], record["answer"]
    if not isinstance(choices, list):
        raise DataError(f"field 'choices' holds {choices!r:.60}; it must be a list of texts")
    for index, choice in enumerate(choices):
        if not isinstance(choice, str):
            raise DataError(f"choices[{index}] is {choice!r:.60}; every choice must be text (in quotes)")
    if isinstance(answer, str):
        if choices and answer not in choices:
            raise DataError(f"answer {answer!r:.60} is none of the choices{did_you_mean(answer, choices)}")
        answer = choices.index(answer) if choices else 0
    elif not isinstance(answer, int) or isinstance(answer, bool):
        raise DataError(f"answer is {answer!r:.60}; it must be the index of a choice or the choice's own text")
    return ChoiceQuestion(record["prompt"], tuple(choices), answer, record.get("name"))


def _fingerprint(questions: Sequence[ChoiceQuestion]) -> str:
    content = [[question.prompt, question.choices, question.answer] for question in questions]
    return hashlib.blake2b(json.dumps(content).encode("ascii"), digest_size=16).hexdigest()


def _called(question: ChoiceQuestion, index: int) -> str:
    return f"question {index}" if question.name is None else f"question {index} ({question.name})"


def _best(scores: Sequence[float]) -> int:
    return int(np.argmax(np.asarray(scores, dtype=np.float64)))


# -------------------------------------------------------------------------------------------------------------- tokens


@dataclass(frozen=True)
class _Layout:
    """How ids are put together."""

    separator: str
    start: tuple[int, ...]
    end: tuple[int, ...]
    max_length: int
    encoder: bool


@dataclass(frozen=True)
class _Asked:
    """One question in ids."""

    prompt_P: NDArray[np.int64]
    choices: list[NDArray[np.int64]]
    truncated: bool


def _tokenise(tokenizer: Tokenizer, questions: Sequence[ChoiceQuestion], layout: _Layout) -> list[_Asked]:
    prompts = tokenizer.encode_batch([question.prompt for question in questions])
    choices = iter(
        tokenizer.encode_batch([layout.separator + choice for question in questions for choice in question.choices])
    )
    result = []
    for index, (question, prompt_P) in enumerate(zip(questions, prompts, strict=True)):
        own = [next(choices) for _ in question.choices]
        for number, choice_C in enumerate(own):
            if not len(choice_C):
                raise DataError(
                    f"{_called(question, index)}: choice {number}, {question.choices[number]!r:.60}, has no tokens; "
                    "the tokenizer drops all of it"
                )
        ended = [_joined(choice_C, layout.end) for choice_C in own]
        try:
            prompt, truncated = _prompt(prompt_P, max(map(len, ended)), layout)
        except DataError as error:
            raise DataError(f"{_called(question, index)}: {error}") from None
        result.append(_Asked(prompt, ended, truncated))
    return result


def _prompt(text_P: NDArray[Any], longest: int, layout: _Layout) -> tuple[NDArray[np.int64], bool]:
    """A prompt's ids, its text cut from the left to fit, and whether it was cut."""
    end = layout.end if layout.encoder else ()
    fixed = len(layout.start) + len(end)
    if not len(text_P) and not fixed:
        raise DataError(
            "the prompt has no tokens and nothing to predict the choice from; give it text or a start_token"
        )
    room = layout.max_length - (0 if layout.encoder else longest)
    if room < fixed + min(1, len(text_P)) or longest > layout.max_length:
        whole = len(text_P) + fixed
        raise DataError(
            f"max_length {layout.max_length} leaves no room: the longest choice takes {longest} tokens, and a choice "
            f"is never cut; {max(whole, longest) if layout.encoder else whole + longest} keeps all of the prompt too"
        )
    kept = text_P[max(0, len(text_P) - (room - fixed)) :]
    return np.concatenate([np.array(layout.start, np.int64), _joined(kept, end)]), len(kept) < len(text_P)


def _joined(ids_N: NDArray[Any], end: tuple[int, ...]) -> NDArray[np.int64]:
    return np.concatenate([ids_N.astype(np.int64), np.array(end, np.int64)])


# --------------------------------------------------------------------------------------------------------------- model


def _check_vocabulary(model: nn.Module | LanguageModel, asked: list[_Asked]) -> None:
    """Raise before the model reads an id it has no embedding for, which a GPU reports without saying what is wrong."""
    size = model.vocab_size if isinstance(model, LanguageModel) else attribute(attribute(model, "config"), "vocab_size")
    every_N = np.concatenate([ids for one in asked for ids in (one.prompt_P, *one.choices)])
    wrong_N = every_N[(every_N < 0) | (every_N >= size)] if isinstance(size, int) else every_N[every_N < 0]
    if len(wrong_N):
        raise ConfigError(
            f"the questions hold token id {wrong_N[0]}, and the model knows ids from 0"
            f"{f' to {size - 1}' if isinstance(size, int) else ''}; use the tokenizer that the model was trained with, "
            "and a start_token out of it"
        )
