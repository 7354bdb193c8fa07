"""The tables of a report: the summary, the losses by domain, the time spent. A cell keeps its exact number."""

from __future__ import annotations

import math
from collections.abc import Sequence

from weftlm.progress import count_text, duration_text
from weftlm.reporting.compare import (
    Gap,
    baseline_of,
    decimals_for,
    difference_text,
    generic_gap,
    generic_score,
    target_gap,
    target_score,
)
from weftlm.reporting.figures import paint
from weftlm.reporting.html import DASH, Cell, column_head, data, details, escape, table
from weftlm.reporting.runs import Run, Score, mapping, number
from weftlm.reporting.view import OPEN_ROWS, View


def summary_table(view: View) -> str:
    """One line per run: losses, differences, cost; above it the means of repeated runs, under it what is missing."""
    several = len(view.runs) > 1
    repeated = view.contenders[0].repeated
    compared = several and not repeated
    targets = [target_score(run) for run in view.runs]
    generics = [generic_score(run) for run in view.runs]
    best_target, best_generic = (_best([score.bits_per_byte for score in scores]) for scores in (targets, generics))
    columns = _gap_columns(view) if compared else []
    rows = []
    for position, run in enumerate(view.runs):
        row = [Cell(_run_name(view, run), "text", header=True)]
        row.append(Cell(_score(targets[position], position == best_target and compared)))
        row += [Cell(columns[0][position])] if compared else []
        row.append(Cell(_score(generics[position], position == best_generic and compared)))
        row += [Cell(columns[1][position])] if compared else []
        alignment = run.seconds.get("alignment", math.nan)
        seconds = math.fsum(value for value in (run.seconds.get("train", math.nan), alignment) if math.isfinite(value))
        seconds = seconds if seconds > 0 else math.nan
        share = alignment / seconds
        row.append(Cell(data(run.train_tokens, count_text(run.train_tokens))))
        row.append(Cell(data(seconds, duration_text(seconds))))
        row.append(Cell(data(share, f"{share:.1%}")))
        rows.append(row)
    caption = f"Held-out text{_windows(view)}, ± one standard error over its windows; lower is better."
    caption += " The lowest value of a column is bold." if compared else ""
    heads = [*_loss_heads(view, "Run", compared), "Training<br>tokens", "Training<br>time", "Alignment<br>share of it"]
    text = _means_table(view) if repeated else ""
    text += table(caption, column_head(heads), rows)
    problems = [(run, problem) for run in view.runs for problem in run.problems]
    if problems:
        items = "\n".join(
            f"<li>{f'<strong>{escape(run.label)}:</strong> ' if several else ''}{escape(problem)}</li>"
            for run, problem in problems
        )
        text += f'\n<ul class="warning" aria-label="What is missing">\n{items}\n</ul>'
    return text


def _windows(view: View) -> str:
    """`, in windows of 128 tokens`: what each run's recipe says."""
    lengths = {number(mapping(run.recipe.get("training")).get("sequence_length")) for run in view.runs}
    known = sorted(one for one in lengths if math.isfinite(one))
    return f", in windows of {' and '.join(f'{one:.0f}' for one in known)} tokens" if known else ""


def _means_table(view: View) -> str:
    """Means over the runs that differ only in their seed."""
    scores = [[one.target for one in view.contenders], [one.generic for one in view.contenders]]
    best = [_best([score.bits_per_byte for score in column]) for column in scores]
    gaps = _gap_columns(view)
    compared = len(view.contenders) > 1
    rows = []
    for position, one in enumerate(view.contenders):
        name = _swatch(view, one.label) + escape(one.label)
        row = [Cell(name, "text", header=True)]
        for column in (0, 1):
            row.append(Cell(_score(scores[column][position], compared and best[column] == position)))
            row += [Cell(gaps[column][position])] if compared else []
        row.append(Cell(str(len(one.runs))))
        rows.append(row)
    caption = (
        f"Means over runs that differ only in their seed{_windows(view)}, ± one standard error over runs; "
        "lower is better. The lowest value of a column is bold."
    )
    heads = [*_loss_heads(view, "Mixture", compared), "Runs"]
    return table(caption, column_head(heads), rows) + "\n<h3>Each run</h3>\n"


def _loss_heads(view: View, first: str, compared: bool) -> list[str]:
    heads = [first]
    for name in ("Target", "Generic"):
        heads.append(f"{name}<br>bits per byte")
        heads += [f"{name}<br>against {escape(baseline_of(view.contenders).label)}"] if compared else []
    return heads


