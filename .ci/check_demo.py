"""Check what the demonstration left behind: finite numbers for every policy, and a report that needs no network."""

from __future__ import annotations

import json
import math
import re
import sys
from pathlib import Path
from typing import Any

POLICIES = {"uniform", "importance", "dga"}
ROUTERS = {"base", "merged", "retrieval", "average-activation", "arrow", "phatgoose", "prefix", "blend", "oracle"}
EXPERTS_AT_LEAST = 6
GATES = {"monolith", "uniform", "bayes", "fixed_share", "robust", "student"}


def numbers(value: Any, place: str = "summary") -> dict[str, float]:
    """Every number of a JSON value, by its dotted place."""
    if isinstance(value, dict | list):
        inner = value.items() if isinstance(value, dict) else enumerate(value)
        return {key: number for name, item in inner for key, number in numbers(item, f"{place}.{name}").items()}
    return {place: float(value)} if isinstance(value, int | float) and not isinstance(value, bool) else {}


def problems(folder: Path) -> list[str]:
    """One line for everything that is wrong with a demonstration's folder."""
    found = []
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    mixture, routing = summary["mixture"], summary["routing"]
    found += [f"{place} is {number}" for place, number in numbers(summary).items() if not math.isfinite(number)]
    for key in ("target_bpb", "generic_bpb"):
        missing = POLICIES - set(mixture[key])
        if missing:
            found.append(f"{key} lacks {', '.join(sorted(missing))}")
        found += [
            f"{key}.{name} is {value} bits per byte" for name, value in mixture[key].items() if not 0 < float(value) < 8
        ]
    if mixture["train_tokens"] <= 0:
        found.append(f"train_tokens is {mixture['train_tokens']}")
    if not mixture["seconds"]:
        found.append("seconds is empty")
    for key in ("heldout_bpb", "unseen_bpb"):
        if missing := ROUTERS - set(routing[key]):
            found.append(f"routing.{key} lacks {', '.join(sorted(missing))}")
        found += [
            f"routing.{key}.{name} is {value} bits per byte"
            for name, value in routing[key].items()
            if not 0 < float(value) < 8
        ]
    if len(routing["experts"]) < EXPERTS_AT_LEAST:
        found.append(f"routing has {len(routing['experts'])} experts")
    if not routing["relative_forward_time"] > 0:
        found.append(f"routing.relative_forward_time is {routing['relative_forward_time']}")
    robust = summary["robust"]
    if missing := GATES - set(robust["worst_domain_regret"]):
        found.append(f"robust.worst_domain_regret lacks {', '.join(sorted(missing))}")
    found += [
        f"robust.worst_domain_regret.{name} is {value} nats per token"
        for name, value in robust["worst_domain_regret"].items()
        if not -8 < float(value) < 8
    ]
    if not robust["capacity_bound"] >= 0:
        found.append(f"robust.capacity_bound is {robust['capacity_bound']}")
    if not 0 < robust["z"] < 10:
        found.append(f"robust.z is {robust['z']}")
    report = (folder / "report.html").read_text(encoding="utf-8")
    if "</html>" not in report:
        found.append("report.html is cut off")
    found += [f"report.html loads {url}" for url in re.findall(r"(?:src|href)=[\"'](https?://[^\"']+)", report)]
    return found


if __name__ == "__main__":
    wrong = problems(Path(sys.argv[1]))
    print("\n".join(wrong) or "summary.json and report.html are sound")
    sys.exit(bool(wrong))
