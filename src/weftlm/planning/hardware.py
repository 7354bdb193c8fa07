"""What machines can do, and what work costs there: a table of devices, and names like `2x8xH100` read into it.

    NxDEVICE          N devices in one machine
    MxNxDEVICE        M machines of N devices
    cpu               the machine this runs on, timed on the spot

Figures are the makers' own, dense (without structured sparsity); memory is in decimal gigabytes. Links are per device
and direction. With u, the model-FLOPs utilisation, work takes

    t = max( FLOPs / (peak u),  bytes / bandwidth,  kernels x launch,  bytes sent / links )  +  seconds timed
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from weftlm.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from weftlm.planning.probe import Probe

GB, TB, TFLOPS = 1e9, 1e12, 1e12
USABLE = 0.94
"""Part of a device's memory that can be filled; fragmentation and libraries take the rest."""
LINK_EFFICIENCY = 0.8
"""Part of a link's rate that collectives reach; an assumption, near what NCCL's own tests show for large messages."""


@dataclass(frozen=True)
class Device:
    """One device: peak FLOP/s (`fp32`: TensorFloat-32 where there is such), bytes, bytes per second, seconds."""

    name: str
    bf16: float
    fp32: float
    memory: float
    bandwidth: float
    link: float
    network: float
    mfu: float
    launch: float = 8e-6


DEVICES: dict[str, Device] = {
    device.name: device
    for device in (
        # NVIDIA A100 datasheet (2021): NVLink both ways over two; DGX A100: one 200 Gb/s HDR port per GPU.
        Device("A100-40", 312 * TFLOPS, 156 * TFLOPS, 40 * GB, 1.555 * TB, 300 * GB, 25 * GB, 0.45),
        Device("A100-80", 312 * TFLOPS, 156 * TFLOPS, 80 * GB, 2.039 * TB, 300 * GB, 25 * GB, 0.45),
        # NVIDIA H100 (SXM5) and H200 datasheets: half of the FLOP/s with sparsity; DGX H100: one 400 Gb/s port per GPU.
        Device("H100", 989 * TFLOPS, 494 * TFLOPS, 80 * GB, 3.35 * TB, 450 * GB, 50 * GB, 0.40),
        Device("H200", 989 * TFLOPS, 494 * TFLOPS, 141 * GB, 4.8 * TB, 450 * GB, 50 * GB, 0.40),
        # NVIDIA HGX B200 datasheet, per GPU, half of the FLOP/s with sparsity; one 400 Gb/s port per GPU.
        Device("B200", 2250 * TFLOPS, 1100 * TFLOPS, 180 * GB, 7.7 * TB, 900 * GB, 50 * GB, 0.35),
        # NVIDIA L40S datasheet: PCIe 4 x16, no NVLink; 25 Gb/s assumed.
        Device("L40S", 362 * TFLOPS, 183 * TFLOPS, 48 * GB, 0.864 * TB, 32 * GB, 3.1 * GB, 0.35),
        # NVIDIA Ada architecture whitepaper, bf16 with float32 sums; PCIe 4 x16, no NVLink; 25 Gb/s assumed.
        Device("RTX4090", 165.2 * TFLOPS, 82.6 * TFLOPS, 24 * GB, 1.008 * TB, 32 * GB, 3.1 * GB, 0.35),
        # AMD Instinct MI300X data sheet: seven links of 64 GB/s each way; one 400 Gb/s port per GPU.
        Device("MI300X", 1307 * TFLOPS, 654 * TFLOPS, 192 * GB, 5.3 * TB, 448 * GB, 50 * GB, 0.30),
    )
}
"""Known devices by name.

The default part of the peak (`mfu`) is an assumption, near what is published for well-tuned dense training: 0.45 to
0.52 on A100 (Narayanan et al. 2021, arXiv:2104.04473), 0.38 to 0.43 on H100 (Llama Team 2024, arXiv:2407.21783); lower
where the interconnect or the software is slower. A run of one's own knows better: `--mfu`.
"""

