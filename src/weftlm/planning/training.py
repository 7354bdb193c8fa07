"""Training: time of a step, memory of a device, traffic between processes; gradient alignment on top.

step      = micro-batches x (forward + backward) + optimizer + traffic that no computing hides
DDP       sends 2 (n - 1) / n x 4 bytes per trained parameter and step, under the last micro-batch's backward pass
FSDP2     sends (n - 1) / n x (2 gathers of 2 or 4 bytes + 1 sum of 4 bytes) per parameter and micro-batch
memory    4 bytes each for weights, gradients and two Adam moments per parameter (whole, or 1 / n of them and one
          unit at a time), the activations of a micro-batch, and a direction of 4 bytes per parameter for alignment
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from weftlm.errors import ConfigError
from weftlm.mixture.policy import MixturePolicy
from weftlm.planning.counts import Counted
from weftlm.planning.machine import DOES_NOT_FIT, INTERCONNECT, MEASURED, Kind, Machine, Stage, Time
from weftlm.training.alignment import Choice, Facts, choose_for_policy
from weftlm.training.config import AlignmentConfig, TrainingConfig, estimators

PREFETCHED_UNITS = 2
"""Units that FSDP2 holds whole at once: the one at work and the next."""
OPTIMIZER_BYTES, OPTIMIZER_CALLS = 80.0, 20.0
"""Bytes moved per trained parameter, and kernels per trained tensor, of clipping and AdamW, not fused."""
MALLOC_PIECES = 0.8
"""On the CPU: memory that glibc's malloc holds beyond what is alive, over the activations; measured 0.6 to 1.1."""
LOADED_LATER = 2e7
"""Bytes of libraries that are loaded when the first step runs, about."""
FILE_HEADER = 128
"""Bytes of a safetensors header per tensor, about."""
STATE_BYTES = 60
"""Bytes per domain of sampler and policy in a checkpoint, about."""
MOST_DEVICES = 1 << 16


@dataclass(frozen=True)
class Run:
    """One training: a model and its settings on a number of processes.

    Attributes:
        counted: the model.
        config: the `training` section.
        machine: the device it runs on.
        devices: processes that share a batch.
        extra: further bytes that are held in shares like the weights, by what they hold (direction, reference model).
    """

    counted: Counted
    config: TrainingConfig
    machine: Machine
    devices: int
    extra: tuple[tuple[str, float], ...] = ()

    @property
    def sharded(self) -> bool:
        """Whether parameters are split over the processes."""
        return self.config.sharded(self.devices)

    @property
    def micro(self) -> int:
        """Sequences of a backward pass on one device."""
        return self.config.micro_batch(self.devices)

    @property
    def passes(self) -> int:
        """Micro-batches of a step on one device."""
        return math.ceil(self.config.local_batch(self.devices) / self.micro)

    def changed(self, **settings: Any) -> Run:
        """The same under other settings of training."""
        return replace(self, config=self.config.model_copy(update=settings))

    def time(self, kind: Kind, sequences: float) -> Time:
        """Passes over so many sequences on one device, in micro-batches."""
        return self.machine.time(self.counted, kind, self.micro, self.config.sequence_length) * (sequences / self.micro)

    def flops(self, kind: Kind, sequences: float) -> float:
        """FLOPs of the same."""
        work = getattr(self.counted, kind)(self.micro, self.config.sequence_length)
        return float(work.flops * sequences / self.micro)

    @property
    def step_flops(self) -> float:
        """FLOPs of a step over all devices."""
        return self.flops("step", self.config.batch_sequences)

    @cached_property
    def step_time(self) -> Time:
        """A step; traffic counts as far as nothing hides it."""
        if self.machine.measured:
            seconds = self.machine.probe.training_step(self.counted, self.config)
            return Time(seconds, {MEASURED: seconds})
        computing = self.time("step", self.config.local_batch(self.devices))
        sizes, share = self.counted.sizes, 1.0 / self.devices if self.sharded else 1.0
        moved = OPTIMIZER_BYTES * sizes.trainable * share
        updating = self.machine.roofline(0.0, moved, OPTIMIZER_CALLS * sizes.tensors)
        hidden = computing.seconds if self.sharded else 2 / 3 * computing.seconds / self.passes
        return computing + updating + self.traffic(self.sent, hidden)

    def traffic(self, sent: float, hidden: float) -> Time:
        """Sending so many bytes while so many seconds of computing hide it."""
        seconds = self.machine.exchange(sent)
        return Time(max(0.0, seconds - hidden), {INTERCONNECT: seconds})

    @property
    def sent(self) -> float:
        """Bytes that a device sends per step."""
        if not self.sharded:
            return self.summed_bytes if self.devices > 1 else 0.0
        return (2.0 * self.gathered_bytes + self.summed_bytes / 2.0) * self.passes

    @property
    def summed_bytes(self) -> float:
        """Bytes that a device sends to sum a gradient over the processes."""
        return 2.0 * 4.0 * (self.devices - 1) / self.devices * self.counted.sizes.trainable

    @property
    def gathered_bytes(self) -> float:
        """Bytes that a device sends while all layers are gathered once (FSDP2)."""
        item = 2.0 if self.machine.precision == "bf16" else 4.0
        return item * (self.devices - 1) / self.devices * self.counted.sizes.parameters

    # -- memory -----------------------------------------------------------------------------------------------------

    @cached_property
    def memory(self) -> dict[str, float]:
        """Bytes on a device by what they hold."""
        sizes, counted, share = self.counted.sizes, self.counted, 1.0 / self.devices if self.sharded else 1.0
        found = {
            "weights": share * sizes.weight_bytes,
            "gradients": share * 4.0 * sizes.trainable,
            "Adam moments": share * 8.0 * sizes.trainable,
            **{name: share * size for name, size in self.extra},
        }
        if self.sharded:
            coarse = self.machine.precision == "bf16"
            found["gathered units"] = PREFETCHED_UNITS * ((2.0 if coarse else 4.0) + 4.0) * sizes.largest_unit
            counted = counted.like(dtype="bfloat16") if coarse else counted
        alone = self.passes == 1 and not self.sharded
        step = counted.step(self.micro, self.config.sequence_length, accumulating=not alone)
        found["activations"] = max(0.0, step.peak - (step.kept if alone else 0.0))
        if self.machine.measured:
            found["pieces malloc keeps"] = MALLOC_PIECES * found["activations"]
            found["Python and libraries"] = LOADED_LATER + self.machine.probe.resident
        return found

    @property
    def fits(self) -> bool:
        """Whether a device holds it."""
        return sum(self.memory.values()) <= self.machine.memory


