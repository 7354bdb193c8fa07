"""Reads the pages as a person would: every block of code, in order, in a folder of its own.

yaml    goes to the file the page names before it (``Save this as `pool.yaml```), else it must be valid in a recipe
python  is executed; the blocks of a page share their names
bash    `weftlm`, `python -m weftlm.integrations.lm_eval` and `for` loops over them are called in this process, and
        `weftlm serve` beside it; `curl` is curl; a line that begins otherwise fails the page
text    a call and its error (`$ weftlm ...`) are compared with what the call says; all else is a formula or output
others  fail the page

A block below a line `<!-- not run: REASON -->` is left out. Substituted are sizes (`SMALLER`) and the server's port.
"""

from __future__ import annotations

import glob
import re
import shlex
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from support.command_line import Call

from weftlm.cli.main import main
from weftlm.integrations import lm_eval
from weftlm.pipeline.recipe import make_recipe
from weftlm.serving.server import Server

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
NOT_RUN = re.compile(r"<!-- not run: \S.*? -->")
ADDRESS = "127.0.0.1:8000"

SMALLER: dict[str, Any] = {
    "max_bytes": 30_000, "max_train_tokens": 3_000, "vocab_size": 300, "max_tokens_per_set": 256,
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
    "tokens": 1_024, "sequence_length": 16, "batch_sequences": 8, "warmup_steps": 1, "steps": 4,
    "update_every_steps": 2, "every_steps": 4, "statistics_examples": 4, "rank": 2,
    "length": 16, "sequences": 8, "samples": 8, "max_new_tokens": 4,
}  # fmt: skip
"""Sizes by key, wherever a recipe (`key: 1`) or a Python block (`key=1`, `KEY = 1`) has it; all else stays as shown."""

UNSAID: dict[str, Any] = {
    "data.domains.max_train_tokens": 3_000, "data.tokenizer": {"train": {"vocab_size": 300}},
    "model.config.hidden_size": 16, "model.config.intermediate_size": 32, "model.config.num_hidden_layers": 1,
    "model.config.num_attention_heads": 2, "model.config.num_key_value_heads": 2,
    "training.sequence_length": 16, "training.batch_sequences": 8,
    "training.warmup_steps": 1, "evaluation.max_tokens_per_set": 256,
    "experts.training.steps": 4, "experts.training.sequence_length": 16, "experts.training.warmup_steps": 1,
    "experts.gate.steps": 2, "experts.statistics_examples": 4,
    "gating.scores.length": 16, "gating.scores.sequences": 8, "gating.scores.samples": 8,
    "gating.held_out_fraction": 0.5, "gating.fit.steps": 8, "gating.fit.best_response_steps": 4,
    "gating.students.direct.fit.steps": 8, "gating.students.distil.steps": 4, "routing.timed_pairs": 2,
}  # fmt: skip
"""Sizes that recipes leave at their defaults, in those that have the first section."""


@dataclass(frozen=True)
class Block:
    """A block of code.

    Attributes:
        line: its first, from 1.
        language: after the fence.
        text: inside.
        before: the page's words since the block before.
        marked: it says why it is not run.
    """

    line: int
    language: str
    text: str
    before: str
    marked: bool


def blocks(page: str) -> Iterator[Block]:
    """Every block of a page in order; also indented ones, and fences of tildes."""
    lines, start, end, fence, language = page.splitlines(), None, 0, "", ""
    for number, line in enumerate(lines):
        found = re.match(r"\s*(`{3,}|~{3,})\s*(.*?)\s*$", line)
        if found is None:
            continue
        if start is None:
            start, fence, language = number, found[1], found[2]
        elif line.strip() == fence:
            before = [each for each in lines[end:start] if each.strip()]
            marked = bool(before) and NOT_RUN.fullmatch(before[-1].strip()) is not None
            yield Block(start + 1, language, "\n".join(lines[start + 1 : number]) + "\n", "\n".join(before), marked)
            start, end = None, number + 1
    assert start is None, f"the block that begins in line {start} never ends"


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
            section.setdefault(last, size)
    for corpus in (*value["data"]["corpora"], *value["data"].get("target", ())):
        if "builtin" in corpus:
            corpus.setdefault("max_bytes", SMALLER["max_bytes"])
    return yaml.safe_dump(value, sort_keys=False)


def check_part(text: str) -> None:
    """Whether YAML is a recipe, or a part of one."""
    part = yaml.safe_load(text)
    if "run" in part:
        make_recipe(part)
        return
    whole = {
        "run": "runs/x",
        "data": {"corpora": [{"builtin": "all"}]},
        "model": {"architecture": "llama"},
        "experts": {},
    }
    make_recipe({**whole, "mixture": {"policy": "uniform"}, "training": {"steps": 1}, **part})


