"""Prompts and their targets as decoder-only and as encoder-decoder models read them.

A causal model reads the prompt and then the target; an encoder-decoder model reads the prompt in its encoder and the
target as its decoder's labels. Batches are padded on the right, under an attention mask. Only the target's tokens are
predicted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from weftlm.corpora.examples import Examples
from weftlm.errors import ConfigError

IGNORED = -100
"""The label that Hugging Face losses ignore."""


class Prompted(NamedTuple):
    """A prompt and its target, in ids as the model reads them: with start and end tokens, and short enough.

    Attributes:
        prompt_P: Ids that are read and not predicted, int64, not empty.
        target_C: Ids that are predicted, int64, not empty.
    """

    prompt_P: NDArray[np.int64]
    target_C: NDArray[np.int64]


def kept(prompts: Any, targets: Any, *, length: int, encoder: bool) -> tuple[Any, Any]:
    """Tokens of prompts and of targets that a model takes, with start and end, of their numbers without.

    For an encoder-decoder prompt and target may each have `length` tokens. For a causal model they have `length` tokens
    together, and where these do not suffice neither gets more than half while the other needs it.

    Args:
        prompts: Tokens of each prompt: a number or an array.
        targets: Tokens of each target.
        length: T, at least 2.
        encoder: Whether the model has an encoder for the prompt.
    """
    targets = targets + 1
    if encoder:
        return np.minimum(prompts, length - 1) + 1, np.minimum(targets, length)
    prompts = np.maximum(prompts, 1)
    targets = np.minimum(targets, np.maximum(length - prompts, length - length // 2))
    return np.minimum(prompts, length - targets), targets


def fitted(prompt_P: NDArray[Any], target_C: NDArray[Any], *, eos_id: int, length: int, encoder: bool) -> Prompted:
    """End an example with the end-of-document token `eos_id` and cut it to a length, as `kept` says.

    For an encoder-decoder the token ends the prompt too. A prompt loses its beginning, a target its end. An empty
    prompt becomes the end-of-document token, after which a causal model begins.
    """
    prompt, target = kept(len(prompt_P), len(target_C), length=length, encoder=encoder)
    end = np.array([eos_id], dtype=np.int64)
    whole_P = np.concatenate([prompt_P, end] if encoder or not len(prompt_P) else [prompt_P]).astype(np.int64)
    return Prompted(whole_P[len(whole_P) - prompt :], np.concatenate([target_C, end]).astype(np.int64)[:target])


class PromptedExamples:
    """The examples of a source as a model reads them, cut by `fitted`.

    Args:
        examples: The whole ones.
        length: T, the largest number of tokens.
        encoder: Whether the model has an encoder for the prompt.
    Attributes:
        prompts_N: Tokens of each prompt that are read.
        targets_N: Tokens predicted of each example: those of its target that are kept, and its end.
    """

    prompts_N: NDArray[np.int64]
    targets_N: NDArray[np.int64]

    def __init__(self, examples: Examples, length: int, encoder: bool) -> None:
        self.examples, self.length, self.encoder = examples, length, encoder
        self.prompts_N, self.targets_N = kept(examples.prompts_N, examples.targets_N, length=length, encoder=encoder)

    def __len__(self) -> int:
        return len(self.examples)

    def rows(self, indices_B: Sequence[int] | NDArray[Any]) -> list[Prompted]:
        """Some examples in ids, in the order asked for."""
        return [
            fitted(*example, eos_id=self.examples.eos_id, length=self.length, encoder=self.encoder)
            for example in self.examples.read(indices_B)
        ]

    @property
    def bytes_N(self) -> NDArray[np.float64]:
        """UTF-8 bytes of each target behind the tokens predicted: of a cut one, as large a part as is kept of it."""
        share_N = self.targets_N / (self.examples.targets_N + 1)
        return np.asarray(self.examples.target_bytes_N * share_N, dtype=np.float64)

    def evenly(self, max_tokens: int | None) -> NDArray[np.int64]:
        """Indices of evenly spaced examples with about so many target tokens, at least one; None for all.

        The same ones at every evaluation and on every machine.
        """
        count, tokens = len(self), int(self.targets_N.sum())
        take = count if max_tokens is None else min(count, max(1, max_tokens * count // tokens))
        return (2 * np.arange(take, dtype=np.int64) + 1) * count // (2 * take)


def is_encoder_decoder(model: object) -> bool:
    """Whether a model, bare or wrapped, has an encoder of its own for the prompt."""
    return getattr(attribute(model, "config"), "is_encoder_decoder", False) is True


def attribute(model: object, name: str) -> Any:
    """An attribute of a model, or of the model inside a wrapper that has it as `module`; None where neither has it."""
    value = getattr(model, name, None)
    return value if value is not None else getattr(getattr(model, "module", None), name, None)


def batches_by_length(rows: Sequence[Prompted], batch_size: int, *, encoder: bool) -> Iterator[list[int]]:
    """Indices of rows of about one length, the longest first, so that what does not fit in memory fails at once.

    Args:
        rows: Prompts with their targets.
        batch_size: Maximum number of rows in a batch.
        encoder: Whether prompts and targets are read apart.
    """

    def length(index: int) -> tuple[int, int]:
        prompt, target = len(rows[index].prompt_P), len(rows[index].target_C)
        return (prompt, target) if encoder else (prompt + target, 0)

    order = sorted(range(len(rows)), key=length, reverse=True)
    for first in range(0, len(order), batch_size):
        yield order[first : first + batch_size]


@dataclass(frozen=True)
class PromptedInputs:
    """The inputs of one forward pass, padded on the right.

    Attributes:
        tokens_BT: Ids of prompt and target (causal) or of the prompt (encoder-decoder).
        mask_BT: True for tokens, False for padding.
        prompt_mask_BT: True for tokens of the prompt.
        labels_BX: Id that is predicted at each position of the model's scores, `IGNORED` for none; X is T for a causal
            model, and the targets' length for an encoder-decoder.
        encoder: Whether the model has an encoder for the prompt, and takes the labels as an argument.
    """

    tokens_BT: Tensor
    mask_BT: Tensor
    prompt_mask_BT: Tensor
    labels_BX: Tensor
    encoder: bool


def prompted_inputs(batch: Sequence[Prompted], *, encoder: bool) -> PromptedInputs:
    """Pad a batch. A causal model reads all of a row but its last token, which is predicted and never read."""
    if encoder:
        tokens, labels = [row.prompt_P for row in batch], [row.target_C for row in batch]
    else:
        tokens = [np.concatenate([row.prompt_P, row.target_C[:-1]]) for row in batch]
        labels = [np.concatenate([np.full(len(row.prompt_P) - 1, IGNORED), row.target_C]) for row in batch]
    return PromptedInputs(
        tokens_BT=_padded(tokens, 0),
        mask_BT=_padded([np.ones(len(each), dtype=np.bool_) for each in tokens], 0),
        prompt_mask_BT=_padded(
            [np.arange(len(each)) < len(row.prompt_P) for each, row in zip(tokens, batch, strict=True)], 0
        ),
        labels_BX=_padded(labels, IGNORED),
        encoder=encoder,
    )


def _padded(rows: Sequence[NDArray[Any]], padding: int) -> Tensor:
    return pad_sequence([torch.from_numpy(row) for row in rows], batch_first=True, padding_value=padding)


def model_arguments(model: object, inputs: PromptedInputs, device: torch.device) -> dict[str, Any]:
    """A Hugging Face model's arguments, on its device; with `routing_mask` for a model that accepts one."""
    given = {"input_ids": inputs.tokens_BT.to(device), "attention_mask": inputs.mask_BT.to(device).long()}
    if inputs.encoder:
        given["labels"] = inputs.labels_BX.to(device)
    if attribute(model, "accepts_routing_mask") is True:
        given["routing_mask"] = inputs.prompt_mask_BT.to(device)
    return {**given, "use_cache": False}