def settle(run: Run) -> tuple[Run, str, tuple[str, ...]]:
    """The layout that fits: the one asked for, else FSDP2; where neither does, what would.

    Returns:
        The run as it is planned, its layout with the reason, and problems.
    """
    asked = run.config.parallel
    layouts = [asked] if run.devices == 1 else list(dict.fromkeys([asked, "fsdp2"]))
    for layout in layouts:
        tried = run.changed(parallel=layout)
        if tried.fits:
            why = (
                "as asked, and it fits" if layout == asked else f"{asked} does not fit; set training.parallel: {layout}"
            )
            return tried, f"{layout}: {why}", ()
    message = (
        f"training needs {sum(tried.memory.values()) / 1e9:.1f} GB on a device of "
        f"{run.machine.hardware.device.memory / 1e9:.0f} GB with {layout}; {smallest_change(tried)}"
    )
    return tried, f"{layout}: the smaller of the layouts, and it does not fit", (message,)


def smallest_change(run: Run) -> str:
    """The smallest change that makes a run fit."""
    recomputing = replace(run, counted=run.counted.like(checkpointing=True))
    one = {"micro_batch_sequences": 1}
    both = "model.gradient_checkpointing: true and training.micro_batch_sequences: 1"
    for changed, what in (
        (run.changed(**one), "set training.micro_batch_sequences: 1"),
        (recomputing, "set model.gradient_checkpointing: true"),
        (recomputing.changed(**one), f"set {both}"),
    ):
        if changed.fits:
            return what
    if run.machine.measured:
        return "take a smaller model, or LoRA (model.lora) over a pretrained one"
    devices = max(2, run.devices)
    while devices <= MOST_DEVICES:
        machine = replace(run.machine, hardware=run.machine.hardware.of(devices))
        wider = replace(recomputing, machine=machine, devices=devices).changed(
            parallel="fsdp2", batch_sequences=max(devices, run.config.batch_sequences), **one
        )
        if wider.fits:
            return f"take {devices} devices with training.parallel: fsdp2, {both}"
        devices *= 2
    return "no number of these devices holds it: one layer or the activations of one sequence are too large"


# -- stages ----------------------------------------------------------------------------------------------------------


def training_stage(run: Run, policy: MixturePolicy[Any], domains: int, layout: str, problems: Sequence[str]) -> Stage:
    """A model trained on its mixture, with the reference model of policies that need one."""
    config, sizes, steps = run.config, run.counted.sizes, run.config.total_steps
    time, flops = run.step_time * steps, run.step_flops * steps
    facts: dict[str, Any] = {
        "parameters": sizes.parameters,
        "trainable_parameters": sizes.trainable,
        "steps": steps,
        "tokens": config.total_tokens,
        "flops_per_token": run.step_flops / (config.batch_sequences * config.sequence_length),
        "seconds_per_step": run.step_time.seconds,
        "tokens_per_second": config.batch_sequences * config.sequence_length / run.step_time.seconds,
        "layout": layout,
        "micro_batches_per_step": run.passes,
        "sequences_per_micro_batch": run.micro,
    }
    if "reference_losses" in policy.needs:
        beside = run.time("forward", config.local_batch(run.devices)) * steps
        time, flops = time + beside, flops + run.flops("forward", config.batch_sequences) * steps
        facts["seconds_of_reference_losses"] = beside.seconds
        if getattr(policy.config, "reference", None) is None:
            time, flops = time + run.step_time * steps, flops + run.step_flops * steps
            facts["seconds_of_training_the_reference"] = run.step_time.seconds * steps
    return Stage(
        "training",
        f"{sizes.parameters / 1e6:,.1f}M parameters, {config.total_tokens:,} tokens, mixture {policy.config.policy}",
        time, DOES_NOT_FIT if problems else time.limit, flops, run.memory, run.sent * steps,
        _training_disk(run, domains), facts, tuple(problems),
    )  # fmt: skip


