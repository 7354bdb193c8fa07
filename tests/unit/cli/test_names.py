"""Hostile names through the one way that each kind of output has: table, line, log, error, progress."""

import ast
import io
import logging
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from support.hostile import NAMES, harmless_line

import weftlm
from weftlm.cli.main import _LogFormatter, main
from weftlm.cli.output import print_rows, say, say_lines
from weftlm.progress import ProgressBar, write_line
from weftlm.text import printable

SOURCE = Path(weftlm.__file__).parent


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def _bar(name: str) -> None:
    with ProgressBar(f"tokenise {name}", total=2, unit="steps") as bar:
        bar.update(2, name)


@pytest.mark.parametrize("show", [_bar, write_line])
@pytest.mark.parametrize("kind", [io.StringIO, _Terminal])
def test_progress_shows_names_as_they_are(
    show: Callable[[str], None], kind: type[io.StringIO], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "400")
    monkeypatch.setattr(sys, "stderr", stream := kind())
    for name in NAMES:
        show(name)
    told = stream.getvalue()
    for bad in ("\x1b[2J", "\x1b]0;", "\u202e", "\u200b", "\x07", "\x9b", "two\nlines"):
        assert bad not in told
    assert "[/news]" in told
    assert r"\x1b[2J" in told


def test_tables_and_lines_show_names_as_they_are(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "6000")
    print_rows(NAMES[4], {name: dict.fromkeys(NAMES, name) for name in NAMES}, {name: [name] for name in NAMES})
    for name in NAMES:
        say(name)
        say(name, err=True)
    said = capsys.readouterr()
    assert harmless_line(said.out + said.err)
    for name in NAMES:
        assert printable(name) in said.out
        assert printable(name) in said.err
    assert len(said.err.splitlines()) == len(NAMES), "a name is one line"
    say_lines("a: b\n  c: \x1b[2J")
    assert capsys.readouterr().out == "a: b\n  c: \\x1b[2J\n"


@pytest.mark.parametrize("name", NAMES)
def test_logs_and_errors_show_names_as_they_are(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    record = logging.LogRecord("weftlm", logging.WARNING, "", 1, "domain %s is small", (name,), None)
    line = _LogFormatter("%(levelname)s %(message)s").format(record)
    assert line == f"WARNING domain {printable(name)} is small"
    with pytest.raises(SystemExit) as caught:
        main(["status", f"no such folder {name}"])
    assert caught.value.code in (1, 2)
    err = capsys.readouterr().err
    assert harmless_line(err)
    assert all(line.startswith("  ") for line in err.splitlines()[1:]), "no line of a name passes for one of ours"


def test_every_output_goes_through_the_one_function() -> None:
    """Nothing else in the package prints: the functions tested above are the only ways out."""
    allowed = {
        "cli/output.py": {"echo", "Console"},
        "cli/main.py": {"echo"},
        "progress.py": {"Console", "stderr"},
        "interrupt.py": {"stderr"},
    }
    for path in SOURCE.rglob("*.py"):
        used = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
                if name in ("echo", "secho", "Console") or (isinstance(node.func, ast.Name) and name == "print"):
                    used.add(name)
                if name == "write" and isinstance(node.func, ast.Attribute):
                    used |= {"stderr"} & {getattr(node.func.value, "attr", "")}
        assert used <= allowed.get(str(path.relative_to(SOURCE)), set()), path
