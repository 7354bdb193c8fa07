"""Run examples and quick benchmarks, two at a time; a benchmark's result must be JSON.

    python .ci/scripts.py LOGS examples/*.py benchmarks/*.py

Each runs in a child of this process, which has imported what they share: the imports take longer than most of them.
Output goes to LOGS, and is shown where a script fails.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
import time
import traceback
from pathlib import Path

import torch
import transformers  # noqa: F401

import weftlm.integrations.hf_trainer
import weftlm.pipeline.project_report  # noqa: F401

AT_ONCE = 2
SHOWN = 60
"""Last lines shown of a script that failed."""


def start(script: Path, logs: Path) -> int:
    """Run a script in a child; gives its process number."""
    child = os.fork()
    if child:
        return child
    for number, ending in ((1, "log"), (2, "err")):
        os.dup2(os.open(logs / f"{name_of(script)}.{ending}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    code = 1
    try:
        torch.set_num_threads(1)
        sys.argv = [str(script), *(["--quick", "--json"] if script.parent.name == "benchmarks" else [])]
        sys.path.insert(0, str(script.parent))
        runpy.run_path(str(script), run_name="__main__")
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        if isinstance(ended.code, str):
            sys.stderr.write(f"{ended.code}\n")
    except BaseException:  # noqa: BLE001 - the end of this process, whatever it is
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def name_of(script: Path) -> str:
    """Name of its logs."""
    return f"{script.parent.name}-{script.stem}"


def problem(script: Path, logs: Path, code: int) -> str:
    """What is wrong with a script that ended, with the end of its output; empty where nothing is."""
    if code == 0 and script.parent.name == "benchmarks":
        try:
            json.loads((logs / f"{name_of(script)}.log").read_text(encoding="utf-8"))
        except ValueError as error:
            code = 1
            print(f"{script}: its result is no JSON: {error}")
    if code == 0:
        return ""
    texts = [(logs / f"{name_of(script)}.{ending}").read_text(errors="replace") for ending in ("log", "err")]
    ends = "\n".join(line for text in texts for line in text.splitlines()[-SHOWN:])
    return f"==== {name_of(script)} failed (exit {code})\n{ends}"


def main() -> int:
    """Run all; the first failure ends the run."""
    logs, scripts = Path(sys.argv[1]).resolve(), [Path(each).resolve() for each in sys.argv[2:]]
    running: dict[int, tuple[Path, float]] = {}
    while scripts or running:
        while scripts and len(running) < AT_ONCE:
            script = scripts.pop(0)
            running[start(script, logs)] = script, time.monotonic()
        child, status = os.wait()
        script, began = running.pop(child)
        if found := problem(script, logs, os.waitstatus_to_exitcode(status)):
            print(found)
            return 1
        print(f"{name_of(script)} {time.monotonic() - began:.0f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
