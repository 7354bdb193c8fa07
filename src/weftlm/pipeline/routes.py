"""Routed models from a library: built, looked into, and judged beside the base and the single experts."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from weftlm.corpora.tokens import Tokenizer, find_tokenizer
from weftlm.errors import ConfigError, DataError
from weftlm.evaluation.config import EvaluationConfig
from weftlm.evaluation.result import MeanResult, finite_or_none, mean_result
from weftlm.evaluation.suite import SuiteResult, evaluate_suite, suite_difference
from weftlm.evaluation.tasks import Questions, read_tasks, score_tasks
from weftlm.experts.expert import base_name
from weftlm.experts.library import ExpertLibrary
from weftlm.fan_out import Task, fan_out, keep, new_key
from weftlm.files import refuse_full, whole_folder
from weftlm.pipeline.base import open_base
from weftlm.pipeline.experts import shared_folders
from weftlm.pipeline.heldout import heldout_sets
from weftlm.pipeline.prepare import prepare
from weftlm.pipeline.prepared import PreparedData
from weftlm.pipeline.recipe import Recipe
from weftlm.progress import progress as show_progress
from weftlm.routing.config import RouterConfig, parse_router, router_config, routers
from weftlm.routing.routed_model import RoutedModel
from weftlm.routing.trace import Trace
from weftlm.training.runtime import choose_runtime

log = logging.getLogger(__name__)

TOKENIZER = "tokenizer"
"""Folder of the tokenizer in a routed model's folder."""
BASE, BEST_SINGLE, ORACLE = "base", "best single", "oracle"

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
        library: folder of the experts.
        router: a router's name or section.
        output: new folder.
        base: where to load the base from; None for where the library says.
        revision: of the base on the hub; None for the one the library says, where `base` is None.
        experts: names of those to route among; None for all.
        dtype: the base is held in.
        copy_base: write the base's weights too, so that the folder stands on its own.
        replace: what the folder holds, once the routed model is whole.
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
        "modules": len(routed.sites),
        "tokenizer": tokenizer is not None,
    }


# -- looking ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TracedText:
    """The routing of a text.

    Attributes:
        trace: who worked on each token in each module.
        tokens: the text of each token.
    """

    trace: Trace
    tokens: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """`Trace.to_json` and `token_texts`."""
        return {"token_texts": list(self.tokens), **self.trace.to_json()}


def trace_text(folder: Path, text: str, *, base: str | None = None, device: str = "auto") -> TracedText:
    """Run a routed model on a text and tell who worked on each token.

    Args:
        folder: what `build_route` wrote.
        text: any text.
        base: another place to load the base from.
        device: where to run.
    Raises:
        ConfigError: the folder holds no routed model, the text is empty or too long, or the router gives every token
            the same experts.
        DataError: the folder holds no tokenizer.
    """
    transformers_logging.disable_progress_bar()
    return trace_opened(RoutedModel.from_pretrained(folder, base=base, device=device), folder, text)


def trace_opened(model: RoutedModel, folder: Path, text: str) -> TracedText:
    """As `trace_text`, of a routed model that was opened from its folder."""
    if not (folder / TOKENIZER).is_dir():
        raise DataError(f"{folder} holds no tokenizer; save the base's there: tokenizer.save_pretrained({TOKENIZER!r})")
    tokenizer = Tokenizer.load(folder / TOKENIZER)
    ids = tokenizer.encode_batch([text])[0].astype("int64")
    longest = getattr(model.config, "max_position_embeddings", None)
    if not len(ids) or (longest is not None and len(ids) > longest):
        raise ConfigError(f"the text has {len(ids)} tokens; the model reads from 1 to {longest or 'any number of'}")
    model.router.set_decode(tokenizer.decode)
    (trace,) = model.trace(torch.from_numpy(ids)[None].to(model.device))
    return TracedText(trace, tuple(tokenizer.decode([token]) for token in trace.tokens))


