"""Faults on disk, injected into a tiny project: every one is noticed or mended, and none is a traceback.

A project is carried through all its stages once. Then, case by case on a fresh copy of it:

    kill    a command dies at one change of the disk (a rename, a removal, a new folder, a file opened to write) and so
            changes nothing more; the same command, or `weftlm run`, then ends in the same bits
    bit     one bit of one file changes; the next command that reads the file refuses it by name, makes it again, or
            gives what it gave before
    torn    a file is cut in half; likewise
    full    files cannot grow beyond a limit, as on a full disk; the command says so, and succeeds once there is room
    folder  something else is where a file or folder belongs: a clear error, or it is mended

A case fails where a command ends with success and other results, with a traceback, or cannot go on. Cases that were
tried are kept in the work folder, so that a run that was stopped continues.

    nice -n 19 python benchmarks/faults.py --work /tmp/faults  # regenerates benchmarks/results/faults.{json,md}
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import _common
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from support.faults import Killed, killing
from support.tiny_project import recipe_value, write_corpora

from weftlm.cli.main import main as weftlm
from weftlm.pipeline import expert_library, export  # noqa: F401 - so that no child need import them
from weftlm.pipeline import work as _work  # noqa: F401

KINDS = ("kill", "bit", "torn", "full", "folder")
RUN, RECIPE = "runs/one", "recipe.yaml"
COMMANDS: dict[str, tuple[list[str], list[str]]] = {
    "prepare --rebuild": (["prepare", RECIPE, "--rebuild"], ["prepare", RECIPE, "--rebuild"]),
    **{
        f"run --from {stage}": (["run", RECIPE, "--from", stage, "--until", stage], ["run", RECIPE])
        for stage in ("train", "experts", "route", "score", "gate", "distil", "evaluate", "report")
    },
    "experts train --replace": (
        ["experts", "train", RECIPE, "--replace", "--set", "experts.gate.steps=3"],
        ["experts", "train", RECIPE, "--replace"],
    ),
    "experts gate": (["experts", "gate", RECIPE, "cooking"], ["experts", "gate", RECIPE, "cooking"]),
    "score --overwrite": (["score", RECIPE, "--overwrite"], ["score", RECIPE]),
    "gate fit": (["gate", "fit", RECIPE], ["gate", "fit", RECIPE]),
    "gate distil": (["gate", "distil", RECIPE], ["gate", "distil", RECIPE]),
}
"""Name -> the command that meets a fault, and the one that goes on."""
READERS: list[tuple[str, list[str]]] = [
    ("runs/one/prepared/", ["prepare", RECIPE]),
    ("runs/one/model/", ["export", f"{RUN}/model", "--output", "out"]),
    ("runs/one/experts/", ["experts", "show", f"{RUN}/experts", "cooking"]),
    ("runs/one/scores/", ["gate", "fit", RECIPE]),
    ("runs/one/gate/gate", ["gate", "certify", RECIPE]),
    ("runs/one/gate/fit", ["gate", "certify", RECIPE]),
    ("runs/one/gate/certificate", ["run", RECIPE, "--from", "report"]),
    ("runs/one/students/student/", ["export", f"{RUN}/students/student", "--output", "out", "--expert", "cooking"]),
    ("runs/one/students/student.json", ["gate", "distil", RECIPE]),
    ("runs/one/routed/", ["export", f"{RUN}/routed/merged", "--output", "out"]),
    ("runs/one/stages/", ["status", RUN]),
    ("runs/one/result.json", ["train", RECIPE]),
    ("runs/one/windows.safetensors", ["train", RECIPE]),
    ("runs/one/metrics.jsonl", ["train", RECIPE]),
    ("runs/one/routing.json", ["run", RECIPE, "--from", "report"]),
    ("runs/one/evaluation.json", ["run", RECIPE, "--from", "report"]),
    ("runs/one/checkpoints/", ["train", RECIPE]),
]
"""Beginning of a path -> the next command that reads such a file."""
DECIDING = (
    "model/model.safetensors", "scores/index.json", "gate/gate.safetensors", "students/student/gate.safetensors",
)  # fmt: skip
NAMES_IT = (
    "altered", "torn", "cannot be read", "missing", "is gone", "has changed", "digest", "corrupt", "bytes", "JSON",
    "not safetensors", "holds no", "of another format", "did you mean", "not of the format", "was replaced", "must",
    "cut off", "differ", "unknown", "allowed", "another", "plain file", "directory",
)  # fmt: skip


@dataclass(frozen=True)
class Done:
    """How a command ended.

    Attributes:
        code: exit code; 137 where it was killed.
        said: everything it printed.
        changes: of the disk, begun.
    """

    code: int
    said: str
    changes: int

    @property
    def broke(self) -> bool:
        """Whether it ended as no command may."""
        return "Traceback (most recent call last)" in self.said or self.code not in (0, 1, 2, 137)


class Project:
    """A finished project in one place, restored from a copy before every case."""

    def __init__(self, work: Path) -> None:
        self.place, self.copy, self.said = work / "project", work / "finished", work / "said.txt"
        self.counts = work / "changes.json"
        if not self.copy.exists():
            self._make()
        self.decided = self.digests()

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
        done = self.call(["run", RECIPE])
        if done.code:
            raise SystemExit(f"the project cannot be made:\n{done.said}")
        shutil.copytree(self.place, self.copy, symlinks=True)

    def restore(self) -> None:
        """Bring the finished project back."""
        shutil.rmtree(self.place, ignore_errors=True)
        shutil.copytree(self.copy, self.place, symlinks=True)

    def files(self) -> list[str]:
        """Files of the finished project that some command reads, by their paths in it."""
        every = sorted(str(path.relative_to(self.copy)) for path in self.copy.rglob("*") if path.is_file())
        return [name for name in every if reader(name) is not None and "/." not in name]

    def changes(self, command: str) -> int:
        """How often an undisturbed command changes the disk; counted once, in a project that is restored after it."""
        counts: dict[str, int] = json.loads(self.counts.read_text()) if self.counts.exists() else {}
        if command not in counts:
            counts[command] = self.call(COMMANDS[command][0]).changes
            self.counts.write_text(json.dumps(counts))
            self.restore()
        return counts[command]

    def digests(self) -> dict[str, str]:
        """Of the files that decide what is served."""
        folder = (self.place if (self.place / RUN).exists() else self.copy) / RUN
        return {
            name: hashlib.blake2b((folder / name).read_bytes()).hexdigest() if (folder / name).exists() else "gone"
            for name in DECIDING
        }

    def call(self, arguments: Sequence[str], *, step: int | None = None, limit: int | None = None) -> Done:
        """Run a command in a process of its own.

        Args:
            arguments: of `weftlm`.
            step: the change of the disk at which it dies; None for none.
            limit: bytes no file may exceed; None for any.
        """
        with self.said.open("w") as said, tempfile.NamedTemporaryFile("r") as count:
            child = os.fork()
            if child == 0:
                self._child(arguments, said.fileno(), Path(count.name), step, limit)
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            return Done(code, self.said.read_text(errors="replace"), int(count.read() or 0))

    def _child(self, arguments: Sequence[str], said: int, count: Path, step: int | None, limit: int | None) -> None:
        os.dup2(said, 1)
        os.dup2(said, 2)
        os.chdir(self.place)
        sys.argv = ["weftlm", *arguments]
        code, counted = 1, os.open(count, os.O_WRONLY)
        if limit is not None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        try:
            with killing(10**9 if step is None else step) if limit is None else nullcontext() as countdown:
                try:
                    weftlm(list(arguments))
                    code = 0
                except SystemExit as stopped:
                    code = stopped.code if isinstance(stopped.code, int) else int(stopped.code is not None)
                except Killed:
                    code = 137
                if countdown is not None:
                    code = 137 if countdown.dead else code
                    os.write(counted, str(countdown.begun).encode())
        except BaseException:  # noqa: BLE001 - the end of this process, whatever it is
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def reader(name: str) -> list[str] | None:
    """The next command that reads a file; None where none does."""
    found = next((command for start, command in READERS if name.startswith(start)), None)
    expert = name.removeprefix(f"{RUN}/experts/").partition("/")[0]
    return [*found[:-1], expert] if found is not None and found[0] == "experts" and "." not in expert else found


# -- cases --------------------------------------------------------------------------------------------------------


def kill(project: Project, case: Mapping[str, Any]) -> str:
    """A command killed at one step, and gone on with."""
    command, again = COMMANDS[case["command"]]
    changes = project.changes(case["command"])
    killed = project.call(command, step=(2 * case["point"] + 1) * changes // (2 * case["of"]))
    if killed.broke:
        return f"the killed command broke: {killed.said[-1500:]}"
    after = project.call(again)
    if after.code or after.broke:
        return f"exit {after.code} afterwards: {after.said[-1500:]}"
    return _same(project)


def damaged(project: Project, case: Mapping[str, Any]) -> str:
    """A file changed, cut or replaced, and read."""
    name = case["file"]
    path = project.place / name
    data = bytearray(path.read_bytes())
    if case["kind"] == "bit":
        if not data:
            return ""
        place = random.Random(case["seed"]).randrange(8 * len(data))
        data[place // 8] ^= 1 << place % 8
        path.write_bytes(data)
    elif case["kind"] == "torn":
        path.write_bytes(data[: len(data) // 2])
    else:
        path.unlink()
        path.mkdir()
    if "/checkpoints/" in name:
        (project.place / RUN / "result.json").unlink()
    command = reader(name)
    assert command is not None
    done = project.call(command)
    if done.broke:
        return f"exit {done.code}: {done.said[-1500:]}"
    if done.code:
        return "" if any(word in done.said for word in NAMES_IT) else f"does not say why: {done.said[-800:]}"
    if any(word in done.said for word in ("altered", "again", "cannot be read", "has changed", "corrupt", "torn")):
        return _same(project, but=name)
    if "/checkpoints/" in name:  # one before the newest is not read
        return _same(project)
    harmless = path.suffix in (".json", ".jsonl") and _means(path) == _means(project.copy / name)
    return "" if harmless or (_same(project) == "" and _mended(project, name)) else "not noticed"


def _means(path: Path) -> Any:
    """What a JSON file says, whatever its keys' checksums; its bytes where it is none."""
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return {key: each for key, each in value.items() if "sum" not in key} if isinstance(value, dict) else value


