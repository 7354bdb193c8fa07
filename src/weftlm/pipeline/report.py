"""The page of a run's gate, and what the run's files hold of it.

<run>/gate/report.html
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from weftlm.errors import DataError
from weftlm.files import read_object
from weftlm.pipeline.names import GATE_PAGE
from weftlm.reporting.gating import GatingFacts, gate_page
from weftlm.reporting.page import write_page

log = logging.getLogger(__name__)

CERTIFICATE, FIT, STUDENTS = "gate/certificate.json", "gate/fit.json", ("students/student.json", "students/direct.json")
"""What a gate and its students leave in a run folder."""


def write_gate_page(run: Path) -> Path:
    """Write what is known of a run's gate and its students as a page beside the gate; returns its path.

    Raises:
        ConfigError: nothing is known, or the files are of different gates.
        DataError: a file is torn, or the page cannot be written.
    """
    return write_page(gate_page(gate_facts(run), f"The gate of {run.resolve().name}"), run / GATE_PAGE)


def gate_facts(run: Path, **more: Mapping[str, Any]) -> GatingFacts:
    """What a run's files hold of its gate; errors as `write_gate_page`.

    Args:
        run: The run folder.
        more: Further rows, by name, beside the students'.
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
        check_roles(found.get("rows"), run / name, "make it again: weftlm gate distil, after deleting it")
        students.append({**found, "rows": {**more, **found["rows"]}})
    return GatingFacts.of(_read(run / CERTIFICATE), fit, students)


def _read(path: Path) -> dict[str, Any] | None:
    return read_object(path, "delete it and make it again")


def check_roles(rows: Any, path: Path, cure: str) -> None:
    """Refuse rows without a role, which earlier versions wrote.

    Raises:
        DataError: There are such.
    """
    if not isinstance(rows, dict) or not all(isinstance(row, dict) and "role" in row for row in rows.values()):
        raise DataError(f"{path} was written by another version of weftlm (rows without a role); {cure}")
