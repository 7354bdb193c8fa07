"""The stage `distil`: causal students that can be served."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field, PositiveInt

from weftlm.config import Section
from weftlm.distillation.config import DenseConfig, DistilConfig
from weftlm.files import SEAL
from weftlm.gating.config import MANIFEST, REFRESH_EVERY, FitConfig, PrefixGateConfig, gates
from weftlm.models.config import ModelConfig
from weftlm.pipeline.names import STUDENT
from weftlm.pipeline.stage import Stage, StageOptions, stages

if TYPE_CHECKING:
    from weftlm.pipeline.checks import Known
    from weftlm.pipeline.recipe import Recipe


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


@stages.register("distil", does="causal students that can be served", costs="minutes on a CPU; hours for a dense one")
class Distil(Stage):
    """Causal models of the fitted gate: all experts, the best few per token, one dense model."""

    needs = ("score", "gate")

    def wanted(self, recipe: Recipe) -> bool:
        return recipe.has_gate

    def settings(self, recipe: Recipe) -> dict[str, Any]:
        return recipe.gating_deciding("students")

    def outputs(self, recipe: Recipe) -> list[Path]:
        names = ("student.json", f"{STUDENT}/{MANIFEST}", f"{STUDENT}/{SEAL}")
        return [recipe.students_folder / name for name in names]

    def discarded(self, recipe: Recipe) -> list[Path]:
        return [recipe.students_folder]

    def check(self, recipe: Recipe, known: Known) -> None:
        from weftlm.pipeline.scoring import check_samples  # noqa: PLC0415 - torch

        config = recipe.gating_settings
        if known.whole and gates[config.gate.gate].causal:  # of others the stage `gate` says that they need samples
            check_samples(config, scored=config.scores.samples > 0, direct=False)

    def work(self, recipe: Recipe, options: StageOptions) -> None:
        from weftlm.pipeline.gating import distil_gate  # noqa: PLC0415 - torch

        distil_gate(recipe, progress=options.progress)
