"""One process at a time writes into a run folder, whatever the command."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.faults import held_by_another
from support.tiny_project import recipe_value, write_corpora

from weftlm.errors import CheckpointError
from weftlm.pipeline.experts import gate_expert, train_experts
from weftlm.pipeline.gating import certify_gate, distil_gate, fit_gate
from weftlm.pipeline.recipe import Recipe, make_recipe
from weftlm.pipeline.run_folder import LOCK
from weftlm.pipeline.runner import run_project
from weftlm.pipeline.scoring import score_experts
from weftlm.pipeline.train import run_training

WRITERS: list[Callable[[Recipe], Any]] = [
    lambda project: run_project(project, progress=False),
    run_training,
    lambda project: train_experts(project, progress=False),
    lambda project: gate_expert(project, "cooking", progress=False),
    lambda project: score_experts(project, progress=False),
    lambda project: fit_gate(project, progress=False),
    certify_gate,
    lambda project: distil_gate(project, progress=False),
    lambda project: distil_gate(project, direct=True, progress=False),
]


def test_every_writer_names_the_process_that_holds_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_corpora(tmp_path / "corpora")
    training = {**recipe_value()["training"], "steps": 4}
    value = {**recipe_value(), "run": str(tmp_path / "run"), "experts": {"training": training}, "gating": {}}
    project = make_recipe(value)
    with held_by_another(project.run / LOCK) as process:
        for write in WRITERS:
            with pytest.raises(
                CheckpointError, match=rf"another process \({process} on .* is at work in {project.run}"
            ):
                write(project)
        assert {path.name for path in project.run.iterdir()} == {LOCK}
