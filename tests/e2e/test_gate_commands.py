"""The real command line of scores and gates, called in this process: one tiny project from experts to a certificate."""

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
from weftlm.pipeline import gating, students

EXPERTS = {
    "lora": {"rank": 4, "alpha": 8},
    "training": {"sequence_length": 32, "batch_sequences": 8, "steps": 12, "save_every_steps": 12, "device": "cpu"},
    "validate_every_steps": 6,
    "gate": {"steps": 1},
    "statistics_examples": 8,
    "embedder": "tokens-64",
}
GATING = {
    "scores": {"length": 8, "sequences": 40, "samples": 40, "batch_size": 40},
    "fit": {"steps": 60, "report_every_steps": 30, "best_response_steps": 20},
    "students": {
        "distil": {"steps": 40, "evaluate_every_steps": 20},
        "experts_per_token": [1, 2, 3],
        "direct": {"fit": {"steps": 40, "lr": 0.02, "report_every_steps": 20, "best_response_steps": 0}},
        "dense": {
            "model": {"architecture": "llama", "config": {"hidden_size": 16, "num_hidden_layers": 1}},
            "training": {"sequence_length": 8, "batch_sequences": 8, "steps": 6, "device": "cpu", "warmup_steps": 1},
            "token_kl": 0.5,
            "evaluate_every_steps": 3,
        },
    },
}


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """Corpora and a recipe with `experts` and `gating` sections."""
    write_corpora(tmp_path / "corpora")
    value = {**recipe_value(), "experts": EXPERTS, "gating": GATING, "mixture": {"policy": "uniform"}}
    value["training"] = {**value["training"], "steps": 30}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(value))
    return path


def cut_short(text: str) -> None:
    raise NumericsError(f"cut short at {text}")


def test_from_experts_to_a_certified_gate(
    project: Path, tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "runs/one"
    call("train", project, "--json")
    call("experts", "train", project, "--json")

    # -- scoring
    planned = call("score", project, "--dry-run", "--json")
    assert planned["recipe"]["gating"]["gate"]["gate"] == "linear"
    assert not (run / "scores").exists()
    assert "did you mean 'cooking'" in call("score", project, "--set", "gating.domains=[coking]", code=2)
    scored = call("score", project, "--json")
    assert scored["experts"] == sorted(WORDS)
    assert set(scored["domains"]) == set(WORDS)
    for name, facts in scored["domains"].items():
        assert facts["tokens"] == 8 * facts["sequences"]
        assert min(facts["nats_per_token"], key=facts["nats_per_token"].get) == name
    assert scored["samples"] == {name: {"sequences": 40, "tokens": 320} for name in sorted(WORDS)}
    assert call("score", project, "--json") == scored
    assert "samples of sailing" in call("score", project)
    assert "scores of something else" in call("score", project, "--set", "gating.scores.length=4", code=1)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "ray", None)
        assert "'.[ray]'" in call("score", project, "--ray", code=2)

    # -- fitting
    assert "fit one first" in call("gate", "certify", project, code=1)
    planned = call("gate", "fit", project, "--dry-run", "--json")
    assert planned["recipe"]["gating"]["fit"]["steps"] == 60
    fitted = call("gate", "fit", project, "--json")
    assert call.err.count("lambda") == 2
    first, last = (line for line in call.err.splitlines() if line.startswith("fit "))
    assert re.match(r"fit 30/60  worst .* Z \S+  ETA \d+s  lambda ", first)
    assert re.match(r"fit 60/60  worst .* ETA 0s  lambda ", last)
    assert (fitted["steps"], fitted["stopped_early"]) == (60, False)
    assert fitted["worst"] == pytest.approx(max(each["value"] for each in fitted["domains"].values()))
    assert fitted["domains"][fitted["worst_domain"]]["value"] == pytest.approx(fitted["worst"])
    assert sum(each["lam"] for each in fitted["domains"].values()) == pytest.approx(1)
    assert fitted["z"] > 0.0
    assert [line["step"] for line in fitted["history"]] == [30, 60]
    assert load_gate(run / "gate/gate.safetensors").experts == 3
    assert fitted.items() <= json.loads((run / "gate/fit.json").read_text()).items()

    # a fit cut short at its first report goes on to the same gate
    shutil.rmtree(run / "gate")
    with monkeypatch.context() as patch:
        patch.setattr(gating, "write_line", cut_short)
        assert "cut short at fit 30/60" in call("gate", "fit", project, code=1)
    assert not (run / "gate/fit.json").exists()
    assert call("gate", "fit", project, "--json") == fitted
    assert "fit 30/60" not in call.err
    assert sorted(path.name for path in (run / "gate").iterdir()) == ["fit.json", "gate.safetensors"]
    assert "worst domain: " in call("gate", "fit", project)

    # -- certifying
    certificate = call("gate", "certify", project, "--json")
    assert certificate.items() <= json.loads((run / "gate/certificate.json").read_text()).items()
    assert certificate["worst"]["label"] == "estimate"
    assert certificate["gap"]["value"] == pytest.approx(certificate["worst"]["value"] - certificate["lower"]["value"])
    for row in certificate["domains"]:
        sequences = scored["domains"][row["name"]]["sequences"]
        assert row["sequences"] + fitted["domains"][row["name"]]["sequences"] == sequences
    printed = call("gate", "certify", project)
    assert "z: estimate; mean over" in printed
    assert "Certificate" in (run / "gate/report.html").read_text()
    said = call("gate", "certify", project, "--set", "gating.held_out_fraction=0.5", code=1)
    assert "gating.held_out_fraction: 0.25 before, 0.5 now" in said

    # -- other gates, offsets and mixtures; what cannot be fitted leaves the gate as it is
    assert "place in the enumerated support" in call("gate", "fit", project, "--set", "gating.gate=tabular", code=2)
    assert fitted.items() <= json.loads((run / "gate/fit.json").read_text()).items()
    causal = ["--set", "gating.gate=fixed_share", "--set", "gating.offsets=none", "--set", "gating.fit.unit=token"]
    refitted = call("gate", "fit", project, *causal, "--set", "gating.mixtures.upper={cooking: 0.2}", "--json")
    assert (refitted["z"], refitted["unit"], refitted["gate"]["gate"]) == (1.0, "token", "fixed_share")
    assert refitted["domains"]["cooking"]["lam"] <= 0.2 + 1e-9
    assert not (run / "gate/certificate.json").exists()
    unknown = ["--set", "gating.mixtures.upper={coking: 0.2}"]
    assert "did you mean 'cooking'" in call("gate", "fit", project, *unknown, code=2)
    assert "none for algebra, sailing" in call("gate", "fit", project, "--set", "gating.offsets={cooking: 1.0}", code=2)
    assert "score again" in call("gate", "fit", project, "--set", "gating.scores.length=4", code=1)


