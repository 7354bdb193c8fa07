"""The demonstration's second part: an expert for every domain, and every router over them."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from weft import __version__
from weft.errors import ConfigError
from weft.files import write_whole
from weft.pipeline.expert_recipe import ExpertRecipe
from weft.pipeline.experts import train_experts
from weft.pipeline.prepared import PreparedData
from weft.pipeline.recipe import Recipe
from weft.pipeline.routes import BEST_SINGLE, TracedText, build_route, evaluate_routes, trace_text
from weft.reporting.routing import RoutingFacts
from weft.routing.routed_model import RoutedModel
from weft.routing.router import router_config

ROUTERS = ("merged", "retrieval", "average-activation", "arrow", "random", "phatgoose", "prefix", "blend")
TRACED = "blend"
"""The router whose work the report shows."""
TIMED = "phatgoose"
HALF_TOKENS = 60
"""Tokens of each domain in the text that is traced."""
TIMED_PAIRS = 15


def route_demo(recipe: Recipe, base_run: Path, folder: Path) -> tuple[dict[str, Any], RoutingFacts]:
    """Train the experts over a finished run's model and compare the routers; what is finished is reused.

    Args:
        recipe: the demonstration's.
        base_run: folder of the run whose model the experts adapt.
        folder: experts, routed model and results go there.
    Returns:
        the `routing` section of summary.json, and what the report shows.
    Raises:
        ConfigError: the recipe has no experts section.
    """
    experts = expert_recipe(recipe, base_run, folder)
    start = time.perf_counter()
    made = train_experts(experts, processes=min(2, os.cpu_count() or 1))
    seconds = time.perf_counter() - start
    data = PreparedData.load(experts.prepared_folder)
    found = _evaluated(experts, data, folder, made, seconds)
    text = changing_text(data)
    traced = trace_text(folder / "routed" / TRACED, text)
    return found, facts(found, traced)


def expert_recipe(recipe: Recipe, base_run: Path, folder: Path) -> ExpertRecipe:
    """The recipe of the demonstration's experts: the demonstration's own data, a finished run's model as base."""
    if recipe.experts is None:
        raise ConfigError("the demonstration trains experts; its recipe needs an `experts` section")
    return ExpertRecipe(
        run=folder,
        prepared=recipe.prepared_folder,
        seed=recipe.seed,
        data=recipe.data,
        experts=recipe.experts.model_copy(update={"base": str(base_run / "model")}),
        evaluation=recipe.evaluation,
        gating=recipe.gating,
    )


def changing_text(data: PreparedData) -> str:
    """Held-out text that changes domain midway: from the first domain to the second that hold out any."""
    pieces: list[str] = []
    for domain in data.domains:
        if domain.heldout is not None and len(domain.heldout) > HALF_TOKENS and len(pieces) < 2:
            pieces.append(data.tokenizer.decode(domain.heldout.read(0, HALF_TOKENS).tolist()))
    return "\n".join(pieces)


def facts(found: Mapping[str, Any], traced: TracedText) -> RoutingFacts:
    """What the report shows of the comparison and of one text."""
    return RoutingFacts(
        table={label.replace("_", " "): row for label, row in found["bits_per_byte"].items()},
        relative_forward_time=found["relative_forward_time"],
        traces=[(f"{TRACED} on a text that changes domain midway", traced.trace, traced.tokens)],
    )


def _evaluated(
    recipe: ExpertRecipe, data: PreparedData, folder: Path, made: Mapping[str, Any], seconds: float
) -> dict[str, Any]:
    """Scores and times, kept in routing.json for as long as experts, data and settings stay the same."""
    cards = [(name, facts["adapter"], facts["losses"]) for name, facts in made["experts"].items()]
    routers = [router_config(name).model_dump(mode="json") for name in ROUTERS]
    settings = [__version__, data.fingerprint, recipe.experts.model_dump(mode="json"), cards, routers]
    settings.append(recipe.evaluation.model_dump(mode="json"))
    identity = hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=16).hexdigest()
    path = folder / "routing.json"
    if path.exists():
        known: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if known["identity"] == identity:
            return known
    evaluation = evaluate_routes(recipe, ROUTERS)
    for router in dict.fromkeys((TRACED, TIMED)):
        shutil.rmtree(folder / "routed" / router, ignore_errors=True)
        build_route(recipe.library_folder, router, folder / "routed" / router)
    rows = {label.partition(" (")[0].replace(" ", "_"): row for label, row in evaluation.rows.items()}
    generic = {label: row.generic for label, row in rows.items()}
    found = {
        "identity": identity,
        "heldout_bpb": {label: mean.bits_per_byte for label, mean in generic.items() if mean is not None},
        "unseen_bpb": {label: row.sets["target"].bits_per_byte for label, row in rows.items() if "target" in row.sets},
        "bits_per_byte": {
            label: {name: each.bits_per_byte for name, each in row.sets.items()} for label, row in rows.items()
        },
        BEST_SINGLE.replace(" ", "_"): evaluation.best_single,
        "experts": sorted(made["experts"]),
        "seconds": seconds,
        "relative_forward_time": relative_forward_time(folder / "routed" / TIMED, data),
        "notes": list(evaluation.notes),
    }
    write_whole(path, json.dumps(found, indent=2) + "\n")
    return found


@torch.inference_mode()
def relative_forward_time(folder: Path, data: PreparedData) -> float:
    """Median over pairs of a routed forward pass's time over the base's, on the same held-out tokens."""
    transformers_logging.disable_progress_bar()
    model = RoutedModel.from_pretrained(folder)
    heldout = next(domain.heldout for domain in data.domains if domain.heldout is not None)
    tokens = min(512, len(heldout))
    ids_BT = torch.from_numpy(heldout.read(0, tokens).astype("int64"))[None, : tokens // 4 * 4].view(4, -1)
    ratios = []
    for _ in range(TIMED_PAIRS + 2):
        with model.disabled():
            start = time.perf_counter()
            model(ids_BT)
            base = time.perf_counter() - start
        start = time.perf_counter()
        model(ids_BT)
        ratios.append((time.perf_counter() - start) / base)
    return statistics.median(ratios[2:])
