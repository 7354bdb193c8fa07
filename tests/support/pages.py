"""Follows the pages as a reader would: every block of code, in order, in a folder of its own.

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
NOT_RUN = re.compile(r"^\s*<!-- not run: \S.*? -->\s*\Z", re.MULTILINE)
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
    "gating.students.direct.fit.steps": 8, "gating.students.distil.steps": 4,
}  # fmt: skip
"""Sizes that recipes leave at their defaults, in those that have the first section."""


WHOLE: dict[str, Any] = {
    "run": "runs/x", "data": {"corpora": [{"builtin": "all"}]}, "model": {"architecture": "llama"}, "experts": {},
    "mixture": {"policy": "uniform"}, "training": {"steps": 1},
}  # fmt: skip
"""What a part of a recipe is checked in."""


@dataclass(frozen=True)
class Block:
    """A block of code.

    Attributes:
        line: Its first line, from 1.
        language: Word after the fence.
        text: Lines inside.
        before: The page's words since the block before.
    """

    line: int
    language: str
    text: str
    before: str

    @property
    def marked(self) -> bool:
        """Whether the page says why it is not run."""
        return NOT_RUN.search(self.before) is not None


def blocks(page: str) -> Iterator[Block]:
    """Every block of a page in order; also indented ones, and fences of tildes."""
    lines, start, end, fence, language = page.splitlines(), None, 0, "", ""
    for number, line in enumerate(lines):
        found = re.match(r"\s*(`{3,}|~{3,})\s*(.*?)\s*$", line)
        if found is not None and start is None:
            start, fence, language = number, found[1], found[2]
        elif found is not None and line.strip() == fence:
            inside, before = lines[start + 1 : number], "\n".join(lines[end:start])
            yield Block(start + 1, language, "\n".join(inside) + "\n", before)
            start, end = None, number + 1
    assert start is None, f"the block that begins in line {start} never ends"


def smaller(text: str) -> str:
    """A block with every size replaced."""
    names = "|".join(sorted(SMALLER, key=len, reverse=True))
    sizes = re.compile(rf"\b({names})(: | ?= ?)[0-9][0-9_.]*\b", re.IGNORECASE)
    return sizes.sub(lambda found: f"{found[1]}{found[2]}{SMALLER[found[1].lower()]}", text)


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


def lines_of(text: str) -> Iterator[str]:
    """Commands of a shell block; a loop (`for x in a b; do`, lines, `done`) is written out."""
    lines = (line.strip() for line in text.replace("\\\n", " ").splitlines())
    for line in (each for each in lines if each and not each.startswith("#")):
        if (loop := re.fullmatch(r"for (\w+) in (.*); do", line)) is None:
            yield line
            continue
        inside = list(iter(lines.__next__, "done"))
        yield from (each.replace(f"${loop[1]}", value) for value in loop[2].split() for each in inside)


class Reader:
    """Does what a page shows, in the present folder.

    Args:
        call: The command line.
        monkeypatch: Patches that end with the test.
        names: What Python blocks know beforehand.
    """

    def __init__(self, call: Call, monkeypatch: pytest.MonkeyPatch, **names: Any) -> None:
        self.call, self.monkeypatch = call, monkeypatch
        self.module = ModuleType("page")
        self.module.__dict__.update(names)
        self.commands: list[str] = []
        self.server: Server | None = None
        self.port = 0
        self.ended: list[Any] = []
        self.thread: threading.Thread | None = None
        monkeypatch.setitem(sys.modules, "page", self.module)

    def follow(self, page: str) -> None:
        """Carry out every block that is not marked."""
        try:
            for block in blocks(page):
                try:
                    if not block.marked:
                        self.do(block)
                except BaseException as error:
                    error.add_note(f"in the block that begins in line {block.line}")
                    raise
        finally:
            self.stop()

    def do(self, block: Block) -> None:
        """Carry out one block."""
        text = block.text if self.server is None else block.text.replace(ADDRESS, f"127.0.0.1:{self.port}")
        if block.language == "yaml":
            saved = re.findall(r"[Ss]ave\s+this\s+as\s+`([\w-]+\.yaml)`", block.before)
            if saved:
                Path(saved[-1]).write_text(smaller_recipe(text))
            else:
                part = yaml.safe_load(text)
                make_recipe(part if "run" in part else {**WHOLE, **part})
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
                assert self.call(*shlex.split(command)[2:], code=2).strip().splitlines()[-1] == said[-1]
        else:
            raise AssertionError(f"a block of {block.language or 'no language'} that is not marked as not run")

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
                asked = [name, "-sS", "--fail-with-body", *arguments]
                said = subprocess.run(asked, capture_output=True, text=True, check=False, timeout=60)
                assert said.returncode == 0, said.stdout + said.stderr
            elif [name, *arguments[:2]] == ["python", "-m", "weftlm.integrations.lm_eval"]:
                patch.setattr(sys, "argv", ["lm_eval", *arguments[2:]])
                lm_eval.main()
            else:
                raise AssertionError(f"{line}: neither called nor marked as not run")

    def serve(self, arguments: list[str]) -> None:
        """`weftlm serve` in a thread, until the next one or the page's end."""
        self.stop()
        listens, run = threading.Event(), Server.run

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
