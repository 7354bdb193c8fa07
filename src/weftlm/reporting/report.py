"""`report_page`: run folders in, one self-contained HTML page out.

The page is text, tables and inline SVG; it loads nothing, and runs nothing but the theme's button and the charts of
traces. The same folders give the same bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from weftlm.errors import ConfigError
from weftlm.reporting import charts, tables
from weftlm.reporting.compare import View, caveats, run_table
from weftlm.reporting.gating import GatingFacts, gating_blocks
from weftlm.reporting.page import Page, Section, Terms
from weftlm.reporting.runs import Run, read_runs
from weftlm.reporting.score_table import ScoreTable, answer, headline, score_tables
from weftlm.reporting.traces import RoutingFacts, routing_blocks


def report_page(
    folders: Sequence[str | Path],
    title: str | None = None,
    *,
    prepared: Mapping[str, Any] | None = None,
    routing: RoutingFacts | None = None,
    gating: GatingFacts | None = None,
    models: ScoreTable | None = None,
) -> Page:
    """One page about one run or several.

    Args:
        folders: Run folders: finished, still running or partly broken; the page names what is missing. None where the
            page is about experts alone.
        title: Heading of the page; made from the runs' names when None.
        prepared: Facts of the prepared data (`PreparedData.summary()`): counts by set become a table, the rest a list.
        routing: Routers over the experts trained from these runs; shown as a section of its own.
        gating: A robust gate over such experts; shown as a section of its own.
        models: Every model that was made, on the same held-out text; shown as a section of its own.
    Raises:
        ConfigError: nothing is given, or a trace does not fit its texts.
        NumericsError: a routing weight is not a share.
        DataError: a path is not a folder.
    """
    if not folders and routing is None and gating is None and models is None:
        raise ConfigError("a report needs at least one run folder; none was given")
    runs = read_runs(folders)
    view = View.of(runs) if runs else None
    mixtures = None if view is None else run_table(view)
    leading = models if models is not None and models.rows else mixtures
    notes = caveats(runs)
    if mixtures is not None and leading is not mixtures:
        notes = [f"Mixtures alone: {headline(mixtures)}", *notes]
    sections = [
        *([] if view is None or mixtures is None else [_summary(view, mixtures)]),
        Section("models", "Every model", [] if models is None else score_tables(models)),
        *([] if view is None else _training(view)),
        Section("routing", "Routing", [] if routing is None else routing_blocks(routing)),
        Section("gating", "Robust gate", [] if gating is None else gating_blocks(gating)),
        Section("data", "Prepared data", tables.prepared_blocks(prepared)),
        *([] if view is None else _sources(view)),
    ]
    return Page(
        title=_title(runs) if title is None else title,
        kicker=_kicker(runs, 0 if view is None else len(view.domains)),
        headline="Nothing was measured on held-out text." if leading is None else headline(leading),
        sections=sections,
        answer=[] if leading is None else answer(leading),
        notes=notes,
    )


def _summary(view: View, mixtures: ScoreTable) -> Section:
    blocks = [*score_tables(mixtures), *tables.cost_table(view), *tables.problems(view)]
    return Section("summary", "Summary", blocks)


def _training(view: View) -> list[Section]:
    mixture = [*charts.mixture_chart(view), *tables.mixture_table(view)]
    return [
        Section("mixture", "Mixture over time", mixture),
        Section("alignment", "Gradient alignment", charts.alignment_chart(view)),
        Section("training", "Loss and speed", charts.training_charts(view)),
    ]


def _sources(view: View) -> list[Section]:
    return [
        Section("recipe", "Recipe and environment", tables.settings_blocks(view)),
        Section("reading", "How to read this page", [Terms()]),
    ]


def _title(runs: Sequence[Run]) -> str:
    if len(runs) == 1:
        return f"{runs[0].path.resolve().name}: training report"
    return (
        f"{', '.join(run.label for run in runs)} compared"
        if 0 < len(runs) <= 4
        else f"{len(runs) or 'Experts'} compared"
    )


def _kicker(runs: Sequence[Run], domains: int) -> str:
    if not runs:
        return "No model was trained here"
    counted = [(len(runs), "run"), (domains, "domain")]
    return " · ".join(f"{count} {what}{'s' if count > 1 else ''}" for count, what in counted if count)
