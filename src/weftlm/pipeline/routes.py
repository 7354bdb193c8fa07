"""Routed models from a library: built, traced on a text, and compared with the base and the single experts.

<run>/routing.json          the comparison of the stage `route`
<run>/routed/ROUTER/        a routed model (`weftlm route build`)
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from weftlm.corpora.tokens import find_tokenizer
from weftlm.errors import ConfigError, ExpertError
from weftlm.evaluation.config import EvaluationConfig
from weftlm.evaluation.result import mean_result
from weftlm.evaluation.suite import SuiteResult
from weftlm.experts.library import ExpertLibrary
from weftlm.fan_out import fan_out, keep, new_key
from weftlm.files import refuse_full, whole_folder, write_object
from weftlm.pipeline.any_model import TOKENIZER, OpenModel
from weftlm.pipeline.base import open_base
from weftlm.pipeline.experts import shared_folders
from weftlm.pipeline.heldout import BASE, HeldOut, compared, read_measured
from weftlm.pipeline.names import ROUTING
from weftlm.pipeline.prepare import prepare
from weftlm.pipeline.prepared import PreparedData
from weftlm.pipeline.recipe import Recipe
from weftlm.progress import ProgressBar
from weftlm.reporting.score_table import Role
from weftlm.routing.config import RouterConfig, parse_router, router_config, routers
from weftlm.routing.routed_model import RoutedModel
from weftlm.routing.trace import Trace
from weftlm.training.runtime import choose_runtime

log = logging.getLogger(__name__)

BEST_SINGLE, ORACLE = "best single", "oracle"
ROLES: Mapping[str, Role] = {BASE: "base", BEST_SINGLE: "expert", ORACLE: "bound"}
RouterSection = Mapping[str, Any] | RouterConfig | str


def build_route(
    library: Path,
    router: RouterSection,
    output: Path,
    *,
    base: str | None = None,
    copy_base: bool = False,
    replace: bool = False,
    **how: Any,
) -> dict[str, Any]:
    """Write a routed model of `RoutedModel.from_library`: router's section, experts, tokenizer, on request the base.

    With `replace` another routed model in the folder is replaced once this one is whole.

    Returns:
        output, base, router, experts, those left out with the reason, adapted modules, and whether there is a
        tokenizer.
    """
    if not replace:
        refuse_full(output, "routed model")
    transformers_logging.disable_progress_bar()
    config = router_config(router)
    routed = RoutedModel.from_library(base, library, config, **how)
    tokenizer = find_tokenizer(routed.base_reference.name, routed.base_reference.revision)
    if tokenizer is None:
        log.warning("the base brings no tokenizer; save one in %s to trace text", output / TOKENIZER)
    with whole_folder(output, "routed model", replace=replace) as making:
        routed.save_pretrained(making, copy_base=copy_base)
        if tokenizer is not None:
            tokenizer.save(making / TOKENIZER)
    return {
        "output": str(output),
        "base": routed.base_reference.name,
        "router": config.model_dump(mode="json"),
        "experts": [expert.name for expert in routed.experts],
        "left_out": dict(routed.left_out),
        "modules": len(routed.targets),
        "tokenizer": tokenizer is not None,
    }


def trace_text(opened: OpenModel, text: str) -> tuple[Trace, list[str]]:
    """The weights of the experts by token and module on a text, and the text of each token.

    Raises:
        ConfigError: the model is no routed model, the text is empty or too long, or the router gives every token the
            same experts.
    """
    if opened.kind != "routed":
        raise ConfigError(f"{opened.path} is no routed model; write one with weftlm route build")
    ids, longest = opened.tokenizer.encode_batch([text])[0].astype("int64"), opened.max_length
    if not len(ids) or (longest is not None and len(ids) > longest):
        raise ConfigError(f"the text has {len(ids)} tokens; the model reads from 1 to {longest or 'any number of'}")
    (trace,) = opened.model.trace(torch.from_numpy(ids)[None].to(opened.model.device))
    return trace, [opened.tokenizer.decode([token]) for token in trace.tokens]


# -- comparing ----------------------------------------------------------------------------------------------------


def evaluate_routes(
    recipe: Recipe,
    routes: Sequence[str] | None = None,
    *,
    experts: Sequence[str] | None = None,
    config: EvaluationConfig | None = None,
    singles: bool = True,
    executor: Executor | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Score base, routers and single experts on the recipe's held-out text, all on the same windows.

    Best single expert (the lowest mean over the domains) and oracle (the best expert of each set) are chosen on the
    text that they are scored on: they are bounds, not methods.

    Args:
        routes: Routers in one word each (`parse_router`); None for every router that can be built over the experts.
        experts: Names of the experts to route among; None for all.
        config: Extent of the evaluation; None for the recipe's.
        singles: Whether every expert is scored alone too, for the best single one and the oracle.
        executor: Executor of one task per row, whose workers see the same folders; None: this process.
    Returns:
        sequence_length; rows, by label (`compared`); singles, by expert; best_single; oracle, the expert by set; notes;
        experts; left_out, with reasons.
    Raises:
        ConfigError: an unknown router or key, or nothing is held out.
        WeftError: as `open_base`, `RoutedModel` and `fan_out`.
    """
    config = recipe.evaluation if config is None else config
    sections = {text: router_config(parse_router(text)) for text in routes or ()}
    data = prepare(recipe.data, recipe.prepared_folder, progress=progress)
    model, score = _bench(recipe, data, experts, config, "cpu" if executor is not None else None)
    names, notes = [expert.name for expert in model.experts], list[str]()
    if routes is None:
        sections, notes = _possible(model)
    notes += [
        f"{label} chooses by text that includes the tokens it is scored on"
        for label, section in sections.items() if routers[section.router].reads_ahead
    ]  # fmt: skip
    alone = {name: f"single:expert={name}" for name in names if singles}
    wanted: dict[str, RouterSection | None] = {
        BASE: None, **sections, **{label: {"router": "single", "expert": name} for name, label in alone.items()}
    }  # fmt: skip
    found: dict[str, SuiteResult] = {}
    if executor is not None:
        key = new_key()
        tasks = {label: (key, recipe, experts, config, section) for label, section in wanted.items()}
        fan_out(
            executor, tasks, _score_far, found.__setitem__,
            shared=shared_folders(recipe), description="evaluate", unit="models", show=progress,
        )  # fmt: skip
    else:
        with ProgressBar("evaluate", total=len(wanted), unit="models", enabled=progress) as counter:
            for label, router in wanted.items():
                found[label] = score(router)
                counter.advance()
    base, rows = found[BASE], {label: found[label] for label in (BASE, *sections)}
    best: str | None = None
    oracle: dict[str, str] = {}
    if alone:
        notes.append("best single and oracle are chosen on the held-out text they are scored on")
        best = min(alone, key=lambda name: _mean(found[alone[name]]))
        oracle = {each: min(alone, key=lambda name: found[alone[name]].sets[each].nats_per_token) for each in base.sets}
        sets = {each: found[alone[name]].sets[each] for each, name in oracle.items()}
        mean = mean_result({name: sets[name] for name in base.domains}) if base.domains else None
        rows |= {BEST_SINGLE: found[alone[best]], ORACLE: SuiteResult(sets, mean, sequence_length=base.sequence_length)}
    left_out = dict(model.left_out)
    return {
        "sequence_length": base.sequence_length,
        "rows": compared(rows, {label: ROLES.get(label, "router") for label in rows}, BASE),
        "singles": {name: found[label].to_json() for name, label in alone.items()},
        "best_single": best,
        "oracle": oracle,
        "notes": [*notes, *(f"expert {name} left out: {reason}" for name, reason in left_out.items())],
        "experts": sorted(names),
        "left_out": left_out,
    }


