"""Learning-rate schedules against their closed forms."""

from __future__ import annotations

import math

import pytest

from weftlm.config import validate
from weftlm.errors import ConfigError
from weftlm.training.config import TrainingConfig, learning_rate


def test_warmup_is_linear_and_ends_at_the_peak() -> None:
    config = TrainingConfig(steps=100, warmup_steps=10, lr=1.0)
    assert [learning_rate(config, step) for step in range(10)] == pytest.approx([(i + 1) / 10 for i in range(10)])


def test_cosine_ends_at_its_fraction() -> None:
    config = TrainingConfig(steps=110, warmup_steps=10, lr=2.0, final_lr_fraction=0.1)
    assert learning_rate(config, 10) == pytest.approx(2.0)
    assert learning_rate(config, 60) == pytest.approx(2.0 * (0.1 + 0.9 * 0.5))
    assert learning_rate(config, 110) == pytest.approx(0.2)
    assert learning_rate(config, 35) == pytest.approx(2.0 * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 4))))


def test_wsd_is_flat_and_then_linear() -> None:
    config = TrainingConfig(
        steps=100, warmup_steps=0, lr=1.0, schedule="wsd", decay_fraction=0.2, final_lr_fraction=0.0
    )
    assert {learning_rate(config, step) for step in range(80)} == {1.0}
    assert learning_rate(config, 90) == pytest.approx(0.5)
    assert learning_rate(config, 99) == pytest.approx(0.05)


def test_constant_stays() -> None:
    config = TrainingConfig(steps=100, warmup_steps=0, schedule="constant", lr=0.5)
    assert {learning_rate(config, step) for step in range(100)} == {0.5}


def test_tokens_become_steps_rounded_up() -> None:
    assert TrainingConfig(tokens=1000, batch_sequences=3, sequence_length=100).total_steps == 4


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({}, "exactly one of steps and tokens"),
        ({"steps": 1, "tokens": 1}, "exactly one of steps and tokens"),
        ({"steps": 1, "max_epochs": 2}, "set exhaustion to drop or stop"),
        ({"steps": 1, "learning_rate": 1}, "unknown key"),
        ({"steps": 0}, "steps: must be "),
        ({"steps": 1, "betas": [1.5, 0.9]}, "betas.*must be "),
    ],
)
def test_contradictions_are_refused(value: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        validate(TrainingConfig, value, "training")


def test_how_processes_share_a_model_decides_nothing() -> None:
    assert TrainingConfig(steps=1, parallel="fsdp2").deciding() == TrainingConfig(steps=1).deciding()
    with pytest.raises(ConfigError, match="parallel"):
        validate(TrainingConfig, {"steps": 1, "parallel": "fsdp1"}, "training")
