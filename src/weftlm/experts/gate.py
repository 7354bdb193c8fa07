"""Post-hoc gates: what a router must know of an expert, learnt on the expert's own data alone.

Muqeeth, Liu, Liu and Raffel 2024, "Learning to Route Among Specialized Experts for Zero-Shot Generalization",
arXiv:2402.05859. Base model and adapter are frozen; one vector per adapted module learns, token by token, how much of
the adapter its data wants:

    g_t = sigmoid(v . u_t)          y_t = W u_t + s B A (g_t u_t)

The gate scales the adapter's branch and nothing else. At inference the sigmoid is gone: routers compare the vectors.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from weftlm.config import settings
from weftlm.corpora.examples import examples_of
from weftlm.corpora.source import Source
from weftlm.experts.adapted import add_branch, eager, unchanged
from weftlm.experts.config import GateConfig
from weftlm.experts.examples import domain_trainer
from weftlm.experts.expert import Gate, LoRAExpert, plain
from weftlm.experts.lora import check_fits
from weftlm.experts.low_rank import LowRank, placement
from weftlm.models.factory import count_parameters
from weftlm.training.config import NOT_DECIDING, TrainingConfig
from weftlm.training.metrics import read_metrics
from weftlm.training.runtime import Runtime, choose_runtime

log = logging.getLogger(__name__)


@contextmanager
def gated(model: nn.Module, expert: LoRAExpert) -> Iterator[dict[str, nn.Parameter]]:
    """Run a model with an expert and its untrained gates: what `train_gate`, or a loop of one's own, trains.

        y = W u + s B A (sigmoid(v . u) u)          v = 0 at first: every token gets half the adapter

    Everything but the gates is frozen meanwhile, and a model compiled in place runs uncompiled; afterwards the model is
    as it was, to the bit and to `requires_grad`. `train_gate` trains on next tokens or on examples. With any
    other loss a gate is trained so:

        with gated(model, expert) as vectors:
            optimizer = torch.optim.AdamW(vectors.values(), lr=5e-3, weight_decay=0.0)
            for batch in batches:                       # the expert's own data and loss
                model(**batch).loss.backward()
                torch.nn.utils.clip_grad_norm_(vectors.values(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
            gate = Gate({name: plain(v_I) for name, v_I in vectors.items()}, facts={"steps": len(batches), "lr": 5e-3})

    Args:
        model: A transformer, encoder-decoders too.
        expert: The adapter.
    Returns:
        The gate vectors by module name, float32 parameters of the model.
    Raises:
        ExpertError: the expert does not fit the model.
    """
    check_fits(expert, model)
    with unchanged(model), eager(model):
        model.requires_grad_(False)
        vectors = {}
        for name, factors in expert.modules.items():
            module = model.get_submodule(name)
            branch = LowRank([factors], *placement(module))
            zeros_I = torch.zeros(factors.A_RI.shape[1], dtype=torch.float32, device=branch.A_ERI.device)
            branch.gate_v = vectors[name] = nn.Parameter(zeros_I)
            module.add_module("gated_branch", branch)  # moves with the model
            module.register_forward_hook(partial(add_branch, branch, vectors[name]), with_kwargs=True)
        yield vectors


def train_gate(
    model: nn.Module,
    expert: LoRAExpert,
    source: Source,
    config: GateConfig,
    *,
    folder: Path,
    seed: int,
    training: TrainingConfig | None = None,
    runtime: Runtime | None = None,
) -> Gate:
    """Train the gate of an expert on windows of text, or on whole examples where the source holds them.

    Windows need a causal language model, examples may have an encoder-decoder as well (`ExampleLoss`). The model is
    left exactly as it was: modules, weights, modes, devices and `requires_grad`. A killed training continues from its
    last checkpoint, a finished one is read back. For losses of one's own see `gated`.

    Args:
        model: Base model, bare.
        expert: Adapter, trained here or imported.
        source: Training tokens of the expert, with its examples if there are any.
        config: Settings of the gate.
        folder: Folder for checkpoints and metrics.jsonl.
        seed: Random seed of the draw of sequences, and of the base's dropout if it has any.
        training: The expert's `training` section, for what `config` leaves out; absent: that section's defaults.
        runtime: Device, precision and compilation; absent: chosen for this machine.
    Returns:
        The gate; facts: steps, lr, batch_sequences, sequence_length, tokens, data (the source's fingerprint), seed,
        first_loss and last_loss (nats per token, of the first and last batch), seconds, stopped_early.
    Raises:
        ExpertError: the expert does not fit the model.
        CheckpointError: the folder holds a gate of another expert, other data, another seed or other settings.
        DataError: the source is too short for one sequence.
        NumericsError: the loss or the gradient is not finite.
    """
    like = training or TrainingConfig(steps=1)
    facts: dict[str, Any] = {
        "steps": 0,
        "lr": config.lr,
        "batch_sequences": config.batch_sequences or like.batch_sequences,
        "sequence_length": config.sequence_length or like.sequence_length,
        "tokens": 0,
        "data": source.fingerprint,
        "seed": seed,
        "first_loss": None,
        "last_loss": None,
        "seconds": 0.0,
        "stopped_early": None,
    }
    with gated(model, expert) as vectors:
        if config.steps == 0:
            log.warning("the gate of %s takes no step: its vectors are zero", expert.name)
            return Gate({name: plain(v_I) for name, v_I in vectors.items()}, facts)
        section = config.training(like)
        identity = {
            "adapter": adapter_fingerprint(expert),
            "data": data_identity(source),
            "seed": seed,
            "settings": settings(section, without=NOT_DECIDING),
        }
        _let_gradients_through_checkpointing(model)
        runtime = runtime or choose_runtime(section, parameters=count_parameters(model))
        if runtime.compile:
            torch.compiler.reset()  # code compiled before is taken for modules that have a hook now
        trainer = domain_trainer(
            model,
            expert.name,
            source,
            section,
            runtime=runtime,
            folder=folder,
            seed=seed,
            identity=identity,
        )
        result = trainer.run()
        trained = {name: plain(v_I) for name, v_I in vectors.items()}
    losses = [line["loss"] for line in read_metrics(folder / "metrics.jsonl") if line["kind"] == "train"]
    facts |= {
        "steps": result.step,
        "tokens": result.tokens,
        "first_loss": losses[0] if losses else None,
        "last_loss": losses[-1] if losses else None,
        "seconds": result.seconds["train"],
        "stopped_early": result.stopped_early,
    }
    return Gate(trained, facts)


def _let_gradients_through_checkpointing(model: Any) -> None:
    """Reentrant gradient checkpointing passes gradients on only where a layer's input asks for one."""
    if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        model.enable_input_require_grads()


def data_identity(source: Source) -> list[str]:
    """What identifies a source of training text: its contents, and whether whole examples are read of it."""
    return [source.fingerprint, *([] if examples_of(source) is None else ["examples"])]


def adapter_fingerprint(expert: LoRAExpert) -> str:
    """Hash of an expert's factors and scales; the name does not enter."""
    total = hashlib.blake2b(digest_size=16)
    for name in sorted(expert.modules):
        factors = expert.modules[name]
        total.update(json.dumps([name, *factors.A_RI.shape, *factors.B_OR.shape, factors.scale]).encode())
        for tensor in (factors.A_RI, factors.B_OR):
            total.update(plain(tensor).numpy().tobytes())
    return total.hexdigest()
