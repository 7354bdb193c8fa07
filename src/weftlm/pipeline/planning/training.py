"""Training: time of a step, memory of a device, what processes send each other; gradient alignment on top.

step      = micro-batches x (forward + backward) + optimizer + traffic that no computing hides
DDP       sends 2 (n - 1) / n x 4 bytes per trained parameter and step, under the last micro-batch's backward pass
FSDP2     sends (n - 1) / n x (2 gathers of 2 or 4 bytes + 1 sum of 4 bytes) per parameter and micro-batch
memory    4 bytes each for weights, gradients and two Adam moments per parameter (whole, or 1 / n of them and one
          unit at a time), the activations of a micro-batch, and a direction of 4 bytes per parameter for alignment
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from weftlm.errors import ConfigError
from weftlm.mixture.policy import MixturePolicy, MixtureSetting, state_to_json
from weftlm.mixture.sampler import MixtureSampler
from weftlm.pipeline.planning.counts import Counted
from weftlm.pipeline.planning.hardware import Hardware, Precision
from weftlm.pipeline.planning.speed import INTERCONNECT, OVERHEAD, Speed, Time
from weftlm.pipeline.planning.stage import DOES_NOT_FIT, FILE_HEADER, USABLE, Stage
from weftlm.pipeline.planning.trace import Work
from weftlm.training.alignment import Choice, choose_for_policy
from weftlm.training.config import AlignmentConfig, TrainingConfig

DDP, FSDP2 = "ddp", "fsdp2"
PREFETCHED_UNITS = 2
"""Units that FSDP2 holds whole at once: the one at work and the next."""
MALLOC_PIECES = 0.8
"""On the CPU: what glibc's malloc holds beyond what lives, in pieces too small for the next tensor, over the
activations. The same steps need 0.6 to 1.1 of the activations more than where every tensor is mapped by
itself (MALLOC_MMAP_THRESHOLD_)."""
LOADED_LATER = 2e7
"""Bytes of libraries that are loaded when the first step runs, about."""
SEQUENCES_PER_DOMAIN = 1_000_000
"""Stands for the unknown size of a domain where only the length of a counter matters."""


@dataclass(frozen=True)
class Machine:
    """What training meets on a device.

    Attributes:
        speed: of one device.
        precision: matrix products are computed in.
        compiled: by torch.compile.
    """

    speed: Speed
    precision: Precision
    compiled: bool

    @property
    def hardware(self) -> Hardware:
        """The machines."""
        return self.speed.hardware

    def time(self, work: Work, kind: Any) -> Time:
        """Of a work on one device."""
        return self.speed.time(work, kind, self.precision, compiled=self.compiled)


def machine_for(config: TrainingConfig, speed: Speed) -> Machine:
    """Precision and compilation as `weftlm train` chooses them on this hardware."""
    cpu = speed.hardware.device.measured
    bf16 = config.precision == "bf16" or (config.precision == "auto" and not cpu)
    compiled = not cpu if config.compile == "auto" else bool(config.compile)
    return Machine(speed, "bf16" if bf16 else "fp32", compiled)


@dataclass(frozen=True)
class Run:
    """One model trained: the model, its settings, where.

    Attributes:
        counted: the model.
        config: the recipe's `training` section.
        machine: what it runs on.
        devices: processes that share a batch.
        parallel: ddp or fsdp2.
    """

    counted: Counted
    config: TrainingConfig
    machine: Machine
    devices: int
    parallel: str = DDP

    @property
    def sequences(self) -> int:
        """Of a step, on one device."""
        return max(1, self.config.batch_sequences // self.devices)

    @property
    def micro(self) -> int:
        """Sequences of a backward pass."""
        return min(self.config.micro_batch_sequences or self.sequences, self.sequences)

    def pieces(self, sequences: int) -> list[tuple[int, int]]:
        """How many micro-batches of which size so many sequences make."""
        whole, rest = divmod(sequences, self.micro)
        return [(count, size) for count, size in ((whole, self.micro), (1 if rest else 0, rest)) if count]

    # -- time ---------------------------------------------------------------------------------------------------

    def step_work(self) -> tuple[Work, Work]:
        """Forward and backward of a step's micro-batches on one device, and its optimizer."""
        length, found, first = self.config.sequence_length, Work(), True
        for count, size in self.pieces(self.sequences):
            if first:
                found = found + self.counted.step(size, length)
                count, first = count - 1, False
            if count:
                found = found + self.counted.step(size, length, accumulating=True).times(count)
        return found, self.counted.optimizer()

    def sent(self) -> float:
        """Bytes a device sends per step."""
        n, sizes = self.devices, self.counted.sizes
        if n == 1:
            return 0.0
        if self.parallel == DDP:
            return 2.0 * (n - 1) / n * 4.0 * sizes.trainable
        gathered = 2.0 if self.machine.precision == "bf16" else 4.0
        passes = sum(count for count, _ in self.pieces(self.sequences))
        return (n - 1) / n * (2.0 * gathered + 4.0) * sizes.parameters * passes

    def step_time(self) -> Time:
        """Seconds of a step and what they go into; traffic counts as far as nothing hides it."""
        work, optimizer = self.step_work()
        machine = self.machine
        computing = machine.time(work, "step")
        parts = dict(computing.parts)
        share = 1.0 / self.devices if self.parallel == FSDP2 else 1.0
        after = machine.time(optimizer, "optimizer").times(share)
        for name, seconds in after.parts.items():
            parts[name] = parts.get(name, 0.0) + seconds
        if machine.hardware.device.measured:
            extra = machine.speed.calibration.loop_seconds(
                self.sequences, self.config.sequence_length, sum(count for count, _ in self.pieces(self.sequences))
            )
            parts[OVERHEAD] += extra
            return Time(computing.seconds + after.seconds + extra, parts)
        passes = sum(count for count, _ in self.pieces(self.sequences))
        hidden = computing.seconds if self.parallel == FSDP2 else 2 / 3 * computing.seconds / passes
        traffic = machine.speed.exchange(self.sent())
        parts[INTERCONNECT] = traffic
        return Time(computing.seconds + after.seconds + max(0.0, traffic - hidden), parts)

    # -- memory -------------------------------------------------------------------------------------------------

    def memory(self, *, aligning: bool = False, reference_bytes: float = 0.0) -> dict[str, float]:
        """Bytes on a device by what they hold."""
        sizes, n = self.counted.sizes, self.devices
        split = self.parallel == FSDP2 and n > 1
        share = 1.0 / n if split else 1.0
        found = {
            "weights": share * sizes.weight_bytes,
            "gradients": share * 4.0 * sizes.trainable,
            "Adam moments": share * 8.0 * sizes.trainable,
        }
        counted = self.counted
        if split:
            item = 2.0 if self.machine.precision == "bf16" else 4.0
            found["gathered units"] = PREFETCHED_UNITS * (item + 4.0) * sizes.largest_unit
            if self.machine.precision == "bf16":
                counted = dataclasses.replace(counted, dtype="bfloat16", _cache={})
        alone = not split and self.micro == self.sequences
        step = counted.step(self.micro, self.config.sequence_length, accumulating=not alone)
        found["activations"] = max(0.0, step.peak - (step.kept if alone else 0.0))
        if aligning:
            found["direction"] = share * 4.0 * sizes.trainable
        if reference_bytes:
            found["reference model"] = share * reference_bytes
        if self.machine.hardware.device.measured:
            found["pieces malloc keeps"] = MALLOC_PIECES * found["activations"]
            found["Python and libraries"] = LOADED_LATER + self.machine.speed.calibration.resident
        return found

    def fits(self, **arguments: Any) -> bool:
        """Whether a device holds it."""
        return sum(self.memory(**arguments).values()) <= USABLE * self.machine.hardware.device.memory


