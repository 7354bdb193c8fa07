"""The recipe: one YAML file for a run folder, with the sections of what is wanted of it.

`model`, `mixture` and `training` train a language model; `experts` makes experts over it or over a given base;
`routing` compares routers over the experts; `gating` fits a robust gate over them, or over the models of `gating.pool`;
`compare` trains baselines. Every section is defined in the room that it configures.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import Field, SerializeAsAny, field_validator

from weftlm.config import Folder, Section, Seed, apply_overrides, settings, validate
from weftlm.corpora.labels import folder_name
from weftlm.errors import ConfigError
from weftlm.evaluation.config import EvaluationConfig
from weftlm.experts.expert import base_name
from weftlm.mixture.config import PolicyConfig, policy_config
from weftlm.models.config import ModelConfig
from weftlm.pipeline.data_config import DataConfig
from weftlm.pipeline.inherited import inherit
from weftlm.pipeline.names import MONOLITH, REPORT
from weftlm.pipeline.stage import stages
from weftlm.pipeline.stages.baselines import CompareConfig
from weftlm.pipeline.stages.experts import ExpertsConfig
from weftlm.pipeline.stages.gate import GatingConfig
from weftlm.pipeline.stages.route import RoutingConfig
from weftlm.recipe_text import read_yaml
from weftlm.training.config import AlignmentConfig, TrainingConfig

_TRAINED = ("model", "mixture", "training")
_OF_A_TRAINING = (*_TRAINED, "alignment", "trackers", "compare")
S = TypeVar("S", bound=Section)


class Recipe(Section):
    """What to read, what to train on it, and how to judge it."""

    run: Folder = Field(description="run folder: everything the run writes goes there")
    prepared: Folder | None = Field(
        None,
        description="folder of the prepared data, shared by runs on the same data; absent: `data` in the run folder",
    )
    seed: Seed = Field(0, description="random seed of initial weights, draws, probes and dropout")
    data: DataConfig = Field(description="corpora, target, domains and tokenizer")
    model: ModelConfig | None = Field(None, description="the model to train; absent: none is trained")
    mixture: SerializeAsAny[PolicyConfig] | None = Field(None, description="mixture policy and its options")
    alignment: AlignmentConfig = Field(default_factory=AlignmentConfig, description="measurement of gradient alignment")
    training: TrainingConfig | None = Field(None, description="length, optimizer, precision, checkpoints")
    evaluation: EvaluationConfig = Field(
        default_factory=EvaluationConfig, description="evaluation: sets, tasks, interval"
    )
    trackers: list[Literal["tensorboard", "wandb"]] = Field(
        default_factory=list, description="trackers that receive metrics beside metrics.jsonl"
    )
    experts: ExpertsConfig | None = Field(None, description="experts over a base, made by `weftlm experts train`")
    routing: RoutingConfig | None = Field(None, description="routers over the experts, compared by `weftlm run`")
    gating: GatingConfig | None = Field(None, description="a gate over the experts, made by `weftlm gate fit`")
    compare: CompareConfig = Field(
        default_factory=CompareConfig, description="baselines that `weftlm run` trains beside"
    )
    stages: dict[str, Any] = Field(
        default_factory=dict, description="settings of stages of other packages, by the stage's name"
    )

    @field_validator("mixture", mode="before")
    @classmethod
    def _by_policy(cls, value: Any) -> Any:
        return policy_config(value) if isinstance(value, Mapping) else value

    @field_validator("stages")
    @classmethod
    def _of_other_packages(cls, value: dict[str, Any]) -> dict[str, Any]:
        found = {}
        for name, given in value.items():
            section = stages[name].Config
            if section is None:
                raise ConfigError(f"stages.{name} is a stage of weftlm, whose settings are sections of the recipe")
            found[name] = validate(section, given, f"stages.{name}").model_dump(mode="json")
        return found

    # -- what it asks for -----------------------------------------------------------------------------------------

    @property
    def trains(self) -> bool:
        """Whether a language model is trained."""
        return self.model is not None

    @property
    def trained(self) -> tuple[ModelConfig, PolicyConfig, TrainingConfig]:
        """The sections `model`, `mixture` and `training`.

        Raises:
            ConfigError: one is missing.
        """
        if self.model is None or self.mixture is None or self.training is None:
            raise ConfigError("\n".join(f"{name}: missing" for name in _TRAINED if getattr(self, name) is None))
        return self.model, self.mixture, self.training

    @property
    def makes_experts(self) -> bool:
        """Whether experts are trained or imported."""
        return self.experts is not None and (self.trains or self.experts.base is not None)

    @property
    def has_experts(self) -> bool:
        """Whether there are experts to put a gate over: made here, or named in `gating.pool`."""
        return self.makes_experts or (self.gating is not None and self.gating.pool is not None)

    @property
    def has_gate(self) -> bool:
        """Whether a gate is fitted over experts."""
        return self.has_experts and self.gating is not None

    @property
    def trains_monolith(self) -> bool:
        """Whether a single model is trained beside the experts."""
        return self.compare.monolith and self.makes_experts

    @property
    def expert_settings(self) -> ExpertsConfig:
        """The `experts` section; where there is none, the defaults, which follow the other sections."""
        return self.experts or self._defaults("experts", ExpertsConfig)

    @property
    def gating_settings(self) -> GatingConfig:
        """The `gating` section; where there is none, the defaults, which follow the other sections."""
        return self.gating or self._defaults("gating", GatingConfig)

    def _defaults(self, name: str, section: type[S]) -> S:
        return validate(section, inherit({**self.resolved(), name: {}})[name], name)

    def gating_deciding(self, *keys: str) -> dict[str, Any]:
        """The seed and some keys of the `gating` section, as the identity of a result."""
        return {"seed": self.seed, "gating": settings(self.gating_settings, only=keys)}

    @property
    def routing_settings(self) -> RoutingConfig:
        """The `routing` section, or the defaults where there is none."""
        return RoutingConfig() if self.routing is None else self.routing

    # -- where it goes --------------------------------------------------------------------------------------------

    @property
    def prepared_folder(self) -> Path:
        """Folder of the prepared data."""
        return self.prepared if self.prepared is not None else self.run / "data"

    @property
    def baselines_folder(self) -> Path:
        """Folder in which the baselines are trained, each in a folder of its own."""
        return self.run / "baselines"

    @property
    def base(self) -> str:
        """Folder or hub name of the base; an existing folder by its absolute path."""
        given = self.expert_settings.base
        return base_name(str(self.base_run / "model") if given is None else given)

    @property
    def base_run(self) -> Path:
        """The run whose model is the base, where the recipe trains it."""
        baseline = self.expert_settings.baseline
        return self.run if baseline is None else self.baselines_folder / baseline

    @property
    def library_folder(self) -> Path:
        """Folder of the experts."""
        library = self.expert_settings.library
        return library if library is not None else self.run / "experts"

    @property
    def scores_folder(self) -> Path:
        """Folder of the experts' scores."""
        return self.run / "scores"

    @property
    def gate_folder(self) -> Path:
        """Folder of the fitted gate and its certificate."""
        return self.run / "gate"

    @property
    def students_folder(self) -> Path:
        """Folder of the students of the gate."""
        return self.run / "students"

    @property
    def stages_folder(self) -> Path:
        """Folder of the records of the stages."""
        return self.run / "stages"

    def training_folder(self, name: str) -> Path:
        """Folder in which an expert is trained: checkpoints and metrics."""
        return self.run / "training" / name

    def routed_folder(self, router: str) -> Path:
        """Folder of a routed model."""
        return self.run / "routed" / folder_name(router)

    # -- recipes of the models beside it --------------------------------------------------------------------------

    def baseline(self, policy: PolicyConfig) -> Recipe:
        """The recipe of the same model on another mixture."""
        return self._beside(policy.policy, {"mixture": policy})

    def monolith(self, experts: int) -> Recipe:
        """The recipe of the gate's baseline: the experts' base, trained for as many tokens as all experts together."""
        given, tokens = self.expert_settings, experts * self.expert_settings.training.total_tokens
        changed = {
            "model": ModelConfig(pretrained=self.base, revision=given.revision),
            "mixture": policy_config({"policy": "uniform"}),
            "training": self.trained[2].model_copy(update={"tokens": tokens, "steps": None}),
            "evaluation": self.evaluation.model_copy(update={"every_steps": None}),
        }
        return self._beside(MONOLITH, changed)

    def _beside(self, name: str, changed: Mapping[str, Any]) -> Recipe:
        folders = {"run": self.baselines_folder / name, "prepared": self.prepared_folder}
        return self.model_copy(update={**changed, **folders})

    # -- as text --------------------------------------------------------------------------------------------------

    def resolved(self) -> dict[str, Any]:
        """Every key with its value, defaults included, as plain YAML values."""
        return self.model_dump(mode="json", exclude=set() if self.trains else set(_OF_A_TRAINING))

    def to_yaml(self) -> str:
        """The resolved recipe; reading it again gives this recipe."""
        return yaml.safe_dump(self.resolved(), sort_keys=False, allow_unicode=True)

    def deciding(self) -> dict[str, Any]:
        """All of the recipe that decides the trained weights, but the data."""
        model, mixture, training = self.trained
        sections = {"model": model, "mixture": mixture, "alignment": self.alignment}
        decided = {name: settings(section) for name, section in sections.items()}
        return {"seed": self.seed, **decided, "training": training.deciding()}


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe and apply `section.key=value` overrides.

    Raises:
        ConfigError: one line for every problem.
    """
    return make_recipe(apply_overrides(read_yaml(path), overrides))


def make_recipe(value: Mapping[str, Any]) -> Recipe:
    """Validate a recipe given as a mapping.

    Raises:
        ConfigError: one line for every problem.
    """
    problems = []
    if any(value.get(name) is not None for name in _OF_A_TRAINING):
        problems += [f"{name}: missing" for name in _TRAINED if value.get(name) is None]
    try:
        validate(Recipe, value, "")  # what is wrong is said where it was written, and there alone
        recipe = validate(Recipe, inherit(value), "")
    except ConfigError as error:
        raise ConfigError("\n".join([*problems, str(error)])) from None
    if problems or (problems := _contradictions(recipe)):
        raise ConfigError("\n".join(problems))
    return recipe


def _contradictions(recipe: Recipe) -> list[str]:
    """Sections that nothing would be made of, or that would fail hours later."""
    problems = []
    mixtures = [each.policy for each in recipe.compare.mixtures]
    baseline = None if recipe.experts is None else recipe.experts.baseline
    if baseline is not None and not recipe.trains:
        problems.append("experts.baseline names a mixture that is trained here; this recipe trains no model: give base")
    elif baseline not in (None, *mixtures):
        problems.append(
            f"experts.baseline is {baseline!r}, which compare.mixtures does not train; it names "
            f"{', '.join(mixtures) or 'none'}"
        )
    elif not recipe.trains and not recipe.has_experts:
        problems.append(
            "experts.base: missing; name the base model (a folder or hub name), or add the sections that train one: "
            "model, mixture and training"
        )
    elif not recipe.makes_experts:
        if recipe.routing is not None:
            problems.append("routing compares routers over experts, and none are made; add a section `experts: {}`")
        if recipe.gating is not None and recipe.gating.pool is None:
            problems.append("gating needs experts; add a section `experts: {}`, or name models in gating.pool")
        if recipe.compare.monolith:
            problems.append("compare.monolith is the baseline of experts, and none are made; leave it out")
    if recipe.mixture is not None and recipe.mixture.policy in mixtures:
        problems.append(
            f"compare.mixtures names {recipe.mixture.policy!r}, the recipe's own policy; mixtures are named by their "
            "policy: compare it under other options in a run of its own"
        )
    return problems


def require_experts(recipe: Recipe) -> None:
    """Refuse a recipe that has no experts.

    Raises:
        ConfigError: it has neither a section `experts` nor models in `gating.pool`.
    """
    if not recipe.has_experts:
        raise ConfigError("experts: missing; add a section `experts: {}`, whose defaults will do, to make experts")


# -- the recipe of a run folder ---------------------------------------------------------------------------------------


def kept_recipe(run: Path) -> Path:
    """The file in which `weftlm run` keeps the recipe it last carried out in a run folder."""
    return run / "stages" / "recipe.yaml"


def open_run(run: Path) -> Recipe:
    """The recipe that `weftlm run` last carried out in a run folder.

    Raises:
        ConfigError: there is none, or it cannot be read.
    """
    kept = kept_recipe(run)
    if not kept.exists():
        raise ConfigError(f"{run} is no run folder of weftlm run ({kept} is not there); run a recipe first")
    try:
        return load_recipe(kept, [f"run={json.dumps(str(run))}"])
    except ConfigError as error:
        raise ConfigError(f"{kept} cannot be read: {error}; run the recipe again") from error


def refuse_project_page(path: Path) -> None:
    """Refuse to write another page over that of a whole project.

    Raises:
        ConfigError: it would be.
    """
    if path.name == REPORT and kept_recipe(path.parent).exists():
        raise ConfigError(f"{path} is the page of a whole project; give another file")
