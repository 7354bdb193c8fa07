"""A gate over frozen experts: their scores, the fit, and what they need in memory.

    score cache   sequences x tokens x (4 E + 4) bytes; scoring is a forward pass per expert and sequence
    pool          the weights of every model once, and E R sum (I + O) factors over each

E experts, R rank, I and O input and output width, sums over the adapted modules. Experts are adapters over one model,
whole models, or both.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from transformers import PretrainedConfig

from weftlm.errors import ConfigError
from weftlm.experts.expert import LoRAExpert
from weftlm.experts.lora import check_fits
from weftlm.gating.config import ExpertSource
from weftlm.gating.experts import BUSY, BUSY_ELSEWHERE, LOGITS, adapter_of
from weftlm.models.config import LoRASection
from weftlm.models.factory import uneven_heads
from weftlm.models.open import DTYPES, pretrained_config
from weftlm.pipeline.gate_recipe import GatingConfig
from weftlm.pipeline.planning.counts import Counted
from weftlm.pipeline.planning.speed import COMPUTE, Speed, Time
from weftlm.pipeline.planning.stage import DOES_NOT_FIT, USABLE, Stage
from weftlm.pipeline.planning.training import Machine

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
        counted: the model, with the adapter that goes on it where its experts are adapters.
        experts: how many run on it.
    """

    counted: Counted
    experts: int

    @cached_property
    def weight_bytes(self) -> float:
        """Of the model alone."""
        return float(dataclasses.replace(self.counted, adapter=None, _cache={}).sizes.weight_bytes)

    @property
    def factor_bytes(self) -> float:
        """Of all its adapters; 0 for a whole model."""
        adapter = self.counted.adapter
        if adapter is None:
            return 0.0
        both = sum(i + o for i, o in self.counted.sizes.adapted)
        return float(self.experts * adapter.rank * both * DTYPES[self.counted.dtype].itemsize)


@dataclass(frozen=True)
class GatePlan:
    """What the stages of a gate share.

    Attributes:
        sharings: the experts, by the model they run on.
        gating: the `gating` section.
        speed: of one device.
        sequences: held-out sequences of each domain, as many as there are to score.
    """

    sharings: tuple[Sharing, ...]
    gating: GatingConfig
    speed: Speed
    sequences: Sequence[int]

    @property
    def experts(self) -> int:
        """E."""
        return sum(sharing.experts for sharing in self.sharings)

    @property
    def domains(self) -> int:
        """D, those that are scored."""
        return len(self.sequences) if self.gating.domains is None else len(self.gating.domains)

    @property
    def texts(self) -> int:
        """Sequences of the scored domains, average ones where the recipe names some."""
        return round(sum(self.sequences) * self.domains / max(1, len(self.sequences)))

    @property
    def memory(self) -> dict[str, float]:
        """Bytes of the pool."""
        found = {"weights": sum(sharing.weight_bytes for sharing in self.sharings)}
        if factors := sum(sharing.factor_bytes for sharing in self.sharings):
            found["experts' factors"] = factors
        return found

    @property
    def machine(self) -> Machine:
        """As the experts are scored."""
        return Machine(self.speed, "bf16" if scored_in_bf16(self.gating, self.speed) else "fp32", compiled=False)


def scored_in_bf16(gating: GatingConfig, speed: Speed) -> bool:
    """Whether experts are scored under bfloat16 autocast."""
    precision = gating.scores.precision
    return precision == "bf16" or (precision == "auto" and not speed.hardware.device.measured)


def sharings_of(
    sources: Sequence[ExpertSource], *, dtype: str, bf16: bool, length: int | None = None
) -> tuple[Sharing, ...]:
    """The experts of `gating.pool`, by the model they run on. Adapters are read, of models the configuration alone.

    Adapters over one model are taken as one of the largest rank on every kind of module that any of them adapts.

    Args:
        sources: where they lie.
        dtype: the parameters are held in.
        bf16: scored under bfloat16 autocast.
        length: of the sequences they will read; None: not known.
    Raises:
        ConfigError: a configuration is not on this machine, a model is no decoder-only language model or too short for
            the sequences, names are not unique, or vocabularies differ.
        ExpertError: an adapter is broken or unknown, or does not fit its model.
    """
    names = [source.name for source in sources]
    if len(set(names)) < len(names):
        raise ConfigError(f"gating.pool: experts need different names; got {', '.join(names)}")
    groups: dict[tuple[str, str | None], list[LoRAExpert | None]] = {}
    for source in sources:
        lora, base, _ = adapter_of(source)
        groups.setdefault(base, []).append(lora)
    found, sizes = [], {}
    for (name, revision), loras in groups.items():
        config = pretrained_config(name, revision)
        if not config.is_encoder_decoder:
            config = config.get_text_config()
        _check_member(name, config, length)
        counted = Counted(config, dtype, bf16, adapter=_widest(loras))
        outline = counted.bare_outline()
        for lora in loras:
            if lora is not None:
                check_fits(lora, outline)
        sizes[name] = int(config.vocab_size)
        found.append(Sharing(counted, len(loras)))
    if len(set(sizes.values())) > 1:
        said = ", ".join(f"{name} {size:,}" for name, size in sizes.items())
        raise ConfigError(f"gating.pool: a gate combines models of one vocabulary, and these differ in size: {said}")
    return tuple(found)


