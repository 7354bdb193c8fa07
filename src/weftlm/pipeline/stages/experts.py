"""The stage `experts`: an expert per domain, with its gate; and the section `experts` of a recipe."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from weftlm.config import Folder, Section, settings
from weftlm.corpora.labels import folder_name
from weftlm.errors import ConfigError
from weftlm.experts.config import ExpertTraining
from weftlm.pipeline.stage import Stage, StageOptions, stages
from weftlm.pipeline.stages.gate import check_domains

if TYPE_CHECKING:
    from weftlm.pipeline.checks import Known
    from weftlm.pipeline.recipe import Recipe


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


@stages.register("experts", does="an expert per domain, with its gate", costs="experts.training.tokens for each domain")
class Experts(Stage):
    """LoRA experts over a base, each made without the others, and adapters imported beside them."""

    needs = ("prepare", "train", "baselines")
    costly = True
    shared = True

    def needed(self, recipe: Recipe) -> tuple[str, ...]:
        """They wait for the baselines only where one of them is their base."""
        waits = recipe.expert_settings.baseline is not None
        return self.needs if waits else tuple(name for name in self.needs if name != "baselines")

    def wanted(self, recipe: Recipe) -> bool:
        return recipe.makes_experts

    def settings(self, recipe: Recipe) -> dict[str, Any]:
        experts = recipe.expert_settings
        return {
            "seed": recipe.seed,
            "experts": settings(experts, without=("library", "training")),
            "training": experts.training.deciding(),
        }

    def outputs(self, recipe: Recipe) -> list[Path]:
        return [recipe.library_folder / "library.json"]

    def check(self, recipe: Recipe, known: Known) -> None:
        experts = recipe.expert_settings
        known.locate(experts.base, "experts.base", experts.revision)
        for each in experts.imports:
            known.locate(each.source, "experts.imports: source", each.revision)
        known.attempt(self._check_adapters, recipe, known)
        known.attempt(self._check_base, recipe, known)

    def _check_adapters(self, recipe: Recipe, known: Known) -> None:
        from weftlm.models.lora_targets import check_targets  # noqa: PLC0415 - torch

        experts = recipe.expert_settings
        if experts.trains and known.base is not None:
            check_targets(known.base, experts.lora.target_modules, "experts.lora")

    def _check_base(self, recipe: Recipe, known: Known) -> None:
        from weftlm.pipeline.base import check_lengths  # noqa: PLC0415 - torch

        _ = known.experts
        if known.domains is not None:
            wanted = [each.domain for each in recipe.expert_settings.imports if each.domain is not None]
            check_domains(wanted, known.domains, "experts.imports")
        if recipe.expert_settings.base is not None and (Path(recipe.base) / "adapter_config.json").exists():
            raise ConfigError(
                f"the base {recipe.base} is an adapter over another model; name that model as experts.base, or merge "
                "the adapter into it first (PEFT: merge_and_unload, save_pretrained)"
            )
        corpora = [*recipe.data.corpora, *recipe.data.heldout]
        plain = ", ".join(sorted({corpus.name for corpus in corpora if corpus.prompt_field is None})[:5])
        if recipe.expert_settings.examples and plain:
            raise ConfigError(
                f"experts.examples is true and the documents of {plain} have no prompts; give them a prompt_field "
                "(data.corpora), or leave experts.examples out"
            )
        if known.base is None:
            return
        check_lengths(recipe, known.base)
        if not known.base.is_encoder_decoder:
            return
        targets = [*recipe.data.target, *recipe.data.target_heldout]
        plain_targets = ", ".join(sorted({each.name for each in targets if each.prompt_field is None})[:5])
        for wrong, why in (
            (
                plain,
                f"which learns from prompts and targets, and documents of {plain} have none; give their corpora a "
                "prompt_field, the held-out ones too",
            ),
            (
                recipe.expert_settings.examples is False,
                "which learns from examples; leave out experts.examples: false",
            ),
            (
                recipe.trains_monolith,
                "and compare.monolith trains the experts' base on windows of text; leave compare.monolith out",
            ),
            (recipe.gating is not None, "and gating scores texts token by token; leave gating out"),
            (plain_targets, f"and documents of the target {plain_targets} have no prompts; give them a prompt_field"),
        ):
            if wrong:
                raise ConfigError(f"the base {recipe.base} is an encoder-decoder model, {why}")

    def work(self, recipe: Recipe, options: StageOptions) -> None:
        from accelerate import PartialState  # noqa: PLC0415 - torch

        from weftlm.fan_out import processes  # noqa: PLC0415 - torch
        from weftlm.pipeline.expert_library import import_recipe_experts  # noqa: PLC0415 - torch
        from weftlm.pipeline.experts import remove_unwanted, train_experts  # noqa: PLC0415 - torch

        experts = recipe.expert_settings
        if experts.imports:
            import_recipe_experts(recipe, replace=options.replace, progress=options.progress)
        if experts.trains:
            with processes(options.processes) if options.processes > 1 else nullcontext() as executor:
                train_experts(recipe, replace=options.replace, executor=executor, progress=options.progress)
        if options.replace and experts.library is None and PartialState().is_main_process:
            remove_unwanted(recipe)
