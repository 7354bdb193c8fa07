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
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from weftlm.corpora.examples import examples_of
from weftlm.corpora.source import Source
from weftlm.errors import ExpertError
from weftlm.experts.adapted import unchanged
from weftlm.experts.config import GateConfig
from weftlm.experts.examples import domain_trainer
from weftlm.experts.expert import Gate, LoRAExpert, LoRAFactors
from weftlm.experts.lora import check_fits
from weftlm.experts.low_rank import LowRank, gate_values, placement
from weftlm.models.factory import count_parameters
from weftlm.training.config import NOT_DECIDING, TrainingConfig
from weftlm.training.metrics import read_metrics
from weftlm.training.runtime import Runtime, choose_runtime

log = logging.getLogger(__name__)


class GatedLinear(nn.Module):
    """A linear module with an adapter and its gate, in the form gates are trained in.

        y = W u + s B A (sigmoid(v . u) u)

    Args:
        base: the module: `nn.Linear`, transformers' `Conv1D`, or a quantised one.
        factors: its adapter; kept frozen, in the base's compute dtype, and out of `state_dict`.

    Attributes:
        base: the module, as it was.
        branch: the adapter.
        v: the gate vector, width of the module's input, float32, zero at first: every token gets half the adapter.
    """

    def __init__(self, base: nn.Module, factors: LoRAFactors) -> None:
        super().__init__()
        self.base = base
        self.branch = LowRank([factors], *placement(base))
        A_ERI = self.branch.A_ERI
        self.v = nn.Parameter(torch.zeros(A_ERI.shape[2], dtype=torch.float32, device=A_ERI.device))
        self.train(base.training)

    def __getattr__(self, name: str) -> Any:
        """What the base has: some models ask a linear module for its `weight.dtype` or `in_features`."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base"), name)

    def forward(self, u_XI: Tensor) -> Tensor:
        """y_XO for a module input with any leading axes."""
        return self.branch.add(self.base(u_XI), u_XI, gate_X=gate_values(u_XI, self.v))


def attach_gates(model: nn.Module, expert: LoRAExpert) -> dict[str, GatedLinear]:
    """Put an expert with untrained gates into a model, in place, and freeze everything but the gates.

    Any transformer will do, encoder-decoders too; `gated` is the form that cleans up after itself.

    Args:
        model: the base model; its parameters stop requiring gradients.
        expert: the adapter.
    Returns:
        The gated module by the name of the module it stands in for.
    Raises:
        ExpertError: the expert does not fit the model, or the model carries gates already.
    """
    if any(isinstance(module, GatedLinear) for module in model.modules()):
        raise ExpertError("the model carries gates already; call detach_gates(model) first")
    check_fits(expert, model)
    model.requires_grad_(False)
    gates = {}
    for name, factors in expert.modules.items():
        gates[name] = GatedLinear(model.get_submodule(name), factors)
        model.set_submodule(name, gates[name])
    return gates


def detach_gates(model: nn.Module) -> None:
    """Put the original modules back where `attach_gates` put gated ones; without gates it does nothing.

    The base's parameters stay frozen: `gated` also restores what required gradients before.
    """
    found = [(name, m) for name, m in model.named_modules(remove_duplicate=False) if isinstance(m, GatedLinear)]
    for name, module in found:
        model.set_submodule(name, module.base)


@contextmanager
def gated(model: nn.Module, expert: LoRAExpert) -> Iterator[dict[str, GatedLinear]]:
    """`attach_gates` for the length of a block; the model is then as it was, to the bit and to `requires_grad`.

    Raises:
        ExpertError: as `attach_gates`.
    """
    with unchanged(model):
        try:
            yield attach_gates(model, expert)
        finally:
            detach_gates(model)


def gate_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The gate vectors of a model with gates, by module name: what a loop of one's own trains.

    `train_gate` trains on next tokens or on examples. With any other loss a gate is trained so:

        with gated(model, expert):
            vectors = gate_parameters(model)
            optimizer = torch.optim.AdamW(vectors.values(), lr=5e-3, weight_decay=0.0)
            for batch in batches:                       # the expert's own data and loss
                model(**batch).loss.backward()
                torch.nn.utils.clip_grad_norm_(vectors.values(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
            gate = Gate(read_gates(model), facts={"steps": len(batches), "lr": 5e-3})
    """
    return {name: module.v for name, module in model.named_modules() if isinstance(module, GatedLinear)}


