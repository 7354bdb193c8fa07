"""Instructions to install: every extra has its row, and none names weftlm as if a package index had it."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from weftlm.errors import install_hint

ROOT = Path(__file__).parents[3]
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
COMMAND = re.compile(r"(?:pip3? install|pipx install|uv add|uv tool install|uvx) [^\n`#]*")
FROM_INDEX = re.compile(r"""(?:^|[\s'"`])weft(?:lm)?(?:\[[^\]]*\])?(?:[=<>~!][^\s]*)?(?!\s*@)(?:['"`\s.,;:)]|$)""")
"""A requirement that a package index would look up, under weftlm's name or the one it had."""


def test_every_extra_has_its_row_and_every_hint_its_extra() -> None:
    page = (ROOT / "docs/install.md").read_text()
    rows = [line.split("|")[1] for line in page.splitlines() if line.startswith("| `")]
    assert {name for row in rows for name in re.findall(r"`([a-z-]+)`", row)} == set(EXTRAS)
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "src").rglob("*.py")]
    hints = {extra for text in sources for extra in re.findall(r"install_hint\(['\"]([a-z-]+)['\"]\)", text)}
    assert hints
    assert hints <= set(EXTRAS)
    assert "'.[serve]'" in install_hint("serve")


@pytest.mark.parametrize(
    ("command", "asks"),
    [
        ("pip install weftlm", True),
        ("pip install 'weftlm[serve]', or not", True),
        ("uv add weftlm>=1", True),
        ("pip install '.[serve]'    # in your checkout of weftlm/", False),
        ("pip install 'weftlm[serve] @ file:///dist/weftlm-0.1-py3-none-any.whl'", False),
        ("pip install dist/weftlm-0.1.0-py3-none-any.whl", False),
    ],
)
def test_an_install_line_that_asks_an_index_is_seen(command: str, asks: bool) -> None:
    assert (FROM_INDEX.search(COMMAND.findall(command)[0]) is not None) is asks


def test_no_page_or_message_asks_an_index_for_weftlm() -> None:
    """Until weftlm is published its name on an index could be anybody's; every instruction installs from a checkout."""
    suffixes = {".md", ".py", ".yaml", ".yml", ".toml", ".html", ".js", ".txt"}
    files = [ROOT / "Makefile", ROOT / ".ci/run", *ROOT.glob("*.md")]
    for folder in ("src", "docs", "examples", "recipes", "benchmarks"):
        files += [path for path in (ROOT / folder).rglob("*") if path.suffix in suffixes]
    commands = [(path, command) for path in files for command in COMMAND.findall(path.read_text(encoding="utf-8"))]
    assert len(commands) > 5
    assert [(str(path), command) for path, command in commands if FROM_INDEX.search(command)] == []
