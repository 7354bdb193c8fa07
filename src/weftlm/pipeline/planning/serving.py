"""Serving: generation by a plain, a routed or a gated model, alone and for many requests at once.

KV cache      2 L (KV heads) (head width) x bytes, per token of a request; of a gated model, once per expert
time/token    max of weights and cache read, FLOPs, and launches; one copy per device, or over as many devices as
              its weights need, which then work one after the other
gated         every expert reads every token; with m experts per token those the gate prefers do, and the others
              catch up in pieces of `refresh_every` tokens
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from weftlm.pipeline.planning.counts import Counted
from weftlm.pipeline.planning.experts import PoolPlan, pool_memory, routing_work
from weftlm.pipeline.planning.gates import GatePlan, Sharing
from weftlm.pipeline.planning.speed import COMPUTE, MEMORY, OVERHEAD, Speed, Time
from weftlm.pipeline.planning.stage import DOES_NOT_FIT, USABLE, Stage
from weftlm.pipeline.planning.trace import Work
from weftlm.pipeline.planning.training import Machine

Token = Callable[[Machine, int, int], Time]


@dataclass(frozen=True)
class Served:
    """A model as generation meets it.

    Attributes:
        name: of the stage.
        what: kind of model, in words.
        weights: bytes by what they hold.
        kv_bytes: keys and values of one token of a request.
        dtype: its parameters are held in.
        first: seconds for a prompt of so many tokens on a machine.
        token: seconds for one token of so many requests behind a context.
        fewer: the same where so many experts work on a token, by their number.
    """

    name: str
    what: str
    weights: Mapping[str, float]
    kv_bytes: float
    dtype: str
    first: Callable[[Machine, int], Time]
    token: Token
    fewer: Mapping[int, Token]


def plain(counted: Counted) -> Served:
    """One model."""
    return Served(
        "serving", "plain model", {"weights": float(counted.sizes.weight_bytes)}, counted.sizes.kv_bytes, counted.dtype,
        lambda machine, prompt: machine.time(counted.prefill(1, prompt), "forward"),
        lambda machine, batch, context: machine.time(counted.decode(batch, context), "decode"),
        {},
    )  # fmt: skip


def routed(pool: PoolPlan, chosen: int) -> Served:
    """A base and experts, of which a router chooses so many per token and module."""
    bare = _as_served(pool.bare)
    base = plain(bare)

    def first(machine: Machine, prompt: int) -> Time:
        alone = base.first(machine, prompt)
        return alone + _routing(machine, pool, prompt, chosen, alone, bare.prefill(1, prompt))

    def token(machine: Machine, batch: int, context: int) -> Time:
        alone = base.token(machine, batch, context)
        return alone + _routing(machine, pool, batch, chosen, alone, bare.decode(batch, context))

    return Served("serving", "routed model", pool_memory(pool), base.kv_bytes, base.dtype, first, token, {})


def gated(plan: GatePlan) -> Served:
    """Experts under one gate. What the gate does beside them is measured on the CPU, and left out elsewhere."""
    sharings = tuple(replace(sharing, counted=_as_served(sharing.counted)) for sharing in plan.sharings)

    def first(machine: Machine, prompt: int) -> Time:
        reading = [machine.time(each.counted.mixed(each.experts, 1, 0, prompt), "forward") for each in sharings]
        return sum(reading, _gate(machine, prompt))

    def token(machine: Machine, batch: int, context: int) -> Time:
        passes = [machine.time(each.counted.mixed(each.experts, batch, context), "decode") for each in sharings]
        return sum(passes, _gate(machine))

    def of(kept: int) -> Token:
        def token(machine: Machine, batch: int, context: int) -> Time:
            found = _gate(machine)
            for each in sharings:
                found = found + _awake(machine, each, kept / plan.experts, batch, context)
                if (piece := plan.gating.students.refresh_every) is not None:
                    found = found + _caught_up(machine, each, kept / plan.experts, batch, context, piece)
            return found

        return token

    return Served(
        "gated serving",
        f"gate over {plan.experts:,} experts",
        plan.memory,
        sum(each.experts * each.counted.sizes.kv_bytes for each in sharings),
        sharings[0].counted.dtype,
        first,
        token,
        {kept: of(kept) for kept in plan.gating.students.experts_per_token if kept < plan.experts},
    )


def _as_served(counted: Counted) -> Counted:
    """A model in the type its parameters are held in: nothing is cast while it serves."""
    return replace(counted, bf16=False, _cache={})


def _awake(machine: Machine, sharing: Sharing, share: float, batch: int, context: int) -> Time:
    """The preferred experts' part of a token, where each request prefers any expert with the same chance.

    Over one model they run together, and the model runs at all where any of the requests prefers any of them:

        rows = batch x experts x share          P(it runs) = 1 - (1 - min(1, experts x share)) ^ batch
    """
    rows = batch * sharing.experts * share
    runs = 1.0 - (1.0 - min(1.0, sharing.experts * share)) ** batch
    one = sharing.counted.mixed(1, max(1, round(rows / runs)), context)
    return machine.time(one, "decode").times(runs)


def _caught_up(machine: Machine, sharing: Sharing, share: float, batch: int, context: int, piece: int) -> Time:
    """Reading what was missed, per token: over one model all experts read it again as soon as one of them has to."""
    alone = sharing.experts == 1 and batch == 1
    work = sharing.counted.mixed(sharing.experts, batch, context, piece)
    return machine.time(work, "forward").times((1.0 - share if alone else 1.0) / piece)


def _gate(machine: Machine, prompt: int = 0) -> Time:
    """What a gate does of a generated token beside its experts, or of a prompt."""
    if not machine.hardware.device.measured:
        return Time()
    generated, read = machine.speed.calibration.gate_seconds()
    seconds = generated + read * prompt
    return Time(seconds, {OVERHEAD: seconds})


def serving_stage(served: Served, speed: Speed, *, prompt: int, new: int, requests: int) -> Stage:
    """Generation by one copy of a model: tokens per second alone and for many requests at once.

    Args:
        served: the model.
        speed: of one device.
        prompt: tokens of a prompt.
        new: tokens generated for a request.
        requests: at once, at most; fewer where memory does not hold their caches.
    """
    machine = Machine(speed, "fp32" if served.dtype == "float32" else "bf16", compiled=False)
    have, held = USABLE * speed.hardware.device.memory, sum(served.weights.values())
    cache = served.kv_bytes * (prompt + new)
    needed = max(1, math.ceil((held + cache) / have))
    facts: dict[str, Any] = {
        "kv_bytes_per_token": served.kv_bytes,
        "devices_per_copy": needed,
        "copies": speed.hardware.devices // needed,
        "requests_in_memory": int(max(0.0, needed * have - held) // cache),
        "prompt_tokens": prompt,
        "new_tokens": new,
    }
    at_once = max(1, min(requests, facts["requests_in_memory"]))
    beside = Time()
    if speed.hardware.device.measured:
        seconds = speed.calibration.token_seconds()
        beside = Time(seconds, {OVERHEAD: seconds})
    limit = MEMORY
    for batch in dict.fromkeys((1, at_once)):
        time = served.token(machine, batch, prompt + new // 2) + beside
        facts[f"tokens_per_second_at_{batch}"] = batch / time.seconds
        facts[f"limit_at_{batch}"] = limit = time.limit
        for kept, token in served.fewer.items():
            fewer = token(machine, batch, prompt + new // 2) + beside
            facts[f"tokens_per_second_at_{batch}_with_{kept}_per_token"] = batch / fewer.seconds
    facts["seconds_to_first_token"] = served.first(machine, prompt).seconds
    problems: tuple[str, ...] = ()
    if needed > speed.hardware.devices:
        problems = (
            f"one copy needs {held / 1e9:.0f} GB and a request {cache / 1e9:.3g} GB, {needed} devices; there are "
            f"{speed.hardware.devices}: take more, or hold it in bfloat16",
        )
    return Stage(
        served.name,
        f"{served.what}, prompts of {prompt}, {new} new tokens",
        None,
        DOES_NOT_FIT if problems else limit,
        0.0,
        {**{name: size / needed for name, size in served.weights.items()}, "KV cache": cache * at_once / needed},
        0.0,
        {},
        facts,
        problems,
    )


def _routing(machine: Machine, pool: PoolPlan, tokens: int, chosen: int, base: Time, work: Work) -> Time:
    """Routing's share of a pass; on the CPU in proportion to the base's operations and bytes."""
    added = routing_work(pool, tokens, chosen)
    if not machine.hardware.device.measured:
        return machine.time(added, "forward")
    more = added.bytes / machine.speed.calibration.bytes_per_second()
    compute = base.parts.get(COMPUTE, 0.0) * added.flops / max(1.0, work.flops)
    host = added.calls * machine.speed.calibration.overhead("forward") * 4
    return Time(more + compute + host, {MEMORY: more, COMPUTE: compute, OVERHEAD: host})
