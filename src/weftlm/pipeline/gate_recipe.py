"""The `gating` section of a recipe: which experts are scored, on what, and how a gate over them is fitted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, FiniteFloat, PositiveInt, SerializeAsAny, field_validator, model_validator

from weftlm.config import Section
from weftlm.corpora.labels import ExpertName
from weftlm.distillation.config import DenseConfig, DistilConfig
from weftlm.errors import ConfigError, did_you_mean
from weftlm.gating.config import (
    REFRESH_EVERY,
    ExpertSource,
    FitConfig,
    GateConfig,
    LinearConfig,
    PrefixGateConfig,
    ScoreConfig,
    gate_config,
)
from weftlm.models.config import ModelConfig

if TYPE_CHECKING:
    from weftlm.gating.mixtures import Box


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


class DirectConfig(Section):
    """The causal gate that is trained on the minimax objective itself; see `PrefixGateConfig` and `FitConfig`."""

    gate: PrefixGateConfig = Field(
        default_factory=lambda: PrefixGateConfig(base="fixed_share"), description="the gate, and where it starts"
    )
    fit: FitConfig = Field(
        default_factory=lambda: FitConfig(
            steps=600, lr=0.02, final_lr=0.002, batch_sequences=32, report_every_steps=100, best_response_steps=0
        ),
        description="settings of its fit, in the unit of gating.fit",
    )


class DenseStudentConfig(DenseConfig):
    """One small language model that learns what the gated model says."""

    model: ModelConfig = Field(description="architecture and sizes, or weights to start from")


class StudentsConfig(Section):
    """What `weftlm gate distil` makes of a gate: causal models that can be served."""

    gate: PrefixGateConfig = Field(
        default_factory=PrefixGateConfig, description="the causal gate that is distilled into"
    )
    distil: DistilConfig = Field(
        default_factory=DistilConfig, description="settings of distillation, of sparse students too"
    )
    experts_per_token: list[PositiveInt] = Field(
        [1, 2], description="a sparse student for each; those not below the number of experts are left out"
    )
    refresh_every: PositiveInt | None = Field(
        REFRESH_EVERY,
        description="tokens after which a sparse student's inactive experts are updated, fewer early in a text; null: "
        "never",
    )
    direct: DirectConfig = Field(default_factory=DirectConfig, description="the gate of weftlm gate distil --direct")
    dense: DenseStudentConfig | None = Field(None, description="a dense student as well; absent: none")


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
