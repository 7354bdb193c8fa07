"""Many experts over one model or several: making them, scoring text under them, fitting a gate, serving them.

    adapter step      forward, and backward through activations
    pool in memory    the weights of every model once, E R sum (I + O) factors, 4 E sum I bytes of prototypes
    routing a token   2 E sum I FLOPs for the scores, 2 K R sum (I + O) for the chosen
    score cache       N T E x 4  +  N (T + 1) x 4  +  N x 8 bytes
    KV cache          2 L (KV heads) (head width) x bytes, per token of a request; under a gate, once per expert

E experts, K chosen, R rank, I and O input and output width, sums over the adapted modules; N sequences of T tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from weftlm.errors import ConfigError
from weftlm.experts.expert import LoRAExpert
from weftlm.experts.lora import check_fits
from weftlm.experts.statistics import BIGRAM_BUCKETS
from weftlm.gating.config import ExpertSource
from weftlm.gating.experts import adapter_of, experts_per_pass
from weftlm.models.config import LoRASection
from weftlm.models.open import DTYPES, pretrained_config
from weftlm.pipeline.experts_config import ExpertsConfig
from weftlm.pipeline.gate_recipe import GatingConfig
from weftlm.planning.counts import Counted
from weftlm.planning.machine import COMPUTE, DOES_NOT_FIT, MEMORY, OVERHEAD, USABLE, Machine, Stage, Time
from weftlm.planning.training import FILE_HEADER, Run

CARD_BYTES = 4096
"""Bytes of an expert's card and adapter_config.json, about."""
EXPERT_SECONDS = 0.15
"""Seconds of an expert beside its passes: setting up, fingerprints, files; measured on one x86 core."""
ROUTING_CALLS = 12.0
"""Kernels per target module of choosing experts and adding their updates."""
FIT_STEP, FIT_SET, FIT_SET_DRAWN, FIT_ELEMENT, FIT_HIDDEN, FIT_ONCE = 1e-3, 2e-5, 1.1e-4, 45e-9, 14e-9, 140e-9
"""Seconds of fitting a gate on one x86 core, from benchmarks/results/gate_fit.md: per step; per set of sequences and
step, whole or drawn from; per sequence, expert and step; per sequence, hidden unit and step; per sequence and expert,
once."""
FIT_MEMORY = 8.0
"""Peak memory of a fit over the bytes of its data, from the same measurements."""


@dataclass(frozen=True)
class Sharing:
    """Experts that share one model's weights in memory.

    Attributes:
        counted: the model, with the adapter where its experts are adapters.
        experts: number of experts that run on it.
    """

    counted: Counted
    experts: int

    @property
    def memory(self) -> dict[str, float]:
        """Bytes of the model and of all its adapters."""
        sizes, adapter = self.counted.sizes, self.counted.adapter
        item = DTYPES[self.counted.dtype].itemsize
        found = {"weights": float((sizes.parameters - (sizes.trainable if adapter else 0)) * item)}
        if adapter is not None:
            found["experts' factors"] = float(self.experts * sizes.trainable * item)
        return found

    @property
    def prototypes(self) -> float:
        """Bytes of a router's prototypes."""
        return 4.0 * self.experts * sum(i for i, _ in self.counted.sizes.adapted)

    def time(self, machine: Machine, kind: Any, batch: int, length: int) -> Time:
        """A pass of all its experts over the same batch; experts share passes as `ExpertPool` does."""
        tokens = batch * (1 if kind == "decode" else length)
        vocab_size = int(self.counted.config.vocab_size)
        together = min(self.experts, experts_per_pass(tokens, vocab_size, "cpu" if machine.measured else "cuda"))
        return machine.time(self.counted, kind, batch * together, length) * (self.experts / together)

    def flops(self, kind: Any, batch: int, length: int) -> float:
        """FLOPs of the same."""
        return float(getattr(self.counted, kind)(batch, length).flops * self.experts)


