"""The tables of a report besides scores: cost, mixtures, recipes, environments and the prepared data."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from weftlm.progress import count_text, duration_text
from weftlm.reporting.compare import View
from weftlm.reporting.figures import paint
from weftlm.reporting.page import DASH, Block, Cell, Code, Table, Text, exact
from weftlm.reporting.runs import mapping, number, numbers


def mixture_table(view: View) -> list[Block]:
    """Final weight of every domain, and passes over its training text: beyond one it repeats."""
    shown = [run for run in view.runs if run.latest("weights")]
    rows = []
    for name in view.domains if shown else ():
        row = [Cell(name)]
        for run in shown:
            weight, passes = (run.latest(key).get(name, math.nan) for key in ("weights", "epochs"))
            sub = [(exact(passes, f"{passes:.3g}"), " passes")] if math.isfinite(passes) else []
            row.append(Cell(exact(weight, f"{weight:.1%}"), sub))
        rows.append(row)
    caption = "Final mixture weight by domain, and passes over the domain's training text: beyond one it repeats."
    heads = ["Domain", *(run.label for run in shown)]
    fold = f"Weights of all {len(rows)} domains"
    return [Table(caption, heads, rows, "dense", fold=fold)] if rows else []


def cost_table(view: View) -> list[Block]:
    """Training tokens, steps, and wall time by activity of every run."""
    seconds = [numbers(run.result.get("seconds")) for run in view.runs]
    parts = list(dict.fromkeys(name for one in seconds for name in one))
    rows = []
    for run, times in zip(view.runs, seconds, strict=True):
        swatch = paint(view.run_lines[run.label].colour)
        counts = [exact(one, count_text(one)) for one in (run.train_tokens, run.steps)]
        spent = [times.get(part, math.nan) for part in parts]
        cells = [*counts, *(exact(one, duration_text(one)) for one in spent)]
        rows.append([Cell(run.label, swatch=swatch), *map(Cell, cells)])
    return [Table("Cost: wall time by activity.", ["Run", "Training tokens", "Steps", *parts], rows, "dense")]


def problems(view: View) -> list[Block]:
    """What is missing or broken in the run folders."""
    return [Text(f"{run.label}: {problem}", "warning") for run in view.runs for problem in run.problems]


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, keys joined by dots; lists and scalars are values.

    A list of `{setting, value, reason}` (the choices made for the machine) counts as a mapping by setting.
    """
    if isinstance(value, list) and value and all("setting" in mapping(one) for one in value):
        value = {one["setting"]: " ".join(str(one[key]) for key in one if key != "setting") for one in value}
    if not isinstance(value, dict) or (not value and prefix):
        return {prefix: value} if prefix else {}
    result: dict[str, Any] = {}
    for key, inner in value.items():
        result |= flatten(inner, f"{prefix}.{key}" if prefix else str(key))
    return result


def _facts(caption: str, labels: Sequence[str], facts: Sequence[Mapping[str, Any]], *, differ: bool) -> list[Block]:
    """The keys in which mappings differ, one column each; or, of the first alone and folded, those they share."""
    keys = dict.fromkeys(key for one in facts for key in one)
    shown = [key for key in keys if (len({_value(one, key) for one in facts}) > 1) == differ]
    columns = facts if differ else facts[:1]
    rows = [[Cell(key), *(Cell(_value(one, key)) for one in columns)] for key in shown]
    heads = ["Key", *(labels if differ else ["Value"])]
    return [Table(caption, heads, rows, "facts", range(len(heads)), "" if differ else caption)] if rows else []


def _value(values: Mapping[str, Any], key: str) -> str:
    """One value as YAML writes it inline; an absent key is a dash."""
    value = values.get(key, DASH)
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def settings_blocks(view: View) -> list[Block]:
    """Recipes, versions, seeds, fingerprints and decisions: where they differ, then what is shared; and each recipe."""
    facts, labels = [flatten({**run.recipe, **run.facts}) for run in view.runs], [run.label for run in view.runs]
    return [
        *_facts("Where the settings and environments of the runs differ.", labels, facts, differ=True),
        *_facts("Settings, versions and fingerprints of every run", labels, facts, differ=False),
        *(Code(run.recipe_text, f"Recipe of {run.label}") for run in view.runs if run.recipe_text),
    ]


def prepared_blocks(prepared: Mapping[str, Any] | None) -> list[Block]:
    """The prepared data's facts: a table for what is counted by set, the rest as keys and values."""
    blocks: list[Block] = []
    rest: dict[str, Any] = {}
    for key, value in (prepared or {}).items():
        by_name = {name: numbers(facts) for name, facts in mapping(value).items() if mapping(facts)}
        columns = list(dict.fromkeys(column for facts in by_name.values() for column in facts))
        if key == "warnings" and value:
            blocks += [Text(str(one), "warning") for one in value]
        elif by_name and len(by_name) == len(value):
            rows = [
                [Cell(name), *(Cell(exact(one, count_text(one))) for one in (number(facts.get(c)) for c in columns))]
                for name, facts in by_name.items()
            ]
            heads = ["Set", *(column.replace("_", " ") for column in columns)]
            blocks.append(Table(f"Prepared {key}.", heads, rows, "dense", fold=f"{len(rows)} {key}"))
        else:
            rest[key] = value
    return blocks + _facts("Other facts of the prepared data", [], [flatten(rest)], differ=False)
