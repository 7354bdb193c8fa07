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
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import _common

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from support.faulty_project import COMMANDS, TRY, Project, readers

_LIMITS = (1_000, 30_000)
"""Bytes a file may have on a full disk."""


def cases(project: Project, points: int) -> Iterator[dict[str, Any]]:
    """All there is to try.

    Args:
        project: the finished one.
        points: kills of each command, evenly over its changes of the disk; as many with damage before it goes on.
    """
    for number, name in enumerate(project.files()):
        commands = readers(name)
        for place, kind in enumerate(("bit", "torn", *(("folder",) if number % 4 == 0 else ()))):
            yield {"kind": kind, "file": name, "reader": commands[(number + place) % len(commands)], "seed": number}
    for command in (*COMMANDS, "run --from train, all"):
        whole = command not in COMMANDS
        for point in range(points):
            yield {"kind": "kill", "command": command, "point": point, "of": points}
            damage = ("bit", "torn")[point % 2]
            if not whole:
                about = {"point": point, "of": points, "damage": f"{damage} {point}"}
                yield {"kind": "between", "command": command, **about}
        for limit in () if whole else _LIMITS:
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
        todo = [next(case for case in todo if case["kind"] == kind) for kind in TRY]
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
        "commands": [*COMMANDS],
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
