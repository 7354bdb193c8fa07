"""Post-hoc gates: the formula, who learns, and a base that notices nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_expert import (
    DOWN,
    LENGTH,
    VOCAB,
    Fingerprint,
    Q,
    V,
    cyclic_source,
    llama,
    random_expert,
)
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from weftlm.errors import CheckpointError, DataError, ExpertError
from weftlm.experts.adapted import gated
from weftlm.experts.config import GateConfig
from weftlm.experts.expert import BaseReference, Gate, LoRAExpert, LoRAFactors
from weftlm.experts.train import train_gate
from weftlm.training.config import TrainingConfig
from weftlm.training.losses import BatchLoss

TRAINING = TrainingConfig(
    steps=1, sequence_length=LENGTH, batch_sequences=8, device="cpu", threads=1, save_every_steps=100
)


def train(model: nn.Module, folder: Path, **changes: Any) -> Gate:
    given: dict[str, Any] = {
        "source": cyclic_source(), "config": GateConfig(steps=8, lr=0.05), "folder": folder, "seed": 3,
        "training": TRAINING, **changes,
    }  # fmt: skip
    return train_gate(model, given.pop("expert", None) or random_expert(model), **given)


# -- the formula --------------------------------------------------------------------------------------------------


def one(base: nn.Module, A_RI: Tensor, B_OR: Tensor) -> tuple[nn.Module, LoRAExpert]:
    """A model of one linear module, and an expert of scale 0.25 over it."""
    model = nn.Module()
    model.m = base
    return model, LoRAExpert("e", BaseReference("b"), {"m": LoRAFactors(A_RI, B_OR, 0.25)}, {})


@pytest.mark.parametrize("base", [nn.Linear(6, 5), nn.Linear(6, 5, bias=False), Conv1D(5, 6)])
def test_a_gated_module_is_the_formula_and_a_zero_gate_half_the_branch(base: nn.Module) -> None:
    base = base.double()
    generator = torch.Generator().manual_seed(0)
    A, B = torch.randn(2, 6, generator=generator), torch.randn(5, 2, generator=generator)
    model, expert = one(base, A, B)
    u = torch.randn(3, 4, 6, dtype=torch.float64, generator=generator)
    plain = base(u)
    with gated(model, expert) as vectors:
        half = base(u)
        vectors["m"].data.normal_(generator=generator)
        y = base(u)
    update = 0.25 * u @ A.double().T @ B.double().T
    torch.testing.assert_close(half, plain + update / 2)
    g = 1.0 / (1.0 + torch.exp(-(u @ vectors["m"].double())))
    torch.testing.assert_close(y, plain + g[..., None] * update, rtol=1e-12, atol=1e-12)


def test_the_gate_is_computed_in_float32_around_bfloat16_and_quantised_weights() -> None:
    base = nn.Linear(512, 4).bfloat16()
    model, expert = one(base, torch.randn(2, 512), torch.randn(4, 2))
    with gated(model, expert) as vectors:
        vectors["m"].data.fill_(1e-3)
        u = torch.randn(3, 512).bfloat16()
        assert base(u).dtype == torch.bfloat16
        with torch.autocast("cpu", dtype=torch.bfloat16):
            base(u).float().sum().backward()
        assert vectors["m"].grad is not None
        assert vectors["m"].grad.dtype == vectors["m"].dtype == torch.float32
    base.weight = nn.Parameter(torch.zeros(4, 512, dtype=torch.int8), requires_grad=False)
    with gated(model, expert):
        assert base.gated_branch.A_ERI.dtype == torch.float32


@pytest.mark.parametrize("error", [False, True])
def test_only_the_vectors_get_gradients_and_the_model_is_left_as_it_was(error: bool) -> None:
    model = llama()
    model.lm_head.weight.requires_grad_(False)
    model.model.layers[1].train()
    before = Fingerprint(model)
    try:
        with gated(model, random_expert(model)) as vectors:
            model.train()
            tokens = torch.randint(VOCAB, (2, LENGTH))
            model(tokens, labels=tokens).loss.backward()
            assert set(vectors) == {Q, V, DOWN}
            trained = [parameter for parameter in model.parameters() if parameter.grad is not None]
            assert {id(each) for each in trained} == {id(v_I) for v_I in vectors.values()}
            if error:
                raise RuntimeError
    except RuntimeError:
        pass
    before.check(model)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's compiler uses parts of torch it deprecates
def test_compiled_training_runs_the_branches_of_every_expert_in_turn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self: compiled(self, backend="eager"))
    model = llama(num_hidden_layers=1)
    for target in (Q, "model.layers.0.mlp.down_proj"):
        plain, fast = (
            train(
                model, tmp_path / f"{target}-{compile}", expert=random_expert(model, {target: 2}),
                config=GateConfig(steps=1, lr=0.05), training=TRAINING.model_copy(update={"compile": compile}),
            )
            for compile in (False, True)
        )  # fmt: skip
        torch.testing.assert_close(fast.vectors[target], plain.vectors[target])
    torch.compiler.reset()


# -- training -----------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.*:FutureWarning")
def test_gradient_checkpointing_changes_nothing(tmp_path: Path) -> None:
    model = llama()
    plain = train(model, tmp_path / "plain")
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    before = Fingerprint(model)
    saving = train(model, tmp_path / "saving")
    before.check(model)
    for name, vector in plain.vectors.items():
        torch.testing.assert_close(saving.vectors[name], vector)


def test_the_gates_section_takes_the_rest_from_the_experts() -> None:
    like = TrainingConfig(
        steps=500, batch_sequences=12, sequence_length=20, weight_decay=0.3, schedule="cosine", lr=1.0,
        betas=(0.8, 0.9), clip_norm=0.5, precision="fp32",
    )  # fmt: skip
    section = GateConfig().training(like)
    assert (section.steps, section.lr, section.warmup_steps, section.schedule) == (100, 5e-3, 6, "constant")
    assert (section.weight_decay, section.clip_norm, section.betas) == (0.0, 0.5, (0.8, 0.9))
    assert (section.batch_sequences, section.sequence_length, section.precision) == (12, 20, "fp32")
    section = GateConfig(steps=50, batch_sequences=3, sequence_length=7).training(TrainingConfig(tokens=99))
    assert (section.total_steps, section.batch_sequences, section.sequence_length) == (50, 3, 7)


def test_it_is_adamw_on_the_formula_and_leaves_no_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand: no decay, warm-up, clipping, on the batches the loader draws."""
    model, source, batches = llama(), cyclic_source(), []
    model.model.embed_tokens.weight.requires_grad_(False)
    before, original = Fingerprint(model), BatchLoss.__call__

    def spy(self: BatchLoss, model: nn.Module, tokens: Tensor) -> Tensor:
        batches.append(tokens.clone())
        return original(self, model, tokens)

    monkeypatch.setattr(BatchLoss, "__call__", spy)
    gate = train(model, tmp_path, source=source, config=GateConfig(steps=6, lr=0.1))
    before.check(model)
    losses = []
    with gated(model, random_expert(model)) as vectors:
        model.train()
        optimizer = torch.optim.AdamW(vectors.values(), lr=0.1, weight_decay=0.0, betas=(0.9, 0.95), eps=1e-8)
        for tokens in batches:
            logits = model(tokens[:, :-1]).logits
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
            loss.backward()
            losses.append(loss.item())
            nn.utils.clip_grad_norm_(vectors.values(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    for name, vector in gate.vectors.items():
        torch.testing.assert_close(vector, vectors[name].detach(), rtol=1e-4, atol=1e-5)
    wanted = {"steps": 6, "lr": 0.1, "tokens": 6 * 8 * LENGTH, "data": source.fingerprint, "seed": 3}
    assert {key: gate.facts[key] for key in wanted} == wanted
    assert [gate.facts["first_loss"], gate.facts["last_loss"]] == pytest.approx([losses[0], losses[-1]], rel=1e-5)
    with pytest.raises(DataError, match="one training sequence"):
        train(model, tmp_path / "short", source=cyclic_source(LENGTH))
    with pytest.raises(ExpertError, match="another base"):
        train(model, tmp_path / "other", expert=random_expert(llama(hidden_size=16)))
    before.check(model)


def test_a_finished_gate_is_read_back_and_one_of_another_recipe_refused(tmp_path: Path) -> None:
    model = llama()
    whole, again = train(model, tmp_path), train(model, tmp_path)
    assert again.facts == whole.facts
    for name, vector in whole.vectors.items():
        assert torch.equal(again.vectors[name], vector)
    for change in (
        {"seed": 4}, {"config": GateConfig(steps=8, lr=0.04)}, {"source": cyclic_source(seed=9)},
        {"expert": random_expert(model, seed=5)},
    ):  # fmt: skip
        with pytest.raises(CheckpointError, match="another recipe"):
            train(model, tmp_path, **change)
