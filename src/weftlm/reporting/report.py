"""`write_report`: run folders in, one self-contained HTML page out.

The page is text, tables and inline SVG; it loads nothing, and runs nothing but the theme's button and the charts of
traces. The same folders give the same bytes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from weftlm.errors import ConfigError
from weftlm.progress import count_text
from weftlm.reporting import compare, score_table, tables
from weftlm.reporting.charts import (
    alignment_chart,
    domain_charts,
    loss_charts,
    mixture_chart,
    training_charts,
)
from weftlm.reporting.compare import View
from weftlm.reporting.gating import GatingFacts, gating_blocks
from weftlm.reporting.page import Block, Box, Page, Section, Terms, Text, write_page
from weftlm.reporting.routing import RoutingFacts, routing_blocks
from weftlm.reporting.runs import Run, read_runs
from weftlm.reporting.score_table import ScoreTable


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
        runs: run folders: finished, still running or partly broken; the page names what is missing. None at all where
            the page is about experts alone.
        output: the file to write; written whole or not at all.
        title: heading of the page; made from the runs' names when None.
        prepared: facts of the prepared data (`PreparedData.summary()`): sizes by set become a table, the rest a list.
        routing: routers over the experts trained from these runs; shown as a section of its own.
        gating: a robust gate over such experts; shown as a section of its own.
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
    return write_page(report_page(read_runs(runs), title, prepared, routing, gating, models), output)


def report_page(
    runs: Sequence[Run],
    title: str | None = None,
    prepared: Mapping[str, Any] | None = None,
    routing: RoutingFacts | None = None,
    gating: GatingFacts | None = None,
    models: ScoreTable | None = None,
) -> Page:
    """The page as a value."""
    view = View.of(runs)
    mixtures = compare.headline(runs) if runs else ""
    notes = compare.caveats(runs) if runs else []
    if models is not None and models.rows:
        headline, first = score_table.headline(models), score_table.answer(models)
        notes = ([f"Mixtures alone: {mixtures}"] if runs else []) + notes
    else:
        headline, first = mixtures or score_table.headline(ScoreTable({})), _serve(view)
    known = [] if models is None else score_table.score_tables(models)
    sections = [
        Section("summary", "Summary", "Summary", tables.summary_tables(view) if runs else []),
        Section("models", "Models", "Every model", known),
        *(_training(view) if runs else []),
        Section("routing", "Routing", "Routing", [] if routing is None else routing_blocks(routing)),
        Section("gating", "Robust gate", "Robust gate", [] if gating is None else gating_blocks(gating)),
        Section("data", "Data", "Prepared data", tables.prepared_blocks(prepared)),
        *(_sources(view) if runs else []),
    ]
    return Page(
        title=title if title is not None else _title(runs),
        kicker=_kicker(view),
        headline=headline,
        sections=sections,
        opening=[*first, *(Text(one, "note") for one in notes)],
        source="the run folders' own files",
    )


def _serve(view: View) -> list[Block]:
    """The command that serves the run with the lowest loss on the target; nothing where no run left a model."""
    made = [run for run in view.runs if run.finished and (run.path / "model").is_dir()]
    if not made:
        return []
    bits = {run.label: compare.target_score(run).bits_per_byte for run in made}
    best = min(made, key=lambda run: bits[run.label] if math.isfinite(bits[run.label]) else math.inf)
    if len(view.runs) == 1:
        return [Box(score_table.serve(str(best.path), "Serve this model"))]
    return [Box(score_table.serve(str(best.path), "Serve the run that predicts the target best", best.label))]


def _training(view: View) -> list[Section]:
    return [
        Section("mixture", "Mixture", "Mixture over time", mixture_chart(view)),
        Section("alignment", "Alignment", "Gradient alignment", alignment_chart(view)),
        Section("losses", "Loss", "Target and generic loss", loss_charts(view)),
        Section("domains", "By domain", "Loss by domain", [*domain_charts(view), *tables.domain_table(view)]),
        Section("training", "Training", "Training", [*training_charts(view), *tables.time_table(view)]),
    ]


def _sources(view: View) -> list[Section]:
    return [
        Section("recipe", "Recipe", "Recipe", tables.recipe_blocks(view)),
        Section("environment", "Environment", "Environment", tables.environment_blocks(view)),
        Section("reading", "How to read", "How to read this page", [Terms(repeated=view.contenders[0].repeated)]),
    ]


def _title(runs: Sequence[Run]) -> str:
    if not runs:
        return "Experts compared"
    if len(runs) == 1:
        return f"{runs[0].path.resolve().name}: training report"
    names = [run.label for run in runs]
    return (", ".join(names[:-1]) + " and " + names[-1] if len(names) <= 4 else f"{len(names)} runs") + " compared"


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
