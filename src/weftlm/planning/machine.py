"""From counts to seconds: a roofline for known accelerators, real passes timed on this machine's CPU.

    accelerator    t = max( FLOPs / (peak u),  bytes / bandwidth,  kernels x launch )
    this machine   t = seconds of a real pass x FLOPs / FLOPs of that pass                           (`probe.py`)

u is the model-FLOPs utilisation. Bytes are those of operations one by one; compiled, elementwise ones are fused and
about half remains, and about a third of the launches.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from weftlm.planning.counts import Counted, Work
from weftlm.planning.hardware import Hardware, Precision
from weftlm.planning.probe import Probe
from weftlm.training.config import TrainingConfig

FUSED_BYTES, FUSED_LAUNCHES = 0.5, 1 / 3
"""Parts of the traffic and of the launches that remain after compilation; an assumption."""
DOES_NOT_FIT = "does not fit"
USABLE = 0.94
"""Part of a device's memory that can be filled; fragmentation and libraries take the rest."""
COMPUTE, MEMORY, OVERHEAD, INTERCONNECT, DISK = "compute", "memory bandwidth", "overhead", "interconnect", "disk"
MEASURED = "measured"

Kind = Literal["step", "forward", "decode"]


@dataclass(frozen=True)
class Time:
    """Seconds, in all and by resource; resources overlap on accelerators."""

    seconds: float = 0.0
    parts: Mapping[str, float] = field(default_factory=dict)

    @property
    def limit(self) -> str:
        """The resource that takes most of the time."""
        return max(self.parts, key=lambda name: self.parts[name]) if any(self.parts.values()) else "nothing"

    def __add__(self, other: Time) -> Time:
        names = {**self.parts, **other.parts}
        return Time(self.seconds + other.seconds, {n: self.parts.get(n, 0.0) + other.parts.get(n, 0.0) for n in names})

    def __mul__(self, count: float) -> Time:
        return Time(self.seconds * count, {name: value * count for name, value in self.parts.items()})


@dataclass(frozen=True)
class Stage:
    """A stage of a plan: what it costs of each resource, and what goes wrong.

    Attributes:
        name: name of the stage.
        what: description in a line.
        time: wall-clock time on all devices; None where none is planned.
        limit: the resource that takes most of the time, or "does not fit".
        flops: floating-point operations over all devices.
        memory: bytes on the fullest device, by what they hold.
        sent: bytes that one device sends in all.
        disk: bytes by what they hold, while the stage runs.
        facts: further figures, each with its unit in its name.
        problems: what will not work, each with what to do.
    """

    name: str
    what: str
    time: Time | None = None
    limit: str = ""
    flops: float = 0.0
    memory: Mapping[str, float] = field(default_factory=dict)
    sent: float = 0.0
    disk: Mapping[str, float] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    problems: tuple[str, ...] = ()

    @property
    def memory_bytes(self) -> float:
        """Bytes on the fullest device."""
        return sum(self.memory.values())

    @property
    def disk_bytes(self) -> float:
        """Bytes on disk while the stage runs."""
        return sum(self.disk.values())

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "name": self.name,
            "what": self.what,
            "seconds": None if self.time is None else self.time.seconds,
            "seconds_by_resource": {} if self.time is None else dict(self.time.parts),
            "limit": self.limit,
            "flops": self.flops,
            "memory_bytes": dict(self.memory),
            "memory_bytes_per_device": self.memory_bytes,
            "sent_bytes_per_device": self.sent,
            "disk_bytes": dict(self.disk),
            "facts": dict(self.facts),
            "problems": list(self.problems),
        }


@dataclass(frozen=True)
class Machine:
    """Time of passes on one device.

    Attributes:
        hardware: the machines.
        mfu: part of the peak that matrix products reach.
        probe: measurements, where the hardware is this machine's CPU.
        precision: precision of matrix products.
        compiled: whether models are compiled.
    """

    hardware: Hardware
    mfu: float
    probe: Probe
    precision: Precision = "fp32"
    compiled: bool = False

    @property
    def measured(self) -> bool:
        """Whether passes are timed on this machine."""
        return self.hardware.device.measured

    @property
    def memory(self) -> float:
        """Bytes of a device that can be filled."""
        return USABLE * self.hardware.device.memory

    def time(self, counted: Counted, kind: Kind, batch: int, length: int) -> Time:
        """One pass over a batch; `length`: the context for `decode`."""
        if self.measured:
            seconds = self.probe.seconds(counted, kind, batch, length)
            return Time(seconds, {MEASURED: seconds})
        work: Work = getattr(counted, kind)(batch, length)
        return self.roofline(work.flops, work.bytes, work.calls)

    def roofline(self, flops: float, moved: float, calls: float) -> Time:
        """Seconds on an accelerator of so many FLOPs, bytes moved and kernels launched."""
        device = self.hardware.device
        traffic, launches = (FUSED_BYTES, FUSED_LAUNCHES) if self.compiled else (1.0, 1.0)
        parts = {
            COMPUTE: flops / (device.peak(self.precision) * self.mfu),
            MEMORY: moved * traffic / device.bandwidth,
            OVERHEAD: calls * launches * device.launch,
        }
        return Time(max(parts.values()), parts)

    def exchange(self, sent: float) -> float:
        """Seconds in which every device sends so many bytes."""
        return sent / self.hardware.exchange if self.hardware.devices > 1 else 0.0

    def training(self, config: TrainingConfig) -> Machine:
        """The same with the precision and compilation that training chooses here."""
        gpu = not self.measured
        return Machine(
            self.hardware, self.mfu, self.probe, "bf16" if config.bf16(fast=gpu) else "fp32", config.compiled(gpu=gpu)
        )
