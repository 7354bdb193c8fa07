"""The arguments every command shares, and how results are printed."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from weftlm.cli import complete
from weftlm.cli.folders import takes
from weftlm.errors import ConfigError
from weftlm.text import printable, printable_lines, shorten

if TYPE_CHECKING:
    from concurrent.futures import Executor

    from weftlm.pipeline.recipe import Recipe

RecipeArgument = Annotated[
    Path,
    typer.Argument(metavar="RECIPE.yaml", help="The recipe to follow.", show_default=False, callback=takes("recipe")),
]
LibraryArgument = Annotated[
    Path,
    typer.Argument(
        metavar="LIBRARY", help="Folder of the expert library.", show_default=False, callback=takes("library")
    ),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="a.b=value",
        help="Override one key of the recipe; repeatable.",
        show_default=False,
        autocompletion=complete.settings,
    ),
]
DryRunOption = Annotated[
    bool, typer.Option("--dry-run", help="Print the resolved recipe and what would be done; do nothing.")
]
RayOption = Annotated[
    bool, typer.Option("--ray", help="Over the machines of a Ray cluster (extra 'ray'), which share a disk.")
]
GpusOption = Annotated[float, typer.Option("--gpus", min=0, help="GPUs of each Ray task; 0 for CPUs.")]
LONGEST_NAME = 60
"""Characters of a table's first column; the middle of a longer name is left out."""
QuickOption = Annotated[
    bool,
    typer.Option("--quick", help="All stages in about two minutes: sizes cut down, results in RUN-quick."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


def check_gpus(ray: bool, gpus: float) -> None:
    """Refuse `--gpus` without `--ray`.

    Raises:
        ConfigError: it came.
    """
    if gpus and not ray:
        raise ConfigError(f"--gpus {gpus:g} is of Ray's tasks; give --ray with it, or leave it out")


@contextmanager
def executor_for(recipe: Recipe, ray: bool, gpus: float, processes: int = 1) -> Iterator[Executor | None]:
    """Where the tasks of a command run: on a Ray cluster, in several processes, or (None) in this one.

    Raises:
        ConfigError: Ray and several processes are asked for, or Ray cannot be used.
    """
    if ray and processes > 1:
        raise ConfigError(
            f"--processes {processes} and --ray, which starts its own, exclude each other; give one of the two"
        )
    if ray:
        from weftlm.integrations.ray_executor import ray_executor

        with ray_executor(recipe.expert_settings.training.threads or 1, gpus) as executor:
            yield executor
    elif processes > 1:
        from weftlm import fan_out

        with fan_out.processes(processes) as pool:
            yield pool
    else:
        yield None


def names_of(text: str) -> list[str]:
    """The names in `a,b,c`."""
    return [name.strip() for name in text.split(",") if name.strip()]


def numbers(text: str, option: str) -> list[float]:
    """The numbers in `0.5,0.3,0.2`.

    Raises:
        ConfigError: a part is no number.
    """
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"{option} is {text!r}; give numbers with commas between: 0.5,0.5") from None


def say(text: str, *, err: bool = False) -> None:
    """Print one line, on stdout or on stderr; names in it may hold anything (`printable`)."""
    typer.echo(printable(text), err=err)


def say_lines(text: str) -> None:
    """Print text of several lines, such as YAML, on stdout."""
    typer.echo(printable_lines(text))


def print_json(value: Any) -> None:
    """Print one JSON document on stdout, in ASCII."""
    typer.echo(json.dumps(value, indent=2))


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table on stdout: the first column left-aligned, the others right-aligned."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    def cell(text: str) -> Text:
        """Text as it is: brackets and colons are no markup."""
        return Text(printable(text))

    table = Table(title=cell(title), title_justify="left", header_style="bold")
    for index, column in enumerate(columns):
        table.add_column(cell(column), justify="left" if index == 0 else "right", no_wrap=index == 0)
    for row in rows:
        table.add_row(cell(shorten(row[0], LONGEST_NAME)), *map(cell, row[1:]))
    Console(highlight=False, markup=False, emoji=False).print(table)


def number(value: float | None, digits: int = 4) -> str:
    """A number for a table; `-` where there is none."""
    return "-" if value is None else f"{value:.{digits}f}"


def with_error(value: float | None, error: float | None, digits: int = 4) -> str:
    """`value ± error` for a table."""
    return number(value, digits) if error is None else f"{number(value, digits)} ± {number(error, digits)}"


def windows(length: int | None) -> str:
    """`, windows of 128 tokens`: what a table of losses was measured on; nothing where that is not known."""
    return "" if length is None else f", windows of {length:,} tokens"


def sets_table(title: str, result: Mapping[str, Any]) -> None:
    """Print an evaluation: one row per set, the mean over domains last."""
    rows = [
        [
            name,
            with_error(values["nats_per_token"], values["nats_per_token_se"]),
            number(values["perplexity"], 2),
            with_error(values["bits_per_byte"], values["bits_per_byte_se"]),
            f"{values['tokens']:,}",
        ]
        for name, values in result["sets"].items()
    ]
    generic = result.get("generic")
    if generic is not None:
        rows.append(
            [
                "mean over domains",
                with_error(generic["nats_per_token"], generic["nats_per_token_se"]),
                "-",
                with_error(generic["bits_per_byte"], generic["bits_per_byte_se"]),
                "-",
            ]
        )
    print_table(
        title + windows(result.get("sequence_length")), ["set", "nats/token", "perplexity", "bits/byte", "tokens"], rows
    )
