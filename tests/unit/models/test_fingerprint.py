"""One fingerprint per base: configuration and every value, whatever it is held in and wrapped by."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support import experts as tiny
from torch import nn

from weftlm.errors import ExpertError
from weftlm.models.factory import peft_warnings
from weftlm.models.fingerprint import base_fingerprint


@pytest.mark.parametrize(
    ("setting", "value"), [("rms_norm_eps", 0.1), ("num_attention_heads", 2), ("hidden_act", "gelu")]
)
def test_settings_that_change_logits_count_and_every_value(setting: str, value: object) -> None:
    model = tiny.llama()
    before = base_fingerprint(model)
    model.config.use_cache = False
    assert base_fingerprint(model) == before
    kept = getattr(model.config, setting)
    setattr(model.config, setting, value)
    assert base_fingerprint(model) != before
    setattr(model.config, setting, kept)
    with torch.no_grad():
        next(model.parameters()).view(-1)[-1].add_(0.5)
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
