"""`write_report`: run folders in, one self-contained HTML page out.

The page is text, tables and inline SVG; it loads nothing and runs nothing. The same folders give the same bytes.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
from numpy.typing import NDArray

from weft import __version__
from weft.errors import ConfigError, DataError
from weft.progress import count_text, duration_text
from weft.reporting.compare import (
    Gap,
    baseline_of,
    decimals_for,
    difference_text,
    finding,
    generic_gap,
    generic_score,
    target_gap,
    target_score,
)
from weft.reporting.figures import (
    OTHER,
    Curve,
    Line,
    Panel,
    compared_curves,
    domain_lines,
    grouped_bars,
    inline_svg,
    run_lines,
    small_multiples,
    stacked_areas,
    to_svg,
)
from weft.reporting.html import DASH, Cell, clean, column_head, data, details, escape, figure, section, table
from weft.reporting.runs import Evaluation, Run, Score, flatten, mapping, number, read_runs

NAMED_DOMAINS = 9
"""Domains with a colour of their own; the rest of a larger set is shown together."""
SMALL_MULTIPLES = 20
BAR_GROUPS = 18
OPEN_ROWS = 15
"""Rows up to which the table by domain is shown open."""


def write_report(
    runs: Sequence[str | Path],
    output: str | Path,
    title: str | None = None,
    *,
    prepared: str | Path | None = None,
) -> Path:
    """Write one HTML page about one run or several.

    Args:
        runs: run folders: finished, still running or partly broken. What is missing is said on the page.
        output: the file to write; written whole or not at all.
        title: of the page; made from the runs' names when None.
        prepared: folder of the prepared data; its `prepared.json` is shown.
    Returns:
        `output` as a path.
    Raises:
        ConfigError: no run is given.
        DataError: a path is not a folder, or the page cannot be written.
    """
    if not runs:
        raise ConfigError("a report needs at least one run folder; none was given")
    page = render_report(read_runs(runs), title, _read_prepared(prepared))
    output = Path(output)
    partial = output.with_name(f".{output.name}.writing")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(page, encoding="utf-8")
        os.replace(partial, output)
    except OSError as error:
        raise DataError(f"the report {output} cannot be written: {error.strerror}") from error
    return output


def render_report(runs: Sequence[Run], title: str | None = None, prepared: Mapping[str, Any] | None = None) -> str:
    """The page as text."""
    view = _View.of(runs)
    parts = [
        ("summary", "Summary", "Summary", _summary(view)),
        ("mixture", "Mixture", "Mixture over time", _mixture(view)),
        ("alignment", "Alignment", "Gradient alignment", _alignment(view)),
        ("losses", "Loss", "Target and generic loss", _losses(view)),
        ("domains", "By domain", "Loss by domain", _domains(view)),
        ("epochs", "Epochs", "Passes over the data", _epochs(view)),
        ("training", "Training", "Training", _training(view)),
        ("data", "Data", "Prepared data", _prepared(prepared)),
        ("recipe", "Recipe", "Recipe", _recipe(view)),
        ("environment", "Environment", "Environment", _environment(view)),
        ("reading", "How to read", "How to read this page", _reading(view)),
    ]
    parts = [part for part in parts if part[3]]
    found = finding(runs)
    page = Template(resources.files("weft.reporting").joinpath("page/report.html").read_text(encoding="utf-8"))
    style = resources.files("weft.reporting").joinpath("page/report.css").read_text(encoding="utf-8")
    return page.substitute(
        version=escape(__version__),
        title=escape(title if title is not None else _title(runs)),
        style=style.strip(),
        kicker=_kicker(view),
        headline=escape(found.headline),
        qualifiers="\n".join(f'<p class="note">{escape(text)}</p>' for text in found.details),
        contents="\n".join(f'<a href="#{key}">{short}</a>' for key, short, _, _ in parts),
        body="\n".join(section(key, heading, inside) for key, _, heading, inside in parts),
    )


@dataclass(frozen=True)
class _View:
    """The runs with what every part of the page shares: baseline, colours, and which domains are named."""

    runs: tuple[Run, ...]
    baseline: Run
    run_lines: dict[str, Line]
    domains: tuple[str, ...]
    named: tuple[str, ...]
    domain_lines: dict[str, Line]

    @staticmethod
    def of(runs: Sequence[Run]) -> _View:
        baseline = baseline_of(runs)
        domains = list(dict.fromkeys(name for run in runs for name in run.domains))
        named = domains
        if len(domains) > NAMED_DOMAINS:
            importance = {name: max(_mean_weight(run, name) for run in runs) for name in domains}
            named = sorted(domains, key=lambda name: -importance[name])[:NAMED_DOMAINS]
        shown = [*named, OTHER] if len(named) < len(domains) else list(named)
        labels = [run.label for run in runs]
        return _View(
            tuple(runs),
            baseline,
            run_lines(labels, baseline.label if len(runs) > 1 else None),
            tuple(domains),
            tuple(named),
            domain_lines(shown),
        )


def _mean_weight(run: Run, domain: str) -> float:
    values_N = run.domain_series("weights", domain)[1]
    known_N = values_N[np.isfinite(values_N)]
    if len(known_N):
        return float(known_N.mean())
    weight = run.weights.get(domain, 0.0)
    return weight if math.isfinite(weight) else 0.0


# ------------------------------------------------------------------------------------------------------------ heading


def _title(runs: Sequence[Run]) -> str:
    if len(runs) == 1:
        return f"{runs[0].path.resolve().name}: training report"
    names = [run.label for run in runs]
    listed = ", ".join(names[:-1]) + " and " + names[-1] if len(names) <= 4 else f"{len(names)} runs"
    return f"{listed} compared"


def _kicker(view: _View) -> str:
    facts = [f"{len(view.runs)} runs" if len(view.runs) > 1 else "One run"]
    if view.domains:
        facts.append(f"{len(view.domains)} domains")
    sizes = sorted({run.parameters for run in view.runs if math.isfinite(run.parameters)})
    if sizes:
        facts.append(" and ".join(count_text(size) for size in sizes) + " parameters")
    tokens = [run.train_tokens for run in view.runs if math.isfinite(run.train_tokens)]
    if tokens and max(tokens) <= 1.01 * min(tokens):
        facts.append(f"{count_text(max(tokens))} training tokens" + (" each" if len(view.runs) > 1 else ""))
    return " · ".join(facts)


# ------------------------------------------------------------------------------------------------------------ summary


def _summary(view: _View) -> str:
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
        seconds = run.seconds.get("train", math.nan)
        share = run.seconds.get("alignment", math.nan) / seconds if seconds > 0 else math.nan
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


def _run_name(view: _View, run: Run) -> str:
    notes = [run.policy] if run.policy and run.policy != run.label else []
    if not run.finished:
        notes.append(f"not finished, step {run.steps:.0f}" if math.isfinite(run.steps) else "not finished")
    sub = f'<span class="sub">{escape(", ".join(notes))}</span>' if notes else ""
    return _swatch(view, run) + escape(run.label) + sub


def _swatch(view: _View, run: Run) -> str:
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


# ------------------------------------------------------------------------------------------------------------- charts


def _mixture(view: _View) -> str:
    panels, known = [], False
    for run in view.runs:
        curves = _weights_over_time(view, run)
        known = known or bool(curves)
        panels.append(Panel(run.label, tuple(curves)))
    if not known:
        return ""
    ends = "; ".join(
        f"{run.label}: " + ", ".join(f"{name} {weight:.0%}" for name, weight in _largest(run.weights, 3))
        for run in view.runs
        if run.weights
    )
    rest = (
        f" The {NAMED_DOMAINS} domains with the largest mean weight in any run are named; the other "
        f"{len(view.domains) - NAMED_DOMAINS} are added up."
        if len(view.named) < len(view.domains)
        else ""
    )
    caption = "Probability of drawing a training sequence from each domain. Each update holds until the next." + rest
    chart = stacked_areas(panels, view.domain_lines)
    return _figure("mixture", chart, caption, f"Stacked mixture weights over training tokens. Final largest: {ends}.")


def _weights_over_time(view: _View, run: Run) -> list[Curve]:
    """Weights by named domain and `other`, the last update held to the end of training."""
    x_N, _ = run.domain_series("weights", "")
    series = {name: run.domain_series("weights", name)[1] for name in view.domains}
    if not len(x_N):
        if not run.weights:
            return []
        x_N = np.zeros(1)
        series = {name: np.array([run.weights.get(name, math.nan)]) for name in view.domains}
    if math.isfinite(run.train_tokens) and run.train_tokens > x_N[-1]:
        x_N = np.append(x_N, run.train_tokens)
        series = {name: np.append(values_N, values_N[-1]) for name, values_N in series.items()}
    curves = [Curve(name, x_N, np.nan_to_num(series[name])) for name in view.named]
    if OTHER in view.domain_lines:
        rest = [np.nan_to_num(values_N) for name, values_N in series.items() if name not in view.named]
        curves.append(Curve(OTHER, x_N, np.sum(rest, axis=0)))
    return curves


def _largest(values: Mapping[str, float], count: int) -> list[tuple[str, float]]:
    known = [(name, value) for name, value in values.items() if math.isfinite(value)]
    return sorted(known, key=lambda item: -item[1])[:count]


def _alignment(view: _View) -> str:
    panels, groups_are_domains, smoothed = [], True, False
    lines: dict[str, Line] = {}
    for run in view.runs:
        groups = list(dict.fromkeys(str(name) for r in run.mixture for name in mapping(r.get("alignment"))))
        if not groups:
            continue
        if set(groups) <= set(view.domains):
            named = [name for name in view.named if name in groups]
        else:
            groups_are_domains, named = False, groups[:NAMED_DOMAINS]
        lines |= {name: line for name, line in view.domain_lines.items() if name in named} or domain_lines(named)
        curves = []
        for name in [*(group for group in groups if group not in named), *named]:
            x_N, y_N = run.domain_series("alignment", name)
            window = len(x_N) // 12
            smoothed = smoothed or window > 1
            curves.append(Curve(name, x_N, moving_mean(y_N, window)))
        panels.append(Panel(run.label, tuple(curves)))
    if not panels:
        return ""
    chart = small_multiples(
        panels,
        lines,
        y_label="alignment",
        columns=min(2, len(panels)),
        legend=list(lines),
        zero=True,
        settle=0.05,
        row_height=2.6 if len(panels) == 1 else 2.3,
    )
    what = "each domain's" if groups_are_domains else "each basis distribution's"
    faint = " Grey lines: the groups without a colour of their own." if any(
        len(panel.curves) > NAMED_DOMAINS for panel in panels
    ) else ""  # fmt: skip
    mean = " Lines are moving means over a twelfth of the updates." if smoothed else ""
    caption = (
        f"Inner product of {what} gradient with the direction the policy follows (the target's gradient, or the mean "
        f"over domains). Above zero, training there lowers the loss that is followed.{mean}{faint}"
    )
    return _figure("alignment", chart, caption, "Alignments over training tokens, one line per domain.")


def moving_mean(values_N: NDArray[np.float64], window: int) -> NDArray[np.float64]:
    """Centred mean over `window` values, fewer at the ends and beside NaN, which stays NaN; below 2 nothing changes."""
    if window < 2:
        return values_N
    known_N = np.isfinite(values_N)
    ones = np.ones(window)
    sums = np.convolve(np.where(known_N, values_N, 0.0), ones, mode="same")
    counts = np.convolve(known_N.astype(np.float64), ones, mode="same")
    means: NDArray[np.float64] = np.divide(sums, counts, out=np.full(len(sums), np.nan), where=known_N)
    return means


def _losses(view: _View) -> str:
    def curves(score: Callable[[Evaluation], Score]) -> tuple[Curve, ...]:
        result = []
        for run in view.runs:
            points = _moments(run)
            result.append(
                Curve(
                    run.label,
                    np.array([e.tokens for e in points]),
                    np.array([score(e).bits_per_byte for e in points]),
                    np.nan_to_num(np.array([score(e).bits_per_byte_se for e in points])),
                )
            )
        return tuple(result)

    panels = [
        Panel("Target, bits per byte", curves(lambda evaluation: evaluation.target)),
        Panel("Generic, bits per byte (mean over domains)", curves(lambda evaluation: evaluation.generic)),
    ]
    if not any(np.isfinite(curve.y_N).any() for panel in panels for curve in panel.curves):
        return ""
    caption = (
        "Loss on held-out text during training, with the value at the end. Bands: ± one standard error of each value "
        "by itself; differences between runs on the same text are known better than the bands suggest. The first part "
        "of training may lie above the frame."
    )
    told = "; ".join(
        f"{panel.title}: " + ", ".join(f"{c.label} {_last(c.y_N)}" for c in panel.curves) for panel in panels
    )
    return _figure("losses", compared_curves(panels, view.run_lines), caption, told)


def _last(values_N: NDArray[np.float64]) -> str:
    known_N = values_N[np.isfinite(values_N)]
    return f"{known_N[-1]:.3f}" if len(known_N) else "not recorded"


def _moments(run: Run) -> list[Evaluation]:
    """Every evaluation, and the final one where metrics.jsonl holds none of the same moment."""
    moments = [evaluation for evaluation in run.evaluations if math.isfinite(evaluation.tokens)]
    if run.final is not None and math.isfinite(run.final.tokens):
        moments = [evaluation for evaluation in moments if evaluation.tokens < run.final.tokens] + [run.final]
    return moments


def _domains(view: _View) -> str:
    scored = [name for name in view.domains if any(_domain_score(run, name) is not None for run in view.runs)]
    if not scored:
        return ""
    shown = scored
    if len(scored) > SMALL_MULTIPLES:
        shown = [name for name in view.named if name in scored]
        rest = sorted((name for name in scored if name not in shown), key=lambda name: -_spread(view, name))
        shown += rest[: SMALL_MULTIPLES - len(shown)]
    panels = []
    for name in shown:
        curves = []
        for run in view.runs:
            points = [e for e in _moments(run) if name in e.domains]
            curves.append(
                Curve(
                    run.label,
                    np.array([e.tokens for e in points], dtype=np.float64),
                    np.array([e.domains[name].bits_per_byte for e in points], dtype=np.float64),
                )
            )
        panels.append(Panel(name, tuple(curves)))
    few = max((len(curve.x_N) for panel in panels for curve in panel.curves), default=0)
    text = ""
    if few > 1:
        chart = small_multiples(
            panels, view.run_lines, y_label="bits per byte",
            legend=[run.label for run in view.runs] if len(view.runs) > 1 else (),
        )  # fmt: skip
        left_out = (
            f" Shown: the named domains and those where the runs differ most, {len(shown)} of {len(scored)}."
            if len(shown) < len(scored)
            else ""
        )
        caption = f"Bits per byte on each domain's held-out text; each frame has its own scale.{left_out}"
        text = _figure("domains", chart, caption, "Small charts of bits per byte, one per domain, all runs in each.")
    return text + _domain_table(view, scored)


def _spread(view: _View, name: str) -> float:
    values = [score.bits_per_byte for run in view.runs if (score := _domain_score(run, name)) is not None]
    known = [value for value in values if math.isfinite(value)]
    return max(known) - min(known) if known else 0.0


def _domain_score(run: Run, name: str) -> Score | None:
    return run.final.domains.get(name) if run.final is not None else None


def _domain_table(view: _View, names: Sequence[str]) -> str:
    runs = view.runs
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
        scores = [_domain_score(run, name) or Score() for run in runs]
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


def _epochs(view: _View) -> str:
    runs = [run for run in view.runs if any(math.isfinite(value) for value in run.epochs.values())]
    if not runs:
        return ""
    names = list(view.domains)
    left_out = ""
    if len(names) > BAR_GROUPS:
        most = {name: max(_finite(run.epochs.get(name)) for run in runs) for name in names}
        names = sorted(names, key=lambda name: -most[name])[:BAR_GROUPS]
        left_out = f" Shown: the {BAR_GROUPS} domains read most often, of {len(view.domains)}."
    values = {run.label: [run.epochs.get(name, math.nan) for name in names] for run in runs}
    near_one = max(value for row in values.values() for value in row if math.isfinite(value)) >= 0.5
    chart = grouped_bars(
        names, values, view.run_lines, x_label="passes over the domain's training text",
        mark=1.0 if near_one else None, mark_label="1 pass",
    )  # fmt: skip
    caption = f"How often each domain's training text was read. Beyond one pass text repeats.{left_out}"
    most_read = "; ".join(
        f"{run.label}: " + ", ".join(f"{name} {value:.2f}" for name, value in _largest(run.epochs, 3)) for run in runs
    )
    return _figure("epochs", chart, caption, f"Passes over each domain's training text. Most: {most_read}.")


def _finite(value: float | None) -> float:
    return value if value is not None and math.isfinite(value) else 0.0


def _training(view: _View) -> str:
    panels = []
    for key, title, text, from_zero in (
        ("loss", "Training loss, nats per token", lambda value: f"{value:.3f}", False),
        ("tokens_per_second", "Training tokens per second", count_text, True),
    ):
        curves = []
        for run in view.runs:
            x_N, y_N = run.series("train", key)
            curves.append(Curve(run.label, x_N, moving_mean(y_N, len(y_N) // 25)))
        panels.append(Panel(title, tuple(curves), text, from_zero))
    if not any(np.isfinite(curve.y_N).any() for panel in panels for curve in panel.curves):
        return ""
    caption = (
        "Moving means. Training loss is taken on each run's own mixture, so it does not compare runs: one that draws "
        "easier text shows a lower loss. Compare held-out losses instead."
    )
    told = "; ".join(f"{p.title}: " + ", ".join(f"{c.label} {_last(c.y_N)}" for c in p.curves) for p in panels)
    chart = _figure("training", compared_curves(panels, view.run_lines, height=2.7), caption, told)
    return chart + _time_table(view)


def _time_table(view: _View) -> str:
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


def _figure(key: str, chart: Any, caption: str, description: str) -> str:
    return figure(inline_svg(to_svg(chart), f"fig-{key}", clean(description)), escape(caption))


# -------------------------------------------------------------------------------------------------------------- facts


def _recipe(view: _View) -> str:
    recipes = [flatten(dict(run.recipe)) for run in view.runs]
    text = ""
    if len(view.runs) > 1 and all(recipes):
        keys = list(dict.fromkeys(key for recipe in recipes for key in recipe))
        differing = [key for key in keys if len({_value(recipe, key) for recipe in recipes}) > 1]
        if differing:
            rows = [
                [Cell(escape(key), "text", header=True), *(Cell(escape(_value(r, key)), "text") for r in recipes)]
                for key in differing
            ]
            head = _left_head(["Key", *(run.label for run in view.runs)])
            text += table("Where the recipes differ; all other keys are equal.", head, rows, kind="facts")
        else:
            text += "<p>The recipes are equal.</p>"
    for run in view.runs:
        if run.recipe_text:
            name = f"Resolved recipe of {escape(run.label)}" if len(view.runs) > 1 else "Resolved recipe"
            lines = "\n".join(clean(line) for line in run.recipe_text.strip("\n").splitlines())
            text += details(name, f"<pre>{_escape_lines(lines)}</pre>")
    return text


def _escape_lines(text: str) -> str:
    return "\n".join(escape(line) for line in text.split("\n"))


def _left_head(names: Sequence[str]) -> str:
    return "<tr>" + "".join(f'<th scope="col" class="text">{escape(name)}</th>' for name in names) + "</tr>"


def _value(values: Mapping[str, Any], key: str) -> str:
    """One value as YAML writes it inline; an absent key is a dash."""
    if key not in values:
        return DASH
    value = values[key]
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _environment(view: _View) -> str:
    facts = [_named_items(dict(run.facts)) for run in view.runs]
    flat = [flatten(fact) for fact in facts]
    keys = list(dict.fromkeys(key for fact in flat for key in fact))
    if not keys:
        return ""
    shared = [key for key in keys if len({_value(fact, key) for fact in flat}) == 1]
    differing = [key for key in keys if key not in shared]
    text = ""
    if differing:
        rows = [
            [Cell(escape(key), "text", header=True), *(Cell(escape(_value(f, key)), "text") for f in flat)]
            for key in differing
        ]
        head = _left_head(["Fact", *(run.label for run in view.runs)])
        text += table("Where the runs' environments differ.", head, rows, kind="facts")
    if shared:
        rows = [[Cell(escape(key), "text", header=True), Cell(escape(_value(flat[0], key)), "text")] for key in shared]
        caption = "The same in every run." if len(view.runs) > 1 else "Versions, seeds, fingerprints and decisions."
        text += details(
            "Versions, seeds and fingerprints", table(caption, _left_head(["Fact", "Value"]), rows, kind="facts")
        )
    return text


def _named_items(facts: dict[str, Any]) -> dict[str, Any]:
    """Lists of `{setting, value, reason}` (the choices made for the machine) as one entry per setting."""
    result: dict[str, Any] = {}
    for key, value in facts.items():
        if isinstance(value, list) and value and all("setting" in mapping(item) for item in value):
            result[key] = {
                str(item["setting"]): f"{item.get('value')}" + (f" ({item['reason']})" if item.get("reason") else "")
                for item in value
            }
        else:
            result[key] = value
    return result


def _read_prepared(folder: str | Path | None) -> dict[str, Any] | None:
    if folder is None:
        return None
    path = Path(folder) / "prepared.json"
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        return {"prepared.json": f"cannot be read: {error}"}
    return value if isinstance(value, dict) else {"prepared.json": "holds no JSON object"}


def _prepared(prepared: Mapping[str, Any] | None) -> str:
    """The prepared data's facts: a table for what is listed by domain, the rest as keys and values."""
    if not prepared:
        return ""
    text, rest = "", dict(prepared)
    for key, value in prepared.items():
        listed = _by_name(value)
        columns = list(dict.fromkeys(c for facts in listed.values() for c, v in facts.items() if _is_count(v)))
        if len(listed) > 1 and columns:
            del rest[key]
            rows = [
                [
                    Cell(escape(name), "text", header=True),
                    *(Cell(data(v, count_text(v))) for v in (number(facts.get(c)) for c in columns)),
                ]
                for name, facts in listed.items()
            ]
            head = column_head([escape(key.capitalize()), *(escape(c.replace("_", " ")) for c in columns)])
            content = table(f"Prepared {escape(key)}.", head, rows, kind="dense")
            text += details(f"{len(rows)} {escape(key)}", content, is_open=len(rows) <= OPEN_ROWS)
    flat = flatten(rest)
    rows = [[Cell(escape(key), "text", header=True), Cell(escape(_value(flat, key)), "text")] for key in flat]
    if rows:
        content = table("Facts of the prepared data.", _left_head(["Fact", "Value"]), rows, kind="facts")
        text += details("Other facts of the prepared data", content)
    return text


