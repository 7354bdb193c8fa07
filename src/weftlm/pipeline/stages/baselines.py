"""The stage `baselines`: the same model on other mixtures, and one model on all that the experts see."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BeforeValidator, Field, SerializeAsAny, field_validator

from weftlm.config import Section, settings
from weftlm.files import SEAL
from weftlm.mixture.config import PolicyConfig, policy_config
from weftlm.pipeline.names import MONOLITH, RESULT
from weftlm.pipeline.stage import Stage, StageOptions, stages
from weftlm.pipeline.stages.train import check_mixture

if TYPE_CHECKING:
    from weftlm.pipeline.checks import Known
    from weftlm.pipeline.recipe import Recipe


def _policy(value: Any) -> Any:
    section = {"policy": value} if isinstance(value, str) else value
    return policy_config(section) if isinstance(section, Mapping) else section


class CompareConfig(Section):
    """Baselines of the model and of the gate, trained beside them on the same data for as many tokens."""

    mixtures: list[Annotated[SerializeAsAny[PolicyConfig], BeforeValidator(_policy)]] = Field(
        default_factory=list, description="other mixtures for the same model: policies by name, or their sections"
    )
    monolith: bool = Field(
        False,
        description="train the experts' base on all their domains together, uniformly, for as many tokens as all "
        "experts: the single model that the gate is compared with",
    )

    @field_validator("mixtures")
    @classmethod
    def _different(cls, value: list[PolicyConfig]) -> list[PolicyConfig]:
        names = [each.policy for each in value]
        if len(set(names)) < len(names):
            raise ValueError(f"a policy is named twice: {', '.join(names)}; name each once")
        return value


@stages.register("baselines", does="other mixtures and the monolith", costs="as train, for each")
class Baselines(Stage):
    """The models that the mixture and the gate are compared with."""

    needs = ("prepare", "train")
    costly = True
    shared = True

    def wanted(self, recipe: Recipe) -> bool:
        return bool(recipe.compare.mixtures) or recipe.trains_monolith

    def settings(self, recipe: Recipe) -> dict[str, Any]:
        found = {policy.policy: recipe.baseline(policy).deciding() for policy in recipe.compare.mixtures}
        if recipe.trains_monolith:
            experts = recipe.expert_settings
            found[MONOLITH] = {
                "tokens": experts.training.total_tokens,
                **settings(experts, only=("base", "baseline", "revision", "domains")),
            }
        return found

    def outputs(self, recipe: Recipe) -> list[Path]:
        folders = [recipe.baselines_folder / name for name in self.settings(recipe)]
        return [folder / each for each in (RESULT, f"model/{SEAL}") for folder in folders]

    def discarded(self, recipe: Recipe) -> list[Path]:
        return [recipe.baselines_folder]

    def check(self, recipe: Recipe, known: Known) -> None:
        for policy in recipe.compare.mixtures:
            known.attempt(check_mixture, recipe.baseline(policy))

    def work(self, recipe: Recipe, options: StageOptions) -> None:
        from weftlm.pipeline.experts import expert_domains  # noqa: PLC0415 - torch
        from weftlm.pipeline.prepared import PreparedData  # noqa: PLC0415 - torch
        from weftlm.pipeline.train import run_training  # noqa: PLC0415 - torch

        for policy in recipe.compare.mixtures:
            run_training(recipe.baseline(policy))
        if recipe.trains_monolith:
            domains = PreparedData.load(recipe.prepared_folder).domains
            run_training(recipe.monolith(len(expert_domains(domains, recipe.expert_settings.domains))))

    def shown(self, recipe: Recipe) -> tuple[dict[str, Any], dict[str, Any]]:
        from weftlm.pipeline.train import read_result  # noqa: PLC0415 - torch

        folders = {each.policy: recipe.baselines_folder / each.policy for each in recipe.compare.mixtures}
        runs = {name: folder for name, folder in folders.items() if (folder / RESULT).exists()}
        return {"mixture": {name: read_result(run) for name, run in runs.items()}}, {"runs": runs}
