"""The `weftlm` command: groups of commands, and how errors become exit codes.

Errors a user can mend become one line on stderr and an exit code: 0 success, 1 the run failed, 2 the call or the recipe
was wrong, 130 or 143 stopped by a signal. The files of commands are light; a command imports what it works with.
"""

from __future__ import annotations

import io
import logging
import sys
from functools import cache
from typing import Any

import typer

from weftlm import __version__, interrupt
from weftlm.cli import experts, gate, project, route, serve, train
from weftlm.errors import ConfigError, WeftError, reason
from weftlm.text import printable, printable_lines

app = typer.Typer(
    name="weftlm", no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)  # fmt: skip
app.add_typer(project.app)
app.add_typer(train.app)
app.add_typer(experts.app, name="experts")
app.add_typer(route.app, name="route")
app.add_typer(gate.scores)
app.add_typer(gate.app, name="gate")
app.add_typer(serve.app)


def _show_version(value: bool) -> None:
    if value:
        typer.echo(f"weftlm {__version__}")
        raise typer.Exit


@app.callback()
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


@cache
def _command() -> Any:
    return typer.main.get_command(app)


def main(arguments: list[str] | None = None) -> None:
    """Entry point: run a command and turn errors into exit codes."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # no name is worth a crash at the end of a run
    try:
        with interrupt.handled():
            _command()(args=arguments, prog_name="weftlm")
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
