"""Score a model on questions with listed answers: every answer is ranked by its likelihood after the prompt.

This is how multiple-choice sets are read without generating text (Sanh et al. 2022, arXiv:2110.08207; Muqeeth et al.
2024, arXiv:2402.05859): log p(choice | prompt) divided by the choice's tokens, and the highest is the prediction.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from weftlm.corpora.formats import Reason, is_unicode, read_file, split_suffix
from weftlm.corpora.tokens import Tokenizer
from weftlm.errors import ConfigError, DataError, NumericsError, did_you_mean
from weftlm.evaluation.config import ChoiceTask
from weftlm.evaluation.perplexity import check_sizes, prompted_nats
from weftlm.evaluation.result import finite_or_none, ratio_and_error
from weftlm.models.prompted import Prompted, attribute, is_encoder_decoder


@dataclass(frozen=True)
class ChoiceQuestion:
    """A prompt and its possible continuations, of which one is right.

    Attributes:
        prompt: Text before the answer.
        choices: Two or more different texts, none empty.
        answer: Index of the right one.
    Raises:
        DataError: fewer than two choices, an empty or repeated one, an answer out of range, or text that UTF-8 cannot
            hold.
    """

    prompt: str
    choices: tuple[str, ...]
    answer: int

    def __post_init__(self) -> None:
        if len(self.choices) < 2 or not all(self.choices) or len(set(self.choices)) < len(self.choices):
            raise DataError(f"choices are {list(self.choices)!r:.120}; give two or more, all different and none empty")
        if not 0 <= self.answer < len(self.choices):
            raise DataError(
                f"answer is {self.answer}; {len(self.choices)} choices have indices 0 to {len(self.choices) - 1}"
            )
        for text in (self.prompt, *self.choices):
            if not is_unicode(text):
                raise DataError(f"{text!r:.60} holds half a surrogate pair, which UTF-8 cannot hold")


class QuestionScores(NamedTuple):
    """The likelihood of every choice of one question.

    Attributes:
        log_probs: log p(choice | prompt) of each choice, summed over its tokens, nats, float64.
        tokens: Tokens of each choice.
    """

    log_probs: NDArray[np.float64]
    tokens: NDArray[np.int64]


@dataclass(frozen=True)
class ChoiceResult:
    """How well a model ranks the right answers.

    Standard errors treat questions as independent draws; they say nothing of the spread over seeds or prompt wordings.

    Attributes:
        accuracy: Share of questions whose right choice has the highest log-probability per token.
        accuracy_se: Its standard error over questions; NaN with a single question.
        accuracy_sum: The same with the log-probability summed over the choice, not normalised: favours short choices.
        chance: Mean over questions of 1 / choices: the accuracy of guessing.
        questions: Questions scored.
    """

    accuracy: float
    accuracy_se: float
    accuracy_sum: float
    chance: float
    questions: int

    def to_json(self) -> dict[str, Any]:
        """The numbers under their own names; what is not finite becomes None."""
        return {
            name: finite_or_none(value) if isinstance(value, float) else value for name, value in vars(self).items()
        }


def read_choices(path: str | Path) -> list[ChoiceQuestion]:
    """Questions out of a JSON Lines file, plain, `.gz` or `.zst`.

    Every line is an object with `prompt` (text), `choices` (a list of texts) and `answer`: a whole number is the index
    of the right choice, counted from 0; a text is the right choice itself. Other fields are not read, and
    blank lines are allowed.

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


def _question(record: Mapping[str, Any]) -> ChoiceQuestion:
    prompt, choices, answer = (record.get(key) for key in ("prompt", "choices", "answer"))
    listed = isinstance(choices, list) and all(isinstance(choice, str) for choice in choices)
    for key, kind, sound in (
        ("prompt", "text", isinstance(prompt, str)),
        ("choices", "a list of texts (in quotes)", listed),
        ("answer", "the index of a choice or its text", isinstance(answer, int | str) and not isinstance(answer, bool)),
    ):
        if not sound:
            came = f"holds {record[key]!r:.60}" if record.get(key) is not None else "is missing"
            raise DataError(f"field {key!r} {came}; it must be {kind}")
    assert isinstance(choices, list)
    if isinstance(answer, str):
        if answer not in choices:
            raise DataError(f"answer {answer!r:.60} is none of the choices{did_you_mean(answer, choices)}")
        answer = choices.index(answer)
    return ChoiceQuestion(str(prompt), tuple(choices), int(answer))  # type: ignore[arg-type]


def score_choices(
    model: nn.Module, tokenizer: Tokenizer, questions: Sequence[ChoiceQuestion], **how: Any
) -> ChoiceResult:
    """Rank every question's choices by `choice_scores`, with its arguments, and sum the ranking up."""
    scores = choice_scores(model, tokenizer, questions, **how)
    answers = [question.answer for question in questions]
    summed = np.equal([np.argmax(one.log_probs) for one in scores], answers).astype(np.float64)
    per_token = np.equal([np.argmax(np.divide(*one)) for one in scores], answers).astype(np.float64)
    accuracy, error = ratio_and_error(per_token, np.ones(len(answers), dtype=np.int64))
    chance = math.fsum(1.0 / len(question.choices) for question in questions) / len(answers)
    return ChoiceResult(accuracy, error, float(summed.mean()), chance, len(answers))


