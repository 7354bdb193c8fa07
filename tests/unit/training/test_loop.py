"""The training loop on a toy: three domains of which one is the target's."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from support import mixtures
from support.faults import stopped
from support.mixtures import VOCAB, lines_of, model

from weftlm.errors import CheckpointError, ConfigError, DataError, NumericsError
from weftlm.models.config import ModelConfig
from weftlm.models.factory import build_model
from weftlm.training.checkpoint import latest_checkpoint
from weftlm.training.loop import Trainer, TrainingResult, dump_tensors


def trainer(folder: Path, mixture: dict[str, Any], **changes: Any) -> Trainer:
    sizes = {"batch_sequences": 6, "steps": 16, "warmup_steps": 2, "save_every_steps": 5, "log_every_steps": 6}
    net = model(hidden_size=16) if changes.get("net") is None else changes.pop("net")
    return mixtures.trainer(folder, mixture, net=net, **{**sizes, **changes})


def run_all(run: Trainer) -> TrainingResult:
    result = run.run()
    assert result.step == run.config.total_steps
    return result


def assert_same_run(one: Trainer, two: Trainer, after: int = 0) -> None:
    """Weights of the same bits, and the same updates of the mixture after a step."""
    expected, found = one.module.state_dict(), two.module.state_dict()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert one.folder is not None
    assert two.folder is not None
    history = [[line for line in lines_of(run.folder, "mixture") if line["step"] > after] for run in (one, two)]
    assert history[0] == history[1]


EVERY_MIXTURE = [
    ({"policy": "uniform"}, {}),
    ({"policy": "dga"}, {}),
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
    while first.step < 12:  # checkpoints at 5 and 10: between two updates, and before one
        first.train_step()
        if first.step % 5 == 0:
            first.save()
    second = trainer(tmp_path / "split", mixture, alignment=alignment)
    assert second.step == 10
    run_all(second)
    assert_same_run(whole, second, after=10)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_is_asked_to_stop_keeps_its_last_step_and_ends_in_the_same_bits(
    tmp_path: Path, number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, stopping = (trainer(tmp_path / name, {"policy": "dga"}) for name in ("whole", "stopped"))
    run_all(whole)
    backward = stopping._backward

    def asked(*arguments: Any) -> Any:
        if stopping.step == 2:
            os.kill(os.getpid(), number)
        return backward(*arguments)

    monkeypatch.setattr(stopping, "_backward", asked)
    assert stopped(stopping.run).code == 128 + number
    kept = latest_checkpoint(tmp_path / "stopped" / "checkpoints")
    assert kept is not None
    assert kept.step == 3
    again = trainer(tmp_path / "stopped", {"policy": "dga"})
    run_all(again)
    assert_same_run(whole, again, after=-1)


@pytest.mark.parametrize(
    ("mixture", "training"),
    [
        ({"ema": 0.5}, {}),
        ({"ema": 0.5}, {"precision": "bf16"}),
        ({"precondition": "adam", "update_every_steps": 1}, {}),  # before the first step there is no second moment
    ],
)
def test_dga_finds_the_domain_of_the_target(tmp_path: Path, mixture: dict[str, Any], training: dict[str, Any]) -> None:
    result = run_all(trainer(tmp_path, {"policy": "dga", **mixture}, **{"steps": 24, **training}))
    assert result.weights["b"] == max(result.weights.values())
    assert result.weights["b"] > 0.4


def test_accumulation_changes_nothing_but_rounding(tmp_path: Path) -> None:
    whole = trainer(tmp_path / "whole", {"policy": "dga"})
    parts = trainer(tmp_path / "parts", {"policy": "dga"}, micro_batch_sequences=2)
    run_all(whole)
    run_all(parts)
    for name, tensor in whole.module.state_dict().items():
        assert torch.allclose(tensor, parts.module.state_dict()[name], atol=2e-4), name
    both = zip(lines_of(tmp_path / "whole", "mixture"), lines_of(tmp_path / "parts", "mixture"), strict=True)
    for left, right in both:
        assert left["weights"] == pytest.approx(right["weights"], abs=1e-4)


def test_dropout_is_a_function_of_the_step(tmp_path: Path) -> None:
    section = ModelConfig(architecture="gpt2", config={"n_embd": 16, "n_layer": 1, "n_head": 2, "resid_pdrop": 0.3})
    runs = []
    for name in ("one", "two"):
        net = build_model(section, vocab_size=VOCAB, sequence_length=17, eos_id=0, seed=0)
        runs.append(trainer(tmp_path / name, {"policy": "dga"}, net=net))
        run_all(runs[-1])
        torch.rand(7)  # the global generator's state must not matter
    assert runs[0].mixture.choice is not None
    assert runs[0].mixture.choice.probe == "extra", "probes leave dropout out, so they are apart from the training step"
    assert_same_run(*runs)


def test_exhaustion_ends_cleanly_and_keeps_a_checkpoint(tmp_path: Path) -> None:
    run = trainer(tmp_path, {"policy": "uniform"}, exhaustion="stop", max_epochs=0.1)
    result = run.run()
    assert result.stopped_early is not None
    assert 0 < result.step < 16
    checkpoint = latest_checkpoint(tmp_path / "checkpoints")
    assert checkpoint is not None
    assert checkpoint.step == result.step


def test_a_loss_that_is_not_finite_stops_before_it_is_applied(tmp_path: Path) -> None:
    run = trainer(tmp_path, {"policy": "uniform"})
    run.train_step()
    before = {name: each.clone() for name, each in dump_tensors(run.module, run.optimizer, run.parameters).items()}
    poisoned, parameter = next(iter(run.parameters.items()))
    with torch.no_grad():
        parameter.fill_(float("nan"))
    with pytest.raises(NumericsError, match="nothing was applied"):
        run.train_step()
    after = dump_tensors(run.module, run.optimizer, run.parameters)
    assert all(torch.equal(before[name], after[name]) for name in before if name != f"model.{poisoned}")


def test_what_does_not_fit_is_refused_before_training(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = trainer(tmp_path, {"policy": "uniform"})
    run.train_step()
    run.save()
    with pytest.raises(CheckpointError, match="another model"):
        trainer(tmp_path, {"policy": "uniform"}, net=model(hidden_size=16, tie_word_embeddings=False))
    with pytest.raises(CheckpointError, match="holds a run of another recipe"):
        trainer(tmp_path, {"policy": "uniform"}, options={"identity": "another"})
    with pytest.raises(ConfigError, match="cannot be used"):
        trainer(tmp_path / "a", {"policy": "dga"}, alignment={"estimator": "separate", "probe": "batch"})
    with pytest.raises(DataError, match="one training sequence"):
        trainer(tmp_path / "b", {"policy": "dga"}, length=900)
    trainer(tmp_path / "c", {"policy": "dga", "update_every_steps": 100}, warmup_steps=50)
    assert "updates every 100 steps and training takes 16" in caplog.text
    assert "peak learning rate is never reached" in caplog.text


def test_eta_means_the_same_under_every_estimator(tmp_path: Path) -> None:
    """`scale` divides by the training gradient's norm, whether or not an estimator also measures each group's."""
    found = []
    for estimator in ("separate", "shadow"):
        run = trainer(tmp_path / estimator, {"policy": "dga"}, alignment={"estimator": estimator, "probe": "extra"})
        while run.step < 4:
            run.train_step()
        found.append(run.task.policy.diagnostics(run.mixture.state)["max_exponent"])
    assert found[0] == pytest.approx(found[1], rel=1e-3)
