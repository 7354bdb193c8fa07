"""What is exported loads in transformers and PEFT alone and gives the same logits; the rest is refused by name."""

from __future__ import annotations

import functools
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from support import served
from support.experts import llama, make_expert, make_pool
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from weftlm.errors import CheckpointError, ConfigError, DataError, ExpertError
from weftlm.experts.expert import BaseReference, Expert
from weftlm.experts.fold import fold
from weftlm.experts.library import ExpertLibrary
from weftlm.experts.lora import read_lora
from weftlm.gating.bayes import FixedShareGate
from weftlm.gating.experts import ExpertPool, ExpertSource
from weftlm.gating.modular_lm import ModularLM
from weftlm.models.factory import peft_warnings
from weftlm.models.fingerprint import base_fingerprint
from weftlm.pipeline import export
from weftlm.pipeline.any_model import open_model
from weftlm.pipeline.export import export_model, find_converter
from weftlm.routing.config import parse_router
from weftlm.routing.routed_model import RoutedModel

words = functools.cache(served.tokenizer)
IDS = torch.tensor([[5, 9, 30, 7, 7, 41], [2, 60, 3, 3, 19, 8]])


def logits(model: Any, **kwargs: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(input_ids=IDS, **kwargs).logits
    return found


def loaded(folder: Path) -> Tensor:
    """What transformers alone makes of a folder, tokenizer included."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer("mast sail")["input_ids"] == words().hf("mast sail")["input_ids"]
    return logits(AutoModelForCausalLM.from_pretrained(folder))


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One folder of each kind: routed per token over a, b, c; gated over base, other; a library of a, b."""
    made = {kind: served.write_model(tmp_path_factory.mktemp(kind), kind) for kind in served.KINDS}
    model = served.llama()
    reference = BaseReference(str(made["plain"]), None, base_fingerprint(model))
    library = ExpertLibrary.open(tmp_path_factory.mktemp("pool") / "library", reference)
    library.add(*make_pool(model, 2, base=reference))
    return {**made, "library": library.folder}


@pytest.fixture
def converter(tmp_path: Path) -> Path:
    """Stands in for llama.cpp's converter: writes down its arguments and what it was given."""
    folder = tmp_path / "llama.cpp"
    folder.mkdir()
    script = folder / "convert_hf_to_gguf.py"
    script.write_text(
        "import json, pathlib, sys\n"
        "if 'bad' in sys.argv:\n"
        "    sys.exit('the tokenizer is not known here')\n"
        "model, out = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[3])\n"
        "said = {'python': sys.executable, 'name': model.name, 'options': [sys.argv[2], *sys.argv[4:]],\n"
        "        'files': sorted(file.name for file in model.iterdir()), 'beside': str(model.parent.parent)}\n"
        "if 'silent' not in sys.argv:\n"
        "    out.write_text(json.dumps(said))\n"
    )
    return script


def test_a_plain_model_is_written_with_its_tokenizer(models: dict[str, Path], tmp_path: Path) -> None:
    facts = export_model(models["plain"], tmp_path / "out")
    assert torch.equal(loaded(tmp_path / "out"), logits(served.llama()))
    assert (facts["kind"], facts["experts"], facts["dtype"]) == ("plain", None, "float32")


@pytest.mark.parametrize(
    ("router", "weights"),
    [
        ("merged", {"a": 1 / 3, "b": 1 / 3, "c": 1 / 3}),
        ("merged:weights.a=0.75:weights.c=-0.5", {"a": 0.75, "b": 0.0, "c": -0.5}),
        ("single:expert=b", {"a": 0.0, "b": 1.0, "c": 0.0}),
    ],
)
def test_experts_with_fixed_weights_are_folded_in(
    models: dict[str, Path], tmp_path: Path, router: str, weights: dict[str, float]
) -> None:
    facts = export_model(models["routed"], tmp_path / "out", router=router)
    assert facts["experts"] == pytest.approx(weights)
    model = open_model(models["routed"]).model
    model.use_router(parse_router(router))
    assert not torch.allclose(logits(model), logits(served.llama()), atol=1e-2)
    close(loaded(tmp_path / "out"), logits(model))
    if router.startswith("single"):  # so is the model's own router, and an expert that is named
        model.save_pretrained(tmp_path / "single")
        words().save(tmp_path / "single" / "tokenizer")
        export_model(tmp_path / "single", tmp_path / "own")
        export_model(models["routed"], tmp_path / "named", expert="b")
        assert torch.equal(loaded(tmp_path / "own"), loaded(tmp_path / "out"))
        assert torch.equal(loaded(tmp_path / "named"), loaded(tmp_path / "out"))


def test_a_router_that_chooses_per_token_is_refused_with_what_can_be_done(
    models: dict[str, Path], tmp_path: Path
) -> None:
    for router in (None, "random", "phatgoose:k=1"):
        with pytest.raises(ConfigError, match="chooses experts for every token") as caught:
            export_model(models["routed"], tmp_path / "out", router=router)
        for way in ("--router merged", "--router single:expert=a", "--expert a|b|c", "--format peft"):
            assert way in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_library_is_folded_by_a_router_or_gives_one_expert(models: dict[str, Path], tmp_path: Path) -> None:
    library = models["library"]
    with pytest.raises(ConfigError, match="say how they become one model"):
        export_model(library, tmp_path / "out")
    export_model(library, tmp_path / "out", router="merged")
    base = ExpertLibrary.open(library).base.name
    close(loaded(tmp_path / "out"), logits(RoutedModel.from_library(base, library, "uniform")))
    export_model(library, tmp_path / "b", expert="b")
    with peft_warnings():
        folder = ExpertLibrary.open(library).path("b")
        alone = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)
    close(loaded(tmp_path / "b"), logits(alone))
    with pytest.raises(DataError, match="comes without a tokenizer"):
        export_model(library, tmp_path / "none", expert="b", tokenizer=str(library))


