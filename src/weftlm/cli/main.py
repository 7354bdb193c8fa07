"""The `weftlm` command: groups of commands, and how errors become exit codes.

Errors a user can mend become one line on stderr and an exit code: 0 success, 1 the run failed, 2 the call or the recipe
was wrong, 130 or 143 stopped by a signal. The files of commands are light, and only the one with the command that is
called is imported; a command imports what it works with.
"""

from __future__ import annotations

import importlib
import io
import logging
import sys
from collections.abc import Sequence
from functools import cache
from typing import Any

import typer

from weftlm import __version__, interrupt
from weftlm.errors import ConfigError, WeftError, reason
from weftlm.text import printable, printable_lines

_FILES = {
    "project": ("run", "status", "plan", "report", "demo"),
    "train": ("prepare", "domains", "train", "eval"),
    "experts": ("experts",),
    "route": ("route",),
    "gate": ("score", "gate"),
    "serve": ("serve", "export"),
}
"""The commands, or groups of commands, of each file."""
_GROUPS = ("experts", "route", "gate")


@cache
def commands(called: str | None = None) -> Any:
    """The commands of the file that has one of them, or all commands where none is named."""
    app = typer.Typer(
        name="weftlm", no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )  # fmt: skip
    app.callback()(weftlm)
    for file, names in _FILES.items():
        if called is None or called in names:
            module = importlib.import_module(f"weftlm.cli.{file}")
            if hasattr(module, "scores"):
                app.add_typer(module.scores)
            app.add_typer(module.app, name=file if file in _GROUPS else None)
    return typer.main.get_command(app)


def _called(words: Sequence[str]) -> str | None:
    """The command that is called, or None where all are to be known: for help, and for a name that none has."""
    first = next((word for word in words if not word.startswith("-")), None)
    return first if any(first in names for names in _FILES.values()) else None


def _show_version(value: bool) -> None:
    if value:
        typer.echo(f"weftlm {__version__}")
        raise typer.Exit


def weftlm(
    version: bool = typer.Option(
        False, "--version", callback=_show_version, is_eager=True, help="Show the version and exit."
    ),
    verbose: bool = typer.Option(False, "--verbose", "-v", help="Log details to stderr."),
) -> None:
    """Modular language models: find the data mixture that helps a target while a model trains."""
    logging.getLogger("weftlm").setLevel(logging.DEBUG if verbose else logging.INFO)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_LogFormatter("%(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(handlers=[handler], level=logging.INFO if verbose else logging.WARNING)


class _LogFormatter(logging.Formatter):
    """One line per record, whatever names it mentions; a traceback keeps its lines."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        return printable(super().formatMessage(record))

    def formatException(self, ei: Any) -> str:
        return printable_lines(super().formatException(ei))


def main(arguments: list[str] | None = None) -> None:
    """Entry point: run a command and turn errors into exit codes."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # no name is worth a crash at the end of a run
    try:
        with interrupt.handled():
            words = sys.argv[1:] if arguments is None else arguments
            commands(_called(words))(args=words, prog_name="weftlm")
    except interrupt.Stopped as stopped:
        typer.echo(interrupt.how_to_go_on(stopped), err=True)
        sys.exit(stopped.code)
    except (WeftError, OSError) as error:
        typer.echo("\n  ".join(printable_lines(f"weftlm: {_said(error)}").split("\n")), err=True)
        sys.exit(2 if isinstance(error, ConfigError) else 1)


def _said(error: WeftError | OSError) -> str:
    if isinstance(error, WeftError) or error.filename is None:
        return str(error) if isinstance(error, WeftError) else reason(error)
    return f"{error.filename!s:.300}: {reason(error)}"
