"""One small language model that learns what the gated model says: no experts and no gate when it is served.

    minimise   (1 - a) E_x[ - log s(x) ]  +  a E_x[ sum_t KL(m(. | x_<t) || s(. | x_<t)) ]          m = pi_g / Z

x comes from the gated model by weighted samples of its experts, and from real text. The first term needs nothing but
those samples and is, up to a constant, the KL of whole sequences; the second needs the teacher's next-token
distribution, which a distilled causal gate gives. Training is the ordinary loop, in one process, with another loss
(`_DistillationLoss`).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from weftlm.distillation.config import DenseConfig
from weftlm.distillation.structural import Weighted, model_kl
from weftlm.errors import ConfigError, DataError, NumericsError
from weftlm.evaluation.result import finite_or_none
from weftlm.gating.sequences import draw_rows
from weftlm.mixture.loader import Batch
from weftlm.models.config import ModelConfig
from weftlm.models.factory import build_model, count_parameters
from weftlm.models.fingerprint import base_fingerprint
from weftlm.models.hf import token_losses
from weftlm.training.config import NOT_DECIDING, AlignmentConfig
from weftlm.training.loop import Task, Trainer
from weftlm.training.losses import BatchLoss
from weftlm.training.metrics import METRICS, read_metrics
from weftlm.training.runtime import Runtime, choose_runtime

Teacher = Callable[[Tensor], Tensor]
"""tokens_BT -> logp_BTV, nats, normalised over V: the logits of a `ModularLM`."""


@dataclass(frozen=True, eq=False)
class WeightedText:
    """Token ids of sequences and how often each is to be drawn.

    Attributes:
        tokens_NT1: Token ids, int64; T inputs and the label after each, as for any causal language model.
        weights_N: Probability of each, float64, sums to 1.
        weighted: Scored samples they are, from which the teacher's log-probability is known; None: unknown.
    """

    tokens_NT1: Tensor
    weights_N: Tensor
    weighted: Weighted | None = None

    def __len__(self) -> int:
        return len(self.tokens_NT1)

    @classmethod
    def of(cls, tokens_NT1: Any, *, weights_N: Any = None) -> WeightedText:
        """Check and convert arrays; weights are made to sum to 1, and are equal where none came.

        Raises:
            ConfigError: shapes do not fit.
            DataError: there is no sequence, or no token to predict.
            NumericsError: weights that are no numbers, negative, or all 0.
        """
        tokens = torch.as_tensor(np.asarray(tokens_NT1)).to(torch.int64)
        if tokens.ndim != 2 or tokens.shape[0] == 0 or tokens.shape[1] < 2:
            raise DataError(f"token ids have shape {tuple(tokens.shape)}; they need sequences x tokens, 1 x 2 at least")
        count = len(tokens)
        weights = torch.ones(count).double() if weights_N is None else torch.as_tensor(np.asarray(weights_N)).double()
        if tuple(weights.shape) != (count,):
            raise ConfigError(f"weights_N has shape {tuple(weights.shape)}; {count} sequences need {(count,)}")
        total = float(weights.sum())
        if not bool((weights >= 0).all()) or not math.isfinite(total) or total <= 0.0:
            raise NumericsError(f"weights_N sum to {total:.6g}; they must be >= 0, finite and not all 0")
        return cls(tokens, weights / total)

    @classmethod
    def sampled(cls, weighted: Weighted) -> WeightedText:
        """Samples of the experts (`weigh`) with the weights that make them the gated model's.

        Raises:
            ConfigError: an expert's samples have no token ids.
        """
        tokens = [one.tokens_NT1 for one in weighted.samples if one.tokens_NT1 is not None]
        if len(tokens) < len(weighted.samples):
            raise ConfigError("a dense student learns from token ids; give the samples theirs (tokens_NT1)")
        return replace(cls.of(torch.cat(tokens), weights_N=weighted.mass_B), weighted=weighted)


@dataclass(frozen=True)
class DenseProgress:
    """One measurement; plain numbers.

    Attributes:
        step: Steps taken.
        loss: Loss of the last batch, nats per token.
        ce: Cross-entropy on held-out sequences, nats per token; None without any.
        kl: KL(pi_g / Z || student) on them, nats per sequence; None where the teacher's log-probabilities are unknown.
        error: Standard error of `kl` (`student_kl`); 0 where the sequences are enumerated, None from one alone.
    """

    step: int
    loss: float | None
    ce: float | None
    kl: float | None
    error: float | None


@dataclass(frozen=True, eq=False)
class DenseResult:
    """A dense student.

    Attributes:
        model: Student in evaluation mode, with the weights of the best held-out cross-entropy, else the last.
        best: Measurement of those; of the sequences by which they were chosen, so slightly optimistic.
        history: All measurements.
    """

    model: nn.Module
    best: DenseProgress
    history: tuple[DenseProgress, ...]


def distil_dense(
    model: ModelConfig | nn.Module,
    text: WeightedText,
    config: DenseConfig,
    *,
    vocab_size: int,
    eos_id: int = 0,
    teacher: Teacher | None = None,
    real: WeightedText | None = None,
    held_out: WeightedText | None = None,
    folder: Path | None = None,
    seed: int = 0,
    runtime: Runtime | None = None,
    on_progress: Callable[[DenseProgress], None] | None = None,
) -> DenseResult:
    """Train one small language model on what the gated model would say.

    Sequences are drawn with replacement by their weights.

    Args:
        model: Configuration of the student, or a causal language model to start from.
        text: Samples of the experts with the gated model's weights (`WeightedText.sampled`).
        config: Settings of the training.
        vocab_size: Number of ids the tokenizer can give.
        eos_id: End-of-document id.
        teacher: Next-token log-probabilities of the gated model, for `config.token_kl` above 0; called on the model's
            device, without gradient.
        real: Real text, for `config.real_fraction` above 0; of the same length.
        held_out: Weighted samples not among `text`, to choose the best weights and to report.
        folder: Folder of checkpoints, metrics.jsonl and the best weights; a run found there is continued. None: nothing
            is written.
        seed: Random seed of the first weights, the draws and dropout.
        runtime: Device and precision; None: chosen for this machine.
        on_progress: Called with each measurement.
    Raises:
        ConfigError: lengths, ids or options do not fit each other; as `build_model`.
        CheckpointError: the folder holds another run, or cannot be written.
        NumericsError: a loss or a gradient is not finite; the last good checkpoint stays.
    """
    length = text.tokens_NT1.shape[1] - 1
    texts = {"text": text, "real": real, "held_out": held_out}
    _check(texts, config, vocab_size, teacher)
    if isinstance(model, ModelConfig):
        model = build_model(model, vocab_size=vocab_size, sequence_length=length, eos_id=eos_id, seed=seed)
    runtime = runtime or choose_runtime(config.training, parameters=count_parameters(model))
    identity = _identity(config, seed, texts.values(), teacher is not None, model) if folder else ""
    history: list[DenseProgress] = []

    def evaluate(module: nn.Module) -> dict[str, Any]:
        module.eval()
        size = config.training.micro_batch_sequences or config.training.batch_sequences
        found = (None, None, None) if held_out is None else _held_out(module, held_out, size, runtime)
        line = DenseProgress(trainer.step, trainer.last_loss, *found)
        history.append(line)
        if on_progress is not None:
            on_progress(line)
        return {name: value for name, value in asdict(line).items() if name != "step"}

    trainer = Trainer(
        model, Task.of_one("samples", _Numbers(length)), config.training,
        alignment=AlignmentConfig(), runtime=runtime, folder=folder, seed=seed,
        loss=_DistillationLoss(text, real, config, teacher, seed), evaluate=evaluate,
        evaluate_every_steps=config.evaluate_every_steps or config.training.total_steps,
        keep_best=None if held_out is None else "ce", identity=identity,
    )  # fmt: skip
    if folder is not None:
        lines, names = read_metrics(folder / METRICS), [each.name for each in fields(DenseProgress)]
        history += [DenseProgress(**{name: line[name] for name in names}) for line in lines if line["kind"] == "eval"]
    trainer.run()
    if held_out is not None:
        trainer.restore_best()
    model.eval()
    kept = history[-1] if held_out is None else min(history, key=lambda line: math.inf if line.ce is None else line.ce)
    return DenseResult(model, kept, tuple(history))


def _check(
    texts: Mapping[str, WeightedText | None], config: DenseConfig, vocab_size: int, teacher: Teacher | None
) -> None:
    length, real = config.training.sequence_length, texts["real"]
    for name, one in texts.items():
        if one is None:
            continue
        if (count := one.tokens_NT1.shape[1] - 1) != length:
            raise ConfigError(
                f"{name} has {count} tokens to predict, and training.sequence_length is {length}; make them equal"
            )
        low, high = int(one.tokens_NT1.min()), int(one.tokens_NT1.max())
        if low < 0 or high >= vocab_size:
            raise ConfigError(f"{name} holds ids from {low} to {high}; the vocabulary has {vocab_size}")
    for key, share, given, name in (
        ("token_kl", config.token_kl, teacher, "teacher"), ("real_fraction", config.real_fraction, real, "real text"),
    ):  # fmt: skip
        if (share > 0.0) != (given is not None):
            raise ConfigError(f"{key} is {share} and {'no ' if given is None else ''}{name} came; give both or neither")


class _Numbers:
    """What the loop draws from: sequences without contents, as many as it likes; the loss fills them."""

    fingerprint = "weighted samples"

    def __init__(self, length: int) -> None:
        self._length = length

    def __len__(self) -> int:
        return self._length << 40

    def read(self, start: int, count: int) -> NDArray[np.int64]:
        return np.zeros(count, dtype=np.int64)

    def read_many(self, starts_N: NDArray[np.int64], count: int) -> NDArray[np.int64]:
        return np.zeros((len(starts_N), count), dtype=np.int64)


class _DistillationLoss(BatchLoss):
    """Samples and real text, drawn by their weights as a function of (seed, step).

    What the loop hands around are numbers of sequences, whose ids are looked up when their loss is taken.
    """

    def __init__(
        self, text: WeightedText, real: WeightedText | None, config: DenseConfig, teacher: Teacher | None, seed: int
    ) -> None:
        batch = config.training.batch_sequences
        count = 0 if real is None else min(batch - 1, max(1, round(config.real_fraction * batch)))
        if real is not None and batch < 2:
            raise ConfigError(f"training.batch_sequences is {batch}; with real text it must be 2 at least")
        self._parts = [(text, batch - count)] + ([] if real is None else [(real, count)])
        self._tokens_NT1 = torch.cat([one.tokens_NT1 for one, _ in self._parts])
        self._teacher, self._token_kl, self._seed = teacher, config.token_kl, seed
        super().__init__(text.tokens_NT1.shape[1] - 1)

    def prepare(self, batch: Batch) -> Batch:
        """The numbers of the step's sequences in place of what the loop drew."""
        if len(batch.draw) != len(batch.loss_weights_B):
            raise ConfigError("a dense student is trained by one process; start it without torchrun")
        rng = np.random.default_rng([self._seed, batch.step])
        numbers, first = [], 0
        for one, size in self._parts:
            numbers.append(first + draw_rows(one.weights_N, size, rng))
            first += len(one)
        weights_B = np.full(len(batch.draw), 1.0 / self.tokens_per_sequence)
        return replace(batch, tokens_BT1=torch.cat(numbers)[:, None], loss_weights_B=weights_B)

    def __call__(self, model: nn.Module, numbers_B1: Tensor) -> Tensor:
        """Loss of each sequence summed over its labels, (B, 1)."""
        tokens_BT1 = self._tokens_NT1[numbers_B1[:, 0].cpu()].to(numbers_B1.device)
        logits_BTV = model(input_ids=tokens_BT1[:, :-1], use_cache=False).logits
        logp_BTV = torch.log_softmax(logits_BTV.float(), dim=-1)
        loss_BT = -logp_BTV.gather(2, tokens_BT1[:, 1:, None])[..., 0]
        if self._teacher is not None:
            with torch.no_grad():
                taught_BTV = self._teacher(tokens_BT1[:, :-1])
            padding = logp_BTV.shape[-1] - taught_BTV.shape[-1]
            if padding > 0:  # embeddings of the student that no token of the teacher's vocabulary has
                taught_BTV = F.pad(taught_BTV, (0, padding), value=-math.inf)
            if taught_BTV.shape != logp_BTV.shape:
                raise ConfigError(
                    f"the teacher answered {tuple(taught_BTV.shape)} and the student {tuple(logp_BTV.shape)}; both "
                    "need one log-probability per id"
                )
            taught_BTV = taught_BTV.to(logp_BTV)
            apart_BTV = taught_BTV.exp() * (taught_BTV.clamp_min(-1e4) - logp_BTV)
            loss_BT = (1.0 - self._token_kl) * loss_BT + self._token_kl * apart_BTV.sum(dim=-1)
        return loss_BT.sum(dim=1, keepdim=True)