def _bench(
    recipe: Recipe,
    data: PreparedData,
    experts: Sequence[str] | None,
    config: EvaluationConfig,
    place: str | None = None,
) -> tuple[RoutedModel, Callable[[RouterSection | None], SuiteResult]]:
    """A base with its experts, and what evaluates them under a router; the base alone where there is none."""
    training = recipe.expert_settings.training
    device = choose_runtime(training, parameters=0).device if place is None else torch.device(place)
    heldout = HeldOut(recipe, data, config, training.sequence_length, device)
    library, base = ExpertLibrary.open(recipe.library_folder), open_base(recipe, data)
    model = RoutedModel.from_library(base.model, library, "merged", experts=experts, device=device)

    def score(section: RouterSection | None) -> SuiteResult:
        if section is None:
            with model.disabled():
                return heldout.score(model, data.tokenizer)
        model.use_router(section)
        return heldout.score(model, data.tokenizer)

    return model, score


def _score_far(
    key: str, recipe: Recipe, experts: Sequence[str] | None, config: EvaluationConfig, section: RouterSection | None
) -> SuiteResult:
    """One row of an evaluation, on a worker that keeps its bench for the next."""
    _, score = keep(key, lambda: _bench(recipe, PreparedData.load(recipe.prepared_folder), experts, config))
    return score(section)


def _possible(model: RoutedModel) -> tuple[dict[str, RouterConfig], list[str]]:
    """Routers that can be built without options over these experts, and for each other a note that says why not.

    `uniform` is left out: it gives the numbers of `merged`.
    """
    sections, notes = {}, []
    for name in routers:
        if name in ("single", "uniform"):
            continue
        try:
            model.use_router(name)
        except (ConfigError, ExpertError) as error:
            notes.append(f"{name} left out: {error}")
        else:
            sections[name] = model.router.config
    return sections, notes


def _mean(result: SuiteResult) -> float:
    """Mean bits per byte over the domains, or of the target without any; nats per token where bytes are unknown."""
    found = result.generic if result.generic is not None else next(iter(result.sets.values()))
    return found.nats_per_token if math.isnan(found.bits_per_byte) else found.bits_per_byte


# -- the stage ----------------------------------------------------------------------------------------------------


def route_experts(recipe: Recipe, *, progress: bool = True) -> dict[str, Any]:
    """Compare the routers over a library's experts and write the routed models; gives what routing.json holds."""
    experts = recipe.expert_settings
    found = evaluate_routes(recipe, recipe.routing_settings.routers, progress=progress)
    for router in recipe.routing_settings.build:
        build_route(
            recipe.library_folder, parse_router(router), recipe.routed_folder(router),
            base=recipe.base, revision=experts.revision, dtype=experts.dtype, replace=True,
        )  # fmt: skip
    write_object(recipe.run / ROUTING, found)
    return found


def read_routing(recipe: Recipe) -> dict[str, Any]:
    """What `route_experts` found; errors as `read_measured`."""
    return read_measured(recipe.run / ROUTING, "route")