def settle(run: Run, **memory: Any) -> tuple[Run, str, tuple[str, ...]]:
    """The layout that fits: the one asked for, else FSDP2; where neither does, what would.

    Returns:
        the run as it is planned, what was chosen and why, and problems.
    """
    asked = run.config.parallel
    ways = [asked] if run.devices == 1 else list(dict.fromkeys([asked, FSDP2]))
    for way in ways:
        tried = dataclasses.replace(run, parallel=way)
        if tried.fits(**memory):
            if way == asked:
                return tried, f"{way}: as asked, and it fits", ()
            return tried, f"{way}: {asked} does not fit; set training.parallel: {way}", ()
    last = dataclasses.replace(run, parallel=ways[-1])
    needed = sum(last.memory(**memory).values())
    have = run.machine.hardware.device.memory
    message = (
        f"training needs {needed / 1e9:.1f} GB on a device of {have / 1e9:.0f} GB with {ways[-1]}; "
        f"{_remedy(last, **memory)}"
    )
    return last, f"{ways[-1]}: the smaller of what there is, and it does not fit", (message,)


def _remedy(run: Run, **memory: Any) -> str:
    """The smallest change that makes a run fit."""
    recomputing = dataclasses.replace(run, counted=dataclasses.replace(run.counted, checkpointing=True, _cache={}))
    one = run.config.model_copy(update={"micro_batch_sequences": 1})
    for changed, what in (
        (dataclasses.replace(run, config=one), "set training.micro_batch_sequences: 1"),
        (recomputing, "set model.gradient_checkpointing: true"),
        (
            dataclasses.replace(recomputing, config=one),
            "set model.gradient_checkpointing: true and training.micro_batch_sequences: 1",
        ),
    ):
        if changed.fits(**memory):
            return what
    smallest = dataclasses.replace(recomputing, config=one)
    if run.machine.hardware.device.measured:
        return "take a smaller model, or LoRA (model.lora) over a pretrained one"
    devices = max(2, run.devices)
    while devices <= 1 << 16:
        hardware = run.machine.hardware.of(devices)
        machine = dataclasses.replace(run.machine, speed=dataclasses.replace(run.machine.speed, hardware=hardware))
        wider = dataclasses.replace(smallest, machine=machine, devices=devices, parallel=FSDP2)
        if wider.fits(**memory):
            return (
                f"take {devices} devices with training.parallel: fsdp2, model.gradient_checkpointing: true and "
                "training.micro_batch_sequences: 1"
            )
        devices *= 2
    return "no number of these devices holds it: one layer or the activations of one sequence are too large"


