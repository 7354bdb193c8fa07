"""Faults on disk, injected into a tiny project: every one is noticed or mended, and none is a traceback.

A project is carried through all its stages once. Then, case by case on a fresh copy of it:

    kill     a command dies (`os._exit`) at one change of the disk: a rename, a removal, a new folder, a file opened to
             write, its first byte; the same command, or the one it names, then ends as if it had not died
    between  likewise, and one of the files it had written is damaged before the command goes on
    bit      one bit of one file changes; the next command that reads the file refuses it by name, makes it again, or
             gives what it gave before
    torn     a file is cut in half; likewise
    folder   a folder is where a file belongs; likewise
    full     files cannot grow beyond a limit, as on a full disk; the command says so, and succeeds once there is room

A case fails where a command ends with success and other results, with a traceback, without naming what is wrong, or
cannot go on. Cases that were tried are kept in the work folder, so that a run that was stopped continues.

    nice -n 19 python benchmarks/faults.py --work /tmp/faults  # regenerates benchmarks/results/faults.{json,md}
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import _common

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from support import faulty_project as faulty
from support.faulty_project import LIBRARY, RECIPE, RUN, Command, Project, Words

_LIMITS = (1_000, 30_000)
"""Bytes a file may have on a full disk."""
_WHOLE = "run --from train, all"
"""Cut short, it goes on through all stages without the option; slow."""
_STAGES = ("train", "experts", "route", "score", "gate", "distil", "evaluate", "report")
COMMANDS: Mapping[str, Command] = {
    **faulty.COMMANDS,
    "prepare --rebuild": Command(("prepare", RECIPE, "--rebuild", "--set", "data.tokenizer.train.vocab_size=310")),
    **{
        f"run --from {stage}": Command(
            ("run", RECIPE, "--from", stage, "--until", stage), ("run", RECIPE, "--until", stage)
        )
        for stage in _STAGES
    },
    "experts train --replace": Command(
        ("experts", "train", RECIPE, "--replace", "--set", "experts.gate.steps=3", "--set", "experts.lora.rank=1")
    ),
    "experts gate": Command(("experts", "gate", RECIPE, "cooking", "--set", "experts.gate.steps=3")),
    "score --overwrite": Command(("score", RECIPE, "--overwrite", "--set", "gating.scores.samples=12")),
    "gate certify": Command(("gate", "certify", RECIPE), gone=(f"{RUN}/gate/certificate.json",)),
    "gate distil": Command(("gate", "distil", RECIPE, "--set", "gating.students.distil.steps=6")),
    "export --format peft": Command(("export", LIBRARY, "--format", "peft", "--output", "out")),
    "report": Command(("report", RUN), gone=(f"{RUN}/report.html",)),
    _WHOLE: Command(("run", RECIPE, "--from", "train"), ("run", RECIPE)),
}

_EXPORT, _REPORT = ("export", f"{RUN}/model", "--output", "out"), ("report", RUN)
_SCORE, _STUDENT = ("score", RECIPE, "--overwrite"), f"{RUN}/students/student"
_AGAIN = ("run", RECIPE, "--from", "report")
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
        ],
    ),
    (f"{RUN}/scores/", [("gate", "fit", RECIPE, "--set", "gating.fit.steps=30"), ("gate", "certify", RECIPE)]),
    (f"{RUN}/gate/gate", [("gate", "certify", RECIPE), ("gate", "fit", RECIPE)]),
    (f"{RUN}/gate/fit", [("gate", "certify", RECIPE), ("gate", "fit", RECIPE), _REPORT]),
    (f"{RUN}/gate/certificate", [_AGAIN, ("gate", "certify", RECIPE), _REPORT]),
    (f"{_STUDENT}/", [("serve", _STUDENT), ("export", _STUDENT, "--output", "out", "--expert", "cooking")]),
    (f"{RUN}/students/student.json", [("gate", "distil", RECIPE), ("run", RECIPE, "--from", "evaluate"), _REPORT]),
    (f"{RUN}/routed/", [("export", f"{RUN}/routed/merged", "--output", "out"), ("serve", f"{RUN}/routed/merged")]),
    (f"{RUN}/stages/", [("status", RUN), ("run", RECIPE)]),
    (f"{RUN}/result.json", [("train", RECIPE), _AGAIN, ("run", RECIPE), _REPORT]),
    (f"{RUN}/windows.safetensors", [("train", RECIPE), _AGAIN, _REPORT]),
    (f"{RUN}/metrics.jsonl", [("train", RECIPE), _AGAIN, _REPORT]),
    (f"{RUN}/run.json", [("eval", RECIPE), _REPORT]),
    (f"{RUN}/routing.json", [_AGAIN, ("run", RECIPE)]),
    (f"{RUN}/evaluation.json", [_AGAIN, ("run", RECIPE)]),
    (f"{RUN}/checkpoints/", [("train", RECIPE)]),
    ("adapters/algebra/", [("experts", "import", "library", "adapters/algebra")]),
]
"""Beginning of a path -> the commands that read such a file."""


def readers(name: str) -> Sequence[Words]:
    """The commands that read a file."""
    found = next((commands for start, commands in READERS if name.startswith(start)), ())
    expert = name.removeprefix(f"{LIBRARY}/").partition("/")[0]
    if name.startswith(f"{LIBRARY}/") and "." not in expert:
        return [(*words[:-1], expert) if words[:2] == ("experts", "show") else words for words in found]
    return found


def kill(project: Project, case: Mapping[str, Any]) -> str:
    """A command dies at one change of the disk and is gone on with."""
    return faulty.kill(project, COMMANDS[case["command"]], case["point"], case["of"])


def between(project: Project, case: Mapping[str, Any]) -> str:
    """The same, with one of the files it wrote damaged in between."""
    command = COMMANDS[case["command"]]
    project.undisturbed(command.words, command.gone)
    project.restore(command.gone)
    before = _times(project.place)
    died, wanted = faulty.killed(project, command, case["point"], case["of"])
    if died.broke:
        return f"the killed command broke: {died.broke}"
    kind, _, seed = case["damage"].partition(" ")
    after = _times(project.place)
    written = [name for name in after if before.get(name) != after[name] and (project.place / name).stat().st_size]
    name = random.Random(seed).choice(written) if written else ""
    if name:
        _damage(project.place / name, kind, int(seed))
    return faulty.went_on(project, command, wanted, but=name, named=lambda said: _named(name, said))


def _times(place: Path) -> dict[str, int]:
    """When each file was written; copies keep it."""
    return {
        str(path.relative_to(place)): path.stat().st_mtime_ns
        for path in sorted(place.rglob("*"))
        if path.is_file() and not path.name.endswith(".lock")
    }


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
    differences = project.differences(wanted, but=name)
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
    return faulty.full(project, COMMANDS[case["command"]], case["limit"])


TRY: Mapping[str, Callable[[Project, Mapping[str, Any]], str]] = {
    "kill": kill, "between": between, "bit": damaged, "torn": damaged, "folder": damaged, "full": full,
}  # fmt: skip
"""Kind of fault -> what tries a case of it and gives what went wrong; empty where nothing did."""


def cases(project: Project, points: int) -> Iterator[dict[str, Any]]:
    """All there is to try.

    Args:
        project: The finished project.
        points: Kills of each command, evenly over its changes of the disk; as many with damage before it goes on.
    """
    for number, name in enumerate(filter(readers, project.whole_files())):
        commands = readers(name)
        for place, kind in enumerate(("bit", "torn", *(("folder",) if number % 4 == 0 else ()))):
            yield {"kind": kind, "file": name, "reader": commands[(number + place) % len(commands)], "seed": number}
    for command in COMMANDS:
        for point in range(points):
            yield {"kind": "kill", "command": command, "point": point, "of": points}
            damage = ("bit", "torn")[point % 2]
            if command != _WHOLE:
                about = {"point": point, "of": points, "damage": f"{damage} {point}"}
                yield {"kind": "between", "command": command, **about}
        for limit in () if command == _WHOLE else _LIMITS:
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
    todo = list(cases(project, arguments.points))
    random.Random(0).shuffle(todo)
    planned = len(todo)
    if arguments.quick:
        todo = [next(case for case in todo if case["kind"] == kind) for kind in ("between", "bit", "folder")]
    for case in todo:
        if json.dumps(case, sort_keys=True) in known:
            continue
        if arguments.minutes and time.monotonic() - begun > 60 * arguments.minutes:
            break
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
        "kinds": {kind: {"tried": counts[kind], "failures": failed[kind]} for kind in TRY},
        "of": planned,
        "points": arguments.points,
        "commands": [name for name in COMMANDS if name != _WHOLE],
        "failures": [each for each in tried if each["failure"]],
    }


def to_markdown(record: Mapping[str, Any]) -> str:
    """The results page."""
    rows = [[kind, found["tried"], found["failures"]] for kind, found in record["kinds"].items()]
    tried = sum(found["tried"] for found in record["kinds"].values())
    failures = "".join(f"- {json.dumps(each['case'])}: {each['failure'][:300]}\n" for each in record["failures"])
    return (
        "# Faults on disk\n\nA tiny project, a fault on a copy of it, and the command that reads it or goes on.\n\n"
        + _common.table(["kind of fault", "tried", "failures"], rows)
        + f"\n\n{tried} of {record['of']} cases tried, in random order: of every file that a command reads, a changed "
        f"bit and a cut; {record['points']} deaths of each of {len(record['commands'])} commands, evenly over their "
        f"changes of the disk, and as many with damage before they go on; two sizes of full disk.\n\n"
        + (f"Failures:\n\n{failures}\n" if failures else "")
        + _common.environment_lines(record)
    )


def main() -> None:
    flags = _common.parser(__doc__ or "", seeds=1)
    flags.add_argument("--work", type=Path, default=None, help="work folder, to continue; a temporary one without it")
    flags.add_argument("--points", type=int, default=6, help="deaths of each command")
    flags.add_argument("--minutes", type=float, default=0.0, help="time after which no further case begins; 0: none")
    arguments = flags.parse_args()
    _common.finish("faults", arguments, run(arguments), to_markdown)


if __name__ == "__main__":
    main()
