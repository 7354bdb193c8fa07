"""Every tutorial is carried out as its page shows it, in order, with the sizes made small.

A YAML block goes to the file the page names before it (``Save this as `recipe.yaml```), a Python block is executed, a
line of a bash block that calls `.venv/bin/weftlm` is called, and a text block that shows a call and its error is
checked against what the call says. A command, a key, an option or a file that does not exist fails the page.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.command_line import Call

from weftlm.serving.server import Server

TUTORIALS = Path(__file__).parents[2] / "docs/tutorials"
WEFTLM = ".venv/bin/weftlm"
OTHER_LINES = (".venv/bin/python ", "curl ", "make ")
"""How a line of a bash block may begin that is not called."""

SMALLER: dict[str, Any] = {
    "max_bytes": 30_000, "max_train_tokens": 3_000, "vocab_size": 300, "max_tokens_per_set": 256,
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
    "tokens": 1_024, "sequence_length": 16, "batch_sequences": 8, "warmup_steps": 1, "steps": 4,
    "update_every_steps": 2, "every_steps": 4, "statistics_examples": 4, "rank": 2,
    "length": 16, "sequences": 8, "samples": 8, "max_new_tokens": 4,
}  # fmt: skip
"""Sizes by key, wherever a recipe (`key: 1`) or a Python block (`key=1`, `KEY = 1`) has it; all else stays as shown."""

UNSAID: dict[str, Any] = {
    "gating.fit.steps": 8, "gating.fit.best_response_steps": 4, "gating.students.direct.fit.steps": 8,
    "routing.timed_pairs": 2,
}  # fmt: skip
"""Sizes that recipes leave at their defaults, in those that have the section."""


def smaller(text: str) -> str:
    """A block with every size replaced."""

    def replaced(found: re.Match[str]) -> str:
        return f"{found[1]}{found[2]}{SMALLER[found[1].lower()]}"

    names = "|".join(sorted(SMALLER, key=len, reverse=True))
    return re.sub(rf"\b({names})(: | ?= ?)[0-9][0-9_.]*\b", replaced, text, flags=re.IGNORECASE)


def smaller_recipe(text: str) -> str:
    """A recipe with every size replaced, those it does not name among them."""
    value = yaml.safe_load(smaller(text))
    for place, size in UNSAID.items():
        first, *between, last = place.split(".")
        if first in value:
            section = value[first]
            for key in between:
                section = section.setdefault(key, {})
            section[last] = size
    return yaml.safe_dump(value, sort_keys=False)


def blocks_of(page: str) -> Iterator[tuple[str, str, str]]:
    """Language, text and the prose before it, of every block of a page in order."""
    end = 0
    for found in re.finditer(r"^```(\w+)\n(.*?)^```", page, re.DOTALL | re.MULTILINE):
        yield found[1], found[2], page[end : found.start()]
        end = found.end()


class Reader:
    """Somebody who does what a page says, in a folder of their own."""

    def __init__(self, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
        self.call = call
        self.names: dict[str, Any] = {"__name__": "tutorial"}
        self.commands: list[str] = []
        monkeypatch.setattr(Server, "run", lambda self, sockets=None: None)  # it would serve until it is stopped

    def follow(self, page: str) -> None:
        """Do all of it."""
        for language, text, before in blocks_of(page):
            if language == "yaml":
                told = re.findall(r"Save this as `([\w-]+\.yaml)`", before)
                assert told, f"no file is named for the recipe that begins {text[:40]!r}"
                Path(told[-1]).write_text(smaller_recipe(text))
            elif language == "python":
                exec(compile(smaller(text), "tutorial", "exec"), self.names)
            elif language == "bash":
                for line in filter(None, text.replace("\\\n", " ").splitlines()):
                    self.type(line)
            elif language == "text" and text.startswith(f"$ {WEFTLM} "):
                command, *said = text.splitlines()
                arguments = shlex.split(command)[2:]
                assert self.call(*arguments, code=2).strip().splitlines()[-1] == said[-1]

    def type(self, line: str) -> None:
        """Give one command."""
        if not line.startswith(f"{WEFTLM} "):
            assert line.startswith(OTHER_LINES), line
            return
        arguments = shlex.split(line, comments=True)[1:]
        self.commands.append(" ".join(arguments[:2]))
        self.call(*arguments, *(["--port", "0"] if arguments[0] == "serve" else []))


@pytest.fixture
def reader(call: Call, monkeypatch: pytest.MonkeyPatch) -> Reader:
    return Reader(call, monkeypatch)


# PEFT reads a property that transformers renames; it goes away with either's next release.
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.parametrize(
    ("name", "left"),
    [
        ("mixture", ["runs/tutorial.html", "runs/first/model/model.safetensors", "runs/importance/result.json"]),
        ("routing", ["runs/routing/routing.json", "runs/mine/routed/routed.json"]),
        ("gating", ["runs/gating/gate/certificate.json", "runs/gating/students/student-top-1/config.json"]),
    ],
)
def test_a_tutorial_can_be_followed(reader: Reader, name: str, left: list[str]) -> None:
    reader.follow((TUTORIALS / f"{name}.md").read_text(encoding="utf-8"))
    assert len(reader.commands) > 5
    missing = [path for path in left if not Path(path).exists()]
    assert not missing, sorted(os.listdir("runs"))


def test_every_tutorial_is_followed() -> None:
    assert sorted(path.stem for path in TUTORIALS.glob("*.md")) == ["gating", "mixture", "routing"]


@pytest.mark.parametrize(
    "page",
    [
        "```bash\n.venv/bin/weftlm experts trian pool.yaml\n```",
        "```bash\n.venv/bin/weftlm demo --dry-run --loud\n```",
        "```bash\nweftlm demo --dry-run\n```",
        "```yaml\nrun: runs/x\n```",
        "Save this as `a.yaml`:\n```yaml\nmodle: {}\n```\n```bash\n.venv/bin/weftlm run a.yaml --dry-run\n```",
        "```python\nfrom weftlm.routing import no_such_router\n```",
        "```text\n$ .venv/bin/weftlm train absent.yaml\nweftlm: another message\n```",
    ],
)
def test_a_page_that_shows_what_does_not_exist_fails(reader: Reader, page: str) -> None:
    with pytest.raises((AssertionError, ImportError)):
        reader.follow(page)


def test_sizes_are_replaced_and_nothing_else() -> None:
    assert smaller("training: {tokens: 800000, lr: 3.0e-3, warmup_steps: 20}") == (
        "training: {tokens: 1024, lr: 3.0e-3, warmup_steps: 1}"
    )
    assert smaller("MAX_BYTES = 300_000\nSTEPS = 60\nmodel.generate(ids, max_new_tokens=20)") == (
        "MAX_BYTES = 30000\nSTEPS = 4\nmodel.generate(ids, max_new_tokens=4)"
    )
    assert smaller("scores: {length: 128, sequences: 96}") == "scores: {length: 16, sequences: 8}"
    assert smaller("# 60 steps of 128") == "# 60 steps of 128"
