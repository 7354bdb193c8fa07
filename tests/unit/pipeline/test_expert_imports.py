"""Adapters that a recipe imports: brought in once, kept, gated on a domain, replaced only when asked for."""

from __future__ import annotations

from pathlib import Path

import pytest
from peft import LoraConfig, get_peft_model
from support import served
from support.tiny_project import recipe_value, write_corpora

from weftlm.errors import ExpertError
from weftlm.experts.library import ExpertLibrary
from weftlm.models.factory import peft_warnings
from weftlm.models.open import load_base
from weftlm.pipeline.expert_library import import_recipe_experts
from weftlm.pipeline.recipe import Recipe, make_recipe


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    """Two adapters over a base with its own tokenizer; the second gets a gate on a domain."""
    base = served.write_model(tmp_path, "plain")
    for name in ("one", "two"):
        with peft_warnings():
            model = get_peft_model(
                load_base(str(base)), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
            )
            model.save_pretrained(tmp_path / "adapters" / name)
    write_corpora(tmp_path / "corpora")
    data = recipe_value()["data"]
    data = {
        "corpora": [{**each, "path": str(tmp_path / each["path"])} for each in data["corpora"]],
        "tokenizer": {"pretrained": str(base)},
    }
    imports = [
        {"source": str(tmp_path / "adapters" / "one")},
        {"source": str(tmp_path / "adapters" / "two"), "name": "sailor", "domain": "sailing"},
    ]
    training = {"sequence_length": 16, "batch_sequences": 4, "device": "cpu"}
    experts = {
        "base": str(base), "imports": imports, "training": training, "gate": {"steps": 1}, "statistics_examples": 4,
    }  # fmt: skip
    return make_recipe({"run": str(tmp_path / "run"), "data": data, "experts": experts})


def parts(recipe: Recipe) -> dict[str, tuple[bool, bool]]:
    library = ExpertLibrary.open(recipe.library_folder)
    return {name: (library.has_gate(name), library.has_statistics(name)) for name in library.names}


@pytest.mark.parametrize("steps", [1, 0])
def test_adapters_are_imported_once_and_given_what_is_asked_for(
    recipe: Recipe, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    value = recipe.resolved()
    value["experts"]["gate"]["steps"] = steps
    recipe = make_recipe(value)
    import_recipe_experts(recipe, progress=False)
    assert parts(recipe) == {"one": (False, False), "sailor": (bool(steps), True)}
    before = ExpertLibrary.open(recipe.library_folder).fingerprint()
    monkeypatch.setattr("weftlm.pipeline.experts.gate_expert", None)
    import_recipe_experts(recipe, progress=False)
    assert ExpertLibrary.open(recipe.library_folder).fingerprint() == before


def test_another_source_under_the_same_name_is_refused_unless_replaced_once_it_is_read(recipe: Recipe) -> None:
    import_recipe_experts(recipe, progress=False)
    one, two = recipe.experts.imports
    value = recipe.resolved()
    value["experts"]["imports"] = [{"source": two.source, "name": "one"}]
    other = make_recipe(value)
    with pytest.raises(ExpertError, match=r"expert 'one' in .* came from .*one', not from .*two'; replace it"):
        import_recipe_experts(other, progress=False)
    library = ExpertLibrary.open(recipe.library_folder)
    assert library.card("one")["source"] == one.source
    import_recipe_experts(other, replace=True, progress=False)
    assert library.card("one")["source"] == two.source
    before = library.fingerprint()
    (Path(recipe.experts.imports[0].source) / "adapter_model.safetensors").write_bytes(b"torn")
    with pytest.raises(ExpertError):
        import_recipe_experts(recipe, replace=True, progress=False)
    assert library.fingerprint() == before