def sharings_of(sources: Sequence[ExpertSource], *, dtype: str, bf16: bool) -> tuple[Sharing, ...]:
    """The experts of `gating.pool`, by the model they run on; adapters are read, models' weights are not.

    Adapters over one model are taken as one of the largest rank on every kind of module that any of them adapts.

    Args:
        sources: where the experts are.
        dtype: type the parameters are held in.
        bf16: whether they are scored under bfloat16 autocast.
    Raises:
        ConfigError: a configuration is not on this machine, a model is no decoder-only language model, or vocabularies
            differ.
        ExpertError: an adapter is broken or unknown, or does not fit its model.
    """
    groups: dict[tuple[str, str | None], list[LoRAExpert | None]] = {}
    for source in sources:
        lora, base, _ = adapter_of(source)
        groups.setdefault(base, []).append(lora)
    found, sizes = [], {}
    for (name, revision), loras in groups.items():
        config = pretrained_config(name, revision)
        if config.is_encoder_decoder or not hasattr(config, "vocab_size"):
            raise ConfigError(
                f"gating.pool: {name} is a {config.model_type} model; a gate combines decoder-only language models"
            )
        there = {key: factors for lora in loras if lora is not None for key, factors in lora.modules.items()}
        adapter = None
        if there:
            names = sorted({key.rpartition(".")[2] for key in there})
            adapter = LoRASection(rank=max(factors.rank for factors in there.values()), target_modules=names)
        counted = Counted(config.get_text_config(), dtype, bf16, adapter=adapter)
        for lora in loras:
            if lora is not None:
                check_fits(lora, counted.outline)
        sizes[name] = int(counted.config.vocab_size)
        found.append(Sharing(counted, len(loras)))
    if len(set(sizes.values())) > 1:
        listed = ", ".join(f"{name} {size:,}" for name, size in sizes.items())
        raise ConfigError(f"gating.pool: a gate combines models of one vocabulary, and these differ in size: {listed}")
    return tuple(found)


# -- making experts --------------------------------------------------------------------------------------------------


