"""The charts of a report, each a figure with its caption, or nothing where no run recorded what it shows."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from weftlm.progress import count_text
from weftlm.reporting.figures import (
    OTHER,
    Curve,
    Line,
    Panel,
    compared_curves,
    domain_lines,
    grouped_bars,
    inline_svg,
    small_multiples,
    stacked_areas,
    to_svg,
)
from weftlm.reporting.html import escape, figure
from weftlm.reporting.runs import Evaluation, Run, Score, mapping
from weftlm.reporting.view import NAMED_DOMAINS, View, domain_score

SMALL_MULTIPLES = 20
"""Domains with a frame of their own."""
BAR_GROUPS = 18
"""Domains with bars of their own."""


def mixture_chart(view: View) -> str:
    """Mixture weights over time, stacked, one frame per run."""
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


def _weights_over_time(view: View, run: Run) -> list[Curve]:
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


def alignment_chart(view: View) -> str:
    """Gradient alignments over time, for the runs that measured them."""
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


def loss_charts(view: View) -> str:
    """Target and generic loss during training, all runs in each frame."""

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
        "by itself; differences between runs on the same text are known better than the bands suggest."
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


def domain_charts(view: View) -> str:
    """Held-out loss during training, one small frame per domain."""
    scored = view.scored_domains
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
    if max((len(curve.x_N) for panel in panels for curve in panel.curves), default=0) < 2:
        return ""
    legend = [one.label for one in view.contenders] if len(view.runs) > 1 else []
    chart = small_multiples(panels, view.run_lines, y_label="bits per byte", legend=legend, logarithmic=True)
    caption = "Bits per byte on each domain's held-out text; each frame has its own scale, logarithmic."
    if len(shown) < len(scored):
        caption += f" Shown: the named domains and those where the runs differ most, {len(shown)} of {len(scored)}."
    return _figure("domains", chart, caption, "Small charts of bits per byte, one per domain, all runs in each.")


def _spread(view: View, name: str) -> float:
    values = [score.bits_per_byte for run in view.runs if (score := domain_score(run, name)) is not None]
    known = [value for value in values if math.isfinite(value)]
    return max(known) - min(known) if known else 0.0


def epoch_chart(view: View) -> str:
    """How often each domain's training text was read."""
    passes = {one.label: {name: one.epochs(name) for name in view.domains} for one in view.contenders}
    passes = {label: row for label, row in passes.items() if any(math.isfinite(value) for value in row.values())}
    if not passes:
        return ""
    names = list(view.domains)
    caption = "How often each domain's training text was read. Beyond one pass text repeats."
    if view.contenders[0].repeated:
        caption += " Means over repeated runs."
    if len(names) > BAR_GROUPS:
        most = {name: max((row[name] for row in passes.values() if math.isfinite(row[name])), default=0.0)
                for name in names}  # fmt: skip
        names = sorted(names, key=lambda name: -most[name])[:BAR_GROUPS]
        caption += f" Shown: the {BAR_GROUPS} domains read most often, of {len(view.domains)}."
    near_one = max(value for row in passes.values() for value in row.values() if math.isfinite(value)) >= 0.5
    chart = grouped_bars(
        names, {label: [row[name] for name in names] for label, row in passes.items()}, view.run_lines,
        x_label="passes over the domain's training text", mark=1.0 if near_one else None, mark_label="1 pass",
    )  # fmt: skip
    most_read = "; ".join(
        f"{label}: " + ", ".join(f"{name} {value:.2f}" for name, value in _largest(row, 3))
        for label, row in passes.items()
    )
    return _figure("epochs", chart, caption, f"Passes over each domain's training text. Most: {most_read}.")


def training_charts(view: View) -> str:
    """Training loss and speed."""
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
    return _figure("training", compared_curves(panels, view.run_lines, height=2.7), caption, told)


def _figure(key: str, chart: Figure, caption: str, description: str) -> str:
    return figure(inline_svg(to_svg(chart), f"fig-{key}", description), escape(caption))
