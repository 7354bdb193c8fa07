"""From a library of experts to their scores, and what a recipe's gate makes of them.

<run>/scores/              the score cache (`weftlm.gating.scores`)
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from weftlm.config import differences
from weftlm.corpora.labels import folder_name
from weftlm.corpora.source import Source
from weftlm.errors import ConfigError, DataError
from weftlm.evaluation.result import finite_or_none
from weftlm.experts.library import ExpertLibrary
from weftlm.gating.config import ExpertSource, gates
from weftlm.gating.experts import ExpertPool
from weftlm.gating.problem import Problem, make_problem
from weftlm.gating.scores import ScoreCache, score
from weftlm.gating.sequences import ScoredSequences
from weftlm.pipeline.experts import process_group
from weftlm.pipeline.prepare import prepare
from weftlm.pipeline.prepared import PreparedData
from weftlm.pipeline.recipe import Recipe
from weftlm.pipeline.run_folder import alone
from weftlm.pipeline.stages.gate import GatingConfig, check_domains
from weftlm.pipeline.train import require_same_data
from weftlm.training.runtime import choose_runtime

log = logging.getLogger(__name__)


def score_experts(
    recipe: Recipe, *, overwrite: bool = False, executor: Executor | None = None, progress: bool = True
) -> dict[str, Any]:
    """Score the domains' held-out text, and samples of each expert, under every expert of the recipe's library.

    What an interrupted run has scored is not scored again. Started by torchrun, the ranks share the work; an executor
    takes a task per shard, and its workers must see the library and the base. With `overwrite` scores of other experts,
    text or settings are discarded.

    Returns:
        folder, fingerprint, length, experts; by domain: sequences, tokens, and each expert's mean nats per token (None
        where a token is impossible under it); by expert: sequences and tokens of its samples.
    """
    config, section, group = recipe.gating_settings, recipe.expert_settings, process_group(recipe)
    first = group.is_main_process
    with alone(recipe.run) if first else nullcontext():
        with group.main_process_first():
            data = prepare(recipe.data, recipe.prepared_folder, progress=progress and first)
        texts, sources, device = held_out_texts(data, config), pool_sources(recipe), group.device
        if group.num_processes == 1:
            device = choose_runtime(section.training, parameters=0).device
        cache = score(
            sources if executor is not None else open_pool(recipe, data, sources, device), texts, recipe.scores_folder,
            config.scores, eos_id=data.tokenizer.eos_id, executor=executor, dtype=section.dtype, overwrite=overwrite,
            tokens=False, show=progress and first,
        )  # fmt: skip

    def sizes(text: ScoredSequences) -> dict[str, Any]:
        assert text.tokens_N is not None
        return {"sequences": len(text), "tokens": int(text.tokens_N.sum())}

    def facts(text: ScoredSequences) -> dict[str, Any]:
        found = sizes(text)
        means_E = -text.logq_NE.sum(dim=0) / found["tokens"]
        nats = {name: finite_or_none(float(mean)) for name, mean in zip(cache.experts, means_E, strict=True)}
        return {**found, "nats_per_token": nats}

    return {
        "folder": str(cache.folder),
        "fingerprint": cache.fingerprint,
        "length": cache.config.length,
        "experts": list(cache.experts),
        "domains": {name: facts(text) for name, text in cache.domains.items()},
        "samples": {name: sizes(text) for name, text in cache.samples.items()},
    }


def held_out_texts(data: PreparedData, config: GatingConfig) -> Mapping[str, Source]:
    """The text that is scored, by domain: held out, so that no expert was trained on it.

    Raises:
        ConfigError: there is none, or of a domain that was asked for.
    """
    held = {domain.name: domain.heldout for domain in data.domains}
    wanted = config.domains or list(held)
    check_domains(wanted, list(held), "gating.domains")
    found = {name: text for name in wanted if (text := held[name]) is not None}
    if missing := [name for name in wanted if name not in found]:
        raise ConfigError(
            f"no held-out text of {', '.join(missing)}, so that no gate can be made good for it; raise "
            "data.split.fraction, give data.heldout, or name the other domains in gating.domains"
        )
    return found


# -- the experts --------------------------------------------------------------------------------------------------


def pool_sources(recipe: Recipe) -> list[ExpertSource]:
    """Where the experts of a recipe's gate can be loaded from, by any process that sees the same folders."""
    config = recipe.gating_settings
    if config.pool is not None:
        return list(config.pool)
    library = ExpertLibrary.open(recipe.library_folder)
    where = {
        "library": str(library.folder.resolve()), "model": recipe.base, "revision": recipe.expert_settings.revision,
    }  # fmt: skip
    return [ExpertSource(name=name, expert=name, **where) for name in config.experts or library.names]


def open_pool(
    recipe: Recipe, data: PreparedData, sources: Sequence[ExpertSource], device: torch.device | str = "cpu"
) -> ExpertPool:
    """Experts of a recipe's gate in memory; errors as `ExpertPool.load`.

    Raises:
        DataError: the data was tokenised with another tokenizer than the experts', or the run's own model was trained
            on other data.
    """
    if recipe.gating_settings.pool is None and recipe.expert_settings.base is None:
        require_same_data(recipe.base_run, data)
    pool = ExpertPool.load(sources, dtype=recipe.expert_settings.dtype, device=device)
    if pool.tokenizer is None:
        log.warning("the experts bring no tokenizer to compare; make sure that the data was tokenised for them")
    elif pool.tokenizer != data.tokenizer.vocabulary_fingerprint:
        raise DataError(
            "the data was tokenised with another tokenizer than the experts'; prepare it with data.tokenizer: "
            "{pretrained: one of the experts}, in a folder of its own (prepared)"
        )
    return pool