# -- the base --------------------------------------------------------------------------------------------------------


def training_stage(
    run: Run, policy: MixturePolicy[Any], layout: str, problems: Sequence[str], *, aligning: bool, domains: int
) -> Stage:
    """The model of a recipe trained on its mixture, with the reference model of policies that need one."""
    config, steps = run.config, run.config.total_steps
    step = run.step_time()
    work, optimizer = run.step_work()
    tokens = steps * config.batch_sequences * config.sequence_length
    flops = work.flops * run.devices * steps
    time, sizes = step.times(steps), run.counted.sizes
    facts: dict[str, Any] = {
        "parameters": sizes.parameters,
        "trainable_parameters": sizes.trainable,
        "steps": steps,
        "tokens": tokens,
        "flops_per_token": work.flops / (run.sequences * config.sequence_length),
        "seconds_per_step": step.seconds,
        "tokens_per_second": config.batch_sequences * config.sequence_length / step.seconds,
        "layout": layout,
        "micro_batches_per_step": sum(count for count, _ in run.pieces(run.sequences)),
        "sequences_per_micro_batch": run.micro,
        "optimizer_bytes_moved_per_step": optimizer.bytes,
    }
    reference = 0.0
    if "reference_losses" in policy.needs:
        passes = run.counted.forward(run.micro, config.sequence_length).times(run.sequences / run.micro)
        beside = run.machine.time(passes, "forward").times(steps)
        time, flops, reference = time + beside, flops + passes.flops * run.devices * steps, sizes.weight_bytes
        facts["seconds_of_reference_losses"] = beside.seconds
        if getattr(policy.config, "reference", None) is None:
            own = step.times(steps)
            time, flops = time + own, flops + work.flops * run.devices * steps
            facts["seconds_of_training_the_reference"] = own.seconds
    return Stage(
        "training",
        f"{sizes.parameters / 1e6:,.1f}M parameters, {tokens:,} tokens, mixture {policy.config.policy}",
        time,
        DOES_NOT_FIT if problems else time.limit,
        flops,
        run.memory(aligning=aligning, reference_bytes=reference),
        run.sent() * steps,
        training_disk(run, domains, policy),
        facts,
        tuple(problems),
    )


