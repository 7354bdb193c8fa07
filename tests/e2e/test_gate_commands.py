"""The real command line of scores and gates, called in this process: one tiny project from experts to a certificate."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.tiny_project import WORDS, recipe_value, write_corpora

from weft.cli.main import main
from weft.errors import NumericsError
from weft.gating.gate import load_gate
from weft.gating.primal_dual import Progress
from weft.pipeline import gating

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
}

Call = Callable[..., Any]


@pytest.fixture
def weft(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Call:
    """`weft("score", ..., code=0)`: what the command prints, JSON where it was asked for; stderr where it fails."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str | Path, code: int = 0) -> Any:
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            main([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        assert (caught.value.code or 0) == code, printed.err
        if code:
            return printed.err
        call.err = printed.err  # type: ignore[attr-defined]
        return json.loads(printed.out) if "--json" in arguments else printed.out

    return call


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """Corpora and a recipe with `experts` and `gating` sections."""
    write_corpora(tmp_path / "corpora")
    value = {**recipe_value(), "experts": EXPERTS, "gating": GATING, "mixture": {"policy": "uniform"}}
    value["training"] = {**value["training"], "steps": 30}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(value))
    return path


def cut_short(table: Any, line: Progress) -> None:
    raise NumericsError(f"cut short at {line.step}")


def test_from_experts_to_a_certified_gate(
    project: Path, tmp_path: Path, weft: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "runs/one"
    weft("train", project, "--json")
    weft("experts", "train", project, "--json")

    # -- scoring
    planned = weft("score", project, "--dry-run", "--json")
    assert planned["plan"]["scores"] == "runs/one/scores"
    assert planned["recipe"]["gating"]["gate"]["gate"] == "linear"
    assert not (run / "scores").exists()
    assert "did you mean 'cooking'" in weft("score", project, "--set", "gating.domains=[coking]", code=2)
    scored = weft("score", project, "--json")
    assert scored["experts"] == sorted(WORDS)
    assert set(scored["domains"]) == set(WORDS)
    for name, facts in scored["domains"].items():
        assert facts["tokens"] == 8 * facts["sequences"]
        assert min(facts["nats_per_token"], key=facts["nats_per_token"].get) == name
    assert scored["samples"] == {name: {"sequences": 40, "tokens": 320} for name in sorted(WORDS)}
    assert weft("score", project, "--json") == scored
    assert "samples of sailing" in weft("score", project)
    assert "stale" in weft("score", project, "--set", "gating.scores.length=4", code=1)

    # -- fitting
    assert "fit one first" in weft("gate", "certify", project, code=1)
    planned = weft("gate", "fit", project, "--dry-run", "--json")
    assert (planned["plan"]["gate"], planned["plan"]["fit_steps"]) == ("linear", 60)
    fitted = weft("gate", "fit", project, "--json")
    assert weft.err.count("lambda") == 2  # type: ignore[attr-defined]
    assert "fit 60/60  worst " in weft.err  # type: ignore[attr-defined]
    assert fitted["worst"] == pytest.approx(max(each["value"] for each in fitted["domains"].values()))
    assert fitted["domains"][fitted["worst_domain"]]["value"] == pytest.approx(fitted["worst"])
    assert sum(each["lam"] for each in fitted["domains"].values()) == pytest.approx(1)
    assert fitted["z_ci"][0] <= fitted["z"] <= fitted["z_ci"][1]
    assert [line["step"] for line in fitted["history"]] == [30, 60]
    assert load_gate(run / "gate/gate.safetensors").experts == 3
    assert json.loads((run / "gate/fit.json").read_text()) == fitted

    # a fit cut short at its first report goes on to the same gate
    shutil.rmtree(run / "gate")
    with monkeypatch.context() as patch:
        patch.setattr(gating._FitTable, "add", cut_short)
        assert "cut short at 30" in weft("gate", "fit", project, code=1)
    assert not (run / "gate/fit.json").exists()
    assert weft("gate", "fit", project, "--json") == fitted
    assert "fit 30/60" not in weft.err  # type: ignore[attr-defined]
    assert sorted(path.name for path in (run / "gate").iterdir()) == ["fit.json", "gate.safetensors"]
    assert "worst domain: " in weft("gate", "fit", project)

    # -- certifying
    certificate = weft("gate", "certify", project, "--json")
    assert json.loads((run / "gate/certificate.json").read_text()) == certificate
    assert certificate["worst"]["label"] == "estimate"
    assert certificate["gap"]["value"] == pytest.approx(certificate["worst"]["value"] - certificate["lower"]["value"])
    for row in certificate["domains"]:
        sequences = scored["domains"][row["name"]]["sequences"]
        assert row["sequences"] + fitted["domains"][row["name"]]["sequences"] == sequences
    printed = weft("gate", "certify", project)
    assert "Z: estimate; mean over" in printed
    assert "other settings" in weft("gate", "certify", project, "--set", "gating.held_out_fraction=0.5", code=1)

    # -- other gates, offsets and mixtures; what cannot be fitted leaves the gate as it is
    assert "place in the enumerated support" in weft("gate", "fit", project, "--set", "gating.gate=tabular", code=2)
    assert json.loads((run / "gate/fit.json").read_text()) == fitted
    causal = ["--set", "gating.gate=fixed_share", "--set", "gating.offsets=none", "--set", "gating.fit.unit=token"]
    refitted = weft("gate", "fit", project, *causal, "--set", "gating.mixtures.upper={cooking: 0.2}", "--json")
    assert (refitted["z"], refitted["unit"], refitted["gate"]["gate"]) == (1.0, "token", "fixed_share")
    assert refitted["domains"]["cooking"]["lam"] <= 0.2 + 1e-9
    assert not (run / "gate/certificate.json").exists()
    unknown = ["--set", "gating.mixtures.upper={coking: 0.2}"]
    assert "did you mean 'cooking'" in weft("gate", "fit", project, *unknown, code=2)
    assert "none for algebra, sailing" in weft("gate", "fit", project, "--set", "gating.offsets={cooking: 1.0}", code=2)
    assert "score again" in weft("gate", "fit", project, "--set", "gating.scores.length=4", code=1)
