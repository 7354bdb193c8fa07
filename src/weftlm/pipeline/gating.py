"""From a library of experts to their scores, and on to a robust gate and its certificate.

<run>/scores/              the score cache (`weftlm.gating.scores`)
<run>/gate/                gate.safetensors, fit.json, certificate.json; during a fit state.safetensors too
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from weftlm.artifact import Artifact
from weftlm.config import differences, settings
from weftlm.corpora.labels import folder_name
from weftlm.corpora.source import Source
from weftlm.errors import CheckpointError, ConfigError, DataError
from weftlm.evaluation.result import finite_or_none
from weftlm.experts.library import ExpertLibrary
from weftlm.files import remove, write_object
from weftlm.gating.certificate import Certificate, certify
from weftlm.gating.config import ExpertSource, FitConfig, gates
from weftlm.gating.experts import ExpertPool
from weftlm.gating.gate import Gate, load_gate, save_gate
from weftlm.gating.primal_dual import FitResult, FitState, Progress, fit_robust_gate
from weftlm.gating.scores import ScoreCache, ScoreSplit, score
from weftlm.gating.sequences import ScoredSequences
from weftlm.gating.state import GateState
from weftlm.pipeline.experts import process_group
from weftlm.pipeline.names import CERTIFICATE, FIT, GATE, STATE
from weftlm.pipeline.prepare import prepare
from weftlm.pipeline.prepared import PreparedData
from weftlm.pipeline.recipe import Recipe
from weftlm.pipeline.run_folder import alone
from weftlm.pipeline.stages.gate import GatingConfig, check_domains
from weftlm.pipeline.train import require_same_data
from weftlm.progress import Pace, weights_text, write_line
from weftlm.training.runtime import choose_runtime

log = logging.getLogger(__name__)
Result = TypeVar("Result")


# -- scoring ------------------------------------------------------------------------------------------------------


def score_experts(
    recipe: Recipe, *, overwrite: bool = False, executor: Executor | None = None, progress: bool = True
) -> dict[str, Any]:
    """Score the domains' held-out text, and samples of each expert, under every expert of the recipe's library.

    What an interrupted run has scored is not scored again. Started by torchrun, the ranks share the work; an executor
    takes a task per shard, and its workers must see the library and the base. With `overwrite` scores of other experts,
    text or settings are discarded.

    Returns:
        `score_summary` of the cache.
    """
    config, section = recipe.gating_settings, recipe.expert_settings
    group = process_group(recipe)
    first = group is None or bool(group.is_main_process)
    progress = progress and first
    with alone(recipe.run) if first else nullcontext():
        with nullcontext() if group is None else group.main_process_first():
            data = prepare(recipe.data, recipe.prepared_folder, progress=progress)
        texts = held_out_texts(data, config)
        device = choose_runtime(section.training, parameters=0).device if group is None else group.device
        cache = score(
            open_pool(recipe, data, device=device) if executor is None else pool_sources(recipe),
            texts, recipe.scores_folder, config.scores,
            eos_id=data.tokenizer.eos_id, executor=executor, dtype=section.dtype, overwrite=overwrite, tokens=False,
            show=progress,
        )  # fmt: skip
        return score_summary(cache)


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
    recipe: Recipe, data: PreparedData, names: Sequence[str] | None = None, *, device: torch.device | str = "cpu"
) -> ExpertPool:
    """Experts of a recipe's gate in memory, all or those of these names in their order.

    Raises:
        DataError: an expert is gone, the data was tokenised with another tokenizer than the experts', or the run's own
            model was trained on other data.
        ConfigError, ExpertError: as `ExpertPool.load`.
    """
    if recipe.gating_settings.pool is None and recipe.expert_settings.base is None:
        require_same_data(recipe.base_run, data)
    sources = {source.name: source for source in pool_sources(recipe)}
    names = list(sources) if names is None else names
    if missing := [name for name in names if name not in sources]:
        raise DataError(f"{', '.join(missing)}: scored, and not among the experts any more; score again")
    pool = ExpertPool.load([sources[name] for name in names], dtype=recipe.expert_settings.dtype, device=device)
    if pool.tokenizer is None:
        log.warning("the experts bring no tokenizer to compare; make sure that the data was tokenised for them")
    elif pool.tokenizer != data.tokenizer.vocabulary_fingerprint:
        raise DataError(
            "the data was tokenised with another tokenizer than the experts'; prepare it with data.tokenizer: "
            "{pretrained: one of the experts}, in a folder of its own (prepared)"
        )
    return pool


def held_out_texts(data: PreparedData, config: GatingConfig) -> dict[str, Source]:
    """The text that is scored, by domain: held out, so that no expert was trained on it.

    Raises:
        ConfigError: there is none, or of a domain that was asked for.
    """
    every = {domain.name: domain.heldout for domain in data.domains}
    held = {name: text for name, text in every.items() if text is not None}
    if not held:
        raise ConfigError("nothing is held out to score; raise data.split.fraction, or give data.heldout")
    wanted = list(every) if config.domains is None else config.domains
    check_domains(wanted, list(every), "gating.domains")
    missing = [name for name in wanted if name not in held]
    if missing:
        raise ConfigError(
            f"no held-out text of {', '.join(missing)}, so that no gate can be made good for it; raise "
            "data.split.fraction, give data.heldout, or name the other domains in gating.domains"
        )
    return {name: held[name] for name in wanted}


def score_summary(cache: ScoreCache) -> dict[str, Any]:
    """What a score cache holds, as JSON.

    Returns:
        folder, fingerprint, length, experts; by domain: sequences, tokens, and each expert's mean nats per token
        (None where a token is impossible under it); by expert: sequences and tokens of its samples.
    """

    def nats(text: ScoredSequences) -> dict[str, float | None]:
        means_E = -text.logq_NE.sum(dim=0) / _tokens(text)
        return {name: finite_or_none(float(mean)) for name, mean in zip(cache.experts, means_E, strict=True)}

    def sizes(text: ScoredSequences) -> dict[str, Any]:
        return {"sequences": len(text), "tokens": _tokens(text)}

    return {
        "folder": str(cache.folder),
        "fingerprint": cache.fingerprint,
        "length": cache.config.length,
        "experts": list(cache.experts),
        "domains": {name: {**sizes(text), "nats_per_token": nats(text)} for name, text in cache.domains.items()},
        "samples": {name: sizes(text) for name, text in cache.samples.items()},
    }


def _tokens(text: ScoredSequences) -> int:
    assert text.tokens_N is not None
    return int(text.tokens_N.sum())


@dataclass(frozen=True, eq=False)
class OpenScores:
    """A score cache as a recipe's gate sees it.

    Attributes:
        cache: The scores, without those of single tokens.
        split: Sequences to fit on and held-out ones.
        problem: Offsets, mixtures and own experts, as `fit_robust_gate` and `certify` take them.
    """

    cache: ScoreCache
    split: ScoreSplit
    problem: Mapping[str, Any]


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
    split = cache.split(config.held_out_fraction, seed=recipe.seed)
    return OpenScores(cache.without_tokens(), split, problem)


def check_samples(config: GatingConfig, *, scored: bool) -> None:
    """Refuse a gate that sees whole sequences where no samples of the experts are scored.

    Raises:
        ConfigError: the recipe's gate is one.
    """
    if not scored and not gates[config.gate.gate].causal:
        raise ConfigError(
            f"gate {config.gate.gate!r} sees whole sequences and needs samples of the experts for Z; score some "
            "(gating.scores.samples), or take a causal gate"
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


# -- work that resumes --------------------------------------------------------------------------------------------


def kept(artifact: Artifact) -> dict[str, Any] | None:
    """The facts of a finished result; None where there is none of this identity, or it is damaged."""
    try:
        return artifact.reuse()
    except DataError as error:
        log.warning("%s; it is made again", error)
        return None


def resume_or_begin(artifact: Artifact, states: Path) -> None:
    """Begin work of an identity, and discard the states of interrupted work unless that has the same identity.

    Args:
        artifact: The result that is wanted.
        states: File or folder of the states.
    """
    try:
        if artifact.resume():
            return
    except DataError as error:
        log.warning("%s; it begins again", error)
    remove(states)
    artifact.begin()


def resumed(
    path: Path, kind: type[GateState], steps: int, work: Callable[..., Result], line: Callable[[Any], str] | None
) -> Result:
    """The result of work on a gate, resumed from its state, which is kept at every report and at an interruption.

    Args:
        path: File of the state.
        kind: Type of the state.
        steps: Steps of the whole work.
        work: Function of `state`, `on_progress` and `on_stop`, such as `fit_robust_gate`.
        line: Text of a report on stderr; None: none is written.
    """
    state: GateState | None = None
    try:
        state = kind.load(path) if path.exists() else None
    except CheckpointError as error:
        log.warning("%s; it begins again", error)
    pace = Pace(0 if state is None else state.step)

    def report(measured: Any, now: GateState) -> None:
        now.save(path)
        if line is not None:
            left = "stops here" if now.finished else pace.eta(now.step, steps)
            write_line(f"{line(measured)}  {left}")

    path.parent.mkdir(parents=True, exist_ok=True)
    return work(state=state, on_progress=report, on_stop=lambda now: now.save(path))


# -- fitting ------------------------------------------------------------------------------------------------------


def fit_gate(recipe: Recipe, *, progress: bool = True) -> dict[str, Any]:
    """Fit the gate that is best against the worst mixture of the scored domains; no expert is run.

    A fit that is there already, of the same scores and settings, is kept; an interrupted one goes on from its last
    report; one of other scores or settings is replaced once the new one is done.

    Returns:
        What fit.json holds: identity and `fit_facts`.
    """
    with alone(recipe.run):
        config, scores = recipe.gating_settings, open_scores(recipe)
        folder, artifact = recipe.gate_folder, fit_artifact(recipe, scores.cache)
        if (found := kept(artifact)) is not None:
            return found
        resume_or_begin(artifact, folder / STATE)
        result = run_fit(scores, config.gate, config.fit, folder / STATE, progress=progress)
        for name in (FIT, CERTIFICATE):
            (folder / name).unlink(missing_ok=True)
        save_gate(result.gate, folder / GATE)
        made = artifact.finish(fit_facts(result, scores), [GATE])
        (folder / STATE).unlink(missing_ok=True)
        return made


def run_fit(scores: OpenScores, gate: Any, config: FitConfig, state: Path, *, progress: bool) -> FitResult:
    """Fit a gate to scores, resuming from the state in a file."""
    split, domains = scores.split, list(scores.cache.domains)

    def line(now: Progress) -> str:
        gap = f"adversary's gap {now.gap:.4f}" if now.duality_gap is None else f"duality gap {now.duality_gap:.4f}"
        mixture = weights_text(dict(zip(domains, now.lam, strict=True)), 3)
        worst = f"worst {now.worst_domain} {now.worst:.4f} nats/{config.unit}"
        return f"fit {now.step}/{config.steps}  {worst}  {gap}  Z {now.z:.4f}  lambda {mixture}"

    fit = partial(fit_robust_gate, split.domains, split.samples or None, gate=gate, config=config, **scores.problem)
    return resumed(state, FitState, config.steps, fit, line if progress else None)


def fit_artifact(recipe: Recipe, cache: ScoreCache) -> Artifact:
    """The fitted gate of a run, decided by the scores, the seed of the split, the gate and its settings."""
    without = ("scores", "experts", "pool", "domains", "students")
    identity = {
        "scores": cache.fingerprint, "seed": recipe.seed, "gating": settings(recipe.gating_settings, without=without)
    }  # fmt: skip
    return Artifact(recipe.gate_folder / FIT, identity, "fit it again (weftlm gate fit) after deleting fit.json")


def fit_facts(result: FitResult, scores: OpenScores) -> dict[str, Any]:
    """A fit as JSON; nats of `unit`, measured on the sequences of the fit.

    Returns:
        scores (fingerprint), experts, gate (section), unit, length (of the windows), steps (taken), stopped_early
        (`FitState.finished`), worst, worst_domain, gap (None where it was not asked for), gap_kind, z, mu,
        nu; by domain: sequences, value, lam; history, a list of `Progress`.
    """
    state, domains = result.state, scores.split.domains
    values = zip(domains.items(), result.values.tolist(), result.lam.tolist(), strict=True)
    return {
        "scores": scores.cache.fingerprint,
        "experts": list(scores.cache.experts),
        "gate": result.gate.config.model_dump(mode="json"),
        "unit": result.unit,
        "length": scores.cache.config.length,
        "steps": state.step,
        "stopped_early": state.finished and state.step < state.config.steps,
        "worst": float(result.worst),
        "worst_domain": list(domains)[result.worst_domain],
        "gap": finite_or_none(float(result.gap)),
        "gap_kind": result.gap_kind,
        "z": float(result.z),
        "mu": float(result.mu),
        "nu": result.nu.tolist(),
        "domains": {name: {"sequences": len(text), "value": value, "lam": lam} for (name, text), value, lam in values},
        "history": [dataclasses.asdict(line) for line in result.history],
    }


# -- certifying ---------------------------------------------------------------------------------------------------


def certify_gate(recipe: Recipe) -> Certificate:
    """Measure the fitted gate on the sequences that were held out, and write its certificate.

    Raises:
        ConfigError: as `fit_gate`.
        DataError: there is no gate, or it was fitted on other scores or with other settings than the recipe's.
        CheckpointError: the gate's file is torn.
    """
    with alone(recipe.run):
        config, scores = recipe.gating_settings.fit, open_scores(recipe)
        gate, facts = open_gate(recipe, scores)
        held, samples = scores.split.held_domains, scores.split.held_samples or None
        measured = certify(gate, held, samples, nu=facts["nu"], unit=config.unit, config=config, **scores.problem)
        found = dataclasses.replace(measured, length=scores.cache.config.length)
        write_object(recipe.gate_folder / CERTIFICATE, found.to_json(), nan=False)
        return found


def open_gate(recipe: Recipe, scores: OpenScores) -> tuple[Gate, dict[str, Any]]:
    """The fitted gate and its facts (`fit_facts`).

    Raises:
        DataError: there is no gate, or it was fitted on other scores or with other settings than the recipe's.
        CheckpointError: the gate's file is torn.
    """
    folder, artifact = recipe.gate_folder, fit_artifact(recipe, scores.cache)
    facts = artifact.reuse()
    if facts is None and artifact.record.exists():
        raise DataError(
            f"the gate in {folder} is of something else ({artifact.changed()}); fit it again (weftlm gate fit)"
        )
    if facts is None:
        raise DataError(f"{folder} holds no fitted gate; fit one first (weftlm gate fit)")
    return load_gate(folder / GATE), facts