def training_disk(run: Run, domains: int, policy: MixturePolicy[Any]) -> dict[str, float]:
    """Checkpoints that are kept and one in the making, and the model.

    checkpoint = trained parameters x (weights + 8) + buffers and names + the state of sampler and policy as JSON
    """
    sizes = run.counted.sizes
    tensors = run.counted.sizes.tensors
    weights = sizes.weight_bytes if run.counted.adapter is None else 4.0 * sizes.trainable
    saves = math.ceil(run.config.total_steps / run.config.save_every_steps)
    state = state_bytes(domains, policy)
    checkpoint = weights + 8.0 * sizes.trainable + 3 * tensors * FILE_HEADER + state
    kept = min(run.config.keep_checkpoints, saves)
    return {
        "checkpoints": checkpoint * kept,
        "checkpoint being written": checkpoint if saves > kept else 0.0,
        "model": weights + tensors * FILE_HEADER,
    }


def state_bytes(domains: int, policy: MixturePolicy[Any]) -> float:
    """Sampler and policy as a checkpoint's JSON holds them: they are made, for that many domains, and written."""
    names = [f"domain {i}" for i in range(domains)]
    sampler = MixtureSampler([SEQUENCES_PER_DOMAIN] * domains, max(domains, 1), 0, names=names)
    state = policy.init(setting_of(names, policy))
    held = [_plain(sampler.state_dict()), state_to_json(state), [0.0] * 4 * domains]
    return float(len(json.dumps(held)))


def setting_of(names: Sequence[str], policy: MixturePolicy[Any], groups: int = 16) -> MixtureSetting:
    """Stands for what is known of the domains before training."""
    domains = len(names)
    uniform = torch.full((domains,), 1.0 / domains, dtype=torch.float64)
    basis = uniform.repeat(groups, 1) if "basis" in policy.needs else None
    return MixtureSetting(tuple(names), torch.full((domains,), 1e6, dtype=torch.float64), uniform, basis)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, np.ndarray):
        return value.tolist()
    return value.item() if isinstance(value, np.generic) else value


# -- alignment -------------------------------------------------------------------------------------------------------


def alignment_choice(
    run: Run, alignment: AlignmentConfig, policy: MixturePolicy[Any], groups: int
) -> tuple[Choice | None, str]:
    """The estimator `weftlm train` will settle on, and a problem where there is none."""
    try:
        choice = choose_for_policy(
            policy, alignment, model=run.counted.outline(), groups=groups, batch_size=run.config.batch_sequences,
            accumulation_steps=math.ceil(run.sequences / run.micro), processes=run.devices,
            sharded=run.parallel == FSDP2 and run.devices > 1,
        )  # fmt: skip
    except ConfigError as error:
        return None, str(error)
    return choice, ""


def measurement(run: Run, alignment: AlignmentConfig, choice: Choice, groups: int) -> tuple[dict[str, Work], float]:
    """One measurement of all groups on one device, in parts, and the sequences behind it over all devices.

    direction            forward and backward of the target's sequences
    shadow on the batch  each module's shadow term                               2 N FLOPs per token at most
    cumulative           a dot product per micro-batch
    separate             forward and backward of the groups' sequences, a dot product per group
    shadow, extra        forward, backward through activations, shadow term
    finite_difference    two forward passes, and the parameters moved four times
    """
    length, counted = run.config.sequence_length, run.counted

    def in_pieces(sequences: int, make: Any) -> Work:
        found = Work()
        for count, size in run.pieces(sequences):
            found = found + make(size).times(count)
        return found

    def gradient(size: int) -> Work:
        return counted.step(size, length)

    target = max(1, math.ceil(alignment.target_sequences / run.devices))
    parts = {"direction": in_pieces(target, gradient)}
    extra = groups * alignment.sequences_per_group if choice.probe == "extra" else 0
    own = math.ceil(extra / run.devices)
    dot = counted.passes_over_parameters(products=1, copies=0)
    if choice.estimator == "cumulative":
        pieces = max(math.ceil(run.sequences / run.micro), min(groups, run.sequences))
        parts["dot products"] = dot.times(pieces)
    elif choice.estimator == "separate":
        of_group = max(1, math.ceil(alignment.sequences_per_group / run.devices))
        parts["groups' gradients"] = in_pieces(of_group, gradient).times(min(groups, own))
        parts["dot products"] = dot.times(groups)
    elif choice.estimator == "shadow" and choice.probe == "batch":
        parts["shadow terms"] = in_pieces(run.sequences, lambda size: counted.shadow(size, length))
    elif choice.estimator == "shadow":
        parts["activations' gradients"] = in_pieces(own, lambda size: counted.activation_step(size, length))
        parts["shadow terms"] = in_pieces(own, lambda size: counted.shadow(size, length))
    else:
        parts["forward passes"] = in_pieces(own, lambda size: counted.forward(size, length)).times(2)
        parts["parameters moved"] = counted.passes_over_parameters(products=0, copies=4)
    return parts, float(alignment.target_sequences + extra)


