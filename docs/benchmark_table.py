"""Put the recorded figures of benchmarks/results into the README and docs/benchmarks.md; `--check` fails where stale.

A benchmark's JSON record may hold `headline`: a list of `{"figure": ..., "measured": ..., "goal": ...}`, each a short
text. These become the rows of the README's table, so that no figure is ever typed by hand. docs/benchmarks.md shows
every recorded page whole.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- benchmarks: begin (docs/benchmark_table.py) -->", "<!-- benchmarks: end -->"


def records() -> dict[str, dict[str, Any]]:
    """The recorded results by theme, in alphabetical order."""
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob("*.json"))}


def headline_table(found: dict[str, dict[str, Any]], link: str) -> str:
    """One row per headline figure; `link` is where a theme's page lies, with `{theme}` in it."""
    rows = [
        f"| {row['figure']} | {row['measured']} | {row.get('goal', '')} | [{theme}]({link.format(theme=theme)}) |"
        for theme, record in found.items()
        for row in record.get("headline", [])
    ]
    if not rows:
        return "No figures are recorded in this revision: `make bench FULL=1` records them."
    return "\n".join(["| figure | measured | goal | benchmark |", "| --- | --- | --- | --- |", *rows])


def pages(found: dict[str, dict[str, Any]]) -> str:
    """Every recorded page, its headings two levels down, under a heading with the theme's name."""
    parts = []
    for theme in found:
        path = RESULTS / f"{theme}.md"
        if not path.exists():
            raise FileNotFoundError(f"{path.relative_to(ROOT)} is missing beside its .json; run benchmarks/{theme}.py")
        body = re.sub(r"\A# .*\n", "", path.read_text(encoding="utf-8"))
        body = re.sub(r"^(#+) ", r"#\1 ", body, flags=re.MULTILINE)
        parts.append(f"## {theme}\n\nRegenerate with `.venv/bin/python benchmarks/{theme}.py`.\n\n{body.strip()}")
    return "\n\n".join(parts)


def between_markers(text: str, inner: str, name: str) -> str:
    """The text with everything between the two markers replaced."""
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"{name} must hold the markers once each: {BEGIN} and {END}")
    head, rest = text.split(BEGIN)
    return f"{head}{BEGIN}\n\n{inner}\n\n{END}{rest.split(END)[1]}"


def main() -> int:
    """Write both files, or with `--check` compare them; 1 where one is stale."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail where a file is stale")
    check = parser.parse_args().check
    found = records()
    below = headline_table(found, "#{theme}") + ("\n\n" + pages(found) if found else "")
    stale = []
    for name, inner in {
        "README.md": headline_table(found, "benchmarks/results/{theme}.md"),
        "docs/benchmarks.md": below,
    }.items():
        path = ROOT / name
        old = path.read_text(encoding="utf-8")
        new = between_markers(old, inner, name)
        if new != old:
            stale.append(name)
            if not check:
                path.write_text(new, encoding="utf-8")
    if check and stale:
        print(f"stale: {', '.join(stale)}; run `make fix`", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
