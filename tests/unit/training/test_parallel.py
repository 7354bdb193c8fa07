"""What of sharding needs no second process; the rest is in tests/distributed/test_fsdp.py."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from weftlm.models.config import ModelConfig
from weftlm.models.factory import build_model, peft_warnings
from weftlm.training.parallel import decoder_layers, gathered, put, units, whole


def model(architecture: str, **config: int | bool) -> nn.Module:
    section = ModelConfig(architecture=architecture, config=config)
    return build_model(section, vocab_size=32, sequence_length=8, eos_id=0, seed=0)


LLAMA = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 3, "num_attention_heads": 2}


@pytest.mark.parametrize(
    ("architecture", "config", "layer", "linear"),
    [
        ("llama", {**LLAMA, "num_key_value_heads": 2}, "LlamaDecoderLayer", "q_proj"),
        ("gpt2", {"n_embd": 8, "n_layer": 3, "n_head": 2}, "GPT2Block", "c_attn"),
    ],
)
def test_layers_are_found_also_under_adapters(
    architecture: str, config: dict[str, int], layer: str, linear: str
) -> None:
    plain = model(architecture, **config)
    layers = decoder_layers(plain)
    assert [type(each).__name__ for each in layers] == [layer] * 3
    with peft_warnings():
        section = LoraConfig(r=2, target_modules=[linear], fan_in_fan_out=linear == "c_attn", task_type="CAUSAL_LM")
        adapted = get_peft_model(plain, section)
    assert decoder_layers(adapted) == layers


def test_a_model_that_names_no_layers_has_none() -> None:
    assert decoder_layers(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))) == []


def test_what_is_not_split_is_whole() -> None:
    plain = model("llama", **LLAMA, num_key_value_heads=2, tie_word_embeddings=True)
    assert units(plain) == []
    weight = plain.get_parameter("model.norm.weight")
    assert whole(weight) is weight
    put(weight, torch.arange(8.0))
    assert weight.tolist() == list(range(8))

    state, expected = gathered(plain.state_dict(keep_vars=True), keep=True), plain.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())
    assert state["lm_head.weight"].data_ptr() == state["model.embed_tokens.weight"].data_ptr()
    assert gathered(plain.state_dict(), keep=False) == {}
