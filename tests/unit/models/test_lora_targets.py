"""Where LoRA goes: known before training, and nothing that a library would refuse afterwards."""

from __future__ import annotations

from typing import Any

import pytest
from support import experts as bases
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from weftlm.errors import ConfigError
from weftlm.experts.expert import BaseReference
from weftlm.experts.lora import check_fits, from_peft_model
from weftlm.models.config import LoRASection
from weftlm.models.factory import with_lora
from weftlm.models.lora_targets import linear_widths, lora_targets, named_by
from weftlm.models.open import outline

_COMMON = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 64, "num_experts_per_tok": 2, "pad_token_id": None,
    "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
_DEEPSEEK = {
    "moe_intermediate_size": 16, "num_key_value_heads": 4, "n_routed_experts": 4, "n_shared_experts": 1,
    "first_k_dense_replace": 1, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
    "v_head_dim": 8, "n_group": 1, "topk_group": 1,
}  # fmt: skip
MIXTURES: dict[str, tuple[dict[str, Any], set[str]]] = {
    "mixtral": ({"num_local_experts": 4}, {"q_proj", "k_proj", "v_proj", "o_proj"}),
    "deepseek_v3": (_DEEPSEEK, {"q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"}),
    "qwen3_next": (
        {
            "num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "head_dim": 8,
            "num_hidden_layers": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2,
            "linear_num_value_heads": 2,
        },
        {"q_proj", "k_proj", "v_proj", "o_proj", "in_proj_qkvz", "in_proj_ba", "out_proj", "shared_expert_gate"},
    ),
}  # fmt: skip


def mixture_config(kind: str) -> Any:
    return AutoConfig.for_model(kind, **{**_COMMON, **MIXTURES[kind][0]})


def adapted(model: PreTrainedModel, targets: str | list[str]) -> set[str]:
    """Names of the modules that an untrained adapter has, judged by what the library takes."""
    names = lora_targets(model, targets)
    peft_model = with_lora(model, LoRASection(rank=2, target_modules=targets))
    expert = from_peft_model(peft_model, "e", base=BaseReference("b"))
    assert list(expert.modules) == sorted(names)
    check_fits(expert, peft_model.unload())
    return {name.rpartition(".")[2] for name in names}


@pytest.mark.parametrize("kind", MIXTURES)
def test_all_linear_of_a_mixture_of_experts_is_what_a_library_takes(kind: str) -> None:
    model = AutoModelForCausalLM.from_config(mixture_config(kind))
    assert lora_targets(outline(model.config), "all-linear") == lora_targets(model, "all-linear")
    assert adapted(model, "all-linear") == MIXTURES[kind][1]


@pytest.mark.parametrize("kind", MIXTURES)
@pytest.mark.parametrize("targets", [["gate_up_proj"], ["w1"], r".*mlp\..*", ["gate"]])
def test_fused_experts_are_refused_before_training_with_what_can_be_named(kind: str, targets: Any) -> None:
    with pytest.raises(ConfigError, match=r"(?s)lora.target_modules.*give all-linear, or names of linear modules: \w+"):
        lora_targets(outline(mixture_config(kind)), targets)


@pytest.mark.parametrize("name", bases.BASES)
def test_all_linear_is_every_linear_module_but_the_head(name: str) -> None:
    model = bases.BASES[name]()
    assert lora_targets(model, "all-linear") == list(bases.linear_modules(model))


def test_names_and_expressions_mean_what_they_mean_to_peft() -> None:
    model = bases.llama()
    q = [f"model.layers.{layer}.self_attn.q_proj" for layer in range(2)]
    assert lora_targets(model, ["q_proj"]) == lora_targets(model, r".*\.q_proj") == q
    assert lora_targets(model, [q[1]]) == lora_targets(model, r"model\.layers\.[1]\..*q_proj") == [q[1]]
    assert adapted(model, ["lm_head", "q_proj"]) == {"lm_head", "q_proj"}
    names = ["head", "body.head", "body.ahead"]
    assert named_by(["head", "dy.head"], names, "x") == {"head": {"head", "body.head"}, "dy.head": set()}


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["qproj"], "'qproj' matches no module"),
        (["q_proj", "embed_tokens"], "embed_tokens is of type Embedding and no linear module"),
        (["mlp"], "mlp is of type LlamaMLP and no linear module"),
        ([], "is empty"),
        ([""], "'' matches no module"),
        ("", "'' matches no module"),
        ("q_proj", "'q_proj' matches no module"),
        ("(", "'\\(' is not a regular expression"),
        (r"(.|..)*[!?]", "too much time or memory"),
        ("a" * 5000, "5,000 characters"),
    ],
)
def test_what_no_expert_can_hold_is_refused_with_what_can_be_named(targets: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=f"lora.target_modules.*({message})"):
        lora_targets(bases.llama(), targets)


def test_widths_are_input_and_output_for_every_kind_of_linear() -> None:
    assert linear_widths(nn.Linear(3, 5)) == (3, 5)
    assert linear_widths(bases.gpt2().get_submodule("transformer.h.0.attn.c_attn")) == (32, 96)
    quantised = nn.Module()
    quantised.in_features, quantised.out_features = 7, 9
    assert linear_widths(quantised) == (7, 9)
    assert linear_widths(nn.LayerNorm(3)) is None
