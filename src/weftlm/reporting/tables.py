"""The tables of a report: the summary, the losses by domain, time, recipes, environments and the prepared data."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from weftlm.progress import count_text, duration_text
from weftlm.reporting.compare import (
    OPEN_ROWS,
    Gap,
    View,
    baseline_of,
    generic_gap,
    generic_score,
    target_gap,
    target_score,
)
from weftlm.reporting.differences import decimals_for, difference_text, lowest
from weftlm.reporting.figures import paint
from weftlm.reporting.page import DASH, Block, Cell, Code, Number, Table, Text, Warnings, exact
from weftlm.reporting.runs import Run, Score, flatten, mapping, number


def summary_tables(view: View) -> list[Block]:
    """One line per run: losses, differences, cost; above it the means of repeated runs, under it what is missing."""
    several, repeated = len(view.runs) > 1, view.contenders[0].repeated
    compared = several and not repeated
    targets, generics = [target_score(run) for run in view.runs], [generic_score(run) for run in view.runs]
    gaps = _gap_columns(view) if compared else []
    rows = []
    for place, run in enumerate(view.runs):
        alignment = run.seconds.get("alignment", math.nan)
        spent = [run.seconds.get("train", math.nan), alignment]
        seconds = math.fsum(value for value in spent if math.isfinite(value)) or math.nan
        losses = [
            _score(targets[place], targets if compared else ()),
            _score(generics[place], generics if compared else ()),
        ]
        if compared:
            losses = [losses[0], gaps[0][place], losses[1], gaps[1][place]]
        cost = [
            exact(run.train_tokens, count_text(run.train_tokens)),
            exact(seconds, duration_text(seconds)),
            exact(alignment / seconds, f"{alignment / seconds:.1%}"),
        ]
        rows.append([_run_name(view, run), *losses, *map(Cell, cost)])
    caption = f"Held-out text{_windows(view)}, ± one standard error over its windows; lower is better."
    caption += " The lowest value of a column is bold." if compared else ""
    heads = _loss_heads(view, "Run", compared)
    heads += [("Training", "tokens"), ("Training", "time"), ("Alignment", "share of it")]
    problems = [(run.label if several else "", problem) for run in view.runs for problem in run.problems]
    means: list[Block] = [_means_table(view), Text("Each run", "h3")] if repeated else []
    return [
        *means,
        Table(caption, heads, rows),
        *([Warnings("What is missing", problems)] if problems else []),
    ]


def _windows(view: View) -> str:
    """`, in windows of 128 tokens`: what the recipes of the runs hold."""
    lengths = {number(mapping(run.recipe.get("training")).get("sequence_length")) for run in view.runs}
    known = sorted(one for one in lengths if math.isfinite(one))
    return f", in windows of {' and '.join(f'{one:.0f}' for one in known)} tokens" if known else ""


def _means_table(view: View) -> Table:
    """Means over the runs that differ only in their seed."""
    gaps, compared = _gap_columns(view), len(view.contenders) > 1
    targets, generics = [one.target for one in view.contenders], [one.generic for one in view.contenders]
    rows = []
    for place, one in enumerate(view.contenders):
        row = [_named(view, one.label)]
        for column, scores in enumerate((targets, generics)):
            row.append(_score(scores[place], scores))
            row += [gaps[column][place]] if compared else []
        rows.append([*row, Cell(str(len(one.runs)))])
    caption = (
        f"Means over runs that differ only in their seed{_windows(view)}, ± one standard error over runs; "
        "lower is better. The lowest value of a column is bold."
    )
    return Table(caption, [*_loss_heads(view, "Mixture", compared), "Runs"], rows)


def _loss_heads(view: View, first: str, compared: bool) -> list[str | tuple[str, ...]]:
    heads: list[str | tuple[str, ...]] = [first]
    for name in ("Target", "Generic"):
        heads.append((name, "bits per byte"))
        heads += [(name, f"against {baseline_of(view.contenders).label}")] if compared else []
    return heads


def _gap_columns(view: View) -> list[list[Cell]]:
    """The cells of the two columns of differences, target and generic, each with the same decimals."""
    baseline, columns = baseline_of(view.contenders), []
    for difference in (target_gap, generic_gap):
        gaps = [difference(one, baseline) for one in view.contenders]
        decimals = decimals_for(gap.error for gap in gaps if gap is not None)
        columns.append([
            Cell("baseline", style="error") if one is baseline else _gap(gap, decimals)
            for one, gap in zip(view.contenders, gaps, strict=True)
        ])  # fmt: skip
    return columns


def _gap(gap: Gap | None, decimals: int) -> Cell:
    if gap is None:
        return Cell()
    return Cell(Number(gap.value, difference_text(gap.value, decimals=decimals)), _error(gap.error, decimals))


def _error(error: float, decimals: int = 3) -> Number | None:
    return Number(error, f"{error:.{decimals}f}") if math.isfinite(error) else None


def _score(score: Score, compared: Sequence[Score] = ()) -> Cell:
    """A score with its error, bold where it is the lowest of those it is compared with."""
    value = score.bits_per_byte
    if not math.isfinite(value):
        return Cell()
    best = value == lowest(one.bits_per_byte for one in compared)
    return Cell(Number(value, f"{value:.3f}"), _error(score.bits_per_byte_se), best="lowest" if best else "")


def _named(view: View, label: str, sub: str | None = None) -> Cell:
    return Cell(label, sub=sub, swatch=paint(view.run_lines[label].colour))


def _run_name(view: View, run: Run) -> Cell:
    notes = [run.policy] if run.policy and run.policy != run.label else []
    if not run.finished:
        notes.append(f"not finished, step {run.steps:.0f}" if math.isfinite(run.steps) else "not finished")
    return _named(view, run.label, ", ".join(notes) or None)


def domain_table(view: View) -> list[Block]:
    """Final loss, weight and passes over the training text by domain, open where it is short."""
    names, shown = view.scored_domains, view.contenders
    if not names:
        return []
    full = any(run.weights for run in view.runs) and len(shown) <= 5
    columns = ("bits per byte", "weight", "passes") if full else ("bits per byte",)
    rows = []
    for name in names:
        scores, row = [one.domain(name) for one in shown], [Cell(name)]
        for one, score in zip(shown, scores, strict=True):
            weight, passes = one.weight(name), one.epochs(name)
            cost = [Cell(exact(weight, f"{weight:.1%}")), Cell(exact(passes, f"{passes:.3g}"))]
            row += [_score(score, scores), *(cost if full else ())]
        rows.append(row)
    over = "over runs" if shown[0].repeated else "over windows"
    caption = f"Final bits per byte on held-out text{_windows(view)}, ± one standard error {over}"
    caption += "; final mixture weight; passes over the domain's training text: beyond one it repeats." if full else "."
    heads: list[str | tuple[str, ...]] = ["Domain"]
    heads += [(one.label, column) for one in shown for column in columns]
    fold = f"All {len(names)} domains as a table"
    return [Table(caption, heads, rows, "dense", fold=fold, opened=len(names) <= OPEN_ROWS)]


def time_table(view: View) -> list[Block]:
    """Wall time by activity and run."""
    parts = list(dict.fromkeys(name for run in view.runs for name in run.seconds))
    if not parts:
        return []
    rows = []
    for run in view.runs:
        times = [run.seconds.get(part, math.nan) for part in parts]
        steps = exact(run.steps, f"{run.steps:,.0f}".replace(",", " "))
        rows.append([_run_name(view, run), *(Cell(exact(one, duration_text(one))) for one in times), Cell(steps)])
    return [Table("Wall time by activity.", ["Run", *parts, "steps"], rows, "dense", fold="Where the time went")]


def _compared_facts(
    caption: str, labels: Sequence[str], facts: Sequence[Mapping[str, Any]], *, differ: bool
) -> list[Block]:
    """The keys in which mappings differ, one column each; or, with the first column alone, those they share."""
    keys = dict.fromkeys(key for one in facts for key in one)
    shown = [key for key in keys if (len({_value(one, key) for one in facts}) > 1) == differ]
    columns = facts if differ else facts[:1]
    rows = [[Cell(key), *(Cell(_value(one, key)) for one in columns)] for key in shown]
    heads = ["Key", *(labels if differ else ["Value"])]
    fold = "" if differ else caption
    return [Table(caption, heads, rows, "facts", range(len(heads)), fold)] if rows else []


def _value(values: Mapping[str, Any], key: str) -> str:
    """One value as YAML writes it inline; an absent key is a dash."""
    if key not in values:
        return DASH
    value = values[key]
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def recipe_blocks(view: View) -> list[Block]:
    """Where the recipes differ, and each in full."""
    recipes, labels = [flatten(dict(run.recipe)) for run in view.runs], [run.label for run in view.runs]
    several = len(view.runs) > 1
    blocks: list[Block] = []
    if several and all(recipes):
        caption = "Where the recipes differ; all other keys are equal."
        blocks += _compared_facts(caption, labels, recipes, differ=True) or [Text("The recipes are equal.")]
    return blocks + [
        Code(f"Resolved recipe of {run.label}" if several else "Resolved recipe", run.recipe_text)
        for run in view.runs
        if run.recipe_text
    ]


def environment_blocks(view: View) -> list[Block]:
    """Versions, seeds, fingerprints and decisions: where they differ, then what is shared."""
    facts = [flatten(_named_items(dict(run.facts))) for run in view.runs]
    labels = [run.label for run in view.runs]
    shared = "Versions, seeds and fingerprints" + (", the same in every run" if len(facts) > 1 else "")
    return [
        *_compared_facts("Where the runs' environments differ.", labels, facts, differ=True),
        *_compared_facts(shared, labels, facts, differ=False),
    ]


def _named_items(facts: dict[str, Any]) -> dict[str, Any]:
    """Lists of `{setting, value, reason}` (the choices made for the machine) as one entry per setting."""
    result: dict[str, Any] = {}
    for key, value in facts.items():
        if isinstance(value, list) and value and all("setting" in mapping(item) for item in value):
            value = {
                str(item["setting"]): f"{item.get('value')}" + (f" ({item['reason']})" if item.get("reason") else "")
                for item in value
            }
        result[key] = value
    return result


def prepared_blocks(prepared: Mapping[str, Any] | None) -> list[Block]:
    """The prepared data's facts: a table for what is listed by domain, the rest as keys and values."""
    if not prepared:
        return []
    rest = dict(prepared)
    warned = rest.pop("warnings", None)
    blocks: list[Block] = []
    if isinstance(warned, list) and warned:
        blocks.append(Warnings("Warnings of the preparation", [("", str(one)) for one in warned]))
    for key, value in prepared.items():
        listed = _by_name(value)
        columns = list(dict.fromkeys(c for facts in listed.values() for c, v in facts.items() if _is_count(v)))
        if len(listed) > 1 and columns:
            del rest[key]
            rows = [
                [Cell(name), *(Cell(exact(v, count_text(v))) for v in (number(facts.get(c)) for c in columns))]
                for name, facts in listed.items()
            ]
            heads = [key.capitalize().removesuffix("s"), *(column.replace("_", " ") for column in columns)]
            fold = f"{len(rows)} {key}"
            blocks.append(Table(f"Prepared {key}.", heads, rows, "dense", fold=fold, opened=len(rows) <= OPEN_ROWS))
    return blocks + _compared_facts("Other facts of the prepared data", [], [flatten(rest)], differ=False)


def _by_name(value: Any) -> dict[str, dict[str, Any]]:
    """`{name: facts}` or `[{"name": ..., facts}]` as one form, facts flattened; empty for anything else."""
    if isinstance(value, list) and all("name" in mapping(item) for item in value):
        value = {str(item["name"]): {k: v for k, v in item.items() if k != "name"} for item in value}
    if not isinstance(value, dict) or not all(isinstance(facts, dict) for facts in value.values()):
        return {}
    return {str(name): flatten(facts) for name, facts in value.items()}


def _is_count(value: Any) -> bool:
    return math.isfinite(number(value))
