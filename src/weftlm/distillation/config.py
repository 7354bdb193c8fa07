"""The sections of a recipe about distilling a gate."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, FiniteFloat, NonNegativeInt, PositiveFloat, PositiveInt

from weftlm.config import Section, Seed
from weftlm.training.config import TrainingConfig

Weighting = Literal["balance", "gate"]


class DistilConfig(Section):
    """How a gate is distilled."""

    steps: PositiveInt = Field(1000, description="steps of Adam at most")
    lr: PositiveFloat = Field(0.01, description="learning rate at the start; falls along a cosine")
    final_lr_fraction: FiniteFloat = Field(0.05, ge=0.0, le=1.0, description="learning rate at the last step over `lr`")
    batch_sequences: PositiveInt | None = Field(64, description="sequences drawn per step; absent: all, weighted")
    real_fraction: FiniteFloat = Field(0.0, ge=0.0, lt=1.0, description="part of the loss that is real text's")
    ridge: FiniteFloat = Field(
        1.0, ge=0.0, description="pull of the learned correction to 0, like a prior worth so many samples per expert"
    )
    weighting: Weighting = Field(
        "balance", description="balance: weights averaged over which expert drew a sample; gate: g(x, k) itself"
    )
    held_out_fraction: FiniteFloat = Field(0.2, gt=0.0, lt=1.0, description="samples kept for stopping where none came")
    evaluate_every_steps: PositiveInt = Field(100, description="steps between two measurements on held-out samples")
    patience: PositiveInt | None = Field(
        5, description="measurements without a better one after which training stops; absent: never"
    )
    precision: Literal["float32", "float64"] = Field("float32", description="of the steps; figures are float64 always")
    seed: Seed = Field(0, description="of the split, the draws and the student's random parameters")


class DenseConfig(Section):
    """How a dense student is trained."""

    training: TrainingConfig = Field(description="steps, batch, learning rate, precision and checkpoints")
    token_kl: FiniteFloat = Field(0.0, ge=0.0, le=1.0, description="a, part of the loss that is token-level KL")
    real_fraction: FiniteFloat = Field(0.0, ge=0.0, lt=1.0, description="part of every batch that is real text")
    evaluate_every_steps: NonNegativeInt = Field(
        100, description="steps between two measurements on held-out sequences, of which the best is kept; 0: last only"
    )
