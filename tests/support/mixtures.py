"""Three domains of noisy cycles, a target like one of them, and trainers of ours and of transformers on them."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import TrainingArguments

from weftlm.corpora.source import ArraySource
from weftlm.integrations.hf_trainer import OnlineMixture
from weftlm.mixture.policy import MixtureSetting, build_policy
from weftlm.models.config import ModelConfig
from weftlm.models.factory import build_model
from weftlm.training.config import AlignmentConfig, TrainingConfig
from weftlm.training.loop import Task, Trainer
from weftlm.training.runtime import choose_runtime

VOCAB, LENGTH, STEPS, BATCH, SEED = 64, 16, 12, 8, 5
NAMES = ("a", "b", "c")
PROBES = {"target_sequences": 8, "sequences_per_group": 2}


@contextmanager
def light_collections() -> Iterator[None]:
    """Spare the collections of garbage a trainer begins with what was there before: a second each otherwise."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def source(low: int, seed: int, tokens: int = 4000) -> ArraySource:
    """A noisy cycle through 20 tokens of its own."""
    rng = np.random.default_rng(seed)
    cycle = low + (np.arange(tokens) * 3) % 20
    return ArraySource(np.where(rng.random(tokens) < 0.8, cycle, rng.integers(low, low + 20, tokens)))


SOURCES = {name: source(20 * index, seed=index) for index, name in enumerate(NAMES)}
TARGET = source(20, seed=9, tokens=600)


def model(*, seed: int = 0, vocab_size: int = VOCAB) -> Any:
    sizes = {
        "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 2,
    }  # fmt: skip
    section = ModelConfig(architecture="llama", config=sizes)
    return build_model(section, vocab_size=vocab_size, sequence_length=LENGTH + 1, eos_id=0, seed=seed)


def arguments(folder: Path, **changes: Any) -> dict[str, Any]:
    """Arguments of a trainer that does what `train_with_weftlm` does, and says nothing."""
    return {
        "output_dir": str(folder), "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2,
        "max_steps": STEPS, "learning_rate": 1e-2, "lr_scheduler_type": "constant", "adam_beta2": 0.95,
        "weight_decay": 0.1, "max_grad_norm": 0.5, "use_cpu": True, "report_to": [], "logging_steps": 5,
        "disable_tqdm": True, "save_strategy": "no", **changes,
    }  # fmt: skip


def quiet(folder: Path, **changes: Any) -> TrainingArguments:
    return TrainingArguments(**arguments(folder, **changes))


def online(policy: Mapping[str, Any], **changes: Any) -> OnlineMixture:
    """The mixture, for any trainer."""
    reference = model(seed=1) if policy["policy"] == "doremi" else None
    options = {"target": TARGET, "sequence_length": LENGTH, "seed": SEED, "alignment": PROBES, "reference": reference}
    return OnlineMixture.of(SOURCES, {"update_every_steps": 4, **policy}, **{**options, **changes})


def train_with_weftlm(folder: Path, policy: Mapping[str, Any]) -> tuple[Any, list[dict[str, Any]]]:
    """The trained model and the updates of its mixture, from weftlm's own loop."""
    config = TrainingConfig.model_validate(
        {
            "sequence_length": LENGTH, "batch_sequences": BATCH, "micro_batch_sequences": 4, "steps": STEPS,
            "lr": 1e-2, "warmup_steps": 0, "schedule": "constant", "clip_norm": 0.5, "device": "cpu", "threads": 1,
        }
    )  # fmt: skip
    built = build_policy({"update_every_steps": 4, **policy})
    setting = MixtureSetting(NAMES, torch.tensor([4000.0] * 3, dtype=torch.float64))
    reference = model(seed=1) if "reference_losses" in built.needs else None
    own = Trainer(
        model(),
        Task(NAMES, tuple(SOURCES.values()), built, setting, TARGET, reference),
        config,
        alignment=AlignmentConfig.model_validate({**PROBES, "probe": "extra"}),
        runtime=choose_runtime(config, parameters=1000),
        folder=folder,
        seed=SEED,
    )
    own.run()
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    updates = [line for line in lines if line["kind"] == "mixture" and line["step"]]
    return own.module, [
        {
            "step": line["step"],
            **{f"mixture/{name}": weight for name, weight in line["weights"].items()},
            **{f"mixture/alignment/{name}": dot for name, dot in line.get("alignment", {}).items()},
        }
        for line in updates
    ]


def updates_of(trainer: Any) -> list[dict[str, Any]]:
    """The updates of the mixture, from a trainer's log."""
    return [entry for entry in trainer.state.log_history if "mixture/a" in entry and "loss" not in entry]
