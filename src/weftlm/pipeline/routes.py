"""Routed models from a library: built, traced on a text, and compared with the base and the single experts.

<run>/routing.json          the comparison of the stage `route`
<run>/routed/ROUTER/        a routed model (`weftlm route build`)
"""

from __future__ import annotations

import logging
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from weftlm.corpora.tokens import Tokenizer, find_tokenizer
from weftlm.errors import ConfigError
from weftlm.evaluation.choices import mean_accuracy
from weftlm.evaluation.config import EvaluationConfig
from weftlm.evaluation.result import mean_result
from weftlm.evaluation.suite import SuiteResult
from weftlm.experts.expert import base_name
from weftlm.experts.library import ExpertLibrary
from weftlm.fan_out import Task, fan_out, keep, new_key
from weftlm.files import refuse_full, whole_folder, write_object
from weftlm.models.prompted import is_encoder_decoder
from weftlm.pipeline.any_model import TOKENIZER, OpenModel, open_model
from weftlm.pipeline.base import open_base
from weftlm.pipeline.experts import shared_folders
from weftlm.pipeline.heldout import HeldOut, difference, read_measured
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

BASE, BEST_SINGLE, ORACLE = "base", "best single", "oracle"
ROLES: Mapping[str, Role] = {BASE: "base", BEST_SINGLE: "expert", ORACLE: "bound"}
RouterSection = Mapping[str, Any] | RouterConfig | str


# -- building -----------------------------------------------------------------------------------------------------


def build_route(
    library: Path,
    router: RouterSection,
    output: Path,
    *,
    base: str | None = None,
    revision: str | None = None,
    experts: Sequence[str] | None = None,
    dtype: str = "float32",
    copy_base: bool = False,
    replace: bool = False,
) -> dict[str, Any]:
    """Write a routed model: the router's section, its experts, the base's tokenizer, and on request the base.

    Args:
        library: Folder of the experts.
        router: Name or section of the router.
        output: Folder of the routed model, new.
        base: Folder or hub name of the base; None for the library's own.
        revision: Hub revision of the base; None for the library's own, where `base` is None.
        experts: Names of the experts to route among; None for all.
        dtype: Data type of the base's parameters.
        copy_base: Whether the base's weights are written too.
        replace: Whether another routed model in the folder is replaced, once this one is whole.
    Returns:
        output, base, router, experts, those left out with the reason, adapted modules, and whether there is a
        tokenizer.
    Raises:
        ConfigError: a section or folder is wrong, or the base cannot be loaded.
        ExpertError: an expert that is named is broken or of another base, none is left, or one lacks what the router
            reads.
    """
    transformers_logging.disable_progress_bar()
    if not replace:
        refuse_full(output, "routed model")
    config = router_config(router)
    opened = ExpertLibrary.open(library)
    place = base_name(opened.base.name if base is None else base)
    revision = opened.base.revision if base is None else revision
    routed = RoutedModel.from_library(place, opened, config, experts=experts, revision=revision, dtype=dtype)
    tokenizer = find_tokenizer(place, revision)
    if tokenizer is None:
        log.warning("the base %s brings no tokenizer; save one in %s to trace text", place, output / TOKENIZER)
    with whole_folder(output, "routed model", replace=replace) as making:
        routed.save_pretrained(making, copy_base=copy_base)
        if tokenizer is not None:
            tokenizer.save(making / TOKENIZER)
    return {
        "output": str(output),
        "base": place,
        "router": config.model_dump(mode="json"),
        "experts": [expert.name for expert in routed.experts],
        "left_out": dict(routed.left_out),
        "modules": len(routed.targets),
        "tokenizer": tokenizer is not None,
    }


# -- tracing ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TracedText:
    """The routing of a text.

    Attributes:
        trace: Weights of the experts by token and module.
        tokens: Text of each token.
    """

    trace: Trace
    tokens: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """`Trace.to_json` and `token_texts`."""
        return {"token_texts": list(self.tokens), **self.trace.to_json()}


def trace_text(folder: Path, text: str, *, base: str | None = None, device: str = "auto") -> TracedText:
    """Run a routed model on a text and note which experts handle each token.

    Args:
        folder: Folder of the routed model.
        text: Text to run it on.
        base: Folder or hub name of the base, where it has moved.
        device: Device to run on.
    Raises:
        ConfigError: the folder holds no routed model, the text is empty or too long, or the router gives every token
            the same experts.
        DataError: neither the folder nor the base holds a tokenizer.
    """
    return trace_opened(open_model(folder, base=base, device=device, encoder_decoder=True), text)


