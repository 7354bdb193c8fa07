"""The sections of a recipe about gates over whole experts: gates by name, scores, fit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, FiniteFloat, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from weftlm.config import Section, Seed
from weftlm.corpora.labels import ExpertName
from weftlm.registry import Registry

if TYPE_CHECKING:
    from weftlm.gating.gate import Gate


MANIFEST = "modular.json"
"""The file by which a saved model of this kind is known."""

REFRESH_EVERY = 32
"""Tokens between two catch-ups by default."""


Unit = Literal["sequence", "token"]


class ExpertSource(Section):
    """Where an expert can be loaded from.

    A whole model: `model`. An adapter in a PEFT folder: `model`, that folder. An adapter of an expert library:
    `library` and `expert`; its base is the library's, or `model` where that is given.
    """

    name: str = Field(description="Name of the expert, unique in a pool")
    model: str | None = Field(
        None, description="Folder or hub name: a whole model, a PEFT adapter, or a library's base"
    )
    revision: str | None = Field(None, description="Hub revision of `model`")
    library: str | None = Field(None, description="Folder of an expert library")
    expert: ExpertName | None = Field(None, description="The adapter's name in the library; absent: the base itself")

    @model_validator(mode="after")
    def _one_kind(self) -> ExpertSource:
        if self.model is None and self.library is None:
            raise ValueError("give model (a folder or hub name) or library (a folder) and expert")
        if self.expert is not None and self.library is None:
            raise ValueError("expert names an adapter of a library: give library")
        return self


class ScoreConfig(Section):
    """What is scored, and how.

    Sequences are windows of `length` + 1 tokens of the text, the first of which is context; samples start from such
    first tokens and run on through ends of text.
    """

    length: PositiveInt = Field(256, description="Scored tokens per sequence.")
    sequences: PositiveInt = Field(512, description="Sequences of each domain, at most.")
    samples: NonNegativeInt = Field(512, description="Samples drawn from each expert; 0 where every gate is causal.")
    seed: Seed = Field(0, description="Random seed of the samples.")
    batch_size: PositiveInt = Field(16, description="Sequences per forward pass.")
    shard_sequences: PositiveInt = Field(256, description="Sequences per shard: the most an interruption can cost.")
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto", description="Precision of the experts' forward pass; auto: bf16 autocast on GPUs that are fast at it."
    )

    def bf16(self, *, fast: bool) -> bool:
        """Whether experts run under bfloat16 autocast, on a device that is fast at it or not."""
        return fast if self.precision == "auto" else self.precision == "bf16"


class FitConfig(Section):
    """How a gate is fitted."""

    steps: PositiveInt = Field(8000, description="Steps of theta, the mixture and mu together.")
    lr: PositiveFloat = Field(0.05, description="Learning rate of Adam in the first part of the run.")
    final_lr: PositiveFloat = Field(0.005, description="Learning rate of Adam in the last part.")
    final_fraction: FiniteFloat = Field(0.5, gt=0.0, le=1.0, description="Share of the last part, which is averaged.")
    eta: PositiveFloat = Field(0.05, description="Step of the mixture's exponentiated gradient, 1 / nats per sequence.")
    rho: FiniteFloat = Field(1.0, ge=0.0, description="Weight of the squared penalty on Z - 1.")
    ridge: FiniteFloat = Field(
        1.0, ge=0.0, description="Pull of a gate's weights to 0, like a prior worth so many sequences per domain."
    )
    mu_lr: PositiveFloat = Field(0.05, description="Step of mu's ascent.")
    batch_sequences: PositiveInt | None = Field(None, description="Sequences per domain and step; absent: all of them.")
    batch_samples: PositiveInt | None = Field(
        None, description="Samples per expert and step; absent: as many as batch_sequences, else all."
    )
    seed: Seed = Field(0, description="Random seed of the mini-batches and of the gate's random parameters.")
    unit: Unit = Field("sequence", description="Unit in which domains are compared: nats per sequence or per token.")
    report_every_steps: PositiveInt = Field(500, description="Steps between two evaluations on all data.")
    best_response_steps: NonNegativeInt = Field(
        300, description="Steps of the gate against the final mixture for the estimate of the gap; 0: no estimate."
    )
    gap_tolerance: NonNegativeFloat | None = Field(
        1e-3,
        description="Duality gap, nats of `unit`, at which a fit stops before `steps`: measured at every report whose "
        "mixture and Z are as near. Where none is measured (best_response_steps 0), a fit stops after three reports in "
        "a row that lower the worst case by less. Absent: never.",
    )


class GateConfig(Section):
    """Base of every gate's configuration; a subclass narrows `gate` to its registered name."""

    gate: str = Field(description="Registered name of the gate.")


gates: Registry[Gate] = Registry("gate", "weftlm.gating", "gate", "weftlm.gates")


def gate_config(value: str | Mapping[str, Any] | GateConfig, where: str = "gate") -> GateConfig:
    """The configuration a name, a mapping `{"gate": name, ...}` or a ready section gives.

    Raises:
        ConfigError: no or unknown name, unknown key or wrong value, each with what is allowed.
    """
    if isinstance(value, GateConfig):
        return value
    section = gates.settings({"gate": value} if isinstance(value, str) else value, where)
    assert isinstance(section, GateConfig)
    return section


class ConstantConfig(GateConfig):
    """Configuration of `constant`."""

    gate: Literal["constant"] = Field("constant", description="Name of this gate.")


class TabularConfig(GateConfig):
    """Configuration of `tabular`."""

    gate: Literal["tabular"] = Field("tabular", description="Name of this gate.")
    points: PositiveInt | None = Field(None, description="Points X of the support; absent: as many as the data name.")


class LinearConfig(GateConfig):
    """Configuration of `linear`."""

    gate: Literal["linear"] = Field("linear", description="Name of this gate.")
    features: tuple[str, ...] = Field((), description="Names of the features it reads; empty: those it is fitted on.")


class BayesConfig(GateConfig):
    """Configuration of `bayes`."""

    gate: Literal["bayes"] = Field("bayes", description="Name of this gate.")


class FixedShareConfig(GateConfig):
    """Configuration of `fixed_share`."""

    gate: Literal["fixed_share"] = Field("fixed_share", description="Name of this gate.")
    share: FiniteFloat = Field(
        0.01, ge=0.0, le=1.0, description="Share alpha of the weights spread evenly after each token; 0: Bayes."
    )


class PrefixGateConfig(GateConfig):
    """Configuration of `prefix`."""

    gate: Literal["prefix"] = Field("prefix", description="Name of this gate.")
    base: Literal["bayes", "fixed_share"] = Field("bayes", description="Gate it equals before training.")
    share: FiniteFloat = Field(0.01, gt=0.0, lt=1.0, description="Share alpha of fixed share.")
    half_lives_tokens: tuple[PositiveFloat, ...] = Field(
        (1.0, 4.0, 16.0, 64.0),
        description="Half-lives of the decayed means of scores: short ones see changes.",
    )
    horizon_tokens: PositiveFloat = Field(64.0, description="Tokens after which the clock is at one half.")
    hidden: PositiveInt = Field(16, description="Width H of both hidden layers.")
    top: PositiveInt | None = Field(None, description="Experts m that run per token, renormalised; absent: all.")
