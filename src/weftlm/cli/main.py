"""The `weftlm` command: a lazy group, so that `weftlm --help` loads nothing heavy.

Every command lives in its own file and is imported when it is called. Errors a user can mend become one line on stderr
and an exit code: 0 success, 1 the run failed, 2 the call or the recipe was wrong, 130 or 143 stopped by a signal.
"""

from __future__ import annotations

import importlib
import io
import logging
import sys
from collections.abc import Mapping
from keyword import iskeyword
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from weftlm import __version__, interrupt
from weftlm.cli.complete import prepare_shell
from weftlm.errors import ConfigError, WeftError, did_you_mean, reason
from weftlm.text import printable, printable_lines

COMMANDS: dict[str, str] = {
    "run": "Carry a recipe through all its stages; skips what is done, continues what was interrupted.",
    "status": "Say what of a run folder is done, running, interrupted or stale.",
    "plan": "Say what a recipe will take on given hardware: time, memory, traffic, disk.",
    "prepare": "Read, de-duplicate, split and tokenise a recipe's corpora.",
    "domains": "Show the domains: sizes, typical documents, nearest neighbours.",
    "train": "Train a language model on an online mixture; continues where it stopped.",
    "eval": "Measure a trained model on held-out text of every domain and of the target.",
    "report": "Write one self-contained HTML page about one run or several.",
    "experts": "Make experts, one per domain, and keep a library of them.",
    "route": "Choose among experts per token and per module; compare the ways to choose.",
    "score": "Score held-out text and samples under every expert, for gates over them.",
    "gate": "Fit one gate over the experts, best against the worst mixture, and certify it.",
    "serve": "Answer over HTTP as OpenAI's API does, and show the routing on a page.",
    "export": "Write a model for other programs: a Hugging Face checkpoint, PEFT adapters, GGUF.",
    "demo": "Run the whole pipeline on built-in text: a mixture found, experts routed, a robust gate.",
}
"""Name -> one line for `weftlm --help`, in the order of use.

Each is the function `run` of `weftlm.cli.<name>`, or a package there with a table `COMMANDS` of its own.
"""


class LazyGroup(TyperGroup):
    """A group that knows its commands' names and imports each on first use.

    Attributes:
        package: where the commands lie.
        commands_help: name -> one line, in the order of use.
    """

    package: str = __package__
    commands_help: Mapping[str, str] = COMMANDS

    def list_commands(self, ctx: Any) -> list[str]:
        """The command names in the order of use."""
        return list(self.commands_help)

    def get_command(self, ctx: Any, cmd_name: str) -> TyperCommand | LazyGroup | None:
        """Import and wrap one command, or one group of commands.

        Raises:
            ConfigError: no such command, with a suggestion.
        """
        if cmd_name not in self.commands_help:
            if ctx.resilient_parsing:  # the shell completes half a line
                return None
            place = self.package.removeprefix(__package__).replace(".", " ").strip()
            where = f" of weftlm {place}" if place else ""
            raise ConfigError(f"no command {cmd_name!r}{where}{did_you_mean(cmd_name, self.commands_help)}")
        name = f"{cmd_name}_" if iskeyword(cmd_name) else cmd_name
        module = importlib.import_module(f"{self.package}.{name}")
        if hasattr(module, "COMMANDS"):
            group = LazyGroup(
                name=cmd_name, help=self.commands_help[cmd_name], no_args_is_help=True, rich_markup_mode=None
            )
            group.package, group.commands_help = module.__name__, module.COMMANDS
            return group
        single = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
        single.command(name=cmd_name, help=module.run.__doc__)(module.run)
        command = typer.main.get_command(single)
        assert isinstance(command, TyperCommand)
        return command

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """List the commands from the table, without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl(list(self.commands_help.items()))


app = typer.Typer(
    cls=LazyGroup, name="weftlm", no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)  # fmt: skip


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


def main(arguments: list[str] | None = None) -> None:
    """Entry point: run a command and turn errors into exit codes."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # no name is worth a crash at the end of a run
    prepare_shell()
    try:
        with interrupt.handled():
            app(args=arguments, prog_name="weftlm")
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