def _held_out(
    model: nn.Module, one: WeightedText, size: int, runtime: Runtime
) -> tuple[float, float | None, float | None]:
    """Cross-entropy per token, and KL from the teacher with its error where its log-probabilities are known."""
    logs = []
    with torch.no_grad():
        for rows in torch.arange(len(one)).split(size):
            tokens_BT1 = one.tokens_NT1[rows].to(runtime.device)
            with torch.autocast(runtime.device.type, dtype=torch.bfloat16, enabled=runtime.bf16):
                logs.append(-token_losses(model, tokens_BT1).double().sum(dim=1).cpu())
    logs_N = torch.cat(logs)
    ce = -float(one.weights_N @ logs_N) / (one.tokens_NT1.shape[1] - 1)
    if one.weighted is None:
        return ce, None, None
    kl, error = model_kl(one.weighted, logs_N)
    return ce, kl, finite_or_none(error)


def _identity(
    config: DenseConfig, seed: int, texts: Iterable[WeightedText | None], taught: bool, model: nn.Module
) -> dict[str, Any]:
    """What is trained on what: settings, data, and the student's first weights."""
    settings, data = config.model_dump(mode="json"), hashlib.blake2b(digest_size=16)
    for name in (*NOT_DECIDING, "threads"):
        settings["training"].pop(name)
    for one in texts:
        for tensor in () if one is None else (one.tokens_NT1, one.weights_N):
            data.update(np.ascontiguousarray(tensor.numpy()).tobytes())
        data.update(b"/")
    facts = {"data": data.hexdigest(), "first weights": base_fingerprint(model)}
    return {**settings, "seed": seed, "teacher": taught, **facts}
