"""Adapters go to PEFT and come back unchanged; what cannot be reproduced exactly is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from support.experts import gpt2
from support.faults import dead_process, host
from support.tiny_expert import llama
from torch import Tensor, nn
from transformers import PreTrainedModel

from weftlm.errors import CheckpointError, ConfigError, ExpertError
from weftlm.experts.adapted import adapted
from weftlm.experts.expert import BaseReference, LoRAExpert, LoRAFactors
from weftlm.experts.lora import (
    adapter_fingerprint,
    check_fits,
    from_peft_model,
    lora_files,
    read_lora,
    update_norm,
    write_lora,
)
from weftlm.files import SEAL

Q, V, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.v_proj", "model.layers.0.mlp.down_proj"
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
"""PEFT asks transformers by a name of old."""

TOKENS = torch.arange(12).reshape(2, 6)
BASE = BaseReference("tiny", "main", "f" * 32)


def factors(inputs: int, outputs: int, rank: int, scale: float) -> LoRAFactors:
    return LoRAFactors(0.3 * torch.randn(rank, inputs), 0.3 * torch.randn(outputs, rank), scale)


def mixed() -> LoRAExpert:
    """Three modules with two ranks and three scales."""
    torch.manual_seed(1)
    modules = {Q: factors(32, 32, 4, 2.0), V: factors(32, 16, 4, 16 / math.sqrt(4)), DOWN: factors(48, 32, 3, 0.7 / 3)}
    return LoRAExpert("mixed", BASE, modules, {"task_type": "CAUSAL_LM"})


@torch.no_grad()
def logits(model: nn.Module, expert: LoRAExpert | None = None) -> Tensor:
    if expert is not None:
        with adapted(model, expert):
            return logits(model)
    out: Tensor = model(TOKENS).logits
    return out


def trained(base: PreTrainedModel, **settings: Any) -> PeftModel:
    """A PEFT model whose adapter has random factors."""
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **settings)).eval()
    torch.manual_seed(2)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            nn.init.normal_(parameter, std=0.3)
    return model


SETTINGS: list[tuple[Callable[[], PreTrainedModel], dict[str, Any]]] = [
    (llama, {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}),
    (llama, {"r": 8, "lora_alpha": 3, "use_rslora": True, "target_modules": ["q_proj", "down_proj"]}),
    (
        llama,
        {
            "r": 2,
            "lora_alpha": 5,
            "target_modules": ["q_proj", "k_proj", "down_proj"],
            "rank_pattern": {"q_proj": 3, r"layers\.1\.self_attn\.k_proj": 5, "^model.layers.0.mlp.down_proj": 1},
            "alpha_pattern": {"layers.0.self_attn.q_proj": 7, "down_proj": 11},
        },
    ),
    (
        llama,
        {"r": 4, "lora_alpha": 8, "use_rslora": True, "target_modules": ["q_proj"], "rank_pattern": {"0.*q_proj": 9}},
    ),
    (gpt2, {"r": 4, "lora_alpha": 6, "target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}),
]


@pytest.mark.parametrize(("make", "settings"), SETTINGS)
def test_peft_and_weftlm_read_each_others_adapters(
    tmp_path: Path, make: Callable[[], PreTrainedModel], settings: dict[str, Any]
) -> None:
    model = trained(make(), **settings)
    model.save_pretrained(tmp_path / "adapter")
    expert = read_lora(tmp_path / "adapter")
    assert expert.name == "adapter"
    assert (logits(model) - logits(make())).abs().max() > 0.02
    torch.testing.assert_close(logits(make(), expert), logits(model), rtol=1e-5, atol=1e-5)
    assert adapter_fingerprint(from_peft_model(model, "live", base=BASE)) == adapter_fingerprint(expert)
    write_lora(tmp_path / "law", expert)
    again = PeftModel.from_pretrained(make(), str(tmp_path / "law")).eval()
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-5, atol=1e-5)
    assert adapter_fingerprint(read_lora(tmp_path / "law")) == adapter_fingerprint(expert)


def test_mixed_ranks_and_scales_survive_peft_and_the_round_trip_exactly(tmp_path: Path) -> None:
    expert = mixed()
    write_lora(tmp_path / "mixed", expert)
    read = read_lora(tmp_path / "mixed", "other")
    assert (read.name, read.base) == ("other", BaseReference("tiny", "main"))
    assert {name: part.scale for name, part in read.modules.items()} == {Q: 2.0, V: 8.0, DOWN: 0.7 / 3}
    model = PeftModel.from_pretrained(llama(), str(tmp_path / "mixed")).eval()
    torch.testing.assert_close(logits(model), logits(llama(), expert), rtol=1e-5, atol=1e-5)
    assert lora_files(replace(read, name="mixed")) == lora_files(expert)


def test_an_adapters_fingerprint_is_of_its_numbers_and_modules_and_not_of_its_name() -> None:
    expert = mixed()
    own = adapter_fingerprint(expert)
    assert adapter_fingerprint(replace(mixed(), name="other")) == own
    for changed in ({Q: expert.modules[Q]}, {**expert.modules, Q: replace(expert.modules[Q], scale=1.0)}):
        assert adapter_fingerprint(replace(expert, modules=changed)) != own


def test_a_pattern_matches_whole_names_the_first_one_first_as_in_peft(folder: Path) -> None:
    configure(folder, alpha_pattern={"proj": 99, "[qv]_proj": 6, "0.self_attn.q_proj": 7}, lora_alpha=3)
    assert {name: part.scale for name, part in read_lora(folder).modules.items()} == {Q: 1.5, V: 1.5, DOWN: 1.0}


def test_a_pattern_we_write_reaches_no_other_module(tmp_path: Path) -> None:
    modules = {"fc": factors(4, 4, 2, 1.0), "mlp.fc": factors(4, 4, 2, 3.0), "mlpxfc": factors(4, 4, 1, 5.0)}
    write_lora(tmp_path / "e", LoRAExpert("e", BASE, modules, {}))
    assert {name: part.scale for name, part in read_lora(tmp_path / "e").modules.items()} == {
        "fc": 1.0,
        "mlp.fc": 3.0,
        "mlpxfc": 5.0,
    }


def test_an_adapter_taken_from_a_model_is_a_copy_and_follows_its_scale() -> None:
    model = trained(llama(), r=4, lora_alpha=8, target_modules=["q_proj"])
    layer = model.get_base_model().get_submodule(Q)
    layer.scaling["default"] = 0.25
    expert = from_peft_model(model, "live", base=BASE)
    before = expert.modules[Q].A_RI.clone()
    with torch.no_grad():
        layer.lora_A["default"].weight.add_(1.0)
    assert torch.equal(expert.modules[Q].A_RI, before)
    assert expert.modules[Q].scale == 0.25
    assert expert.base == BASE
    with pytest.raises(ExpertError, match="no adapter 'defaut' here; did you mean 'default'"):
        from_peft_model(model, "live", adapter="defaut", base=BASE)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_dora": True}, "use_dora is set"),
        ({"bias": "all"}, "trains biases"),
        ({"init_lora_weights": "olora"}, "against a changed base"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save is set"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "adapts an embedding"),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_model_that_is_no_plain_lora_is_refused(settings: dict[str, Any], message: str) -> None:
    model = trained(llama(), **{"r": 2, "target_modules": ["q_proj"], **settings})
    with pytest.raises(ExpertError, match=f"expert 'live': .*{message}"):
        from_peft_model(model, "live", base=BASE)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_lora(tmp_path / "law", mixed())
    (tmp_path / "law" / SEAL).unlink()  # other programs write none
    return tmp_path / "law"


def configure(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")


def refused(folder: Path, message: str) -> None:
    with pytest.raises(ExpertError, match=f"(?s)expert 'law': .*{message}"):
        read_lora(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'; only LORA"),
        ({"use_dora": True}, "train it without use_dora"),
        ({"use_qalora": True}, "use_qalora"),
        ({"use_bdlora": {"nblocks": 2}}, "use_bdlora"),
        ({"use_something_new": True}, "use_something_new"),
        ({"lora_bias": True}, "lora_bias"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"megatron_config": {"a": 1}}, "megatron_config"),
        ({"target_parameters": ["x"]}, "target_parameters"),
        ({"trainable_token_indices": [3]}, "trainable_token_indices"),
        ({"arrow_config": {"top_k": 2}}, "arrow_config"),
        ({"init_lora_weights": "pissa_niter_4"}, "path_initial_model_for_weight_conversion"),
        ({"r": 5}, "has rank 3, its adapter_config.json says 5; the two files do not belong together"),
        ({"r": "4"}, r"adapter_config.json.r: must be a whole number \(got '4'\)"),
        ({"r": None}, "adapter_config.json.r: must be"),
        ({"lora_alpha": None}, "adapter_config.json.lora_alpha: must be .*a number"),
        ({"lora_alpha": float("nan")}, "adapter_config.json.lora_alpha: must be .*a finite number"),
        ({"rank_pattern": ["q"]}, "adapter_config.json.rank_pattern: must be a mapping"),
        ({"rank_pattern": {"(": 3}}, "not a regular expression"),
        ({"rank_pattern": {}}, "has rank 4, its adapter_config.json says 3"),
        ({"alpha_pattern": {".*q_proj": "x"}}, "alpha_pattern.*must be .*a number .got 'x'"),
        ({"lora_alpha": 1e9}, "diverged or is corrupt"),
    ],
)
def test_a_configuration_that_is_no_plain_lora_is_refused(folder: Path, changes: dict[str, Any], message: str) -> None:
    configure(folder, **changes)
    refused(folder, message)


def key(name: str, letter: str) -> str:
    return f"base_model.model.{name}.lora_{letter}.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(key(Q, "A")), f"{Q} has lora_B but no lora_A"),
        (lambda t: t.pop(key(V, "B")), f"{V} has lora_A but no lora_B"),
        (lambda t: t.clear(), "the adapter is empty"),
        (lambda t: t.update({key(Q, "B"): torch.zeros(32, 3)}), r"lora_A is \(4, 32\) and lora_B \(32, 3\)"),
        (lambda t: t.update({key(Q, "A"): torch.zeros(4, 32, 1, 1)}), "convolutions are not supported"),
        (lambda t: t.update({key(Q, "A"): torch.zeros(4, 32, dtype=torch.int8)}), "holds torch.int8"),
        (lambda t: t[key(Q, "A")].view(-1)[3].fill_(float("nan")), f"{Q} holds NaN"),
        (lambda t: t[key(Q, "B")].view(-1)[3].fill_(float("inf")), f"{Q} holds NaN or infinite"),
        (lambda t: t[key(Q, "B")].mul_(1e6), "diverged or is corrupt"),
        (lambda t: t.update({f"base_model.model.{Q}.bias": torch.zeros(32)}), "bias='none'"),
        (lambda t: t.update({"base_model.model.lm_head.weight": torch.zeros(2, 2)}), "without modules_to_save"),
        (lambda t: t.update({"base_model.model.wte.lora_embedding_A": torch.zeros(2, 2)}), "adapts an embedding"),
        (lambda t: t.update({f"base_model.model.{Q}.lora_magnitude_vector": torch.zeros(2)}), "keys must be"),
        (lambda t: t.update({f"{Q}.lora_A.weight": torch.zeros(2, 2)}), "keys must be"),
        (lambda t: t.update({f"base_model.model.{Q}.lora_A.default.weight": torch.zeros(2, 2)}), "keys must be"),
    ],
)
def test_weights_that_are_no_plain_lora_are_refused(
    folder: Path, change: Callable[[dict[str, Tensor]], object], message: str
) -> None:
    rewrite(folder, change)
    refused(folder, message)


@pytest.mark.parametrize("kept", [0, 4, 100, -1])
def test_a_truncated_file_is_refused(folder: Path, kept: int) -> None:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    refused(folder, "truncated or not safetensors")


def test_missing_and_pickled_files_are_refused_with_the_cure(folder: Path, tmp_path: Path) -> None:
    (folder / "adapter_model.safetensors").unlink()
    refused(folder, "cannot read .*save_pretrained")
    (folder / "adapter_model.bin").write_bytes(b"\x80\x02.")
    refused(folder, "pickled weights .* never loaded.*save_pretrained")
    (folder / "adapter_config.json").unlink()
    refused(folder, "adapter_config.json: there is none")
    with pytest.raises(ExpertError, match="expert 'nowhere': cannot read"):
        read_lora(tmp_path / "nowhere")


@pytest.mark.parametrize("text", ["", "{", "[1]", "[" * 100_000, "\xff"])
def test_a_broken_configuration_is_refused(folder: Path, text: str) -> None:
    (folder / "adapter_config.json").write_text(text, encoding="latin-1")
    refused(
        folder, "adapter_config.json(: it is not (valid JSON|UTF-8 text)|: its values are nested too deep| holds list)"
    )


def test_the_norm_of_an_update_is_that_of_the_dense_product() -> None:
    part = factors(20, 30, 5, -0.7)
    dense = -0.7 * part.B_OR.double() @ part.A_RI.double()
    assert update_norm(part) == pytest.approx(float(dense.norm()), rel=1e-12)


def test_a_folder_appears_whole_and_never_in_place_of_something_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("x")
    (tmp_path / "empty").mkdir()
    (tmp_path / f".e.{dead_process()}@{host()}.writing").mkdir()
    for name in ("empty", "e"):
        write_lora(tmp_path / name, mixed())
    for name in ("full", "e"):
        with pytest.raises(ConfigError, match="is not empty; choose a new folder for the adapter"):
            write_lora(tmp_path / name, mixed())
    with pytest.raises(ExpertError, match=r"mixed.*thesis.tex/e cannot be written: .*see that the folder is writable"):
        write_lora(tmp_path / "full" / "thesis.tex" / "e", mixed())
    broken = replace(mixed(), modules={Q: replace(mixed().modules[Q], scale=float("nan"))})
    for expert, message in ((broken, "NaN or infinite"), (replace(mixed(), modules={}), "the adapter is empty")):
        with pytest.raises(ExpertError, match=message):
            write_lora(tmp_path / "unsound", expert)
    monkeypatch.setattr(Path, "write_bytes", full_disk)
    with pytest.raises(CheckpointError, match=r"cannot write .*: the disk is full.*make room and run"):
        write_lora(tmp_path / "late", mixed())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["e", "empty", "full"]
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["thesis.tex"]


def full_disk(*_: object) -> None:
    raise OSError(28, "No space left on device")


def test_an_adapter_fits_the_model_it_was_made_for_and_no_other() -> None:
    expert = mixed()
    check_fits(expert, llama(), fingerprint="f" * 32)
    check_fits(expert, llama())
    with pytest.raises(ExpertError, match=r"'mixed' was made for another base \(tiny\): model.layers.* is not in the"):
        check_fits(expert, gpt2())
    with pytest.raises(ExpertError, match=r"has fingerprint f{32}, this model 0{32}"):
        check_fits(expert, llama(), fingerprint="0" * 32)
    check_fits(replace(expert, base=BaseReference("tiny")), llama(), fingerprint="0" * 32)
    wrong = {Q: factors(32, 31, 2, 1.0), "model.embed_tokens": factors(32, 64, 2, 1.0), "x": expert.modules[Q]}
    wrong |= {f"y{number}": expert.modules[Q] for number in range(5)}
    with pytest.raises(
        ExpertError, match=r"q_proj maps 32 to 32, the adapter 32 to 31; .*Embedding.*linear.* and 5 more"
    ):
        check_fits(replace(expert, modules=wrong), llama())