class Reader:
    """Somebody who does what a page says, in the present folder.

    Args:
        call: the command line.
        monkeypatch: of the test.
        names: what Python blocks know beforehand.
    """

    def __init__(self, call: Call, monkeypatch: pytest.MonkeyPatch, **names: Any) -> None:
        self.call = call
        self.monkeypatch = monkeypatch
        self.module = ModuleType("page")
        self.module.__dict__.update(names)
        self.commands: list[str] = []
        self.server: Server | None = None
        self.port = 0
        self.ended: list[Any] = []
        self.thread: threading.Thread | None = None
        monkeypatch.setitem(sys.modules, "page", self.module)

    def follow(self, page: str) -> None:
        """Do all of it."""
        try:
            for block in blocks(page):
                if not block.marked:
                    try:
                        self.do(block)
                    except BaseException as error:
                        error.add_note(f"in the block that begins in line {block.line}")
                        raise
        finally:
            self.stop()

    def do(self, block: Block) -> None:
        """Carry out one block."""
        text = self.here(block.text)
        if block.language == "yaml":
            told = re.findall(r"[Ss]ave\s+this\s+as\s+`([\w-]+\.yaml)`", block.before)
            if told:
                Path(told[-1]).write_text(smaller_recipe(text))
            else:
                check_part(text)
        elif block.language == "toml":
            tomllib.loads(text)  # tests/e2e/test_plugin.py installs what it belongs to
        elif block.language == "python":
            exec(compile(smaller(text), "page", "exec"), self.module.__dict__)
        elif block.language == "bash":
            for line in lines_of(text):
                self.type(line)
        elif block.language == "text":
            if text.startswith(("$ .venv/bin/weftlm ", "$ weftlm ")):
                command, *said = text.splitlines()
                arguments = shlex.split(command)[2:]
                assert self.call(*arguments, code=2).strip().splitlines()[-1] == said[-1]
        else:
            raise AssertionError(f"a block of {block.language or 'no language'} that is not marked as not run")

    def here(self, text: str) -> str:
        """A text with the port of the server that runs."""
        return text if self.server is None else text.replace(ADDRESS, f"127.0.0.1:{self.port}")

    def type(self, line: str) -> None:
        """Give one command."""
        words = [each for word in shlex.split(line, comments=True) for each in sorted(glob.glob(word)) or [word]]
        with self.monkeypatch.context() as patch:
            while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
                patch.setenv(*words.pop(0).split("=", 1))
            name, *arguments = words
            self.commands.append(" ".join([Path(name).name, *arguments[:2]]))
            if name in ("weftlm", ".venv/bin/weftlm"):
                if arguments[0] == "serve":
                    self.serve([*arguments, "--port", "0"])
                else:
                    self.call(*arguments)
            elif name == "curl":
                said = subprocess.run(
                    [name, "-sS", "--fail-with-body", *arguments],
                    capture_output=True,
                    text=True,
                    check=False,
                    timeout=60,
                )
                assert said.returncode == 0, said.stdout + said.stderr
            elif [name, *arguments[:2]] == ["python", "-m", "weftlm.integrations.lm_eval"]:
                patch.setattr(sys, "argv", ["lm_eval", *arguments[2:]])
                lm_eval.main()
            else:
                raise AssertionError(f"{line}: neither called nor marked as not run")

    def serve(self, arguments: list[str]) -> None:
        """`weftlm serve` in a thread, until the next one or the page's end."""
        self.stop()
        listens = threading.Event()
        run = Server.run

        def running(server: Server, sockets: Any = None) -> None:
            self.server, self.port = server, sockets[0].getsockname()[1]
            listens.set()
            run(server, sockets)

        def serving() -> None:
            try:
                main(arguments)
            except SystemExit as error:
                self.ended.append(error.code or 0)
            finally:
                listens.set()

        with self.monkeypatch.context() as patch:
            patch.setattr(Server, "run", running)
            self.thread = threading.Thread(target=serving)
            self.thread.start()
            assert listens.wait(60)
        assert self.ended == []

    def stop(self) -> None:
        """End the server that runs."""
        if self.thread is not None and self.server is not None:
            self.server.should_exit = True
            self.thread.join(60)
            assert self.ended == [0]
        self.thread, self.server, self.ended = None, None, []


def lines_of(text: str) -> Iterator[str]:
    """Commands of a shell block; a loop (`for x in a b; do`, lines, `done`) is written out."""
    loop: tuple[str, list[str], list[str]] | None = None
    for line in (each.strip() for each in text.replace("\\\n", " ").splitlines()):
        if not line or line.startswith("#"):
            continue
        if found := re.fullmatch(r"for (\w+) in (.*); do", line):
            loop = (found[1], found[2].split(), [])
        elif loop is not None and line == "done":
            name, values, inside = loop
            yield from (each.replace(f"${name}", value) for value in values for each in inside)
            loop = None
        elif loop is not None:
            loop[2].append(line)
        else:
            yield line
    assert loop is None, "a loop that never ends"
