"""Faults on disk, one at a time, on copies of a finished project; every command runs in a process of its own.

A fault is survived where the command that meets it says so and names the file, or ends as it would have without it;
and where a command that was cut short, run again, ends as if it had not been. `benchmarks/faults.py` tries more.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import resource
import shutil
import signal
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import yaml
from support.faults import killing
from support.tiny_project import recipe_value, write_corpora

from weftlm.cli.main import main as weftlm
from weftlm.pipeline import project_report as _report  # noqa: F401 - so that no child need import what the commands do
from weftlm.serving import app, inspector, server  # noqa: F401 - likewise

RUN, RECIPE, LIBRARY = "runs/one", "recipe.yaml", "runs/one/experts"
Words = tuple[str, ...]


class Command(NamedTuple):
    """A command that changes the project.

    Attributes:
        words: Its words.
        again: Command that goes on; None for the same one.
        gone: What is removed before it, so that there is something to do.
    """

    words: Words
    again: Words | None = None
    gone: tuple[str, ...] = ()


COMMANDS: dict[str, Command] = {
    "experts import": Command(("experts", "import", "library", "adapters/algebra", "adapters/cooking")),
    "experts remove": Command(("experts", "remove", LIBRARY, "cooking", "algebra")),
    "score": Command(("score", RECIPE), gone=(f"{RUN}/scores",)),
    "gate fit": Command(("gate", "fit", RECIPE, "--set", "gating.fit.steps=30")),
    "export": Command(("export", f"{RUN}/model", "--output", "out")),
}
"""What may be cut short."""
_PASSING = re.compile(r"seconds|per_second|time|added|began|ended|checksum|files|load|peak")
"""Keys whose values differ from run to run."""
_SAME = ("evaluation", "certificate", "fit", "student", "routing", "card", "tokenizer")
_LEFT = re.compile(r"\.writing(-|$)|\.removing$|^\..+\.(old|preparing|partial)$")


@dataclass(frozen=True)
class Done:
    """How a command ended.

    Attributes:
        code: Exit code; 137 where it was killed.
        out: stdout.
        said: stdout and stderr.
        changes: Number of changes of the disk it began.
    """

    code: int
    out: str
    said: str
    changes: int

    @property
    def broke(self) -> str:
        """Why it ended as no command may; empty where it did not."""
        wrong = "Traceback (most recent call last)" in self.said or self.code not in (0, 1, 2, 137)
        return f"exit {self.code}: {self.said[-1500:]}" if wrong else ""


class Project:
    """A finished project in one place, restored from a copy before every case.

    Args:
        work: Folder for it; what was made there is used again.
    """

    def __init__(self, work: Path) -> None:
        self.place, self.copy, self._work = work / "project", work / "finished", work
        self._known: dict[str, Any] = {}
        if not self.copy.exists():
            self._make()
        elif (work / "undisturbed.json").exists():
            self._known = json.loads((work / "undisturbed.json").read_text())

    def _make(self) -> None:
        shutil.rmtree(self.place, ignore_errors=True)
        write_corpora(self.place / "corpora")
        value = recipe_value()
        training = {"sequence_length": 32, "batch_sequences": 8, "steps": 4, "lr": 3e-3, "device": "cpu"}
        value |= {
            "run": RUN,
            "prepared": f"{RUN}/prepared",
            "training": {**value["training"], "steps": 8, "save_every_steps": 4},
            "evaluation": {"every_steps": 8},
            "experts": {
                "lora": {"rank": 2, "alpha": 4}, "training": training, "validate_every_steps": 0,
                "gate": {"steps": 2}, "statistics_examples": 4,
            },
            "routing": {"routers": ["merged"], "build": ["merged"]},
            "gating": {
                "scores": {"length": 8, "sequences": 24, "samples": 16, "batch_size": 40},
                "fit": {"unit": "token", "steps": 20, "report_every_steps": 10, "best_response_steps": 10},
                "held_out_fraction": 0.5,
                "students": {"distil": {"steps": 4, "evaluate_every_steps": 2}, "experts_per_token": []},
            },
        }  # fmt: skip
        (self.place / RECIPE).write_text(yaml.safe_dump(value))
        for words in (("run", RECIPE), ("export", LIBRARY, "--format", "peft", "--output", "adapters")):
            done = self.call(words)
            assert done.code == 0, done.said
        shutil.copytree(self.place, self.copy, symlinks=True)

    def restore(self, gone: Sequence[str] = ()) -> None:
        """Bring the finished project back, but for what is `gone`."""
        shutil.rmtree(self.place, ignore_errors=True)
        shutil.copytree(self.copy, self.place, symlinks=True)
        for name in gone:
            path = self.place / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def whole_files(self) -> list[str]:
        """Files of the finished project, by their paths in it; those that are empty or hidden left out."""
        every = sorted(path for path in self.copy.rglob("*") if path.is_file() and path.stat().st_size)
        return [str(path.relative_to(self.copy)) for path in every if path.name[0] != "."]

    def undisturbed(self, words: Words, gone: Sequence[str] = ()) -> tuple[Done, dict[str, str]]:
        """How a command ends that meets no fault, and what it leaves; found once."""
        key = " ".join(words)
        if key not in self._known:
            self.restore(gone)
            done = self.call(words)
            assert done.code == 0, f"{key}: {done.said}"
            self._known[key] = [asdict(done), self.left()]
            (self._work / "undisturbed.json").write_text(json.dumps(self._known))
        return Done(**self._known[key][0]), self._known[key][1]

    def left(self) -> dict[str, str]:
        """What decides anything, by path: the digest of what does not differ from run to run, or that it is there."""
        found = {}
        for path in sorted(self.place.rglob("*")):
            name = path.relative_to(self.place)
            unlisted = path.is_file() and (path.parent / ".unlisted").exists()  # which the library's next write removes
            if unlisted or any(_LEFT.search(part) for part in name.parts):
                found[str(name)] = "left over"
            elif path.is_file() and not any(
                part[0] == "." or part in ("checkpoints", "training") for part in name.parts
            ):
                found[re.sub("~[0-9]+/", "/", str(name))] = _digest(path)  # an expert that replaced another
        return found

    def differences(self, wanted: Mapping[str, str], but: str = "") -> list[str]:
        """What is other than an undisturbed command leaves it."""
        found = self.left()
        names = [name for name in sorted({*found, *wanted}) if found.get(name) != wanted.get(name)]
        return [
            f"{name} is {found.get(name, 'gone')}, not {wanted.get(name, 'there')}" for name in names if name != but
        ]

    def call(self, words: Words, *, step: int | None = None, limit: int | None = None) -> Done:
        """Run a command in a process of its own.

        Args:
            words: Its words.
            step: Change of the disk at which it dies; None for none.
            limit: Bytes no file may exceed; None for any.
        """
        places = [self._work / name for name in ("out.txt", "err.txt", "changes.txt")]
        opened = [os.open(place, os.O_CREAT | os.O_TRUNC | os.O_WRONLY) for place in places]
        child = os.fork()
        if child == 0:
            self._child(words, opened, step, limit)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        for each in opened:
            os.close(each)
        out, err, changes = (place.read_text(errors="replace") for place in places)
        return Done(code, out, out + err, int(changes or 0))

    def _child(self, words: Words, opened: Sequence[int], step: int | None, limit: int | None) -> None:
        os.dup2(opened[0], 1)
        os.dup2(opened[1], 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
        os.chdir(self.place)
        # The parent's native thread pool is gone after a fork; two threads that make it at once trip over each other.
        torch.set_num_threads(torch.get_num_threads())
        sys.argv = ["weftlm", *words]
        code = 1
        if limit is not None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        try:
            counting = killing(10**9 if step is None else step, die=lambda: os._exit(137))
            with mock.patch.object(server.Server, "run"), counting if limit is None else nullcontext() as countdown:
                try:
                    weftlm([*words, "--port", "0"] if words[0] == "serve" else list(words))
                    code = 0
                except SystemExit as stopped:
                    code = stopped.code if isinstance(stopped.code, int) else int(stopped.code is not None)
            if countdown is not None:
                os.write(opened[2], str(countdown.begun).encode())
        except BaseException:  # noqa: BLE001 - the end of this process, whatever it is
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _digest(path: Path) -> str:
    """Digest of what must be the same in every run; that it is there, for what need not."""
    data = path.read_bytes()
    if path.name in ("gate.safetensors", "statistics.safetensors"):  # their facts tell the seconds it took
        data = data[8 + int.from_bytes(data[:8], "little") :]
    elif path.stem in _SAME and path.suffix == ".json":
        try:
            data = json.dumps(_lasting(json.loads(data)), sort_keys=True).encode()
        except ValueError:
            return "no JSON"
    elif path.suffix not in (".safetensors", ".npy", ".bin"):
        return "there"
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def _lasting(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _lasting(each) for key, each in value.items() if not _PASSING.search(key)}
    return [_lasting(each) for each in value] if isinstance(value, list) else value


def killed(project: Project, command: Command, point: int, of: int) -> tuple[Done, dict[str, str]]:
    """A command dies at one of its changes of the disk; gives how, and what it would have left.

    Args:
        point: Place of the death, 0 .. of - 1, evenly over the changes.
        of: Number of places.
    """
    done, wanted = project.undisturbed(command.words, command.gone)
    project.restore(command.gone)
    return project.call(command.words, step=(2 * point + 1) * done.changes // (2 * of)), wanted


def kill(project: Project, command: Command, point: int, of: int) -> str:
    """What goes wrong where a command dies and is gone on with; empty where nothing does."""
    died, wanted = killed(project, command, point, of)
    if died.broke:
        return f"the killed command broke: {died.broke}"
    return went_on(project, command, wanted)


def went_on(
    project: Project, command: Command, wanted: Mapping[str, str], but: str = "", named: Callable[[str], bool] = bool
) -> str:
    """What goes wrong where a command that was cut short is gone on with.

    Args:
        wanted: What it would have left.
        but: A file that was damaged in between.
        named: Whether a message names that file.
    """
    after = project.call(command.again or command.words)
    if after.broke:
        return f"afterwards, {but}: {after.broke}"
    if after.code and but and named(after.said):
        return ""
    differences = project.differences(wanted, but=but)
    if after.code and not [each for each in differences if "left over" not in each]:
        return ""  # it had done all of it
    return f"exit {after.code} afterwards, {but}: {after.said[-1500:]}" if after.code else "; ".join(differences[:5])


def full(project: Project, command: Command, limit: int) -> str:
    """What goes wrong where a command meets a full disk, and again with room; empty where nothing does."""
    _, wanted = project.undisturbed(command.words, command.gone)
    project.restore(command.gone)
    met = project.call(command.words, limit=limit)
    if met.broke:
        return met.broke
    if met.code and not re.search("full|space|too large|limit", met.said):
        return f"does not say that the disk is full: {met.said[-800:]}"
    after = project.call(command.again or command.words) if met.code else met
    if after.broke or after.code:
        return f"exit {after.code} with room: {after.said[-1500:]}"
    return "; ".join(project.differences(wanted)[:5])
