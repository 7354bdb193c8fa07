"""Experts: made one by one, kept on disk, pooled, routed among, scored, gated.

    adapter step      4 N FLOPs per token (forward, and backward through activations) and 6 per adapter parameter
    pool              E R sum (I + O) factors and E sum I prototypes of 4 bytes
    routing a token   2 E sum I for the scores, 2 K R sum (I + O) for the chosen
    score cache       sequences x tokens x (4 E + 4) bytes; scoring is a forward pass per expert and sequence

E experts, K chosen per token, R rank, I and O input and output width, sums over the adapted modules.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from weft.experts.statistics import BIGRAM_BUCKETS
from weft.gating.experts import BUSY, BUSY_ELSEWHERE, LOGITS
from weft.models.factory import DTYPES
from weft.pipeline.expert_recipe import ExpertRecipe
from weft.pipeline.experts_config import ExpertsConfig
from weft.pipeline.gate_recipe import GatingConfig
from weft.pipeline.planning.counts import Counted, Sizes
from weft.pipeline.planning.speed import COMPUTE, DISK, MEMORY, OVERHEAD, Speed, Time
from weft.pipeline.planning.stage import DOES_NOT_FIT, FILE_HEADER, USABLE, Stage
from weft.pipeline.planning.trace import Work
from weft.pipeline.planning.training import Machine, Run, machine_for

CARD_BYTES = 4096
"""An expert's card and adapter_config.json, about."""
EXPERT_SECONDS = 0.15
"""An expert beside its steps: adapter and gate put in and taken out, fingerprints, files. Measured on one x86 core with
a model of next to no size."""
DISK_BYTES_PER_SECOND = 1e9
"""Reading a library when a pool is built; an assumption, an ordinary solid-state disk."""

