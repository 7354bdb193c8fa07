"""Every table of losses states the length of the windows it was measured on; the demonstration shows all its parts."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
from support.blocks import render_blocks

from weftlm.cli import experts, gate, output, project
from weftlm.evaluation.suite import SuiteResult
from weftlm.files import write_object
from weftlm.reporting.gating import GatingFacts, gating_blocks

LENGTH = 123
SCORED = {
    "folder": "scores", "kind": "windows", "length": LENGTH, "experts": ["a"], "samples": {},
    "domains": {"d": {"sequences": 1, "tokens": LENGTH, "nats_per_token": {"a": 1.0}}},
}  # fmt: skip
ROW = {"worst": 1.0, "worst_domain": "d", "mean": 1.0, "domains": {"d": {"value": 1.0, "error": None}}}
STUDENTS = {"unit": "token", "offsets": "none", "length": LENGTH, "rows": {"student": ROW}}
FITTED = {
    "unit": "token", "steps": 9, "stopped_early": False, "length": LENGTH, "gate": {"gate": "linear"},
    "domains": {"d": {"sequences": 1, "value": 1.0, "lam": 1.0}},
    "worst": 1.0, "worst_domain": "d", "gap": 0.1, "gap_kind": "estimate", "z": 1.0,
}  # fmt: skip
EXPERT = {"name": "a", "origin": "d", "gate": None, "statistics": None, "losses": {"sequence_length": LENGTH}}
SUMMARY = {
    "mixture": {
        "dga": {
            "sequence_length": LENGTH, "generic": {"bits_per_byte": 2.4},
            "sets": {"target": {"bits_per_byte": 2.5, "bits_per_byte_se": 0.1}},
        }
    },
    "routing": {"best single": {"sequence_length": LENGTH, "generic": {"bits_per_byte": 1.5}}},
    "robust": {"fixed share": {"worst": 0.125, "worst_domain": "json"}},
    "certificate": {"length": LENGTH},
}  # fmt: skip


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A project whose stages have given the results above."""
    sets = {"d": {"bits_per_byte": 1.0}}
    facts = {"path": "m", "kind": "plain", "role": "base", "sets": sets, "generic": {"bits_per_byte": 1.0}}
    write_object(tmp_path / "evaluation.json", {"sequence_length": LENGTH, "models": {"base": facts}})
    (tmp_path / "summary.json").write_text(json.dumps(SUMMARY))
    for name, value in (
        ("scoring.score_experts", SCORED), ("gating.fit_gate", FITTED), ("gating.distil_gate", STUDENTS),
        ("expert_library.list_experts", [EXPERT]), ("runner.run_project", []),
    ):  # fmt: skip
        monkeypatch.setattr(f"weftlm.pipeline.{name}", lambda *_, value=value, **__: value)
    monkeypatch.setenv("COLUMNS", "160")
    return SimpleNamespace(run=tmp_path, gate_folder="gate")


TABLES = {
    "sets": lambda run: output.sets_table("t", SuiteResult({}, None, sequence_length=LENGTH).to_json()),
    "models": project.show_models,
    "scores": lambda run: list(gate.score(run)),
    "fit": lambda run: list(gate.fit(run)),
    "students": lambda run: list(gate.distil(run)),
    "experts": lambda run: list(experts.list_("library")),
    "page of students": lambda run: print(render_blocks(gating_blocks(GatingFacts.of(students=[STUDENTS])))),
    "page of a fit": lambda run: print(render_blocks(gating_blocks(GatingFacts.of(fit=FITTED)))),
}


@pytest.mark.parametrize("table", TABLES)
def test_a_table_of_losses_states_its_window(table, run, capsys):
    TABLES[table](run)
    assert str(LENGTH) in capsys.readouterr().out


def test_the_demonstration_prints_mixtures_routers_gates_and_the_best_model(run, capsys):
    list(project.demo(set_=[f"run={run.run}"]))
    said = capsys.readouterr()
    printed = " ".join(said.out.split())
    assert "about eight minutes" in said.err
    for part in ("dga │ 2.4000 │ 2.5000 ± 0.1000", "best single │ 1.5000 │ -", "fixed share │ json │ 0.1250 │ -"):
        assert part in printed
    assert "weftlm serve m" in printed
