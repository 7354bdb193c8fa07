"""Damaged model folders through every door that opens one: one line that names the model and the cause, and no more."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import experts as tiny
from support import in_memory, served
from torch import Tensor
from transformers import (
    BertConfig,
    BertLMHeadModel,
    OpenAIGPTConfig,
    OpenAIGPTLMHeadModel,
    PreTrainedModel,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)

from weftlm.config import validate
from weftlm.errors import WeftError
from weftlm.experts.library import ExpertLibrary
from weftlm.gating.experts import ExpertPool, ExpertSource
from weftlm.models.config import ModelConfig
from weftlm.models.factory import build_model
from weftlm.models.fingerprint import base_fingerprint
from weftlm.models.open import keeps_cache, load_base, read_config, stepping_of
from weftlm.pipeline.any_model import open_model
from weftlm.pipeline.export import export_model
from weftlm.routing.routed_model import RoutedModel

Q = "model.layers.0.self_attn.q_proj.weight"
Damage = Callable[[Path], None]


def config(**changes: Any) -> Damage:
    def damage(folder: Path) -> None:
        found = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**found, **changes}))

    return damage


def weights(change: Callable[[dict[str, Tensor]], object]) -> Damage:
    def damage(folder: Path) -> None:
        found = load_file(folder / "model.safetensors")
        change(found)
        save_file(found, folder / "model.safetensors", {"format": "pt"})

    return damage


def text(name: str, content: str) -> Damage:
    return lambda folder: (folder / name).write_text(content) and None


def cut(name: str, length: int) -> Damage:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:length]) and None


def instead(name: str, put: Callable[[Path], object]) -> Damage:
    def damage(folder: Path) -> None:
        (folder / name).unlink()
        put(folder / name)

    return damage


def index(content: object) -> Damage:
    def damage(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "model-1.safetensors")
        (folder / "model.safetensors.index.json").write_text(json.dumps(content))

    return damage


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


CONFIG_DAMAGES: dict[str, tuple[Damage, str]] = {
    "no config": (lambda folder: (folder / "config.json").unlink(), "config.json"),
    "torn config": (cut("config.json", 50), "config.json"),
    "config of a list": (text("config.json", "[1]"), "config.json"),
    "deep config": (text("config.json", '{"a":' * 100_000), "config.json"),
    "config is a pipe": (instead("config.json", os.mkfifo), "no plain file"),
    "broken link": (instead("config.json", lambda path: path.symlink_to("nowhere")), "is a broken link"),
    "unknown model type": (config(model_type="llamma"), "llamma"),
    "own code": (config(model_type="mine", auto_map={"AutoConfig": "a.B"}), "code of its own"),
    "no heads": (config(num_attention_heads=0), "config.json"),
    "negative width": (config(hidden_size=-1), "config.json"),
    "words for numbers": (config(vocab_size="many"), "config.json"),
    "endless layers": (config(num_hidden_layers=10**9), "num_hidden_layers as 1000000000"),
    "endless positions": (config(max_position_embeddings=10**15), "max_position_embeddings"),
}
DAMAGES: dict[str, tuple[Damage, str]] = {
    **CONFIG_DAMAGES,
    "a layer more": (config(num_hidden_layers=3), r"9 tensors \(model.layers.2.*missing"),
    "a layer less": (config(num_hidden_layers=1), r"9 tensors \(model.layers.1.*unexpected"),
    "another vocabulary": (config(vocab_size=10), r"2 tensors \(lm_head.weight is \(320, 32\), must.*of another size"),
    "quantised without its package": (
        config(quantization_config={"quant_method": "gptq", "bits": 4}),
        "package that is not installed",
    ),
    "infinite epsilon": (config(rms_norm_eps=float("nan")), "logits are not finite"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "holds no weights"),
    "pickled weights": (pickled, "pickled, which can run code"),
    "empty weights": (text("model.safetensors", ""), "truncated or not safetensors"),
    "truncated weights": (cut("model.safetensors", 20_000), "truncated or not safetensors"),
    "weights are a pipe": (instead("model.safetensors", os.mkfifo), "no plain file"),
    "index names a missing shard": (index({"weight_map": {Q: "model-2.safetensors"}}), "cannot read it"),
    "a tensor missing": (weights(lambda found: found.pop(Q)), r"1 tensor \(model.layers.0.*missing"),
    "a tensor too many": (weights(lambda found: found.update(x=torch.zeros(1))), r"1 tensor \(x\) unexpected"),
    "an emptied tensor": (weights(lambda found: found.update({Q: torch.zeros(0)})), "ZeRO-3"),
    "a NaN": (weights(lambda found: found[Q].view(-1)[7:8].fill_(float("nan"))), "NaN or infinite"),
    "an adapter beside": (text("adapter_config.json", "{}"), "adapter"),
}  # fmt: skip


THROUGH_EVERY_DOOR = (
    "torn config", "unknown model type", "own code", "a layer more", "pickled weights", "truncated weights",
    "a tensor missing", "an emptied tensor", "a NaN", "an adapter beside",
)  # fmt: skip
"""The others take the one door that all lead to."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return served.write_model(tmp_path_factory.mktemp("whole"), "plain")


