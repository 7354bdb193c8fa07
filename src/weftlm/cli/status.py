"""`weftlm status`: what of a run folder is done, running, stale."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from weftlm.cli.folders import takes
from weftlm.cli.options import JsonOption, number, print_json, print_table

if TYPE_CHECKING:
    from weftlm.pipeline.recipe import Recipe
    from weftlm.pipeline.runner import StageStatus


def run(
    folder: Annotated[
        Path,
        typer.Argument(metavar="RUN", help="Run folder of weftlm run.", show_default=False, callback=takes("project")),
    ],
    json: JsonOption = False,
) -> None:
    """Show what of a run folder is done, running, interrupted, failed, stale or to do, and why.

    The recipe is the one weftlm run last carried out there; texts and settings are compared with what the results were
    made of.
    """
    from weftlm.pipeline.recipe import open_run
    from weftlm.pipeline.runner import project_status

    project = open_run(folder)
    show_status(project, project_status(project), json)


def show_status(project: Recipe, found: Sequence[StageStatus], json: bool) -> None:
    """Print where every stage stands."""
    if json:
        print_json({"run": str(project.run), "stages": [status.to_json() for status in found]})
        return
    print_table(
        str(project.run),
        ["stage", "what", "state", "s", "why"],
        [
            [status.stage.name, status.stage.title, status.state, number(status.seconds, 1), status.why]
            for status in found
        ],
    )
