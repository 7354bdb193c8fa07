"""A plan names the estimator that training chooses, or refuses what it refuses, in every layout."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.ranks import Ranks
from torch import nn
from transformers import PreTrainedModel

from weftlm.corpora.source import ArraySource
from weftlm.errors import ConfigError
from weftlm.mixture.policy import MixtureSetting, build_policy
from weftlm.models.config import ModelConfig
from weftlm.models.factory import build_model
from weftlm.planning.counts import Counted
from weftlm.planning.hardware import parse_hardware
from weftlm.planning.training import Run
from weftlm.training.config import AlignmentConfig, TrainingConfig, estimators
from weftlm.training.loop import Task, Trainer
from weftlm.training.runtime import choose_runtime

SIZES = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2,
}  # fmt: skip
NAMES = ("a", "b", "c")
PROBES = ("auto", "batch", "extra")


def model() -> nn.Module:
    section = ModelConfig(architecture="llama", config=SIZES)
    return build_model(section, vocab_size=32, sequence_length=8, eos_id=0, seed=0)


def cases(layout: str) -> list[tuple[str, str, str, str]]:
    names = ("auto", *estimators)
    asked = [*itertools.product(names, PROBES, ("raw",)), *itertools.product(names, ("auto",), ("cosine",))]
    return [(layout, *case) for case in asked]


def settings(layout: str, estimator: str, probe: str, normalize: str) -> tuple[Any, ...]:
    """The sections of training and alignment, and the policy."""
    training = TrainingConfig(
        sequence_length=8, batch_sequences=24, micro_batch_sequences=12, steps=1, warmup_steps=0, device="cpu",
        threads=1, parallel="fsdp2" if layout == "fsdp2" else "ddp",
    )  # fmt: skip
    alignment = AlignmentConfig.model_validate({"estimator": estimator, "probe": probe})
    return training, alignment, build_policy({"policy": "dga", "update_every_steps": 1, "normalize": normalize})


def chosen(choose: Callable[[], Any]) -> list[str]:
    """Estimator and probe, or that there is none."""
    try:
        choice = choose()
    except ConfigError:
        return ["refused"]
    return [choice.estimator, choice.probe]


def trained(case: tuple[Any, ...]) -> list[str]:
    """What a trainer of this process chooses."""
    training, alignment, policy = settings(*case)
    source = ArraySource(np.zeros(2000, dtype=np.int64))
    setting = MixtureSetting(NAMES, torch.full((3,), 2000.0, dtype=torch.float64))
    task = Task(NAMES, (source,) * 3, policy, setting, source)
    runtime = choose_runtime(training, parameters=1000)

    def choose() -> Any:
        run = Trainer(
            model(), task, training, alignment=alignment, runtime=runtime, folder=None, seed=0, may_shard=True
        )
        return run.mixture.choice

    return chosen(choose)


def planned(case: tuple[Any, ...], devices: int) -> list[str]:
    """What a plan says it will choose."""
    training, alignment, policy = settings(*case)
    net = model()
    assert isinstance(net, PreTrainedModel)
    hardware = parse_hardware(f"{devices}xH100")
    run = Run(Counted(net.config), training, hardware, devices, policy, alignment, len(NAMES))

    def choose() -> Any:
        found = run.estimator
        return found and found[0]

    return chosen(choose)


def choose_everywhere(rank: int, world: int, folder: Path) -> list[list[str]]:
    return [trained(case) for layout in ("ddp", "fsdp2") for case in cases(layout)]


@pytest.mark.distributed
def test_a_plan_chooses_as_two_processes_do(ranks: Ranks, tmp_path: Path) -> None:
    found = ranks(__file__, "choose_everywhere", tmp_path)[0]
    asked = cases("ddp") + cases("fsdp2")
    assert dict(zip(asked, found, strict=True)) == {case: planned(case, 2) for case in asked}
    split = found[len(found) // 2 :]
    assert ["separate", "extra"] in split
    assert ["refused"] in split


def test_a_plan_chooses_as_one_process_does() -> None:
    found = {case: trained(case) for case in cases("single")}
    assert found == {case: planned(case, 1) for case in cases("single")}
    assert {name for name, *_ in found.values()} >= {"shadow", "separate", "refused"}