def choice_scores(
    model: nn.Module,
    tokenizer: Tokenizer,
    questions: Sequence[ChoiceQuestion],
    *,
    batch_size: int,
    max_length: int,
    device: torch.device | str = "cpu",
    separator: str = "",
) -> list[QuestionScores]:
    """The log-probability of every choice of every question.

        log p(c | x) = sum_j log p(c_j | x, c_<j)

    with x the tokens of `prompt` and c the tokens of `separator + choice`. The two are tokenised apart and joined as
    ids, so where the prompt ends does not depend on the choice, and no token spans both. A tokenizer whose pieces carry
    a leading space (byte-level BPE) wants `separator=" "`, or choices that begin with one; a separator that is to be
    read and not predicted goes to the end of the prompts instead.

    A causal model reads x and then c. An encoder-decoder model (`config.is_encoder_decoder`) reads x in the encoder and
    c as the decoder's labels, both ended by the end-of-document token, as in training. Neither batch size nor order
    changes a score by more than rounding (`prompted_nats`).

    A prompt that is too long loses its beginning, and as much of it for each choice of a question, so that all are
    judged after the same text. Choices are never cut.

    Args:
        model: A Hugging Face causal or encoder-decoder language model (bare, or wrapped by accelerate).
        tokenizer: The model's own tokenizer.
        questions: What to ask.
        batch_size: Choices per forward pass.
        max_length: Tokens of a prompt and its longest choice together; for an encoder-decoder, of each by itself.
        device: Device of the model.
        separator: Text before every choice, tokenised and scored with it.
    Returns:
        one entry per question, in their order.
    Raises:
        ConfigError: `batch_size` or `max_length` is below 1, an id is outside the model's vocabulary, or the model
            returns logits for other positions than it was given.
        DataError: there is no question, a prompt or choice has no tokens, or a choice leaves no room for the prompt.
        NumericsError: a log-probability is not a number.
    """
    check_sizes(1, batch_size=batch_size, max_length=max_length)
    if not questions:
        raise DataError("there is no question to score")
    encoder = is_encoder_decoder(model)
    end = np.array([tokenizer.eos_id] if encoder else [], dtype=np.int64)
    prompts = tokenizer.encode_batch([question.prompt for question in questions])
    choices = iter(
        tokenizer.encode_batch([separator + choice for question in questions for choice in question.choices])
    )
    rows: list[Prompted] = []
    for place, (question, prompt_P) in enumerate(zip(questions, prompts, strict=True)):
        own = [next(choices) for _ in question.choices]
        if not all(map(len, own)) or not len(prompt_P) + len(end):
            raise DataError(f"question {place}: the prompt or a choice has no tokens; the tokenizer drops all of it")
        longest = max(map(len, own)) + len(end)
        room = max_length - (len(end) if encoder else longest)
        if room < min(1, len(prompt_P)) or longest > max_length:
            raise DataError(
                f"question {place}: max_length {max_length} leaves no room for the prompt: the longest choice takes "
                f"{longest} tokens, and a choice is never cut; {longest + len(prompt_P)} keeps all"
            )
        kept_P = np.concatenate([prompt_P[max(0, len(prompt_P) - room) :].astype(np.int64), end])
        rows += [Prompted(kept_P, np.concatenate([choice_C.astype(np.int64), end])) for choice_C in own]
    size = attribute(attribute(model, "config"), "vocab_size")
    largest = max(int(ids.max()) for row in rows for ids in row)
    if isinstance(size, int) and largest >= size:  # a GPU would report it without saying what is wrong
        raise ConfigError(
            f"the questions hold token id {largest}, and the model knows ids from 0 to {size - 1}; use the tokenizer "
            "that the model was trained with"
        )
    nats_N = prompted_nats(model, rows, batch_size, "choices", device=device)
    tokens_N = np.array([len(row.target_C) for row in rows])
    ends = np.cumsum([len(question.choices) for question in questions])[:-1]
    return [QuestionScores(*one) for one in zip(np.split(-nats_N, ends), np.split(tokens_N, ends), strict=True)]


Questions = Mapping[str, tuple[ChoiceTask, Sequence[ChoiceQuestion]]]
"""The questions of each task, by its name."""


def read_tasks(tasks: Sequence[ChoiceTask]) -> Questions:
    """The questions of every task, in order; of a glob in order of path.

    Raises:
        ConfigError: two tasks would have one name.
        DataError: a path matches no file, or as `read_choices`.
    """
    found: dict[str, tuple[ChoiceTask, Sequence[ChoiceQuestion]]] = {}
    for task in tasks:
        paths = task.files()
        single = paths == [Path(task.path).expanduser()]
        for path in paths:
            own = path.name.removesuffix("".join(split_suffix(path)))
            name = own if task.name is None else task.name if single else f"{task.name}/{own}"
            if name in found:
                raise ConfigError(f"evaluation.tasks: two tasks would be called {name!r}; give each a name")
            questions = read_choices(path)
            count = len(questions)
            most = min(count, task.max_questions or count)
            found[name] = (task, [questions[(2 * place + 1) * count // (2 * most)] for place in range(most)])
    return found


def score_tasks(model: nn.Module, tokenizer: Tokenizer, questions: Questions, **how: Any) -> dict[str, ChoiceResult]:
    """`score_choices` of each task, with its arguments but the separator; an error names the task."""
    found = {}
    for name, (task, asked) in questions.items():
        try:
            found[name] = score_choices(model, tokenizer, asked, separator=task.separator, **how)
        except (ConfigError, DataError, NumericsError) as error:
            raise type(error)(f"task {name!r}: {error}") from error
    return found


def mean_accuracy(results: Mapping[str, ChoiceResult]) -> tuple[float, float]:
    """The plain mean of some tasks' accuracies and its standard error, tasks taken as independent of each other."""
    mean = math.fsum(each.accuracy for each in results.values()) / len(results)
    return mean, math.hypot(*(each.accuracy_se for each in results.values())) / len(results)
