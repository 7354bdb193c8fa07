"""Faults on disk, one at a time, on copies of a finished project; every command runs in a process of its own.

A fault is survived where the command that meets it says so and names the file, or ends as it would have without it;
and where a command that was cut short, run again, ends as if it had not been.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
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
        words: of the command.
        again: the command that goes on; None for the same one.
        gone: what is removed before it, so that there is something to do.
    """

    words: Words
    again: Words | None = None
    gone: tuple[str, ...] = ()


COMMANDS: Mapping[str, Command] = {
    "prepare --rebuild": Command(("prepare", RECIPE, "--rebuild", "--set", "data.tokenizer.train.vocab_size=310")),
    **{
        f"run --from {stage}": Command(
            ("run", RECIPE, "--from", stage, "--until", stage), ("run", RECIPE, "--until", stage)
        )
        for stage in ("train", "experts", "route", "score", "gate", "distil", "evaluate", "report")
    },
    "experts train --replace": Command(
        ("experts", "train", RECIPE, "--replace", "--set", "experts.gate.steps=3", "--set", "experts.lora.rank=1")
    ),
    "experts gate": Command(("experts", "gate", RECIPE, "cooking", "--set", "experts.gate.steps=3")),
    "experts import": Command(("experts", "import", "library", "adapters/algebra", "adapters/cooking")),
    "experts merge": Command(("experts", "merge", LIBRARY, "cooking", "algebra", "--as", "both", "--to", "merged")),
    "experts remove": Command(("experts", "remove", LIBRARY, "cooking", "algebra")),
    "score --overwrite": Command(("score", RECIPE, "--overwrite", "--set", "gating.scores.samples=12")),
    "score": Command(("score", RECIPE), gone=(f"{RUN}/scores",)),
    "gate fit": Command(("gate", "fit", RECIPE, "--set", "gating.fit.steps=30")),
    "gate certify": Command(("gate", "certify", RECIPE), gone=(f"{RUN}/gate/certificate.json",)),
    "gate distil": Command(("gate", "distil", RECIPE, "--set", "gating.students.distil.steps=6")),
    "export": Command(("export", f"{RUN}/model", "--output", "out")),
    "export --format peft": Command(("export", LIBRARY, "--format", "peft", "--output", "out")),
    "report": Command(("report", RUN), gone=(f"{RUN}/report.html",)),
}
"""What may be cut short."""
WHOLE = Command(("run", RECIPE, "--from", "train"), ("run", RECIPE))
"""Cut short, it goes on through all stages without the option; slow."""

_EXPORT, _REPORT = ("export", f"{RUN}/model", "--output", "out"), ("report", RUN)
_SCORE, _STUDENT = ("score", RECIPE, "--overwrite"), f"{RUN}/students/student"
READERS: Sequence[tuple[str, Sequence[Words]]] = [
    (f"{RUN}/prepared/", [("prepare", RECIPE), ("eval", RECIPE), _SCORE, ("domains", RECIPE)]),
    (f"{RUN}/model/", [_EXPORT, ("eval", RECIPE), ("experts", "gate", RECIPE, "cooking"), ("serve", f"{RUN}/model")]),
    (
        f"{LIBRARY}/",
        [
            ("experts", "show", LIBRARY, "cooking"),
            ("experts", "list", LIBRARY),
            ("export", LIBRARY, "--format", "peft", "--output", "out"),
            _SCORE,
            ("experts", "merge", LIBRARY, "cooking", "algebra", "--to", "merged"),
        ],
    ),
    (f"{RUN}/scores/", [("gate", "fit", RECIPE, "--set", "gating.fit.steps=30"), ("gate", "certify", RECIPE)]),
    (f"{RUN}/gate/gate", [("gate", "certify", RECIPE), ("gate", "fit", RECIPE)]),
    (f"{RUN}/gate/fit", [("gate", "certify", RECIPE), ("gate", "fit", RECIPE), _REPORT]),
    (f"{RUN}/gate/certificate", [("run", RECIPE, "--from", "report"), ("gate", "certify", RECIPE), _REPORT]),
    (
        f"{_STUDENT}/",
        [("serve", _STUDENT), ("export", _STUDENT, "--output", "out", "--expert", "cooking")],
    ),
    (f"{RUN}/students/student.json", [("gate", "distil", RECIPE), ("run", RECIPE, "--from", "evaluate"), _REPORT]),
    (f"{RUN}/routed/", [("export", f"{RUN}/routed/merged", "--output", "out"), ("serve", f"{RUN}/routed/merged")]),
    (f"{RUN}/stages/", [("status", RUN), ("run", RECIPE)]),
    (f"{RUN}/result.json", [("train", RECIPE), ("run", RECIPE, "--from", "report"), ("run", RECIPE), _REPORT]),
    (f"{RUN}/windows.safetensors", [("train", RECIPE), ("run", RECIPE, "--from", "report"), _REPORT]),
    (f"{RUN}/metrics.jsonl", [("train", RECIPE), ("run", RECIPE, "--from", "report"), _REPORT]),
    (f"{RUN}/run.json", [("eval", RECIPE), _REPORT]),
    (f"{RUN}/routing.json", [("run", RECIPE, "--from", "report"), ("run", RECIPE)]),
    (f"{RUN}/evaluation.json", [("run", RECIPE, "--from", "report"), ("run", RECIPE)]),
    (f"{RUN}/checkpoints/", [("train", RECIPE)]),
    ("adapters/algebra/", [("experts", "import", "library", "adapters/algebra")]),
]  # fmt: skip
"""Beginning of a path -> the commands that read such a file."""