# -- judging ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RouteEvaluation:
    """How well a base does with its experts routed in several ways.

    Attributes:
        base: the base alone.
        routes: by router, as given.
        singles: every expert alone, for all text; empty where that was not asked for.
        best_single: the expert with the lowest mean over the domains; chosen on this very held-out text.
        oracle: for each set the best expert; it looks at the held-out text it is scored on, so it is a bound and not a
            method.
        notes: what a reader must know of the numbers.
        experts: names of the pool.
        left_out: experts of the library that cannot be used, with the reason.
    """

    base: SuiteResult
    routes: dict[str, SuiteResult]
    singles: dict[str, SuiteResult]
    best_single: str | None
    oracle: dict[str, str]
    notes: tuple[str, ...]
    experts: tuple[str, ...] = ()
    left_out: Mapping[str, str] = field(default_factory=dict)

    @property
    def rows(self) -> dict[str, SuiteResult]:
        """Base, routers, best single expert and oracle, by label."""
        found = {BASE: self.base, **self.routes}
        if self.best_single is not None:
            found[BEST_SINGLE] = self.singles[self.best_single]
            found[ORACLE] = self.oracle_result
        return found

    @property
    def oracle_result(self) -> SuiteResult:
        """Each set's best expert, as one evaluation."""
        sets = {name: self.singles[expert].sets[name] for name, expert in self.oracle.items()}
        domains = {name: sets[name] for name in self.base.domains}
        mean = mean_result(domains) if domains else None
        return SuiteResult(sets, mean, sequence_length=self.base.sequence_length)

    @property
    def minus_base(self) -> dict[str, dict[str, MeanResult]]:
        """Each row minus the base, as `suite_difference`."""
        return {label: suite_difference(row, self.base) for label, row in self.rows.items()}

    def to_json(self) -> dict[str, Any]:
        """Every row with its sets, the mean over domains, and the paired difference to the base in bits per byte."""
        differences = self.minus_base
        return {
            "rows": {
                label: {**row.to_json(), "minus_base": _difference(differences[label])}
                for label, row in self.rows.items()
            },
            "singles": {name: result.to_json() for name, result in self.singles.items()},
            "best_single": self.best_single,
            "oracle": self.oracle,
            "notes": list(self.notes),
            "left_out": dict(self.left_out),
        }


def _difference(difference: Mapping[str, MeanResult]) -> dict[str, Any]:
    return {
        name: {
            "bits_per_byte": finite_or_none(each.bits_per_byte),
            "bits_per_byte_se": finite_or_none(each.bits_per_byte_se),
        }
        for name, each in difference.items()
    }


