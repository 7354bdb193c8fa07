"""The training loop on a toy: three domains of which one is the target's."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.faults import stopped

from weftlm.corpora.source import ArraySource
from weftlm.errors import CheckpointError, ConfigError, DataError, NumericsError
from weftlm.mixture.policy import MixtureSetting, build_policy
from weftlm.models.config import ModelConfig
from weftlm.models.factory import build_model
from weftlm.training.checkpoint import latest_checkpoint
from weftlm.training.config import AlignmentConfig, TrainingConfig
from weftlm.training.loop import Task, Trainer, TrainingResult, dump_tensors
from weftlm.training.runtime import choose_runtime

VOCAB, LENGTH = 64, 16
NAMES = ("a", "b", "c")


def source(low: int, seed: int, tokens: int = 4000) -> ArraySource:
    """A noisy cycle through 20 tokens of its own."""
    rng = np.random.default_rng(seed)
    cycle = low + (np.arange(tokens) * 3) % 20
    return ArraySource(np.where(rng.random(tokens) < 0.8, cycle, rng.integers(low, low + 20, tokens)))


def model(**config: Any) -> torch.nn.Module:
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
    }
    section = ModelConfig(architecture="llama", config={**sizes, **config})
    return build_model(section, vocab_size=VOCAB, sequence_length=LENGTH, eos_id=0, seed=0)


def trainer(
    folder: Path,
    mixture: Mapping[str, Any],
    *,
    alignment: Mapping[str, Any] | None = None,
    net: torch.nn.Module | None = None,
    **training: Any,
) -> Trainer:
    sources = tuple(source(20 * i, seed=i) for i in range(3))
    setting = MixtureSetting(
        domains=NAMES,
        tokens_D=torch.tensor([4000.0] * 3, dtype=torch.float64),
        target_histogram_D=torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64),
        basis_ND=torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.5, 0.5]], dtype=torch.float64),
    )
    values = {
        "sequence_length": LENGTH, "batch_sequences": 6, "steps": 24, "lr": 1e-2, "warmup_steps": 2,
        "save_every_steps": 7, "log_every_steps": 6, "device": "cpu", "threads": 1, **training,
    }  # fmt: skip
    config = TrainingConfig.model_validate(values)
    policy = build_policy({"update_every_steps": 4, **mixture})
    reference = model() if "reference_losses" in policy.needs else None
    return Trainer(
        net if net is not None else model(),
        Task(NAMES, sources, policy, setting, source(20, seed=9, tokens=600), reference),
        config,
        alignment=AlignmentConfig.model_validate(
            {"target_sequences": 8, "sequences_per_group": 2, **(alignment or {})}
        ),
        runtime=choose_runtime(config, parameters=1000),
        folder=folder,
        seed=5,
        identity="toy",
    )


def weights_of(run: Trainer) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in run.module.state_dict().items()}


def history(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == "mixture"]


def run_all(run: Trainer) -> TrainingResult:
    result = run.run()
    assert result.step == 24
    return result


EVERY_MIXTURE = [
    ({"policy": "uniform"}, {}),
    ({"policy": "dga"}, {}),
    ({"policy": "dga"}, {"estimator": "separate"}),
    ({"policy": "dga"}, {"estimator": "shadow", "probe": "extra"}),
    ({"policy": "dga", "normalize": "cosine"}, {}),
    ({"policy": "dga", "precondition": "adam"}, {}),
    ({"policy": "dga", "reweight": "basis"}, {}),
    ({"policy": "doge"}, {}),
    ({"policy": "doremi"}, {}),
    ({"policy": "group_dro"}, {}),
    ({"policy": "odm"}, {}),
]


@pytest.mark.parametrize(("mixture", "alignment"), EVERY_MIXTURE)
def test_stopped_and_continued_equals_uninterrupted(
    tmp_path: Path, mixture: dict[str, Any], alignment: dict[str, Any]
) -> None:
    whole = trainer(tmp_path / "whole", mixture, alignment=alignment)
    run_all(whole)

    first = trainer(tmp_path / "split", mixture, alignment=alignment)
    while first.step < 16:  # checkpoints at 7 and 14: between two updates, and after one
        first.train_step()
        if first.step % 7 == 0:
            first.save()
    second = trainer(tmp_path / "split", mixture, alignment=alignment)
    assert second.step == 14
    run_all(second)

    expected, found = weights_of(whole), weights_of(second)
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert [line for line in history(tmp_path / "split") if line["step"] > 14] == [
        line for line in history(tmp_path / "whole") if line["step"] > 14
    ]


def test_dga_finds_the_domain_of_the_target(tmp_path: Path) -> None:
    result = run_all(trainer(tmp_path, {"policy": "dga", "ema": 0.5}))
    assert result.weights["b"] == max(result.weights.values())
    assert result.weights["b"] > 0.5


def test_accumulation_changes_nothing_but_rounding(tmp_path: Path) -> None:
    whole = trainer(tmp_path / "whole", {"policy": "dga"})
    parts = trainer(tmp_path / "parts", {"policy": "dga"}, micro_batch_sequences=2)
    run_all(whole)
    run_all(parts)
    for name, tensor in weights_of(whole).items():
        assert torch.allclose(tensor, weights_of(parts)[name], atol=2e-4), name
    for left, right in zip(history(tmp_path / "whole"), history(tmp_path / "parts"), strict=True):
        assert left["weights"] == pytest.approx(right["weights"], abs=1e-4)


def test_a_probed_step_trains_exactly_as_it_would_without_the_probe(tmp_path: Path) -> None:
    """The shadow term leaves the gradients of its own step alone, bit for bit."""
    plain, probed = (
        trainer(tmp_path / name, {"policy": "dga", "update_every_steps": 1}) for name in ("plain", "probed")
    )
    batch = plain.mixture.loader.next(min_per_domain=1)
    plain._backward(batch)
    probed.mixture.begin_step(probed.optimizer)
    probed._backward(batch)
    for name, parameter in plain.parameters.items():
        assert parameter.grad is not None
        assert torch.equal(parameter.grad, probed.parameters[name].grad), name


def test_dropout_is_a_function_of_the_step(tmp_path: Path) -> None:
    section = ModelConfig(architecture="gpt2", config={"n_embd": 16, "n_layer": 1, "n_head": 2, "resid_pdrop": 0.3})

    def net() -> torch.nn.Module:
        return build_model(section, vocab_size=VOCAB, sequence_length=LENGTH, eos_id=0, seed=0)

    first = trainer(tmp_path / "one", {"policy": "dga"}, net=net())
    assert first.mixture.choice is not None
    assert first.mixture.choice.probe == "extra", (
        "probes leave dropout out, so they are taken apart from the training step"
    )
    run_all(first)
    torch.rand(7)  # the global generator's state must not matter
    second = trainer(tmp_path / "two", {"policy": "dga"}, net=net())
    run_all(second)
    assert all(torch.equal(value, weights_of(second)[name]) for name, value in weights_of(first).items())


def test_exhaustion_ends_cleanly_and_keeps_a_checkpoint(tmp_path: Path) -> None:
    run = trainer(tmp_path, {"policy": "uniform"}, exhaustion="stop", max_epochs=0.1)
    result = run.run()
    assert result.stopped_early is not None
    assert 0 < result.step < 24
    checkpoint = latest_checkpoint(tmp_path / "checkpoints")
    assert checkpoint is not None
    assert checkpoint.step == result.step


def test_a_loss_that_is_not_finite_stops_before_it_is_applied(tmp_path: Path) -> None:
    run = trainer(tmp_path, {"policy": "uniform"})
    for _ in range(3):
        run.train_step()
    before = dump_tensors(run.module, run.optimizer, run.parameters)
    before = {name: tensor.clone() for name, tensor in before.items()}
    with torch.no_grad():
        next(iter(run.parameters.values())).fill_(float("nan"))
    poisoned = next(iter(run.parameters))
    with pytest.raises(NumericsError, match="nothing was applied"):
        run.train_step()
    after = dump_tensors(run.module, run.optimizer, run.parameters)
    assert all(torch.equal(before[name], after[name]) for name in before if name != f"model.{poisoned}")


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    run = trainer(tmp_path, {"policy": "uniform"})
    run.train_step()
    run.save()
    with pytest.raises(CheckpointError, match="another model"):
        trainer(tmp_path, {"policy": "uniform"}, net=model(tie_word_embeddings=False))


def test_what_does_not_fit_is_refused_before_training(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be used"):
        trainer(tmp_path, {"policy": "dga"}, alignment={"estimator": "separate", "probe": "batch"})
    with pytest.raises(DataError, match="one training sequence"):
        trainer(tmp_path, {"policy": "dga"}, sequence_length=900)


def test_what_can_never_happen_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer(tmp_path, {"policy": "dga", "update_every_steps": 100}, warmup_steps=50)
    assert "updates every 100 steps and training takes 24" in caplog.text
    assert "peak learning rate is never reached" in caplog.text


def test_adam_preconditioning_starts_with_the_plain_direction(tmp_path: Path) -> None:
    """Before the first optimizer step there is no second moment to divide by."""
    result = run_all(trainer(tmp_path, {"policy": "dga", "precondition": "adam", "update_every_steps": 1}))
    assert result.weights["b"] == max(result.weights.values())


def test_eta_means_the_same_under_every_estimator(tmp_path: Path) -> None:
    """`scale` divides by the training gradient's norm, whether or not an estimator also measures each group's."""
    found = {}
    for estimator in ("separate", "shadow"):
        run = trainer(tmp_path / estimator, {"policy": "dga"}, alignment={"estimator": estimator, "probe": "extra"})
        while run.step < 4:
            run.train_step()
        found[estimator] = run.task.policy.diagnostics(run.mixture.state)["max_exponent"]
    assert found["separate"] == pytest.approx(found["shadow"], rel=1e-3)


def test_bf16_autocast_trains_and_aligns(tmp_path: Path) -> None:
    result = run_all(trainer(tmp_path, {"policy": "dga", "ema": 0.5}, precision="bf16"))
    assert result.weights["b"] == max(result.weights.values())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_is_asked_to_stop_keeps_its_last_step_and_ends_in_the_same_bits(
    tmp_path: Path, number: signal.Signals
) -> None:
    whole = trainer(tmp_path / "whole", {"policy": "dga"})
    run_all(whole)
    stopping = trainer(tmp_path / "stopped", {"policy": "dga"})
    backward = stopping._backward

    def asked(*arguments: Any) -> Any:
        if stopping.step == 2:
            os.kill(os.getpid(), number)
        return backward(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stopping, "_backward", asked)
        assert stopped(stopping.run).code == 128 + number
    kept = latest_checkpoint(tmp_path / "stopped" / "checkpoints")
    assert kept is not None
    assert kept.step == 3
    again = trainer(tmp_path / "stopped", {"policy": "dga"})
    run_all(again)
    assert all(tensor.equal(weights_of(again)[name]) for name, tensor in weights_of(whole).items())
    assert history(tmp_path / "stopped") == history(tmp_path / "whole")