_BINARY = (".safetensors", ".npy", ".bin")
_JSON = (
    "evaluation.json",
    "certificate.json",
    "fit.json",
    "student.json",
    "routing.json",
    "card.json",
    "tokenizer.json",
)
_PASSING = re.compile(r"seconds|per_second|time|added|began|ended|checksum|files|load|peak")
"""Keys whose values differ from run to run."""
_PASSED_OVER = ("checkpoints", "training")
_LEFT = re.compile(r"\.writing(-|$)|\.removing$|^\..+\.(old|preparing|partial)$")


@dataclass(frozen=True)
class Done:
    """How a command ended.

    Attributes:
        code: exit code; 137 where it was killed.
        out: stdout.
        said: stdout and stderr.
        changes: of the disk, begun.
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
        work: folder for it; what was made there is used again.
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
            "routing": {"routers": ["merged"], "build": ["merged"], "timed_pairs": 0},
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

    def files(self) -> list[str]:
        """Those of them that some command reads."""
        return [name for name in self.whole_files() if readers(name)]

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

    def call(self, words: Words, *, step: int | None = None, limit: int | None = None) -> Done:
        """Run a command in a process of its own.

        Args:
            words: of the command.
            step: the change of the disk at which it dies; None for none.
            limit: bytes no file may exceed; None for any.
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
    if path.suffix in _BINARY:
        data = path.read_bytes()
        if path.name in ("gate.safetensors", "statistics.safetensors"):  # their facts tell the seconds it took
            data = data[8 + int.from_bytes(data[:8], "little") :]
        return hashlib.blake2b(data, digest_size=16).hexdigest()
    if path.name in _JSON:
        try:
            value = json.loads(path.read_bytes())
        except ValueError:
            return "no JSON"
        return hashlib.blake2b(json.dumps(_lasting(value), sort_keys=True).encode(), digest_size=16).hexdigest()
    return "there"


def _lasting(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _lasting(each) for key, each in value.items() if not _PASSING.search(key)}
    return [_lasting(each) for each in value] if isinstance(value, list) else value


def readers(name: str) -> Sequence[Words]:
    """The commands that read a file."""
    found = next((commands for start, commands in READERS if name.startswith(start)), ())
    expert = name.removeprefix(f"{LIBRARY}/").partition("/")[0]
    if name.startswith(f"{LIBRARY}/") and "." not in expert:
        return [(*words[:-1], expert) if words[:2] == ("experts", "show") else words for words in found]
    return found


# -- cases --------------------------------------------------------------------------------------------------------


def kill(project: Project, case: Mapping[str, Any]) -> str:
    """A command dies at one change of the disk and is gone on with; `damage` is of a file it wrote, in between."""
    command = WHOLE if case["command"] == "run --from train, all" else COMMANDS[case["command"]]
    done, wanted = project.undisturbed(command.words, command.gone)
    project.restore(command.gone)
    before = _times(project.place)
    step = (2 * case["point"] + 1) * done.changes // (2 * case["of"])
    killed = project.call(command.words, step=step)
    if killed.broke:
        return f"the killed command broke: {killed.broke}"
    damaged = _between(project, before, case["damage"]) if case.get("damage") else ""
    after = project.call(command.again or command.words)
    if after.broke:
        return f"afterwards, {damaged}: {after.broke}"
    if after.code and damaged and _named(damaged, after.said):
        return ""
    differences = _differences(project, wanted, but=damaged)
    if after.code and not [each for each in differences if "left over" not in each]:
        return ""  # it had done all of it
    if after.code:
        return f"exit {after.code} afterwards, {damaged}: {after.said[-1500:]}"
    return "; ".join(differences[:5])