def evaluate_routes(
    recipe: Recipe,
    routes: Sequence[str] | None = None,
    *,
    experts: Sequence[str] | None = None,
    config: EvaluationConfig | None = None,
    singles: bool = True,
    executor: Executor | None = None,
    progress: bool = True,
) -> RouteEvaluation:
    """Score base, routers and single experts on the recipe's held-out text, all on the same windows.

    Args:
        recipe: of the experts.
        routes: routers in one word each (`parse_router`); None for every router the experts have what it needs for.
        experts: names of those to route among; None for all.
        config: how much to score; None for the recipe's.
        singles: score every expert alone too, for the best single one and the oracle; costs one evaluation per expert.
        executor: where to score, one task for the base, each router and each single expert; its workers must see the
            prepared data, the base and the library. None: in this process.
        progress: show progress on stderr.
    Raises:
        ConfigError: an unknown router or key, or nothing is held out.
        DataError, ExpertError: as `open_base` and `RoutedModel`.
        ConfigError, WeftError: as `fan_out`.
    """
    data = prepare(recipe.data, recipe.prepared_folder, progress=progress)
    read_tasks((recipe.evaluation if config is None else config).tasks)
    if data.target_heldout is None and all(domain.heldout is None for domain in data.domains):
        raise ConfigError("nothing is held out to evaluate on; raise data.split.fraction, or give data.heldout")
    sections = {text: router_config(parse_router(text)) for text in routes or ()}
    config = recipe.evaluation if config is None else config
    bench = _Bench.open(recipe, data, experts, config, device=torch.device("cpu") if executor is not None else None)
    names = [expert.name for expert in bench.model.experts]
    notes: list[str] = []
    if routes is None:
        sections, notes = _possible(bench.model)
    for label, section in sections.items():
        if routers[section.router].reads_ahead:
            notes.append(f"{label} chooses by text that includes the tokens it is scored on")

    rows: dict[tuple[str, str], RouterSection | None] = {("base", BASE): None}
    rows |= {("router", label): section for label, section in sections.items()}
    rows |= {("expert", name): {"router": "single", "expert": name} for name in names if singles}
    found: dict[tuple[str, str], SuiteResult] = {}
    if executor is not None:
        key = new_key()
        tasks = {
            Task(f"{kind} {label!r}", (key, recipe, experts, config, router)): (kind, label)
            for (kind, label), router in rows.items()
        }
        fan_out(
            executor,
            list(tasks),
            _score_far,
            lambda task, result: found.update({tasks[task]: result}),
            shared=shared_folders(recipe),
            description="evaluate",
            unit="models",
            show=progress,
        )
    else:
        with show_progress("evaluate", total=len(rows), unit="models", enabled=progress) as counter:
            for row, router in rows.items():
                found[row] = bench.score(router)
                counter.advance()
    plain = found["base", BASE]
    alone = {name: found["expert", name] for name in names if singles}
    if alone:
        notes.append("best single and oracle are chosen on the held-out text they are scored on")
    best = min(alone, key=lambda name: _mean(alone[name])) if alone else None
    oracle = {}
    for each in plain.sets if alone else ():
        oracle[each] = min(alone, key=lambda name: alone[name].sets[each].nats_per_token)
    found_routes = {label: found["router", label] for label in sections}
    notes += [f"expert {name} left out: {reason}" for name, reason in bench.model.left_out.items()]
    return RouteEvaluation(
        plain, found_routes, alone, best, oracle, tuple(notes), tuple(names), dict(bench.model.left_out)
    )


@dataclass(frozen=True, eq=False)
class _Bench:
    """A base with its experts, and the text it is scored on, whoever routes."""

    recipe: Recipe
    config: EvaluationConfig
    data: PreparedData
    model: RoutedModel
    questions: Questions
    device: torch.device

    @classmethod
    def open(
        cls,
        recipe: Recipe,
        data: PreparedData,
        experts: Sequence[str] | None,
        config: EvaluationConfig,
        device: torch.device | None = None,
    ) -> _Bench:
        library = ExpertLibrary.open(recipe.library_folder)
        base = open_base(recipe, data)
        if device is None:
            device = choose_runtime(recipe.expert_settings.training, parameters=0).device
        model = RoutedModel.from_library(base.model, library, "merged", experts=experts, device=device)
        return cls(recipe, config, data, model, read_tasks(config.tasks), device)

    def score(self, section: RouterSection | None) -> SuiteResult:
        """Evaluate the experts under a router; the base alone where there is none."""
        if section is not None:
            self.model.use_router(section)
            self.model.router.set_decode(self.data.tokenizer.decode)
        domains, target = heldout_sets(self.data, self.recipe.expert_settings.examples)
        length = self.recipe.expert_settings.training.sequence_length
        with self.model.disabled() if section is None else nullcontext():
            result = evaluate_suite(
                self.model,
                domains,
                target,
                sequence_length=length,
                config=self.config,
                device=self.device,
            )
            tasks = score_tasks(
                self.model,
                self.data.tokenizer,
                self.questions,
                batch_size=self.config.batch_size,
                max_length=length,
                device=self.device,
            )
        return replace(result, tasks=tasks)


def _score_far(
    key: str,
    recipe: Recipe,
    experts: Sequence[str] | None,
    config: EvaluationConfig,
    section: RouterSection | None,
) -> SuiteResult:
    """One row of an evaluation, on a worker that keeps its bench for the next."""
    bench = keep(key, lambda: _Bench.open(recipe, PreparedData.load(recipe.prepared_folder), experts, config))
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
