"""Instructions to install: every extra has its row, and none names weftlm as if a package index had it."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from weftlm.errors import install_hint

ROOT = Path(__file__).parents[3]


def test_every_extra_has_its_row() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    page = (ROOT / "docs/install.md").read_text()
    rows = [line.split("|")[1] for line in page.splitlines() if line.startswith("| `")]
    assert {name for row in rows for name in re.findall(r"`([a-z-]+)`", row)} == set(declared)


def commands_of(text: str) -> list[str]:
    """Every `pip install`, `uv pip install`, `uv add`, `pipx install` and `uvx` of a text, to the end of its line."""
    return re.findall(r"(?:pip3? install|pipx install|uv add|uv tool install|uvx) [^\n`]*", text)


def from_an_index(command: str) -> bool:
    """Whether a command asks a package index for weftlm, under its name or the one it had."""
    return (
        re.search(r"""(?:^|[\s'"`])weft(?:lm)?(?:\[[^\]]*\])?(?:[=<>~!][^\s]*)?(?!\s*@)(?:['"`\s.,;:)]|$)""", command)
        is not None
    )


@pytest.mark.parametrize(
    ("command", "asks"),
    [
        ("pip install weftlm", True),
        ("pip install 'weftlm[serve]', or not", True),
        ("uv add weftlm>=1", True),
        ("pip install weft", True),
        ("pip install '.[serve]'    # in your checkout of weftlm/", False),
        ("pip install 'weftlm[serve] @ file:///dist/weftlm-0.1-py3-none-any.whl'", False),
        ("pip install dist/weftlm-0.1.0-py3-none-any.whl", False),
    ],
)
def test_an_install_line_that_asks_an_index_is_seen(command: str, asks: bool) -> None:
    assert from_an_index(command.split("#", maxsplit=1)[0]) is asks


def test_no_page_or_message_asks_an_index_for_weftlm() -> None:
    """Until weftlm is published its name on an index could be anybody's; every instruction installs from a checkout."""
    suffixes = {".md", ".py", ".yaml", ".yml", ".toml", ".html", ".js", ".txt"}
    tracked = [ROOT / "Makefile", ROOT / ".ci/run"]
    for folder in ("src", "docs", "examples", "recipes", "benchmarks"):
        tracked += [path for path in (ROOT / folder).rglob("*") if path.suffix in suffixes]
    tracked += ROOT.glob("*.md")
    found = {
        f"{path.relative_to(ROOT)}: {command}"
        for path in tracked
        for command in commands_of(path.read_text(encoding="utf-8"))
        if from_an_index(command.split("#")[0])
    }
    assert not found


def test_the_hint_of_a_missing_package_installs_from_the_checkout() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    hints = {
        extra
        for path in (ROOT / "src").rglob("*.py")
        for extra in re.findall(r"install_hint\(['\"]([a-z-]+)['\"]\)", path.read_text(encoding="utf-8"))
    }
    assert hints
    assert hints <= set(declared)
    assert "'.[serve]'" in install_hint("serve")
