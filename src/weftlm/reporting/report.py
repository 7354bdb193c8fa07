"""`write_report`: run folders in, one self-contained HTML page out.

The page is text, tables and inline SVG; it loads nothing, and runs nothing unless it shows a routing trace. The same
folders give the same bytes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from weftlm.errors import ConfigError
from weftlm.progress import count_text
from weftlm.reporting.charts import (
    alignment_chart,
    domain_charts,
    epoch_chart,
    loss_charts,
    mixture_chart,
    training_charts,
)
from weftlm.reporting.compare import Finding, finding, target_score
from weftlm.reporting.facts import environment_facts, prepared_facts, reading_notes, recipe_facts
from weftlm.reporting.gating import GatingFacts, gating_section, gating_style
from weftlm.reporting.html import escape, section, write_page
from weftlm.reporting.layout import contents, notes, page_text
from weftlm.reporting.routing import RoutingFacts, routing_section, routing_style
from weftlm.reporting.runs import Run, read_runs
from weftlm.reporting.score_table import ScoreTable, answer, best_of, score_table, serve_command
from weftlm.reporting.tables import domain_table, summary_table, time_table
from weftlm.reporting.trace_parts import trace_script
from weftlm.reporting.view import View

_Part = tuple[str, str, str, str]
"""Anchor, short name, heading and inside of a section; left out where the inside is empty."""


def write_report(
    runs: Sequence[str | Path],
    output: str | Path,
    title: str | None = None,
    *,
    prepared: Mapping[str, Any] | None = None,
    routing: RoutingFacts | None = None,
    gating: GatingFacts | None = None,
    models: ScoreTable | None = None,
) -> Path:
    """Write one HTML page about one run or several.

    Args:
        runs: run folders: finished, still running or partly broken. What is missing is said on the page. None at all
            where the page is about experts alone.
        output: the file to write; written whole or not at all.
        title: of the page; made from the runs' names when None.
        prepared: facts of the prepared data (`PreparedData.summary()`): sizes by set become a table, the rest a list.
        routing: what routers did with the experts trained from these runs; shown as a section of its own.
        gating: of a robust gate over such experts; shown as a section of its own.
        models: every model that was made, on the same held-out text; shown as a section of its own.
    Returns:
        `output` as a path.
    Raises:
        ConfigError: no run is given, or the routing's facts do not fit together.
        NumericsError: a routing weight is not a share.
        DataError: a path is not a folder, or the page cannot be written.
    """
    if not runs and routing is None and gating is None and models is None:
        raise ConfigError("a report needs at least one run folder; none was given")
    return write_page(render_report(read_runs(runs), title, prepared, routing, gating, models), output)


def render_report(
    runs: Sequence[Run],
    title: str | None = None,
    prepared: Mapping[str, Any] | None = None,
    routing: RoutingFacts | None = None,
    gating: GatingFacts | None = None,
    models: ScoreTable | None = None,
) -> str:
    """The page as text."""
    view = View.of(runs)
    parts = [
        *(_head_parts(view) if runs else ()),
        ("models", "Models", "Every model", score_table(models) if models is not None else ""),
        *(_training_parts(view) if runs else ()),
        ("routing", "Routing", "Routing", routing_section(routing) if routing is not None else ""),
        ("gating", "Robust gate", "Robust gate", gating_section(gating) if gating is not None else ""),
        ("data", "Data", "Prepared data", prepared_facts(prepared)),
        *(_tail_parts(view) if runs else ()),
    ]
    parts = [part for part in parts if part[3]]
    found = finding(runs) if runs else Finding(best_of(models), ())
    if runs and models is not None and models.rows:
        found = Finding(best_of(models), (f"Mixtures alone: {found.headline}", *found.details))
    first = answer(models) if models is not None else _serve(view)
    return page_text(
        title=title if title is not None else _title(runs),
        kicker=_kicker(view),
        headline=found.headline,
        opening=first + "\n" + notes(found.details) + "\n" + contents([(key, short) for key, short, _, _ in parts]),
        body="\n".join(section(key, heading, inside) for key, _, heading, inside in parts),
        style=(routing_style(routing) if routing is not None else "") + (gating_style() if gating is not None else ""),
        source=" from the run folders' own files",
        script=trace_script() if routing is not None and routing.traces else "",
    )


def _serve(view: View) -> str:
    """The command that serves the run with the lowest loss on the target; nothing where no run left a model."""
    made = [run for run in view.runs if run.finished and (run.path / "model").is_dir()]
    known = [run for run in made if math.isfinite(target_score(run).bits_per_byte)] or made
    if not known:
        return ""
    best = min(known, key=lambda run: target_score(run).bits_per_byte) if len(known) > 1 else known[0]
    which = f"Serve the run that predicts the target best, <strong>{escape(best.label)}</strong>"
    said = which if len(view.runs) > 1 else "Serve this model"
    return f'<div class="answer">\n<p>{said}:</p>\n{serve_command(str(best.path))}\n</div>'


def _head_parts(view: View) -> list[_Part]:
    return [("summary", "Summary", "Summary", summary_table(view))]


def _training_parts(view: View) -> list[_Part]:
    return [
        ("mixture", "Mixture", "Mixture over time", mixture_chart(view)),
        ("alignment", "Alignment", "Gradient alignment", alignment_chart(view)),
        ("losses", "Loss", "Target and generic loss", loss_charts(view)),
        ("domains", "By domain", "Loss by domain", domain_charts(view) + domain_table(view)),
        ("epochs", "Epochs", "Passes over the data", epoch_chart(view)),
        ("training", "Training", "Training", training_charts(view) + time_table(view)),
    ]


def _tail_parts(view: View) -> list[_Part]:
    return [
        ("recipe", "Recipe", "Recipe", recipe_facts(view)),
        ("environment", "Environment", "Environment", environment_facts(view)),
        ("reading", "How to read", "How to read this page", reading_notes(view)),
    ]


def _title(runs: Sequence[Run]) -> str:
    if not runs:
        return "Experts under one roof"
    if len(runs) == 1:
        return f"{runs[0].path.resolve().name}: training report"
    names = [run.label for run in runs]
    listed = ", ".join(names[:-1]) + " and " + names[-1] if len(names) <= 4 else f"{len(names)} runs"
    return f"{listed} compared"


def _kicker(view: View) -> str:
    if not view.runs:
        return "No model was trained here"
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
