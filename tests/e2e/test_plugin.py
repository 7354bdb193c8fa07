"""Methods of another package work on the command line without a change to weftlm."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from support.tiny_project import command, environment

SAMPLE = Path(__file__).parents[2] / "examples" / "plugin"


def test_methods_and_a_stage_of_another_package(tmp_path: Path, recipe: Callable[..., Path]) -> None:
    site = tmp_path / "site"
    subprocess.run(
        [
            sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", "--no-index",
            "--no-build-isolation", "--target", site, SAMPLE,
        ],
        check=True, capture_output=True,
    )  # fmt: skip
    paths = os.pathsep.join([str(site), *filter(None, [os.environ.get("PYTHONPATH")])])

    def run(*words: str | Path, check: int = 0) -> str:
        done = subprocess.run(
            command(*words), cwd=tmp_path, env={**environment(), "PYTHONPATH": paths},
            capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip
        assert done.returncode == check, done.stderr
        return done.stdout if check == 0 else done.stderr

    path = recipe({
        "mixture": {"policy": "progress_share", "update_every_steps": 4},
        "experts": {"training": {"steps": 1}, "gate": {"steps": 0}, "statistics_examples": 0},
        "evaluation": {"every_steps": None, "max_tokens_per_set": 320},
        "routing": {"routers": ["reading-direction", "uniform"], "build": ["reading-direction"]},
        "stages": {"token-counts": {"most": 3}},
    })  # fmt: skip
    wrong = run("run", path, "--set", "mixture.flor=0.2", "--dry-run", check=2)
    assert "mixture.flor: unknown key; did you mean 'floor'" in wrong
    wrong = run("run", path, "--set", "stages.token-counts.mots=2", "--dry-run", check=2)
    assert "stages.token-counts.mots: unknown key; did you mean 'most'" in wrong
    run("run", path, "--set", "training.steps=4")
    result = json.loads((tmp_path / "runs/one/result.json").read_text())
    assert result["policy"] == "progress_share"
    compared = json.loads((tmp_path / "runs/one/routing.json").read_text())
    assert "reading-direction" in json.dumps(compared)
    assert (tmp_path / "runs/one/routed/reading-direction").is_dir()
    counts = json.loads((tmp_path / "runs/one/token-counts.json").read_text())
    assert all(len(rows) == 3 and rows[0][1] >= rows[2][1] for name, rows in counts.items() if name != "checksum")
    assert '"token-counts"' in run("status", tmp_path / "runs/one", "--json")
    laws = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", SAMPLE / "tests",
         "-k", "reading-direction and (order or later)"],
        cwd=SAMPLE, env={**environment(), "PYTHONPATH": paths}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert laws.returncode == 0, laws.stdout
    assert " passed" in laws.stdout
