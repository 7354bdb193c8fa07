"""Training a model: memory by layout, time, alignments, checkpoints, and the change that would make it fit.

    memory = weights + gradients (4) + Adam (8) bytes per parameter, in shares under FSDP2  +  gathered layers
             + activations of one micro-batch
    overhead of alignments = measurement / (T_r x step)

A measurement, every T_r steps, is the direction (forward and backward of the target's sequences) and what the estimator
costs: forward passes per sequence of the batch or of the groups, and passes over the parameters.
"""

from __future__ import annotations

import math
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from weftlm.errors import ConfigError
from weftlm.mixture.policy import MixturePolicy
from weftlm.planning.counts import Counted
from weftlm.planning.hardware import Hardware, Work
from weftlm.training.alignment import Choice, Cost, Facts, choose_for_policy
from weftlm.training.config import AlignmentConfig, TrainingConfig, estimators

PREFETCHED_UNITS = 2
"""Units that FSDP2 holds whole at once: the one at work and the next."""
UPDATE_BYTES = 80.0
"""Bytes moved per trained parameter by clipping and AdamW, not fused."""
MALLOC_PIECES, LOADED_LATER = 0.8, 2e7
"""On the CPU: memory that glibc's malloc holds beyond what is alive, over the activations (measured 0.6 to 1.1), and
bytes of libraries that are loaded when the first step runs."""
MOST_DEVICES = 1 << 16


