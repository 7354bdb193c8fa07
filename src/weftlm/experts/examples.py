"""Experts of tasks: the training loop over whole examples of prompt and target, with a loss on targets alone.

Sampling, checkpoints and resuming are the ordinary loop's. To it an example is a sequence of its own number: the rows
it draws and shuffles only name examples, which are read, cut to length and padded here when their loss is taken.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from weftlm.corpora.examples import Examples, examples_of
from weftlm.corpora.source import Source
from weftlm.errors import ConfigError, DataError
from weftlm.mixture.loader import Batch
from weftlm.models.prompted import IGNORED, batches_by_length, is_encoder_decoder, prompted_inputs, target_nats
from weftlm.models.prompted_examples import PromptedExamples
from weftlm.training.config import AlignmentConfig, TrainingConfig
from weftlm.training.estimators.direction import sum_over_ranks
from weftlm.training.loop import Task, Trainer
from weftlm.training.runtime import Runtime


def domain_trainer(
    model: nn.Module, name: str, source: Source, config: TrainingConfig, *, runtime: Runtime, **options: Any
) -> Trainer:
    """A trainer of one domain: on its examples where the source holds any, else on windows of its tokens.

    Args:
        model: what is trained: a causal or encoder-decoder language model, with an adapter or gates.
        name: the domain's name.
        source: its training tokens. Examples come in an order shuffled anew in every epoch.
        config: a `training` section.
        runtime: device, precision and compilation.
        options: further arguments of `Trainer`.
    Raises:
        ConfigError: as `Trainer`, or the sequences are too short for a prompt and a target.
        DataError: there is no example.
    """
    examples, loss = examples_of(source), None
    if examples is not None:
        loss = ExampleLoss(prompted_examples(model, examples, config.sequence_length, name), runtime.device)
        source = ExampleNumbers(examples, config.sequence_length)
    return Trainer(
        model, Task.of_one(name, source), config, alignment=AlignmentConfig(), runtime=runtime, loss=loss, **options
    )


def training_source(source: Source, name: str, examples: bool | None) -> Source:
    """The source as an expert is to be trained on it.

    Args:
        source: a domain's tokens.
        name: of the domain, for messages.
        examples: True for whole examples, False for windows of text, None for what the source holds.
    Raises:
        ConfigError: examples are asked of plain text.
    """
    held = examples_of(source) is not None
    if examples and not held:
        raise ConfigError(
            f"experts.examples is true and the documents of {name!r} have no prompts; give its corpora a "
            f"prompt_field (data.corpora), or leave experts.examples out"
        )
    return _AsText(source) if held and examples is False else source


class _AsText:
    """A source whose prompts are not told of."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self.fingerprint = source.fingerprint
        self.bytes = int(getattr(source, "bytes", 0))

    def __len__(self) -> int:
        return len(self._source)

    def read(self, start: int, count: int) -> NDArray[np.int64]:
        return self._source.read(start, count)

    def read_many(self, starts_N: NDArray[np.int64], count: int) -> NDArray[np.int64]:
        return self._source.read_many(starts_N, count)


