"""What a stage of a project is: a class in a file of its own under `stages/`, found by the registry.

A stage says which recipes have it, what of a recipe decides its result, which files it leaves, what would make it fail,
how it is carried out, and what it adds to the summary and the page. Another package adds one by an entry point of the
group `weftlm.stages`; its settings are those under `stages: {NAME: ...}` of a recipe, checked by the stage's `Config`.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from weftlm.artifact import Artifact
from weftlm.config import Section
from weftlm.files import remove
from weftlm.registry import Registry

if TYPE_CHECKING:
    from weftlm.pipeline.checks import Known
    from weftlm.pipeline.recipe import Recipe

_CURE = "delete it, and the stage is looked at again"

stages: Registry[Stage] = Registry("stage", "weftlm.pipeline.stages", "stage", "weftlm.stages")


@dataclass(frozen=True)
class StageOptions:
    """How a stage is carried out.

    Attributes:
        replace: Whether to discard what is there of other settings.
        processes: Number of experts made at once.
        progress: Whether to show progress on stderr.
    """

    replace: bool = False
    processes: int = 1
    progress: bool = True


class Stage(ABC):
    """One step of a project.

    Args:
        name: Name it is registered under, as `--from` and `--until` take it.

    Attributes:
        needs: Names of the stages whose results it reads, where a project has them.
        costly: Whether its result is replaced only on request (`--from`).
        shared: Whether the processes of torchrun share its work; the others leave it to the first.
        Config: Settings of a stage of another package; None where its settings are sections of the recipe.
    """

    needs: ClassVar[tuple[str, ...]] = ()
    costly: ClassVar[bool] = False
    shared: ClassVar[bool] = False
    Config: ClassVar[type[Section] | None] = None

    def __init__(self, name: str) -> None:
        self.name = name

    @property
    def title(self) -> str:
        """What it does, in a few words."""
        return stages.entry(self.name).does

    def needed(self, recipe: Recipe) -> tuple[str, ...]:
        """The stages that it reads in this project."""
        return self.needs

    def wanted(self, recipe: Recipe) -> bool:
        """Whether a project has it: by default always, or where the recipe has settings of another package's."""
        return self.Config is None or self.name in recipe.stages

    def settings(self, recipe: Recipe) -> dict[str, Any]:
        """All in the recipe that decides its result, as JSON values; those of another package: its `Config`."""
        return dict(recipe.stages[self.name])

    @abstractmethod
    def outputs(self, recipe: Recipe) -> Sequence[Path]:
        """The files that are there when it is done, in the order of reading."""

    def discarded(self, recipe: Recipe) -> Sequence[Path]:
        """Files and folders to remove before it is made again; by default the outputs, but none of a costly stage.

        Its work is to replace what it must itself (`StageOptions.replace`).
        """
        return () if self.costly else self.outputs(recipe)

    def check(self, recipe: Recipe, known: Known) -> None:
        """Refuse what would make it fail; nothing is trained, downloaded or written.

        Raises:
            ConfigError, DataError: One line for every problem.
        """
        return

    @abstractmethod
    def work(self, recipe: Recipe, options: StageOptions) -> None:
        """Carry it out; resumes what was interrupted and keeps what is finished."""

    def shown(self, recipe: Recipe) -> tuple[dict[str, Any], dict[str, Any]]:
        """Its part of summary.json, and of the arguments of `report_page`, where it is done.

        Mappings that several stages give under one key become one.
        """
        return {}, {}

    # -- its record -----------------------------------------------------------------------------------------------

    def record(self, recipe: Recipe) -> Artifact:
        """What is known of it in the run folder: stages/NAME.json, decided by its settings."""
        return Artifact(recipe.stages_folder / f"{self.name}.json", self.settings(recipe), _CURE)

    def known(self, recipe: Recipe) -> tuple[bool, dict[str, Any]] | None:
        """Whether it is finished, and its record, whatever its settings; None where it never began.

        Raises:
            DataError: The record is torn.
        """
        return Artifact(recipe.stages_folder / f"{self.name}.json", {}, _CURE).last()

    def left(self, recipe: Recipe) -> list[str]:
        """Its outputs: those in the run folder by their paths from the folder of the records, others by absolute ones.

        A run folder may be moved; a path out of it would be another one behind a link.
        """
        return [
            os.path.relpath(path, recipe.stages_folder) if path.is_relative_to(recipe.run) else os.path.abspath(path)
            for path in self.outputs(recipe)
        ]

    def clear(self, recipe: Recipe) -> None:
        """Remove what an earlier making left: first that by which it is known to be done."""
        discarded = self.discarded(recipe)
        for path in dict.fromkeys([*(self.outputs(recipe) if discarded else ()), *discarded]):
            remove(path)


def stages_of(recipe: Recipe) -> tuple[Stage, ...]:
    """The stages that a project has, in the order in which they are carried out: each after those that it needs."""
    found = {name: stages[name](name) for name in stages}

    def depth(name: str) -> int:
        return 1 + max((depth(each) for each in found[name].needs if each in found), default=0)

    ordered = sorted(found.values(), key=lambda stage: (depth(stage.name), stage.name))
    return tuple(stage for stage in ordered if stage.wanted(recipe))
