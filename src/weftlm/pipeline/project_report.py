"""The pages of runs and of projects, and a project's figures as one small JSON file.

<run>/report.html, <run>/summary.json
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from weftlm.errors import ConfigError, WeftError
from weftlm.files import write_object
from weftlm.pipeline.any_model import open_model
from weftlm.pipeline.baselines import baseline_folders
from weftlm.pipeline.models_table import read_evaluation
from weftlm.pipeline.names import COMPARED, EVALUATION, REPORT, STUDENT, SUMMARY, TRAINING
from weftlm.pipeline.prepared import PreparedData
from weftlm.pipeline.recipe import MONOLITH, Recipe, kept_recipe, load_recipe, open_run, refuse_project_page
from weftlm.pipeline.report import CERTIFICATE, FIT, STUDENTS, gate_facts
from weftlm.pipeline.routes import read_routing, trace_opened
from weftlm.pipeline.run_folder import alone
from weftlm.pipeline.runner import seconds_of
from weftlm.pipeline.stage import read_stage, stages
from weftlm.pipeline.train import read_result
from weftlm.reporting.gating import GatingFacts
from weftlm.reporting.page import write_page
from weftlm.reporting.report import report_page
from weftlm.reporting.score_table import model_table
from weftlm.reporting.traces import RoutingFacts
from weftlm.routing.routed_model import RoutedModel

log = logging.getLogger(__name__)

HALF_TOKENS = 60
"""Tokens of each domain in the text that is traced."""


# -- runs ---------------------------------------------------------------------------------------------------------


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
        if not any((folder / name).exists() for name in ("stages", "recipe.yaml", "metrics.jsonl")):
            raise ConfigError(f"{folder} is no run folder; weftlm run and weftlm train make one")
    first, project = folders[0], len(folders) == 1 and kept_recipe(folders[0]).exists()
    whole = project and (first / EVALUATION).exists()
    page = first / (COMPARED if len(folders) > 1 else REPORT if whole or not project else TRAINING)
    path = page if output is None else output
    if not whole or path.resolve() != page.resolve():
        refuse_project_page(path)
        if whole:
            report_project(open_run(first), path, title)
            return path
        gating = next((facts for facts in map(_known_gate, folders) if facts is not None), None)
        return write_page(report_page(folders, title, prepared=_prepared(first), gating=gating), path)
    recipe = open_run(first)
    with alone(first):
        report_project(recipe, title=title)
        stage = stages["report"]("report")
        record, known = stage.record(recipe), read_stage(recipe, stage.name)
        if known is not None and known[0] and record.changed() is None:
            facts = {key: value for key, value in known[1].items() if key not in ("identity", "files")}
            record.finish(facts, stage.left(recipe))
    return path


def _known_gate(run: Path) -> GatingFacts | None:
    if not any((run / name).exists() for name in (CERTIFICATE, FIT, *STUDENTS)):
        return None
    try:
        return gate_facts(run)
    except WeftError as error:
        log.warning("the report leaves the gate of %s out: %s", run, error)
        return None


def _prepared(run: Path, data: Path | None = None) -> dict[str, Any] | None:
    """Facts of the prepared data of a run, where it can still be opened."""
    if data is None and not (run / "recipe.yaml").exists():
        return None
    try:
        return PreparedData.load(data or load_recipe(run / "recipe.yaml").prepared_folder).summary()
    except WeftError as error:
        log.warning("the report leaves the prepared data out: %s", error)
        return None


# -- a project ----------------------------------------------------------------------------------------------------


def report_project(recipe: Recipe, output: Path | None = None, title: str | None = None) -> dict[str, Any]:
    """Write the page and the summary of what a project has made.

    Args:
        recipe: Recipe whose stages but the report are done.
        output: Another path for the page, which then comes without a summary file.
        title: Title of the page.
    Returns:
        summary.json as a mapping, with `mixture`, `routing`, `robust` and `models` as far as the project has them.
    Raises:
        DataError: a stage's result is missing or torn, or the page cannot be written.
    """
    baselines = {name: folder for name, folder in baseline_folders(recipe).items() if name != MONOLITH}
    evaluation = read_evaluation(recipe)
    summary: dict[str, Any] = {}
    routing = gating = None
    if recipe.mixture is not None:
        results = {recipe.mixture.policy: read_result(recipe.run)}
        summary["mixture"] = summarise_mixtures(results | {name: read_result(each) for name, each in baselines.items()})
    if recipe.has_experts and recipe.routing is not None:
        found = read_routing(recipe)
        routing = routing_facts(recipe, found)
        summary["routing"] = {
            "heldout_bpb": _column(found["rows"], "generic"),
            "unseen_bpb": _column(found["rows"], "sets", "target"),
            **{key: found[key] for key in ("sequence_length", "experts", "best_single", "relative_forward_time")},
            "seconds": seconds_of(recipe, "experts"),
        }
    if recipe.has_experts and recipe.gating is not None:
        monolith = evaluation[MONOLITH]
        gating = gate_facts(recipe.run, **({} if monolith is None else {MONOLITH: monolith}))
        summary["robust"] = _robust(gating)
    models, length = evaluation["models"], evaluation["sequence_length"]
    summary["models"] = {
        name: {
            "path": each["path"],
            "kind": each["kind"],
            "sequence_length": length,
            "bits_per_byte": {one: values["bits_per_byte"] for one, values in each["sets"].items()},
            **({"accuracy": {task: one["accuracy"] for task, one in each["tasks"].items()}} if "tasks" in each else {}),
        }
        for name, each in models.items()
    }
    page = report_page(
        [recipe.run, *baselines.values()] if recipe.trains else [],
        title or f"{recipe.run.resolve().name}: the whole project",
        prepared=_prepared(recipe.run, recipe.prepared_folder),
        routing=routing,
        gating=gating,
        models=model_table(models, "model", length),
    )
    write_page(page, output or recipe.run / REPORT)
    if output is None:
        write_object(recipe.run / SUMMARY, summary)
    return summary


def _column(rows: Mapping[str, Mapping[str, Any]], *path: str) -> dict[str, float | None]:
    """Bits per byte at one place of some rows, by the rows' labels in one word; rows without it are left out."""
    found: dict[str, float | None] = {}
    for label, row in rows.items():
        place: Any = row
        for key in path:
            place = place.get(key) or {}
        if "bits_per_byte" in place:
            found[label.replace(" ", "_")] = place["bits_per_byte"]
    return found


