"""What any stage of a project would refuse, asked before the first one begins.

Every stage says itself what would make it fail (`Stage.check_recipe`, `Stage.check_files`), by the functions with which
it works later. All problems of the recipe alone are named at once, and where it has none, all that files, models and
other libraries show.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from weftlm.corpora.reading import known_labels
from weftlm.errors import ConfigError, DataError, WeftError
from weftlm.pipeline.data_config import RESERVED_NAMES, TARGET_DOMAIN
from weftlm.pipeline.identity import MANIFEST
from weftlm.pipeline.recipe import Recipe, load_recipe
from weftlm.pipeline.stage import stages_of
from weftlm.places import locate

PLACEHOLDER_VOCABULARY = 1024


def load_checked(
    path: str | Path,
    overrides: Sequence[str] = (),
    *,
    needs: Callable[[Recipe], None] = lambda recipe: None,
    ask: bool = False,
    here: bool = True,
) -> Recipe:
    """Read a recipe and check all of it; see `check_recipe`.

    Args:
        path: The recipe.
        overrides: `section.key=value` lines.
        needs: Refuses a recipe without the sections that the command works on: `require_training`, `require_experts`.
        ask: See `check_recipe`.
        here: See `check_recipe`.
    """
    recipe = load_recipe(path, overrides)
    needs(recipe)
    check_recipe(recipe, ask=ask, here=here, whole=False)
    return recipe


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
    known.attempt(_folders, recipe)
    for stage in stages_of(recipe):
        known.attempt(stage.check_recipe, recipe, known)
    known.refuse()
    for stage in stages_of(recipe):
        known.attempt(stage.check_files, recipe, known)
    known.refuse()


class Known:
    """What is known of a project before any work: its domains, base and experts, and the problems found so far.

    Attributes:
        here: Whether corpora, tasks and packages must be on this machine.
        whole: Whether all stages follow.
    """

    def __init__(self, recipe: Recipe, *, ask: bool = False, here: bool = True, whole: bool = True) -> None:
        self.here, self.whole = here, whole
        self._recipe, self._ask = recipe, ask
        self._problems: list[str] = []
        self._kinds: set[type[WeftError]] = set()

    def attempt(self, check: Callable[..., Any], *arguments: Any) -> None:
        """Carry out a check and note what it refuses."""
        try:
            check(*arguments)
        except WeftError as error:
            self._kinds.add(type(error))
            self._problems.extend(line for line in str(error).splitlines() if line not in self._problems)

    def locate(self, name: str | None, key: str, revision: str | None) -> None:
        """Note a model, tokenizer or adapter that is neither here nor on the hub; None is none."""
        if name is not None:
            self.attempt(lambda: locate(name, key, revision=revision, ask=self._ask))

    def refuse(self) -> None:
        """Raise what was noted, if anything was."""
        if self._problems:
            raise (DataError if self._kinds == {DataError} else ConfigError)("\n".join(self._problems))

    @property
    def prepared(self) -> bool:
        """Whether the data is prepared already."""
        return (self._recipe.prepared_folder / MANIFEST).exists()

    @cached_property
    def domains(self) -> list[str] | None:
        """Names of the domains; see `known_domains`."""
        return known_domains(self._recipe)

    @cached_property
    def base(self) -> Any | None:
        """Configuration of the model under the experts, before it is made or loaded; None where it is not here."""
        from weftlm.models.factory import architecture_config  # noqa: PLC0415 - transformers

        if not self._recipe.makes_experts:
            return None
        experts = self._recipe.expert_settings
        if experts.base is not None:
            return configuration(experts.base, experts.revision)
        model, _, training = self._recipe.trained
        if model.architecture is None:
            return configuration(str(model.pretrained), model.revision)
        return architecture_config(
            model, vocab_size=PLACEHOLDER_VOCABULARY, sequence_length=training.sequence_length, eos_id=0
        )

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
        made: Mapping[str, Any] = expert_domains(
            [SimpleNamespace(name=name) for name in self.domains],  # type: ignore[misc]
            experts.domains,
        )
        return [*made, *imported]


def _folders(recipe: Recipe) -> None:
    for key, folder in (("run", recipe.run), ("prepared", recipe.prepared_folder)):
        for place in (folder, *folder.parents):
            if place.exists():
                if not place.is_dir():
                    raise ConfigError(f"{key}: {place} is a file; name a folder, new or of an earlier run")
                break


def known_domains(recipe: Recipe) -> list[str] | None:
    """Names of the domains: of the prepared data, or of the recipe's labels where those are all there will be."""
    folder = recipe.prepared_folder
    if (folder / MANIFEST).exists():
        try:
            from weftlm.pipeline.prepared import read_manifest  # noqa: PLC0415 - torch

            return list(read_manifest(folder)["domains"])
        except DataError:
            return None
    data = recipe.data
    if data.domains.by == "clusters":
        return None
    labels: set[str] = set()
    for corpus in data.corpora:
        if data.domains.by == "file":
            corpus = corpus.model_copy(update={"label": None, "label_field": None, "label_from": "file"})
        try:
            found = known_labels(corpus)
        except DataError:  # the text is elsewhere
            found = None
        if found is None:
            return None
        labels |= found
    if reserved := sorted(RESERVED_NAMES.intersection(labels)):
        raise ConfigError(
            f"a domain may not be called {reserved[0]!r}, which names the target's own set; rename the label"
        )
    return [*sorted(labels), *([TARGET_DOMAIN] if data.domains.include_target else [])]


def configuration(name: str, revision: str | None) -> Any | None:
    """A model's configuration, of a folder or the hub's cache; None where it is not here."""
    from weftlm.models.open import pretrained_config  # noqa: PLC0415 - transformers

    try:
        return pretrained_config(name, revision)
    except ConfigError:
        return None