_ALIASES = {"A100": "A100-80", "4090": "RTX4090", "RTX-4090": "RTX4090", "H100-80": "H100"}
_PATTERN = re.compile(r"(?:(?P<nodes>\d+)x)?(?:(?P<devices>\d+)x)?(?P<name>[A-Za-z][\w.-]*|4090)", re.IGNORECASE)


@dataclass(frozen=True)
class Work:
    """A piece of a program: FLOPs, bytes read and written, kernel launches, bytes sent, time that was measured."""

    flops: float = 0.0
    bytes: float = 0.0
    calls: float = 0.0
    sent: float = 0.0
    seconds: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(**{name: value + getattr(other, name) for name, value in vars(self).items()})

    def __mul__(self, count: float) -> Work:
        return Work(**{name: value * count for name, value in vars(self).items()})


@dataclass(frozen=True)
class Hardware:
    """Machines with a number of devices each, of which matrix products reach a part of the peak (`mfu`)."""

    nodes: int
    devices_per_node: int
    device: Device
    mfu: float
    probe: Probe | None = None

    @property
    def devices(self) -> int:
        """Devices of all machines."""
        return self.nodes * self.devices_per_node

    @property
    def name(self) -> str:
        """Name that `parse_hardware` reads."""
        nodes = f"{self.nodes}x" if self.nodes > 1 else ""
        return self.device.name if self.device.name == "cpu" else f"{nodes}{self.devices_per_node}x{self.device.name}"

    @property
    def memory(self) -> float:
        """Bytes of a device that can be filled."""
        return USABLE * self.device.memory

    @property
    def exchange(self) -> float:
        """Bytes per second that a device passes on while all exchange in rings.

        link x 0.8 in one machine; over several, the network ports of a machine carry the rings side by side:
        min(link, ports x network) x 0.8.
        """
        device = self.device
        wire = device.link if self.nodes == 1 else min(device.link, device.network * self.devices_per_node)
        return LINK_EFFICIENCY * wire

    def time(self, work: Work, *, half: bool) -> tuple[float, str]:
        """Seconds of work on one device, in half precision or in float32, and what takes most of them; "-" for none."""
        limits = {
            "compute": work.flops / ((self.device.bf16 if half else self.device.fp32) * self.mfu),
            "memory bandwidth": work.bytes / self.device.bandwidth,
            "overhead": work.calls * self.device.launch,
            "interconnect": work.sent / self.exchange,
        }
        seconds = max(limits.values()) + work.seconds
        limits["measured"] = work.seconds
        return seconds, max(limits, key=limits.__getitem__) if seconds else "-"


def parse_hardware(text: str) -> Hardware:
    """Read `8xH100`, `2x8xA100-80`, `H200` or `cpu`.

    Raises:
        ConfigError: it is of no such form, or names a device that is not known.
    """
    found = _PATTERN.fullmatch(text.strip())
    if found is None:
        raise ConfigError(
            f"hardware {text!r} is not of the form 8xH100 (devices) or 2x8xH100 (machines x devices); known devices: "
            f"{', '.join(DEVICES)}, cpu"
        )
    numbers = [int(number) for number in (found["nodes"], found["devices"]) if number is not None]
    if 0 in numbers:
        raise ConfigError(f"hardware {text!r} asks for 0 devices; ask for at least 1")
    name = found["name"].upper()
    if name == "CPU":
        if numbers not in ([], [1]):
            raise ConfigError(f"hardware {text!r}: the CPU is planned for as one device; give cpu")
        return Hardware(1, 1, Device("cpu", inf, inf, _memory(), inf, inf, inf, 1.0, 0.0), 1.0)
    name = _ALIASES.get(name, name)
    if name not in DEVICES:
        raise ConfigError(f"hardware {text!r} names a device that is not known{did_you_mean(name, [*DEVICES, 'cpu'])}")
    nodes, devices = [1] * (2 - len(numbers)) + numbers
    return Hardware(nodes, devices, DEVICES[name], DEVICES[name].mfu)


def _memory() -> float:
    """Bytes of this machine's memory, or what a control group allows where that is less."""
    total = float(psutil.virtual_memory().total)
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text(encoding="utf-8").strip()
        return min(total, float(limit)) if limit != "max" else total
    except (OSError, ValueError):
        return total