def _mended(project: Project, name: str) -> bool:
    """Whether a file is as it was, or no longer there because nothing needs it."""
    path = project.place / name
    return not path.exists() or path.read_bytes() == (project.copy / name).read_bytes()


def full(project: Project, case: Mapping[str, Any]) -> str:
    """A command on a full disk, and again with room."""
    command, again = COMMANDS[case["command"]]
    met = project.call(command, limit=case["limit"])
    if met.broke:
        return f"exit {met.code}: {met.said[-1500:]}"
    if met.code and "full" not in met.said and "space" not in met.said and "large" not in met.said:
        return f"does not say that the disk is full: {met.said[-800:]}"
    after = project.call(again)
    return f"exit {after.code} with room: {after.said[-1500:]}" if after.code or after.broke else _same(project)


def _same(project: Project, but: str = "") -> str:
    """What of the deciding files differs from the undisturbed project; empty where nothing does."""
    differ = [name for name, digest in project.digests().items() if digest != project.decided[name]]
    differ = [name for name in differ if not but.endswith(name)]
    return f"other results: {', '.join(differ)}" if differ else ""


TRY: Mapping[str, Callable[[Project, Mapping[str, Any]], str]] = {
    "kill": kill, "bit": damaged, "torn": damaged, "full": full, "folder": damaged,
}  # fmt: skip


