"""Every table of losses states the length of the windows it was measured on."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from support.blocks import render_blocks

from weftlm.cli import options, run, score
from weftlm.cli.experts import list as experts_list
from weftlm.cli.gate import distil, fit
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
    "z_source": "causal",
    "domains": {"d": {"sequences": 1, "value": 1.0, "lam": 1.0}},
    "worst": 1.0, "worst_domain": "d", "gap": 0.1, "gap_kind": "estimate", "z": 1.0, "z_ci": [1.0, 1.0],
}  # fmt: skip


def models(tmp_path):
    sets = {"d": {"bits_per_byte": 1.0}}
    facts = {"path": "m", "kind": "plain", "role": "base", "sets": sets, "generic": {"bits_per_byte": 1.0}}
    write_object(tmp_path / "evaluation.json", {"sequence_length": LENGTH, "models": {"base": facts}})
    run.show_models(SimpleNamespace(run=tmp_path))


TABLES = {
    "sets": lambda tmp_path: options.sets_table("t", SuiteResult({}, None, sequence_length=LENGTH).to_json()),
    "models": models,
    "scores": lambda tmp_path: score._print(SCORED),
    "fit": lambda tmp_path: fit._print(FITTED, SimpleNamespace(gate_folder="gate")),
    "students": lambda tmp_path: distil._print(STUDENTS, SimpleNamespace(run=tmp_path)),
    "experts": lambda tmp_path: print(
        experts_list._row(
            {"name": "a", "origin": "d", "gate": None, "statistics": None, "losses": {"sequence_length": LENGTH}}
        )
    ),
    "page of students": lambda tmp_path: print(render_blocks(gating_blocks(GatingFacts.of(students=[STUDENTS])))),
    "page of a fit": lambda tmp_path: print(render_blocks(gating_blocks(GatingFacts.of(fit=FITTED)))),
}


@pytest.mark.parametrize("table", TABLES)
def test_a_table_of_losses_states_its_window(table, tmp_path, capsys):
    TABLES[table](tmp_path)
    assert str(LENGTH) in capsys.readouterr().out
