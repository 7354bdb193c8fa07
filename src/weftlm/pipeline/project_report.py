"""The pages of runs and of projects, and a project's figures as one JSON file.

<run>/report.html, <run>/summary.json
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

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
Facts = TypeVar("Facts")

HALF_TOKENS = 60
"""Tokens of each domain in the text that is traced."""


def report_folders(folders: Sequence[Path], output: Path | None = None, title: str | None = None) -> Path:
    """Write the page about some run folders: of a single project whose models are measured the whole project's.

    The page goes to `output`, or to the first folder under a name that follows from what it shows.

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
    known = (_readable(f"the gate of {folder}", gate_facts, folder) for folder in folders)
    gating = next((facts for facts in known if facts is not None), None)
    recipe_file = first / "recipe.yaml"
    data = _prepared(load_recipe(recipe_file)) if recipe_file.exists() else None
    return write_page(report_page(folders, title, prepared=data, gating=gating), path)


def _readable(what: str, read: Callable[[Path], Facts], folder: Path) -> Facts | None:
    """What a folder holds; None where there is nothing, or where it cannot be read, with a warning."""
    try:
        return read(folder)
    except ConfigError:
        return None
    except WeftError as error:
        log.warning("the report leaves %s out: %s", what, error)
        return None


def _prepared(recipe: Recipe) -> dict[str, Any] | None:
    return _readable("the prepared data", lambda folder: PreparedData.load(folder).summary(), recipe.prepared_folder)


def report_project(recipe: Recipe, output: Path | None = None, title: str | None = None) -> dict[str, Any]:
    """Write the page and the summary of what a project has made; to another path the page alone.

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
    title = title or f"{recipe.run.resolve().name}: the whole project"
    page = report_page([*shown.pop("runs", {}).values()], title, prepared=_prepared(recipe), **shown)
    write_page(page, output or recipe.run / REPORT)
    if output is None:
        write_object(recipe.run / SUMMARY, summary)
    return summary


def gate_facts(run: Path, **more: Mapping[str, Any]) -> GatingFacts:
    """What a run's files hold of its gate, and further rows, by name, beside the students'.

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
    if text is None:  # held-out text of the first two domains that hold out any
        data, label = PreparedData.load(recipe.prepared_folder), "a text that changes domain midway"
        heldout = [one for one in data.heldout().values() if len(one)][:2]
        text = "\n".join(data.tokenizer.decode(one.read(0, min(HALF_TOKENS, len(one))).tolist()) for one in heldout)
    traces = []
    for router in recipe.routing_settings.build if text else ():
        opened = open_model(recipe.routed_folder(router), encoder_decoder=True)
        if opened.model.router.static_weights_E is None:
            traces.append((f"{router} on {label}", *trace_text(opened, text)))
            break
    return RoutingFacts(model_table(found["rows"], "router", found["sequence_length"]), traces)
