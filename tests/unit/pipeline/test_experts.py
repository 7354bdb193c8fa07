"""The recipe of experts, which domains get one, and when an expert is made, kept or refused."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from support.tiny_expert import cyclic_source, llama
from support.tiny_project import recipe_value, write_corpora
from torch import nn

from weftlm.corpora.tokens import find_tokenizer
from weftlm.domains.domain import Domain
from weftlm.errors import CheckpointError, ConfigError, DataError, ExpertError
from weftlm.experts.expert import Expert, Gate, LoRAExpert
from weftlm.experts.library import ExpertLibrary
from weftlm.pipeline.experts import expert_domains, gate_expert, train_experts
from weftlm.pipeline.prepare import prepare
from weftlm.pipeline.recipe import Recipe, load_recipe, make_recipe, require_experts
from weftlm.pipeline.routes import build_route
from weftlm.pipeline.runner import run_project
from weftlm.routing.config import parse_router

EXPERTS: dict[str, Any] = {
    "lora": {"rank": 2},
    "training": {"sequence_length": 16, "batch_sequences": 2, "steps": 2, "device": "cpu"},
    "validate_every_steps": 0,
    "validation_tokens": 64,
    "gate": {"steps": 1},
    "statistics_examples": 4,
    "embedder": "tokens-16",
}


def small(**experts: Any) -> dict[str, Any]:
    value = recipe_value()
    section = {**EXPERTS, "base": "base", **experts}
    return {**{key: value[key] for key in ("run", "seed", "data")}, "experts": section}


# -- the recipe ---------------------------------------------------------------------------------------------------


def test_a_whole_recipe_and_a_small_one_give_the_same_experts() -> None:
    whole = make_recipe({**recipe_value(), "experts": {**EXPERTS, "base": "base"}})
    assert whole.experts == make_recipe(small()).experts
    assert whole.data == make_recipe(small()).data
    assert whole.evaluation.every_steps == 30


def test_a_whole_recipe_makes_experts_of_its_own_model_beside_it() -> None:
    recipe = make_recipe({**recipe_value(), "experts": {}})
    assert recipe.base == "runs/one/model"
    assert recipe.library_folder == Path("runs/one/experts")
    assert recipe.experts is not None
    assert recipe.experts.training.total_steps == 1000


def test_the_section_does_not_change_which_run_it_is() -> None:
    without = make_recipe(recipe_value())
    assert make_recipe({**recipe_value(), "experts": EXPERTS}).deciding() == without.deciding()


def test_a_resolved_recipe_is_the_same_recipe_again() -> None:
    recipe = make_recipe(small(training={"tokens": 1000, "sequence_length": 16}))
    assert make_recipe(yaml.safe_load(recipe.to_yaml())) == recipe
    whole = make_recipe({**recipe_value(), "experts": EXPERTS})
    assert make_recipe(yaml.safe_load(whole.to_yaml())) == whole


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (recipe_value(), "experts: missing; add a section"),
        (small(base=None), "experts.base: missing; name the base"),
        (small(lorra={}), "experts.lorra: unknown key; did you mean 'lora'"),
        (small(lora={"rnak": 2}), "experts.lora.rnak: unknown key; did you mean 'rank'"),
        (small(domains=[]), "experts.domains"),
        ({**recipe_value(), "experts": {"revision": "main"}}, "revision goes with base"),
        ({**small(), "exprts": {}}, "exprts: unknown key; did you mean 'experts'"),
    ],
)
def test_mistakes_are_named(value: Mapping[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        require_experts(make_recipe(value))
    assert message in str(caught.value)


def test_overrides_reach_the_section(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(small()))
    assert load_recipe(path, ["experts.gate.lr=1e-3"]).experts.gate.lr == 1e-3


# -- which experts ------------------------------------------------------------------------------------------------


def domains(*names: str) -> list[Domain]:
    return [Domain(name, cyclic_source(100), None, 1, 1) for name in names]


def test_experts_are_called_as_their_domains_where_a_folder_may_be() -> None:
    found = expert_domains(domains("code/python", "a b", ".hidden", "plain"))
    assert {name: domain.name for name, domain in found.items()} == {
        "code%2Fpython": "code/python", "a%20b": "a b", "%2Ehidden": ".hidden", "plain": "plain",
    }  # fmt: skip


def test_two_domains_may_not_share_an_expert() -> None:
    assert list(expert_domains(domains("c", "c++", "c#", "数学", "音乐"))) == [
        "c", "c%2B%2B", "c%23", "%E6%95%B0%E5%AD%A6", "%E9%9F%B3%E4%B9%90",
    ]  # fmt: skip
    with pytest.raises(ConfigError, match="domains 'law' and 'Law' would both"):
        expert_domains(domains("law", "Law"))


def test_a_domain_that_is_not_there_is_named() -> None:
    assert list(expert_domains(domains("law", "art"), ["art"])) == ["art"]
    with pytest.raises(ConfigError, match="did you mean 'law'"):
        expert_domains(domains("law", "art"), ["lwa"])


def test_a_router_in_one_word() -> None:
    assert parse_router("phatgoose") == {"router": "phatgoose"}
    assert parse_router("prefix:k=1:share=0.1") == {"router": "prefix", "k": 1, "share": 0.1}


# -- making them --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Corpora, prepared data, and a base whose tokenizer is that of the data."""
    folder = tmp_path_factory.mktemp("project")
    write_corpora(folder / "corpora")
    value = recipe_value()["data"]
    value["corpora"] = [{**each, "path": str(folder / each["path"])} for each in value["corpora"]]
    del value["target"]
    (folder / "data.json").write_text(json.dumps(value))
    recipe = Recipe.model_validate({"run": folder / "run", "data": value, "experts": EXPERTS})
    data = prepare(recipe.data, folder / "data", progress=False)
    llama(vocab_size=data.tokenizer.vocab_size).save_pretrained(folder / "base")
    data.tokenizer.save(folder / "base")
    return folder


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def recipe_in(folder: Path, corpora: Path, seed: int = 0, **experts: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "run": folder / "run", "prepared": corpora / "data", "seed": seed,
            "data": json.loads((corpora / "data.json").read_text()),
            "experts": {**EXPERTS, "base": str(corpora / "base"), **experts},
        }
    )  # fmt: skip