def cases(project: Project, points: int, each: int, limits: Sequence[int]) -> Iterator[dict[str, Any]]:
    """All there is to try, kinds in turn.

    Args:
        project: the finished one.
        points: kills of each command, evenly over its changes of the disk.
        each: every which file is damaged.
        limits: sizes of file on full disks.
    """
    names = project.files()[::each]
    for number, name in enumerate(names):
        yield {"kind": "bit", "file": name, "seed": number}
        yield {"kind": "torn", "file": name}
        if number % 4 == 0:
            yield {"kind": "folder", "file": name}
    for command in COMMANDS:
        for point in range(points):
            yield {"kind": "kill", "command": command, "point": point, "of": points}
        for limit in limits:
            yield {"kind": "full", "command": command, "limit": limit}


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Try the cases that were not tried yet, until they or the time are spent."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    place = arguments.work or Path(tempfile.mkdtemp(prefix="faults-"))
    place.mkdir(parents=True, exist_ok=True)
    kept, begun = place / "tried.jsonl", time.monotonic()
    tried = [json.loads(line) for line in kept.read_text().splitlines()] if kept.exists() else []
    known = {json.dumps(each["case"], sort_keys=True) for each in tried}
    project = Project(place)
    points, each, limits = (1, 12, ()) if arguments.quick else (arguments.points, 1, (1_000, 30_000))
    todo = list(cases(project, points, each, limits)) if not arguments.quick else _few(project, each)
    random.Random(0).shuffle(todo)
    for case in todo:
        if json.dumps(case, sort_keys=True) in known:
            continue
        if arguments.minutes and time.monotonic() - begun > 60 * arguments.minutes:
            break
        project.restore()
        found = {"case": case, "failure": TRY[case["kind"]](project, case)}
        tried.append(found)
        with kept.open("a") as file:
            file.write(json.dumps(found) + "\n")
        if found["failure"]:
            _common.say(f"FAILS {json.dumps(case)}: {found['failure']}")
    if arguments.work is None:
        shutil.rmtree(place)
    counts = Counter(each["case"]["kind"] for each in tried)
    failed = Counter(each["case"]["kind"] for each in tried if each["failure"])
    return {
        "kinds": {kind: {"tried": counts[kind], "failures": failed[kind]} for kind in KINDS},
        "of": len(todo),
        "failures": [each for each in tried if each["failure"]],
    }


