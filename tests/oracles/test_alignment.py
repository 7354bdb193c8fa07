"""Every estimator against one backward pass per sequence, written down here in the plainest way."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from weftlm.models.hf import sequence_losses
from weftlm.training.alignment import Probe, ShadowProbe, estimators, gradient_direction, precondition

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # from peft

VOCABULARY, LENGTH = 48, 11
SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
GPT2_SIZES = {"vocab_size": VOCABULARY, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 32}
SILENT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": None, "eos_token_id": None}


class OwnGPT(nn.Module):
    """A model in a style of its own: positions as a flat index, a bare gain parameter, one block used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, 16, padding_idx=3)
        self.positions = nn.Embedding(32, 16)
        self.block = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16, bias=False), nn.LayerNorm(16))
        self.gain = Gain()
        self.head = nn.Linear(16, VOCABULARY)
        self.head.weight = self.tokens.weight

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.tokens(input_ids) + self.positions(torch.arange(input_ids.shape[1]))
        x = x + self.block(x)
        x = x + self.gain(self.block(x).cumsum(1))
        return self.head(x)


class Gain(nn.Module):
    """Owns a parameter and uses it nonlinearly: nothing an estimator could know beforehand."""

    def __init__(self) -> None:
        super().__init__()
        self.logit = nn.Parameter(torch.linspace(-1, 1, 16))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.logit) * self.logit.exp()


def losses_of(model: nn.Module, tokens_BT1: Tensor) -> Tensor:
    if not isinstance(model, OwnGPT):
        return sequence_losses(model, tokens_BT1)
    logits, labels = model(tokens_BT1[:, :-1]), tokens_BT1[:, 1:]
    return nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none").mean(1)


def each(name: str, model: nn.Module, losses: Any, tokens_BT1: Tensor, v: Any, micro_batch: int | None = None) -> Any:
    """What an estimator measures where every sequence is a group of its own."""
    groups_B = torch.arange(len(tokens_BT1))
    return estimators[name]().measure(Probe(model, losses, tokens_BT1, groups_B, len(groups_B), v, micro_batch))


def lora() -> nn.Module:
    base = LlamaForCausalLM(LlamaConfig(**SIZES))
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zero at the start, and then half of the gradient is zero too
            nn.init.normal_(parameter, std=0.1)
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama tied": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True)),
    "llama untied": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=False)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**GPT2_SIZES, **SILENT)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES)),
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**SIZES, head_dim=4, pad_token_id=0)),
    "lora": lora,
    "own": OwnGPT,
}


@cache
def model_of(name: str, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(7)
    model = MODELS[name]().to(dtype)
    if dtype == torch.float64:
        use_true_float64(model)
    for parameter in model.parameters():  # away from special values such as unit gains and zero biases
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model.train()


def use_true_float64(model: nn.Module) -> None:
    """Replace the norms of transformers that compute in float32 whatever the model's type."""
    for parent in list(model.modules()):
        for name, module in list(parent.named_children()):
            if hasattr(module, "variance_epsilon"):
                exact = nn.RMSNorm(len(module.weight), eps=module.variance_epsilon).double()
                exact.weight.data.copy_(module.weight.data)
                exact.requires_grad_(module.weight.requires_grad)
                setattr(parent, name, exact)


def draw(rows: int, seed: int) -> Tensor:
    return torch.randint(0, VOCABULARY, (rows, LENGTH + 1), generator=torch.Generator().manual_seed(seed))


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def plain_gradient(model: nn.Module, tokens_BT1: Tensor) -> dict[str, Tensor]:
    """The gradient of the mean loss by `backward`, the way a training loop takes it."""
    model.zero_grad(set_to_none=True)
    losses_of(model, tokens_BT1).mean().backward()
    gradient = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in trainable(model).items()}
    model.zero_grad(set_to_none=True)
    return {name: part.double() for name, part in gradient.items()}


def inner(left: dict[str, Tensor], right: dict[str, Tensor]) -> float:
    return sum(float((left[name].double() * right[name].double()).sum()) for name in left)


