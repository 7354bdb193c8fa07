"""The tables of a report: the summary, the losses by domain, the time spent. A cell keeps its exact number."""

from __future__ import annotations

import math
from collections.abc import Sequence

from weft.progress import count_text, duration_text
from weft.reporting.compare import (
    Gap,
    decimals_for,
    difference_text,
    generic_gap,
    generic_score,
    target_gap,
    target_score,
)
from weft.reporting.html import DASH, Cell, column_head, data, details, escape, table
from weft.reporting.runs import Run, Score
from weft.reporting.view import OPEN_ROWS, View, domain_score


def summary_table(view: View) -> str:
    """One line per run: losses, differences, cost; and under it what is missing."""
    several = len(view.runs) > 1
    targets = [target_score(run) for run in view.runs]
    generics = [generic_score(run) for run in view.runs]
    best_target, best_generic = (_best([score.bits_per_byte for score in scores]) for scores in (targets, generics))
    target_gaps = [target_gap(run, view.baseline) for run in view.runs]
    generic_gaps = [generic_gap(run, view.baseline) for run in view.runs]
    against = f"against {escape(view.baseline.label)}"
    heads = ["Run", "Target<br>bits per byte"]
    heads += [f"Target<br>{against}"] if several else []
    heads += ["Generic<br>bits per byte"]
    heads += [f"Generic<br>{against}"] if several else []
    heads += ["Training<br>tokens", "Training<br>time", "Alignment<br>share of it"]
    rows = []
    for position, run in enumerate(view.runs):
        row = [Cell(_run_name(view, run), "text", header=True)]
        row.append(Cell(_score(targets[position], position == best_target and several)))
        row += [Cell(_gap(target_gaps, position, run is view.baseline))] if several else []
        row.append(Cell(_score(generics[position], position == best_generic and several)))
        row += [Cell(_gap(generic_gaps, position, run is view.baseline))] if several else []
        alignment = run.seconds.get("alignment", math.nan)
        seconds = math.fsum(value for value in (run.seconds.get("train", math.nan), alignment) if math.isfinite(value))
        seconds = seconds if seconds > 0 else math.nan
        share = alignment / seconds
        row.append(Cell(data(run.train_tokens, count_text(run.train_tokens))))
        row.append(Cell(data(seconds, duration_text(seconds))))
        row.append(Cell(data(share, f"{share:.1%}")))
        rows.append(row)
    best = " The lowest value of a column is bold." if several else ""
    caption = f"Held-out text, ± one standard error; lower is better.{best}"
    problems = [(run, problem) for run in view.runs for problem in run.problems]
    text = table(caption, column_head(heads), rows)
    if problems:
        items = "\n".join(
            f"<li>{f'<strong>{escape(run.label)}:</strong> ' if several else ''}{escape(problem)}</li>"
            for run, problem in problems
        )
        text += f'\n<ul class="warning" aria-label="What is missing">\n{items}\n</ul>'
    return text


def _best(values: Sequence[float]) -> int | None:
    known = [position for position, value in enumerate(values) if math.isfinite(value)]
    return min(known, key=lambda position: values[position]) if known else None


def _run_name(view: View, run: Run) -> str:
    notes = [run.policy] if run.policy and run.policy != run.label else []
    if not run.finished:
        notes.append(f"not finished, step {run.steps:.0f}" if math.isfinite(run.steps) else "not finished")
    sub = f'<span class="sub">{escape(", ".join(notes))}</span>' if notes else ""
    return _swatch(view, run) + escape(run.label) + sub


def _swatch(view: View, run: Run) -> str:
    return f'<span class="swatch" style="background:{view.run_lines[run.label].colour}"></span>'


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
    runs, names = view.runs, view.scored_domains
    if not names:
        return ""
    weights = any(run.weights for run in runs) and len(runs) <= 5
    if weights:
        groups = "".join(
            f'<th scope="colgroup" colspan="2">{_swatch(view, run)}{escape(run.label)}</th>' for run in runs
        )
        columns = '<th scope="col">bits per byte</th><th scope="col">weight</th>' * len(runs)
        head = f'<tr><th scope="col" rowspan="2" class="text">Domain</th>{groups}</tr><tr>{columns}</tr>'
    else:
        head = column_head(["Domain", *(escape(run.label) for run in runs)])
    rows = []
    for name in names:
        scores = [domain_score(run, name) or Score() for run in runs]
        best = _best([score.bits_per_byte for score in scores])
        row = [Cell(escape(name), "text", header=True)]
        for position, run in enumerate(runs):
            row.append(Cell(_score(scores[position], position == best and len(runs) > 1)))
            if weights:
                weight = run.weights.get(name, math.nan)
                row.append(Cell(data(weight, f"{weight:.1%}")))
        rows.append(row)
    caption = "Final bits per byte on held-out text, ± one standard error" + (
        ", and final mixture weight." if weights else "."
    )
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
