"""The end of a project: one page about everything, and its figures as one small JSON file.

<run>/report.html, <run>/summary.json
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from weftlm.errors import DataError
from weftlm.files import write_object
from weftlm.gating.certificate import Certificate
from weftlm.pipeline.baselines import baseline_folders
from weftlm.pipeline.gating import read_facts
from weftlm.pipeline.models_table import read_evaluation
from weftlm.pipeline.names import CERTIFICATE, REPORT, STUDENT, SUMMARY
from weftlm.pipeline.recipe import MONOLITH, Recipe
from weftlm.pipeline.report import report_runs
from weftlm.pipeline.route_stage import read_routing, routing_facts
from weftlm.pipeline.run_folder import alone
from weftlm.pipeline.runner import seconds_of
from weftlm.pipeline.stage import read_stage, stages
from weftlm.pipeline.train import read_result
from weftlm.reporting.gating import GatingFacts
from weftlm.reporting.score_table import model_table


def report_project(recipe: Recipe, output: Path | None = None, title: str | None = None) -> dict[str, Any]:
    """Write the page and the summary of what a project has made.

    Args:
        recipe: all of its stages but the report are done.
        output: another place for the page, which then comes without a summary file.
        title: of the page.
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
        summary["routing"] = {**found, "seconds": seconds_of(recipe, "experts")}
    if recipe.has_experts and recipe.gating is not None:
        summary["robust"], gating = _robust(recipe, evaluation[MONOLITH])
    table = {
        name: {one: values["bits_per_byte"] for one, values in each["sets"].items()}
        for name, each in evaluation["models"].items()
    }
    asked = {name: each["tasks"] for name, each in evaluation["models"].items() if "tasks" in each}
    summary["models"] = {
        name: {
            "path": each["path"],
            "kind": each["kind"],
            "sequence_length": evaluation.get("sequence_length"),
            "bits_per_byte": table[name],
        }
        | ({"accuracy": {task: found["accuracy"] for task, found in asked[name].items()}} if name in asked else {})
        for name, each in evaluation["models"].items()
    }
    runs = [recipe.run, *baselines.values()] if recipe.trains else []
    report_runs(
        runs,
        output or recipe.run / REPORT,
        title or f"{recipe.run.resolve().name}: the whole project",
        data=recipe.prepared_folder,
        routing=routing,
        gating=gating,
        models=model_table(evaluation["models"], "model", evaluation["sequence_length"]),
    )
    if output is None:
        write_object(recipe.run / SUMMARY, summary)
    return summary


def renew_report(recipe: Recipe, output: Path | None = None, title: str | None = None) -> None:
    """Write a finished project's page again, and let the record of its last stage know it.

    Raises:
        CheckpointError: another process is at work in the run folder.
        DataError: as `report_project`.
    """
    with alone(recipe.run):
        report_project(recipe, output, title)
        stage = stages["report"]("report")
        record = stage.record(recipe)
        known = read_stage(recipe, stage.name)
        if output is None and known is not None and known[0] and record.changed() is None:
            facts = {key: value for key, value in known[1].items() if key not in ("identity", "files")}
            record.finish(facts, stage.left(recipe))


def summarise_mixtures(results: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The figures of summary.json's `mixture` section."""
    return {
        "target_bpb": {
            name: result["sets"]["target"]["bits_per_byte"]
            for name, result in results.items()
            if "target" in result["sets"]
        },
        "target_bpb_se": {
            name: result["sets"]["target"]["bits_per_byte_se"]
            for name, result in results.items()
            if "target" in result["sets"]
        },
        "generic_bpb": {
            name: result["generic"]["bits_per_byte"] for name, result in results.items() if "generic" in result
        },
        "train_tokens": next(iter(results.values()))["train_tokens"],
        "sequence_length": next(iter(results.values())).get("sequence_length"),
        "seconds": {
            name: {part: round(seconds, 2) for part, seconds in result["seconds"].items()}
            for name, result in results.items()
        },
        "weights": {name: result["weights"] for name, result in results.items()},
        "epochs_of_the_most_read_domain": {name: max(result["epochs"].values()) for name, result in results.items()},
    }


def _robust(recipe: Recipe, monolith: Mapping[str, Any] | None) -> tuple[dict[str, Any], GatingFacts]:
    """The `robust` section of summary.json, in nats of the certificate's unit, and what the report shows."""
    certificate = Certificate.from_json(read_facts(recipe.gate_folder / CERTIFICATE) or {})
    fit = read_facts(recipe.gate_folder / "fit.json")
    made = read_facts(recipe.students_folder / "student.json") or {"rows": {}}
    rows = {**({} if monolith is None else {MONOLITH: monolith}), **made["rows"]}
    if not all("role" in row for row in rows.values()):
        raise DataError("students/student.json lacks the roles of its rows; make it again: weftlm run --from distil")
    shown = [name for name, row in rows.items() if row["role"] in ("baseline", "gate") or name == STUDENT]
    summary = {
        "unit": certificate.unit,
        "length": certificate.length,
        "worst_domain_regret": {name.replace(" ", "_"): rows[name]["worst"] for name in shown},
        "worst_domain": {name.replace(" ", "_"): rows[name]["worst_domain"] for name in shown},
        "mean_regret": {name.replace(" ", "_"): rows[name]["mean"] for name in shown},
        "capacity_bound": None if certificate.capacity is None else certificate.capacity.value,
        "z": certificate.z.value,
        "z_interval": [certificate.z.low, certificate.z.high],
        "lambda": {row.name: row.lam for row in certificate.domains},
    }
    return summary, GatingFacts.of(certificate, fit, [{**made, "rows": rows}])