FIT_STEP, FIT_SET, FIT_SET_DRAWN, FIT_ELEMENT, FIT_HIDDEN, FIT_ONCE = 1e-3, 2e-5, 1.1e-4, 45e-9, 14e-9, 140e-9
"""Seconds of fitting a gate on one x86 core, from benchmarks/results/gate_fit.md: per step; per set of sequences and
step, whole or drawn from; per sequence, expert and step; per sequence, hidden unit and step; per sequence and expert,
once."""
FIT_MEMORY = 8.0
"""Peak memory of a fit over the bytes of its data, from the same measurements."""


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
        heldout: held-out tokens of a domain, on average; None where nobody knows yet.
    """

    recipe: ExpertRecipe
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
        forward, passes = plan.counted.forward(batch, length), looks * min(known) / (batch * length)
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
    for name, tokens, base in (
        ("prefill", prompt, plan.bare.prefill(1, prompt)),
        ("decode", 1, plan.bare.decode(1, prompt)),
    ):
        added = routing_work(plan, tokens, chosen)
        facts[f"{name}_flops_over_base"] = added.flops / base.flops
        facts[f"{name}_bytes_over_base"] = added.bytes / base.bytes
    problems: tuple[str, ...] = ()
    if needed > hardware.devices:
        problems = (
            f"the pool needs {sum(memory.values()) / 1e9:.0f} GB and there are {hardware.devices} devices of "
            f"{hardware.device.memory / 1e9:.0f} GB; take {needed} devices, a smaller rank, experts.dtype: bfloat16, "
            "or fewer experts (weft experts merge)",
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


# -- scores and gates ------------------------------------------------------------------------------------------------


def scoring_stage(plan: PoolPlan, gating: GatingConfig, sequences: Sequence[int]) -> Stage:
    """Domains' text and experts' samples scored under every expert; shards are dealt out to the devices.

    Args:
        plan: of the pool.
        gating: the `gating` section.
        sequences: held-out sequences of each domain.
    """
    config = gating.scores
    domains, experts = _scored_sets(plan, gating)
    texts, samples = _texts(sequences, domains), experts * config.samples
    cpu = plan.speed.hardware.device.measured
    bf16 = config.precision == "bf16" or (config.precision == "auto" and not cpu)
    machine = Machine(plan.speed, "bf16" if bf16 else "fp32", compiled=False)
    busy = BUSY["cpu"] if cpu else BUSY_ELSEWHERE
    together = max(1, min(experts, min(LOGITS // plan.vocab_size, busy) // (config.batch_size * config.length)))
    one = plan.counted.scored(together, config.batch_size, config.length)
    passes = math.ceil((texts + samples) / config.batch_size) * experts / together
    reading = machine.time(one, "forward").times(passes)
    flops = one.flops * passes
    drawing = Time()
    if samples:
        token = plan.counted.drawn(config.batch_size, config.length // 2)
        times = math.ceil(config.samples / config.batch_size) * experts * config.length
        drawing = machine.time(token, "decode").times(times)
        flops += token.flops * times
    time = (reading + drawing).times(1.0 / plan.speed.hardware.devices)
    disk = score_cache_bytes(texts, samples, config.length, experts)
    memory = {**pool_memory(plan), "activations": one.peak}
    have = plan.speed.hardware.device.memory
    problems: tuple[str, ...] = ()
    if sum(memory.values()) > USABLE * have:
        problems = (
            f"scoring holds all experts on one device: {sum(memory.values()) / 1e9:.0f} GB on {have / 1e9:.0f} GB; "
            "score fewer experts (gating.experts), of a smaller rank, with experts.dtype: bfloat16, or on the CPU",
        )
    return Stage(
        "scores",
        f"{texts + samples:,} sequences of {config.length} tokens under {experts:,} experts",
        time,
        DOES_NOT_FIT if problems else time.limit,
        flops,
        memory,
        0.0,
        {"score cache": disk},
        {
            "text_sequences": texts,
            "sample_sequences": samples,
            "tokens_times_experts": (texts + samples) * config.length * experts,
            "seconds_scoring": reading.seconds / plan.speed.hardware.devices,
            "seconds_drawing_samples": drawing.seconds / plan.speed.hardware.devices,
            "experts_per_pass": together,
        },
        problems,
    )


def score_cache_bytes(texts: int, samples: int, length: int, experts: int) -> float:
    """The score cache: log-probabilities, tokens, lengths and clusters.

    N T E x 4  +  N (T + 1) x 4  +  N (4 + 8)            N sequences in all
    """
    sequences = texts + samples
    return float(sequences * length * experts * 4 + sequences * (length + 1) * 4 + sequences * 12)


def _texts(sequences: Sequence[int], domains: int) -> int:
    """Sequences of so many of the domains, the average ones."""
    return round(sum(sequences) * domains / max(1, len(sequences)))


def _scored_sets(plan: PoolPlan, gating: GatingConfig) -> tuple[int, int]:
    domains = plan.domains if gating.domains is None else len(gating.domains)
    experts = plan.experts if gating.experts is None else len(gating.experts)
    return domains, experts


def gate_stage(plan: PoolPlan, gating: GatingConfig, sequences: Sequence[int]) -> Stage:
    """Fitting one gate on the scores, on one CPU core; see `fit_seconds`."""
    domains, experts = _scored_sets(plan, gating)
    kept = 1.0 - gating.held_out_fraction
    texts = int(_texts(sequences, domains) * kept)
    samples = int(experts * gating.scores.samples * kept)
    hidden = int(getattr(gating.gate, "hidden", 0))

    def fitting(batch: int | None) -> float:
        return fit_seconds(texts, samples, domains, experts, steps=gating.fit.steps, batch=batch, hidden=hidden)

    seconds = fitting(gating.fit.batch_sequences)
    data = fit_bytes(texts + samples, experts)
    time = Time(seconds, {COMPUTE: seconds})
    return Stage(
        "gate",
        f"{gating.gate.gate} over {experts:,} experts, {gating.fit.steps} steps, on the CPU",
        time,
        COMPUTE,
        0.0,
        {"data": data, "fit": (FIT_MEMORY - 1.0) * data},
        0.0,
        {"gate": 8.0 * experts * (2 * experts + 1)},
        {
            "sequences": texts + samples,
            "seconds_per_step": seconds / gating.fit.steps,
            "seconds_with_mini_batches_of_16": fitting(16),
        },
    )


def fit_seconds(
    texts: int, samples: int, domains: int, experts: int, *, steps: int, batch: int | None, hidden: int = 0
) -> float:
    """Time of `fit_robust_gate` on one core, by constants fitted to benchmarks/results/gate_fit.md.

        steps (a + b (D + E) + rows (c E + h H)) + once (N E)

    rows: sequences of a step; b is larger where mini-batches are drawn.

    Args:
        texts, samples: sequences of domains and of experts that are fitted on.
        domains, experts: D and E.
        steps: of the fit.
        batch: sequences of each set per step; None: all.
        hidden: H, of an MLP gate.
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


