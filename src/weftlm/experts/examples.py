"""Training on whole examples of prompt and target, with a loss on targets alone.

Sampling, checkpoints and resuming are the ordinary loop's. To it an example is a sequence of its own number: the
rows it draws and shuffles only name examples, which are read, cut to length and padded here for
their loss.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from weftlm.corpora.examples import Examples, examples_of
from weftlm.corpora.source import Source
from weftlm.errors import ConfigError, DataError
from weftlm.mixture.loader import Batch
from weftlm.models.prompted import PromptedExamples, is_encoder_decoder, target_nats
from weftlm.training.config import AlignmentConfig, TrainingConfig
from weftlm.training.estimators.direction import sum_over_ranks
from weftlm.training.loop import Task, Trainer
from weftlm.training.losses import BatchLoss
from weftlm.training.runtime import Runtime


def domain_trainer(
    model: nn.Module, name: str, source: Source, config: TrainingConfig, *, runtime: Runtime, **options: Any
) -> Trainer:
    """A trainer of one domain: on its examples where the source holds any, else on windows of its tokens.

    Args:
        model: Causal or encoder-decoder language model, with an adapter or gates.
        name: Name of the domain.
        source: Its training tokens. Examples are shuffled in every epoch.
        config: A `training` section.
        runtime: Device, precision and compilation.
        options: Further arguments of `Trainer`.
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
        source: Tokens of a domain.
        name: Name of the domain, for messages.
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
    """A source without its prompts."""

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
    """Examples for a loop that reads windows of T tokens: window i holds the number i and nothing else."""

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


class ExampleLoss(BatchLoss):
    """The loss of whole examples, of decoder-only or encoder-decoder models, over `ExampleNumbers`.

        loss = sum_b sum_j -log p(target[b, j] | prompt[b], target[b, :j]) / sum_b tokens[b]

    over the examples b of a step: the mean over its target tokens, however it is cut into micro-batches and shared by
    processes. An example is cut by `fitted` to `sequence_length` tokens. Token counts, in metrics and results, are
    those that are read and predicted, on an average over the examples; padding does not count.

    """

    def __init__(self, prompted: PromptedExamples, device: torch.device) -> None:
        self.prompted, self._device = prompted, device
        self._targets_N = prompted.targets_N
        super().__init__((prompted.prompts_N + self._targets_N).mean())

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
