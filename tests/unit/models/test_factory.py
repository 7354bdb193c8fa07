"""Models from scratch, from weights, with adapters; and losses against their definition."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from weftlm.config import validate
from weftlm.errors import ConfigError
from weftlm.experts.lora import load_trained
from weftlm.models.config import ModelConfig
from weftlm.models.factory import build_model, count_parameters
from weftlm.models.hf import sequence_losses, token_losses

TINY = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}


def build(vocab_size: int = 32, sequence_length: int = 8, **section: Any) -> torch.nn.Module:
    config = validate(ModelConfig, section, "model")
    return build_model(config, vocab_size=vocab_size, sequence_length=sequence_length, eos_id=0, seed=0)


def test_losses_are_negative_log_probabilities_of_the_next_token() -> None:
    model = build(architecture="llama", config=TINY)
    tokens = torch.randint(0, 32, (3, 9))
    logp = torch.log_softmax(model(input_ids=tokens[:, :-1]).logits, dim=-1)
    expected = -logp.gather(-1, tokens[:, 1:, None]).squeeze(-1)
    assert torch.allclose(token_losses(model, tokens), expected, atol=1e-5)
    assert torch.allclose(sequence_losses(model, tokens), expected.mean(1), atol=1e-5)


def test_pretrained_weights_and_adapters_go_round(tmp_path: Path) -> None:
    base = build(architecture="llama", config=TINY)
    base.save_pretrained(tmp_path / "base")  # type: ignore[operator]
    again = build(pretrained=str(tmp_path / "base"))
    tokens = torch.randint(0, 32, (2, 9))
    assert torch.equal(sequence_losses(base, tokens), sequence_losses(again, tokens))

    adapted = build(pretrained=str(tmp_path / "base"), lora={"rank": 2, "alpha": 4})
    trainable = count_parameters(adapted, trainable=True)
    assert 0 < trainable < count_parameters(adapted) / 2
    assert torch.equal(sequence_losses(adapted, tokens), sequence_losses(base, tokens)), (
        "a fresh adapter changes nothing"
    )
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.1)
    adapted.save_pretrained(str(tmp_path / "adapter"))  # type: ignore[operator]
    loaded = load_trained(tmp_path / "adapter")
    assert torch.allclose(sequence_losses(loaded, tokens), sequence_losses(adapted, tokens))
    assert not torch.allclose(sequence_losses(loaded, tokens), sequence_losses(base, tokens))


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({}, "exactly one of architecture"),
        ({"architecture": "llama", "pretrained": "x"}, "exactly one of architecture"),
        ({"pretrained": "x", "config": {"hidden_size": 2}}, "config belongs to architecture"),
        ({"architecture": "llama", "lora": {}}, "lora adapts a pretrained model"),
        ({"architecture": "llama", "dtype": "bfloat16"}, "full training holds its weights in float32"),
        ({"architecture": "lama"}, "no transformers model type"),
        ({"architecture": "llama", "config": {"hiden_size": 2}}, "did you mean 'hidden_size'"),
        ({"pretrained": "/nonexistent/model"}, "there is no folder"),
        ({"architecture": "t5"}, "is an encoder-decoder; try llama"),
        (
            {"architecture": "llama", "config": {"num_attention_heads": 16, "num_key_value_heads": 12}},
            "16 attention heads over 12 heads of keys and values",
        ),
        ({"architecture": "gpt2", "config": {"n_embd": 130}}, "makes no gpt2 language model"),
    ],
)
def test_what_cannot_be_built_says_why(section: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(**section)


def test_a_model_too_small_for_the_tokenizer_or_the_sequence_is_refused(tmp_path: Path) -> None:
    build(architecture="llama", config=TINY).save_pretrained(tmp_path / "base")  # type: ignore[operator]
    with pytest.raises(ConfigError, match="32 token embeddings and the tokenizer gives 33"):
        build(pretrained=str(tmp_path / "base"), vocab_size=33)
    with pytest.raises(ConfigError, match="takes at most 1024 positions"):
        build(pretrained=str(tmp_path / "base"), sequence_length=2000)