def experts_stage(
    config: ExpertsConfig, counted: Counted, machine: Machine, *, trained: int, gated: int, imported: int,
    heldout: float | None,
) -> Stage:  # fmt: skip
    """Adapters trained, each by one process that holds the whole base; gates and statistics.

    Args:
        config: the `experts` section.
        counted: the base with one adapter.
        machine: one device.
        trained: number of experts trained here.
        gated: number of imported ones that get a gate and statistics.
        imported: number of imported ones.
        heldout: held-out tokens of a domain on average; None where they are not known yet.
    """
    training, devices, experts = config.training, machine.hardware.devices, trained + imported
    run, passes = Run(counted, training, machine.training(training), 1), 0.0
    steps = training.total_steps
    if known := [size for size in (config.validation_tokens, heldout) if size is not None]:
        looks = 1 + (steps // config.validate_every_steps if config.validate_every_steps else 1)
        passes = looks * min(known) / counted.predicted(training.sequence_length)
    flops = run.step_flops * steps + run.flops("forward", passes)
    after = Time(EXPERT_SECONDS, {OVERHEAD: EXPERT_SECONDS}) + run.time("forward", config.statistics_examples)
    flops_after = run.flops("forward", config.statistics_examples)
    if config.gate.steps:  # its backward pass goes through the same activations as an adapter's
        gate = replace(run, config=config.gate.training(training))
        after = after + run.step_time * (gate.step_flops / run.step_flops * config.gate.steps)
        flops_after += gate.step_flops * config.gate.steps
    one = run.step_time * steps + run.time("forward", passes) + after
    facts: dict[str, Any] = {"experts": experts, "parameters_per_expert": counted.sizes.trainable}
    if trained:
        facts |= {
            "tokens": training.total_tokens * trained,
            "tokens_per_expert": training.total_tokens,
            "seconds_per_expert": one.seconds,
            "seconds_per_adapter_step": run.step_time.seconds,
            "experts_at_once": min(devices, trained),
        }
    if imported:
        facts |= {"imported": imported, "of_them_gated": gated, "seconds_per_imported_expert": after.seconds}
    problems: tuple[str, ...] = ()
    if not run.fits:
        needed, have = sum(run.memory.values()) / 1e9, machine.hardware.device.memory / 1e9
        cures = ["set experts.dtype: bfloat16"] if config.dtype == "float32" else []
        cures += ["set experts.training.micro_batch_sequences: 1"] if run.micro > 1 else []
        weights = (counted.sizes.weight_bytes + 12.0 * counted.sizes.trainable) / USABLE / 1e9
        cures.append(f"use a device of more than {weights:.0f} GB for weights and optimizer alone")
        problems = (
            f"an adapter is trained by one process, which holds the whole base: {needed:.1f} GB on a device of "
            f"{have:.0f} GB; {', or '.join(cures)}",
        )
    time = one * math.ceil(trained / devices) + after * gated
    how = f"{steps} steps each" if not imported else f"{imported:,} of them imported"
    return Stage(
        "experts", f"{experts:,} experts of rank {config.lora.rank}, {how}", time,
        DOES_NOT_FIT if problems else time.limit, flops * trained + flops_after * (trained + gated), run.memory, 0.0,
        {"library": library_bytes(config, counted) * experts, "checkpoints": _checkpoints(config, counted) * trained},
        facts, problems,
    )  # fmt: skip


def library_bytes(config: ExpertsConfig, counted: Counted) -> float:
    """One expert on disk: adapter, gate, statistics and card.

    4 R sum (I + O)  +  4 sum I  +  [4 sum I + 4 N F + 4 V + 4 buckets]      N examples, F width of their embedding
    """
    inputs, modules = sum(i for i, _ in counted.sizes.adapted), len(counted.sizes.adapted)
    found = 4.0 * counted.sizes.trainable + 2 * modules * FILE_HEADER + CARD_BYTES
    if config.gate.steps:
        found += 4.0 * inputs + modules * FILE_HEADER
    if config.statistics_examples:
        kind, _, size = config.embedder.partition("-")
        width = int(size) if kind == "tokens" and size.isdigit() else 384
        found += 4.0 * (inputs + config.statistics_examples * width + int(counted.config.vocab_size) + BIGRAM_BUCKETS)
        found += modules * FILE_HEADER
    return found


def _checkpoints(config: ExpertsConfig, counted: Counted) -> float:
    """Checkpoints of one expert's adapter and gate, which stay in the run folder."""
    training, inputs = config.training, sum(i for i, _ in counted.sizes.adapted)
    kept = min(training.keep_checkpoints, math.ceil(training.total_steps / training.save_every_steps))
    best = 4.0 * counted.sizes.trainable if config.validate_every_steps else 0.0
    gate = 12.0 * inputs * training.keep_checkpoints if config.gate.steps else 0.0
    names = (2 * kept + training.keep_checkpoints) * 3 * len(counted.sizes.adapted) * FILE_HEADER
    return 12.0 * counted.sizes.trainable * kept + best + gate + names


# -- a gate ----------------------------------------------------------------------------------------------------------


def scoring_stage(sharings: Sequence[Sharing], gating: GatingConfig, machine: Machine, texts: int) -> Stage:
    """Text and samples scored under every expert; shards are dealt out to the devices."""
    config, experts, devices = gating.scores, sum(each.experts for each in sharings), machine.hardware.devices
    samples, size = experts * config.samples, (config.batch_size, config.length)
    batches = math.ceil((texts + samples) / config.batch_size)
    reading = sum((each.time(machine, "forward", *size) for each in sharings), Time()) * batches
    flops = sum(each.flops("forward", *size) for each in sharings) * batches
    drawing = Time()
    if samples:
        tokens = math.ceil(config.samples / config.batch_size) * config.length
        for each in sharings:
            halfway = (config.batch_size, config.length // 2)
            drawing = drawing + machine.time(each.counted, "decode", *halfway) * (tokens * each.experts)
            flops += each.flops("decode", *halfway) * tokens
    memory = {**pool_memory(sharings), "activations": max(each.counted.forward(*size).peak for each in sharings)}
    problems: tuple[str, ...] = ()
    if sum(memory.values()) > machine.memory:
        problems = (
            f"scoring holds all experts on one device: {sum(memory.values()) / 1e9:.0f} GB on "
            f"{machine.hardware.device.memory / 1e9:.0f} GB; score fewer experts (gating.experts), of a smaller rank, "
            "with experts.dtype: bfloat16, or on the CPU",
        )
    time = (reading + drawing) * (1.0 / devices)
    return Stage(
        "scores", f"{texts + samples:,} sequences of {config.length} tokens under {experts:,} experts", time,
        DOES_NOT_FIT if problems else time.limit, flops, memory, 0.0,
        {"score cache": score_cache_bytes(texts + samples, config.length, experts)},
        {
            "text_sequences": texts,
            "text_tokens": texts * config.length,
            "sample_sequences": samples,
            "seconds_scoring": reading.seconds / devices,
            "seconds_drawing_samples": drawing.seconds / devices,
        },
        problems,
    )  # fmt: skip


def score_cache_bytes(sequences: int, length: int, experts: int) -> float:
    """The score cache: log-probabilities, tokens and clusters."""
    return float(sequences * (length * experts * 4 + (length + 1) * 4 + 8))


def gate_stage(gating: GatingConfig, experts: int, domains: int, texts: int) -> Stage:
    """One gate fitted on the scores, on one CPU core; see `fit_seconds`."""
    kept = 1.0 - gating.held_out_fraction
    fitted, samples = int(texts * kept), int(experts * gating.scores.samples * kept)
    seconds = fit_seconds(
        fitted, samples, domains, experts, steps=gating.fit.steps, batch=gating.fit.batch_sequences,
        hidden=int(getattr(gating.gate, "hidden", 0)),
    )  # fmt: skip
    data = fit_bytes(fitted + samples, experts)
    return Stage(
        "gate", f"{gating.gate.gate} over {experts:,} experts, {gating.fit.steps} steps, on the CPU",
        Time(seconds, {COMPUTE: seconds}), COMPUTE, 0.0, {"data": data, "fit": (FIT_MEMORY - 1.0) * data}, 0.0,
        {"gate": 8.0 * experts * (2 * experts + 1)},
        {"sequences": fitted + samples, "seconds_per_step": seconds / gating.fit.steps},
    )  # fmt: skip


def fit_seconds(
    texts: int, samples: int, domains: int, experts: int, *, steps: int, batch: int | None, hidden: int = 0
) -> float:
    """Time of `fit_robust_gate` on one core, by constants fitted to benchmarks/results/gate_fit.md.

        steps (a + b (D + E) + rows (c E + h H)) + once (N E)

    rows: sequences of a step; b is larger where mini-batches are drawn.

    Args:
        texts, samples: sequences of domains and of experts that are fitted on.
        domains, experts: D and E.
        steps: steps of the fit.
        batch: sequences of each set per step; None: all.
        hidden: H, hidden units of an MLP gate.
    """
    sets = domains + (experts if samples else 0)
    rows = texts + samples if batch is None else min(texts + samples, batch * sets)
    per_set = FIT_SET if batch is None else FIT_SET_DRAWN
    step = FIT_STEP + per_set * sets + rows * (FIT_ELEMENT * experts + FIT_HIDDEN * hidden)
    return steps * step + FIT_ONCE * (texts + samples) * experts


def fit_bytes(sequences: int, experts: int) -> float:
    """Data of a fit: 12 bytes per expert and sequence (log-likelihood, two features), 8 for its length."""
    return float(sequences) * (12.0 * experts + 8.0)


# -- serving ---------------------------------------------------------------------------------------------------------


def pool_memory(sharings: Sequence[Sharing], *, prototypes: bool = False) -> dict[str, float]:
    """Bytes of all models and adapters, and of a router's prototypes."""
    found: dict[str, float] = {}
    for each in sharings:
        for name, size in each.memory.items():
            found[name] = found.get(name, 0.0) + size
    if prototypes:
        found["prototypes"] = sum(each.prototypes for each in sharings)
    return found


def serving_stage(
    sharings: Sequence[Sharing], machine: Machine, *, chosen: int | None = None, prompt: int, new: int, requests: int
) -> Stage:
    """Generation by one copy of a model, alone and for many requests at once.

    Args:
        sharings: one model alone, or the experts; over several devices their layers run one after the other.
        machine: one device.
        chosen: K, experts per token that a router chooses; None: all experts run, under a gate or alone.
        prompt: tokens of a prompt.
        new: tokens generated for a request.
        requests: most requests at once; fewer where memory does not hold their caches.
    """
    bare = [replace(each, counted=each.counted.like(bf16=False)) for each in sharings]
    experts, dtype = sum(each.experts for each in bare), bare[0].counted.dtype
    routed, gated = chosen is not None, chosen is None and experts > 1
    memory = pool_memory(bare, prototypes=routed)
    added, modules = (0.0, 0.0), len(bare[0].counted.sizes.adapted)
    if routed:  # one pass of the base, and the router's scores and the chosen factors
        rank_widths, prototypes = bare[0].counted.sizes.trainable, bare[0].prototypes
        added = prototypes / 2.0 + 2.0 * (chosen or 0) * rank_widths, prototypes
        bare = [Sharing(bare[0].counted.like(adapter=None), 1)]
    kv_bytes = sum(each.experts * each.counted.sizes.kv_bytes for each in bare)
    machine = replace(machine, precision="fp32" if dtype == "float32" else "bf16", compiled=False)
    held, cache = sum(memory.values()), kv_bytes * (prompt + new)
    needed = max(1, math.ceil((held + cache) / machine.memory))
    at_most = int(max(0.0, needed * machine.memory - held) // cache)

    def time(kind: Any, batch: int, length: int) -> Time:
        found = sum((each.time(machine, kind, batch, length) for each in bare), Time())
        tokens = batch * (1 if kind == "decode" else length)
        if not routed or machine.measured:
            flops: float = getattr(bare[0].counted, kind)(batch, length).flops
            return found * (1.0 + added[0] * tokens / flops)
        return found + machine.roofline(added[0] * tokens, added[1], ROUTING_CALLS * modules)

    name = "routed model" if routed else f"gate over {experts:,} experts" if gated else "plain model"
    facts: dict[str, Any] = {
        "kv_bytes_per_token": kv_bytes,
        "devices_per_copy": needed,
        "copies": machine.hardware.devices // needed,
        "requests_in_memory": at_most,
        "prompt_tokens": prompt,
        "new_tokens": new,
    }
    at_once, limit = max(1, min(requests, at_most)), MEMORY
    for batch in dict.fromkeys((1, at_once)):
        token = time("decode", batch, prompt + new // 2)
        facts[f"tokens_per_second_at_{batch}"] = batch / token.seconds
        facts[f"limit_at_{batch}"] = limit = token.limit
    facts["seconds_to_first_token"] = time("forward", 1, prompt).seconds
    problems: tuple[str, ...] = ()
    if needed > machine.hardware.devices:
        problems = (
            f"one copy needs {held / 1e9:.0f} GB and a request {cache / 1e9:.3g} GB, {needed} devices; there are "
            f"{machine.hardware.devices}: take more, or hold it in bfloat16",
        )
    return Stage(
        "gated serving" if gated else "serving", f"{name}, prompts of {prompt}, {new} new tokens", None,
        DOES_NOT_FIT if problems else limit, 0.0,
        {**{name: size / needed for name, size in memory.items()}, "KV cache": cache * at_once / needed}, 0.0, {},
        facts, problems,
    )  # fmt: skip
