"""What every benchmark shares: its flags, the record of the machine, spread over seeds, and atomic results.

A benchmark is `benchmarks/<theme>.py`; it writes `benchmarks/results/<theme>.json` and `<theme>.md`. Figures are ratios
of things timed in pairs within one run, because seconds depend on the machine and on what else it is doing.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).resolve().parent / "results"


def parser(description: str, *, seeds: int = 3) -> argparse.ArgumentParser:
    """The flags every benchmark understands; add your own to what is returned."""
    flags = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    flags.add_argument("--quick", action="store_true", help="small sizes, under a minute; results are not written")
    flags.add_argument("--json", action="store_true", help="print the result as JSON on stdout instead of the table")
    flags.add_argument("--seeds", type=int, default=seeds, help="number of seeds")
    flags.add_argument("--threads", type=int, default=0, help="PyTorch threads; 0 leaves PyTorch's choice")
    flags.add_argument("--results", type=Path, default=RESULTS, help="folder for <theme>.json and <theme>.md")
    flags.add_argument("--note", default="", help="one sentence about the machine, recorded with the result")
    return flags


def environment(note: str = "") -> dict[str, Any]:
    """Versions and the machine's kind: what a reader needs to judge the figures (no host name, no paths)."""
    record: dict[str, Any] = {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "logical_cpus": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "packages": {name: _version(name) for name in ("torch", "transformers", "numpy")},
        "load_average_1m": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
    }
    if note:
        record["note"] = note
    return record


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


@dataclass(frozen=True)
class Spread:
    """A median with the smallest and largest value it came from."""

    median: float
    low: float
    high: float
    n: int

    def as_json(self) -> dict[str, float]:
        return {"median": self.median, "low": self.low, "high": self.high, "n": self.n}

    def show(self, form: str = "{:.3g}", scale: float = 1.0) -> str:
        """`median (low .. high)`, each written by `form` after multiplying by `scale`."""
        middle, low, high = (form.format(value * scale) for value in (self.median, self.low, self.high))
        return middle if self.n == 1 else f"{middle} ({low} .. {high})"


def spread(values: Sequence[float]) -> Spread:
    """Median and range of one figure over seeds or pairs."""
    return Spread(statistics.median(values), min(values), max(values), len(values))


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table with aligned columns."""
    cells = [[str(cell) for cell in row] for row in [header, *rows]]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in cells
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def finish(
    theme: str,
    arguments: argparse.Namespace,
    result: Mapping[str, Any],
    to_markdown: Callable[[Mapping[str, Any]], str],
) -> None:
    """Print the result, and unless `--quick` write `<theme>.json` and `<theme>.md` (each replaced atomically)."""
    record = {"theme": theme, "quick": arguments.quick, "environment": environment(arguments.note), **result}
    text = json.dumps(record, indent=2) + "\n"
    markdown = to_markdown(record).rstrip() + "\n"
    sys.stdout.write(text if arguments.json else markdown)
    if not arguments.quick:
        write_atomically(arguments.results / f"{theme}.json", text)
        write_atomically(arguments.results / f"{theme}.md", markdown)


def write_atomically(path: Path, text: str) -> None:
    """Write a file so that a reader sees the old contents or the new, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    half = path.with_name(f"{path.name}.{os.getpid()}.partial")
    half.write_text(text, encoding="utf-8")
    half.replace(path)


def say(text: str) -> None:
    """One line of progress on stderr."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def environment_lines(record: Mapping[str, Any]) -> str:
    """The environment as one Markdown line, for the foot of a results page."""
    about = record["environment"]
    packages = ", ".join(f"{name} {version}" for name, version in about["packages"].items() if version)
    parts = [
        f"Python {about['python']}",
        packages,
        about["system"],
        f"{about['logical_cpus']} logical CPUs",
        f"{about['torch_threads']} PyTorch threads",
        f"device {about['device']}",
    ]
    if about["load_average_1m"] is not None:
        parts.append(f"load average {about['load_average_1m']}")
    return "Measured with " + "; ".join(parts) + "." + (f" {about['note']}" if about.get("note") else "")
