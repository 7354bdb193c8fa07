"""The recipe's `training` section and the learning-rate schedule it describes."""

from __future__ import annotations

import hashlib
import math
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, field_validator, model_validator

from weftlm.config import Section, Settings, settings
from weftlm.errors import ConfigError, did_you_mean
from weftlm.registry import Registry

if TYPE_CHECKING:
    from weftlm.training.estimators.contract import Estimator

estimators: Registry[Estimator] = Registry(
    "alignment estimator", "weftlm.training.estimators", "estimator", "weftlm.estimators"
)

Decay = Annotated[float, Field(ge=0, lt=1)]


NOT_DECIDING = ("log_every_steps", "save_every_steps", "keep_checkpoints", "parallel")
"""Keys of a `training` section that do not decide what is trained."""


class TrainingConfig(Section):
    """How the model is trained: length, batch, optimizer, schedule, precision, checkpoints."""

    sequence_length: PositiveInt = Field(256, description="T, tokens the model sees at once")
    batch_sequences: PositiveInt = Field(16, description="B, sequences per optimizer step over all processes")
    micro_batch_sequences: PositiveInt | None = Field(
        None, description="sequences per backward pass and process; absent: the whole share at once"
    )
    steps: PositiveInt | None = Field(None, description="optimizer steps; give this or tokens")
    tokens: PositiveInt | None = Field(None, description="training tokens; steps = tokens / (B T), rounded up")
    lr: PositiveFloat = Field(1e-3, description="peak learning rate of AdamW")
    betas: tuple[Decay, Decay] = Field((0.9, 0.95), description="AdamW moment decays, each from 0 to below 1")
    eps: PositiveFloat = Field(1e-8, description="AdamW denominator offset")
    weight_decay: float = Field(0.1, ge=0, description="AdamW decay, applied to matrices and not to norms or biases")
    clip_norm: PositiveFloat | None = Field(1.0, description="largest global gradient norm; absent: no clipping")
    schedule: Literal["cosine", "wsd", "constant"] = Field(
        "cosine", description="after warm-up: cosine decay, warm-up-stable-decay, or constant"
    )
    warmup_steps: NonNegativeInt = Field(100, description="steps of linear warm-up")
    final_lr_fraction: float = Field(0.1, ge=0, le=1, description="learning rate at the end over its peak")
    decay_fraction: float = Field(0.2, gt=0, le=1, description="wsd: last part of training that decays linearly")
    precision: Literal["auto", "fp32", "bf16"] = Field("auto", description="auto: bf16 where the device is fast at it")
    compile: bool | Literal["auto"] = Field("auto", description="torch.compile; auto: on GPUs only")
    threads: PositiveInt | None = Field(
        None, description="CPU threads; absent: the cores that other processes leave free"
    )
    device: Literal["auto", "cpu"] = Field("auto", description="auto: the accelerator there is, else the CPU")
    parallel: Literal["ddp", "fsdp2"] = Field(
        "ddp",
        description="several processes: ddp holds the model whole in each, fsdp2 splits it and its optimizer over them",
    )
    log_every_steps: PositiveInt = Field(10, description="steps between two `train` lines of metrics.jsonl")
    save_every_steps: PositiveInt = Field(200, description="steps between two checkpoints")
    keep_checkpoints: PositiveInt = Field(2, ge=2, description="newest checkpoints kept; two, so that one may be torn")
    exhaustion: Literal["repeat", "drop", "stop"] = Field(
        "repeat", description="when a domain's tokens are used up: repeat it, drop and renormalise, or stop"
    )
    max_epochs: PositiveFloat | None = Field(
        None, description="repetition cap per domain, with exhaustion drop or stop; absent: one epoch there"
    )

    @model_validator(mode="after")
    def _consistent(self) -> TrainingConfig:
        if (self.steps is None) == (self.tokens is None):
            raise ValueError("give exactly one of steps and tokens")
        if self.max_epochs is not None and self.exhaustion == "repeat":
            raise ValueError("max_epochs is a cap: set exhaustion to drop or stop with it")
        return self

    def deciding(self) -> Settings:
        """The settings that decide what is trained, by which checkpoints and results are compared."""
        return settings(self, without=NOT_DECIDING)

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        if self.steps is not None:
            return self.steps
        assert self.tokens is not None
        return math.ceil(self.tokens / (self.batch_sequences * self.sequence_length))

    @property
    def total_tokens(self) -> int:
        """Tokens of the whole run, in whole steps."""
        return self.total_steps * self.batch_sequences * self.sequence_length

    def local_batch(self, processes: int) -> int:
        """Sequences of an optimizer step on each of so many processes.

        Raises:
            ConfigError: they cannot share the batch equally.
        """
        if self.batch_sequences % processes:
            raise ConfigError(
                f"training.batch_sequences is {self.batch_sequences}; {processes} processes cannot share it equally"
            )
        return self.batch_sequences // processes

    def micro_batch(self, processes: int) -> int:
        """Sequences of a backward pass on each of so many processes."""
        local = self.local_batch(processes)
        return min(self.micro_batch_sequences or local, local)

    def sharded(self, processes: int) -> bool:
        """Whether the model's parameters are split over so many processes."""
        return self.parallel == "fsdp2" and processes > 1

    def bf16(self, *, fast: bool) -> bool:
        """Whether matrix products are in bfloat16, on a device that is fast at it or not."""
        return fast if self.precision == "auto" else self.precision == "bf16"

    def compiled(self, *, gpu: bool) -> bool:
        """Whether the model is compiled, on a GPU or not."""
        return gpu if self.compile == "auto" else bool(self.compile)


