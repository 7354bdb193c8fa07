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
from peft import LoraConfig, PeftModel, get_peft_model
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
from weftlm.experts.adapted import unchanged
from weftlm.experts.config import AdapterConfig, ExpertTraining
from weftlm.experts.examples import domain_trainer, training_source
from weftlm.experts.expert import BaseReference, Expert, LoRAExpert, Statistics
from weftlm.experts.gate import data_identity, train_gate
from weftlm.experts.library import check_name
from weftlm.experts.lora import from_peft_model
from weftlm.experts.statistics import Decode, collect_statistics, embedder_named
from weftlm.models.factory import count_parameters, peft_warnings
from weftlm.models.fingerprint import base_fingerprint
from weftlm.models.lora_targets import lora_targets
from weftlm.models.prompted import is_encoder_decoder
from weftlm.training.best import BestWeights
from weftlm.training.config import NOT_DECIDING
from weftlm.training.metrics import read_metrics
from weftlm.training.runtime import Runtime, choose_runtime

log = logging.getLogger(__name__)

PROMPTS_WANTED = "its corpora a prompt_field (data.corpora), and leave experts.examples out"
ADAPTER, GATE, BEST = "adapter", "gate", "best.safetensors"

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
    decode: Decode | None = None,
    runtime: Runtime | None = None,
) -> Expert:
    """Train an adapter on a domain, then its gate, and collect the domain's statistics.

    Afterwards the model is what it was, to the bit: PEFT and gates are gone. A killed run continues from its last
    checkpoint; a finished one gives the same expert again without training.

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
        decode: Function from token ids to text, where `config.embedder` reads text.
        runtime: Device, precision and compilation; absent: chosen for this machine.
    Returns:
        The expert. card: name, base, data, heldout, settings, seed, adapter (steps, kept_step, tokens, epochs, seconds,
        stopped_early), losses (before and after on held-out text: nats_per_token, and bits_per_byte where the source
        knows its bytes), gate, statistics, about, weftlm.
    Raises:
        ConfigError: a target module or embedder that does not exist, or examples are wanted of a source of plain text.
        DataError: a source is too short, or its ids are not the model's.
        ExpertError: the name is not allowed, the model carries adapters already, or the adapter diverged.
        CheckpointError: the folder holds another recipe's training, or cannot be written.
        NumericsError: a loss or a gradient is not finite.
    """
    check_name(name)
    source = training_source(source, name, config.examples)
    heldout = None if heldout is None else training_source(heldout, name, config.examples)
    if is_encoder_decoder(model) and examples_of(source) is None:
        raise ConfigError(f"expert {name!r}: an encoder-decoder model learns from examples; give {PROMPTS_WANTED}")
    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise ExpertError(f"expert {name!r}: the model carries PEFT adapters already; load the base without them")
    if config.statistics_examples:
        embedder_named(config.embedder, decode)
    if base.fingerprint is None:
        base = replace(base, fingerprint=base_fingerprint(model))
    if runtime is None:
        runtime = choose_runtime(config.training, parameters=count_parameters(model))
    with unchanged(model):
        model.to(runtime.device)
        lora, facts, losses = _train_adapter(
            model, base, source, config, name=name, folder=folder, seed=seed, heldout=heldout, runtime=runtime
        )
        gate = train_gate(
            model, lora, source, config.gate,
            folder=folder / GATE, seed=seed, training=config.training, runtime=runtime,
        )  # fmt: skip
        statistics: Statistics | None = None
        if config.statistics_examples:
            statistics = collect_statistics(
                model, lora, source,
                examples=config.statistics_examples, sequence_length=config.training.sequence_length, seed=seed,
                batch_sequences=config.training.batch_sequences, embedder=config.embedder, decode=decode,
            )  # fmt: skip
    card = {
        "name": name,
        "base": asdict(base),
        "data": _described(source),
        "heldout": None if heldout is None else _described(heldout),
        "settings": config.model_dump(mode="json"),
        "seed": seed,
        "adapter": facts,
        "losses": losses,
        "gate": dict(gate.facts),
        "statistics": None if statistics is None else dict(statistics.facts),
        "about": dict(about or {}),
        "weftlm": __version__,
    }
    return Expert(lora, gate, statistics, card)


def _described(source: Source) -> dict[str, Any]:
    return {"fingerprint": source.fingerprint, "tokens": len(source), "bytes": getattr(source, "bytes", 0) or None}


# -- the adapter --------------------------------------------------------------------------------------------------


def _train_adapter(
    model: nn.Module,
    base: BaseReference,
    source: Source,
    config: ExpertTraining,
    *,
    name: str,
    folder: Path,
    seed: int,
    heldout: Source | None,
    runtime: Runtime,
) -> tuple[LoRAExpert, dict[str, Any], dict[str, Any] | None]:
    """Train on one domain; keeps the best step where there is held-out text and `validate_every_steps`.

    Returns:
        The adapter, facts of its training, and losses on held-out text.
    """
    length, selecting = config.training.sequence_length, bool(heldout is not None and config.validate_every_steps)
    identity = {
        "base": [base.name, base.revision, base.fingerprint],
        "data": data_identity(source),
        "heldout": None
        if heldout is None
        else [heldout.fingerprint, config.validate_every_steps, config.validation_tokens],
        "lora": settings(config.lora),
        "seed": seed,
        "training": settings(config.training, without=NOT_DECIDING),
    }
    with unchanged(model):
        peft_model = _with_lora(model, config.lora, base, seed)
        best = BestWeights(folder / BEST, identity)

        def validate(module: nn.Module) -> dict[str, Any]:
            assert heldout is not None
            found = held_out_losses(module, heldout, config, runtime.device)
            if selecting and trainer.accelerator.is_main_process:
                best.offer(trainer.step, found["nats_per_token"], trainer.parameters)
            return found

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
            identity=identity,
        )
        result = trainer.run()
        losses, kept_step = None, result.step
        if heldout is not None:
            lines = [line for line in read_metrics(folder / ADAPTER / "metrics.jsonl") if line["kind"] == "eval"]
            found = {line["step"]: {key: line[key] for key in _LOSSES} for line in lines}
            if result.step not in found:  # the data ended before the last step
                found[result.step] = validate(peft_model)
            trainer.accelerator.wait_for_everyone()
            if selecting:
                kept_step = best.restore(trainer.parameters)
            losses = {"before": found.get(0), "after": found[kept_step], "sequence_length": length}
            log.info("expert %s: kept the adapter of step %d of %d", name, kept_step, result.step)
        lora = from_peft_model(peft_model, name, base=base)
    facts = {
        "steps": result.step,
        "kept_step": kept_step,
        "tokens": result.tokens,
        "epochs": result.epochs[name],
        "seconds": {part: result.seconds[part] for part in ("train", "eval")},
        "stopped_early": result.stopped_early,
    }
    return lora, facts, losses


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


def _with_lora(model: nn.Module, config: AdapterConfig, base: BaseReference, seed: int) -> PeftModel:
    """Put an untrained adapter into a model; its first values are a function of the seed alone."""
    section = LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=lora_targets(model, config.target_modules),
        task_type="SEQ_2_SEQ_LM" if is_encoder_decoder(model) else "CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[]), peft_warnings():
        torch.manual_seed(seed)
        peft_model: PeftModel = get_peft_model(model, section, revision=base.revision)
    if config.init_std is not None:
        generator = torch.Generator().manual_seed(seed)
        for name, factor in peft_model.named_parameters():
            if ".lora_A." in name:
                factor.data.copy_(torch.randn(factor.shape, generator=generator) * config.init_std)
    return peft_model
