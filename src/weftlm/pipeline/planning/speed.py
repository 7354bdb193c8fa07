"""From counts to seconds: a roofline for known accelerators, measured kernels for the CPU.

    accelerator    t = max( FLOPs / (peak u),  bytes / bandwidth,  kernels x launch )
    CPU            t = sum of its kernels' measured times + operations x c                      (`calibrate.py`)

u is the model-FLOPs utilisation. Bytes are those of operations one by one; compiled, elementwise ones are fused and
about half remains, and about a third of the launches.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from weftlm.pipeline.planning.calibrate import Calibration, Kind
from weftlm.pipeline.planning.hardware import Hardware, Precision
from weftlm.pipeline.planning.trace import Work

FUSED_BYTES, FUSED_LAUNCHES = 0.5, 1 / 3
"""What compilation leaves of the traffic and of the launches; an assumption."""

COMPUTE, MEMORY, OVERHEAD, INTERCONNECT, DISK = "compute", "memory bandwidth", "overhead", "interconnect", "disk"


@dataclass(frozen=True)
class Time:
    """Seconds, and what they go into.

    Attributes:
        seconds: of the whole.
        parts: seconds by resource; they overlap on accelerators and add up on the CPU.
    """

    seconds: float = 0.0
    parts: Mapping[str, float] = field(default_factory=dict)

    @property
    def limit(self) -> str:
        """The resource most time goes into."""
        return max(self.parts, key=lambda name: self.parts[name]) if any(self.parts.values()) else "nothing"

    def __add__(self, other: Time) -> Time:
        names = {**self.parts, **other.parts}
        return Time(self.seconds + other.seconds, {n: self.parts.get(n, 0.0) + other.parts.get(n, 0.0) for n in names})

    def __sub__(self, other: Time) -> Time:
        return self + other.times(-1.0)

    def times(self, count: float) -> Time:
        """So often."""
        return Time(self.seconds * count, {name: value * count for name, value in self.parts.items()})


@dataclass(frozen=True)
class Speed:
    """How fast one device of a machine works.

    Args:
        hardware: the machine.
        mfu: of matrix products on accelerators; None: the device's default.
        calibration: of this machine, where the hardware is the CPU.
    """

    hardware: Hardware
    mfu: float | None = None
    calibration: Calibration = field(default_factory=Calibration)

    @property
    def utilisation(self) -> float:
        """u."""
        return self.hardware.device.mfu if self.mfu is None else self.mfu

    def time(self, work: Work, kind: Kind, precision: Precision, *, compiled: bool = False) -> Time:
        """Of a work on one device."""
        device = self.hardware.device
        if device.measured:
            spent = self.calibration.seconds(work, kind)
            parts = {
                COMPUTE: spent["matrix products"],
                MEMORY: spent["other operations"],
                OVERHEAD: spent["overhead"],
            }
            return Time(sum(parts.values()), parts)
        traffic, launches = (FUSED_BYTES, FUSED_LAUNCHES) if compiled else (1.0, 1.0)
        parts = {
            COMPUTE: work.flops / (device.peak(precision) * self.utilisation),
            MEMORY: work.bytes * traffic / device.bandwidth,
            OVERHEAD: work.calls * launches * device.launch,
        }
        return Time(max(parts.values()), parts)

    def exchange(self, sent: float) -> float:
        """Seconds for every device to send so many bytes."""
        return sent / self.hardware.exchange if self.hardware.devices > 1 else 0.0