@pytest.mark.parametrize("whole", [True, False], ids=["routed", "library"])
def test_experts_leave_as_peft_folders_that_peft_loads(models: dict[str, Path], tmp_path: Path, whole: bool) -> None:
    source = library = models["library"]
    routed = RoutedModel.from_library(None, library)
    if whole:
        routed.save_pretrained(tmp_path / "routed", copy_base=True)
        source = tmp_path / "routed"
    facts = export_model(source, tmp_path / "out", format="peft")
    assert facts["files"] == ["a", "b"]
    assert facts["base"] == (str(source / "base") if whole else ExpertLibrary.open(library).base.name)
    with peft_warnings():
        base = AutoModelForCausalLM.from_pretrained(facts["base"])
        alone = PeftModel.from_pretrained(base, tmp_path / "out" / "a", adapter_name="a")
        alone.load_adapter(tmp_path / "out" / "b", adapter_name="b")
    for name in ("a", "b"):
        alone.set_adapter(name)
        routed.use_router({"router": "single", "expert": name})
        close(logits(alone), logits(routed))
    facts = export_model(source, tmp_path / "one", format="peft", expert="b", base="owner/base", revision="v1")
    assert facts["files"] == ["b"]
    config = json.loads((tmp_path / "one" / "b" / "adapter_config.json").read_text(encoding="utf-8"))
    assert (config["base_model_name_or_path"], config["revision"]) == ("owner/base", "v1")


def test_a_gated_model_gives_one_of_its_models_and_never_itself(models: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"gated model.*dense student.*weftlm gate distil.*--expert base\|other"):
        export_model(models["gated"], tmp_path / "out")
    facts = export_model(models["gated"], tmp_path / "out", expert="other")
    assert facts["experts"] == {"other": 1.0}
    assert torch.equal(loaded(tmp_path / "out"), logits(served.llama(1)))
    with pytest.raises(ExpertError, match="no expert 'oter' in the pool; did you mean 'other'"):
        export_model(models["gated"], tmp_path / "more", expert="oter")


