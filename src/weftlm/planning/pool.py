"""Many experts over one model or several: making them, scoring text under them, fitting a gate, serving them.

    pool in memory    the weights of every model once, E R sum (I + O) factors, 4 E sum I bytes of prototypes
    routing a token   2 E sum I FLOPs for the scores, 2 K R sum (I + O) for the chosen
    score cache       N T E x 4  +  N (T + 1) x 4  +  N x 8 bytes
    KV cache          2 L (KV heads) (head width) x bytes, per token of a request; under a gate, once per expert

E experts, K chosen, R rank, I and O input and output width, sums over the adapted modules; N sequences of T tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from weftlm.experts.statistics import BIGRAM_BUCKETS
from weftlm.gating.config import ExpertSource, gates
from weftlm.gating.experts import ExpertPool, experts_per_pass
from weftlm.models.config import LoRASection
from weftlm.pipeline.experts_config import ExpertsConfig
from weftlm.pipeline.gate_recipe import GatingConfig
from weftlm.planning.counts import Counted, Work
from weftlm.planning.hardware import USABLE, Hardware, Stage, Time
from weftlm.planning.training import Run

EXPERT_SECONDS = 0.15
"""Seconds of an expert beside its passes: setting up, fingerprints, files; measured on one x86 core."""
CARD_BYTES = 8192
"""Bytes of an expert's card, configuration and file headers, about."""
CHOSEN = 2
"""K, experts per token of a routed model."""
FIT_MEMORY = 8.0
"""Peak memory of a fit over the bytes of its data, from benchmarks/results/gate_fit.md."""

TOKEN_COPIES = {"batches": 3.0, "whole": 12.0}
"""Peak memory of a fit of a causal gate over the bytes of all scores of tokens, measured with gate `bayes`: 2.9 with
mini-batches (cache, its two parts, what is joined for the steps), 12 with all sequences in every step."""


def models_of(sources: Sequence[ExpertSource], *, dtype: str, bf16: bool) -> list[Counted]:
    """The models of `gating.pool` and how many experts run on each, checked as the scoring stage checks them.

    Adapters over one model are taken as one of the largest rank on every kind of module that any of them adapts.

    Raises:
        ConfigError, ExpertError: as `ExpertPool.load`.
    """
    pool, found = ExpertPool.load(sources, device="meta"), []
    for backbone in pool.backbones:
        loras = [pool.members[place].lora for place in backbone.experts]
        factors = {name: each for lora in loras if lora is not None for name, each in lora.modules.items()}
        names = sorted({name.rpartition(".")[2] for name in factors})
        rank = max((each.rank for each in factors.values()), default=0)
        adapter = LoRASection(rank=rank, target_modules=names) if factors else None
        config = backbone.model.config.get_text_config()
        found.append(Counted(config, dtype, bf16, adapter=adapter, experts=len(loras)))
    return found


def memory_of(models: Sequence[Counted]) -> dict[str, float]:
    """Bytes of all models, and of all adapters over them."""
    adapters = [each.adapter_parameters * each.item for each in models]
    return {
        "weights": float(sum(each.parameters * each.item for each in models) - sum(adapters)),
        "experts' factors": float(sum(each.experts * size for each, size in zip(models, adapters, strict=True))),
    }