def _times(place: Path) -> dict[str, tuple[int, int]]:
    return {
        str(path.relative_to(place)): (path.stat().st_ino, path.stat().st_mtime_ns)
        for path in sorted(place.rglob("*"))
        if path.is_file() and not path.name.endswith(".lock")
    }


def _between(project: Project, before: Mapping[str, tuple[int, int]], damage: str) -> str:
    """Damage one of the files written since; gives its path, empty where nothing was written."""
    kind, _, seed = damage.partition(" ")
    written = [name for name, facts in _times(project.place).items() if before.get(name) != facts]
    written = [name for name in written if (project.place / name).stat().st_size]
    if not written:
        return ""
    name = random.Random(seed).choice(written)
    _damage(project.place / name, kind, int(seed))
    return name


def _damage(path: Path, kind: str, seed: int) -> None:
    data = bytearray(path.read_bytes())
    if kind == "bit" and data:
        place = random.Random(seed).randrange(8 * len(data))
        data[place // 8] ^= 1 << place % 8
        path.write_bytes(data)
    elif kind == "torn":
        path.write_bytes(data[: len(data) // 2])
    elif kind == "folder":
        path.unlink()
        path.mkdir()


def damaged(project: Project, case: Mapping[str, Any]) -> str:
    """A file changed, cut or replaced by a folder, and read."""
    name = case["file"]
    words = tuple(case["reader"])
    gone = (f"{RUN}/result.json",) if "/checkpoints/" in name else ()
    done, wanted = project.undisturbed(words, gone)
    project.restore(gone)
    _damage(project.place / name, case["kind"], case.get("seed", 0))
    met = project.call(words)
    if met.broke:
        return met.broke
    page = project.place / RUN / "report.html"
    told = met.said + (page.read_text() if page.exists() and "report" in words else "")
    if met.code:
        return "" if _named(name, met.said) else f"does not name the file: {met.said[-800:]}"
    differences = _differences(project, wanted, but=name)
    if _named(name, told):  # it was made again, and what was of the old one is removed
        differences = [each for each in differences if " is gone, " not in each]
    if differences:
        return f"not noticed: {'; '.join(differences[:5])}"
    same = met.out == done.out or words[0] == "run"  # which tells seconds
    return "" if same or _named(name, told) else f"prints something else: {met.out[-800:]}"


def _named(name: str, said: str) -> bool:
    """Whether a message names a file, its folder or its kind of content, however it breaks lines."""
    path = Path(name)
    flat = re.sub(r"\s+", "", said)
    return any(
        part in flat for part in (path.name, path.parent.name + "/", f"expert'{path.parent.name}'", str(path.parent))
    )


def full(project: Project, case: Mapping[str, Any]) -> str:
    """A command on a full disk, and again with room."""
    command = COMMANDS[case["command"]]
    _, wanted = project.undisturbed(command.words, command.gone)
    project.restore(command.gone)
    met = project.call(command.words, limit=case["limit"])
    if met.broke:
        return met.broke
    if met.code and not re.search("full|space|too large|limit", met.said):
        return f"does not say that the disk is full: {met.said[-800:]}"
    after = project.call(command.again or command.words) if met.code else met
    if after.broke or after.code:
        return f"exit {after.code} with room: {after.said[-1500:]}"
    return "; ".join(_differences(project, wanted)[:5])


def _differences(project: Project, wanted: Mapping[str, str], but: str = "") -> list[str]:
    """What is other than an undisturbed command leaves it."""
    found = project.left()
    names = [name for name in sorted({*found, *wanted}) if found.get(name) != wanted.get(name)]
    return [f"{name} is {found.get(name, 'gone')}, not {wanted.get(name, 'there')}" for name in names if name != but]


TRY: Mapping[str, Callable[[Project, Mapping[str, Any]], str]] = {
    "kill": kill, "between": kill, "bit": damaged, "torn": damaged, "folder": damaged, "full": full,
}  # fmt: skip
"""Kind of fault -> what tries a case of it and gives what went wrong; empty where nothing did."""
