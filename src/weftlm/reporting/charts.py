"""The charts of a report, each a figure with its caption; none where no run recorded what it shows."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import matplotlib.figure
import numpy as np

from weftlm.progress import count_text
from weftlm.reporting.compare import NAMED_DOMAINS, View, domain_score
from weftlm.reporting.figures import (
    OTHER,
    Curve,
    Panel,
    curve_grid,
    domain_lines,
    inline_svg,
    stacked_areas,
    thin,
    to_svg,
)
from weftlm.reporting.page import Figure
from weftlm.reporting.runs import Evaluation, Run, Score, mapping

SMALL_MULTIPLES = 20
"""Domains with a frame of their own."""
NOISY = 60
"""Points of a noisy curve, each a mean over its part of the run."""


def drawn(key: str, chart: matplotlib.figure.Figure, caption: str, description: str) -> Figure:
    """A chart as a block: `key` is its id in the page, `description` what is read aloud."""
    return Figure(inline_svg(to_svg(chart), f"fig-{key}", description), caption)


def mixture_chart(view: View) -> list[Figure]:
    """Mixture weights over time, stacked, one frame per run."""
    panels = [Panel(run.label, tuple(_weights_over_time(view, run))) for run in view.runs]
    if not any(panel.curves for panel in panels):
        return []
    caption = "Probability of drawing a training sequence from each domain. Each update holds until the next."
    if len(view.named) < len(view.domains):
        caption += (
            f" The {NAMED_DOMAINS} domains with the largest mean weight in any run are named; the other "
            f"{len(view.domains) - NAMED_DOMAINS} are added up."
        )
    chart = stacked_areas(panels, view.domain_lines)
    return [drawn("mixture", chart, caption, "Stacked mixture weights over training tokens, one frame per run.")]


def _weights_over_time(view: View, run: Run) -> list[Curve]:
    """Weights by named domain and `OTHER`, the last update held to the end of training."""
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
    found = [Curve(name, x_N, np.nan_to_num(series[name])) for name in view.named]
    if OTHER in view.domain_lines:
        rest = [np.nan_to_num(values_N) for name, values_N in series.items() if name not in view.named]
        found.append(Curve(OTHER, x_N, np.sum(rest, axis=0)))
    return found


def alignment_chart(view: View) -> list[Figure]:
    """Gradient alignments over time, for the runs that measured them."""
    panels, lines, own_names = [], dict(view.domain_lines), False
    for run in view.runs:
        groups = list(dict.fromkeys(str(name) for record in run.mixture for name in mapping(record.get("alignment"))))
        if not groups:
            continue
        if not set(groups) <= set(view.domains):
            own_names, lines = True, domain_lines(groups[:NAMED_DOMAINS])
        series = [Curve(name, *run.domain_series("alignment", name)) for name in groups]
        panels.append(Panel(run.label, tuple(thin(curve, NOISY) for curve in series)))
    if not panels:
        return []
    named = [name for name in lines if any(curve.label == name for panel in panels for curve in panel.curves)]
    chart = curve_grid(panels, lines, y_label="alignment", legend=named, zero=True)
    caption = (
        f"Inner product of each {'basis distribution' if own_names else 'domain'}'s gradient with the direction the "
        "policy follows (the target's gradient, or the mean over domains), averaged over stretches of the run. Above "
        "zero, training there lowers the loss that is followed."
    )
    if any(len(panel.curves) > len(named) for panel in panels):
        caption += " Grey lines: the groups without a colour of their own."
    return [drawn("alignment", chart, caption, "Alignments over training tokens, one line per domain.")]


def loss_charts(view: View) -> list[Figure]:
    """Target and generic loss during training, all runs in each frame."""

    def of(score: Callable[[Evaluation], Score]) -> tuple[Curve, ...]:
        return tuple(
            Curve(
                run.label,
                np.array([point.tokens for point in points]),
                np.array([score(point).bits_per_byte for point in points]),
                np.nan_to_num(np.array([score(point).bits_per_byte_se for point in points])),
            )
            for run in view.runs
            for points in [_moments(run)]
        )

    panels = [
        Panel("Target, bits per byte", of(lambda evaluation: evaluation.target)),
        Panel("Generic, bits per byte (mean over domains)", of(lambda evaluation: evaluation.generic)),
    ]
    caption = (
        "Loss on held-out text during training, with the value at the end. Bands: ± one standard error of each value "
        "by itself; differences between runs on the same text have smaller errors than the bands suggest."
    )
    return _compared(view, "losses", panels, caption, "Target and generic loss over training tokens, all runs in each.")


def training_charts(view: View) -> list[Figure]:
    """Training loss and speed."""

    def of(key: str) -> tuple[Curve, ...]:
        return tuple(thin(Curve(run.label, *run.series("train", key)), NOISY) for run in view.runs)

    panels = [
        Panel("Training loss, nats per token", of("loss")),
        Panel("Training tokens per second", of("tokens_per_second"), count_text, from_zero=True),
    ]
    caption = (
        "Means over stretches of the run. Training loss is taken on each run's own mixture, so it does not compare "
        "runs: one that draws easier text shows a lower loss. Compare held-out losses instead."
    )
    return _compared(view, "training", panels, caption, "Training loss and speed over training tokens, by run.")


def _compared(view: View, key: str, panels: Sequence[Panel], caption: str, description: str) -> list[Figure]:
    if not any(curve.known for panel in panels for curve in panel.curves):
        return []
    return [drawn(key, curve_grid(panels, view.run_lines), caption, description)]


def _moments(run: Run) -> list[Evaluation]:
    """Every evaluation, and the final one where metrics.jsonl holds none of the same moment."""
    moments = [evaluation for evaluation in run.evaluations if math.isfinite(evaluation.tokens)]
    if run.final is not None and math.isfinite(run.final.tokens):
        moments = [evaluation for evaluation in moments if evaluation.tokens < run.final.tokens] + [run.final]
    return moments


def domain_charts(view: View) -> list[Figure]:
    """Held-out loss during training, one small frame per domain."""
    scored = view.scored_domains
    shown = [name for name in view.named if name in scored] if len(scored) > SMALL_MULTIPLES else scored
    rest = sorted((name for name in scored if name not in shown), key=lambda name: -_spread(view, name))
    shown = [*shown, *rest[: SMALL_MULTIPLES - len(shown)]]
    panels = []
    for name in shown:
        found = []
        for run in view.runs:
            points = [point for point in _moments(run) if name in point.domains]
            values = [point.domains[name].bits_per_byte for point in points]
            found.append(Curve(run.label, np.array([point.tokens for point in points]), np.array(values)))
        panels.append(Panel(name, tuple(found)))
    if max((len(curve.x_N) for panel in panels for curve in panel.curves), default=0) < 2:
        return []
    legend = [one.label for one in view.contenders] if len(view.runs) > 1 else []
    thinner = {label: replace(line, width=1.3) for label, line in view.run_lines.items()}
    chart = curve_grid(
        panels, thinner, y_label="bits per byte", columns=5, row_height=1.55, legend=legend, logarithmic=True
    )
    caption = "Bits per byte on each domain's held-out text; each frame has its own scale, logarithmic."
    if len(shown) < len(scored):
        caption += f" Shown: the named domains and those where the runs differ most, {len(shown)} of {len(scored)}."
    return [drawn("domains", chart, caption, "Small charts of bits per byte, one per domain, all runs in each.")]


def _spread(view: View, name: str) -> float:
    values = [score.bits_per_byte for run in view.runs if (score := domain_score(run, name)) is not None]
    known = [value for value in values if math.isfinite(value)]
    return max(known) - min(known) if known else 0.0