class ExampleNumbers:
    """Examples to a loop that reads windows: window i holds the number i and nothing else.

    Args:
        examples: what is numbered.
        length: T, tokens the loop takes a window for.
    """

    def __init__(self, examples: Examples, length: int) -> None:
        self._count, self._length = len(examples), length
        self.fingerprint = examples.fingerprint

    def __len__(self) -> int:
        return self._count * self._length + 1

    def read(self, start: int, count: int) -> NDArray[np.int64]:
        """See `Source.read`."""
        return np.arange(start, start + count, dtype=np.int64) // self._length

    def read_many(self, starts_N: NDArray[np.int64], count: int) -> NDArray[np.int64]:
        """See `Source.read_many`."""
        return np.repeat(starts_N[:, None] // self._length, count, axis=1)


class ExampleLoss:
    """The loss of whole examples, of decoder-only or encoder-decoder models: a `BatchLoss` over `ExampleNumbers`.

        loss = sum_b sum_j -log p(target[b, j] | prompt[b], target[b, :j]) / sum_b tokens[b]

    over the examples b of a step: the mean over its target tokens, however it is cut into micro-batches and shared by
    processes. An example is cut by `fitted` to `sequence_length` tokens. Token counts, in metrics and results, are
    those that are read and predicted, on an average over the examples; padding does not count.

    Args:
        prompted: what to train on.
        device: device of the model.
    """

    def __init__(self, prompted: PromptedExamples, device: torch.device) -> None:
        self.prompted, self._device = prompted, device
        self._targets_N = prompted.targets_N
        self.tokens_per_sequence = float((prompted.prompts_N + self._targets_N).mean())

    def prepare(self, batch: Batch) -> Batch:
        """Weigh every example by its target tokens; neighbours in the batch are of about one length, to pad little."""
        numbers_B = batch.tokens_BT1[:, 0].numpy()
        held = self.prompted.examples
        order_B = np.argsort(-(held.prompts_N + held.targets_N)[numbers_B], kind="stable")
        tokens_B = torch.from_numpy(self._targets_N[numbers_B[order_B]]).double()
        total = sum_over_ranks(tokens_B.sum().to(self._device, torch.float32))
        return replace(
            batch,
            tokens_BT1=batch.tokens_BT1[torch.from_numpy(order_B)],
            loss_weights_B=(tokens_B * (len(batch.draw) / float(total))).numpy(),
        )

    def __call__(self, model: nn.Module, tokens_BT1: Tensor) -> Tensor:
        """Mean loss of each example over its target tokens, (B, 1)."""
        rows = self.prompted.rows(tokens_BT1[:, 0].cpu().numpy())
        nats_B = target_nats(model, rows, tokens_BT1.device, encoder=self.prompted.encoder)
        return (nats_B / torch.tensor([len(row.target_C) for row in rows], device=tokens_BT1.device))[:, None]


def prompted_examples(model: nn.Module, examples: Examples, length: int, name: str) -> PromptedExamples:
    """A domain's examples as a model reads them.

    Raises:
        ConfigError: the length leaves no room for a prompt and a target.
        DataError: there is no example.
    """
    if length < 2:
        raise ConfigError(f"sequence_length is {length}; an example needs at least 2 tokens, one of them predicted")
    if len(examples) == 0:
        raise DataError(f"{name!r} holds no whole example; give it more text, or raise data.domains.max_train_tokens")
    return PromptedExamples(examples, length, is_encoder_decoder(model))


@dataclass(frozen=True)
class Reading:
    """One forward pass of those that statistics are collected from.

    Attributes:
        arguments: of the model.
        query_BT: ids that are embedded.
        query_mask_BT: where they are not padding; None: everywhere.
        masks: where the model's own tokens are not padding, of different shapes for encoder and decoder.
    """

    arguments: dict[str, Tensor]
    query_BT: Tensor
    query_mask_BT: Tensor | None = None
    masks: tuple[Tensor, ...] = ()


def example_readings(
    prompted: PromptedExamples, count: int, seed: int, batch_sequences: int
) -> tuple[list[Reading], list[Tensor]]:
    """Up to `count` examples, drawn by the seed, in batches of about one length.

    Returns:
        the batches, and the texts whose tokens are counted: of each example its prompt and target, for an
        encoder-decoder apart.
    """
    drawn_N = np.random.default_rng(seed).choice(
        len(prompted), size=min(count, len(prompted)), replace=False, shuffle=False
    )
    rows = prompted.rows(np.sort(drawn_N))
    texts = [np.concatenate(row) for row in rows]
    if prompted.encoder:
        texts = [part for row in rows for part in row]
    found = []
    for batch_B in batches_by_length(rows, batch_sequences, encoder=prompted.encoder):
        batch = [rows[index] for index in batch_B]
        inputs = prompted_inputs(batch, encoder=prompted.encoder)
        tokens_BT, mask_BT = torch.from_numpy(inputs.tokens_BT), torch.from_numpy(inputs.mask_BT)
        arguments = {"input_ids": tokens_BT, "attention_mask": mask_BT.long()}
        masks: tuple[Tensor, ...] = (mask_BT,)
        if inputs.labels_BC is not None:
            labels_BC = torch.from_numpy(inputs.labels_BC)
            if labels_BC.shape == tokens_BT.shape:  # told apart by their shapes
                labels_BC = torch.nn.functional.pad(labels_BC, (0, 1), value=IGNORED)
            arguments["labels"] = labels_BC
            masks = (mask_BT, labels_BC != IGNORED)
        width = int(inputs.prompt_mask_BT.sum(axis=1).max())
        query_mask_BT = torch.from_numpy(inputs.prompt_mask_BT[:, :width])
        found.append(Reading(arguments, tokens_BT[:, :width], query_mask_BT, masks))
    return found, [torch.from_numpy(text_T) for text_T in texts]