def _few(project: Project, each: int) -> list[dict[str, Any]]:
    """Some of every kind."""
    names = project.files()[::each]
    found: list[dict[str, Any]] = [{"kind": "bit", "file": name, "seed": 0} for name in names]
    found += [{"kind": "torn", "file": names[0]}, {"kind": "folder", "file": names[-1]}]
    found += [
        {"kind": "kill", "command": "gate fit", "point": 0, "of": 2},
        {"kind": "full", "command": "gate fit", "limit": 500},
    ]
    return found


def to_markdown(record: Mapping[str, Any]) -> str:
    """The results page."""
    rows = [[kind, found["tried"], found["failures"]] for kind, found in record["kinds"].items()]
    tried = sum(found["tried"] for found in record["kinds"].values())
    failures = "".join(f"- {json.dumps(each['case'])}: {each['failure'][:300]}\n" for each in record["failures"])
    return (
        "# Faults on disk\n\nA tiny project, a fault on a copy of it, and the command that reads it or goes on.\n\n"
        + _common.table(["kind of fault", "tried", "failures"], rows)
        + f"\n\n{tried} of {record['of']} cases tried.\n\n"
        + (f"Failures:\n\n{failures}\n" if failures else "")
        + _common.environment_lines(record)
    )


def main() -> None:
    flags = _common.parser(__doc__ or "", seeds=1)
    flags.add_argument("--work", type=Path, default=None, help="work folder, to continue; a temporary one without it")
    flags.add_argument("--points", type=int, default=12, help="kills of each command")
    flags.add_argument("--minutes", type=float, default=0.0, help="time after which no further case begins; 0: none")
    arguments = flags.parse_args()
    _common.finish("faults", arguments, run(arguments), to_markdown)


if __name__ == "__main__":
    main()
