"""How each stage is carried out: one function per stage, which continues what was interrupted."""

from __future__ import annotations

from weftlm.pipeline.expert_imports import import_recipe_experts
from weftlm.pipeline.experts import remove_unwanted, train_experts
from weftlm.pipeline.gating import certify_gate, fit_gate, score_experts
from weftlm.pipeline.models_table import evaluate_models
from weftlm.pipeline.prepare import prepare
from weftlm.pipeline.project import Project
from weftlm.pipeline.project_report import report_project
from weftlm.pipeline.rivals import train_monolith, train_rivals
from weftlm.pipeline.route_stage import route_experts
from weftlm.pipeline.stages import Call
from weftlm.pipeline.students import distil_gate
from weftlm.pipeline.train import is_main_process, run_training


def prepare_data(project: Project, call: Call) -> None:
    """Corpora to domains and tokens."""
    prepare(project.data, project.prepared_folder, rebuild=call.replace, progress=call.progress)


def train_base(project: Project, call: Call) -> None:
    """The base, on its mixture."""
    run_training(project.base_recipe)


def make_rivals(project: Project, call: Call) -> None:
    """Other mixtures and the monolith."""
    train_rivals(project)
    if project.monolith:
        train_monolith(project, progress=call.progress)


def make_experts(project: Project, call: Call) -> None:
    """An expert per domain, with its gate."""
    parts = project.pool_recipe
    if parts.experts.imports:
        import_recipe_experts(parts, replace=call.replace, progress=call.progress)
    if parts.experts.trains:
        train_experts(parts, replace=call.replace, processes=call.processes, progress=call.progress)
    if call.replace and parts.experts.library is None and is_main_process():
        remove_unwanted(parts)


def fit_and_certify(project: Project, call: Call) -> None:
    """The robust gate and its certificate."""
    fit_gate(project.pool_recipe, progress=call.progress)
    certify_gate(project.pool_recipe)


def compare_routers(project: Project, call: Call) -> None:
    """Routers compared, routed models written."""
    route_experts(project.pool_recipe, progress=call.progress)


def score_text(project: Project, call: Call) -> None:
    """Text and samples under every expert."""
    score_experts(project.pool_recipe, overwrite=call.replace, progress=call.progress)


def distil_students(project: Project, call: Call) -> None:
    """Causal students that can be served."""
    distil_gate(project.pool_recipe, progress=call.progress)


def evaluate(project: Project, call: Call) -> None:
    """Every model on the same held-out text."""
    evaluate_models(project, progress=call.progress)


def report(project: Project, call: Call) -> None:
    """One page and one summary."""
    report_project(project)
