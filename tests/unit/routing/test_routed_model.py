"""Building, saving, loading and misusing a routed model."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.experts import BASE, gpt2, llama, make_expert, make_pool, prompts, t5, with_texts
from support.routing import inputs_for, logits
from torch import nn

from weftlm.errors import ConfigError, DataError, ExpertError
from weftlm.experts.expert import BaseReference
from weftlm.experts.library import ExpertLibrary
from weftlm.files import SEAL
from weftlm.models.fingerprint import base_fingerprint
from weftlm.routing.config import MANIFEST
from weftlm.routing.pool import ModulePool
from weftlm.routing.routed_model import RoutedModel


def library_of(folder: Path, base: BaseReference = BASE, count: int = 3) -> ExpertLibrary:
    library = ExpertLibrary.open(folder, base)
    for expert in make_pool(llama(), count, base=base):
        library.add(expert)
    return library


# -- what is refused ------------------------------------------------------------------------------------------------


def test_experts_of_another_base_are_refused_and_the_base_stays_whole() -> None:
    model = gpt2()
    expected = logits(model, **inputs_for(model))
    with pytest.raises(ExpertError, match=r"'a' was made for another base .*q_proj is not in the model"):
        RoutedModel(model, [make_expert(llama())])
    narrow = nn.ModuleDict({"model": nn.ModuleDict({"layers": nn.ModuleList()})})
    with pytest.raises(ExpertError, match="was made for another base"):
        RoutedModel(narrow, [make_expert(llama())])  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="unknown router"):
        RoutedModel(model, [make_expert(model)], "nobody")
    with pytest.raises(ExpertError, match="needs a gate"):
        RoutedModel(model, [make_expert(model, gate=False)])
    assert torch.equal(logits(model, **inputs_for(model)), expected)
    assert not any(isinstance(module, ModulePool) for module in model.modules())


def test_an_unloaded_model_is_the_base_and_says_so(tmp_path: Path) -> None:
    model = llama()
    routed = RoutedModel(model, make_pool(model))
    base = routed.unload()
    again = RoutedModel(model, make_pool(llama()))
    expected = logits(again, **inputs_for(model))
    assert routed.unload() is base
    assert torch.equal(logits(again, **inputs_for(model)), expected)
    again.unload()
    for use in (lambda: again.use_router("merged"), lambda: again.save_pretrained(tmp_path / "routed", copy_base=True)):
        with pytest.raises(ConfigError, match="was unloaded; build another"):
            use()
    assert list(tmp_path.iterdir()) == []


def test_retrieval_reads_ids_and_only_continues_what_it_began() -> None:
    model = llama()
    routed = RoutedModel(model, make_pool(model), "retrieval")
    ids_BT = prompts()
    embedded_BTH = model.get_input_embeddings()(ids_BT)
    with pytest.raises(ConfigError, match="was given embeddings; pass input_ids"):
        routed(inputs_embeds=embedded_BTH)
    with routed.disabled():
        cache = routed(ids_BT, use_cache=True).past_key_values
    with pytest.raises(ConfigError, match="continues one it has not seen"):
        routed(ids_BT[:, :1], past_key_values=cache)
    assert bool(logits(routed, input_ids=ids_BT).isfinite().all())
    per_token = RoutedModel(llama(), make_pool(llama()))
    torch.testing.assert_close(logits(per_token, inputs_embeds=embedded_BTH), logits(per_token, input_ids=ids_BT))


def test_a_pass_that_fails_leaves_the_model_ready() -> None:
    for model in (llama(), t5()):
        routed = RoutedModel(model, make_pool(model))
        given = inputs_for(model)
        expected = logits(routed, **given)
        with pytest.raises(IndexError):
            routed(**{**given, "input_ids": given["input_ids"] + 1000})
        assert routed.switch.passing.call is None
        assert torch.equal(logits(routed, **given), expected)


@pytest.mark.parametrize("options", [None, {"max_new_tokens": 2}])
def test_an_interrupted_pass_leaves_nothing_behind(options: dict[str, int] | None) -> None:
    model = llama()
    routed = RoutedModel(model, make_pool(model), "retrieval")
    expected = logits(routed, **inputs_for(model))

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    hook = model.get_submodule("model.layers.1").register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        routed(prompts(2, 6, seed=77)) if options is None else routed.generate(prompts(2, 6, seed=77), **options)
    hook.remove()
    assert torch.equal(logits(routed, **inputs_for(model)), expected)


def test_layers_that_would_run_again_unrouted_are_refused() -> None:
    model = llama()
    routed = RoutedModel(model, make_pool(model))
    layer = model.get_submodule("model.layers.0")
    layer.gradient_checkpointing = True
    routed(prompts())
    routed.train()
    with pytest.raises(ConfigError, match="gradient_checkpointing_disable"):
        routed(prompts())
    layer.gradient_checkpointing = False
    routed(prompts())


def test_a_routing_mask_hides_the_continuation_from_the_choice() -> None:
    ids_BT = prompts(1, 8)
    pool = [with_texts(make_expert(llama(), "a"), ids_BT[:, :4]), with_texts(make_expert(llama(), "b", seed=1), ids_BT)]
    routed = RoutedModel(llama(), pool, "retrieval")
    single = {name: RoutedModel(llama(), pool, {"router": "single", "expert": name}) for name in "ab"}
    mask_BT = torch.arange(8)[None] < 4
    with torch.no_grad():
        masked = routed(ids_BT, routing_mask=mask_BT).logits
    torch.testing.assert_close(masked, logits(single["a"], input_ids=ids_BT), rtol=1e-4, atol=1e-4)
    whole = logits(routed, input_ids=ids_BT)
    torch.testing.assert_close(whole, logits(single["b"], input_ids=ids_BT), rtol=1e-4, atol=1e-4)


# -- from a library -------------------------------------------------------------------------------------------------


def test_what_cannot_be_used_is_left_out_with_the_reason_unless_it_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    library = library_of(tmp_path / "experts")
    (library.path("b") / "gate.safetensors").write_bytes(b"")
    library.add(make_expert(gpt2(), "other"))
    routed = RoutedModel.from_library(llama(), library)
    assert [expert.name for expert in routed.experts] == ["a", "c"]
    assert "gate.safetensors has 0 bytes" in routed.left_out["b"]
    assert "'other' was made for another base" in routed.left_out["other"]
    assert all(f"expert '{name}' is left out" in caplog.text for name in routed.left_out)
    with pytest.raises(ExpertError, match=r"1 of 2 experts cannot be used .*'b'.*; can be used: a"):
        RoutedModel.from_library(llama(), library, experts=["a", "b"])
    with pytest.raises(ExpertError, match="3 of 3 experts cannot be used"):
        RoutedModel.from_library(gpt2(), library_of(tmp_path / "others"))
    assert len(RoutedModel.from_library(llama(), library, experts=["a", "c"]).experts) == 2


def test_a_library_of_another_base_is_refused_by_its_fingerprint(tmp_path: Path) -> None:
    fingerprint = base_fingerprint(llama())
    library = library_of(tmp_path / "experts", replace(BASE, fingerprint=fingerprint))
    RoutedModel.from_library(llama(), library)
    with pytest.raises(
        ExpertError,
        match=f"3 of 3 experts cannot be used.*its base tiny-base has fingerprint {fingerprint}",
    ):
        RoutedModel.from_library(llama(seed=1), library)


def test_a_base_in_another_precision_is_taken_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    library = library_of(tmp_path / "experts", replace(BASE, fingerprint=base_fingerprint(llama())))
    RoutedModel.from_library(llama().bfloat16(), library)
    assert not caplog.records
    routed = RoutedModel.from_library(llama().half(), library)
    assert "the base is held in torch.float16" in caplog.text
    assert routed.dtype == torch.float16


# -- saved ----------------------------------------------------------------------------------------------------------


def saved(tmp_path: Path) -> Path:
    llama().save_pretrained(tmp_path / "base")
    routed = RoutedModel(llama(), make_pool(llama(), 2), base=BaseReference(str(tmp_path / "base")))
    routed.save_pretrained(tmp_path / "routed")
    return tmp_path / "routed"


def test_a_saved_model_takes_a_new_or_an_empty_folder(tmp_path: Path) -> None:
    model = llama()
    routed = RoutedModel(model, make_pool(model))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="is not empty; choose a new folder"):
        routed.save_pretrained(tmp_path / "full")
    with pytest.raises(ConfigError, match=r"notes.txt is not empty"):
        routed.save_pretrained(tmp_path / "full" / "notes.txt")
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["notes.txt"]
    (tmp_path / "empty").mkdir()
    routed.save_pretrained(tmp_path / "empty")
    assert sorted(path.name for path in (tmp_path / "empty").iterdir()) == ["digests.json", "experts", MANIFEST]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "full"]


def edited(change: Callable[[dict[str, Any]], Any]) -> Callable[[str], str]:
    def edit(text: str) -> str:
        described = json.loads(text)
        change(described)
        return json.dumps(described)

    return edit


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda text: text[: len(text) // 2], "holds no routed model"),
        (lambda text: "[]", "is not of the format"),
        (edited(lambda described: described.update(format="weftlm routed model 0")), "is not of the format"),
        (edited(lambda described: described.pop("base")), "base: missing"),
        (edited(lambda described: described["base"].pop("copied")), "base.copied: missing"),
        (edited(lambda described: described.update(experts="all")), "experts: "),
        (edited(lambda described: described.update(router={"router": "phatgose"})), "did you mean 'phatgoose'"),
        (edited(lambda described: described.update(dtype="int8")), "dtype 'int8'; allowed"),
        (edited(lambda described: described["base"].update(name="/no/such/base")), "there is no folder"),
    ],
)
def test_a_broken_manifest_is_explained(harm: Callable[[str], str], message: str, tmp_path: Path) -> None:
    manifest = saved(tmp_path) / MANIFEST
    manifest.write_text(harm(manifest.read_text()))
    (manifest.parent / SEAL).unlink()
    with pytest.raises(ConfigError, match=message):
        RoutedModel.from_pretrained(manifest.parent)


def test_a_base_without_a_name_is_asked_for(tmp_path: Path) -> None:
    RoutedModel(llama(), make_pool(llama(), 2)).save_pretrained(tmp_path / "routed")
    with pytest.raises(ConfigError, match="does not say where its base is"):
        RoutedModel.from_pretrained(tmp_path / "routed")
    assert len(RoutedModel.from_pretrained(tmp_path / "routed", base=llama()).experts) == 2


def test_a_folder_without_a_manifest_or_an_expert_is_explained(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no routed model"):
        RoutedModel.from_pretrained(tmp_path)
    folder = saved(tmp_path)
    (folder / "experts" / "b" / "adapter_model.safetensors").unlink()
    with pytest.raises(DataError, match=r"b/adapter_model.safetensors is missing"):
        RoutedModel.from_pretrained(folder)
    (folder / SEAL).unlink()
    with pytest.raises(ExpertError, match="1 of 2 experts cannot be used"):
        RoutedModel.from_pretrained(folder)


# -- as a Hugging Face model ----------------------------------------------------------------------------------------


def test_threads_share_a_routed_model_without_mixing_their_texts() -> None:
    routed = RoutedModel(llama(), make_pool(llama()), "prefix")
    texts = [prompts(2, 12 + place, seed=place) for place in range(8)]
    expected = [logits(routed, input_ids=text_BT) for text_BT in texts]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda text_BT: logits(routed, input_ids=text_BT), texts * 4))
    for place, each in enumerate(found):
        torch.testing.assert_close(each, expected[place % len(texts)], atol=1e-5, rtol=1e-5)


def test_a_copy_routes_by_itself() -> None:
    routed = RoutedModel(llama(), make_pool(llama()))
    expected = logits(routed, input_ids=prompts())
    copied = copy.deepcopy(routed)
    copied.use_router("merged")
    assert torch.equal(logits(routed, input_ids=prompts()), expected)
    copied.use_router("phatgoose")
    assert torch.equal(logits(copied, input_ids=prompts()), expected)
    assert routed.unload() is not copied.model
    assert torch.equal(logits(copied, input_ids=prompts()), expected)
