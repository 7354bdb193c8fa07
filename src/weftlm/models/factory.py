"""From a recipe's `model` section to a Hugging Face causal language model."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoConfig, PretrainedConfig, set_seed
from transformers.pytorch_utils import Conv1D

from weftlm.errors import ConfigError, did_you_mean, reason
from weftlm.models.config import LoRASection, ModelConfig
from weftlm.models.lora_targets import lora_targets
from weftlm.models.open import check_vocabulary, config_at_hand, from_architecture, load_base, require_decoder_only

_SMALL_LLAMA = {
    "hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 4, "tie_word_embeddings": True,
}  # fmt: skip
SMALL: dict[str, dict[str, Any]] = {
    "llama": _SMALL_LLAMA,
    "qwen2": _SMALL_LLAMA,
    "gpt2": {"n_embd": 128, "n_layer": 4, "n_head": 4},
}
"""Sizes used where the recipe names an architecture and leaves its sizes out; sized for a laptop."""

_ANY_VOCABULARY = 512
"""A vocabulary size where the vocabulary is not known yet and does not matter."""


def build_model(config: ModelConfig, *, vocab_size: int, sequence_length: int, eos_id: int, seed: int) -> nn.Module:
    """Build (or load) the model a recipe asks for.

    Args:
        config: The `model` section.
        vocab_size: Number of ids the tokenizer can give.
        sequence_length: Longest sequence the model must take.
        eos_id: End-of-document id, stored in the configuration.
        seed: Random seed of the initial weights.
    Raises:
        ConfigError: unknown architecture or key, or a model too small for the tokenizer or the sequence length.
    """
    set_seed(seed)
    if config.pretrained is not None:
        model: Any = load_base(config.pretrained, revision=config.revision, dtype=config.dtype)
        require_decoder_only(model, config.pretrained)
        check_vocabulary(model, vocab_size, config.pretrained)
    else:
        assert config.architecture is not None
        model = from_architecture(
            architecture_config(config, vocab_size=vocab_size, sequence_length=sequence_length, eos_id=eos_id)
        )
    check_positions(model.config, sequence_length, "training.sequence_length", "the model")
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if config.lora is not None:
            model.enable_input_require_grads()
    built: nn.Module = model if config.lora is None else with_lora(model, config.lora, revision=config.revision)
    return built


def with_lora(model: Any, section: LoRASection, *, revision: str | None = None) -> PeftModel:
    """Put an untrained PEFT adapter into a model.

    Args:
        model: Bare model, decoder-only or encoder-decoder.
        section: Rank, scale, dropout and target modules.
        revision: Hub revision of the model, recorded in the adapter's configuration.
    Raises:
        ConfigError: as `lora_targets`.
    """
    config = LoraConfig(
        r=section.rank,
        lora_alpha=section.alpha,
        lora_dropout=section.dropout,
        target_modules=(targets := lora_targets(model, section.target_modules)),
        fan_in_fan_out=any(isinstance(model.get_submodule(name), Conv1D) for name in targets),
        task_type="SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM",
    )
    with peft_warnings():
        adapted: PeftModel = get_peft_model(model, config, revision=revision)
    return adapted


def architecture_config(config: ModelConfig, *, vocab_size: int, sequence_length: int, eos_id: int) -> PretrainedConfig:
    """The `transformers` configuration of a model trained from scratch.

    Raises:
        ConfigError: no such architecture, or a key it does not have.
    """
    name = str(config.architecture)
    try:
        default = AutoConfig.for_model(name)
    except ValueError:
        raise ConfigError(
            f"model.architecture {name!r} is no transformers model type; try llama, gpt2 or qwen2"
        ) from None
    known = set(default.to_dict()) | set(default.attribute_map)
    for key in config.config:
        if key not in known:
            raise ConfigError(f"model.config.{key}: unknown key of {name}{did_you_mean(key, known)}")
    asked = {default.attribute_map.get(key, key): value for key, value in config.config.items()}
    small = {default.attribute_map.get(key, key): value for key, value in SMALL.get(name, {}).items()}
    positions = default.attribute_map.get("max_position_embeddings", "max_position_embeddings")
    sizes = {positions: max(sequence_length, 1024), "pad_token_id": None, **small, **asked}
    sizes |= {"vocab_size": vocab_size, "bos_token_id": eos_id, "eos_token_id": eos_id}
    try:
        built: PretrainedConfig = AutoConfig.for_model(name, **sizes)
    except (ValueError, TypeError, StrictDataclassError) as error:
        raise ConfigError(f"model.config does not make a {name}: {reason(error)}") from error
    if built.is_encoder_decoder:
        raise ConfigError(f"model.architecture {name!r} is an encoder-decoder; try llama, gpt2 or qwen2")
    if why := uneven_heads(built):
        raise ConfigError(f"model.config has {why}")
    return built


def config_to_be(model: ModelConfig, *, sequence_length: int) -> PretrainedConfig | None:
    """The configuration of a recipe's model before there is a tokenizer; None where it is not on this machine."""
    if model.pretrained is not None:
        return config_at_hand(model.pretrained, model.revision)
    return architecture_config(model, vocab_size=_ANY_VOCABULARY, sequence_length=sequence_length, eos_id=0)


def check_positions(config: PretrainedConfig | None, length: int, key: str, whose: str) -> None:
    """Refuse sequences longer than a model's positions; nothing is known of a configuration that is None.

    Raises:
        ConfigError: they are.
    """
    longest = getattr(config, "max_position_embeddings", None)
    if isinstance(longest, int) and 0 < longest < length:
        raise ConfigError(f"{key} is {length}; {whose} takes at most {longest} positions")


def uneven_heads(config: PretrainedConfig) -> str | None:
    """What is wrong with a configuration's attention heads, for a message; None where they fit.

    `transformers` builds such a model all the same, and fails at its first token.
    """
    heads, shared = (getattr(config, name, None) for name in ("num_attention_heads", "num_key_value_heads"))
    if isinstance(heads, int) and isinstance(shared, int) and (shared < 1 or heads % shared):
        return (
            f"{heads} attention heads over {shared} heads of keys and values; num_attention_heads must be a multiple "
            "of num_key_value_heads"
        )
    return None


@contextmanager
def peft_warnings() -> Iterator[None]:
    """Keep back what PEFT says of an attribute that transformers renamed, and of tied weights, which weftlm unties."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`", category=FutureWarning)
        warnings.filterwarnings("ignore", message=r"Model has `tie_word_embeddings=True`", category=UserWarning)
        yield


def count_parameters(model: nn.Module, *, trainable: bool = False) -> int:
    """Number of parameters, tied ones once."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not trainable)