def _sent_by_measuring(run: Run, alignment: AlignmentConfig, choice: Choice, groups: int) -> float:
    """Bytes a device sends per measurement.

    DDP sums the direction, and for `separate` every group's gradient: 2 (n - 1) / n x 4 bytes per parameter each. FSDP2
    gathers the layers for every pass, as in training.
    """
    n, sizes = run.devices, run.counted.sizes
    if n == 1:
        return 0.0
    if run.parallel == DDP:
        return 2.0 * 4.0 * (n - 1) / n * sizes.trainable * (1 + (groups if choice.estimator == "separate" else 0))
    gathered = 2.0 if run.machine.precision == "bf16" else 4.0
    own = math.ceil(groups * alignment.sequences_per_group / n)
    backward = sum(count for count, _ in run.pieces(max(1, math.ceil(alignment.target_sequences / n))))
    forward = 2 * sum(count for count, _ in run.pieces(own))
    return (n - 1) / n * sizes.parameters * (backward * (2.0 * gathered + 4.0) + forward * gathered)


def alignment_stage(
    run: Run, alignment: AlignmentConfig, policy: MixturePolicy[Any], choice: Choice, groups: int
) -> Stage:
    """Measuring gradient alignment beside training, every T_r steps.

    overhead = measurement / (T_r x step)
    """
    every, steps = policy.config.update_every_steps, run.config.total_steps
    updates = steps // every
    parts, sequences = measurement(run, alignment, choice, groups)
    once = Time()
    for name, work in parts.items():
        kind = "forward" if name in ("forward passes", "shadow terms") else "step"
        once = once + run.machine.time(work, "optimizer" if name in ("dot products", "parameters moved") else kind)
    if run.machine.hardware.device.measured and choice.estimator == "shadow":
        pieces = sum(count for count, _ in run.pieces(int(sequences) - alignment.target_sequences or run.sequences))
        host = run.machine.speed.calibration.shadow_seconds() * run.counted.sizes.modules * pieces
        once = once + Time(host, {OVERHEAD: host})
    flops = sum(work.flops for work in parts.values()) * run.devices
    sent = _sent_by_measuring(run, alignment, choice, groups)
    traffic = run.machine.speed.exchange(sent)
    hidden = once.seconds if run.parallel == FSDP2 else 0.0
    once = once + Time(max(0.0, traffic - hidden), {INTERCONNECT: traffic})
    extra = {"finite_difference": 4.0, "separate": 1.6, "cumulative": 0.0, "shadow": 0.0}[choice.estimator]
    share = 1.0 / run.devices if run.parallel == FSDP2 else 1.0
    time = once.times(updates)
    return Stage(
        "alignment",
        f"{choice.estimator} on {'the batch' if choice.probe == 'batch' else 'extra sequences'}, {groups} groups, "
        f"every {every} steps",
        time,
        time.limit,
        flops * updates,
        {"direction": share * 4.0 * run.counted.sizes.trainable, "copies": share * extra * run.counted.sizes.trainable},
        sent * updates,
        {},
        {
            "estimator": choice.estimator,
            "probe": choice.probe,
            "reason": choice.reason,
            "groups": groups,
            "updates": updates,
            "sequences_per_measurement": sequences,
            "seconds_per_measurement": once.seconds,
            "overhead": once.seconds / (every * run.step_time().seconds),
        },
    )
