"""One fingerprint per base: configuration and every value, whatever it is held in and wrapped by."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support import experts as tiny
from support import in_memory
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedModel

from weftlm.errors import ExpertError
from weftlm.models.factory import peft_warnings
from weftlm.models.fingerprint import base_fingerprint

V = "model.layers.1.self_attn.v_proj.weight"
MAKERS = [
    tiny.llama, tiny.gpt2, tiny.qwen2, tiny.t5, in_memory.mixture_of_experts, in_memory.without_keys,
    in_memory.long_rope, in_memory.sliding,
]  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", MAKERS)
def test_a_model_keeps_its_fingerprint_through_disk_and_dtypes(
    make: Callable[[], PreTrainedModel], tmp_path: Path
) -> None:
    model = make()
    own = base_fingerprint(model)
    model.save_pretrained(tmp_path)
    kind = AutoModelForSeq2SeqLM if model.config.is_encoder_decoder else AutoModelForCausalLM
    for dtype in (torch.float32, torch.bfloat16):
        assert base_fingerprint(kind.from_pretrained(tmp_path, dtype=dtype)) == own
    model.config.use_cache = False
    assert base_fingerprint(model) == own
    with torch.no_grad():
        next(model.parameters()).view(-1)[-1].add_(0.5)
    assert base_fingerprint(model) != own


@pytest.mark.parametrize(
    ("setting", "value"), [("rms_norm_eps", 0.1), ("num_attention_heads", 2), ("hidden_act", "gelu")]
)
def test_settings_that_change_logits_count(setting: str, value: object) -> None:
    model = tiny.llama()
    before = base_fingerprint(model)
    setattr(model.config, setting, value)
    assert base_fingerprint(model) != before


def test_persistent_buffers_count_and_others_do_not() -> None:
    layer = nn.Linear(2, 2)
    plain = base_fingerprint(layer)
    layer.register_buffer("scratch", torch.ones(2), persistent=False)
    assert base_fingerprint(layer) == plain
    layer.register_buffer("bias_correction", torch.ones(2))
    assert base_fingerprint(layer) != plain


def test_adapters_and_their_wrappers_do_not_count() -> None:
    own = base_fingerprint(tiny.llama())
    for settings in ({}, {"modules_to_save": ["lm_head"]}):
        with peft_warnings():
            adapted = get_peft_model(tiny.llama(), LoraConfig(r=2, target_modules=["q_proj"], **settings))
        assert base_fingerprint(adapted) == own
        assert base_fingerprint(adapted.get_base_model()) == own


def test_a_model_without_values_is_refused() -> None:
    with pytest.raises(ExpertError, match="meta device"):
        base_fingerprint(nn.Linear(2, 2, device="meta"))