def _training_disk(run: Run, domains: int) -> dict[str, float]:
    """Checkpoints that are kept, one being written, and the model; weights and two moments per trained parameter."""
    sizes, config = run.counted.sizes, run.config
    weights = sizes.weight_bytes if run.counted.adapter is None else 4.0 * sizes.trainable
    checkpoint = weights + 8.0 * sizes.trainable + 3 * sizes.tensors * FILE_HEADER + STATE_BYTES * domains
    saves = math.ceil(config.total_steps / config.save_every_steps)
    kept = min(config.keep_checkpoints, saves)
    return {
        "checkpoints": checkpoint * kept,
        "checkpoint being written": checkpoint if saves > kept else 0.0,
        "model": weights + sizes.tensors * FILE_HEADER,
    }


def estimator_of(run: Run, config: AlignmentConfig, policy: MixturePolicy[Any], groups: int) -> Choice | None:
    """The estimator that training will choose; None for policies that need no alignment.

    Raises:
        ConfigError: there is none.
    """
    with torch.device("meta"):
        model = run.counted.build()
    return choose_for_policy(
        policy, config, model=model, groups=groups,
        batch_size=run.config.batch_sequences, processes=run.devices, sharded=run.sharded,
    )  # fmt: skip


def alignment_stage(run: Run, config: AlignmentConfig, policy: MixturePolicy[Any], groups: int) -> Stage | None:
    """Gradient alignments measured beside training, every T_r steps; None where none are.

    A measurement is the direction (forward and backward of the target's sequences) and what the estimator costs: a
    number of forward passes per sequence of the batch or of the groups, and of passes over the parameters.

    overhead = measurement / (T_r x step)
    """
    every, steps = policy.config.update_every_steps, run.config.total_steps
    try:
        choice = estimator_of(run, config, policy, groups)
    except ConfigError as error:
        return Stage("alignment", "no estimator can measure it", limit=DOES_NOT_FIT, problems=(str(error),))
    if choice is None or steps < every:
        return None
    extra = groups * config.sequences_per_group if choice.probe == "extra" else 0
    facts = Facts(groups, run.config.batch_sequences, run.devices, sharded=run.sharded)
    cost = estimators[choice.estimator]().cost(facts, choice.probe)
    probed = cost.forwards * (extra or run.config.batch_sequences)
    held = run.counted.sizes.trainable / (run.devices if run.sharded else 1)
    flops = run.flops("step", config.target_sequences) + run.flops("forward", probed)
    if run.machine.measured:
        once = run.step_time * (flops / run.step_flops)
    else:
        once = run.time("step", math.ceil(config.target_sequences / run.devices))
        once = once + run.time("forward", math.ceil(probed / run.devices))
        once = once + run.machine.roofline(0.0, 4.0 * cost.parameter_passes * held, 0.0)
    sent = _sent_by_measuring(run, config.target_sequences, probed, cost.reductions)
    once = once + run.traffic(sent, once.seconds if run.sharded else 0.0)
    updates = steps // every
    memory = {"direction": 4.0 * held, "estimator": cost.bytes_per_parameter * held}
    where = "the batch" if choice.probe == "batch" else "extra sequences"
    return Stage(
        "alignment", f"{choice.estimator} on {where}, {groups} groups, every {every} steps", once * updates,
        once.limit, flops * updates, memory, sent * updates, {},
        {
            "estimator": choice.estimator,
            "probe": choice.probe,
            "reason": choice.reason,
            "groups": groups,
            "updates": updates,
            "sequences_per_measurement": config.target_sequences + extra,
            "seconds_per_measurement": once.seconds,
            "overhead": once.seconds / (every * run.step_time.seconds),
        },
    )  # fmt: skip


def _sent_by_measuring(run: Run, target: int, probed: float, reductions: int) -> float:
    """Bytes a device sends: the direction's sum and the estimator's; FSDP2 gathers layers for every pass instead."""
    if run.devices == 1:
        return 0.0
    if not run.sharded:
        return run.summed_bytes * (1 + reductions)
    micro_batches = math.ceil(target / (run.devices * run.micro))
    direction = micro_batches * (2.0 * run.gathered_bytes + run.summed_bytes / 2.0)
    return direction + run.gathered_bytes * probed / (run.devices * run.micro)