def scored_pool(recipe: Recipe, data: PreparedData, cache: ScoreCache) -> ExpertPool:
    """The experts that were scored, in memory.

    Raises:
        DataError: they are gone or have changed since, or as `open_pool`.
    """
    known, sources = cache.expert_fingerprints, {source.name: source for source in pool_sources(recipe)}
    if missing := [name for name in known if name not in sources]:
        raise DataError(f"{', '.join(missing)}: scored, and not among the experts any more; score again")
    now = (pool := open_pool(recipe, data, [sources[name] for name in known])).fingerprints()
    if changed := [name for name, fingerprint in known.items() if now[name] != fingerprint]:
        raise DataError(
            f"{', '.join(changed)}: changed since the experts were scored; score again (weftlm score --overwrite) and "
            "fit the gate again"
        )
    return pool


# -- the problem --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class OpenScores:
    """A score cache as a recipe's gate sees it.

    Attributes:
        cache: The scores, without those of single tokens.
        fit: Sequences and samples to fit on.
        held: Those that are held out.
        problem: Offsets, mixtures and own experts, as `fit_robust_gate` and `certify` take them.
    """

    cache: ScoreCache
    fit: ScoreCache
    held: ScoreCache
    problem: Mapping[str, Any]

    @property
    def facts(self) -> dict[str, Any]:
        """What is said of them beside any result: scores (fingerprint), experts, length (of the windows)."""
        cache = self.cache
        return {"scores": cache.fingerprint, "experts": list(cache.experts), "length": cache.config.length}

    def held_out(self, recipe: Recipe) -> Problem:
        """The problem on the sequences no gate was fitted on."""
        held, samples = self.held.domains, self.held.samples or None
        return make_problem(held, samples, unit=recipe.gating_settings.fit.unit, **self.problem)


def open_scores(recipe: Recipe, *, causal: bool | None = None) -> OpenScores:
    """Open a run's scores and put together what the recipe asks of a gate over them.

    Causal gates need scores of tokens; `causal` None: whether the recipe's gate is causal.

    Raises:
        ConfigError: a gate that sees whole sequences and no samples, a domain without an expert of its own where the
            offsets need one, or a domain that is named and was not scored.
        DataError: nothing is scored yet, or with other settings than the recipe's.
    """
    config = recipe.gating_settings
    causal = gates[config.gate.gate].causal if causal is None else causal
    cache = ScoreCache.open(recipe.scores_folder, tokens=causal)
    names, experts = list(cache.domains), list(cache.experts)
    pool = config.experts if config.pool is None else [source.name for source in config.pool]
    before = {"scores": cache.config.model_dump(mode="json"), "experts": experts, "domains": names}
    now = {
        "scores": config.scores.model_dump(mode="json"), "experts": pool or experts, "domains": config.domains or names,
    }  # fmt: skip
    if changed := differences(before, now, "gating"):
        raise DataError(
            f"the scores in {cache.folder} were made with other settings ({changed}); score again (weftlm score "
            "--overwrite)"
        )
    if not causal:
        check_samples(config, scored=bool(cache.samples))
    problem = {
        "offsets": config.offsets_over(names),
        "mixtures": config.mixtures.over(names),
        "own_experts": own_experts(names, experts) if config.offsets == "expert" else None,
    }
    parts = cache.split(config.held_out_fraction, seed=recipe.seed)
    return OpenScores(cache.changed(ScoredSequences.without_tokens), *parts, problem)


def check_samples(config: GatingConfig, *, scored: bool, direct: bool | None = None) -> None:
    """Refuse what learns from samples of the experts where none are scored.

    Raises:
        ConfigError: the gate itself (`direct` None), where it sees whole sequences; or its distillation, unless a
            causal gate is trained on the objective itself (direct) without a dense student.
    """
    if scored:
        return
    if direct is None and not gates[config.gate.gate].causal:
        raise ConfigError(
            f"gate {config.gate.gate!r} sees whole sequences and needs samples of the experts for Z; score some "
            "(gating.scores.samples), or take a causal gate"
        )
    if direct is False or (direct and config.students.dense is not None):
        raise ConfigError(
            "distillation learns from samples of the experts and none are scored; score some (gating.scores.samples), "
            "or train the causal gate on the objective itself (weftlm gate distil --direct) without a dense student"
        )


def own_experts(domains: Sequence[str], experts: Sequence[str]) -> list[int]:
    """The place of each domain's own expert, which offsets `expert` are taken of.

    Raises:
        ConfigError: a domain has none.
    """
    without = [name for name in domains if folder_name(name) not in experts]
    if without:
        raise ConfigError(
            f"gating.offsets is 'expert' and {', '.join(without)} has no expert of its own among those scored; take "
            "offsets 'none' or numbers, or leave the domain out (gating.domains)"
        )
    return [list(experts).index(folder_name(name)) for name in domains]
