"""One process at a time writes into a run folder, whatever the command."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.faults import held_by_another
from support.tiny_project import recipe_value, write_corpora

from weftlm.errors import CheckpointError
from weftlm.files import this_host
from weftlm.pipeline.experts import gate_expert, train_experts
from weftlm.pipeline.gating import certify_gate, distil_gate, fit_gate
from weftlm.pipeline.prepare import prepare
from weftlm.pipeline.recipe import Recipe, make_recipe
from weftlm.pipeline.run_folder import LOCK, alone
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


@pytest.mark.parametrize("place", ["", "training", "training/cooking", "experts/cooking/deep"])
def test_what_a_killed_process_left_is_swept_wherever_it_is_in_a_run(place: str, tmp_path: Path) -> None:
    left = tmp_path / place / f".gate.{2**22 + 1}@{this_host()}.removing"
    left.mkdir(parents=True)
    (left / "weights").write_text("half")
    with alone(tmp_path):
        assert not left.exists()


def test_what_a_killed_preparation_left_is_swept_where_its_result_is_reused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_corpora(tmp_path / "corpora")
    data = make_recipe(recipe_value()).data
    prepare(data, tmp_path / "prepared", progress=False)
    left = tmp_path / f".prepared.{2**22 + 1}@{this_host()}.removing"
    left.mkdir()
    prepare(data, tmp_path / "prepared", progress=False)
    assert not left.exists()
