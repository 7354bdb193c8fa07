"""The report of one run or several, with the facts of the data they share, and the page of a run's gate."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from weftlm.errors import ConfigError, DataError, WeftError
from weftlm.files import read_object
from weftlm.pipeline.names import GATE_PAGE
from weftlm.pipeline.prepared import PreparedData
from weftlm.pipeline.recipe import load_recipe
from weftlm.reporting.gating import GatingFacts, gate_page
from weftlm.reporting.page import write_page
from weftlm.reporting.report import report_page
from weftlm.reporting.routing import RoutingFacts
from weftlm.reporting.score_table import ScoreTable

log = logging.getLogger(__name__)


CERTIFICATE, FIT, STUDENTS = "gate/certificate.json", "gate/fit.json", ("students/student.json", "students/direct.json")
"""What a gate and its students leave in a run folder."""


def report_runs(
    runs: Sequence[Path],
    output: Path,
    title: str | None = None,
    *,
    data: Path | None = None,
    routing: RoutingFacts | None = None,
    gating: GatingFacts | None = None,
    models: ScoreTable | None = None,
) -> Path:
    """Write the page about these runs; the prepared data is described where it can still be opened.

    Args:
        runs: their folders; none where the page is about experts over a model that was there before.
        output: the page.
        title: of the page.
        data: folder of the prepared data; None: the first run's.
        routing: what routers did with experts over these runs' models.
        gating: of a robust gate over such experts; None: of the first run that holds one.
        models: every model, on the same held-out text.
    """
    prepared = _described(data) if data is not None else _prepared(runs[0]) if runs else None
    if gating is None:
        gating = next((facts for facts in map(_known_gate, runs) if facts is not None), None)
    page = report_page(runs, title, prepared=prepared, routing=routing, gating=gating, models=models)
    return write_page(page, output)


def write_gate_page(run: Path) -> Path:
    """Write what is known of a run's gate and its students as a page beside the gate; returns its path.

    Raises:
        ConfigError: nothing is known, or what lies there is of different gates.
        DataError: a file is torn, or the page cannot be written.
    """
    return write_page(gate_page(gate_facts(run), f"The gate of {run.resolve().name}"), run / GATE_PAGE)


def gate_facts(run: Path) -> GatingFacts:
    """What a run's files say of its gate.

    Raises:
        ConfigError, DataError: as `write_gate_page`.
    """
    fit, students = _read(run / FIT), []
    problem = None if fit is None else fit.get("problem")
    for name in STUDENTS:
        found = _read(run / name)
        if found is None:
            continue
        problem = found.get("problem") if problem is None else problem
        of_another = fit is not None and found.get("fit") not in (None, fit.get("identity"))
        if found.get("problem") != problem or of_another:
            log.warning("%s is of another gate or problem and left out; run weftlm gate distil again", run / name)
            continue
        students.append(found)
    return GatingFacts.of(_read(run / CERTIFICATE), fit, students)


def _known_gate(run: Path) -> GatingFacts | None:
    if not any((run / name).exists() for name in (CERTIFICATE, FIT, *STUDENTS)):
        return None
    try:
        return gate_facts(run)
    except (ConfigError, DataError) as error:
        log.warning("the report leaves the gate of %s out: %s", run, error)
        return None


def _read(path: Path) -> dict[str, Any] | None:
    return read_object(path, "delete it and make it again")


def _prepared(run: Path) -> dict[str, Any] | None:
    if not (run / "recipe.yaml").exists():
        return None
    try:
        return _described(load_recipe(run / "recipe.yaml").prepared_folder)
    except ConfigError as error:
        log.warning("the report leaves the prepared data out: %s", error)
        return None


def _described(folder: Path) -> dict[str, Any] | None:
    try:
        return PreparedData.load(folder).summary()
    except WeftError as error:
        log.warning("the report leaves the prepared data out: %s", error)
        return None
