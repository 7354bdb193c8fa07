"""The `experts` section of a recipe: which base, which domains, how an expert is made of each."""

from __future__ import annotations

from pathlib import PurePath
from typing import Literal

from pydantic import Field, model_validator

from weftlm.config import Folder, Section
from weftlm.corpora.labels import folder_name
from weftlm.experts.config import ExpertTraining


class ImportedExpert(Section):
    """An adapter made elsewhere that joins the library."""

    source: str = Field(description="PEFT LoRA adapter: a folder or a hub name")
    name: str | None = Field(None, description="its name in the library; absent: the last part of its source")
    revision: str | None = Field(None, description="hub revision")
    domain: str | None = Field(
        None, description="domain of the data on which its gate and statistics are made; absent: it gets neither"
    )
    assume_base: bool = Field(
        False,
        description="whether an adapter that names another base, or none, counts as made for the base of the experts",
    )

    @property
    def title(self) -> str:
        """Its name in the library."""
        return self.name if self.name is not None else folder_name(PurePath(self.source).name)


class ExpertsConfig(ExpertTraining):
    """Experts over a base model, one per domain, each made without the others.

    Attributes:
        lora: rank, scale and place of the adapter.
        training: length, optimizer and precision of the adapter's training.
        gate: how the gate is trained after the adapter.
    """

    base: str | None = Field(None, description="folder or hub name of the base; absent: `model` in the run folder")
    baseline: str | None = Field(
        None,
        description="baseline (a policy of compare.mixtures) whose model is the base; `weftlm run` trains it first",
    )
    revision: str | None = Field(None, description="hub revision of the base")
    dtype: Literal["float32", "bfloat16", "float16"] = Field("float32", description="dtype the base is held in")
    library: Folder | None = Field(None, description="folder of the experts; absent: `experts` in the run folder")
    domains: list[str] | None = Field(
        None,
        min_length=1,
        description="domains that get an expert; absent: every domain of the data, or none where adapters are imported",
    )
    imports: list[ImportedExpert] = Field(default_factory=list, description="adapters that `weftlm run` imports")

    @model_validator(mode="after")
    def _revision_of_a_base(self) -> ExpertsConfig:
        if self.revision is not None and self.base is None:
            raise ValueError("revision goes with base; the run's own model has none")
        if self.baseline is not None and self.base is not None:
            raise ValueError("base and baseline both name the base; give one of the two")
        return self

    @model_validator(mode="after")
    def _different_names(self) -> ExpertsConfig:
        names = [each.title.lower() for each in self.imports]
        if len(set(names)) < len(names):
            raise ValueError(f"imports: two adapters would have one name ({', '.join(names)}); give each a name")
        for domain in self.domains or ():
            if folder_name(domain).lower() in names:
                raise ValueError(f"imports: an adapter has the name of domain {domain!r}'s expert; give it another")
        return self

    @property
    def trains(self) -> bool:
        """Whether any expert is trained here."""
        return self.domains is not None or not self.imports

    @property
    def expert_training(self) -> ExpertTraining:
        """How an expert is made, without where it goes."""
        return ExpertTraining.model_validate({name: getattr(self, name) for name in ExpertTraining.model_fields})