def _check_member(name: str, config: PretrainedConfig, length: int | None) -> None:
    if config.is_encoder_decoder or not hasattr(config, "vocab_size"):
        kind = "an encoder-decoder model" if config.is_encoder_decoder else f"a {config.model_type} model"
        raise ConfigError(f"gating.pool: {name} is {kind}; a gate combines decoder-only language models")
    if why := uneven_heads(config):
        raise ConfigError(f"gating.pool: {name} has {why}; build it anew with other numbers")
    check_positions(config, length, f"gating.pool: {name}")


def check_positions(config: PretrainedConfig, length: int | None, name: str) -> None:
    """Refuse sequences to score that are longer than a model takes.

    Raises:
        ConfigError: they are.
    """
    longest = getattr(config, "max_position_embeddings", None)
    if length is not None and longest is not None and length > int(longest):
        raise ConfigError(f"{name} takes {longest} positions and gating.scores.length is {length}; score shorter ones")


def _widest(loras: Sequence[LoRAExpert | None]) -> LoRASection | None:
    there = {name: factors for lora in loras if lora is not None for name, factors in lora.modules.items()}
    if not there:
        return None
    rank = max(factors.rank for lora in loras if lora is not None for factors in lora.modules.values())
    return LoRASection(rank=rank, target_modules=sorted({name.rpartition(".")[2] for name in there}))


# -- scores ----------------------------------------------------------------------------------------------------------


def scoring_stage(plan: GatePlan) -> Stage:
    """Domains' text and experts' samples scored under every expert; shards are dealt out to the devices."""
    config, experts, machine = plan.gating.scores, plan.experts, plan.machine
    texts, samples = plan.texts, experts * config.samples
    rows = math.ceil((texts + samples) / config.batch_size)
    reading, drawing, flops, activations, at_once = Time(), Time(), 0.0, 0.0, []
    for sharing in plan.sharings:
        together = _together(plan, sharing)
        one = sharing.counted.scored(together, config.batch_size, config.length)
        passes = rows * sharing.experts / together
        reading = reading + machine.time(one, "forward").times(passes)
        flops, activations = flops + one.flops * passes, max(activations, one.peak)
        at_once.append(together)
        if samples:
            token = sharing.counted.drawn(config.batch_size, config.length // 2)
            times = math.ceil(config.samples / config.batch_size) * sharing.experts * config.length
            drawing = drawing + machine.time(token, "decode").times(times)
            flops += token.flops * times
    devices = plan.speed.hardware.devices
    time = (reading + drawing).times(1.0 / devices)
    memory = {**plan.memory, "activations": activations}
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
        {"score cache": score_cache_bytes(texts, samples, config.length, experts)},
        {
            "text_sequences": texts,
            "text_tokens": texts * config.length,
            "sample_sequences": samples,
            "tokens_times_experts": (texts + samples) * config.length * experts,
            "seconds_scoring": reading.seconds / devices,
            "seconds_drawing_samples": drawing.seconds / devices,
            "experts_per_pass": max(at_once),
        },
        problems,
    )


def _together(plan: GatePlan, sharing: Sharing) -> int:
    """Experts over one model that share a pass, as `ExpertPool` chooses."""
    busy = BUSY["cpu"] if plan.speed.hardware.device.measured else BUSY_ELSEWHERE
    most = min(LOGITS // int(sharing.counted.config.vocab_size), busy)
    scores = plan.gating.scores
    return max(1, min(sharing.experts, most // (scores.batch_size * scores.length)))


def score_cache_bytes(texts: int, samples: int, length: int, experts: int) -> float:
    """The score cache: log-probabilities, tokens, lengths and clusters.

    N T E x 4  +  N (T + 1) x 4  +  N (4 + 8)            N sequences in all
    """
    sequences = texts + samples
    return float(sequences * length * experts * 4 + sequences * (length + 1) * 4 + sequences * 12)


# -- the gate --------------------------------------------------------------------------------------------------------


def gate_stage(plan: GatePlan) -> Stage:
    """Fitting one gate on the scores, on one CPU core; see `fit_seconds`."""
    gating, domains, experts = plan.gating, plan.domains, plan.experts
    kept = 1.0 - gating.held_out_fraction
    texts, samples = int(plan.texts * kept), int(experts * gating.scores.samples * kept)
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