def summarise_mixtures(results: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The figures of summary.json's `mixture` section, from result.json by policy."""
    first = next(iter(results.values()))
    targets = {name: result["sets"]["target"] for name, result in results.items() if "target" in result["sets"]}
    return {
        "target_bpb": {name: found["bits_per_byte"] for name, found in targets.items()},
        "target_bpb_se": {name: found["bits_per_byte_se"] for name, found in targets.items()},
        "generic_bpb": _column(results, "generic"),
        "train_tokens": first["train_tokens"],
        "sequence_length": first.get("sequence_length"),
        "seconds": {
            name: {part: round(seconds, 2) for part, seconds in result["seconds"].items()}
            for name, result in results.items()
        },
    }


def _robust(facts: GatingFacts) -> dict[str, Any]:
    """The `robust` section of summary.json, in nats of the certificate's unit."""
    certificate = facts.certificate
    assert certificate is not None
    shown = {
        name.replace(" ", "_"): row
        for name, row in facts.rows.items()
        if row["role"] in ("baseline", "gate") or name == STUDENT
    }
    return {
        "unit": certificate.unit,
        "length": certificate.length,
        "worst_domain_regret": {name: row["worst"] for name, row in shown.items()},
        "worst_domain": {name: row["worst_domain"] for name, row in shown.items()},
        "mean_regret": {name: row["mean"] for name, row in shown.items()},
        "capacity_bound": None if certificate.capacity is None else certificate.capacity.value,
        "z": certificate.z.value,
        "z_interval": [certificate.z.low, certificate.z.high],
        "lambda": {row.name: row.lam for row in certificate.domains},
    }


def routing_facts(recipe: Recipe, found: Mapping[str, Any]) -> RoutingFacts:
    """What the report shows of the comparison of routers, and of one text under the first that chooses per token."""
    text, label = recipe.routing_settings.trace, "the recipe's text"
    if text is None:
        text, label = changing_text(PreparedData.load(recipe.prepared_folder)), "a text that changes domain midway"
    traces = []
    for router in recipe.routing_settings.build if text else ():
        opened = open_model(recipe.routed_folder(router), encoder_decoder=True)
        if isinstance(opened.model, RoutedModel) and opened.model.router.static_weights_E is None:
            traced = trace_opened(opened, text)
            traces.append((f"{router} on {label}", traced.trace, traced.tokens))
            break
    table = model_table(found["rows"], "router", found["sequence_length"])
    return RoutingFacts(table, found["relative_forward_time"], traces)


def changing_text(data: PreparedData) -> str:
    """Held-out text that changes domain midway: from the first domain to the second that hold out any."""
    heldout = [domain.heldout for domain in data.domains if domain.heldout is not None and len(domain.heldout)]
    return "\n".join(data.tokenizer.decode(one.read(0, min(HALF_TOKENS, len(one))).tolist()) for one in heldout[:2])
