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
from numpy.typing import NDArray
from torch import Tensor, nn

from weftlm.corpora.examples import Examples
from weftlm.errors import ConfigError
from weftlm.models.language_model import LanguageModel

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


def fitted(prompt_P: NDArray[Any], target_C: NDArray[Any], *, eos_id: int, length: int, encoder: bool) -> Prompted:
    """End an example with the end-of-document token and cut it to a length.

    For an encoder-decoder the token ends the prompt too, and prompt and target may each have `length` tokens. For a
    causal model they have `length` tokens together, and where these do not suffice neither gets more than half while
    the other needs it. A prompt loses its beginning, a target its end. An empty prompt becomes the end-of-document
    token, after which a causal model begins.

    Args:
        prompt_P: Ids of the prompt.
        target_C: Ids of the target.
        eos_id: End-of-document token.
        length: T, at least 2.
        encoder: Whether the model has an encoder for the prompt.
    """
    end = np.array([eos_id], dtype=np.int64)
    whole_C = np.concatenate([target_C.astype(np.int64), end])
    if encoder:
        kept_P = prompt_P[max(0, len(prompt_P) - (length - 1)) :].astype(np.int64)
        return Prompted(np.concatenate([kept_P, end]), whole_C[:length])
    whole_P = prompt_P.astype(np.int64) if len(prompt_P) else end
    target = min(len(whole_C), max(length - len(whole_P), length - length // 2))
    return Prompted(whole_P[max(0, len(whole_P) - (length - target)) :], whole_C[:target])


@dataclass(frozen=True, eq=False)
class PromptedExamples:
    """The examples of a source as a model reads them, cut by `fitted`.

    Attributes:
        examples: The whole ones.
        length: T, the largest number of tokens.
        encoder: Whether the model has an encoder for the prompt.
    """

    examples: Examples
    length: int
    encoder: bool

    def __len__(self) -> int:
        return len(self.examples)

    def rows(self, indices_B: Sequence[int] | NDArray[Any]) -> list[Prompted]:
        """Some examples in ids, in the order asked for."""
        return [
            fitted(*example, eos_id=self.examples.eos_id, length=self.length, encoder=self.encoder)
            for example in self.examples.read(indices_B)
        ]

    @property
    def targets_N(self) -> NDArray[np.int64]:
        """Tokens predicted of each example: those of its target that are kept, and its end."""
        whole_N = self.examples.targets_N + 1
        if self.encoder:
            return np.minimum(whole_N, self.length)
        prompts_N = np.maximum(self.examples.prompts_N, 1)
        kept_N: NDArray[np.int64] = np.minimum(
            whole_N, np.maximum(self.length - prompts_N, self.length - self.length // 2)
        )
        return kept_N

    @property
    def prompts_N(self) -> NDArray[np.int64]:
        """Tokens of each prompt that are read."""
        if self.encoder:
            return np.minimum(self.examples.prompts_N, self.length - 1) + 1
        return np.minimum(np.maximum(self.examples.prompts_N, 1), self.length - self.targets_N)

    @property
    def bytes_N(self) -> NDArray[np.float64]:
        """UTF-8 bytes of each target behind the tokens predicted: of a cut one, as large a part as is kept of it."""
        share_N = self.targets_N / (self.examples.targets_N + 1)
        bytes_N: NDArray[np.float64] = self.examples.target_bytes_N * share_N
        return bytes_N

    def evenly(self, max_tokens: int | None) -> NDArray[np.int64]:
        """Indices of evenly spaced examples with about so many target tokens, at least one; None for all.

        The same ones at every evaluation and on every machine.
        """
        count, tokens = len(self), int(self.targets_N.sum())
        take = count if max_tokens is None else min(count, max(1, max_tokens * count // tokens))
        return (2 * np.arange(take, dtype=np.int64) + 1) * count // (2 * take)


def is_encoder_decoder(model: object) -> bool:
    """Whether a model, bare or wrapped, has an encoder of its own for the prompt."""
    if isinstance(model, LanguageModel):
        return False
    return getattr(attribute(model, "config"), "is_encoder_decoder", False) is True


def attribute(model: object, name: str) -> Any:
    """An attribute of a model, or of the model inside a wrapper that has it as `module`; None where neither has it."""
    value = getattr(model, name, None)
    return value if value is not None else getattr(getattr(model, "module", None), name, None)


def batches_by_length(
    rows: Sequence[Prompted], batch_size: int, *, encoder: bool, equal_lengths: bool = False
) -> Iterator[list[int]]:
    """Indices of rows of about one length, the longest first, so that what does not fit in memory fails at once.

    Args:
        rows: Prompts with their targets.
        batch_size: Maximum number of rows in a batch.
        encoder: Whether prompts and targets are read apart.
        equal_lengths: Whether all rows of a batch have one length, so that none is padded.
    """

    def length(index: int) -> tuple[int, int]:
        prompt, target = len(rows[index].prompt_P), len(rows[index].target_C)
        return (prompt, target) if encoder else (prompt + target, 0)

    batch: list[int] = []
    for index in sorted(range(len(rows)), key=length, reverse=True):
        if batch and (len(batch) == batch_size or (equal_lengths and length(index) != length(batch[0]))):
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


@dataclass(frozen=True)
class PromptedInputs:
    """The inputs of one forward pass, and the places of its predictions of the targets' N tokens.

    Attributes:
        tokens_BT: Ids of prompt and target (causal) or of the prompt (encoder-decoder), padded on the right.
        mask_BT: True for tokens, False for padding.
        prompt_mask_BT: True for tokens of the prompt.
        labels_BC: Labels of an encoder-decoder; None for a causal model.
        row_N, position_N, target_N: Sequence, position and id of each token predicted.
    """

    tokens_BT: NDArray[np.int64]
    mask_BT: NDArray[np.bool_]
    prompt_mask_BT: NDArray[np.bool_]
    labels_BC: NDArray[np.int64] | None
    row_N: NDArray[np.int64]
    position_N: NDArray[np.int64]
    target_N: NDArray[np.int64]


def prompted_inputs(batch: Sequence[Prompted], *, encoder: bool) -> PromptedInputs:
    """Pad a batch. A causal model reads all of a row but its last token, which is predicted and never read."""
    labels_BC: NDArray[np.int64] | None = None
    if encoder:
        tokens_BT, mask_BT = _padded([row.prompt_P for row in batch], 0)
        prompt_mask_BT = mask_BT
        labels_BC = _padded([row.target_C for row in batch], IGNORED)[0]
        positions = [np.arange(len(row.target_C)) for row in batch]
    else:
        tokens_BT, mask_BT = _padded([np.concatenate([row.prompt_P, row.target_C[:-1]]) for row in batch], 0)
        prompt_mask_BT = np.arange(tokens_BT.shape[1]) < np.array([len(row.prompt_P) for row in batch])[:, None]
        positions = [len(row.prompt_P) - 1 + np.arange(len(row.target_C)) for row in batch]
    return PromptedInputs(
        tokens_BT=tokens_BT,
        mask_BT=mask_BT,
        prompt_mask_BT=prompt_mask_BT,
        labels_BC=labels_BC,
        row_N=np.repeat(np.arange(len(batch)), [len(row.target_C) for row in batch]),
        position_N=np.concatenate(positions),
        target_N=np.concatenate([row.target_C for row in batch]),
    )


def _padded(sequences: list[NDArray[np.int64]], padding: int) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Sequences as one array, padded on the right, and where it is not padding."""
    length_B = np.array([len(sequence) for sequence in sequences])
    mask_BT = np.arange(length_B.max()) < length_B[:, None]
    ids_BT = np.full(mask_BT.shape, padding, dtype=np.int64)
    ids_BT[mask_BT] = np.concatenate(sequences)
    return ids_BT, mask_BT


def model_arguments(model: object, inputs: PromptedInputs, device: torch.device) -> dict[str, Any]:
    """A Hugging Face model's arguments, on its device; with `routing_mask` for a model that accepts one."""
    given: dict[str, Any] = {
        "input_ids": torch.from_numpy(inputs.tokens_BT).to(device),
        "attention_mask": torch.from_numpy(inputs.mask_BT).to(device).long(),
        "use_cache": False,
    }
    if inputs.labels_BC is not None:
        given["labels"] = torch.from_numpy(inputs.labels_BC).to(device)
    return {**given, **_routing_mask(model, inputs, device)}


def _routing_mask(model: object, inputs: PromptedInputs, device: torch.device) -> dict[str, Tensor]:
    if attribute(model, "accepts_routing_mask") is not True:
        return {}
    return {"routing_mask": torch.from_numpy(inputs.prompt_mask_BT).to(device)}


def token_log_probs(model: nn.Module | LanguageModel, inputs: PromptedInputs, device: torch.device) -> Tensor:
    """The log-probability of every target token.

    Args:
        model: Hugging Face model of the kind the inputs were made for, or a `LanguageModel`.
        inputs: A batch.
        device: Device of the model.
    Returns:
        logp_N: nats, float32 or better, with its gradient where one is recorded.
    Raises:
        ConfigError: the model returns scores for other positions than it was given.
    """
    scores_BTV: Tensor
    if isinstance(model, LanguageModel):
        extra = _routing_mask(model, inputs, device)
        scores_BTV = model.log_probs(torch.from_numpy(inputs.tokens_BT).to(device), **extra)
    else:
        scores_BTV = model(**model_arguments(model, inputs, device)).logits
    expected = inputs.tokens_BT.shape if inputs.labels_BC is None else inputs.labels_BC.shape
    if scores_BTV.shape[:2] != expected:
        raise ConfigError(
            f"the model returned scores of shape {tuple(scores_BTV.shape)} for {expected[0]} sequences of "
            f"{expected[1]} positions; it must return one row over the vocabulary for each position it is given"
        )
    scores_NV = scores_BTV[torch.from_numpy(inputs.row_N).to(device), torch.from_numpy(inputs.position_N).to(device)]
    if scores_NV.dtype in (torch.float16, torch.bfloat16):
        scores_NV = scores_NV.float()
    logp_NV = scores_NV if isinstance(model, LanguageModel) else torch.log_softmax(scores_NV, dim=-1)
    return logp_NV.gather(-1, torch.from_numpy(inputs.target_N).to(device)[:, None]).squeeze(-1)


def target_nats(
    model: nn.Module | LanguageModel, batch: Sequence[Prompted], device: torch.device, *, encoder: bool
) -> Tensor:
    """The loss of each row, summed over its target's tokens.

        nats[b] = -sum_j log p(target[b, j] | prompt[b], target[b, :j])

    Returns:
        nats_B: float32 or better; neither padding nor the other rows change them by more than rounding.
    Raises:
        ConfigError: as `token_log_probs`.
    """
    logp_N = token_log_probs(model, prompted_inputs(batch, encoder=encoder), device)
    tokens_B = torch.tensor([len(row.target_C) for row in batch], device=device)
    there_BC = torch.arange(int(tokens_B.max()), device=device) < tokens_B[:, None]
    logp_BC = torch.zeros(there_BC.shape, dtype=logp_N.dtype, device=device).masked_scatter(there_BC, logp_N)
    return -logp_BC.sum(dim=1)
