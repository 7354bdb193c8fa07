"""The pipeline's routing: every router compared on held-out text, routed models written, one of them timed and traced.

<run>/routing.json          what was found
<run>/routed/ROUTER/        a routed model (`weftlm route build`)
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from weftlm.errors import DataError
from weftlm.evaluation.result import finite_or_none
from weftlm.evaluation.suite import SuiteResult
from weftlm.evaluation.tasks import mean_accuracy
from weftlm.files import read_object, write_object
from weftlm.models.prompted import is_encoder_decoder
from weftlm.pipeline.names import ROUTING
from weftlm.pipeline.prepared import PreparedData
from weftlm.pipeline.recipe import Recipe
from weftlm.pipeline.routes import BASE, BEST_SINGLE, ORACLE, TracedText, build_route, evaluate_routes, trace_opened
from weftlm.reporting.routing import RoutingFacts
from weftlm.reporting.score_table import model_table
from weftlm.routing.config import parse_router
from weftlm.routing.routed_model import RoutedModel
from weftlm.training.runtime import choose_runtime

HALF_TOKENS = 60
"""Tokens of each domain in the text that is traced."""


def route_experts(recipe: Recipe, *, progress: bool = True) -> dict[str, Any]:
    """Compare the routers over a library's experts and write the routed models.

    Returns:
        What routing.json holds: heldout_bpb (mean over domains) and unseen_bpb (the target's) by router; bits_per_byte
        by router and set; accuracy by router and task, and mean_accuracy, where the evaluation has tasks; best_single;
        experts; relative_forward_time of the last model written (None where it is not timed); notes.
    Raises:
        WeftError: as `evaluate_routes` and `build_route`.
    """
    config = recipe.routing_settings
    evaluation = evaluate_routes(recipe, config.routers, progress=progress)
    for router in config.build:
        build_route(
            recipe.library_folder,
            parse_router(router),
            recipe.routed_folder(router),
            base=recipe.base,
            revision=recipe.expert_settings.revision,
            dtype=recipe.expert_settings.dtype,
            replace=True,
        )
    rows = {label.partition(" (")[0].replace(" ", "_"): row for label, row in evaluation.rows.items()}
    generic = {label: row.generic for label, row in rows.items()}
    timed = None
    if config.timed_pairs:
        data = PreparedData.load(recipe.prepared_folder)
        timed = relative_forward_time(recipe.routed_folder(config.build[-1]), data, config.timed_pairs, _device(recipe))
    found = {
        "sequence_length": evaluation.base.sequence_length,
        "heldout_bpb": {
            label: finite_or_none(mean.bits_per_byte) for label, mean in generic.items() if mean is not None
        },
        "unseen_bpb": {
            label: finite_or_none(row.sets["target"].bits_per_byte)
            for label, row in rows.items()
            if "target" in row.sets
        },
        "bits_per_byte": {
            label: {name: finite_or_none(each.bits_per_byte) for name, each in row.sets.items()}
            for label, row in rows.items()
        },
        **_accuracies(rows),
        BEST_SINGLE.replace(" ", "_"): evaluation.best_single,
        "experts": sorted(evaluation.experts),
        "left_out": dict(evaluation.left_out),
        "relative_forward_time": timed,
        "notes": list(evaluation.notes),
    }
    write_object(recipe.run / ROUTING, found)
    return found


def _accuracies(rows: Mapping[str, SuiteResult]) -> dict[str, Any]:
    """The share of right answers by router and task, and the mean over the tasks; nothing without tasks."""
    asked = {label: row.tasks for label, row in rows.items() if row.tasks}
    if not asked:
        return {}
    return {
        "accuracy": {label: {name: each.accuracy for name, each in tasks.items()} for label, tasks in asked.items()},
        "mean_accuracy": {label: mean_accuracy(tasks)[0] for label, tasks in asked.items()},
        "chance": {name: each.chance for name, each in next(iter(asked.values())).items()},
    }


def read_routing(recipe: Recipe) -> dict[str, Any]:
    """What `route_experts` found.

    Raises:
        DataError: it has not been carried out, or the file is torn.
    """
    path = recipe.run / ROUTING
    cure = "make it again: weftlm run --from route"
    found = read_object(path, cure)
    if found is None:
        raise DataError(f"{path} is not there; {cure}")
    return found


def routing_facts(recipe: Recipe, found: Mapping[str, Any]) -> RoutingFacts:
    """What the report shows of the comparison and of one text."""
    config = recipe.routing_settings
    text, label = config.trace, "the recipe's text"
    if text is None:
        text, label = changing_text(PreparedData.load(recipe.prepared_folder)), "a text that changes domain midway"
    traced = _traced(recipe, text) if text else None
    roles = {BASE: "base", BEST_SINGLE: "expert", ORACLE: "bound"}
    accuracy, chance = found.get("accuracy", {}), found.get("chance", {})
    rows = {
        label.replace("_", " "): {
            "role": roles.get(label.replace("_", " "), "router"),
            "sets": {name: {"bits_per_byte": value} for name, value in row.items()},
            "tasks": {
                name: {"accuracy": value, "chance": chance[name]} for name, value in accuracy.get(label, {}).items()
            },
        }
        for label, row in found["bits_per_byte"].items()
    }
    return RoutingFacts(
        table=model_table(rows, "router", found.get("sequence_length")),
        relative_forward_time=found["relative_forward_time"],
        traces=[] if traced is None else [(f"{traced[0]} on {label}", traced[1].trace, traced[1].tokens)],
    )


def _traced(recipe: Recipe, text: str) -> tuple[str, TracedText] | None:
    """A text under the first routed model whose experts change with the token; None where none does."""
    transformers_logging.disable_progress_bar()
    for router in recipe.routing_settings.build:
        folder = recipe.routed_folder(router)
        model = RoutedModel.from_pretrained(folder, device=_device(recipe))
        if model.router.static_weights_E is None:
            return router, trace_opened(model, folder, text)
    return None


def changing_text(data: PreparedData) -> str:
    """Held-out text that changes domain midway: from the first domain to the second that hold out any."""
    heldout = [domain.heldout for domain in data.domains if domain.heldout is not None and len(domain.heldout)]
    return "\n".join(data.tokenizer.decode(one.read(0, min(HALF_TOKENS, len(one))).tolist()) for one in heldout[:2])


def _device(recipe: Recipe) -> torch.device:
    return choose_runtime(recipe.expert_settings.training, parameters=0).device


@torch.inference_mode()
def relative_forward_time(folder: Path, data: PreparedData, pairs: int, device: torch.device | str = "cpu") -> float:
    """Median over pairs of a routed forward pass's time over the base's, on the same held-out tokens."""
    transformers_logging.disable_progress_bar()
    model = RoutedModel.from_pretrained(folder, device=device)
    heldout = next(domain.heldout for domain in data.domains if domain.heldout is not None)
    tokens = min(512, len(heldout))
    ids_BT = torch.from_numpy(heldout.read(0, tokens).astype("int64"))[None, : tokens // 4 * 4].view(4, -1).to(device)
    given = {"input_ids": ids_BT}
    if is_encoder_decoder(model):
        given["decoder_input_ids"] = ids_BT

    def finished() -> float:
        if ids_BT.device.type != "cpu":
            torch.accelerator.synchronize(ids_BT.device)
        return time.perf_counter()

    def seconds() -> float:
        start = finished()
        model(**given)
        return finished() - start

    ratios = []
    for _ in range(pairs + 2):
        with model.disabled():
            base = seconds()
        ratios.append(seconds() / base)
    return statistics.median(ratios[2:])
