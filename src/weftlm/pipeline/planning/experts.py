"""Experts: made one by one, kept on disk, pooled, routed among.

    adapter step      4 N FLOPs per token (forward, and backward through activations) and 6 per adapter parameter
    pool              E R sum (I + O) factors and E sum I prototypes of 4 bytes
    routing a token   2 E sum I for the scores, 2 K R sum (I + O) for the chosen

E experts, K chosen per token, R rank, I and O input and output width, sums over the adapted modules.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from weftlm.experts.statistics import BIGRAM_BUCKETS
from weftlm.models.open import DTYPES
from weftlm.pipeline.experts_config import ExpertsConfig
from weftlm.pipeline.planning.counts import Counted, Sizes
from weftlm.pipeline.planning.speed import DISK, OVERHEAD, Speed, Time
from weftlm.pipeline.planning.stage import DOES_NOT_FIT, FILE_HEADER, USABLE, Stage
from weftlm.pipeline.planning.trace import Work
from weftlm.pipeline.planning.training import Machine, Run, machine_for
from weftlm.pipeline.recipe import Recipe

CARD_BYTES = 4096
"""An expert's card and adapter_config.json, about."""
EXPERT_SECONDS = 0.15
"""An expert beside its steps: adapter and gate put in and taken out, fingerprints, files. Measured on one x86 core with
a model of next to no size."""
DISK_BYTES_PER_SECOND = 1e9
"""Reading a library when a pool is built; an assumption, an ordinary solid-state disk."""


@dataclass(frozen=True)
class PoolPlan:
    """What the stages of experts share.

    Attributes:
        recipe: of the experts.
        counted: the base with one adapter.
        bare: the base alone.
        speed: of one device.
        domains: D.
        experts: E.
        vocab_size: V.
        heldout: held-out tokens of a domain that are predicted, on average; None where nobody knows yet.
    """

    recipe: Recipe
    counted: Counted
    bare: Counted
    speed: Speed
    domains: int
    experts: int
    vocab_size: int
    heldout: float | None = None

    @property
    def config(self) -> ExpertsConfig:
        """The `experts` section."""
        return self.recipe.experts

    @property
    def machine(self) -> Machine:
        """As the adapters are trained."""
        return machine_for(self.config.training, self.speed)


def widths(sizes: Sizes) -> tuple[int, int]:
    """Sum of I, and of I + O, over the adapted modules."""
    return sum(i for i, _ in sizes.adapted), sum(i + o for i, o in sizes.adapted)


# -- making them -----------------------------------------------------------------------------------------------------


def experts_stage(plan: PoolPlan) -> Stage:
    """All experts made, dealt out to the devices: adapter, validation, gate, statistics.

    A device holds the whole base: adapters are trained by one process each. Imported ones get gate and statistics
    where they have a domain, one after the other.
    """
    config, machine, devices = plan.config, plan.machine, plan.speed.hardware.devices
    run = Run(plan.counted, config.training, machine, 1)
    trained, gated = _made(plan)
    training, flops = _adapter(plan, run)
    finishing, flops_after = _gate_and_statistics(plan)
    one, after = sum(training.values(), Time()), sum(finishing.values(), Time())
    time = (one + after).times(math.ceil(trained / devices)) + after.times(gated)
    memory = run.memory()
    problems: tuple[str, ...] = ()
    have = plan.speed.hardware.device.memory
    if sum(memory.values()) > USABLE * have:
        problems = (
            f"an adapter is trained by one process, which holds the whole base: {sum(memory.values()) / 1e9:.1f} GB on "
            f"a device of {have / 1e9:.0f} GB; {_expert_remedy(plan, run)}",
        )
    work, _ = run.step_work()
    facts: dict[str, Any] = {"experts": plan.experts, "parameters_per_expert": plan.counted.sizes.trainable}
    if trained:
        facts |= {
            "tokens": config.training.total_tokens * trained,
            "tokens_per_expert": config.training.total_tokens,
            "flops_per_expert": flops + flops_after,
            "flops_per_token": work.flops / (config.training.batch_sequences * config.training.sequence_length),
            "seconds_per_expert": (one + after).seconds,
            "seconds_per_adapter_step": run.step_time().seconds,
            "seconds_per_expert_by_part": {name: part.seconds for name, part in {**training, **finishing}.items()},
            "experts_at_once": min(devices, trained),
        }
    if imported := plan.experts - trained:
        facts |= {"imported": imported, "of_them_gated": gated, "seconds_per_imported_expert": after.seconds}
    how = f"{config.training.total_steps} steps each" if trained == plan.experts else f"{imported:,} of them imported"
    return Stage(
        "experts",
        f"{plan.experts:,} experts of rank {config.lora.rank}, {how}",
        time,
        DOES_NOT_FIT if problems else time.limit,
        (flops + flops_after) * trained + flops_after * gated,
        memory,
        0.0,
        {"library": library_bytes(plan) * plan.experts, "checkpoints": _checkpoints(plan) * trained},
        facts,
        problems,
    )


