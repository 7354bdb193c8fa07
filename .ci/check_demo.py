"""Check what the demonstration left behind: finite numbers for every policy, and a report that needs no network."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

POLICIES = {"uniform", "importance", "dga"}
ROUTERS = {"base", "merged", "retrieval", "average-activation", "arrow", "phatgoose", "prefix", "blend", "oracle"}
GATES = {"monolith", "uniform", "bayes", "fixed share", "robust", "student"}
DOMAINS_AT_LEAST = 6


def problems(folder: Path) -> list[str]:
    """One line for everything that is wrong with a demonstration's folder."""
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    found = []
    for section, wanted in (("mixture", POLICIES), ("routing", ROUTERS)):
        if missing := wanted - set(summary[section]):
            found.append(f"{section} lacks {', '.join(sorted(missing))}")
        for name, row in summary[section].items():
            sets = {**row["sets"], "mean": row["generic"]}
            if len(sets) < DOMAINS_AT_LEAST:
                found.append(f"{section}.{name} has {len(sets)} sets")
            found += [
                f"{section}.{name}.{one} is {values['bits_per_byte']} bits per byte"
                for one, values in sets.items()
                if not 0 < values["bits_per_byte"] < 8
            ]
    if missing := GATES - set(summary["robust"]):
        found.append(f"robust lacks {', '.join(sorted(missing))}")
    found += [
        f"robust.{name} is {row['worst']} nats per token"
        for name, row in summary["robust"].items()
        if not -8 < row["worst"] < 8
    ]
    certificate = summary["certificate"]
    if not certificate["capacity"]["value"] >= 0:
        found.append(f"the capacity is {certificate['capacity']['value']}")
    if not 0 < certificate["z"]["value"] < 10:
        found.append(f"Z is {certificate['z']['value']}")
    report = (folder / "report.html").read_text(encoding="utf-8")
    if "</html>" not in report:
        found.append("report.html is cut off")
    found += [f"report.html loads {url}" for url in re.findall(r"(?:src|href)=[\"'](https?://[^\"']+)", report)]
    return found


if __name__ == "__main__":
    wrong = problems(Path(sys.argv[1]))
    print("\n".join(wrong) or "summary.json and report.html are sound")
    sys.exit(bool(wrong))