def oracle(model: nn.Module, tokens_BT1: Tensor, v: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """<g_b, v> and the scale ||g_b|| ||v|| that errors are judged by, sequence by sequence."""
    dots, scales = [], []
    for row in range(len(tokens_BT1)):
        gradient = plain_gradient(model, tokens_BT1[row : row + 1])
        dots.append(inner(gradient, v))
        scales.append((inner(gradient, gradient) * inner(v, v)) ** 0.5)
    return torch.tensor(dots, dtype=torch.float64), torch.tensor(scales, dtype=torch.float64)


def shadow_step(model: nn.Module, tokens_BT1: Tensor, v: dict[str, Tensor], weights_B: Tensor, micro: int) -> Tensor:
    """A training step in micro-batches with the probe on; leaves its gradient in `.grad`."""
    model.zero_grad(set_to_none=True)
    dots = []
    with ShadowProbe(model, v) as probe:
        for tokens, weights in zip(tokens_BT1.split(micro), weights_B.split(micro), strict=True):
            probe.begin(len(tokens))
            (weights / len(tokens_BT1) * losses_of(model, tokens)).sum().backward()
            dots.append(probe.dots(weights / len(tokens_BT1)))
    return torch.cat(dots)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("name", MODELS)
@settings(max_examples=6, deadline=None, phases=[Phase.explicit, Phase.generate])
@given(rows=st.integers(1, 5), micro=st.integers(1, 5), seed=st.integers(0, 2**20))
def test_estimators_give_each_sequences_derivative(
    name: str, dtype: torch.dtype, rows: int, micro: int, seed: int
) -> None:
    model, tokens = model_of(name, dtype), draw(rows, seed)
    v = gradient_direction(model, losses_of, draw(3, seed + 1), micro_batch=2)
    expected, scale = oracle(model, tokens, v)
    weights = 0.5 + torch.rand(rows, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)
    bound = 1e-5 if dtype == torch.float32 else 1e-7 if name == "gemma2" else 1e-10  # gemma2's norms stay float32
    separate = each("separate", model, losses_of, tokens, v)
    found = {
        "separate": separate.dots_G,
        "shadow on the batch": shadow_step(model, tokens, v, weights, micro),
        "shadow alone": each("shadow", model, losses_of, tokens, v, micro).dots_G,
    }
    for estimator, dots in found.items():
        error = ((dots.double() - expected).abs() / scale).max()
        assert error <= bound, f"{estimator}: {error:.2e} of ||g|| ||v||"


@pytest.mark.parametrize("name", MODELS)
def test_direction_is_the_gradient_of_the_mean_loss(name: str) -> None:
    model, tokens = model_of(name, torch.float64), draw(5, 11)
    v = gradient_direction(model, losses_of, tokens, micro_batch=2)
    expected = plain_gradient(model, tokens)
    assert v.keys() == expected.keys()
    for key, part in v.items():
        assert (part - expected[key]).norm() <= (1e-6 if name == "gemma2" else 1e-10) * expected[key].norm(), key


@pytest.mark.parametrize("name", MODELS)
def test_probed_step_is_the_plain_step_bit_for_bit(name: str) -> None:
    model, tokens, weights = model_of(name, torch.float32), draw(4, 5), torch.tensor([0.3, 1.7, 1.0, 1.0])
    v = gradient_direction(model, losses_of, draw(2, 6))
    model.zero_grad(set_to_none=True)
    plain_losses = losses_of(model, tokens)
    (weights / 4 * plain_losses).sum().backward()
    plain = {key: p.grad.clone() for key, p in trainable(model).items() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    with ShadowProbe(model, v) as probe:
        probe.begin(4)
        losses = losses_of(model, tokens)
        (weights / 4 * losses).sum().backward()
        probe.dots(weights / 4)
    assert torch.equal(losses, plain_losses)
    for key, part in plain.items():
        assert torch.equal(trainable(model)[key].grad, part), key


@settings(max_examples=15, deadline=None)
@given(groups=st.lists(st.integers(0, 3), min_size=1, max_size=8), seed=st.integers(0, 2**20))
def test_groups_of_any_composition(groups: list[int], seed: int) -> None:
    model, tokens, groups_B = model_of("llama tied", torch.float32), draw(len(groups), seed), torch.tensor(groups)
    v = gradient_direction(model, losses_of, draw(3, seed + 1))
    gradients = {g: plain_gradient(model, tokens[groups_B == g]) for g in set(groups)}
    length = inner(v, v) ** 0.5
    for estimator in ("separate", "shadow"):
        found = estimators[estimator]().measure(Probe(model, losses_of, tokens, groups_B, 4, v, micro_batch=3))
        assert found.counts_G.tolist() == [groups.count(g) for g in range(4)]
        assert found.direction_norm == pytest.approx(length, rel=1e-6)
        for g in range(4):
            if g not in gradients:
                assert found.dots_G[g].isnan()
                continue
            norm = inner(gradients[g], gradients[g]) ** 0.5
            assert float(found.dots_G[g]) == pytest.approx(inner(gradients[g], v), abs=1e-5 * norm * length)
            if found.norms_G is not None:
                assert float(found.norms_G[g]) == pytest.approx(norm, rel=1e-5)
    assert found.norms_G is None


def test_dropout_is_off_in_probes_and_untouched_in_training() -> None:
    torch.manual_seed(1)
    model = GPT2LMHeadModel(GPT2Config(**GPT2_SIZES, bos_token_id=None, eos_token_id=None)).train()
    assert model.config.resid_pdrop > 0
    tokens = draw(4, 41)
    v = gradient_direction(model, losses_of, draw(3, 42))
    assert model.training
    assert all(module.training for module in model.modules())
    model.eval()
    expected, scale = oracle(model, tokens, v)
    clean = gradient_direction(model, losses_of, draw(3, 42))
    model.train()
    assert all(torch.equal(v[key], clean[key]) for key in v)
    for dots in (
        each("shadow", model, losses_of, tokens, v).dots_G,
        each("separate", model, losses_of, tokens, v).dots_G,
    ):
        assert ((dots.double() - expected).abs() / scale).max() <= 1e-5
    gradients = []
    for probed in (False, True):
        model.zero_grad(set_to_none=True)
        torch.manual_seed(5)
        if probed:
            shadow_step(model, tokens, v, torch.ones(4), micro=2)
        else:
            for micro in tokens.split(2):
                (0.25 * losses_of(model, micro)).sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(plain, probed) for plain, probed in zip(*gradients, strict=True))


@pytest.mark.parametrize("name", ["llama tied", "gpt2", "qwen2"])
def test_bfloat16_autocast(name: str) -> None:
    """Against separate passes under the same autocast: 1e-2 of ||g|| ||v||."""
    model, tokens, ones = model_of(name, torch.float32), draw(5, 51), torch.ones(5)
    with torch.autocast("cpu", torch.bfloat16):
        v = gradient_direction(model, losses_of, draw(3, 52))
        exact = each("separate", model, losses_of, tokens, v)
        plain_gradients = {}
        model.zero_grad(set_to_none=True)
        losses_of(model, tokens).mul(ones / 5).sum().backward()
        plain_gradients = {key: p.grad.clone() for key, p in trainable(model).items()}
        found = {"shadow": shadow_step(model, tokens, v, ones, micro=5)}
        assert all(torch.equal(p.grad, plain_gradients[key]) for key, p in trainable(model).items())
        assert exact.norms_G is not None
    assert all(part.dtype == torch.float32 for part in v.values())
    scale = exact.norms_G * exact.direction_norm
    for estimator, dots in found.items():
        error = ((dots.double() - exact.dots_G).abs() / scale).max()
        assert error <= 1e-2, f"{estimator}: {error:.2e}"


def test_activation_checkpointing() -> None:
    torch.manual_seed(2)
    model = LlamaForCausalLM(LlamaConfig(**SIZES)).train()
    tokens = draw(4, 61)
    v = gradient_direction(model, losses_of, draw(3, 62))
    expected, scale = oracle(model, tokens, v)
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable()
    dots = shadow_step(model, tokens, v, torch.ones(4), micro=2)
    assert ((dots.double() - expected).abs() / scale).max() <= 1e-5


@pytest.mark.parametrize("amsgrad", [False, True])
def test_precondition_follows_adamw(amsgrad: bool) -> None:
    torch.manual_seed(3)
    model = LlamaForCausalLM(LlamaConfig(**SIZES)).double()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.97), eps=1e-6, amsgrad=amsgrad)
    history = []
    for step in range(4):
        optimizer.zero_grad()
        losses_of(model, draw(3, 80 + step)).mean().backward()
        history.append({key: p.grad.clone() for key, p in trainable(model).items()})
        optimizer.step()
    v = gradient_direction(model, losses_of, draw(3, 90))
    kept = {key: part.clone() for key, part in v.items()}
    scaled = precondition(v, optimizer, trainable(model))
    for key, part in v.items():
        second, largest = torch.zeros_like(part), torch.zeros_like(part)
        for gradient in history:
            second = 0.97 * second + 0.03 * gradient[key] ** 2
            largest = torch.maximum(largest, second)
        estimate = (largest if amsgrad else second) / (1 - 0.97**4)
        assert torch.allclose(scaled[key], part / (estimate.sqrt() + 1e-6), rtol=1e-9)
        assert torch.equal(part, kept[key])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's compiler uses parts of torch it deprecates
def test_a_compiled_model_runs_eagerly_while_it_is_probed() -> None:
    torch.manual_seed(4)
    torch.compiler.reset()
    model = LlamaForCausalLM(LlamaConfig(**{**SIZES, "num_hidden_layers": 1}, tie_word_embeddings=True))
    tokens = draw(4, 101)
    v = gradient_direction(model, losses_of, draw(3, 102))
    exact, scale = oracle(model, tokens, v)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")  # inductor's C++ takes minutes
    losses_of(compiled, tokens).mean().backward()
    dots = shadow_step(compiled, tokens, v, torch.ones(4), micro=4)
    assert ((dots.double() - exact).abs() / scale).max() <= 1e-5
    torch.compiler.reset()
