"""The charts of a report, each a figure with its caption; none where no run recorded what it shows."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib.figure
import numpy as np

from weftlm.evaluation.suite import TARGET
from weftlm.reporting.compare import View
from weftlm.reporting.figures import (
    NAMED,
    Curve,
    Panel,
    domain_lines,
    draw,
    inline_svg,
    shares,
    thin,
    to_svg,
)
from weftlm.reporting.page import Figure
from weftlm.reporting.runs import GENERIC, Run, mapping

NOISY = 60
"""Points of a noisy curve, each a mean over its part of the run."""


def drawn(key: str, chart: matplotlib.figure.Figure, caption: str) -> Figure:
    """A chart as a block: `key` is its id in the page, and its caption is read aloud."""
    return Figure(inline_svg(to_svg(chart), f"fig-{key}", caption), caption)


def left_out(named: Sequence[str], names: Sequence[str]) -> str:
    """A sentence about the domains without a colour of their own."""
    rest = len(names) - len(named)
    return (
        f" The {len(named)} domains of largest final weight are named; the other {rest} are added up." if rest else ""
    )


def mixture_chart(view: View) -> list[Figure]:
    """Mixture weights over time, stacked, one frame per run."""
    panels = [Panel(run.label, tuple(_weights_over_time(view, run))) for run in view.runs]
    if not any(panel.curves for panel in panels):
        return []
    caption = "Probability of drawing a training sequence from each domain. Each update holds until the next."
    caption += left_out(view.named, view.domains)
    chart = draw(panels, view.domain_lines, columns=3, stacked=True)
    return [drawn("mixture", chart, caption)]


def _weights_over_time(view: View, run: Run) -> list[Curve]:
    """Weights by named domain and of all others, the last update held to the end of training."""
    x_N, _ = run.series("mixture", "weights", "")
    weights_N = {name: run.series("mixture", "weights", name)[1] for name in view.domains}
    if not len(x_N):
        return []
    if run.train_tokens > x_N[-1]:
        x_N = np.append(x_N, run.train_tokens)
        weights_N = {name: np.append(values_N, values_N[-1]) for name, values_N in weights_N.items()}
    return shares(weights_N, x_N, view.named)


def alignment_chart(view: View) -> list[Figure]:
    """Gradient alignments over time, for the runs that measured them."""
    panels, lines = [], dict(view.domain_lines)
    for run in view.runs:
        groups = list(dict.fromkeys(str(name) for record in run.mixture for name in mapping(record.get("alignment"))))
        if not set(groups) <= set(view.domains):
            lines = domain_lines(groups[:NAMED])
        series = [thin(Curve(name, *run.series("mixture", "alignment", name)), NOISY) for name in groups]
        panels += [Panel(run.label, tuple(series))] if groups else []
    if not panels:
        return []
    caption = (
        "Inner product of the gradient of each domain, or basis distribution, with the direction the policy follows "
        "(the target's gradient, or the mean over domains), averaged over stretches of the run. Above zero, training "
        "there lowers the loss that is followed. Grey lines have no colour of their own."
    )
    chart = draw(panels, lines, zero=True)
    return [drawn("alignment", chart, caption)]


def training_charts(view: View) -> list[Figure]:
    """Loss on held-out text, training loss and speed, all runs in each frame."""
    panels = [Panel(f"{name.capitalize()}, bits per byte", _losses(view, name)) for name in (TARGET, GENERIC)]
    for title, key in (("Training loss, nats per token", "loss"), ("Tokens per second", "tokens_per_second")):
        curves = [thin(Curve(run.label, *run.series("train", key)), NOISY) for run in view.runs]
        panels.append(Panel(title, tuple(curves)))
    if not any(curve.known for panel in panels for curve in panel.curves):
        return []
    caption = (
        "Above, loss on held-out text; below, training loss and speed, means over stretches of the run. Training loss "
        "is taken on each run's own mixture, so it does not compare runs: easier text shows a lower loss. The vertical "
        "scales are those of the last three quarters; what was higher before is cut off."
    )
    return [drawn("training", draw(panels, view.run_lines, zoomed=True), caption)]


def _losses(view: View, name: str) -> tuple[Curve, ...]:
    """A score of every evaluation, by run."""
    return tuple(
        Curve(
            run.label,
            np.array([one.tokens for one in run.evaluations if name in one.scores]),
            np.array([one.scores[name].value for one in run.evaluations if name in one.scores]),
        )
        for run in view.runs
    )
