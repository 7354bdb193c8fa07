"""How each stage is carried out: one function per stage, which continues what was interrupted."""

from __future__ import annotations

from contextlib import nullcontext

from weftlm.fan_out import processes
from weftlm.pipeline.expert_imports import import_recipe_experts
from weftlm.pipeline.experts import remove_unwanted, train_experts
from weftlm.pipeline.gating import certify_gate, fit_gate, score_experts
from weftlm.pipeline.models_table import evaluate_models
from weftlm.pipeline.prepare import prepare
from weftlm.pipeline.project_report import report_project
from weftlm.pipeline.recipe import Recipe
from weftlm.pipeline.rivals import train_monolith, train_rivals
from weftlm.pipeline.route_stage import route_experts
from weftlm.pipeline.stages import Call
from weftlm.pipeline.students import distil_gate
from weftlm.pipeline.train import is_main_process, run_training


def prepare_data(recipe: Recipe, call: Call) -> None:
    """Corpora to domains and tokens."""
    prepare(recipe.data, recipe.prepared_folder, rebuild=call.replace, progress=call.progress)


def train_base(recipe: Recipe, call: Call) -> None:
    """The base, on its mixture."""
    run_training(recipe)


def make_rivals(recipe: Recipe, call: Call) -> None:
    """Other mixtures and the monolith."""
    train_rivals(recipe)
    if recipe.trains_monolith:
        train_monolith(recipe, progress=call.progress)


def make_experts(recipe: Recipe, call: Call) -> None:
    """An expert per domain, with its gate."""
    experts = recipe.expert_settings
    if experts.imports:
        import_recipe_experts(recipe, replace=call.replace, progress=call.progress)
    if experts.trains:
        with processes(call.processes) if call.processes > 1 else nullcontext() as executor:
            train_experts(recipe, replace=call.replace, executor=executor, progress=call.progress)
    if call.replace and experts.library is None and is_main_process():
        remove_unwanted(recipe)


def fit_and_certify(recipe: Recipe, call: Call) -> None:
    """The robust gate and its certificate."""
    fit_gate(recipe, progress=call.progress)
    certify_gate(recipe)


def compare_routers(recipe: Recipe, call: Call) -> None:
    """Routers compared, routed models written."""
    route_experts(recipe, progress=call.progress)


def score_text(recipe: Recipe, call: Call) -> None:
    """Text and samples under every expert."""
    score_experts(recipe, overwrite=call.replace, progress=call.progress)


def distil_students(recipe: Recipe, call: Call) -> None:
    """Causal students that can be served."""
    distil_gate(recipe, progress=call.progress)


def evaluate(recipe: Recipe, call: Call) -> None:
    """Every model on the same held-out text."""
    evaluate_models(recipe, progress=call.progress)


def report(recipe: Recipe, call: Call) -> None:
    """One page and one summary."""
    report_project(recipe)
