"""`weftlm report`: one HTML page about one run or several."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from weftlm.cli.options import JsonOption, SetOption, print_json, say
from weftlm.errors import ConfigError


def run(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders, or recipes naming them.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Where the page goes; default: report.html in the first run.")
    ] = None,
    title: Annotated[str | None, typer.Option(help="Title of the page.")] = None,
    set_: SetOption = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be written, and do nothing.")] = False,
    json: JsonOption = False,
) -> None:
    """Write one self-contained HTML page about one run or several.

    The page needs no network: summary, mixture over time, alignments, loss curves, epochs and the resolved recipes.
    Unfinished runs are shown as far as they are.
    """
    from weftlm.pipeline.recipe import load_recipe

    folders = [load_recipe(run, set_ or []).run if run.suffix in (".yaml", ".yml") else run for run in runs]
    for folder in folders:
        if not folder.is_dir():
            raise ConfigError(f"{folder} is no run folder; weftlm train makes one")
    path = output if output is not None else folders[0] / "report.html"
    if dry_run:
        print_json({"report": str(path), "runs": [str(folder) for folder in folders]})
        return
    from weftlm.pipeline.report import report_runs

    report_runs(folders, path, title)
    if json:
        print_json({"report": str(path)})
    else:
        say(str(path))
