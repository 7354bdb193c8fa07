"""A recipe as a whole project: which parts it has, and where each leaves what it makes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weftlm.config import apply_overrides
from weftlm.errors import ConfigError
from weftlm.evaluation.config import EvaluationConfig
from weftlm.mixture.config import PolicyConfig, policy_config
from weftlm.models.config import ModelConfig
from weftlm.pipeline.data_config import DataConfig
from weftlm.pipeline.expert_recipe import WHOLE, ExpertRecipe, make_expert_recipe
from weftlm.pipeline.names import REPORT
from weftlm.pipeline.project_config import RIVALS
from weftlm.pipeline.recipe import Recipe, make_recipe
from weftlm.recipe_text import read_yaml
from weftlm.routing.config import parse_router, router_config

MONOLITH = "monolith"


@dataclass(frozen=True)
class Project:
    """What `weftlm run` carries through.

    Attributes:
        whole: the recipe, where it trains a model.
        parts: of the experts and the gate, where it has any.
    """

    whole: Recipe | None
    parts: ExpertRecipe | None

    @property
    def _any(self) -> Recipe | ExpertRecipe:
        found = self.whole if self.whole is not None else self.parts
        assert found is not None
        return found

    @property
    def base_recipe(self) -> Recipe:
        """The recipe of the model that is trained; only where there is one."""
        assert self.whole is not None
        return self.whole

    @property
    def pool_recipe(self) -> ExpertRecipe:
        """The recipe of the experts and the gate; only where there is one."""
        assert self.parts is not None
        return self.parts

    @property
    def run(self) -> Path:
        """The run folder."""
        return self._any.run

    @property
    def data(self) -> DataConfig:
        """The corpora."""
        return self._any.data

    @property
    def evaluation(self) -> EvaluationConfig:
        """What is measured."""
        return self._any.evaluation

    @property
    def prepared_folder(self) -> Path:
        """Where the prepared data lies."""
        return self._any.prepared_folder

    @property
    def rivals_folder(self) -> Path:
        """Where the rivals are trained, each in a folder of its own."""
        return self.run / RIVALS

    @property
    def stages_folder(self) -> Path:
        """What is known of each stage."""
        return self.run / "stages"

    @property
    def makes_experts(self) -> bool:
        """Whether experts are made or imported."""
        if self.whole is not None:
            return self.whole.experts is not None
        return self.parts is not None and self.parts.experts.base is not None

    @property
    def mixtures(self) -> list[PolicyConfig]:
        """The rivals' mixtures."""
        return [] if self.whole is None else self.whole.compare.mixtures

    @property
    def monolith(self) -> bool:
        """Whether a single model is trained beside the experts."""
        return self.whole is not None and self.whole.compare.monolith and self.makes_experts

    def rival(self, policy: PolicyConfig) -> Recipe:
        """The recipe of the same model on another mixture."""
        return self.base_recipe.model_copy(
            update={
                "mixture": policy,
                "run": self.rivals_folder / policy.policy,
                "prepared": self.prepared_folder,
            }
        )

    def monolith_recipe(self, experts: int) -> Recipe:
        """The recipe of the gate's rival: the experts' base, trained on for as many tokens as all experts together."""
        tokens = experts * self.pool_recipe.experts.training.total_tokens
        return self.base_recipe.model_copy(
            update={
                "run": self.rivals_folder / MONOLITH,
                "prepared": self.prepared_folder,
                "model": ModelConfig(pretrained=self.pool_recipe.base, revision=self.pool_recipe.experts.revision),
                "mixture": policy_config({"policy": "uniform"}),
                "training": self.base_recipe.training.model_copy(update={"tokens": tokens, "steps": None}),
                "evaluation": self.base_recipe.evaluation.model_copy(update={"every_steps": None}),
            }
        )

    def resolved(self) -> dict[str, Any]:
        """Every key with its value, as plain YAML values."""
        return self._any.resolved()

    def to_yaml(self) -> str:
        """The resolved recipe; reading it again gives this project."""
        return self._any.to_yaml()


def project_recipe(run: Path) -> Path:
    """Where `weftlm run` keeps the recipe it last carried out in a run folder."""
    return run / "stages" / "recipe.yaml"


def refuse_project_page(path: Path) -> None:
    """Refuse to write another page over that of a whole project.

    Raises:
        ConfigError: it would be.
    """
    if path.name == REPORT and project_recipe(path.parent).exists():
        raise ConfigError(f"{path} is the page of a whole project; give another file")


def open_project(run: Path) -> Project:
    """The project that `weftlm run` last carried out in a run folder.

    Raises:
        ConfigError: there is none, or its recipe cannot be read.
    """
    recipe = project_recipe(run)
    if not recipe.exists():
        raise ConfigError(f"{run} is no run folder of weftlm run ({recipe} is not there); run a recipe first")
    try:
        return load_project(recipe, [f"run={json.dumps(str(run))}"])
    except ConfigError as error:
        raise ConfigError(f"{recipe} cannot be read: {error}; run the recipe again") from error


def load_project(path: str | Path, overrides: Sequence[str] = ()) -> Project:
    """Read a recipe of any kind and apply `section.key=value` overrides.

    Raises:
        ConfigError: one line for every problem.
    """
    return make_project(apply_overrides(read_yaml(path), overrides))


def make_project(value: Mapping[str, Any]) -> Project:
    """Validate a recipe given as a mapping: a whole one, which trains a model, or one of experts over a given base.

    Raises:
        ConfigError: one line for every problem.
    """
    if not WHOLE & set(value):
        return _sound(Project(None, make_expert_recipe(value)))
    whole = make_recipe(value)
    pool = whole.gating is not None and whole.gating.pool is not None
    return _sound(Project(whole, make_expert_recipe(value) if whole.experts is not None or pool else None))


def _sound(project: Project) -> Project:
    """Refuse sections that nothing would be made of, or that would come to nothing hours later.

    Raises:
        ConfigError: one line for every problem.
    """
    problems, recipe = [], project.whole if project.whole is not None else project.pool_recipe
    if not project.makes_experts:
        if recipe.routing is not None:
            problems.append("routing compares routers over experts, and none are made; add a section `experts: {}`")
        if recipe.gating is not None and recipe.gating.pool is None:
            problems.append("gating needs experts; add a section `experts: {}`, or name models in gating.pool")
        if project.whole is not None and project.whole.compare.monolith:
            problems.append("compare.monolith is the rival of experts, and none are made; leave it out")
    if project.whole is not None and project.whole.mixture.policy in (each.policy for each in project.mixtures):
        problems.append(
            f"compare.mixtures names {project.whole.mixture.policy!r}, the recipe's own policy; mixtures are told by "
            "their policy: compare it under other options in a run of its own"
        )
    if recipe.routing is not None:
        for key, routers in (("routers", recipe.routing.routers or ()), ("build", recipe.routing.build)):
            for router in routers:
                try:
                    router_config(parse_router(router))
                except ConfigError as error:
                    problems.append(f"routing.{key}: {error}")
    if problems:
        raise ConfigError("\n".join(problems))
    return project