def serving_stage(
    counted: Counted, speed: Speed, *, prompt: int, new: int, requests: int, pool: PoolPlan | None, chosen: int
) -> Stage:
    """Generation by one copy of the model: tokens per second alone and for many requests at once.

    KV cache      2 L (KV heads) (head width) x bytes, per token of a request
    time/token    max of weights and cache read, FLOPs, and launches; one copy per device, or over as many devices
                  as its weights need, which then work one after the other
    """
    cpu = speed.hardware.device.measured
    machine = Machine(speed, "fp32" if counted.dtype == "float32" else "bf16", compiled=False)
    weights = {"weights": float(counted.sizes.weight_bytes)} if pool is None else pool_memory(pool)
    have = USABLE * speed.hardware.device.memory
    needed = max(1, math.ceil(sum(weights.values()) / have))
    cache = counted.sizes.kv_bytes * (prompt + new)
    room = max(0.0, needed * have - sum(weights.values()))
    facts: dict[str, Any] = {
        "kv_bytes_per_token": counted.sizes.kv_bytes,
        "devices_per_copy": needed,
        "copies": speed.hardware.devices // needed,
        "requests_in_memory": int(room // cache),
        "prompt_tokens": prompt,
        "new_tokens": new,
    }
    at_once = max(1, min(requests, facts["requests_in_memory"]))
    context = prompt + new // 2
    limit = MEMORY
    for batch in dict.fromkeys((1, at_once)):
        time = machine.time(counted.decode(batch, context), "decode")
        if cpu:
            token = speed.calibration.token_seconds()
            time = time + Time(token, {OVERHEAD: token})
        if pool is not None:
            time = time + _routed(machine, pool, batch, chosen, time, counted.decode(batch, context))
        facts[f"tokens_per_second_at_{batch}"] = batch / time.seconds
        facts[f"limit_at_{batch}"] = time.limit
        limit = time.limit
    first = machine.time(counted.prefill(1, prompt), "forward")
    if pool is not None:
        first = first + _routed(machine, pool, prompt, chosen, first, counted.prefill(1, prompt))
    facts["seconds_to_first_token"] = first.seconds
    problems: tuple[str, ...] = ()
    if needed > speed.hardware.devices:
        problems = (
            f"one copy needs {sum(weights.values()) / 1e9:.0f} GB, {needed} devices; there are "
            f"{speed.hardware.devices}: take more, or hold it in bfloat16",
        )
    return Stage(
        "serving",
        f"{'routed' if pool is not None else 'plain'} model, prompts of {prompt}, {new} new tokens",
        None,
        DOES_NOT_FIT if problems else limit,
        0.0,
        {**{name: size / needed for name, size in weights.items()}, "KV cache": cache * at_once / needed},
        0.0,
        {},
        facts,
        problems,
    )


def _routed(machine: Machine, pool: PoolPlan, tokens: int, chosen: int, base: Time, work: Work) -> Time:
    """Routing's share of a pass; on the CPU in proportion to the base's operations and bytes."""
    added = routing_work(pool, tokens, chosen)
    if not machine.hardware.device.measured:
        return machine.time(added, "forward")
    more = added.bytes / machine.speed.calibration.bytes_per_second()
    compute = base.parts.get(COMPUTE, 0.0) * added.flops / max(1.0, work.flops)
    host = added.calls * machine.speed.calibration.overhead("forward") * 4
    return Time(more + compute + host, {MEMORY: more, COMPUTE: compute, OVERHEAD: host})
