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
from weftlm.errors import ConfigError, DataError, ExpertError
from weftlm.experts.expert import Expert, Gate, LoRAExpert
from weftlm.experts.library import ExpertLibrary
from weftlm.experts.lora import adapter_fingerprint
from weftlm.pipeline.experts import expert_domains, gate_expert, train_experts
from weftlm.pipeline.prepare import prepare
from weftlm.pipeline.prepared import Domain
from weftlm.pipeline.recipe import Recipe, make_recipe, require_experts
from weftlm.pipeline.routes import build_route, evaluate_routes
from weftlm.pipeline.runner import run_project

TRAINING = {"sequence_length": 16, "batch_sequences": 2, "steps": 2, "device": "cpu"}
EXPERTS: dict[str, Any] = {
    "lora": {"rank": 2}, "training": TRAINING, "validate_every_steps": 0, "validation_tokens": 64, "gate": {"steps": 1},
    "statistics_examples": 4, "embedder": "tokens-16",
}  # fmt: skip


def small(**experts: Any) -> dict[str, Any]:
    value = recipe_value()
    return {**{key: value[key] for key in ("run", "seed", "data")}, "experts": {**EXPERTS, "base": "base", **experts}}


# -- the recipe ---------------------------------------------------------------------------------------------------


def test_a_section_of_experts_does_not_change_which_run_it_is() -> None:
    whole = make_recipe({**recipe_value(), "experts": {**EXPERTS, "base": "base"}})
    assert whole.deciding() == make_recipe(recipe_value()).deciding()
    assert make_recipe(yaml.safe_load(whole.to_yaml())) == whole


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (recipe_value(), "experts: missing; add a section"),
        (small(base=None), "experts.base: missing; name the base"),
        (small(lorra={}), "experts.lorra: unknown key; did you mean 'lora'"),
        (small(domains=[]), "experts.domains"),
        ({**recipe_value(), "experts": {"revision": "main"}}, "revision goes with base"),
        (small(imports=[{"source": "a/same"}, {"source": "b/Same"}]), "two adapters would have one name"),
    ],
)
def test_mistakes_are_named(value: Mapping[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        require_experts(make_recipe(value))
    assert message in str(caught.value)


def test_experts_have_the_names_of_their_domains_where_a_folder_may() -> None:
    def named(*names: str, wanted: list[str] | None = None) -> dict[str, str]:
        domains = [Domain(name, cyclic_source(100), None) for name in names]
        return {name: domain.name for name, domain in expert_domains(domains, wanted).items()}

    assert named("code/python", "a b", ".hidden", "plain", "c++") == {
        "code%2Fpython": "code/python", "a%20b": "a b", "%2Ehidden": ".hidden", "plain": "plain", "c%2B%2B": "c++",
    }  # fmt: skip
    with pytest.raises(ConfigError, match="domains 'law' and 'Law' would both"):
        named("law", "Law")
    assert named("law", "art", wanted=["art"]) == {"art": "art"}
    with pytest.raises(ConfigError, match="did you mean 'law'"):
        named("law", "art", wanted=["lwa"])


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


def recipe_in(folder: Path, corpora: Path, seed: int = 0, data: dict[str, Any] | None = None, **experts: Any) -> Recipe:
    known = json.loads((corpora / "data.json").read_text())
    return Recipe.model_validate(
        {
            "run": folder / "run", "prepared": corpora / "data" if data is None else folder / "data", "seed": seed,
            "data": {**known, **(data or {})},
            "experts": {**EXPERTS, "base": str(corpora / "base"), **experts},
        }
    )  # fmt: skip


def less(corpora: Path, tokens: int) -> dict[str, Any]:
    return {"domains": {"max_train_tokens": tokens}, "tokenizer": {"pretrained": str(corpora / "base")}}


def made(recipe: Recipe, **options: Any) -> dict[str, str]:
    found = train_experts(recipe, progress=False, **options)["experts"]
    return {name: facts["status"] for name, facts in found.items()}


def test_experts_are_made_once_and_another_one_needs_leave(tmp_path: Path, corpora: Path) -> None:
    assert made(recipe_in(tmp_path, corpora, domains=["sailing"])) == {"sailing": "made"}
    both = {"domains": ["cooking", "sailing"]}
    recipe = recipe_in(tmp_path, corpora, training={**TRAINING, "save_every_steps": 1}, **both)
    assert made(recipe) == {"cooking": "made", "sailing": "kept"}
    library = ExpertLibrary.open(recipe.library_folder)
    before, first = library.fingerprint(["cooking"]), adapter_fingerprint(library.load("cooking").lora)

    other = recipe_in(tmp_path, corpora, seed=1, domains=["cooking"])
    with pytest.raises(ExpertError, match=r"seed: 0 before, 1 now.*--replace"):
        made(other)
    assert library.fingerprint(["cooking"]) == before
    assert made(other, replace=True) == {"cooking": "made"}
    after = library.fingerprint(["cooking"])
    assert after != before
    library.remove("cooking")
    (work,) = (recipe.run / "training/cooking").iterdir()
    assert made(other) == {"cooking": "made"}, "read back from finished work"
    assert library.fingerprint(["cooking"]) == after
    library.remove("cooking")
    assert made(recipe) == {"cooking": "made", "sailing": "kept"}
    assert adapter_fingerprint(library.load("cooking").lora) == first, "not the work of the other seed"
    assert not work.exists()


def test_replaced_the_library_keeps_no_expert_that_the_recipe_does_not_make(tmp_path: Path, corpora: Path) -> None:
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


def test_a_gate_is_made_again_without_the_adapter(tmp_path: Path, corpora: Path) -> None:
    recipe = recipe_in(tmp_path, corpora, domains=["algebra"])
    made(recipe)
    library = ExpertLibrary.open(recipe.library_folder)
    before = library.load("algebra")
    longer = recipe_in(tmp_path, corpora, domains=["algebra"], gate={"steps": 3}, embedder="tokens-8")
    assert gate_expert(longer, "algebra", progress=False)["gate"]["steps"] == 3
    after = library.load("algebra")
    assert before.gate is not None
    assert after.gate is not None
    assert after.statistics is not None
    assert after.statistics.embeddings_NF.shape[1] == 8
    assert adapter_fingerprint(after.lora) == adapter_fingerprint(before.lora)
    assert any(not torch.equal(after.gate.vectors[name], before.gate.vectors[name]) for name in before.gate.vectors)
    assert not list((recipe.run / "training/algebra").glob("gate-*")), "the work of the second gate is put away"
    none = recipe_in(tmp_path, corpora, domains=["algebra"], gate={"steps": 0}, embedder="tokens-8")
    assert gate_expert(none, "algebra", progress=False)["gate"] is None
    assert (library.has_gate("algebra"), library.has_statistics("algebra")) == (False, True)
    assert made(none) == {"algebra": "kept"}
    with pytest.raises(DataError, match="made from other text"):
        gate_expert(recipe_in(tmp_path, corpora, data=less(corpora, 500)), "algebra", progress=False)


@pytest.mark.parametrize("change", ["replaced", "removed"])
def test_a_gate_is_not_kept_for_an_adapter_that_went_meanwhile(
    tmp_path: Path, corpora: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    recipe = recipe_in(tmp_path, corpora, domains=["algebra"], training={**TRAINING, "steps": 1})
    made(recipe)
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


def test_routers_that_the_experts_do_not_serve_are_left_out_with_the_cure(tmp_path: Path, corpora: Path) -> None:
    recipe = recipe_in(tmp_path, corpora, domains=["algebra"], gate={"steps": 0}, training={**TRAINING, "steps": 1})
    made(recipe)
    library = ExpertLibrary.open(recipe.library_folder)
    expert = library.load("algebra")
    assert expert.statistics is not None
    earlier = replace(expert.statistics, embedder="sentence-transformers:of-an-earlier-version")
    library.add(replace(expert, statistics=earlier), replace=True)
    found = evaluate_routes(recipe, singles=False, progress=False)
    notes = dict(note.split(" left out: ") for note in found["notes"] if " left out: " in note)
    assert not {"phatgoose", "retrieval"} & set(found["rows"])
    assert "merged" in found["rows"]
    assert all("weftlm experts gate" in notes[name] for name in ("phatgoose", "retrieval"))


def test_what_cannot_be_trained_is_refused_before_anything_is(tmp_path: Path, corpora: Path) -> None:
    adapter, few, taken = tmp_path / "adapter", tmp_path / "few", tmp_path / "taken"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    llama(vocab_size=100).save_pretrained(few)
    assert find_tokenizer(str(few)) is None
    short = {"data": less(corpora, 50), "gate": {"steps": 1, "sequence_length": 60}}
    for number, (options, error, message) in enumerate((
        (short, DataError, r"algebra \(50 tokens\), .*too little text for a sequence of 60"),
        ({"data": {"tokenizer": {"train": {"vocab_size": 300}}}}, DataError, "another tokenizer than the one that"),
        ({"base": str(few)}, ConfigError, "has 100 token embeddings"),
        ({"training": {"sequence_length": 65}}, ConfigError, "takes at most 64 positions"),
        ({"base": str(adapter)}, ConfigError, "an adapter over another model"),
        ({"base": None}, ConfigError, r"finish it with weftlm train, or set experts\.base"),
    )):  # fmt: skip
        recipe = recipe_in(tmp_path / str(number), corpora, **options)
        with pytest.raises(error, match=message):
            train_experts(recipe, progress=False)
        assert not (recipe.run / "training").exists()
    taken.write_text("something else")
    with pytest.raises(ConfigError, match="choose a new folder"):
        build_route(tmp_path / "experts", "merged", taken)
