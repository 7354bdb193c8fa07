"""What any stage of a project would refuse, asked before the first one begins.

Every stage says itself what would make it fail (`Stage.check`), by the functions with which it works later; all
problems are named at once.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from weftlm.corpora.reading import known_labels
from weftlm.errors import ConfigError, DataError, WeftError
from weftlm.pipeline.data_config import MANIFEST, TARGET_DOMAIN, refuse_reserved
from weftlm.pipeline.recipe import Recipe
from weftlm.pipeline.stage import stages_of
from weftlm.places import locate


def check_recipe(recipe: Recipe, *, ask: bool = False, here: bool = True, whole: bool = True) -> None:
    """Refuse a project that some stage of it would refuse.

    Args:
        recipe: The recipe.
        ask: Whether to ask the hub for the models and data that are named and not here.
        here: Whether corpora, tasks and packages must be on this machine.
        whole: Whether all stages follow, the distillation of a fitted gate too.
    Raises:
        ConfigError: One line for every problem.
        DataError: Likewise, where text alone is missing or faulty.
    """
    known = Known(recipe, ask=ask, here=here, whole=whole)
    for key, folder in (("run", recipe.run), ("prepared", recipe.prepared_folder)):
        known.attempt(_check_folder, key, folder)
    for stage in stages_of(recipe):
        known.attempt(stage.check, recipe, known)
    if known.problems:
        raise (DataError if known.of_text_alone else ConfigError)("\n".join(known.problems))


def _check_folder(key: str, folder: Path) -> None:
    there = next((place for place in (folder, *folder.parents) if place.exists()), None)
    if there is not None and not there.is_dir():
        raise ConfigError(f"{key}: {there} is a file; name a folder, new or of an earlier run")


class Known:
    """What is known of a project before any work: its domains, base and experts, and the problems found so far.

    Attributes:
        here: Whether corpora, tasks and packages must be on this machine.
        whole: Whether all stages follow.
        problems: One line for every problem.
        of_text_alone: Whether all of them are of text that is missing or faulty.
    """

    def __init__(self, recipe: Recipe, *, ask: bool, here: bool, whole: bool) -> None:
        self.here, self.whole = here, whole
        self._recipe, self._ask = recipe, ask
        self.problems: list[str] = []
        self.of_text_alone = True

    def attempt(self, check: Callable[..., Any], *arguments: Any) -> None:
        """Carry out a check and note what it refuses."""
        try:
            check(*arguments)
        except WeftError as error:
            self.of_text_alone &= type(error) is DataError
            self.problems += [line for line in str(error).splitlines() if line not in self.problems]

    def locate(self, name: str | None, key: str, revision: str | None = None) -> None:
        """Note a model, tokenizer or adapter that is neither here nor on the hub; None is none."""
        if name is not None:
            self.attempt(lambda: locate(name, key, revision=revision, ask=self._ask))

    @cached_property
    def domains(self) -> list[str] | None:
        """Names of the domains; see `known_domains`."""
        return known_domains(self._recipe)

    @cached_property
    def base(self) -> Any | None:
        """Configuration of the model under the experts, before it is made or loaded; None where it is not here."""
        from weftlm.models.factory import config_to_be  # noqa: PLC0415 - transformers
        from weftlm.models.open import config_at_hand  # noqa: PLC0415 - transformers

        if not self._recipe.makes_experts:
            return None
        experts = self._recipe.expert_settings
        if experts.base is not None:
            return config_at_hand(experts.base, experts.revision)
        model, _, training = self._recipe.trained
        return config_to_be(model, sequence_length=training.sequence_length)

    @cached_property
    def experts(self) -> list[str] | None:
        """Names of the experts that will be in the library; None where the domains are not known."""
        from weftlm.pipeline.experts import expert_domains  # noqa: PLC0415 - torch

        if not self._recipe.makes_experts:
            return None
        experts = self._recipe.expert_settings
        imported = [each.title for each in experts.imports]
        if not experts.trains:
            return imported
        if self.domains is None:
            return None
        domains: Any = [SimpleNamespace(name=name) for name in self.domains]
        return [*expert_domains(domains, experts.domains), *imported]


def known_domains(recipe: Recipe) -> list[str] | None:
    """Names of the domains: of the prepared data, or of the recipe's labels where those are all there will be."""
    folder, data = recipe.prepared_folder, recipe.data
    try:
        if (folder / MANIFEST).exists():
            from weftlm.pipeline.prepared import read_manifest  # noqa: PLC0415 - torch

            return list(read_manifest(folder)["domains"])
        others = data.domains.by == "clusters" or data.domains.small == "other"  # domains that no label names
        found = [None] if others else [known_labels(each) for each in data.labelled("corpora")]
    except DataError:  # the text is elsewhere
        return None
    labels = {label for each in found for label in each or ()}
    refuse_reserved(labels)
    if None in found:
        return None
    return [*sorted(labels), *([TARGET_DOMAIN] if data.domains.include_target else [])]
