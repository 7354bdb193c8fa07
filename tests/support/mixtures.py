"""Three domains of noisy cycles, a target like one of them, and trainers of ours and of transformers on them."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from support.tiny_expert import cyclic_source
from transformers import TrainingArguments

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


SOURCES = {name: cyclic_source(4000, low=20 * index, seed=index) for index, name in enumerate(NAMES)}
TARGET = cyclic_source(600, low=20, seed=9)


def model(*, seed: int = 0, vocab_size: int = VOCAB, **config: Any) -> Any:
    sizes = {
        "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 2, **config,
    }  # fmt: skip
    section = ModelConfig(architecture="llama", config=sizes)
    return build_model(section, vocab_size=vocab_size, sequence_length=LENGTH + 1, eos_id=0, seed=seed)


def trainer(
    folder: Path,
    mixture: Mapping[str, Any],
    *,
    alignment: Mapping[str, Any] | None = None,
    net: torch.nn.Module | None = None,
    reference: Callable[[], torch.nn.Module] = lambda: model(seed=1),
    length: int = LENGTH,
    options: Mapping[str, Any] | None = None,
    **training: Any,
) -> Trainer:
    """Our own trainer on the three domains.

    Args:
        alignment: keys of the `alignment` section beside `PROBES`.
        net: model to train.
        reference: makes the reference model, where the policy asks for one.
        length: T.
        options: further arguments of `Trainer`.
        training: keys of the `training` section.
    """
    values = {"sequence_length": length, "lr": 1e-2, "device": "cpu", "threads": 1, **training}
    config = TrainingConfig.model_validate(values)
    policy = build_policy({"update_every_steps": 4, **mixture})
    setting = MixtureSetting(
        NAMES,
        tokens_D=torch.tensor([4000.0] * 3, dtype=torch.float64),
        target_histogram_D=torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64),
        basis_ND=torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.5, 0.5]], dtype=torch.float64),
    )
    given = reference() if "reference_losses" in policy.needs else None
    return Trainer(
        model() if net is None else net,
        Task(NAMES, tuple(SOURCES.values()), policy, setting, TARGET, given),
        config,
        alignment=AlignmentConfig.model_validate({**PROBES, **(alignment or {})}),
        runtime=choose_runtime(config, parameters=1000),
        folder=folder,
        seed=SEED,
        **(options or {}),
    )


def lines_of(folder: Path, kind: str = "") -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl, or those of one kind."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if kind in ("", line["kind"])]


def train_with_weftlm(folder: Path, policy: Mapping[str, Any]) -> tuple[Any, list[dict[str, Any]]]:
    """The trained model and the updates of its mixture, from weftlm's own loop."""
    own = trainer(
        folder, policy, alignment={"probe": "extra"}, batch_sequences=BATCH, micro_batch_sequences=4, steps=STEPS,
        warmup_steps=0, schedule="constant", clip_norm=0.5,
    )  # fmt: skip
    own.run()
    return own.module, [
        {
            "step": line["step"],
            **{f"mixture/{name}": weight for name, weight in line["weights"].items()},
            **{f"mixture/alignment/{name}": dot for name, dot in line.get("alignment", {}).items()},
        }
        for line in lines_of(folder, "mixture")
        if line["step"]
    ]


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


def updates_of(trainer: Any) -> list[dict[str, Any]]:
    """The updates of the mixture, from a trainer's log."""
    return [entry for entry in trainer.state.log_history if "mixture/a" in entry and "loss" not in entry]
