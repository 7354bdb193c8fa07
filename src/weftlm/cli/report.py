"""`weftlm report`: one HTML page about one run or several, or about a project."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from weftlm.cli.folders import takes
from weftlm.cli.options import JsonOption, SetOption, print_json, say
from weftlm.errors import ConfigError
from weftlm.pipeline.names import COMPARED, EVALUATION, REPORT, TRAINING


def run(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Run folders, or recipes naming them.", callback=takes("run"))
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="Where the page goes. Default: in the first folder report.html; compared.html of several runs, "
            "training.html of a project whose models are not measured yet.",
            show_default=False,
        ),
    ] = None,
    title: Annotated[str | None, typer.Option(help="Title of the page.")] = None,
    set_: SetOption = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be written, and do nothing.")] = False,
    json: JsonOption = False,
) -> None:
    """Write one self-contained HTML page about one run or several, or about a project of weftlm run.

    The page needs no network: summary, mixture over time, alignments, loss curves, epochs and the resolved recipes.
    Unfinished runs are shown as far as they are.
    """
    from weftlm.pipeline.recipe import kept_recipe, load_recipe, open_run, refuse_project_page

    folders = [load_recipe(run, set_ or []).run if run.suffix in (".yaml", ".yml") else run for run in runs]
    for folder in folders:
        if not folder.is_dir():
            raise ConfigError(f"{folder} is no run folder; weftlm train makes one")
    alone = len(folders) == 1 and kept_recipe(folders[0]).exists()
    whole = alone and (folders[0] / EVALUATION).exists()
    page = folders[0] / (REPORT if whole or (len(folders) == 1 and not alone) else TRAINING if alone else COMPARED)
    path = page if output is None else output
    renewed = whole and path.resolve() == page.resolve()
    if not renewed:
        refuse_project_page(path)
    if dry_run:
        print_json({"report": str(path), "runs": [str(folder) for folder in folders]})
        return
    if whole:
        from weftlm.pipeline.project_report import renew_report

        renew_report(open_run(folders[0]), None if renewed else path, title)
    else:
        from weftlm.pipeline.report import report_runs

        report_runs(folders, path, title)
    if json:
        print_json({"report": str(path)})
    else:
        say(str(path))
