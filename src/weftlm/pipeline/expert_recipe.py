"""The recipe of experts: a whole recipe with an `experts` section, or a small file for a base that exists already."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field

from weftlm.config import Folder, Section, Seed, apply_overrides, validate
from weftlm.corpora.labels import folder_name
from weftlm.errors import ConfigError
from weftlm.evaluation.config import EvaluationConfig
from weftlm.experts.expert import base_name
from weftlm.pipeline.data_config import DataConfig
from weftlm.pipeline.experts_config import ExpertsConfig
from weftlm.pipeline.gate_recipe import GatingConfig
from weftlm.pipeline.inherited import inherit
from weftlm.pipeline.names import DENSE, DIRECT, STUDENT
from weftlm.pipeline.project_config import RIVALS, RoutingConfig
from weftlm.pipeline.recipe import Recipe, make_recipe
from weftlm.recipe_text import read_yaml


class ExpertRecipe(Section):
    """What making, routing and judging experts needs of a recipe."""

    run: Folder = Field(description="run folder: everything the run writes goes there")
    prepared: Folder | None = Field(None, description="folder of the prepared data; absent: `data` in the run folder")
    seed: Seed = Field(0, description="of first values and of every draw")
    data: DataConfig = Field(description="corpora, target, domains and tokenizer")
    experts: ExpertsConfig = Field(
        default_factory=lambda: ExpertsConfig.model_validate({}), description="base, adapters, gates and statistics"
    )
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig, description="what is measured")
    routing: RoutingConfig | None = Field(None, description="routers over the experts, compared by `weftlm run`")
    gating: GatingConfig | None = Field(None, description="a gate over the experts; absent: the defaults")

    @property
    def prepared_folder(self) -> Path:
        """Where the prepared data lies."""
        return self.prepared if self.prepared is not None else self.run / "data"

    @property
    def base(self) -> str:
        """Folder or hub name of the base; an existing folder is told by its absolute path."""
        if self.experts.base is not None:
            return base_name(self.experts.base)
        return base_name(str(self.base_run / "model"))

    @property
    def base_run(self) -> Path:
        """The run whose model is the base, where the recipe trains it."""
        return self.run if self.experts.rival is None else self.run / RIVALS / self.experts.rival

    @property
    def library_folder(self) -> Path:
        """Where the experts go."""
        return self.experts.library if self.experts.library is not None else self.run / "experts"

    @property
    def scores_folder(self) -> Path:
        """Where the experts' scores go."""
        return self.run / "scores"

    @property
    def gate_folder(self) -> Path:
        """Where the fitted gate and its certificate go."""
        return self.run / "gate"

    @property
    def routed_folder(self) -> Path:
        """Where routed models go, one folder each."""
        return self.run / "routed"

    @property
    def students_folder(self) -> Path:
        """Where the students of the gate go."""
        return self.run / "students"

    def training_folder(self, name: str) -> Path:
        """Where an expert is trained: checkpoints and metrics."""
        return self.run / "training" / name

    def resolved(self) -> dict[str, Any]:
        """Every key with its value, defaults included, as plain YAML values."""
        value: dict[str, Any] = self.model_dump(mode="json")
        return value

    def to_yaml(self) -> str:
        """The resolved recipe."""
        return yaml.safe_dump(self.resolved(), sort_keys=False, allow_unicode=True)


WHOLE = frozenset(Recipe.model_fields) - frozenset(ExpertRecipe.model_fields)
"""Keys by which a whole recipe is known."""


def load_expert_recipe(path: str | Path, overrides: Sequence[str] = ()) -> ExpertRecipe:
    """Read a recipe and apply `section.key=value` overrides; see `make_expert_recipe`.

    Raises:
        ConfigError: one line for every problem.
    """
    return make_expert_recipe(apply_overrides(read_yaml(path), overrides))


