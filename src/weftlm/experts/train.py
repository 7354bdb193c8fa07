"""One domain in, one expert out: adapter, gate, statistics and a card.

The adapter is trained by the ordinary loop on a single domain, the one that did best on held-out text is kept, and the
base model comes back as it was, so that the next expert may be trained on it at once.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from weftlm import __version__
from weftlm.config import settings
from weftlm.corpora.examples import examples_of
from weftlm.corpora.source import Source
from weftlm.errors import ConfigError, ExpertError, NumericsError
from weftlm.evaluation.config import EvaluationConfig
from weftlm.evaluation.result import finite_or_none
from weftlm.evaluation.suite import evaluate_suite
from weftlm.experts.adapted import gated, unchanged
from weftlm.experts.config import AdapterConfig, ExpertTraining, GateConfig
from weftlm.experts.examples import domain_trainer, training_source
from weftlm.experts.expert import BaseReference, Expert, Gate, LoRAExpert, Statistics, plain
from weftlm.experts.library import check_name
from weftlm.experts.lora import adapter_fingerprint, from_peft_model
from weftlm.experts.statistics import collect_statistics
from weftlm.models.factory import count_parameters, with_lora
from weftlm.models.fingerprint import base_fingerprint
from weftlm.models.prompted import is_encoder_decoder
from weftlm.training.config import TrainingConfig
from weftlm.training.metrics import read_metrics
from weftlm.training.runtime import Runtime, choose_runtime

log = logging.getLogger(__name__)

ADAPTER, GATE = "adapter", "gate"

_LOSSES = ("nats_per_token", "bits_per_byte", "scored_tokens")


def train_expert(
    model: nn.Module,
    base: BaseReference,
    source: Source,
    config: ExpertTraining,
    *,
    name: str,
    folder: Path,
    seed: int,
    heldout: Source | None = None,
    about: Mapping[str, Any] | None = None,
    runtime: Runtime | None = None,
) -> Expert:
    """Train an adapter on a domain, then its gate, and collect the domain's statistics.

    Where there is held-out text and `validate_every_steps`, the adapter of the best step is kept. Afterwards the model
    is what it was, to the bit: PEFT and gates are gone. A killed run continues from its last checkpoint; a finished one
    gives the same expert again without training.

    Args:
        model: Bare base: a causal language model, or an encoder-decoder where the source holds examples.
        base: Reference to the base in the expert; a missing fingerprint is computed.
        source: Training tokens of the domain; with prompts and targets, whole examples are trained on (see
            `ExampleLoss`), as `config.examples` says.
        config: Settings of adapter, gate and statistics.
        name: Name of the expert.
        folder: Folder for checkpoints and metrics, in `adapter/` and `gate/`.
        seed: Random seed of the first values and of every draw.
        heldout: Held-out tokens of the domain; without them the last adapter is kept and the card has no losses.
        about: JSON values for the card: where the text came from, its licence, how the domain was found.
        runtime: Device, precision and compilation; absent: chosen for this machine.
    Returns:
        The expert. card: name, base, data, heldout, settings, seed, adapter (steps, kept_step, tokens, epochs, seconds,
        stopped_early), losses (before and after on held-out text: nats_per_token, and bits_per_byte where the source
        knows its bytes), gate, statistics, about, weftlm.
    Raises:
        ConfigError: a target module that does not exist, or examples are wanted of a source of plain text.
        DataError: a source is too short, or its ids are not the model's.
        ExpertError: the name is not allowed, the model carries adapters already, or the adapter diverged.
        CheckpointError: the folder holds another recipe's training, or cannot be written.
        NumericsError: a loss or a gradient is not finite.
    """
    check_name(name)
    source = training_source(source, name, config.examples)
    heldout = None if heldout is None else training_source(heldout, name, config.examples)
    if is_encoder_decoder(model) and examples_of(source) is None:
        raise ConfigError(
            f"expert {name!r}: an encoder-decoder model learns from examples; give its corpora a prompt_field "
            f"(data.corpora), and leave experts.examples out"
        )
    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise ExpertError(f"expert {name!r}: the model carries PEFT adapters already; load the base without them")
    if base.fingerprint is None:
        base = replace(base, fingerprint=base_fingerprint(model))
    if runtime is None:
        runtime = choose_runtime(config.training, parameters=count_parameters(model))
    selecting = bool(heldout is not None and config.validate_every_steps)
    identity = {
        "base": [base.name, base.revision, base.fingerprint],
        "data": data_identity(source),
        "heldout": None
        if heldout is None
        else [heldout.fingerprint, config.validate_every_steps, config.validation_tokens],
        "lora": settings(config.lora),
        "seed": seed,
        "training": config.training.deciding(),
    }
    with unchanged(model):
        model.to(runtime.device)
        peft_model = _untrained(model, config.lora, base, seed)

        def validate(module: nn.Module) -> dict[str, Any]:
            assert heldout is not None
            return held_out_losses(module, heldout, config, runtime.device)

        trainer = domain_trainer(
            peft_model,
            name,
            source,
            config.training,
            runtime=runtime,
            folder=folder / ADAPTER,
            seed=seed,
            evaluate=None if heldout is None else validate,
            evaluate_every_steps=0 if heldout is None else config.validate_every_steps or config.training.total_steps,
            keep_best="nats_per_token" if selecting else None,
            identity=identity,
        )
        result = trainer.run()
        losses, kept_step = None, result.step
        if heldout is not None:
            lines = [line for line in read_metrics(folder / ADAPTER / "metrics.jsonl") if line["kind"] == "eval"]
            found = {line["step"]: {key: line[key] for key in _LOSSES} for line in lines}
            if selecting:
                kept_step = trainer.restore_best()
            length = config.training.sequence_length
            losses = {"before": found.get(0), "after": found[kept_step], "sequence_length": length}
            log.info("expert %s: kept the adapter of step %d of %d", name, kept_step, result.step)
        lora = from_peft_model(peft_model, name, base=base)
    gate, statistics = describe(model, lora, source, config, folder=folder / GATE, seed=seed, runtime=runtime)
    card = {
        "name": name,
        "base": asdict(base),
        "data": _described(source),
        "heldout": None if heldout is None else _described(heldout),
        "settings": config.model_dump(mode="json"),
        "seed": seed,
        "adapter": {
            "steps": result.step,
            "kept_step": kept_step,
            "tokens": result.tokens,
            "epochs": result.epochs[name],
            "seconds": {part: result.seconds[part] for part in ("train", "eval")},
            "stopped_early": result.stopped_early,
        },
        "losses": losses,
        "gate": None if gate is None else dict(gate.facts),
        "statistics": None if statistics is None else dict(statistics.facts),
        "about": dict(about or {}),
        "weftlm": __version__,
    }
    return Expert(lora, gate, statistics, card)


def describe(
    model: nn.Module,
    lora: LoRAExpert,
    source: Source,
    config: ExpertTraining,
    *,
    folder: Path,
    seed: int,
    runtime: Runtime,
) -> tuple[Gate | None, Statistics | None]:
    """An adapter's gate and statistics, as far as `config` asks for them; the model is left as it was.

    Args:
        model, source, config, seed, runtime: As for `train_expert`.
        lora: The adapter, trained here or imported.
        folder: Folder for checkpoints and metrics of the gate.
    Raises:
        WeftError: as `train_gate` and `collect_statistics`.
    """
    gate: Gate | None = None
    statistics: Statistics | None = None
    with unchanged(model):
        model.to(runtime.device)
        if config.gate.steps:
            gate = train_gate(
                model, lora, source, config.gate,
                folder=folder, seed=seed, training=config.training, runtime=runtime,
            )  # fmt: skip
        if config.statistics_examples:
            statistics = collect_statistics(
                model, lora, source,
                examples=config.statistics_examples, sequence_length=config.training.sequence_length, seed=seed,
                batch_sequences=config.training.batch_sequences, embedder=config.embedder,
            )  # fmt: skip
    return gate, statistics


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
    """Train the post-hoc gate of an expert: what a router must know of it, learnt on the expert's own data alone.

        g_t = sigmoid(v . u_t)          y_t = W u_t + s B A (g_t u_t)

    Muqeeth, Liu, Liu and Raffel 2024, "Learning to Route Among Specialized Experts for Zero-Shot Generalization",
    arXiv:2402.05859. Base and adapter are frozen; one vector v per adapted module learns, token by token, how much of
    the adapter its data wants. At inference the sigmoid is gone: routers compare the vectors.

    It is trained on windows of text, which need a causal language model, or on whole examples where the source holds
    them, which an encoder-decoder may have as well (`ExampleLoss`). The model is left exactly as it was: modules,
    weights, modes, devices and `requires_grad`. A killed training continues from its last checkpoint, a finished one is
    read back. For losses of one's own see `gated`.

    Args:
        model: Base model, bare.
        expert: Adapter, trained here or imported.
        source: Training tokens of the expert, with its examples if there are any.
        config: Settings of the gate, with at least one step.
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
    section = config.training(training or TrainingConfig(steps=1))
    identity = {
        "adapter": adapter_fingerprint(expert),
        "data": data_identity(source),
        "seed": seed,
        "settings": section.deciding(),
    }
    with gated(model, expert) as vectors:
        _let_gradients_through_checkpointing(model)
        runtime = runtime or choose_runtime(section, parameters=count_parameters(model))
        if runtime.compile:
            torch.compiler.reset()  # code compiled before is taken for modules that have a hook now
        trainer = domain_trainer(
            model, expert.name, source, section, runtime=runtime, folder=folder, seed=seed, identity=identity
        )
        result = trainer.run()
        trained = {name: plain(v_I) for name, v_I in vectors.items()}
    losses = [line["loss"] for line in read_metrics(folder / "metrics.jsonl") if line["kind"] == "train"]
    facts = {
        "steps": result.step,
        "lr": config.lr,
        "batch_sequences": section.batch_sequences,
        "sequence_length": section.sequence_length,
        "tokens": result.tokens,
        "data": source.fingerprint,
        "seed": seed,
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


def _described(source: Source) -> dict[str, Any]:
    return {"fingerprint": source.fingerprint, "tokens": len(source), "bytes": getattr(source, "bytes", 0) or None}


def held_out_losses(model: nn.Module, source: Source, config: ExpertTraining, device: torch.device) -> dict[str, Any]:
    """The loss on held-out text, or on the targets of held-out examples (`evaluate_suite`).

    Returns:
        nats_per_token, bits_per_byte (None where the source knows no bytes), scored_tokens.
    Raises:
        DataError: there is nothing to score.
        NumericsError: the loss is not finite.
    """
    how = EvaluationConfig(max_tokens_per_set=config.validation_tokens, batch_size=config.training.batch_sequences)
    suite = evaluate_suite(
        model, {"held-out": source}, sequence_length=config.training.sequence_length, config=how, device=device
    )
    result = suite.sets["held-out"]
    if not math.isfinite(result.nats_per_token):
        raise NumericsError(f"the loss is {result.nats_per_token} on held-out text; the adapter has diverged")
    return {
        "nats_per_token": result.nats_per_token,
        "bits_per_byte": finite_or_none(result.bits_per_byte),
        "scored_tokens": result.tokens,
    }


def _untrained(model: nn.Module, config: AdapterConfig, base: BaseReference, seed: int) -> PeftModel:
    """Put an untrained adapter into a model; its first values are a function of the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        peft_model = with_lora(model, config, revision=base.revision)
    if config.init_std is not None:
        generator = torch.Generator().manual_seed(seed)
        for name, factor in peft_model.named_parameters():
            if ".lora_A." in name:
                factor.data.copy_(torch.randn(factor.shape, generator=generator) * config.init_std)
    return peft_model