def trace_opened(opened: OpenModel, text: str) -> TracedText:
    """As `trace_text`, of a model that is open."""
    if opened.kind != "routed":
        raise ConfigError(f"{opened.path} is no routed model; write one with weftlm route build")
    ids = opened.tokenizer.encode_batch([text])[0].astype("int64")
    longest = opened.max_length
    if not len(ids) or (longest is not None and len(ids) > longest):
        raise ConfigError(f"the text has {len(ids)} tokens; the model reads from 1 to {longest or 'any number of'}")
    (trace,) = opened.model.trace(torch.from_numpy(ids)[None].to(opened.model.device))
    return TracedText(trace, tuple(opened.tokenizer.decode([token]) for token in trace.tokens))


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
        recipe: Recipe of the experts.
        routes: Routers in one word each (`parse_router`); None for every router the experts have what it needs for.
        experts: Names of the experts to route among; None for all.
        config: Extent of the evaluation; None for the recipe's.
        singles: Whether every expert is scored alone too, for the best single one and the oracle.
        executor: Where to score, one task for the base, each router and each single expert; its workers must see the
            prepared data, the base and the library. None: in this process.
        progress: Whether progress is shown on stderr.
    Returns:
        sequence_length; rows, by label: role, `SuiteResult.to_json`, difference to the base (`heldout.difference`),
        mean_accuracy where there are tasks; singles, by expert; best_single; oracle, the expert by set; notes; experts;
        left_out, with reasons.
    Raises:
        ConfigError: an unknown router or key, or nothing is held out.
        DataError, ExpertError: as `open_base` and `RoutedModel`.
        ConfigError, WeftError: as `fan_out`.
    """
    config = recipe.evaluation if config is None else config
    sections = {text: router_config(parse_router(text)) for text in routes or ()}
    data = prepare(recipe.data, recipe.prepared_folder, progress=progress)
    device = _device(recipe) if executor is None else torch.device("cpu")
    bench = _Bench.open(recipe, data, experts, config, device)
    names = [expert.name for expert in bench.model.experts]
    notes: list[str] = []
    if routes is None:
        sections, notes = _possible(bench.model)
    for label, section in sections.items():
        if routers[section.router].reads_ahead:
            notes.append(f"{label} chooses by text that includes the tokens it is scored on")

    wanted: dict[tuple[str, str], RouterSection | None] = {("base", BASE): None}
    wanted |= {("router", label): section for label, section in sections.items()}
    wanted |= {("expert", name): {"router": "single", "expert": name} for name in names if singles}
    found: dict[tuple[str, str], SuiteResult] = {}
    if executor is not None:
        key = new_key()
        tasks = {
            Task(f"{kind} {label!r}", (key, recipe, experts, config, router)): (kind, label)
            for (kind, label), router in wanted.items()
        }
        fan_out(
            executor, list(tasks), _score_far, lambda task, result: found.update({tasks[task]: result}),
            shared=shared_folders(recipe), description="evaluate", unit="models", show=progress,
        )  # fmt: skip
    else:
        with ProgressBar("evaluate", total=len(wanted), unit="models", enabled=progress) as counter:
            for row, router in wanted.items():
                found[row] = bench.score(router)
                counter.advance()
    base = found["base", BASE]
    rows = {BASE: base, **{label: found["router", label] for label in sections}}
    alone = {name: found["expert", name] for name in names if singles}
    best, oracle = None, {}
    if alone:
        notes.append("best single and oracle are chosen on the held-out text they are scored on")
        best = min(alone, key=lambda name: _mean(alone[name]))
        oracle = {each: min(alone, key=lambda name: alone[name].sets[each].nats_per_token) for each in base.sets}
        sets = {name: alone[expert].sets[name] for name, expert in oracle.items()}
        domains = {name: sets[name] for name in base.domains}
        rows[BEST_SINGLE] = alone[best]
        rows[ORACLE] = SuiteResult(
            sets, mean_result(domains) if domains else None, sequence_length=base.sequence_length
        )
    left_out = dict(bench.model.left_out)
    return {
        "sequence_length": base.sequence_length,
        "rows": {label: _row(label, row, base) for label, row in rows.items()},
        "singles": {name: result.to_json() for name, result in alone.items()},
        "best_single": best,
        "oracle": oracle,
        "notes": [*notes, *(f"expert {name} left out: {reason}" for name, reason in left_out.items())],
        "experts": sorted(names),
        "left_out": left_out,
    }


def _row(label: str, row: SuiteResult, base: SuiteResult) -> dict[str, Any]:
    found = {"role": ROLES.get(label, "router"), **row.to_json()}
    if row is not base:
        found["difference"] = difference(row, base)
    if row.tasks:
        found["mean_accuracy"] = dict(zip(("accuracy", "accuracy_se"), mean_accuracy(row.tasks), strict=True))
    return found


def _device(recipe: Recipe) -> torch.device:
    return choose_runtime(recipe.expert_settings.training, parameters=0).device


@dataclass(frozen=True, eq=False)
class _Bench:
    """A base with its experts, and the text that it is scored on under any router."""

    heldout: HeldOut
    tokenizer: Tokenizer
    model: RoutedModel

    @classmethod
    def open(
        cls,
        recipe: Recipe,
        data: PreparedData,
        experts: Sequence[str] | None,
        config: EvaluationConfig,
        device: torch.device,
    ) -> _Bench:
        heldout = HeldOut.of(recipe, data, config, recipe.expert_settings.training.sequence_length, device)
        library, base = ExpertLibrary.open(recipe.library_folder), open_base(recipe, data)
        model = RoutedModel.from_library(base.model, library, "merged", experts=experts, device=device)
        return cls(heldout, data.tokenizer, model)

    def score(self, section: RouterSection | None) -> SuiteResult:
        """Evaluate the experts under a router; the base alone where there is none."""
        if section is not None:
            self.model.use_router(section)
        with self.model.disabled() if section is None else nullcontext():
            return self.heldout.score(self.model, self.tokenizer)


def _score_far(
    key: str,
    recipe: Recipe,
    experts: Sequence[str] | None,
    config: EvaluationConfig,
    section: RouterSection | None,
) -> SuiteResult:
    """One row of an evaluation, on a worker that keeps its bench for the next."""
    bench = keep(
        key, lambda: _Bench.open(recipe, PreparedData.load(recipe.prepared_folder), experts, config, _device(recipe))
    )
    return bench.score(section)


def _possible(model: RoutedModel) -> tuple[dict[str, RouterConfig], list[str]]:
    """Routers that run without further options on these experts, and notes on those that lack something.

    `uniform` is left out: it gives the numbers of `merged`.
    """
    sections, notes = {}, []
    for name in routers:
        if name in ("single", "uniform"):
            continue
        lacking = sorted(
            {need for need in routers[name].needs for expert in model.experts if getattr(expert, need) is None}
        )
        if lacking:
            notes.append(f"{name} left out: an expert has no {' and no '.join(lacking)}")
        else:
            sections[name] = router_config(name)
    return sections, notes


def _mean(result: SuiteResult) -> float:
    """Mean bits per byte over the domains, or of the target without any; nats per token where bytes are unknown."""
    found = result.generic if result.generic is not None else next(iter(result.sets.values()))
    return found.nats_per_token if math.isnan(found.bits_per_byte) else found.bits_per_byte


# -- the stage ----------------------------------------------------------------------------------------------------


def route_experts(recipe: Recipe, *, progress: bool = True) -> dict[str, Any]:
    """Compare the routers over a library's experts and write the routed models.

    Returns:
        What routing.json holds: the comparison (`evaluate_routes`), and relative_forward_time of the last model written
        (None where it is not timed).
    Raises:
        WeftError: as `evaluate_routes` and `build_route`.
    """
    config, experts = recipe.routing_settings, recipe.expert_settings
    found = evaluate_routes(recipe, config.routers, progress=progress)
    for router in config.build:
        build_route(
            recipe.library_folder, parse_router(router), recipe.routed_folder(router),
            base=recipe.base, revision=experts.revision, dtype=experts.dtype, replace=True,
        )  # fmt: skip
    found["relative_forward_time"] = None
    if config.timed_pairs:
        data, last = PreparedData.load(recipe.prepared_folder), recipe.routed_folder(config.build[-1])
        found["relative_forward_time"] = relative_forward_time(last, data, config.timed_pairs, _device(recipe))
    write_object(recipe.run / ROUTING, found)
    return found


def read_routing(recipe: Recipe) -> dict[str, Any]:
    """What `route_experts` found; errors as `read_measured`."""
    return read_measured(recipe.run / ROUTING, "route")


@torch.inference_mode()
def relative_forward_time(folder: Path, data: PreparedData, pairs: int, device: torch.device | str = "cpu") -> float:
    """Median over pairs of a routed forward pass's time over the base's, on the same held-out tokens."""
    transformers_logging.disable_progress_bar()
    model = RoutedModel.from_pretrained(folder, device=device)
    heldout = next(domain.heldout for domain in data.domains if domain.heldout is not None)
    tokens = min(512, len(heldout))
    ids_BT = torch.from_numpy(heldout.read(0, tokens).astype("int64"))[None, : tokens // 4 * 4].view(4, -1).to(device)
    given = {"input_ids": ids_BT} | ({"decoder_input_ids": ids_BT} if is_encoder_decoder(model) else {})

    def seconds() -> float:
        start = time.perf_counter()
        model(**given)
        if ids_BT.device.type != "cpu":
            torch.accelerator.synchronize(ids_BT.device)
        return time.perf_counter() - start

    ratios = []
    for _ in range(pairs + 2):
        with model.disabled():
            base = seconds()
        ratios.append(seconds() / base)
    return statistics.median(ratios[2:])
