"""The report of one run or several, with the facts of the data they share."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from weft.errors import WeftError
from weft.pipeline.prepared import PreparedData
from weft.pipeline.recipe import load_recipe
from weft.reporting.report import write_report
from weft.reporting.routing import RoutingFacts

log = logging.getLogger(__name__)


def report_runs(
    runs: Sequence[Path], output: Path, title: str | None = None, *, routing: RoutingFacts | None = None
) -> Path:
    """Write the page about these runs; the first run's prepared data is described where it can still be opened.

    Args:
        routing: what routers did with experts over these runs' models.
    """
    prepared = _prepared(runs[0]) if runs else None
    return write_report(runs, output, title=title, prepared=prepared, routing=routing)


def _prepared(run: Path) -> dict[str, Any] | None:
    if not (run / "recipe.yaml").exists():
        return None
    try:
        return PreparedData.load(load_recipe(run / "recipe.yaml").prepared_folder).summary()
    except WeftError as error:
        log.warning("the report leaves the prepared data out: %s", error)
        return None
