"""The real command line of experts and routing, called in this process: one tiny project from base to comparison."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from support.command_line import Call
from support.tiny_project import WORDS, recipe_value, write_corpora

from weftlm.experts.library import ExpertLibrary
from weftlm.routing.routed_model import RoutedModel

EXPERTS = {
    "lora": {"rank": 4, "alpha": 8},
    "training": {
        "sequence_length": 32, "batch_sequences": 8, "steps": 12, "save_every_steps": 6, "device": "cpu",
    },
    "validate_every_steps": 6,
    "gate": {"steps": 4},
    "statistics_examples": 20,
    "embedder": "tokens-64",
}  # fmt: skip
"""Three experts in a few seconds; `device` keeps them off an accelerator."""


def write(folder: Path, **changes: Any) -> Path:
    value = {**recipe_value(), "experts": EXPERTS, **changes}
    value["training"] = {**value["training"], "steps": 30}
    value["mixture"] = {"policy": "uniform"}
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(value))
    return path


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """Corpora and a recipe with an `experts` section."""
    write_corpora(tmp_path / "corpora")
    return write(tmp_path)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT reads a renamed attribute
def test_from_a_base_to_routed_experts(project: Path, tmp_path: Path, call: Call) -> None:
    run, library = tmp_path / "runs/one", tmp_path / "runs/one/experts"
    assert "finish it with weftlm train" in call("experts", "train", project, code=2)
    call("train", project, "--json")

    # -- experts
    one = ["--set", "experts.domains=[cooking]"]
    made = call("experts", "train", project, *one, "--json")
    assert {name: facts["status"] for name, facts in made["experts"].items()} == {"cooking": "made"}
    made = call("experts", "train", project, "--json")
    assert {name: facts["status"] for name, facts in made["experts"].items()} == {
        "algebra": "made", "cooking": "kept", "sailing": "made",
    }  # fmt: skip
    for facts in made["experts"].values():
        assert facts["losses"]["after"]["bits_per_byte"] < facts["losses"]["before"]["bits_per_byte"]
    assert list((run / "training/cooking").glob("*/adapter/metrics.jsonl"))
    refused = call("experts", "train", project, "--set", "experts.lora.rank=8", code=1)
    assert "settings.lora.rank: 4 before, 8 now" in refused
    assert "--replace" in refused

    # -- looking at them
    listed = call("experts", "list", library, "--json")
    assert [(each["name"], each["gate"], each["statistics"]) for each in listed] == [
        (name, True, True) for name in sorted(WORDS)
    ]
    shown = call("experts", "show", library, "cooking", "--json")
    assert {each["rank"] for each in shown["modules"].values()} == {4}
    assert shown["card"]["about"]["domain"] == "cooking"
    assert "did you mean 'cooking'" in call("experts", "show", library, "cookin", code=1)

    # -- a gate again, and the experts stay those of the recipe with that gate
    fingerprints = {name: ExpertLibrary.open(library).fingerprint([name]) for name in WORDS}
    gate = ["--set", "experts.gate.steps=6"]
    assert call("experts", "gate", project, "cooking", *gate, "--json")["gate"]["steps"] == 6
    opened = ExpertLibrary.open(library)
    changed = {name for name in WORDS if opened.fingerprint([name]) != fingerprints[name]}
    assert changed == {"cooking"}
    kept = call("experts", "train", project, *gate, *one, "--json")
    assert kept["experts"]["cooking"]["status"] == "kept"
    assert "weftlm experts gate" in call("experts", "train", project, *one, code=1)

    # -- an adapter from a PEFT folder; its gate
    call("export", library, "--format", "peft", "--expert", "cooking", "--output", "adapters")
    (tmp_path / "adapters/cooking").rename(tmp_path / "small")
    other = tmp_path / "others"
    (imported,) = call("experts", "import", other, "small", "--name", "found", "--json")
    assert (imported["name"], imported["ranks"]) == ("found", [4])
    assert ExpertLibrary.open(other).base.name == str(run / "model")
    call("experts", "import", library, "small")
    assert call("experts", "list", library, "--json")[-1] == {
        "name": "small", "origin": "small", "gate": False, "statistics": False, "losses": None,
    }  # fmt: skip
    assert "needs a gate and small has none" in call("route", "build", library, "--to", "routed", code=1)
    assert "belongs to no domain" in call("experts", "gate", project, "small", code=2)
    assert call("experts", "gate", project, "small", "--domain", "algebra", "--json")["statistics"]["examples"] == 20

    # -- routing
    routed = tmp_path / "routed"
    names = ",".join(WORDS)
    built = call("route", "build", library, "--to", routed, "--set", "router.k=1", "--experts", names, "--json")
    assert built["router"]["k"] == 1
    assert built["experts"] == list(WORDS)
    assert len(RoutedModel.from_pretrained(routed).experts) == 3
    traced = call("route", "trace", routed, "pan butter onion. mast sail wind.", "--json")
    assert "".join(traced["token_texts"]) == "pan butter onion. mast sail wind."
    assert all(sum(each.values()) == pytest.approx(1) for each in traced["token_weights"])
    printed = call("route", "trace", routed, "pan butter onion.", "--top", "3")
    assert all(f"{name} 0." in printed for name in WORDS)
    assert "0 tokens" in call("route", "trace", routed, "", code=2)
    page = tmp_path / "trace.html"
    assert str(page) in call("route", "trace", routed, "pan butter onion.", "--html", page)
    assert "Routing trace" in page.read_text(encoding="utf-8")

    # -- comparing
    options = ["--experts", names, "--max-tokens", "256"]
    table = call("route", "eval", project, *options, "--routers", "phatgoose:k=1,merged", "--json")
    rows = table["rows"]
    assert list(rows) == ["base", "phatgoose:k=1", "merged", "best single", "oracle"]
    assert set(rows["merged"]["sets"]) == {"target", *WORDS}
    gain = rows["merged"]["generic"]["bits_per_byte"] - rows["base"]["generic"]["bits_per_byte"]
    assert rows["merged"]["difference"]["generic"]["bits_per_byte"] == pytest.approx(gain)
    assert rows["best single"]["sets"] == table["singles"][table["best_single"]]["sets"]
    lowest = min(single["sets"]["cooking"]["bits_per_byte"] for single in table["singles"].values())
    assert rows["oracle"]["sets"]["cooking"]["bits_per_byte"] == lowest
    assert rows["oracle"]["generic"]["bits_per_byte"] < rows["base"]["generic"]["bits_per_byte"]
    printed = call("route", "eval", project, *options, "--no-singles")
    assert "average-activation" in printed
    assert "retrieval chooses by text that includes the tokens it is scored on" in printed

    # -- removing
    assert "no expert 'nobody'" in call("experts", "remove", library, "small", "nobody", code=1)
    left = call("experts", "remove", library, "small", "--json")
    assert left == {"removed": ["small"], "experts": sorted(WORDS)}
