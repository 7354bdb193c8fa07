"""From prompts and targets in files to experts and routers, over decoder-only and encoder-decoder bases."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from support.command_line import Call
from support.served import write_encoder_decoder, write_model
from support.tiny_project import WORDS

from weftlm.corpora.examples import examples_of
from weftlm.errors import ConfigError, ExpertError
from weftlm.experts.library import ExpertLibrary
from weftlm.pipeline.any_model import open_model
from weftlm.pipeline.checks import check_recipe
from weftlm.pipeline.experts import gate_expert, train_experts
from weftlm.pipeline.names import ROUTING
from weftlm.pipeline.prepare import prepare
from weftlm.pipeline.project_report import routing_facts
from weftlm.pipeline.recipe import Recipe, make_recipe
from weftlm.pipeline.routes import route_experts

NAMES = list(WORDS)


def write_tasks(folder: Path) -> None:
    """In every domain: which word follows another?"""
    rng = random.Random(0)
    for name, words in WORDS.items():
        lines = []
        for _ in range(60):
            first = rng.randrange(len(words))
            asked = " ".join(rng.choice(words) for _ in range(rng.randrange(1, 5)))
            lines.append({"in": f"{asked} {words[first]}: ", "out": words[(first + 1) % len(words)]})
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    question = {"prompt": "pan butter: ", "choices": ["onion", "mast"], "answer": "onion"}
    (folder / "ask.jsonl").write_text(json.dumps(question) + "\n" + json.dumps({**question, "prompt": "oven: "}) + "\n")


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("bases")
    return {"llama": str(write_model(folder, "plain")), "t5": str(write_encoder_decoder(folder / "t5"))}


def recipe(folder: Path, base: str, *, prompts: bool = True, **experts: Any) -> Recipe:
    if not (folder / "ask.jsonl").exists():
        write_tasks(folder)
    fields = {"text_field": "out", "prompt_field": "in"} if prompts else {"text_field": "in"}
    corpora = [{"path": str(folder / f"{name}.jsonl"), "label": name, **fields} for name in NAMES]
    return make_recipe(
        {
            "run": str(folder / "run"),
            "data": {"corpora": corpora, "tokenizer": {"pretrained": base}, "split": {"fraction": 0.2}},
            "experts": {
                "base": base,
                "domains": NAMES[:2],
                "lora": {"rank": 2, "alpha": 4},
                "training": {
                    "steps": 4, "sequence_length": 24, "batch_sequences": 8, "lr": 0.01, "device": "cpu", "threads": 1,
                },
                "validate_every_steps": 2,
                "gate": {"steps": 2},
                "statistics_examples": 8,
                **experts,
            },
            "routing": {"routers": ["phatgoose", "retrieval", "merged"]},
            "evaluation": {"batch_size": 8, "tasks": [{"path": str(folder / "ask.jsonl")}]},
        }
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_experts_of_tasks_are_made_kept_gated_and_routed(
    kind: str, bases: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = recipe(tmp_path, bases[kind], dtype="bfloat16")
    for status in ("made", "kept"):
        found = train_experts(made, progress=False)
        assert {name: each["status"] for name, each in found["experts"].items()} == dict.fromkeys(NAMES[:2], status)
    library = ExpertLibrary.open(made.library_folder)
    data = prepare(made.data, made.prepared_folder, progress=False)
    examples = examples_of({domain.name: domain.heldout for domain in data.domains}[NAMES[0]])
    assert examples is not None
    scored = library.card(NAMES[0])["losses"]["after"]["scored_tokens"]
    assert scored == int((examples.targets_N + 1).sum())
    before = library.load(NAMES[0])
    assert gate_expert(made, NAMES[0], progress=False)["gate"]["steps"] == 2
    after = library.load(NAMES[0])
    assert all((after.gate.vectors[name] == v_I).all() for name, v_I in before.gate.vectors.items())
    table = route_experts(made, progress=False)
    assert json.loads((tmp_path / "run/routed/phatgoose/routed.json").read_text())["dtype"] == "bfloat16"
    # The third domain has no expert, and is what the experts of the others are judged by.
    rows = table["rows"]
    assert set(rows["phatgoose"]["sets"]) == set(NAMES)
    assert set(rows) >= {"base", "phatgoose", "retrieval", "merged", "best single"}
    assert rows["base"]["tasks"].keys() == {"ask"}
    assert rows["base"]["mean_accuracy"]["accuracy"] == rows["base"]["tasks"]["ask"]["accuracy"]
    assert rows["base"]["tasks"]["ask"]["chance"] == 0.5
    assert json.loads((made.run / ROUTING).read_text())["rows"] == rows
    facts = routing_facts(made, table)
    assert set(facts.table.tasks.rows) >= {"base", "phatgoose"}
    ((label, _, tokens),) = facts.traces
    assert label == "phatgoose on a text that changes domain midway"
    assert len(tokens) > 60
    if kind == "llama":
        fixed = make_recipe({**made.resolved(), "routing": {"routers": ["merged"], "build": ["merged"]}})
        same = routing_facts(fixed, route_experts(fixed, progress=False))
        assert same.traces == [], "the same experts for every token"
        (tmp_path / "recipe.yaml").write_text(made.to_yaml())
        printed = Call(capsys)("route", "eval", tmp_path / "recipe.yaml", "--routers", "merged", "--no-singles")
        assert "share of right answers" in " ".join(printed.split())
        assert "mean over tasks" in printed


def test_a_key_that_a_card_lacks_counts_as_its_default(bases: dict[str, str], tmp_path: Path) -> None:
    made = recipe(tmp_path, bases["llama"], prompts=False, domains=NAMES[:1])
    train_experts(made, progress=False)
    library = ExpertLibrary.open(made.library_folder)
    expert = library.load(NAMES[0])
    del expert.card["settings"]["examples"]
    library.add(expert, replace=True)
    assert train_experts(made, progress=False)["experts"][NAMES[0]]["status"] == "kept"
    with pytest.raises(ExpertError, match=r"settings\.examples: None before, False now"):
        train_experts(recipe(tmp_path, bases["llama"], prompts=False, examples=False), progress=False)


def test_what_an_encoder_decoder_cannot_learn_from_is_refused(bases: dict[str, str], tmp_path: Path) -> None:
    plain = [{"path": str(tmp_path / "cooking.jsonl"), "label": "cooking", "text_field": "in"}]
    for changes, message in (
        ({"prompts": False}, "documents of .*cooking.* have none; give their corpora a prompt_field"),
        ({"heldout": plain}, r"documents of .*cooking.* have none; .* the held-out ones too"),
        ({"target": plain}, r"documents of the target .*cooking.* have no prompts"),
        ({"examples": False}, r"learns from examples; leave out experts\.examples: false"),
    ):
        sets = {key: changes.pop(key) for key in ("heldout", "target") if key in changes}
        value = recipe(tmp_path, bases["t5"], **changes).resolved()
        with pytest.raises(ConfigError, match=message):
            check_recipe(make_recipe({**value, "data": {**value["data"], **sets}}))
    with pytest.raises(ConfigError, match="encoder-decoder"):
        open_model(bases["t5"])
    assert open_model(bases["t5"], encoder_decoder=True).kind == "plain"


def test_examples_may_be_shorter_than_a_window_and_are_asked_of_prompts_alone(
    bases: dict[str, str], tmp_path: Path
) -> None:
    short = {"gate": {"steps": 0}, "statistics_examples": 0, "validate_every_steps": 0, "domains": NAMES[:1]}
    long = {"sequence_length": 200, "steps": 1, "batch_sequences": 8, "device": "cpu"}
    found = train_experts(recipe(tmp_path, bases["llama"], training=long, **short), progress=False)
    assert found["experts"][NAMES[0]]["status"] == "made"
    (tmp_path / "plain").mkdir()
    with pytest.raises(ConfigError, match=r"experts\.examples is true and the documents of 'cooking' have no prompts"):
        train_experts(recipe(tmp_path / "plain", bases["llama"], prompts=False, examples=True), progress=False)