def experts_stage(
    config: ExpertsConfig, run: Run, validation: float, *, trained: int, imported: int, gated: int
) -> Stage:
    """Adapters trained, each by one process that holds the whole base (`run`), with `validation` held-out tokens.

    Gates and statistics are made of these, and of so many of the imported ones.
    """
    training, counted, hardware = config.training, run.counted, run.hardware
    steps, length, examples = training.total_steps, training.sequence_length, config.statistics_examples
    looks = 1 + (steps // config.validate_every_steps if config.validate_every_steps else 1)
    gate = config.gate.training(training).total_tokens if config.gate.steps else 0
    # A gate's backward pass goes through the same activations as an adapter's.
    after = run.work("step", gate / length) + run.work("forward", examples) + Work(seconds=EXPERT_SECONDS)
    one = run.step * steps + run.work("forward", looks * validation / counted.predicted(length)) + after
    work = one * math.ceil(trained / hardware.devices) + after * gated
    weights = (counted.parameters * counted.item + 12.0 * counted.trainable) / USABLE / 1e9
    problem = (
        f"an adapter is trained by one process, which holds the whole base: {run.shortage}; set experts.dtype: "
        "bfloat16 or experts.training.micro_batch_sequences: 1, or use a device of more than "
        f"{weights:.0f} GB, which weights and optimizer alone take"
    )
    factors, inputs = 4.0 * counted.trainable, 4.0 * sum(i for i, _ in counted.targets.values())
    width = int(config.embedder.removeprefix("tokens-"))
    statistics = inputs + 4.0 * (examples * width + int(counted.config.vocab_size) + BIGRAM_BUCKETS)
    library = CARD_BYTES + factors + (inputs if gate else 0.0) + (statistics if examples else 0.0)
    return Stage(
        "experts", f"{trained:,} experts of rank {config.lora.rank}, {steps} steps each, and {imported:,} imported",
        hardware.time(work, half=counted.half), one.flops * trained + after.flops * gated, run.memory,
        {"library": library * (trained + imported), "checkpoints": run.disk["checkpoints"] * trained},
        facts={
            "experts": trained + imported,
            "parameters_per_expert": counted.trainable,
            "tokens": training.total_tokens * trained,
            "seconds_per_expert": hardware.time(one, half=counted.half).seconds,
            "seconds_per_adapter_step": hardware.time(run.step, half=counted.half).seconds,
            "imported": imported,
            "seconds_per_imported_expert": hardware.time(after, half=counted.half).seconds,
        },
        problems=() if run.fits else (problem,),
    )  # fmt: skip


def pass_of_all(counted: Counted, kind: str, batch: int, length: int) -> Work:
    """A pass of all experts on a model over one batch, on a GPU; experts share passes as `ExpertPool` does."""
    tokens = batch * (1 if kind == "decode" else length)
    together = min(counted.experts, experts_per_pass(tokens, int(counted.config.vocab_size), "cuda"))
    work: Work = getattr(counted, kind)(batch * together, length)
    return work * (counted.experts / together)


def scoring_stage(models: Sequence[Counted], gating: GatingConfig, hardware: Hardware, texts: int) -> Stage:
    """Text and samples scored under every expert; shards are dealt out to the devices."""
    config, experts, probe = gating.scores, sum(each.experts for each in models), hardware.probe
    samples, batch, length = experts * config.samples, config.batch_size, config.length
    reading, drawing = Work(), Work()
    for each in models:
        read = pass_of_all(each, "forward", batch, length) * (1.0 / batch)
        draw = each.decode(batch, length // 2) * (length / batch)
        if probe:
            read = replace(read, seconds=probe.score(each, batch, length))
            draw = replace(draw, seconds=probe.draw(each, batch, length))
        reading, drawing = reading + read * (texts + samples), drawing + draw * (each.experts * config.samples)
    memory = {
        **memory_of(models),
        "activations": max(each.activations(batch, length, training=False) for each in models),
    }
    needed, have, work = sum(memory.values()), hardware.device.memory, (reading + drawing) * (1.0 / hardware.devices)
    problem = (
        f"scoring holds all experts on one device: {needed / 1e9:.0f} GB on {have / 1e9:.0f} GB; score fewer experts "
        "(gating.experts), of a smaller rank, with experts.dtype: bfloat16, or on the CPU"
    )
    return Stage(
        "scores", f"{texts + samples:,} sequences of {length} tokens under {experts:,} experts",
        hardware.time(work, half=models[0].half), work.flops * hardware.devices, memory,
        {"score cache": float((texts + samples) * (length * experts * 4 + (length + 1) * 4 + 8))},
        facts={"text_sequences": texts, "text_tokens": texts * length, "sample_sequences": samples},
        problems=(problem,) if needed > hardware.memory else (),
    )  # fmt: skip


def gate_stage(gating: GatingConfig, experts: int, texts: int) -> Stage:
    """One gate fitted on the scores on the CPU: 12 bytes of data per expert and sequence, 8 for the length.

    The token ids of all sequences are in memory with them, and for a causal gate the scores of all tokens.
    """
    every, length = texts + experts * gating.scores.samples, gating.scores.length
    sequences = int(every * (1.0 - gating.held_out_fraction))
    data = sequences * (12.0 * experts + 8.0)
    memory = {"data": data, "fit": (FIT_MEMORY - 1.0) * data, "token ids": 4.0 * every * (length + 1)}
    if gates[gating.gate.gate].causal:
        copies = TOKEN_COPIES["whole" if gating.fit.batch_sequences is None else "batches"]
        memory["scores of tokens"] = copies * 4.0 * every * length * experts
    return Stage(
        "gate", f"{gating.gate.gate} over {experts:,} experts, {gating.fit.steps} steps at most, time not planned",
        memory_bytes=memory, disk_bytes={"gate": 8.0 * experts * (2 * experts + 1)}, facts={"sequences": sequences},
    )  # fmt: skip


def serving_stage(
    models: Sequence[Counted], hardware: Hardware, *, routed: bool = False, prompt: int, new: int, requests: int
) -> Stage:
    """Generation by one copy of a model, routed experts or a gate over all, for one request and for several at once.

    Over several devices layers run one after the other; requests are fewer where memory does not hold their caches.
    """
    models = [replace(each, bf16=False) for each in models]
    experts, first, memory, routing = sum(each.experts for each in models), models[0], memory_of(models), Work()
    gated = experts > 1 and not routed
    if routed:  # one pass of the base, and per token the router's scores and the chosen factors
        inputs = sum(i for i, _ in first.targets.values())
        memory["prototypes"] = 4.0 * experts * inputs
        flops = 2.0 * experts * inputs + 2.0 * min(CHOSEN, experts) * first.adapter_parameters
        routing = Work(flops, memory["prototypes"], 12.0 * len(first.targets))
        models = [replace(first, adapter=None, experts=1)]

    def time(kind: str, batch: int, length: int) -> Time:
        """A pass of everything over prompts, or over a token of every request."""
        work = sum((pass_of_all(each, kind, batch, length) for each in models), Work())
        added = replace(routing, flops=routing.flops * batch * (1 if kind == "decode" else length))
        if hardware.probe:
            timed = hardware.probe.token if kind == "decode" else hardware.probe.generate
            seconds = sum(timed(each, batch, length, gated=gated) for each in models)
            work = replace(work, seconds=seconds * (1.0 + added.flops / work.flops))
        return hardware.time(work + added, half=first.half)

    kv_bytes, held = sum(each.experts * each.kv_bytes for each in models), sum(memory.values())
    cache, there = kv_bytes * (prompt + new), hardware.devices
    needed = max(1, math.ceil((held + cache) / hardware.memory))
    at_most = int((needed * hardware.memory - held) // cache)
    at_once = max(1, min(requests, at_most))
    token = {batch: time("decode", batch, prompt + new // 2) for batch in (1, at_once)}
    problem = (
        f"one copy needs {held / 1e9:.0f} GB and a request {cache / 1e9:.3g} GB, {needed} devices; there are {there}: "
        "take more, or hold it in bfloat16"
    )
    name = "routed model" if routed else f"gate over {experts:,} experts" if gated else "plain model"
    return Stage(
        "gated serving" if gated else "serving", f"{name}, prompts of {prompt}, {new} new tokens",
        memory_bytes={part: size / needed for part, size in {**memory, "KV cache": cache * at_once}.items()},
        facts={
            "kv_bytes_per_token": kv_bytes,
            "devices_per_copy": needed,
            "requests_in_memory": at_most,
            **{f"tokens_per_second_at_{batch}": batch / found.seconds for batch, found in token.items()},
            **{f"limit_at_{batch}": found.limit for batch, found in token.items()},
            "seconds_to_first_token": time("forward", 1, prompt).seconds,
        },
        problems=(problem,) if needed > there else (),
    )  # fmt: skip