def statuses(result: Mapping[str, Any]) -> dict[str, str]:
    return {name: facts["status"] for name, facts in result["experts"].items()}


def test_experts_are_made_once_and_another_one_needs_leave(tmp_path: Path, corpora: Path) -> None:
    recipe = recipe_in(tmp_path, corpora, domains=["cooking", "sailing"])
    assert statuses(train_experts(recipe, only=["sailing"], progress=False)) == {"sailing": "made"}
    assert statuses(train_experts(recipe, progress=False)) == {"cooking": "made", "sailing": "kept"}
    library = ExpertLibrary.open(recipe.library_folder)
    assert library.base.fingerprint is not None
    assert library.card("cooking")["about"]["domain"] == "cooking"
    before = library.fingerprint(["cooking"])

    other = recipe_in(tmp_path, corpora, seed=1, domains=["cooking"])
    with pytest.raises(ExpertError, match=r"seed: 0 before, 1 now.*--replace"):
        train_experts(other, progress=False)
    assert library.fingerprint(["cooking"]) == before
    assert statuses(train_experts(other, replace=True, progress=False)) == {"cooking": "made"}
    assert library.fingerprint(["cooking"]) != before

    # The work is that of the other seed now: it is not taken for this one's.
    library.remove("cooking")
    with pytest.raises(CheckpointError, match="training of another expert 'cooking'"):
        train_experts(recipe, progress=False)
    assert statuses(train_experts(other, progress=False)) == {"cooking": "made"}, "read back from finished work"


def test_made_anew_the_library_keeps_no_expert_that_the_recipe_does_not_make(tmp_path: Path, corpora: Path) -> None:
    two = recipe_in(tmp_path, corpora, domains=["cooking", "sailing"])
    run_project(two, until="experts", progress=False)
    library = ExpertLibrary.open(two.library_folder)
    expert = library.load("sailing")
    library.add(Expert(replace(expert.lora, name="mine"), card={"source": "elsewhere"}))
    before = library.fingerprint(["cooking"])
    one = recipe_in(tmp_path, corpora, domains=["cooking"])
    with pytest.raises(
        ConfigError, match=r"stage experts was made of something else \(experts.domains: .*--from experts"
    ):
        run_project(one, until="experts", progress=False)
    assert library.names == ["cooking", "mine", "sailing"]
    run_project(one, from_stage="experts", until="experts", progress=False)
    assert library.names == ["cooking", "mine"]
    assert library.fingerprint(["cooking"]) == before
    assert not two.training_folder("sailing").exists()


def test_saving_more_often_makes_no_other_expert(tmp_path: Path, corpora: Path) -> None:
    recipe = recipe_in(tmp_path, corpora, domains=["algebra"])
    train_experts(recipe, progress=False)
    saving = recipe_in(tmp_path, corpora, domains=["algebra"], training={**EXPERTS["training"], "save_every_steps": 1})
    assert statuses(train_experts(saving, progress=False)) == {"algebra": "kept"}