@dataclass(frozen=True)
class Run:
    """One training: a model under its `training` section on a number of processes, and the policy of its mixture.

    Attributes:
        policy: Policy of the mixture; None for text that is not mixed.
        alignment: The recipe's `alignment` section.
        groups: Number of groups whose gradients the policy aligns with the target's.
    """

    counted: Counted
    config: TrainingConfig
    hardware: Hardware
    devices: int
    policy: MixturePolicy[Any, Any] | None = None
    alignment: AlignmentConfig = field(default_factory=AlignmentConfig)
    groups: int = 1

    def changed(self, **settings: Any) -> Run:
        """The same under other settings of training."""
        return replace(self, config=self.config.model_copy(update=settings))

    @property
    def sharded(self) -> bool:
        """Whether parameters are split over the processes."""
        return self.config.sharded(self.devices)

    @property
    def share(self) -> float:
        """Part of the parameters that a process holds."""
        return 1.0 / self.devices if self.sharded else 1.0

    @property
    def micro(self) -> int:
        """Sequences of a backward pass on one device."""
        return self.config.micro_batch(self.devices)

    @property
    def passes(self) -> int:
        """Micro-batches of a step on one device."""
        return math.ceil(self.config.local_batch(self.devices) / self.micro)

    @property
    def needs(self) -> frozenset[str]:
        """What the policy needs."""
        return frozenset() if self.policy is None else frozenset(self.policy.needs)

    # -- work -------------------------------------------------------------------------------------------------------

    def work(self, kind: str, sequences: float) -> Work:
        """A device's part of `forward` passes, or `step` with the backward pass; timed in proportion to a step."""
        once: Work = getattr(self.counted, kind)(self.micro, self.config.sequence_length)
        work = once * (sequences / self.devices / self.micro)
        return replace(work, seconds=self.step.seconds * work.flops / self.step.flops)

    def seconds(self, work: Work) -> float:
        """Seconds of work on one device."""
        return self.hardware.time(work, half=self.counted.half)[0]

    @cached_property
    def step(self) -> Work:
        """A device's part of a step of the optimizer."""
        work = self.counted.step(self.micro, self.config.sequence_length) * self.passes
        if self.hardware.probe:
            return replace(work, seconds=self.hardware.probe.step(self.counted, self.config))
        return work + Work(0.0, UPDATE_BYTES * self.share * self.counted.trainable, sent=self.sent)

    @property
    def summed(self) -> float:
        """Bytes that a device sends to sum a gradient over the processes."""
        return 2.0 * 4.0 * (self.devices - 1) / self.devices * self.counted.trainable

    @property
    def sent(self) -> float:
        """Bytes that a device sends per step; FSDP2 gathers all layers twice and reduces gradients for every pass."""
        gathered = (2.0 if self.counted.bf16 else 4.0) * (self.devices - 1) / self.devices * self.counted.parameters
        return (2.0 * gathered + self.summed / 2.0) * self.passes if self.sharded else self.summed

    @cached_property
    def estimator(self) -> tuple[Choice, Cost] | None:
        """The estimator of alignments that training will choose, and what a measurement costs; None: none is needed.

        Raises:
            ConfigError: no estimator can measure them.
        """
        if self.policy is None or not self.needs:
            return None
        choice = choose_for_policy(
            self.policy, self.alignment, model=self.counted.build("meta"), groups=self.groups,
            batch_size=self.config.batch_sequences, processes=self.devices, sharded=self.sharded,
        )  # fmt: skip
        if choice is None:
            return None
        facts = Facts(self.groups, self.config.batch_sequences, self.devices, sharded=self.sharded)
        return choice, estimators[choice.estimator]().cost(facts, choice.probe)

    def alignments(self) -> tuple[Work, dict[str, Any]]:
        """A device's part of all measurements, and figures.

        Raises:
            ConfigError: no estimator can measure them.
        """
        if self.policy is None or self.estimator is None:
            return Work(), {}
        (choice, cost), config = self.estimator, self.alignment
        every: int = self.policy.config.update_every_steps
        updates = self.config.total_steps // every
        if not updates:
            return Work(), {}
        extra = self.groups * config.sequences_per_group if choice.probe == "extra" else 0
        # Sequences are dealt out to the devices, so that each has one at least.
        target, probed = (self.devices * math.ceil(n / self.devices) for n in (config.target_sequences, extra))
        once = self.work("step", target) + self.work("forward", cost.forwards * (probed or self.config.batch_sequences))
        sent = once.flops / self.step.flops * self.sent if self.sharded else self.summed * (1 + cost.reductions)
        once = once + Work(0.0, 4.0 * cost.parameter_passes * self.share * self.counted.trainable, sent=sent)
        return once * updates, {
            "alignment_estimator": f"{choice.estimator} on {choice.probe}: {choice.reason}",
            "alignment_groups": self.groups,
            "alignments": updates,
            "sequences_per_alignment": config.target_sequences + extra,
            "seconds_per_alignment": self.seconds(once),
            "alignment_overhead": self.seconds(once) / (every * self.seconds(self.step)),
        }

    # -- memory -----------------------------------------------------------------------------------------------------

    @cached_property
    def memory(self) -> dict[str, float]:
        """Bytes on a device by what they hold."""
        counted, held = self.counted, self.share * self.counted.trainable
        computing = replace(counted, dtype="bfloat16") if self.sharded and counted.bf16 else counted
        found = {
            "weights": self.share * counted.parameters * counted.item,
            "gradients": 4.0 * held,
            "Adam moments": 8.0 * held,
            "activations": computing.activations(self.micro, self.config.sequence_length),
        }
        if self.sharded:
            found["gathered units"] = PREFETCHED_UNITS * (computing.item + 4.0) * counted.largest_unit
        elif self.passes == 1:  # gradients come into being while activations go
            found["activations"] = max(0.0, found["activations"] - found["gradients"])
        if "reference_losses" in self.needs:
            found["reference model"] = found["weights"]
        with suppress(ConfigError):  # said by `alignments`
            if self.estimator is not None:
                found["direction"] = 4.0 * held
                found["estimator"] = self.estimator[1].bytes_per_parameter * held
        if self.hardware.probe:
            found["pieces malloc keeps"] = MALLOC_PIECES * found["activations"]
            found["Python and libraries"] = LOADED_LATER + self.hardware.probe.resident
        return {what: size for what, size in found.items() if size}

    @property
    def fits(self) -> bool:
        """Whether a device holds it."""
        return sum(self.memory.values()) <= self.hardware.memory

    @property
    def shortage(self) -> str:
        """Memory that is needed and memory there is, for a message."""
        have = self.hardware.device.memory
        return f"{sum(self.memory.values()) / 1e9:.1f} GB on a device of {have / 1e9:.0f} GB"

    @property
    def disk(self) -> dict[str, float]:
        """Bytes of the checkpoints that are kept, with two moments per trained parameter, and of the model."""
        counted, config = self.counted, self.config
        weights = float(counted.trainable * (counted.item if counted.adapter is None else 4))
        kept = min(config.keep_checkpoints, math.ceil(config.total_steps / config.save_every_steps))
        return {"checkpoints": (weights + 8.0 * counted.trainable) * kept, "model": weights}

    def fitting(self) -> tuple[Run, str, tuple[str, ...]]:
        """The layout that was asked for where it fits, else FSDP2; where neither fits, the smallest change that does.

        Returns:
            The run as it is planned, its layout with the reason, and problems.
        """
        asked, run = self.config.parallel, self
        for layout in [asked] if self.devices == 1 else dict.fromkeys([asked, "fsdp2"]):
            run = self.changed(parallel=layout)
            if run.fits:
                why = (
                    "as asked, and it fits"
                    if layout == asked
                    else f"{asked} does not fit; set training.parallel: fsdp2"
                )
                return run, f"{layout}: {why}", ()
        one, recompute = "training.micro_batch_sequences: 1", "model.gradient_checkpointing: true"
        recomputing = replace(run, counted=replace(run.counted, checkpointing=True))
        smallest, devices = recomputing.changed(micro_batch_sequences=1), max(2, run.devices)
        changes = {
            one: run.changed(micro_batch_sequences=1), recompute: recomputing, f"{recompute} and {one}": smallest,
        }  # fmt: skip
        cure = next((f"set {what}" for what, changed in changes.items() if changed.fits), None)
        while cure is None and devices <= MOST_DEVICES and not run.hardware.probe:
            sequences = max(devices, run.config.batch_sequences)
            if replace(smallest, devices=devices).changed(parallel="fsdp2", batch_sequences=sequences).fits:
                cure = f"take {devices} devices with training.parallel: fsdp2, {recompute} and {one}"
            devices *= 2
        problem = f"training needs {run.shortage} with {run.config.parallel}; {cure or 'take a smaller model, or LoRA'}"
        return run, f"{run.config.parallel}: does not fit", (problem,)