@pytest.mark.parametrize(
    ("kind", "options", "error", "message"),
    [
        ("plain", {"router": "merged"}, ConfigError, "--router is for routed models and expert libraries; .* is plain"),
        ("gated", {"router": "merged"}, ConfigError, "--router is for routed models and expert libraries; .* is gated"),
        ("plain", {"expert": "a"}, ConfigError, "is one set of weights"),
        ("plain", {"format": "peft"}, ConfigError, "is neither; use --format hf"),
        ("routed", {"router": "merged", "expert": "a"}, ConfigError, "not both"),
        ("routed", {"router": "merged", "format": "peft"}, ConfigError, "leave it out"),
        ("routed", {"dtype": "bfloat16", "format": "peft"}, ConfigError, "--dtype bfloat16: .* leave it out"),
        ("routed", {"dtype": "int4"}, ConfigError, "dtype 'int4'; allowed: float32"),
        ("routed", {"expert": "z"}, ExpertError, "has no expert 'z'; it has a, b, c"),
        ("routed", {"expert": "z", "format": "peft"}, ExpertError, "has no expert 'z'; it has a, b, c"),
    ],
)
def test_options_that_do_not_fit_a_model_are_refused(
    models: dict[str, Path], tmp_path: Path, kind: str, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        export_model(models[kind], tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_a_gguf_file_is_written_by_the_converter_from_a_whole_checkpoint(
    models: dict[str, Path], tmp_path: Path, converter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merged: dict[str, Any] = {"format": "gguf", "router": "merged"}
    facts = export_model(models["routed"], tmp_path / "small", converter=converter.parent, outtype="q8_0", **merged)
    assert facts["files"] == ["small.gguf"]
    said = json.loads((tmp_path / "small" / "small.gguf").read_text())
    assert (said["python"], said["name"], said["beside"]) == (sys.executable, "small", str(tmp_path))
    assert said["options"] == ["--outfile", "--outtype", "q8_0"]
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(said["files"])
    monkeypatch.setenv("LLAMA_CPP", str(converter.parent))
    for outtype, message in (("bad", "exit 1.*\nthe tokenizer is not known here"), ("silent", "it said nothing")):
        with pytest.raises(CheckpointError, match=message):
            export_model(models["routed"], tmp_path / "other", outtype=outtype, **merged)
        assert not [place for place in tmp_path.iterdir() if "other" in place.name]


def test_the_converter_is_looked_for_in_its_places(
    models: dict[str, Path], tmp_path: Path, converter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LLAMA_CPP", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    with pytest.raises(ConfigError, match=r"llama.cpp's own convert_hf_to_gguf.py.*--converter FOLDER.*LLAMA_CPP"):
        export_model(tmp_path / "nowhere", tmp_path / "out", format="gguf")  # before a model is looked for
    assert find_converter(converter) == find_converter(converter.parent) == converter
    with pytest.raises(ConfigError, match=r"--converter is .*, where there is no convert_hf_to_gguf.py"):
        find_converter(tmp_path)
    (tmp_path / "empty").mkdir()
    program = tmp_path / "empty" / "convert-hf-to-gguf"
    program.write_text('#!/bin/sh\necho made > "$3"\n')
    program.chmod(0o755)
    export_model(models["plain"], tmp_path / "out", format="gguf")
    assert (tmp_path / "out" / "out.gguf").read_text() == "made\n"
    monkeypatch.setenv("LLAMA_CPP", str(tmp_path / "gone"))
    with pytest.raises(ConfigError, match=r"LLAMA_CPP is .*gone"):
        find_converter()


@pytest.mark.parametrize("door", ["adapter", "library", "routed", "gated"])
def test_an_adapter_on_a_tied_head_is_exported_exactly(door: str, tmp_path: Path) -> None:
    base = served.llama()
    base.config.tie_word_embeddings = True
    base.tie_weights()
    base.save_pretrained(tmp_path / "base")
    words().save(tmp_path / "base")
    targets = ["lm_head", "q_proj", "down_proj"]
    with peft_warnings():
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        adapted = get_peft_model(model, LoraConfig(r=4, target_modules=targets, init_lora_weights=False))
        adapted.save_pretrained(tmp_path / "a", save_embedding_layers=False)
    expected = logits(adapted)
    assert not torch.allclose(expected, logits(AutoModelForCausalLM.from_pretrained(tmp_path / "base")), atol=0.5)
    source, options = tmp_path / "a", {"tokenizer": str(tmp_path / "base")}
    if door != "adapter":
        made = ExpertLibrary.open(tmp_path / "library", BaseReference(str(tmp_path / "base")))
        made.add(Expert(read_lora(tmp_path / "a", "a")))
        source, options = made.folder, {"expert": "a"}
    if door == "routed":
        source = tmp_path / "routed"
        RoutedModel.from_library(None, made, {"router": "single", "expert": "a"}).save_pretrained(source)
        words().save(source / "tokenizer")
    if door == "gated":
        source = tmp_path / "gated"
        pool = ExpertPool.load([ExpertSource(name="a", library=str(made.folder), expert="a")])
        ModularLM(pool, FixedShareGate.of([1.0], 0.05)).save_pretrained(source)
    export_model(source, tmp_path / "out", **options)
    close(loaded(tmp_path / "out"), expected)
    assert not (tmp_path / "out" / "adapter_config.json").exists()


@pytest.mark.parametrize("what", ["fold", "save", "adapter"])
def test_an_export_that_is_another_model_fails_and_leaves_nothing(
    what: str, models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"format": "peft"} if what == "adapter" else {"expert": "a"}
    if what == "fold":
        monkeypatch.setattr("weftlm.pipeline.export.fold", lambda model, expert: None)
    elif what == "save":
        save = PreTrainedModel.save_pretrained

        def spoilt(self: PreTrainedModel, *args: Any, **kwargs: Any) -> None:
            with torch.no_grad():
                weight = self.get_input_embeddings().weight
                weight.mul_(1.5)
                save(self, *args, **kwargs)
                weight.div_(1.5)

        monkeypatch.setattr(PreTrainedModel, "save_pretrained", spoilt)
    else:
        write = export.write_lora

        def halved(folder: Path, expert: Any) -> None:
            modules = {name: replace(each, scale=each.scale / 2) for name, each in expert.modules.items()}
            write(folder, replace(expert, modules=modules))

        monkeypatch.setattr("weftlm.pipeline.export.write_lora", halved)
    with pytest.raises(CheckpointError, match="is not the model it was made from: its logits differ"):
        export_model(models["library"], tmp_path / "out", **options)
    assert not list(tmp_path.iterdir())


def test_a_quantised_weight_takes_no_update() -> None:
    model = llama()
    expert = make_expert(model, modules=["model.layers.0.self_attn.q_proj"]).lora
    quantised = nn.Linear(32, 32)
    quantised.weight = nn.Parameter(torch.zeros(32, 32, dtype=torch.int8), requires_grad=False)
    model.set_submodule("model.layers.0.self_attn.q_proj", quantised)
    with pytest.raises(ConfigError, match="q_proj is a quantised Linear"):
        fold(model, [expert])