def test_a_gate_is_made_again_without_the_adapter(tmp_path: Path, corpora: Path) -> None:
    recipe = recipe_in(tmp_path, corpora, domains=["algebra"])
    train_experts(recipe, progress=False)
    library = ExpertLibrary.open(recipe.library_folder)
    before = library.load("algebra")
    longer = recipe_in(tmp_path, corpora, domains=["algebra"], gate={"steps": 3}, embedder="tokens-8")
    assert gate_expert(longer, "algebra", progress=False)["gate"]["steps"] == 3
    after = library.load("algebra")
    assert before.gate is not None
    assert after.gate is not None
    assert after.statistics is not None
    assert after.statistics.embeddings_NF.shape[1] == 8
    for name, factors in before.lora.modules.items():
        assert torch.equal(after.lora.modules[name].A_RI, factors.A_RI)
        assert torch.equal(after.lora.modules[name].B_OR, factors.B_OR)
    assert any(not torch.equal(after.gate.vectors[name], before.gate.vectors[name]) for name in before.gate.vectors)
    assert statuses(train_experts(longer, progress=False)) == {"algebra": "kept"}
    with pytest.raises(ExpertError, match="weftlm experts gate"):
        train_experts(recipe, progress=False)
    assert not list((recipe.run / "training/algebra").glob("gate-*")), "the work of the second gate is put away"
    with pytest.raises(DataError, match="made from other text"):
        gate_expert(_with_other_text(recipe, corpora, tmp_path), "algebra", progress=False)


@pytest.mark.parametrize("change", ["replaced", "removed"])
def test_a_gate_is_not_kept_for_an_adapter_that_went_meanwhile(
    tmp_path: Path, corpora: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    recipe = recipe_in(tmp_path, corpora, domains=["algebra"], training={**EXPERTS["training"], "steps": 1})
    train_experts(recipe, progress=False)
    library = ExpertLibrary.open(recipe.library_folder)

    def meanwhile(model: nn.Module, lora: LoRAExpert, *_: object, **__: object) -> Gate:
        if change == "replaced":
            halved = {name: replace(part, scale=part.scale / 2) for name, part in lora.modules.items()}
            library.add(Expert(replace(lora, modules=halved)), replace=True)
        else:
            library.remove("algebra")
        return Gate({name: torch.zeros(part.A_RI.shape[1]) for name, part in lora.modules.items()}, {})

    monkeypatch.setattr("weftlm.experts.train.train_gate", meanwhile)
    with pytest.raises(ExpertError, match="was replaced or removed while its gate was trained"):
        gate_expert(recipe, "algebra", progress=False)
    assert library.names == (["algebra"] if change == "replaced" else [])
    assert not any(map(library.has_gate, library.names))


def _with_other_text(recipe: Recipe, corpora: Path, folder: Path) -> Recipe:
    data = recipe.data.model_dump(mode="json")
    data["domains"]["max_train_tokens"] = 500
    data["tokenizer"] = {"pretrained": str(corpora / "base")}
    return Recipe.model_validate({**recipe.resolved(), "prepared": folder / "less", "data": data})


def test_a_short_domain_stops_everything_before_anything_is_trained(tmp_path: Path, corpora: Path) -> None:
    recipe = recipe_in(tmp_path, corpora, gate={"steps": 1, "sequence_length": 60})
    data = recipe.data.model_dump(mode="json")
    data["domains"]["max_train_tokens"] = 50
    data["tokenizer"] = {"pretrained": str(corpora / "base")}
    recipe = Recipe.model_validate({**recipe.resolved(), "prepared": tmp_path / "short", "data": data})
    with pytest.raises(DataError, match=r"algebra \(50 tokens\), .*too little text for a sequence of 60"):
        train_experts(recipe, progress=False)
    assert not (recipe.run / "training").exists()


def test_a_base_of_another_tokenizer_is_refused(tmp_path: Path, corpora: Path) -> None:
    recipe = recipe_in(tmp_path, corpora)
    data = recipe.data.model_dump(mode="json")
    data["tokenizer"] = {"train": {"vocab_size": 300}}
    other = Recipe.model_validate({**recipe.resolved(), "prepared": tmp_path / "other", "data": data})
    with pytest.raises(DataError, match="another tokenizer than the one that comes with the base"):
        train_experts(other, progress=False)
    llama(vocab_size=100).save_pretrained(tmp_path / "few")
    assert find_tokenizer(str(tmp_path / "few")) is None
    with pytest.raises(ConfigError, match="has 100 token embeddings"):
        train_experts(recipe_in(tmp_path, corpora, base=str(tmp_path / "few")), progress=False)
    with pytest.raises(ConfigError, match="takes at most 64 positions"):
        train_experts(recipe_in(tmp_path, corpora, training={"sequence_length": 65}), progress=False)


def test_an_adapter_is_no_base(tmp_path: Path, corpora: Path) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter/adapter_config.json").write_text("{}")
    with pytest.raises(ConfigError, match="is an adapter over another model"):
        train_experts(recipe_in(tmp_path, corpora, base=str(tmp_path / "adapter")), progress=False)


def test_a_run_without_a_model_says_how_to_get_one(tmp_path: Path, corpora: Path) -> None:
    with pytest.raises(ConfigError, match=r"finish it with weftlm train, or set experts\.base"):
        train_experts(recipe_in(tmp_path, corpora, base=None), progress=False)


def test_a_routed_model_is_not_built_over_a_file(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("something else")
    with pytest.raises(ConfigError, match="choose a new folder"):
        build_route(tmp_path / "experts", "merged", tmp_path / "taken")
