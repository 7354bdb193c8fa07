"""No code block of a page escapes: it is run, checked, the output of something, or says why it is not run.

python      runs: test_snippets.py, in tutorials tests/e2e/test_tutorials.py
yaml        is valid as a recipe: test_snippets.py
bash        every `weftlm` command is read by the real command line here; in tutorials it is run as well
text        what is printed or typed elsewhere
any other   only after a line `<!-- not run: REASON -->`
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from weftlm.cli.main import app

ROOT = Path(__file__).resolve().parents[3]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
CHECKED = frozenset({"python", "yaml", "bash", "text"})
NOT_RUN = re.compile(r"<!-- not run: \S.*? -->")
WEFTLM = re.compile(r"(?:^|\s)(?:\S*/)?weftlm (.*)")
OTHERS = (
    "make ",
    "curl ",
    "pip ",
    "git clone ",
    "ray start ",
    "python -m weftlm.",
    ".venv/bin/python ",
    "for ",
    "done",
)


def blocks(page: Path) -> Iterator[tuple[int, str, str, bool]]:
    """Line, language and text of every block, and whether it is marked as not run."""
    lines = page.read_text(encoding="utf-8").splitlines()
    start, fence = None, ""
    for number, line in enumerate(lines):
        found = re.match(r"\s*(`{3,}|~{3,})\s*(\w*)", line)
        if found is None:
            continue
        if start is None:
            start, fence, language = number, found[1], found[2]
        elif line.strip() == fence:
            before = next((each for each in reversed(lines[:start]) if each.strip()), "")
            yield (
                start + 1,
                language,
                "\n".join(lines[start + 1 : number]),
                NOT_RUN.fullmatch(before.strip()) is not None,
            )
            start = None
    assert start is None, f"{page}: the block that begins in line {start} never ends"


def problem_of(words: list[str]) -> str | None:
    """What the real command line says against a command; None where it would run it."""
    command: Any = typer.main.get_command(app)
    context = typer.Context(command)
    while hasattr(command, "list_commands"):
        if not words or words[0].startswith("-"):
            return None if words else "names no command"
        name, *words = words
        command = command.get_command(context, name)
    try:
        command.make_context("weftlm", words)
    except Exception as error:  # noqa: BLE001 - whatever it says is the finding
        return str(getattr(error, "message", error)) or type(error).__name__
    return None


def commands_of(text: str) -> Iterator[tuple[str, list[str] | None]]:
    """Every line of a shell block, with the words behind `weftlm` where it is called."""
    for line in text.replace("\\\n", " ").splitlines():
        bare = line.strip()
        if not bare or bare.startswith("#"):
            continue
        found = WEFTLM.search(bare) if not bare.startswith(OTHERS) else None
        yield bare, shlex.split(found[1], comments=True) if found is not None else None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_no_block_escapes(page: Path) -> None:
    escaped = [f"line {line}: {language or 'no language'}" for line, language, _, marked in blocks(page)
               if language not in CHECKED and not marked]  # fmt: skip
    assert not escaped
    fences = re.findall(r"^\s*(?:`{3,}|~{3,})", page.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(fences) == 2 * len(list(blocks(page)))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_are_what_the_command_line_takes(page: Path) -> None:
    wrong = []
    for line, language, text, marked in blocks(page):
        if language != "bash" or marked:
            continue
        for typed, words in commands_of(text):
            if words is None:
                if not typed.startswith(OTHERS):
                    wrong.append(f"line {line}: {typed}: neither weftlm nor a known other command")
            elif (problem := problem_of(words)) is not None:
                wrong.append(f"line {line}: {typed}: {problem}")
    assert not wrong, "\n".join(wrong)


def test_a_wrong_command_and_a_stray_block_are_found(tmp_path: Path) -> None:
    assert "No such option" in str(problem_of(["train", "recipe.yaml", "--nonsense"]))
    assert problem_of(["train"]) is not None
    assert problem_of(["train", "recipe.yaml", "--set", "training.lr=1"]) is None
    page = tmp_path / "page.md"
    page.write_text("```sh\nrm\n```\n<!-- not run: a sketch -->\n```dot\na\n```\n", encoding="utf-8")
    assert [(language, marked) for _, language, _, marked in blocks(page)] == [("sh", False), ("dot", True)]
