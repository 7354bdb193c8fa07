"""The recipe: one YAML file per run, every section strict."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, SerializeAsAny, field_validator

from weftlm.config import Folder, Section, Seed, apply_overrides, validate
from weftlm.errors import ConfigError, install_hint
from weftlm.evaluation.config import EvaluationConfig
from weftlm.mixture.config import PolicyConfig, policy_config
from weftlm.models.config import ModelConfig
from weftlm.pipeline.data_config import DataConfig
from weftlm.pipeline.experts_config import ExpertsConfig
from weftlm.pipeline.gate_recipe import GatingConfig
from weftlm.pipeline.inherited import inherit
from weftlm.pipeline.project_config import CompareConfig, RoutingConfig
from weftlm.recipe_text import read_yaml
from weftlm.training.config import NOT_DECIDING, AlignmentConfig, TrainingConfig


class Recipe(Section):
    """A whole run: what to read, which model to train, on which mixture, and how to judge it."""

    run: Folder = Field(description="run folder: everything the run writes goes there")
    prepared: Folder | None = Field(
        None,
        description="folder of the prepared data, shared by runs on the same data; absent: `data` in the run folder",
    )
    seed: Seed = Field(0, description="of initial weights, the draw, the probes and dropout")
    data: DataConfig = Field(description="corpora, target, domains and tokenizer")
    model: ModelConfig = Field(description="the model to train")
    mixture: SerializeAsAny[PolicyConfig] = Field(description="mixture policy and its options")
    alignment: AlignmentConfig = Field(
        default_factory=AlignmentConfig, description="how gradient alignment is measured"
    )
    training: TrainingConfig = Field(description="length, optimizer, precision, checkpoints")
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig, description="what is measured, how often")
    trackers: list[Literal["tensorboard", "wandb"]] = Field(
        default_factory=list, description="where metrics also go, beside metrics.jsonl"
    )
    experts: ExpertsConfig | None = Field(None, description="experts over a base, made by `weftlm experts train`")
    routing: RoutingConfig | None = Field(None, description="routers over the experts, compared by `weftlm run`")
    gating: GatingConfig | None = Field(None, description="a gate over the experts, made by `weftlm gate fit`")
    compare: CompareConfig = Field(default_factory=CompareConfig, description="rivals that `weftlm run` trains beside")

    @field_validator("mixture", mode="before")
    @classmethod
    def _by_policy(cls, value: Any) -> Any:
        return policy_config(value) if isinstance(value, Mapping) else value

    @property
    def prepared_folder(self) -> Path:
        """Where the prepared data lies."""
        return self.prepared if self.prepared is not None else self.run / "data"

    def resolved(self) -> dict[str, Any]:
        """Every key with its value, defaults included, as plain YAML values."""
        value: dict[str, Any] = self.model_dump(mode="json")
        return value

    def to_yaml(self) -> str:
        """The resolved recipe; reading it again gives this recipe."""
        return yaml.safe_dump(self.resolved(), sort_keys=False, allow_unicode=True)

    def deciding(self) -> dict[str, Any]:
        """All of the recipe that decides the trained weights, but the data."""
        value = self.resolved()
        for key in ("run", "prepared", "evaluation", "data", "trackers", "experts", "routing", "gating", "compare"):
            del value[key]
        for key in NOT_DECIDING:
            del value["training"][key]
        return value

    def identity(self, data_fingerprint: str) -> str:
        """Hash of all that decides the trained weights: two runs of the same identity are the same run."""
        text = json.dumps([self.deciding(), data_fingerprint], sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


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
    mixture = value.get("mixture")
    if isinstance(mixture, Mapping):
        policy_config(mixture)  # reports an unknown policy or key by its own name
    return validate(Recipe, inherit(value), "")


def check(recipe: Recipe, *, packages: bool = True) -> None:
    """Refuse what can be seen to be wrong before anything is read.

    Args:
        recipe: of a training.
        packages: whether those of its trackers must be installed.
    Raises:
        ConfigError: the policy follows a target and there is none, or a tracker is not installed.
    """
    needs, name = recipe.mixture.needs, recipe.mixture.policy
    if needs & {"target_alignment", "target_histogram"} and not recipe.data.target:
        raise ConfigError(f"mixture policy {name!r} follows a target and the data has none; give data.target")
    if "basis" in needs and recipe.data.domains.basis is None:
        raise ConfigError(f"mixture policy {name!r} reweights distributions; say which in data.domains.basis")
    for tracker in recipe.trackers if packages else ():
        if find_spec(tracker) is None:
            raise ConfigError(f"trackers names {tracker}, which is not installed; {install_hint(tracker)}")
