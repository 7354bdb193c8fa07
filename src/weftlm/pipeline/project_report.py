"""The pages of runs and of projects, and a project's figures as one JSON file.

<run>/report.html, <run>/summary.json
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from weftlm.errors import ConfigError, WeftError
from weftlm.files import read_object, write_object
from weftlm.pipeline.any_model import open_model
from weftlm.pipeline.heldout import check_roles
from weftlm.pipeline.names import CERTIFICATE, COMPARED, DIRECT, EVALUATION, FIT, REPORT, STUDENT, SUMMARY, TRAINING
from weftlm.pipeline.prepared import PreparedData
from weftlm.pipeline.recipe import Recipe, kept_recipe, load_recipe, open_run, refuse_project_page
from weftlm.pipeline.routes import trace_text
from weftlm.pipeline.run_folder import alone
from weftlm.pipeline.stage import stages_of
from weftlm.reporting.gating import GatingFacts
from weftlm.reporting.page import write_page
from weftlm.reporting.report import report_page
from weftlm.reporting.score_table import model_table
from weftlm.reporting.traces import RoutingFacts

log = logging.getLogger(__name__)

HALF_TOKENS = 60
"""Tokens of each domain in the text that is traced."""


def report_folders(folders: Sequence[Path], output: Path | None = None, title: str | None = None) -> Path:
    """Write the page about some run folders: of a single project whose models are measured the whole project's.

    Args:
        folders: The run folders.
        output: Path of the page; None for the first folder's own, under a name that follows from what it shows.
        title: Title of the page.
    Raises:
        ConfigError: there is no such folder, or another project's page is there.
        CheckpointError: another process is at work in the project.
        DataError: a result is torn, or the page cannot be written.
    """
    for folder in folders:
        if not folder.is_dir():
            raise ConfigError(f"{folder} is no run folder; weftlm train makes one")
    first, project = folders[0], len(folders) == 1 and kept_recipe(folders[0]).exists()
    whole = project and (first / EVALUATION).exists()
    page = first / (COMPARED if len(folders) > 1 else REPORT if whole or not project else TRAINING)
    path = page if output is None else output
    own = whole and path.resolve() == page.resolve()
    if not own:
        refuse_project_page(path)
    if whole:
        recipe = open_run(first)
        with alone(first):
            report_project(recipe, None if own else path, title)
        return path
    gating = next((facts for facts in map(_known_gate, folders) if facts is not None), None)
    data = load_recipe(first / "recipe.yaml").prepared_folder if (first / "recipe.yaml").exists() else None
    prepared = None if data is None else _prepared(data)
    return write_page(report_page(folders, title, prepared=prepared, gating=gating), path)


def _known_gate(run: Path) -> GatingFacts | None:
    """What is known of a run's gate, where anything is."""
    try:
        return gate_facts(run)
    except ConfigError:
        return None
    except WeftError as error:
        log.warning("the report leaves the gate of %s out: %s", run, error)
        return None


def _prepared(folder: Path) -> dict[str, Any] | None:
    """Facts of prepared data, where it can still be opened."""
    try:
        return PreparedData.load(folder).summary()
    except WeftError as error:
        log.warning("the report leaves the prepared data out: %s", error)
        return None


def report_project(recipe: Recipe, output: Path | None = None, title: str | None = None) -> dict[str, Any]:
    """Write the page and the summary of what a project has made.

    Args:
        recipe: Recipe whose stages but the report are done.
        output: Another path for the page, which then comes without a summary file.
        title: Title of the page.
    Returns:
        summary.json as a mapping: sequence_length, base and models as in evaluation.json, and as far as the project has
        them `mixture`, result.json by policy; `routing`, rows by router; `robust`, rows of baselines, gates and
        students; `certificate` of the gate.
    Raises:
        DataError: a stage's result is missing or torn, or the page cannot be written.
    """
    summary: dict[str, Any] = {}
    shown: dict[str, Any] = {}
    for stage in stages_of(recipe):
        for whole, part in zip((summary, shown), stage.shown(recipe), strict=True):
            for key, value in part.items():
                whole[key] = {**whole[key], **value} if key in whole else value
    page = report_page(
        [*shown.pop("runs", {}).values()],
        title or f"{recipe.run.resolve().name}: the whole project",
        prepared=_prepared(recipe.prepared_folder),
        **shown,
    )
    write_page(page, output or recipe.run / REPORT)
    if output is None:
        write_object(recipe.run / SUMMARY, summary)
    return summary


def gate_facts(run: Path, **more: Mapping[str, Any]) -> GatingFacts:
    """What a run's files hold of its gate.

    Args:
        run: The run folder.
        more: Further rows, by name, beside the students'.
    Raises:
        ConfigError: nothing is known of one.
        DataError: a file is torn.
    """

    def read(name: str) -> dict[str, Any] | None:
        return read_object(run / name, "delete it and make it again")

    fit, students = read(f"gate/{FIT}"), []
    identity = None if fit is None else fit.get("identity")
    for name in (f"students/{kind}.json" for kind in (STUDENT, DIRECT)):
        found = read(name)
        if found is None:
            continue
        own = {key: value for key, value in found.get("identity", {}).items() if key != "students"}
        identity = own if identity is None else identity
        if own != identity:
            log.warning("%s is of another gate or problem and left out; run weftlm gate distil again", run / name)
            continue
        check_roles(found.get("rows"), run / name, "make it again: weftlm gate distil, after deleting it")
        students.append({**found, "rows": {**more, **found["rows"]}})
    return GatingFacts.of(read(f"gate/{CERTIFICATE}"), fit, students)


def routing_facts(recipe: Recipe, found: Mapping[str, Any]) -> RoutingFacts:
    """What the report shows of the comparison of routers, and of one text under the first that chooses per token."""
    text, label = recipe.routing_settings.trace, "the recipe's text"
    if text is None:
        text, label = changing_text(PreparedData.load(recipe.prepared_folder)), "a text that changes domain midway"
    traces = []
    for router in recipe.routing_settings.build if text else ():
        opened = open_model(recipe.routed_folder(router), encoder_decoder=True)
        if opened.model.router.static_weights_E is None:
            traces.append((f"{router} on {label}", *trace_text(opened, text)))
            break
    return RoutingFacts(model_table(found["rows"], "router", found["sequence_length"]), traces)


def changing_text(data: PreparedData) -> str:
    """Held-out text that changes domain midway: from the first domain to the second that hold out any."""
    heldout = [domain.heldout for domain in data.domains if domain.heldout is not None and len(domain.heldout)]
    return "\n".join(data.tokenizer.decode(one.read(0, min(HALF_TOKENS, len(one))).tolist()) for one in heldout[:2])
