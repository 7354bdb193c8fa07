"""How results are printed: lines, JSON and tables; names in them may hold anything."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import typer

from weftlm.text import printable, printable_lines, shorten

LONGEST_NAME = 60
"""Characters of a table's first column; the middle of a longer name is left out."""


def say(text: str, *, err: bool = False) -> None:
    """Print one line, on stdout or on stderr."""
    typer.echo(printable(text), err=err)


def say_lines(text: str) -> None:
    """Print text of several lines, such as YAML, on stdout."""
    typer.echo(printable_lines(text))


def say_yaml(value: Any) -> None:
    """Print JSON values as YAML on stdout."""
    import yaml

    say_lines(yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=110))


def print_json(value: Any) -> None:
    """Print one JSON document on stdout, in ASCII."""
    typer.echo(json.dumps(value, indent=2))


def print_rows(
    title: str,
    rows: Mapping[str, Any],
    columns: Mapping[str, str | Sequence[str]],
    *,
    first: str = "",
    at_once: int = 99,
) -> None:
    """Print results by name as a table, or as several of `at_once` columns each.

    Args:
        title: Title of the table.
        rows: JSON values by the name in the first column.
        columns: Place of each column's value in a row, by the heading: `losses.after.bits_per_byte`, or its parts.
        first: Heading of the first column.
        at_once: Most columns of a table, so that it fits a terminal.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    def cell(text: str) -> Text:
        """Text as it is: brackets and colons are no markup."""
        return Text(printable(text))

    paths = {head: path.split(".") if isinstance(path, str) else path for head, path in columns.items()}
    heads = list(paths)
    for start in range(0, len(heads), at_once):
        shown = heads[start : start + at_once]
        table = Table(title=cell(title), title_justify="left", header_style="bold")
        table.add_column(cell(first), no_wrap=True)
        for head in shown:
            table.add_column(cell(head), justify="right")
        for name, row in rows.items():
            table.add_row(cell(shorten(name, LONGEST_NAME)), *(cell(_cell(row, paths[head])) for head in shown))
        Console(highlight=False, markup=False, emoji=False).print(table)


def _cell(row: Any, path: Sequence[str]) -> str:
    """A value with its standard error, where there is one; `-` where there is none."""
    *outer, last = path
    for key in outer:
        row = row.get(key) or {}
    value = text(row.get(last))
    error = next((row[name] for name in (f"{last}_se", f"{last}_error") if row.get(name) is not None), None)
    return value if error is None else f"{value} ± {text(error)}"


def text(value: Any) -> str:
    """A JSON value for a table."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4f}" if abs(value) < 100 else f"{value:,.1f}"
    return str(value)


def windows(length: int | None) -> str:
    """`, windows of 128 tokens`: the text that a table of losses was measured on; empty where that is not known."""
    return "" if length is None else f", windows of {length:,} tokens"


def sets_table(title: str, result: Mapping[str, Any]) -> None:
    """Print an evaluation: one row per set, the mean over domains last."""
    rows = {**result["sets"], **({"mean over domains": result["generic"]} if result.get("generic") else {})}
    columns = {"nats/token": "nats_per_token", "perplexity": "perplexity", "bits/byte": "bits_per_byte"}
    print_rows(title + windows(result.get("sequence_length")), rows, {**columns, "tokens": "tokens"}, first="set")
