"""The command line of scores and gates, called in this process: from scored experts to certificates and students."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.command_line import Call
from support.tiny_project import WORDS, recipe_value, write_corpora
from transformers import AutoModelForCausalLM, AutoTokenizer

from weftlm.distillation.structural import student_kl
from weftlm.errors import NumericsError
from weftlm.gating.gate import load_gate
from weftlm.gating.scores import ScoreCache
from weftlm.pipeline import gating
from weftlm.pipeline.recipe import load_recipe
from weftlm.pipeline.runner import run_project

EXPERTS = {
    "lora": {"rank": 4, "alpha": 8},
    "training": {"sequence_length": 32, "batch_sequences": 8, "steps": 12, "save_every_steps": 12, "device": "cpu"},
    "validate_every_steps": 0,
    "gate": {"steps": 1},
    "statistics_examples": 0,
}
GATING = {
    "scores": {"length": 8, "sequences": 40, "samples": 40, "batch_size": 40},
    "fit": {"steps": 60, "report_every_steps": 30, "best_response_steps": 20},
    "students": {
        "distil": {"steps": 20, "evaluate_every_steps": 10},
        "experts_per_token": [1, 3],
        "direct": {"fit": {"steps": 20, "lr": 0.02, "report_every_steps": 20, "best_response_steps": 0}},
        "dense": {
            "model": {"architecture": "llama", "config": {"hidden_size": 16, "num_hidden_layers": 1}},
            "training": {"sequence_length": 8, "batch_sequences": 8, "steps": 6, "device": "cpu", "warmup_steps": 1},
            "token_kl": 0.5,
            "evaluate_every_steps": 3,
        },
    },
}
PROJECT = "recipe.yaml"


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with a base, three experts and their scores."""
    folder = tmp_path_factory.mktemp("scored")
    write_corpora(folder / "corpora")
    value = {**recipe_value(), "experts": EXPERTS, "gating": GATING, "mixture": {"policy": "uniform"}}
    value["training"] = {**value["training"], "steps": 30}
    (folder / PROJECT).write_text(yaml.safe_dump(value))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run_project(load_recipe(PROJECT), until="score", progress=False)
    return folder


@pytest.fixture
def run(scored: Path, tmp_path: Path) -> Path:
    """Its run folder, copied into the test's folder."""
    shutil.copytree(scored, tmp_path, dirs_exist_ok=True)
    return tmp_path / "runs/one"


def stopping(at: str) -> Any:
    """A report that fails, after the state was kept."""

    def report(text: str) -> None:
        if text.startswith(at):
            raise NumericsError(f"cut short at {text}")

    return report


def test_from_scores_to_a_certified_gate(run: Path, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    # -- scoring
    scores = call("score", PROJECT, "--json")
    assert scores["experts"] == sorted(WORDS)
    assert set(scores["domains"]) == set(WORDS)
    for name, facts in scores["domains"].items():
        assert facts["tokens"] == 8 * facts["sequences"]
        assert min(facts["nats_per_token"], key=facts["nats_per_token"].get) == name
    assert scores["samples"] == {name: {"sequences": 40, "tokens": 320} for name in sorted(WORDS)}
    assert "samples of sailing" in call("score", PROJECT)
    assert "scores of something else" in call("score", PROJECT, "--set", "gating.scores.length=4", code=1)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "ray", None)
        assert "'.[ray]'" in call("score", PROJECT, "--ray", code=2)

    # -- fitting; cut short at its first report, a fit goes on to the same gate
    assert "fit one first" in call("gate", "certify", PROJECT, code=1)
    with monkeypatch.context() as patch:
        patch.setattr(gating, "write_line", stopping("fit 30/60"))
        said = call("gate", "fit", PROJECT, code=1)
        assert re.search(r"fit 30/60  worst .* Z \S+  lambda .*  ETA <?\d+s", said)
    assert not (run / "gate/fit.json").exists()
    fitted = call("gate", "fit", PROJECT, "--json")
    assert "fit 30/60" not in call.err
    assert "fit 60/60" in call.err
    assert sorted(path.name for path in (run / "gate").iterdir()) == ["fit.json", "gate.safetensors"]
    shutil.rmtree(run / "gate")
    assert call("gate", "fit", PROJECT, "--json") == fitted
    assert call.err.count("lambda") == 2
    assert (fitted["steps"], fitted["stopped_early"]) == (60, False)
    assert fitted["domains"][fitted["worst_domain"]]["value"] == pytest.approx(fitted["worst"])
    assert sum(each["lam"] for each in fitted["domains"].values()) == pytest.approx(1)
    assert fitted["z"] > 0.0
    assert [line["step"] for line in fitted["history"]] == [30, 60]
    assert "worst domain: " in call("gate", "fit", PROJECT)

    # -- certifying
    certificate = call("gate", "certify", PROJECT, "--json")
    assert certificate.items() <= json.loads((run / "gate/certificate.json").read_text()).items()
    assert certificate["worst"]["label"] == "estimate"
    assert certificate["gap"]["value"] == pytest.approx(certificate["worst"]["value"] - certificate["lower"]["value"])
    for row in certificate["domains"]:
        sequences = scores["domains"][row["name"]]["sequences"]
        assert row["sequences"] + fitted["domains"][row["name"]]["sequences"] == sequences
    assert "z: estimate; mean over" in call("gate", "certify", PROJECT)
    said = call("gate", "certify", PROJECT, "--set", "gating.held_out_fraction=0.5", code=1)
    assert "gating.held_out_fraction: 0.25 before, 0.5 now" in said

    # -- other gates, offsets and mixtures; what cannot be fitted leaves the gate as it is
    assert "place in the enumerated support" in call("gate", "fit", PROJECT, "--set", "gating.gate=tabular", code=2)
    assert fitted.items() <= json.loads((run / "gate/fit.json").read_text()).items()
    causal = ["--set", "gating.gate=fixed_share", "--set", "gating.offsets=none", "--set", "gating.fit.unit=token"]
    refitted = call("gate", "fit", PROJECT, *causal, "--set", "gating.mixtures.upper={cooking: 0.2}", "--json")
    assert (refitted["z"], refitted["unit"], refitted["gate"]["gate"]) == (1.0, "token", "fixed_share")
    assert refitted["domains"]["cooking"]["lam"] <= 0.2 + 1e-9
    assert not (run / "gate/certificate.json").exists()
    assert "score again" in call("gate", "fit", PROJECT, "--set", "gating.scores.length=4", code=1)