def test_students_that_can_be_served(
    project: Path, tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "runs/one"
    call("train", project, "--json")
    call("experts", "train", project, "--json")
    assert "weftlm score" in call("gate", "distil", project, code=1)
    call("score", project, "--json")
    assert "fit one first" in call("gate", "distil", project, code=1)
    call("gate", "fit", project, "--json")

    # cut short at a report, the work goes on to what it would have been
    def stop(work: Any, text: str) -> None:
        if text.startswith("distil student-top-1 20/"):
            raise NumericsError("cut short")

    with monkeypatch.context() as patch:
        patch.setattr(students._Work, "tell", stop)
        assert "cut short" in call("gate", "distil", project, code=1)
    assert not (run / "students/student.json").exists()
    made = call("gate", "distil", project, "--json")
    assert "distil student 20/" not in call.err
    assert "distil student-top-1 40/40" in call.err
    assert not list((run / "students").glob(".making-*"))
    shutil.rmtree(run / "students")
    assert call("gate", "distil", project, "--json") == made
    assert "distil student 20/40" in call.err
    assert call("gate", "distil", project, "--json") == made
    assert call.err == ""

    rows = made["rows"]
    assert set(rows) == {
        "uniform", "bayes", "fixed share", "robust", "student", "student-top-1", "student-top-2", "dense",
        "student-top-1, all experts run", "student-top-2, all experts run",
    }  # fmt: skip
    for row in rows.values():
        assert row["worst"] == pytest.approx(max(each["value"] for each in row["domains"].values()))
        assert row["domains"][row["worst_domain"]]["value"] == pytest.approx(row["worst"])
    assert rows["bayes"]["worst"] < rows["uniform"]["worst"]
    assert "student-top-2" in call("gate", "distil", project)
    assert "student-top-2" in (run / "gate/report.html").read_text()
    call("report", run)
    assert "student-top-2" in (run / "report.html").read_text()

    # each loads as a Hugging Face model and says of held-out text what the table says
    cache = ScoreCache.open(run / "scores")
    split = cache.split(0.25, seed=recipe_value()["seed"])
    for name in ("student", "dense"):
        model = AutoModelForCausalLM.from_pretrained(rows[name]["model"])
        for domain, held in split.held_domains.items():
            logs = students.log_likelihoods(model, held)
            assert -float(logs.mean()) == pytest.approx(rows[name]["domains"][domain]["cross_entropy"], rel=1e-4)
        if name == "student":
            kl, _ = student_kl(load_gate(run / "gate/gate.safetensors"), model.gate, split.held_samples)
            assert rows["student"]["kl"] == pytest.approx(kl)
    tokenizer = AutoTokenizer.from_pretrained(rows["student-top-1"]["model"])
    model = AutoModelForCausalLM.from_pretrained(rows["student-top-1"]["model"])
    assert (model.config.top_m, model.config.refresh_every) == (1, 32)
    prompt = tokenizer("the boat", return_tensors="pt").input_ids
    assert model.generate(prompt, max_new_tokens=4, do_sample=False).shape[1] > prompt.shape[1]

    # the objective itself needs neither a fitted gate nor samples
    shutil.rmtree(run / "gate")
    direct = call("gate", "distil", project, "--direct", "--json", "--set", "gating.students.dense=null")
    assert "fit 40/40" in call.err
    assert {"direct", "direct-top-1", "direct-top-2", "fixed share"} < set(direct["rows"])
    assert "robust" not in direct["rows"]
    assert direct["rows"]["direct"]["kl"] == pytest.approx(0, abs=1e-9)
    assert AutoModelForCausalLM.from_pretrained(direct["rows"]["direct"]["model"]).gate.experts == 3

    # experts that changed are not served under a gate fitted on others
    call("experts", "train", project, "--set", "experts.lora.rank=2", "--replace", "--json")
    changed = ["--set", "gating.students.dense=null", "--set", "gating.students.refresh_every=4"]
    assert "changed since the experts were scored" in call("gate", "distil", project, "--direct", *changed, code=1)