def target_nats(model: nn.Module, batch: Sequence[Prompted], device: torch.device, *, encoder: bool) -> Tensor:
    """The loss of each row, summed over its target's tokens.

        nats[b] = -sum_j log p(target[b, j] | prompt[b], target[b, :j])

    Args:
        model: Hugging Face model, bare or wrapped.
        batch: Prompts with their targets.
        device: Device of the model.
        encoder: Whether the model has an encoder for the prompt.
    Returns:
        nats_B: float32 or better, with its gradient where one is recorded; neither padding nor the other rows change
            them by more than rounding.
    Raises:
        ConfigError: the model returns scores for other positions than it was given.
    """
    inputs = prompted_inputs(batch, encoder=encoder)
    labels_BX = inputs.labels_BX.to(device)
    known_BX = labels_BX != IGNORED
    scores_BXV: Tensor = model(**model_arguments(model, inputs, device)).logits
    if scores_BXV.shape[:2] != known_BX.shape:
        raise ConfigError(
            f"the model returned scores of shape {tuple(scores_BXV.shape)} for {known_BX.shape[0]} sequences of "
            f"{known_BX.shape[1]} positions; it must return one row over the vocabulary for each position it is given"
        )
    scores_NV = scores_BXV[known_BX]
    if scores_NV.dtype in (torch.float16, torch.bfloat16):
        scores_NV = scores_NV.float()
    nats_N = F.cross_entropy(scores_NV, labels_BX[known_BX], reduction="none")
    return torch.zeros(known_BX.shape, dtype=nats_N.dtype, device=device).masked_scatter(known_BX, nats_N).sum(dim=1)
