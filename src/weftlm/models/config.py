"""The `model` section of a recipe."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, PositiveInt, model_validator

from weftlm.config import Section


class LoRASection(Section):
    """Train low-rank adapters instead of every weight (PEFT LoRA).

    y = W x + (alpha / rank) B A x
    """

    rank: PositiveInt = Field(16, description="r, the rank of every adapter")
    alpha: PositiveInt = Field(16, description="scale numerator; the update is scaled by alpha / rank")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the adapter's input while training")
    target_modules: str | list[str] = Field(
        "all-linear",
        description="names of linear modules, a regular expression of whole names, or all-linear: every linear module "
        "but the output head; of a mixture-of-experts model attention and dense layers, not its fused experts",
    )


class ModelConfig(Section):
    """Which causal language model to train: from scratch by architecture, or from pretrained weights."""

    architecture: str | None = Field(None, description="a transformers model type: llama, gpt2, qwen2, ...")
    config: dict[str, Any] = Field(default_factory=dict, description="keys of that architecture's configuration")
    pretrained: str | None = Field(None, description="local folder or hub name of pretrained weights (safetensors)")
    revision: str | None = Field(None, description="hub revision of the pretrained weights")
    dtype: Literal["float32", "bfloat16", "float16"] = Field("float32", description="dtype the parameters are held in")
    lora: LoRASection | None = Field(None, description="train LoRA adapters only; absent trains every weight")
    gradient_checkpointing: bool = Field(False, description="recompute activations in the backward pass")

    @model_validator(mode="after")
    def _one_kind(self) -> ModelConfig:
        if (self.architecture is None) == (self.pretrained is None):
            raise ValueError("give exactly one of architecture (from scratch) and pretrained (a folder or hub name)")
        if self.pretrained is not None and self.config:
            raise ValueError("config belongs to architecture; a pretrained model brings its own")
        if self.lora is not None and self.pretrained is None:
            raise ValueError("lora adapts a pretrained model: give pretrained, or drop lora to train from scratch")
        if self.lora is None and self.dtype != "float32":
            raise ValueError("full training holds its weights in float32; use training.precision: bf16 for speed")
        return self