def test_students_that_can_be_served(run: Path, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "fit one first" in call("gate", "distil", PROJECT, code=1)
    call("gate", "fit", PROJECT, "--json")

    # cut short at a report, the work goes on to what it would have been
    with monkeypatch.context() as patch:
        patch.setattr(gating, "write_line", stopping("distil student-top-1 10/"))
        assert "cut short" in call("gate", "distil", PROJECT, code=1)
    assert not (run / "students/student.json").exists()
    made = call("gate", "distil", PROJECT, "--json")
    assert "distil student 10/" not in call.err
    assert "distil student-top-1 20/20" in call.err
    assert not list((run / "students").glob(".making-*"))
    shutil.rmtree(run / "students")
    assert call("gate", "distil", PROJECT, "--json") == made
    assert "distil student 10/20" in call.err
    assert call("gate", "distil", PROJECT, "--json") == made
    assert call.err == ""

    rows = made["rows"]
    assert set(rows) == {
        "uniform", "bayes", "fixed share", "robust", "student", "student-top-1", "dense",
    }  # fmt: skip
    for row in rows.values():
        assert row["worst"] == pytest.approx(max(each["value"] for each in row["domains"].values()))
    assert rows["bayes"]["worst"] < rows["uniform"]["worst"]
    assert "student-top-1" in call("gate", "distil", PROJECT)
    call("report", run)
    assert "student-top-1" in (run / "training.html").read_text()

    # each loads as a Hugging Face model and says of held-out text what the table says
    _, held_out = ScoreCache.open(run / "scores").split(0.25, seed=recipe_value()["seed"])
    for name in ("student", "dense"):
        model = AutoModelForCausalLM.from_pretrained(rows[name]["model"])
        for domain, held in held_out.domains.items():
            logs = gating.log_likelihoods(model, held)
            assert -float(logs.mean()) == pytest.approx(rows[name]["domains"][domain]["cross_entropy"], rel=1e-4)
        if name == "student":
            gate, samples = load_gate(run / "gate/gate.safetensors"), list(held_out.samples.values())
            kl, _ = student_kl(gate, model.gate, samples)
            assert rows["student"]["kl"] == pytest.approx(kl)
    tokenizer = AutoTokenizer.from_pretrained(rows["student-top-1"]["model"])
    model = AutoModelForCausalLM.from_pretrained(rows["student-top-1"]["model"])
    assert (model.config.top_m, model.config.refresh_every) == (1, 32)
    prompt = tokenizer("the boat", return_tensors="pt").input_ids
    assert model.generate(prompt, max_new_tokens=4, do_sample=False).shape[1] > prompt.shape[1]

    # the objective itself needs neither a fitted gate nor samples
    shutil.rmtree(run / "gate")
    without = ["--set", "gating.students.dense=null"]
    direct = call("gate", "distil", PROJECT, "--direct", "--json", *without)
    assert "fit 20/20" in call.err
    assert {"direct", "direct-top-1", "fixed share"} < set(direct["rows"])
    assert "robust" not in direct["rows"]
    assert direct["rows"]["direct"]["kl"] == pytest.approx(0, abs=1e-9)
    assert AutoModelForCausalLM.from_pretrained(direct["rows"]["direct"]["model"]).gate.experts == 3

    # experts that changed are not served under a gate fitted on others
    call("experts", "train", PROJECT, "--set", "experts.lora.rank=2", "--replace", "--json")
    changed = [*without, "--set", "gating.students.refresh_every=4"]
    assert "changed since the experts were scored" in call("gate", "distil", PROJECT, "--direct", *changed, code=1)