def read_gates(model: nn.Module) -> dict[str, Tensor]:
    """The gate vectors of a model with gates as a `Gate` holds them: v_I by module name, float32 copies on the CPU."""
    return {name: v_I.detach().to("cpu", torch.float32, copy=True) for name, v_I in gate_parameters(model).items()}


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
    last checkpoint, a finished one is read back. For losses of one's own see `gate_parameters`.

    Args:
        model: the base model, bare.
        expert: the adapter, from here or from anywhere.
        source: the training tokens of the expert, with its examples if there are any.
        config: what is the gate's own.
        folder: checkpoints and metrics.jsonl go there.
        seed: of the draw of sequences, and of the base's dropout if it has any.
        training: the expert's `training` section, for what `config` leaves out; absent: that section's defaults.
        runtime: device, precision and compilation; absent: chosen for this machine.
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
    check_fits(expert, model)
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
    if config.steps == 0:
        log.warning("the gate of %s takes no step: its vectors are zero", expert.name)
        zeros = {name: torch.zeros(factors.A_RI.shape[1]) for name, factors in expert.modules.items()}
        return Gate(zeros, facts)
    section = config.training(like)
    identity = fingerprint_of(
        "gate", training_choices(section), adapter_fingerprint(expert), source.fingerprint, seed, *how_read(source)
    )
    with gated(model, expert):
        _let_gradients_through_checkpointing(model)
        trainer = domain_trainer(
            model,
            expert.name,
            source,
            section,
            runtime=runtime or choose_runtime(section, parameters=count_parameters(model)),
            folder=folder,
            seed=seed,
            identity=identity,
        )
        result = trainer.run()
        vectors = read_gates(model)
    losses = [line["loss"] for line in read_metrics(folder / "metrics.jsonl") if line["kind"] == "train"]
    facts |= {
        "steps": result.step,
        "tokens": result.tokens,
        "first_loss": losses[0] if losses else None,
        "last_loss": losses[-1] if losses else None,
        "seconds": result.seconds["train"],
        "stopped_early": result.stopped_early,
    }
    return Gate(vectors, facts)


def _let_gradients_through_checkpointing(model: Any) -> None:
    """Reentrant gradient checkpointing passes gradients on only where a layer's input asks for one."""
    if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        model.enable_input_require_grads()


def training_choices(config: TrainingConfig) -> dict[str, Any]:
    """A `training` section as plain values, less what does not change the weights."""
    return {key: value for key, value in config.model_dump(mode="json").items() if key not in NOT_DECIDING}


def how_read(source: Source) -> list[str]:
    """What a fingerprint says of a source of examples beside its contents; nothing of plain text."""
    return [] if examples_of(source) is None else ["examples"]


def fingerprint_of(*values: Any) -> str:
    """Hash of JSON values: the identity a checkpoint is refused by."""
    return hashlib.blake2b(json.dumps(values, sort_keys=True).encode(), digest_size=16).hexdigest()


def adapter_fingerprint(expert: LoRAExpert) -> str:
    """Hash of an expert's factors and scales; the name does not enter."""
    total = hashlib.blake2b(digest_size=16)
    for name in sorted(expert.modules):
        factors = expert.modules[name]
        total.update(json.dumps([name, *factors.A_RI.shape, *factors.B_OR.shape, factors.scale]).encode())
        for tensor in (factors.A_RI, factors.B_OR):
            total.update(tensor.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
    return total.hexdigest()
