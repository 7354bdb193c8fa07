"""Learning-rate schedules against their closed forms."""

from __future__ import annotations

import math
from typing import Any

import pytest

from weftlm.config import validate
from weftlm.errors import ConfigError
from weftlm.training.config import TrainingConfig, learning_rate

WSD = {"schedule": "wsd", "decay_fraction": 0.2, "final_lr_fraction": 0.0}


@pytest.mark.parametrize(
    ("keys", "rates"),
    [
        ({"warmup_steps": 10}, {step: (step + 1) / 10 for step in range(10)}),
        ({"warmup_steps": 10}, {10: 1.0, 60: 0.55, 110: 0.1, 35: 0.1 + 0.45 * (1 + math.cos(math.pi / 4))}),
        (WSD, {0: 1.0, 87: 1.0, 99: 0.5, 109: 1 / 22}),
        ({"schedule": "constant"}, dict.fromkeys(range(110), 1.0)),
    ],
)
def test_schedules_follow_their_formulas(keys: dict[str, Any], rates: dict[int, float]) -> None:
    config = TrainingConfig(**{"steps": 110, "warmup_steps": 0, "lr": 2.0, "final_lr_fraction": 0.1, **keys})
    assert {step: learning_rate(config, step) / 2 for step in rates} == pytest.approx(rates)


def test_tokens_become_steps_rounded_up_and_how_processes_share_a_model_decides_nothing() -> None:
    assert TrainingConfig(tokens=1000, batch_sequences=3, sequence_length=100).total_steps == 4
    assert TrainingConfig(steps=1, parallel="fsdp2").deciding() == TrainingConfig(steps=1).deciding()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({}, "exactly one of steps and tokens"),
        ({"steps": 1, "tokens": 1}, "exactly one of steps and tokens"),
        ({"steps": 1, "max_epochs": 2}, "set exhaustion to drop or stop"),
        ({"steps": 1, "learning_rate": 1}, "unknown key"),
        ({"steps": 0}, "steps: must be "),
        ({"steps": 1, "betas": [1.5, 0.9]}, "betas.*must be "),
        ({"steps": 1, "parallel": "fsdp1"}, "parallel"),
    ],
)
def test_contradictions_are_refused(value: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        validate(TrainingConfig, value, "training")
