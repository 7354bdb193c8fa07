"""What a later stage would refuse is refused before the first one, by every command in the same words."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from support.command_line import Call
from support.tiny_project import recipe_value, write_corpora, write_recipe
from transformers import LlamaConfig, T5Config

from weftlm.errors import ConfigError
from weftlm.pipeline.checks import check_recipe
from weftlm.pipeline.recipe import make_recipe
from weftlm.routing.config import routers

Mistake = tuple[Mapping[str, Any], str]

EXPERTS: dict[str, Any] = {"experts": {"training": {"steps": 2, "sequence_length": 16, "warmup_steps": 0}}}
DATA = recipe_value()["data"]


def data(**changes: Any) -> dict[str, Any]:
    return {"data": {**DATA, **changes}}


MISTAKES: dict[str, Mistake] = {
    "target policy without target": (data(target=[]), "mixture policy 'dga' follows a target"),
    "baseline without target": (
        {**data(target=[]), "mixture": {"policy": "uniform"}, "compare": {"mixtures": ["dga"]}},
        "mixture policy 'dga' follows a target",
    ),
    "basis": ({"mixture": {"policy": "dga", "reweight": "basis"}}, "say which in data.domains.basis"),
    "reference that is not trained": (
        {"mixture": {"policy": "doremi", "reference": "llama"}},
        "mixture.reference: llama has no trained model yet",
    ),
    "nothing held out": (
        data(split={"fraction": 0, "min_documents": 0}, target_split={"fraction": 0, "min_documents": 0}),
        "nothing is held out to evaluate on",
    ),
    "nothing held out to score": (
        {**EXPERTS, "gating": {}, **data(split={"fraction": 0, "min_documents": 0})},
        "nothing is held out to score",
    ),
    "positions of the model": (
        {"model": {"architecture": "llama", "config": {"max_position_embeddings": 16}}},
        "training.sequence_length is 32; the model takes at most 16 positions",
    ),
    "positions of the base": (
        {"experts": {"base": "llama", "training": {"sequence_length": 65}}},
        "experts.training.sequence_length is 65; the base takes at most 64 positions",
    ),
    "positions of the trained base": (
        {"experts": {"training": {"sequence_length": 4096}}},
        "experts.training.sequence_length is 4096; the base takes at most 1024 positions",
    ),
    "positions of an expert's gate": (
        {"experts": {"base": "llama", "gate": {"sequence_length": 65}, "training": {"sequence_length": 16}}},
        "experts.gate.sequence_length is 65; the base takes at most 64 positions",
    ),
    "positions of scores": (
        {**EXPERTS, "gating": {"scores": {"length": 2048}}},
        "gating.scores.length is 2048; an expert takes at most 1024 positions",
    ),
    "sizes": (
        {"model": {"architecture": "llama", "config": {"num_attention_heads": 4, "num_key_value_heads": 3}}},
        "num_attention_heads must be a multiple",
    ),
    "architecture": ({"model": {"architecture": "lama"}}, "is no transformers model type"),
    "base mistyped": ({"experts": {"base": "llamaa"}}, "did you mean llama?"),
    "base is an adapter": ({"experts": {"base": "adapter"}}, "is an adapter over another model"),
    "modules of the base": (
        {"experts": {"base": "llama", "lora": {"target_modules": ["q_prj"]}}},
        "experts.lora.target_modules",
    ),
    "modules of the trained base": (
        {"experts": {"lora": {"target_modules": ["c_attn"]}}},
        "experts.lora.target_modules",
    ),
    "import mistyped": ({"experts": {"imports": [{"source": "adaptor"}]}}, "did you mean adapter?"),
    "import without a domain": (
        {"experts": {"imports": [{"source": "adapter", "domain": "baking"}]}},
        "names 'baking', which is no scored domain",
    ),
    "import with a domain's name": (
        {"experts": {"domains": ["cooking"], "imports": [{"source": "adapter", "name": "cooking"}]}},
        "an adapter has the name of domain",
    ),
    "no such domain": ({"experts": {"domains": ["coking"]}}, "did you mean 'cooking'"),
    "examples of plain text": ({"experts": {"examples": True}}, "have no prompts"),
    "encoder-decoder of plain text": ({"experts": {"base": "t5"}}, "learns from prompts and targets"),
    "monolith of an encoder-decoder": (
        {
            **data(**{key: [{**each, "prompt_field": "text"} for each in DATA[key]] for key in ("corpora", "target")}),
            "experts": {"base": "t5"},
            "compare": {"monolith": True},
        },
        "leave compare.monolith out",
    ),
    "routed models of one name": (
        {"experts": {}, "routing": {"build": ["phatgoose", "phatgoose"]}},
        "routing.build: a router is named twice: phatgoose, phatgoose",
    ),
    "gate without samples": (
        {**EXPERTS, "gating": {"scores": {"samples": 0}}},
        "sees whole sequences and needs samples",
    ),
    "scored expert": ({**EXPERTS, "gating": {"experts": ["cook"]}}, "which is no expert"),
    "scored domain": ({**EXPERTS, "gating": {"domains": ["cook"]}}, "which is no scored domain"),
    "mixtures": ({**EXPERTS, "gating": {"mixtures": {"lower": {"x": 0.1}}}}, "no scored domain"),
    "offsets": ({**EXPERTS, "gating": {"offsets": {"cooking": 1.0}}}, "none for algebra, sailing"),
    "domain without an expert": (
        {"experts": {"domains": ["cooking", "sailing"]}, "gating": {}},
        "algebra has no expert of its own",
    ),
    "run is a file": ({"run": "recipe.yaml"}, "recipe.yaml is a file"),
    "pool mistyped": (
        {"gating": {"pool": [{"name": "a", "model": "lama"}, {"name": "b", "model": "llama"}], "offsets": "none"}},
        "did you mean llama?",
    ),
}
TEXTS: dict[str, Mistake] = {
    "task mistyped": ({"evaluation": {"tasks": [{"path": "tasks/none.jsonl"}]}}, "matches no file"),
    "task torn": ({"evaluation": {"tasks": [{"path": "torn.jsonl"}]}}, "torn.jsonl:1"),
    "tasks of one name": (
        {"evaluation": {"tasks": [{"path": "task.jsonl"}, {"path": "task.jsonl"}]}},
        "two tasks would be called 'task'",
    ),
    "corpus mistyped": (data(corpora=[{"path": "corpora/none.jsonl", "label": "x"}]), "corpora/none.jsonl"),
}


DATA_MISTAKES = ("task mistyped", "task torn", "corpus mistyped")
"""Of text alone, which are not the recipe's."""


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Corpora, a base of 64 positions, an encoder-decoder, an adapter and tasks, as far as they are read."""
    write_corpora(tmp_path / "corpora")
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    LlamaConfig(**sizes, max_position_embeddings=64, vocab_size=320).save_pretrained(tmp_path / "llama")
    T5Config(d_model=8, num_layers=1, num_heads=1, vocab_size=320).save_pretrained(tmp_path / "t5")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    (tmp_path / "torn.jsonl").write_text('{"prompt": \n')
    (tmp_path / "task.jsonl").write_text(json.dumps({"prompt": "a", "choices": ["b", "c"], "answer": 0}) + "\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


EVERYWHERE = {
    "target policy without target": "train",
    "no such domain": "experts train",
    "mixtures": "gate fit",
    "scored domain": "score",
    "task torn": "train",
}
"""Mistakes tried at every door, with the command of a stage; the others at `weftlm run` alone."""


@pytest.mark.parametrize("mistake", [*MISTAKES, *TEXTS])
def test_every_command_refuses_before_anything_is_written(
    mistake: str, project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call = Call(capsys)
    changes, said = {**MISTAKES, **TEXTS}[mistake]
    write_recipe(project, changes)
    before = sorted(project.rglob("*"))
    doors = [["run"]]
    if mistake in EVERYWHERE:
        doors += [["run", "--dry-run"], EVERYWHERE[mistake].split(), *([["plan"]] if mistake in MISTAKES else [])]
    found = {call(*words, "recipe.yaml", code=1 if mistake in DATA_MISTAKES else 2) for words in doors}
    assert said in found.pop()
    assert not found
    assert sorted(project.rglob("*")) == before


WITHOUT: dict[str, dict[str, Any]] = {
    "gate": {"gate": {"steps": 0}},
    "statistics": {"statistics_examples": 0},
    "import": {"imports": [{"source": "adapter"}]},
}
"""Requirement of routers -> the setting that takes it away; an adapter without a domain takes away all of them."""


@pytest.mark.parametrize("key", ["routers", "build"])
def test_a_router_whose_experts_lack_what_it_needs_is_refused(key: str, project: Path) -> None:
    routing = {"routers": ["merged"], "build": ["merged"]}
    for router in routers:
        for need, experts in WITHOUT.items():
            word = "single:expert=cooking" if router == "single" else router
            recipe = make_recipe({**recipe_value(), "experts": experts, "routing": {**routing, key: [word]}})
            lacking = need in routers[router].needs or (need == "import" and bool(routers[router].needs))
            with pytest.raises(ConfigError, match=rf"routing\.{key}: {router} needs") if lacking else nullcontext():
                check_recipe(recipe)


def test_all_problems_are_said_at_once(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call = Call(capsys)
    wrong = {"experts": {"domains": ["coking"]}, "gating": {}}
    (project / "file").write_text("")
    write_recipe(project, {**wrong, **data(target=[]), "run": "file/run"})
    message = call("run", "recipe.yaml", code=2)
    for said in ("coking", "follows a target", "file is a file"):
        assert said in message


@pytest.mark.parametrize(
    "changes",
    [
        {**EXPERTS, "gating": {}, "routing": {}, "compare": {"monolith": True}},
        {
            **data(domains={"small": "other", "min_tokens": 100}),
            "experts": {"domains": ["cooking", "other"]},
            "gating": {"domains": ["other"]},
        },
    ],
    ids=["whole", "small domains in one"],
)
def test_a_sound_recipe_passes(changes: dict[str, Any], project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call = Call(capsys)
    write_recipe(project, changes)
    call("run", "recipe.yaml", "--dry-run")


def test_a_whole_run_without_samples_to_distil_from_is_refused(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call = Call(capsys)
    write_recipe(project, {**EXPERTS, "gating": {"gate": {"gate": "bayes"}, "scores": {"samples": 0}}})
    assert "distillation learns from samples" in call("run", "recipe.yaml", code=2)
    assert "distillation learns from samples" in call("run", "recipe.yaml", "--dry-run", code=2)
    call("score", "recipe.yaml", "--dry-run")
