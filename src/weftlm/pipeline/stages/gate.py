"""The stage `gate`: the robust gate and its certificate; and the section `gating` of a recipe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, FiniteFloat, SerializeAsAny, field_validator, model_validator

from weftlm.config import Section
from weftlm.corpora.labels import ExpertName
from weftlm.errors import ConfigError, did_you_mean
from weftlm.gating.config import ExpertSource, FitConfig, GateConfig, LinearConfig, ScoreConfig, gate_config
from weftlm.pipeline.names import CERTIFICATE, FIT, GATE, MONOLITH
from weftlm.pipeline.stage import Stage, StageOptions, stages
from weftlm.pipeline.stages.distil import StudentsConfig

if TYPE_CHECKING:
    from weftlm.gating.mixtures import Box
    from weftlm.pipeline.checks import Known
    from weftlm.pipeline.recipe import Recipe


class MixturesConfig(Section):
    """Which mixtures of the domains the gate must be good for; all of them where no key is given.

        lower_d <= lambda_d <= upper_d            or            lambda in the convex hull of `vertices`

    Weights are by the domain's name; a domain that is not named has lower 0 and upper 1, or weight 0 in a vertex.
    """

    lower: dict[str, FiniteFloat] = Field(default_factory=dict, description="smallest weight of a domain, by its name")
    upper: dict[str, FiniteFloat] = Field(default_factory=dict, description="largest weight of a domain, by its name")
    vertices: list[dict[str, FiniteFloat]] | None = Field(
        None, min_length=1, description="extreme mixtures, each by the domains' names; instead of bounds"
    )

    @model_validator(mode="after")
    def _one_kind(self) -> MixturesConfig:
        if self.vertices is not None and (self.lower or self.upper):
            raise ValueError("give bounds (lower, upper) or vertices, not both")
        return self

    def over(self, domains: Sequence[str]) -> Box | list[list[float]] | None:
        """The bounds, or the extreme mixtures, over these domains in their order; None for all mixtures.

        Raises:
            ConfigError: a domain is named that is not among them.
        """
        from weftlm.gating.mixtures import Box  # noqa: PLC0415 - numpy and torch

        for place, named in (("lower", self.lower), ("upper", self.upper)):
            check_domains(named, domains, f"gating.mixtures.{place}")
        if self.vertices is not None:
            for number, vertex in enumerate(self.vertices):
                check_domains(vertex, domains, f"gating.mixtures.vertices[{number}]")
            return [[vertex.get(name, 0.0) for name in domains] for vertex in self.vertices]
        if not self.lower and not self.upper:
            return None
        return Box([self.lower.get(name, 0.0) for name in domains], [self.upper.get(name, 1.0) for name in domains])


class GatingConfig(Section):
    """One gate over frozen experts, best against the worst mixture of the domains."""

    experts: list[ExpertName] | None = Field(
        None, min_length=1, description="experts of the library the gate is over; absent: all of them"
    )
    pool: list[ExpertSource] | None = Field(
        None,
        min_length=1,
        description="whole models, or adapters of any folder, that the gate is over; absent: the library's experts",
    )
    domains: list[str] | None = Field(
        None, min_length=1, description="domains whose held-out text is scored; absent: every domain that has some"
    )
    scores: ScoreConfig = Field(default_factory=ScoreConfig, description="settings of scoring")
    gate: SerializeAsAny[GateConfig] = Field(
        default_factory=LinearConfig, validate_default=False, description="gate and its options"
    )
    fit: FitConfig = Field(default_factory=FitConfig, description="settings of the fit")
    offsets: Literal["expert", "none"] | dict[str, FiniteFloat] = Field(
        "expert",
        description="reference of a domain's cross-entropy. expert: its own expert's on the same sequences; "
        "none: 0; or nats per `fit.unit` by the domain's name",
    )
    mixtures: MixturesConfig = Field(
        default_factory=MixturesConfig, description="mixtures the gate must be good for; absent: all"
    )
    held_out_fraction: FiniteFloat = Field(
        0.25, gt=0.0, lt=1.0, description="share of the scored sequences that certifies the gate and is not fitted on"
    )
    students: StudentsConfig = Field(default_factory=StudentsConfig, description="students of the gate")

    @model_validator(mode="after")
    def _one_pool(self) -> GatingConfig:
        if self.pool is not None and self.experts is not None:
            raise ValueError("experts names some of the library's; pool brings its own: give one of the two")
        return self

    @field_validator("gate", mode="before")
    @classmethod
    def _by_name(cls, value: Any) -> Any:
        return gate_config(value, "gating.gate") if isinstance(value, str | Mapping) else value

    def offsets_over(self, domains: Sequence[str]) -> str | list[float]:
        """Offsets as `fit_robust_gate` takes them, numbers in the domains' order.

        Raises:
            ConfigError: a domain has no offset, or one is named that is not there.
        """
        if isinstance(self.offsets, str):
            return self.offsets
        check_domains(self.offsets, domains, "gating.offsets")
        missing = [name for name in domains if name not in self.offsets]
        if missing:
            raise ConfigError(f"gating.offsets: none for {', '.join(missing)}; give every scored domain one")
        return [self.offsets[name] for name in domains]


def check_domains(named: Mapping[str, Any] | Sequence[str], domains: Sequence[str], where: str) -> None:
    """Refuse names that are no domain.

    Raises:
        ConfigError: the first of them, with a suggestion.
    """
    for name in named:
        if name not in domains:
            raise ConfigError(f"{where} names {name!r}, which is no scored domain{did_you_mean(name, domains)}")


@stages.register("gate", does="the robust gate and its certificate", costs="minutes on a CPU; no expert is run")
class GateStage(Stage):
    """The gate that is best against the worst mixture of the domains."""

    needs = ("score",)

    def wanted(self, recipe: Recipe) -> bool:
        return recipe.has_gate

    def settings(self, recipe: Recipe) -> dict[str, Any]:
        return recipe.gating_deciding("gate", "fit", "offsets", "mixtures", "held_out_fraction")

    def outputs(self, recipe: Recipe) -> list[Path]:
        return [recipe.gate_folder / name for name in (FIT, CERTIFICATE, GATE)]

    def discarded(self, recipe: Recipe) -> list[Path]:
        return [recipe.gate_folder]

    def check(self, recipe: Recipe, known: Known) -> None:
        from weftlm.models.factory import check_positions  # noqa: PLC0415 - transformers
        from weftlm.models.open import config_at_hand  # noqa: PLC0415 - transformers
        from weftlm.pipeline.scoring import check_samples, own_experts  # noqa: PLC0415 - torch

        config = recipe.gating_settings
        check_samples(config, scored=config.scores.samples > 0)
        if config.pool is None:
            configurations, experts = [known.base], known.experts
        else:
            configurations = [config_at_hand(each.model, each.revision) for each in config.pool if each.model]
            experts = [source.name for source in config.pool]
        for found in configurations:
            check_positions(found, config.scores.length, "gating.scores.length", "an expert")
        if config.experts is not None and experts is not None:
            for name in config.experts:
                if name not in experts:
                    raise ConfigError(f"gating.experts names {name!r}, which is no expert{did_you_mean(name, experts)}")
            experts = config.experts
        if known.domains is None:
            return
        if config.domains is not None:
            check_domains(config.domains, known.domains, "gating.domains")
        scored = known.domains if config.domains is None else config.domains
        config.offsets_over(scored)
        config.mixtures.over(scored)
        if config.offsets == "expert" and experts is not None:
            own_experts(scored, experts)

    def work(self, recipe: Recipe, options: StageOptions) -> None:
        from weftlm.pipeline.gating import certify_gate, fit_gate  # noqa: PLC0415 - torch

        fit_gate(recipe, progress=options.progress)
        certify_gate(recipe)

    def shown(self, recipe: Recipe) -> tuple[dict[str, Any], dict[str, Any]]:
        from weftlm.pipeline.heldout import read_evaluation  # noqa: PLC0415 - torch
        from weftlm.pipeline.project_report import gate_facts  # noqa: PLC0415 - torch

        monolith = read_evaluation(recipe)[MONOLITH]
        gating = gate_facts(recipe.run, **({} if monolith is None else {MONOLITH: monolith}))
        certificate = None if gating.certificate is None else gating.certificate.to_json()
        return {"robust": gating.rows, "certificate": certificate}, {"gating": gating}
