"""The sections of a recipe about making an expert: adapter, training, gate."""

from __future__ import annotations

import math
from typing import Any, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, ValidationError, model_validator

from weftlm.config import Section
from weftlm.models.config import LoRASection
from weftlm.training.config import TrainingConfig

WARMUP_FRACTION = 0.06
"""Part of an expert's or a gate's steps that warms up, as in the paper."""


def warmup_of(steps: int) -> int:
    """6 % of the steps, rounded."""
    return round(WARMUP_FRACTION * steps)


class GateConfig(Section):
    """How an expert's gate is trained after the expert, on the same data with the same loss.

    The recipe is the paper's: AdamW without weight decay, 6 % of linear warm-up and then a constant learning rate.
    Whatever is not named here (moment decays, clipping, precision, device) is as in the expert's `training`.
    """

    steps: NonNegativeInt = Field(
        100,
        description="optimizer steps; absent: 100, and no more than the expert's; 0: no gate",
    )
    lr: PositiveFloat = Field(5e-3, description="learning rate of AdamW after warm-up")
    batch_sequences: PositiveInt | None = Field(None, description="sequences per step; absent: the expert's")
    sequence_length: PositiveInt | None = Field(None, description="T, tokens per sequence; absent: the expert's")

    def training(self, like: TrainingConfig) -> TrainingConfig:
        """The whole `training` section of the gate, given the expert's; `steps` must not be 0."""
        own = {
            "steps": self.steps,
            "tokens": None,
            "lr": self.lr,
            "weight_decay": 0.0,
            "schedule": "constant",
            "warmup_steps": warmup_of(self.steps),
            "batch_sequences": self.batch_sequences or like.batch_sequences,
            "sequence_length": self.sequence_length or like.sequence_length,
            "log_every_steps": 1,
            "save_every_steps": min(like.save_every_steps, math.ceil(self.steps / 4)),
        }
        return TrainingConfig.model_validate(
            {**{key: getattr(like, key) for key in TrainingConfig.model_fields}, **own}
        )


DEFAULT_STEPS = 1000


class AdapterConfig(LoRASection):
    """The shape of an adapter and its first values.

    y = W u + (alpha / rank) B A u, with B = 0 at first. The defaults are those of Muqeeth et al. 2024
    (arXiv:2402.05859): scale 1 / r and A ~ N(0, 0.01^2). PEFT's own habits are `alpha: 16, init_std: null`. In a recipe
    whose `model` has a `lora` section, rank, alpha, dropout and modules are that section's unless given here.
    """

    alpha: PositiveInt = Field(1, description="scale numerator; the update is scaled by alpha / rank")
    init_std: PositiveFloat | None = Field(
        0.01, description="A ~ N(0, init_std^2) at first; null: uniform in +-1 / sqrt(input width), as PEFT does"
    )


class AdapterTraining(TrainingConfig):
    """`training` of an adapter: as of any model, with the defaults of Muqeeth et al. 2024 (arXiv:2402.05859).

    AdamW without weight decay, 6 % of linear warm-up and then a constant learning rate. The paper's steps take 1024
    sequences of up to 512 tokens; here length, batch, precision, device, compilation and threads are those of the
    recipe's own `training`, where it has one, until the recipe says otherwise.
    """

    lr: PositiveFloat = Field(5e-3, description="learning rate of AdamW after warm-up")
    weight_decay: float = Field(0.0, ge=0, description="AdamW decay, applied to matrices")
    schedule: Literal["cosine", "wsd", "constant"] = Field(
        "constant", description="after warm-up: cosine decay, warm-up-stable-decay, or constant"
    )
    warmup_steps: NonNegativeInt = Field(
        warmup_of(DEFAULT_STEPS), description="steps of linear warm-up; absent: 6 % of the steps"
    )

    @model_validator(mode="before")
    @classmethod
    def _defaults(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        if value.get("steps") is None and value.get("tokens") is None:
            value = {**value, "steps": DEFAULT_STEPS}
        if "warmup_steps" not in value:
            try:
                steps = TrainingConfig.model_validate(value).total_steps
            except ValidationError:
                return value  # whose faults are reported
            value = {**value, "warmup_steps": warmup_of(steps)}
        return value


class ExpertTraining(Section):
    """How an expert is made from a domain: adapter, gate, statistics.

    The paper trains 1000 steps and keeps the adapter that did best on validation data, looked at every 100 steps. Sizes
    that are not given follow the adapter's training: no more gate steps than its steps, no more windows behind the
    statistics than it reads.
    """

    lora: AdapterConfig = Field(default_factory=lambda: AdapterConfig.model_validate({}))
    examples: bool | None = Field(
        None,
        description="train on whole examples, loss on their targets (true), or on windows of text (false); absent: on "
        "examples wherever a domain's documents have prompts",
    )
    training: AdapterTraining = Field(default_factory=lambda: AdapterTraining.model_validate({}))
    validate_every_steps: NonNegativeInt = Field(
        100, description="held-out loss every so many steps, and the best adapter kept, step 0 too; 0 keeps the last"
    )
    validation_tokens: PositiveInt | None = Field(
        65_536, description="held-out tokens per validation, the same ones each time; null: all"
    )
    gate: GateConfig = Field(default_factory=lambda: GateConfig.model_validate({}))
    statistics_examples: NonNegativeInt = Field(
        1000, description="training windows behind the statistics; absent: 1000, no more than trained on; 0: none"
    )
    embedder: str = Field(
        "tokens-1024",
        pattern=r"^tokens-[1-9][0-9]*$",
        description="embeds those windows by their hashed tokens and pairs of tokens: tokens-WIDTH",
    )

    @model_validator(mode="before")
    @classmethod
    def _follow_the_training(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        try:
            training = AdapterTraining.model_validate(value.get("training", {}))
        except ValidationError:
            return value  # which is reported as a fault of `training`
        gate = value.get("gate", {})
        if isinstance(gate, dict) and "steps" not in gate:
            most = int(GateConfig.model_fields["steps"].default)
            value = {**value, "gate": {**gate, "steps": min(most, training.total_steps)}}
        if "statistics_examples" not in value:
            most = int(cls.model_fields["statistics_examples"].default)
            value = {**value, "statistics_examples": min(most, training.total_steps * training.batch_sequences)}
        return value
