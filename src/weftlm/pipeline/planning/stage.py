"""A stage of a plan: what it costs of each resource, and what it runs into."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from weftlm.pipeline.planning.speed import Time


@dataclass(frozen=True)
class Stage:
    """One part of a recipe's work.

    Attributes:
        name: of the stage.
        what: what is done, in a line.
        time: seconds in all, and what they go into; None for what no time is planned of.
        limit: what holds it up most: a resource, or "does not fit".
        flops: over all devices.
        memory: bytes on the fullest device, by what they hold.
        sent: bytes that one device sends, in all.
        disk: bytes by what they hold, while the work is under way.
        facts: further numbers, each with its unit in its name.
        problems: what will not work, and what to do.
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
        """On the fullest device."""
        return sum(self.memory.values())

    @property
    def disk_bytes(self) -> float:
        """At the most."""
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


DOES_NOT_FIT = "does not fit"
USABLE = 0.94
"""Part of a device's memory that can be filled; the rest goes to fragmentation and to what libraries keep."""
FILE_HEADER = 128
"""Bytes of a safetensors header per tensor, about."""