@pytest.fixture(scope="module")
def library(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An expert over the model, whole when it was made."""
    model = load_base(str(whole))
    expert = tiny.make_pool(model, 1)[0]
    made = ExpertLibrary.open(tmp_path_factory.mktemp("pool") / "library", expert.lora.base)
    made.add(expert)
    return made.folder


def build(folder: Path) -> None:
    build_model(
        validate(ModelConfig, {"pretrained": str(folder)}, "model"), vocab_size=8, sequence_length=8, eos_id=0, seed=0
    )


def lm_eval(folder: Path) -> None:
    pytest.importorskip("lm_eval")
    from weftlm.integrations.lm_eval import WeftLM

    WeftLM(path=str(folder))


def doors(library: Path, out: Path) -> dict[str, Callable[[Path], object]]:
    """Each opens the model in a way of its own; the first is the one that all lead to."""
    return {
        "base": lambda folder: load_base(str(folder)),
        "train": build,
        "serve": open_model,
        "export": lambda folder: export_model(folder, out),
        "route": lambda folder: RoutedModel.from_library(folder, library, "uniform"),
        "gate over a library": lambda folder: ExpertPool.load(
            [ExpertSource(name="a", library=str(library), model=str(folder))]
        ),
        "lm-eval": lm_eval,
    }


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_models_are_refused_at_every_door(damage: str, whole: Path, library: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(whole, folder)
    spoil, message = DAMAGES[damage]
    spoil(folder)
    found = doors(library, tmp_path / "out")
    if damage not in THROUGH_EVERY_DOOR:
        found = {"base": found["base"]}
    if damage == "an adapter beside":  # these take it for an adapter, and say what is wrong with it
        for name in ("serve", "export", "lm-eval"):
            del found[name]
    if damage in CONFIG_DAMAGES:
        found["plan"] = lambda folder: read_config(str(folder), local_files_only=True)
    for name, door in found.items():
        with pytest.raises(WeftError, match=message) as error:
            door(folder)
        said = str(error.value)
        assert str(folder) in said, name
        assert "\n" not in said, name
        assert not any(word in said for word in ("Errno", "NoneType", "Traceback", "\x1b")), said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


TOKENIZER_DAMAGES: dict[str, Damage] = {
    "torn": cut("tokenizer.json", 300),
    "an object of nothing": text("tokenizer.json", "{}"),
    "a broken link": instead("tokenizer.json", lambda path: path.symlink_to("nowhere")),
    "gone, its class left": instead("tokenizer.json", lambda path: None),
    "settings torn": cut("tokenizer_config.json", 30),
}


@pytest.mark.parametrize("damage", TOKENIZER_DAMAGES)
def test_a_damaged_tokenizer_is_never_taken_for_none(damage: str, whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(whole, folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "tokenizer_class": "Qwen2Tokenizer"}))
    TOKENIZER_DAMAGES[damage](folder)
    for door in (open_model, lambda folder: ExpertPool.load([ExpertSource(name="a", model=str(folder))]), lm_eval):
        with pytest.raises(WeftError, match=r"tokenizer.* cannot be loaded") as error:
            door(folder)
        assert "\n" not in str(error.value)
        assert "without a tokenizer" not in str(error.value)


def test_what_is_no_fault_and_a_tokenizer_that_is_too_large(tmp_path: Path) -> None:
    """Tensors that older checkpoints keep beside their weights, and a broken link that is not read."""
    tiny.gpt2().save_pretrained(tmp_path)
    weights(lambda found: found.update({"h.0.attn.bias": torch.ones(1, 1, 4, 4)}))(tmp_path)
    (tmp_path / "eval_results.json").symlink_to("nowhere")
    assert load_base(str(tmp_path)).config.model_type == "gpt2"
    served.tokenizer().save(tmp_path)
    for door in (open_model, lambda folder: ExpertPool.load([ExpertSource(name="a", model=str(folder))]), lm_eval):
        with pytest.raises(WeftError, match=r"has 64 token embeddings and the tokenizer gives 320 ids"):
            door(tmp_path)


MAKERS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": tiny.llama, "gpt2": tiny.gpt2, "qwen2": tiny.qwen2, "t5": tiny.t5,
    "mixtral": in_memory.mixture_of_experts, "mamba": in_memory.without_keys, "rope": in_memory.long_rope,
    "sliding": in_memory.sliding,
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", MAKERS)
def test_whole_models_open_bit_by_bit(name: str, tmp_path: Path) -> None:
    model = MAKERS[name]()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    opened = load_base(str(tmp_path))
    for key, tensor in model.state_dict().items():
        assert torch.equal(opened.state_dict()[key], tensor), key
    assert not opened.training
    for dtype in ("auto", "bfloat16"):  # a model has one fingerprint, whatever it is held in
        assert base_fingerprint(load_base(str(tmp_path), dtype=dtype)) == base_fingerprint(model)


def test_an_encoder_is_no_causal_language_model(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BertLMHeadModel(BertConfig(vocab_size=32, is_decoder=True, initializer_range=0.3, **sizes)).save_pretrained(
        tmp_path
    )
    assert load_base(str(tmp_path)).config.model_type == "bert"
    config(is_decoder=False)(tmp_path)
    with pytest.raises(WeftError, match="read later tokens"):
        load_base(str(tmp_path))


NONE = OpenAIGPTConfig(vocab_size=64, n_embd=16, n_layer=1, n_head=2)
LINEAR = Qwen3NextConfig(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, linear_num_value_heads=4, linear_num_key_heads=2, linear_key_head_dim=8,
    linear_value_head_dim=8, num_experts=2, num_experts_per_tok=1, moe_intermediate_size=16,
    shared_expert_intermediate_size=16, layer_types=["linear_attention"],
)  # fmt: skip
CACHES: dict[str, tuple[Callable[[], PreTrainedModel], bool]] = {
    "llama": (tiny.llama, True),
    "gpt2": (tiny.gpt2, True),
    "sliding": (in_memory.sliding, True),
    "mamba": (in_memory.without_keys, False),
    "no cache at all": (lambda: OpenAIGPTLMHeadModel(NONE), False),
    "linear attention alone": (lambda: Qwen3NextForCausalLM(LINEAR), False),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CACHES)
@pytest.mark.parametrize("router", ["phatgoose", "prefix"])
def test_a_routed_model_generates_with_and_without_a_cache(name: str, router: str) -> None:
    """What is generated is what whole passes give, token by token."""
    make, cached = CACHES[name]
    torch.manual_seed(0)
    model = make().eval()
    assert keeps_cache(model) is cached
    routed = RoutedModel(model, tiny.make_pool(model, 2), router).eval()
    ids = torch.tensor([[5, 9, 30, 7]])
    found = routed.generate(ids, max_new_tokens=3, do_sample=False, eos_token_id=None, pad_token_id=0)
    for _ in range(3):
        mask = torch.arange(ids.shape[1])[None] < 4
        with torch.no_grad():
            logits = routed(input_ids=ids, routing_mask=mask, use_cache=False).logits
        ids = torch.cat([ids, logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    assert found.tolist() == ids.tolist()
    assert stepping_of(routed).keeps_cache is cached