class AlignmentConfig(Section):
    """How gradient alignments are measured for policies that need them."""

    estimator: str = Field(
        "auto",
        description=(
            "how derivatives along the direction are taken: separate, shadow, or an estimator of "
            "another package; auto: by what the run allows, reason logged"
        ),
    )
    probe: Literal["auto", "batch", "extra"] = Field(
        "auto",
        description="batch: measure on the training batch; extra: on further ones; auto: batch where it works",
    )
    sequences_per_group: PositiveInt = Field(8, description="extra probes: sequences per domain or basis distribution")
    target_sequences: PositiveInt = Field(32, description="sequences behind each direction")
    min_sequences_per_domain: PositiveInt = Field(1, description="batch probes: sequences guaranteed to every domain")

    @field_validator("estimator")
    @classmethod
    def _known(cls, name: str) -> str:
        if name != "auto" and name not in set(estimators):
            raise ValueError(f"there is no estimator {name!r}{did_you_mean(name, ['auto', *estimators])}")
        return name


def learning_rate(config: TrainingConfig, step: int) -> float:
    """Learning rate of optimizer step `step` (counted from 0), a pure function so that resuming needs no state.

    Linear warm-up to `lr`, then with f = final_lr_fraction, n steps in all and w of warm-up:

        cosine     lr (f + (1 - f) (1 + cos(pi (step - w) / (n - w))) / 2)
        wsd        lr, and over the last decay_fraction of the steps linearly down to f lr
        constant   lr
    """
    total, warmup = config.total_steps, config.warmup_steps
    if step < warmup:
        return config.lr * (step + 1) / warmup
    final = config.final_lr_fraction
    if config.schedule == "cosine":
        progress = min(1.0, (step - warmup) / max(1, total - warmup))
        return config.lr * (final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress)))
    if config.schedule == "wsd":
        decay_steps = max(1, round(config.decay_fraction * total))
        left = max(0, total - step) / decay_steps
        return config.lr * (final + (1 - final) * min(1.0, left))
    return config.lr


def derive_seed(seed: int, purpose: str) -> int:
    """A seed for one purpose, independent of those for others."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{purpose}".encode(), digest_size=7).digest(), "little")