def _by_name(value: Any) -> dict[str, dict[str, Any]]:
    """`{name: facts}` or `[{"name": ..., facts}]` as one form, facts flattened; empty for anything else."""
    if isinstance(value, list) and all("name" in mapping(item) for item in value):
        value = {str(item["name"]): {k: v for k, v in item.items() if k != "name"} for item in value}
    if not isinstance(value, dict) or not all(isinstance(facts, dict) for facts in value.values()):
        return {}
    return {str(name): flatten(facts) for name, facts in value.items()}


def _is_count(value: Any) -> bool:
    return math.isfinite(number(value))


def _reading(view: _View) -> str:
    entries = {
        "Bits per byte": "Summed loss in bits over the UTF-8 bytes of the scored text. Unlike loss per token it "
        "compares models with different tokenizers. Lower is better.",
        "Target": "Held-out text of the kind the model is trained for; none of it is trained on.",
        "Generic": "The mean over all domains' held-out sets, each counting once: what the model keeps elsewhere.",
        "± one standard error": "Over windows of held-out text, taken as independent; for sets of a few long documents "
        "it is too small. The spread over training seeds is not in it.",
    }
    if len(view.runs) > 1:
        entries["Differences"] = (
            "Paired window by window where both runs kept their window losses: what makes a window hard cancels. "
            "Called clear from two standard errors."
        )
    items = "\n".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in entries.items())
    return f"<dl>\n{items}\n</dl>"
