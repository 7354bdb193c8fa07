"""The `experts` section of a recipe: which base, which domains, how an expert is made of each."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from weft.experts.train import ExpertTraining


class ExpertsConfig(ExpertTraining):
    """Experts over a base model, one per domain, each made without the others.

    Attributes:
        lora: rank, scale and place of the adapter.
        training: length, optimizer and precision of the adapter's training.
        gate: how the gate is trained after the adapter.
    """

    base: str | None = Field(None, description="folder or hub name of the base; absent: `model` in the run folder")
    revision: str | None = Field(None, description="hub revision of the base")
    dtype: Literal["float32", "bfloat16", "float16"] = Field("float32", description="dtype the base is held in")
    library: Path | None = Field(None, description="folder of the experts; absent: `experts` in the run folder")
    domains: list[str] | None = Field(
        None, min_length=1, description="domains that get an expert; absent: every domain of the data"
    )

    @model_validator(mode="after")
    def _revision_of_a_base(self) -> ExpertsConfig:
        if self.revision is not None and self.base is None:
            raise ValueError("revision goes with base; the run's own model has none")
        return self

    @property
    def expert_training(self) -> ExpertTraining:
        """How an expert is made, without where it goes."""
        return ExpertTraining.model_validate({name: getattr(self, name) for name in ExpertTraining.model_fields})
