"""The sections of a recipe about distilling a gate."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, FiniteFloat, NonNegativeInt, PositiveFloat, PositiveInt

from weftlm.config import Section, Seed
from weftlm.training.config import TrainingConfig


class DistilConfig(Section):
    """How a gate is distilled."""

    steps: PositiveInt = Field(1000, description="Steps of Adam at most.")
    lr: PositiveFloat = Field(0.01, description="Learning rate at the start; falls along a cosine.")
    final_lr_fraction: FiniteFloat = Field(0.05, ge=0.0, le=1.0, description="Last learning rate over `lr`.")
    batch_sequences: PositiveInt | None = Field(64, description="Sequences drawn per step; absent: all, weighted.")
    ridge: FiniteFloat = Field(
        1.0, ge=0.0, description="Pull of the learned correction to 0, like a prior worth so many samples per expert."
    )
    held_out_fraction: FiniteFloat = Field(0.2, gt=0.0, lt=1.0, description="Share of the samples kept for stopping.")
    evaluate_every_steps: PositiveInt = Field(100, description="Steps between two measurements on held-out samples.")
    patience: PositiveInt | None = Field(
        5, description="Measurements without a better one after which training stops; absent: never."
    )
    precision: Literal["float32", "float64"] = Field(
        "float32", description="Float type of the steps; figures are float64 always."
    )
    seed: Seed = Field(0, description="Random seed of the split, the draws and the student's parameters.")


class DenseConfig(Section):
    """How a dense student is trained."""

    training: TrainingConfig = Field(description="Steps, batch, learning rate, precision and checkpoints.")
    token_kl: FiniteFloat = Field(0.0, ge=0.0, le=1.0, description="Share of the loss that is token-level KL.")
    real_fraction: FiniteFloat = Field(0.0, ge=0.0, lt=1.0, description="Share of every batch that is real text.")
    evaluate_every_steps: NonNegativeInt = Field(
        100,
        description="Steps between two measurements on held-out sequences, of which the best is kept; 0: last only.",
    )