def _made(plan: PoolPlan) -> tuple[int, int]:
    """How many experts are trained, and how many imported ones get a gate."""
    imports = plan.config.imports
    imported = min(len(imports), plan.experts) if plan.config.trains else plan.experts
    named = sum(each.domain is not None for each in imports)
    return plan.experts - imported, round(imported * named / len(imports)) if imports else 0


def _adapter(plan: PoolPlan, run: Run) -> tuple[dict[str, Time], float]:
    """Time by part and FLOPs of training one adapter and looking at held-out text."""
    config, machine = plan.config, plan.machine
    steps, length, batch = config.training.total_steps, run.config.sequence_length, run.config.batch_sequences
    parts = {"adapter": run.step_time().times(steps)}
    work, optimizer = run.step_work()
    flops = (work.flops + optimizer.flops) * steps
    looks = 1 + (steps // config.validate_every_steps if config.validate_every_steps else 1)
    known = [size for size in (config.validation_tokens, plan.heldout) if size is not None]
    if known:
        forward = plan.counted.forward(batch, length)
        passes = looks * min(known) / (batch * plan.counted.predicted(length))
        parts["validation"] = machine.time(forward, "forward").times(passes)
        flops += forward.flops * passes
    return parts, flops


def _gate_and_statistics(plan: PoolPlan) -> tuple[dict[str, Time], float]:
    """Time by part and FLOPs of what one expert gets beside its adapter."""
    config, machine = plan.config, plan.machine
    parts, flops = {"setting up": Time(EXPERT_SECONDS, {OVERHEAD: EXPERT_SECONDS})}, 0.0
    if config.gate.steps:
        gate = config.gate.training(config.training)
        step = plan.counted.gate_step(gate.batch_sequences, gate.sequence_length)
        parts["gate"] = machine.time(step, "step").times(gate.total_steps)
        flops += step.flops * gate.total_steps
    if config.statistics_examples:
        batch = config.training.batch_sequences
        forward, passes = (
            plan.counted.forward(batch, config.training.sequence_length),
            config.statistics_examples / batch,
        )
        parts["statistics"] = machine.time(forward, "forward").times(passes)
        flops += forward.flops * passes
    return parts, flops


def _expert_remedy(plan: PoolPlan, run: Run) -> str:
    found = []
    if plan.config.dtype == "float32":
        found.append("set experts.dtype: bfloat16")
    if run.micro > 1:
        found.append("set experts.training.micro_batch_sequences: 1")
    sizes = plan.counted.sizes
    found.append(
        f"use a device of more than {(sizes.weight_bytes + 12.0 * sizes.trainable) / USABLE / 1e9:.0f} GB for weights "
        "and optimizer alone"
    )
    return ", or ".join(found)


def library_bytes(plan: PoolPlan) -> float:
    """One expert on disk: adapter, gate, statistics and card.

    4 R sum (I + O)  +  4 sum I  +  [4 sum I + 4 N F + 4 V + 4 buckets]      N examples, F width of their embedding
    """
    config, sizes = plan.config, plan.counted.sizes
    inputs, _ = widths(sizes)
    modules = len(sizes.adapted)
    found = 4.0 * sizes.trainable + 2 * modules * FILE_HEADER + CARD_BYTES
    if config.gate.steps:
        found += 4.0 * inputs + modules * FILE_HEADER
    if config.statistics_examples:
        kind, _, size = config.embedder.partition("-")
        width = int(size) if kind == "tokens" and size.isdigit() else 384
        found += 4.0 * (inputs + config.statistics_examples * width + plan.vocab_size + BIGRAM_BUCKETS)
        found += modules * FILE_HEADER
    return found


def _checkpoints(plan: PoolPlan) -> float:
    """Checkpoints of one expert's adapter and gate, which stay in the run folder."""
    config, sizes = plan.config, plan.counted.sizes
    inputs, _ = widths(sizes)
    training = config.training
    kept = min(training.keep_checkpoints, math.ceil(training.total_steps / training.save_every_steps))
    best = 4.0 * sizes.trainable if config.validate_every_steps else 0.0
    gate = 12.0 * inputs * training.keep_checkpoints if config.gate.steps else 0.0
    names = (2 * kept + training.keep_checkpoints) * 3 * len(sizes.adapted) * FILE_HEADER
    return 12.0 * sizes.trainable * kept + best + gate + names


# -- routing ---------------------------------------------------------------------------------------------------------


def routing_work(plan: PoolPlan, tokens: int, chosen: int) -> Work:
    """What routing adds to a pass over so many tokens, counted in closed form.

    Scores read every prototype once per pass; the chosen experts' factors are read once per pass and expert.
    """
    inputs, both = widths(plan.counted.sizes)
    rank, experts = plan.config.lora.rank, plan.experts
    item = DTYPES[plan.config.dtype].itemsize
    flops = 2.0 * tokens * experts * inputs + 2.0 * tokens * chosen * rank * both
    active = experts * (1.0 - (1.0 - min(1.0, chosen / experts)) ** tokens)
    read = 4.0 * experts * inputs + active * rank * both * item
    read += tokens * (experts * 4.0 * len(plan.counted.sizes.adapted) + 2.0 * both * item)
    calls = 12.0 * len(plan.counted.sizes.adapted)
    return Work(flops, read, calls, {"routing": calls})


def pool_memory(plan: PoolPlan) -> dict[str, float]:
    """Bytes of a routed model: base, all experts' factors, prototypes."""
    sizes = plan.counted.sizes
    inputs, both = widths(sizes)
    rank = -(-plan.config.lora.rank // 4) * 4
    item = DTYPES[plan.config.dtype].itemsize
    return {
        "base weights": float(plan.bare.sizes.weight_bytes),
        "experts' factors": float(plan.experts * rank * both * item),
        "prototypes": 4.0 * plan.experts * inputs,
    }


def pool_stage(plan: PoolPlan, *, prompt: int, chosen: int) -> Stage:
    """A routed model: loading it, and what routing adds to reading a prompt and to a token."""
    memory, hardware = pool_memory(plan), plan.speed.hardware
    have = USABLE * hardware.device.memory
    needed = math.ceil(sum(memory.values()) / have)
    facts: dict[str, Any] = {
        "experts": plan.experts,
        "experts_per_token": chosen,
        "devices_needed": needed,
        "library_bytes": library_bytes(plan) * plan.experts,
        "load_seconds_from_disk": sum(memory.values()) / DISK_BYTES_PER_SECOND,
    }
    if not plan.bare.config.is_encoder_decoder:  # whose tokens pass through a part of the modules each
        facts |= _routing_share(plan, prompt, chosen)
    problems: tuple[str, ...] = ()
    if needed > hardware.devices:
        problems = (
            f"the pool needs {sum(memory.values()) / 1e9:.0f} GB and there are {hardware.devices} devices of "
            f"{hardware.device.memory / 1e9:.0f} GB; take {needed} devices, a smaller rank, experts.dtype: bfloat16, "
            "or fewer experts (weftlm experts merge)",
        )
    time = Time(facts["load_seconds_from_disk"], {DISK: facts["load_seconds_from_disk"]})
    return Stage(
        "pool",
        f"{plan.experts:,} experts over one base, {chosen} per token and module",
        time,
        DOES_NOT_FIT if problems else "memory" if needed > 1 else DISK,
        0.0,
        {name: size / max(1, needed) for name, size in memory.items()},
        0.0,
        {"routed model": library_bytes(plan) * plan.experts},
        facts,
        problems,
    )


def _routing_share(plan: PoolPlan, prompt: int, chosen: int) -> dict[str, float]:
    """What routing adds to reading a prompt and to a token, over the base's own."""
    found = {}
    for name, tokens, base in (
        ("prefill", prompt, plan.bare.prefill(1, prompt)),
        ("decode", 1, plan.bare.decode(1, prompt)),
    ):
        added = routing_work(plan, tokens, chosen)
        found[f"{name}_flops_over_base"] = added.flops / base.flops
        found[f"{name}_bytes_over_base"] = added.bytes / base.bytes
    return found
