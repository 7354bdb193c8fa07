"""What messages tell a user to type exists: every command, and every option of it."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

import weftlm
from weftlm.cli.main import commands

SOURCES = Path(weftlm.__file__).parent
ELSEWHERE = {
    "--outfile", "--outtype", "--model", "--tasks", "--model_args", "--apply", "--apply_chat_template",
    "--head", "--always", "--abbrev", "--exclude", "--dirty", "--porcelain", "--untracked-files",
    "--is-inside-work-tree", "--show-toplevel",
}  # fmt: skip
"""Options of other programs: llama.cpp's converter, git, lm-eval."""


def commands_of(group, path: str = "weftlm") -> Iterator[tuple[str, set[str]]]:
    context = typer.Context(group, info_name="weftlm")
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        options = {opt for each in command.params for opt in (*each.opts, *each.secondary_opts) if opt.startswith("-")}
        yield f"{path} {name}", options | {"--help", "-h"}
        if hasattr(command, "list_commands"):
            yield from commands_of(command, f"{path} {name}")


COMMANDS = {"weftlm": {"--version", "--verbose", "--help"}, **dict(commands_of(commands()))}
EVERY = set().union(*COMMANDS.values())


def texts(path: Path) -> Iterator[tuple[int, str]]:
    """Strings of a file with what is filled in replaced by `X`; docstrings are left out."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    docs = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, documented) and node.body and isinstance(node.body[0], ast.Expr)
    }
    inner = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            inner |= {id(part) for part in node.values}
            yield node.lineno, "".join(part.value if isinstance(part, ast.Constant) else "X" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs | inner:
            yield node.lineno, node.value


def problems(text: str) -> Iterator[str]:
    for found in re.finditer(r"weftlm((?: [a-z]+){1,2})([^;()`.,\n]*)", text):
        words = found[1].split()
        known = [" ".join(["weftlm", *words[:n]]) for n in (2, 1)]
        command = next((each for each in known if each in COMMANDS), None)
        for option in re.findall(r"(?<!\S)--?[a-z][a-z-]*", found[2]) if command else ():
            if option not in COMMANDS[command]:
                yield f"{command} has no {option}"
    for option in re.findall(r"(?<![\w-])--[a-z][a-z_-]+", text):
        if option.rstrip("-") not in EVERY | ELSEWHERE:
            yield f"no command has {option}"


@pytest.mark.parametrize(
    "folder", sorted({path.parent.relative_to(SOURCES).as_posix() for path in SOURCES.rglob("*.py")})
)
def test_commands_and_options_in_messages_exist(folder: str) -> None:
    found = [
        f"{path.relative_to(SOURCES)}:{line}: {problem}"
        for path in sorted((SOURCES / folder).glob("*.py"))
        for line, text in texts(path)
        for problem in problems(text)
    ]
    assert not found, "\n".join(found)


def test_what_does_not_exist_is_found() -> None:
    assert list(problems("replace it (weftlm experts import --replace)")) == ["weftlm experts import has no --replace"]
    assert list(problems("give --no-such-thing")) == ["no command has --no-such-thing"]
    assert not list(problems("replace it (weftlm experts train --replace), or weftlm run --from experts"))