def make_expert_recipe(value: Mapping[str, Any]) -> ExpertRecipe:
    """Validate a recipe of experts given as a mapping.

    Either a whole recipe with an `experts` section, whose base is the model it trains unless `experts.base` names
    another; or run, prepared, seed, data, evaluation and experts alone, and then `experts.base` is needed; or a gate
    over models that are there already (`gating.pool`), and then no base is.

    Raises:
        ConfigError: one line for every problem.
    """
    if WHOLE & set(value):
        recipe = make_recipe(value)
        known = {name: getattr(recipe, name) for name in ExpertRecipe.model_fields}
        if recipe.experts is None:
            if recipe.gating is None or recipe.gating.pool is None:
                raise ConfigError(
                    "experts: missing; add a section `experts: {}`, whose defaults will do, to make experts"
                )
            known["experts"] = validate(ExpertsConfig, inherit({**value, "experts": {}})["experts"], "experts")
        elif recipe.experts.rival is not None:
            rivals = [each.policy for each in recipe.compare.mixtures]
            if recipe.experts.rival not in rivals:
                raise ConfigError(
                    f"experts.rival is {recipe.experts.rival!r}, which compare.mixtures does not train; it names "
                    f"{', '.join(rivals) or 'none'}"
                )
        return ExpertRecipe.model_validate(known)
    small = validate(ExpertRecipe, inherit(value), "")
    if small.experts.rival is not None:
        raise ConfigError("experts.rival names a mixture that is trained here; this recipe trains no model: give base")
    if small.experts.base is None and (small.gating is None or small.gating.pool is None):
        raise ConfigError(
            "experts.base: missing; name the base model (a folder or hub name), or add the sections that train one: "
            "model, mixture and training"
        )
    return small


def expert_plan(recipe: ExpertRecipe) -> dict[str, Any]:
    """What making the experts will do, before anything is read."""
    config = recipe.experts
    training = config.training
    return {
        "base": recipe.base,
        "library": str(recipe.library_folder),
        "domains": "every domain of the data" if config.domains is None else ", ".join(config.domains),
        "rank": config.lora.rank,
        "steps_per_expert": training.total_steps,
        "tokens_per_expert": training.total_tokens,
        "gate_steps": config.gate.steps,
        "statistics_examples": config.statistics_examples,
    }


def gating_config(recipe: ExpertRecipe) -> GatingConfig:
    """The recipe's `gating` section; where it has none, the defaults, which follow its other sections."""
    if recipe.gating is not None:
        return recipe.gating
    found: GatingConfig = validate(GatingConfig, inherit({**recipe.resolved(), "gating": {}})["gating"], "gating")
    return found


def routing_config(recipe: ExpertRecipe) -> RoutingConfig:
    """The recipe's `routing` section; the defaults where it has none."""
    return RoutingConfig() if recipe.routing is None else recipe.routing


def routed_folder(recipe: ExpertRecipe, router: str) -> Path:
    """Where a routed model is written."""
    return recipe.routed_folder / folder_name(router)


def gate_plan(recipe: ExpertRecipe) -> dict[str, Any]:
    """What scoring, fitting and certifying will do, before anything is read."""
    config = gating_config(recipe)
    return {
        **_plan_of_pool(recipe, config),
        "domains": "every domain with held-out text" if config.domains is None else ", ".join(config.domains),
        "scores": str(recipe.scores_folder),
        "tokens_per_domain": f"{config.scores.sequences * config.scores.length} at most",
        "samples_per_expert": config.scores.samples,
        "gate": config.gate.gate,
        "fit_steps": config.fit.steps,
        "result": str(recipe.gate_folder),
    }


def _plan_of_pool(recipe: ExpertRecipe, config: GatingConfig) -> dict[str, str]:
    if config.pool is not None:
        return {"experts": ", ".join(source.name for source in config.pool)}
    named = "every expert of the library" if config.experts is None else ", ".join(config.experts)
    return {"base": recipe.base, "library": str(recipe.library_folder), "experts": named}


def student_plan(recipe: ExpertRecipe, *, direct: bool) -> dict[str, Any]:
    """What distilling will do, before anything is read."""
    config, kind = gating_config(recipe).students, DIRECT if direct else STUDENT
    names = [kind, *(f"{kind}-top-{m}" for m in sorted(set(config.experts_per_token)))]
    if config.dense is not None:
        names.append(DENSE if kind == STUDENT else f"{kind}-{DENSE}")
    return {
        "gate": "trained on the minimax objective" if direct else str(recipe.gate_folder),
        "scores": str(recipe.scores_folder),
        "steps": config.direct.fit.steps if direct else config.distil.steps,
        "students": ", ".join(names),
        "result": str(recipe.students_folder),
    }
