"""The demonstration's third part: a robust gate over its experts, its certificate and a student that can be served.

The rival is a monolith: the experts' own base, trained on by all domains together for as many tokens as all experts.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from weft.gating.certificate import Certificate
from weft.gating.problem import measure
from weft.mixture.policy import build_policy
from weft.models.factory import ModelConfig, load_model
from weft.pipeline.demo_routing import expert_recipe
from weft.pipeline.expert_recipe import ExpertRecipe
from weft.pipeline.gating import certify_gate, fit_gate, gating_config, open_scores, score_experts
from weft.pipeline.recipe import Recipe
from weft.pipeline.students import STUDENT, distil_gate, held_out_problem, log_likelihoods, table_row
from weft.pipeline.train import run_training
from weft.reporting.gating import RIVALS, GatingFacts

COMPARED = ("monolith", "uniform", "bayes", "fixed share", "robust", STUDENT)
"""Rows of `worst_domain_regret`."""


def gate_demo(recipe: Recipe, base_run: Path, folder: Path, experts: int) -> tuple[dict[str, Any], GatingFacts]:
    """Score the experts, fit and certify a robust gate, distil it, and compare; what is finished is reused.

    Args:
        recipe: the demonstration's.
        base_run: folder of the run whose model the experts adapt.
        folder: where the experts are; results go there.
        experts: how many there are.
    Returns:
        the `robust` section of summary.json, and what the report shows.
    """
    recipe_of_experts = expert_recipe(recipe, base_run, folder)
    monolith = _monolith(recipe, base_run, folder / "monolith", experts)
    score_experts(recipe_of_experts)
    fit = fit_gate(recipe_of_experts)
    certificate = certify_gate(recipe_of_experts)
    made = distil_gate(recipe_of_experts)
    rows = {"monolith": _row(monolith, recipe_of_experts), **made["rows"]}
    return _summary(rows, certificate), GatingFacts.of(
        certificate, fit, [{**made, "rows": rows}], rivals=("monolith", *RIVALS)
    )


def _monolith(recipe: Recipe, base_run: Path, folder: Path, experts: int) -> Path:
    """Train the rival; its run folder."""
    assert recipe.experts is not None
    each = recipe.experts.training
    tokens = experts * each.total_steps * each.batch_sequences * each.sequence_length
    run_training(
        recipe.model_copy(
            update={
                "run": folder,
                "model": ModelConfig(pretrained=str(base_run / "model")),
                "mixture": build_policy({"policy": "uniform"}).config,
                "training": recipe.training.model_copy(update={"tokens": tokens, "steps": None}),
                "evaluation": recipe.evaluation.model_copy(update={"every_steps": None}),
            }
        )
    )
    return folder


def _row(monolith: Path, recipe: ExpertRecipe) -> dict[str, Any]:
    """The rival on the sequences no gate was fitted on."""
    scores = open_scores(recipe, causal=True)
    problem = held_out_problem(scores, gating_config(recipe))
    model = load_model(monolith / "model")
    domains, rows = scores.cache.domains, scores.split.domain_rows
    logs = [log_likelihoods(model, domains[name], rows[name][1]) for name in domains]
    return table_row(measure(logs, problem), problem)


def _summary(rows: dict[str, Any], certificate: Certificate) -> dict[str, Any]:
    """The `robust` section of summary.json; nats of the certificate's unit."""
    assert certificate.capacity is not None
    return {
        "unit": certificate.unit,
        "worst_domain_regret": {name.replace(" ", "_"): rows[name]["worst"] for name in COMPARED},
        "worst_domain": {name.replace(" ", "_"): rows[name]["worst_domain"] for name in COMPARED},
        "mean_regret": {name.replace(" ", "_"): rows[name]["mean"] for name in COMPARED},
        "capacity_bound": certificate.capacity.value,
        "z": certificate.z.value,
        "z_interval": [certificate.z.low, certificate.z.high],
        "lambda": {row.name: row.lam for row in certificate.domains},
    }
