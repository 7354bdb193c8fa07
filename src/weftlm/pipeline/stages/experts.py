"""The stage `experts`: an expert per domain, with its gate."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

from weftlm.config import settings
from weftlm.errors import ConfigError
from weftlm.pipeline.checks import Known
from weftlm.pipeline.gate_recipe import check_domains
from weftlm.pipeline.recipe import Recipe
from weftlm.pipeline.stage import Stage, StageOptions, stages


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
        from weftlm.pipeline.experts import check_experts  # noqa: PLC0415 - torch

        experts = recipe.expert_settings
        known.locate(experts.base, "experts.base", experts.revision)
        for each in experts.imports:
            known.locate(each.source, "experts.imports: source", each.revision)
        known.attempt(check_experts, recipe, recipe.model)
        known.attempt(self._check_base, recipe, known)

    def _check_base(self, recipe: Recipe, known: Known) -> None:
        from weftlm.pipeline.base import check_base_kind, check_lengths  # noqa: PLC0415 - torch

        _ = known.experts
        if known.domains is not None:
            wanted = [each.domain for each in recipe.expert_settings.imports if each.domain is not None]
            check_domains(wanted, known.domains, "experts.imports")
        if recipe.expert_settings.base is not None:
            check_base_kind(recipe.base)
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