def _gap_columns(view: View) -> list[list[str]]:
    """The cells of the two columns of differences: target and generic."""
    baseline = baseline_of(view.contenders)
    columns = []
    for difference in (target_gap, generic_gap):
        gaps = [difference(one, baseline) for one in view.contenders]
        columns.append([_gap(gaps, i, one is baseline) for i, one in enumerate(view.contenders)])
    return columns


def _best(values: Sequence[float]) -> int | None:
    known = [position for position, value in enumerate(values) if math.isfinite(value)]
    return min(known, key=lambda position: values[position]) if known else None


def _run_name(view: View, run: Run) -> str:
    notes = [run.policy] if run.policy and run.policy != run.label else []
    if not run.finished:
        notes.append(f"not finished, step {run.steps:.0f}" if math.isfinite(run.steps) else "not finished")
    sub = f'<span class="sub">{escape(", ".join(notes))}</span>' if notes else ""
    return _swatch(view, run.label) + escape(run.label) + sub


def _swatch(view: View, label: str) -> str:
    return f'<span class="swatch" style="background:{paint(view.run_lines[label].colour)}"></span>'


def _score(score: Score, best: bool = False) -> str:
    if not math.isfinite(score.bits_per_byte):
        return DASH
    text = data(score.bits_per_byte, f"{score.bits_per_byte:.3f}")
    if best:
        text = f'<strong class="best">{text}</strong><span class="unseen"> (lowest)</span>'
    return text + _error(score.bits_per_byte_se, 3)


def _error(error: float, decimals: int) -> str:
    return f' <span class="error">± {data(error, f"{error:.{decimals}f}")}</span>' if math.isfinite(error) else ""


def _gap(gaps: Sequence[Gap | None], position: int, is_baseline: bool) -> str:
    """One cell of a column of differences, all with the same decimals."""
    gap = gaps[position]
    if gap is None:
        return '<span class="error">baseline</span>' if is_baseline else DASH
    decimals = decimals_for(other.error for other in gaps if other is not None)
    return data(gap.value, difference_text(gap.value, math.nan, decimals)) + _error(gap.error, decimals)


def domain_table(view: View) -> str:
    """Final loss and weight by domain, open where it is short."""
    names, shown = view.scored_domains, view.contenders
    if not names:
        return ""
    weights = any(run.weights for run in view.runs) and len(shown) <= 5
    labels = [_swatch(view, one.label) + escape(one.label) for one in shown]
    if weights:
        groups = "".join(f'<th scope="colgroup" colspan="2">{label}</th>' for label in labels)
        columns = '<th scope="col">bits per byte</th><th scope="col">weight</th>' * len(shown)
        head = f'<tr><th scope="col" rowspan="2" class="text">Domain</th>{groups}</tr><tr>{columns}</tr>'
    else:
        head = column_head(["Domain", *labels])
    rows = []
    for name in names:
        scores = [one.domain(name) for one in shown]
        best = _best([score.bits_per_byte for score in scores])
        row = [Cell(escape(name), "text", header=True)]
        for position, one in enumerate(shown):
            row.append(Cell(_score(scores[position], position == best and len(shown) > 1)))
            row += [Cell(data(one.weight(name), f"{one.weight(name):.1%}"))] if weights else []
        rows.append(row)
    over = "over runs" if shown[0].repeated else "over windows"
    caption = f"Final bits per byte on held-out text{_windows(view)}, ± one standard error {over}"
    caption += ", and final mixture weight." if weights else "."
    text = table(caption, head, rows, kind="dense")
    return details(f"All {len(names)} domains as a table", text, is_open=len(names) <= OPEN_ROWS)


def time_table(view: View) -> str:
    """Wall time by activity and run."""
    parts = list(dict.fromkeys(name for run in view.runs for name in run.seconds))
    if not parts:
        return ""
    rows = [
        [
            Cell(_run_name(view, run), "text", header=True),
            *(Cell(data(value, duration_text(value))) for value in (run.seconds.get(p, math.nan) for p in parts)),
            Cell(data(run.steps, f"{run.steps:,.0f}".replace(",", " "))),
        ]
        for run in view.runs
    ]
    head = column_head(["Run", *(escape(part) for part in parts), "steps"])
    return details("Where the time went", table("Wall time by activity.", head, rows, kind="dense"))
