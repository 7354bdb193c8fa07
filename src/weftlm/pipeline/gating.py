"""From a library of experts to their scores, and on to a robust gate and its certificate.

<run>/scores/              the score cache (`weftlm.gating.scores`)
<run>/gate/                gate.safetensors, fit.json, certificate.json, report.html; while a fit is under way also
                               plan.json, of what, and state.safetensors, to continue from
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from accelerate import PartialState

from weftlm.artifact import Artifact
from weftlm.config import changed_keys, settings
from weftlm.corpora.labels import folder_name
from weftlm.corpora.source import Source
from weftlm.corpora.tokens import Tokenizer
from weftlm.errors import CheckpointError, ConfigError, DataError
from weftlm.evaluation.result import finite_or_none
from weftlm.experts.library import ExpertLibrary
from weftlm.files import checksum, read_object, write_object
from weftlm.gating.certificate import Certificate, certify
from weftlm.gating.config import ExpertSource, FitConfig, gates
from weftlm.gating.experts import ExpertPool
from weftlm.gating.gate import Gate, load_gate, save_gate
from weftlm.gating.primal_dual import FitResult, FitState, Progress, fit_robust_gate
from weftlm.gating.scores import ScoreCache, ScoreSplit, score
from weftlm.gating.sequences import ScoredSequences
from weftlm.pipeline.base import open_base
from weftlm.pipeline.experts import process_group
from weftlm.pipeline.gate_recipe import GatingConfig, check_domains
from weftlm.pipeline.names import CERTIFICATE, FIT, GATE, PAGE, STATE
from weftlm.pipeline.prepare import prepare
from weftlm.pipeline.prepared import PreparedData
from weftlm.pipeline.recipe import Recipe
from weftlm.pipeline.report import write_gate_page
from weftlm.pipeline.run_folder import alone
from weftlm.progress import Pace, weights_text, write_line
from weftlm.training.runtime import choose_runtime

log = logging.getLogger(__name__)
FoundState = TypeVar("FoundState")
"""Key of fit.json with the digest of the gate."""


# -- scoring ------------------------------------------------------------------------------------------------------


def score_experts(
    recipe: Recipe,
    *,
    overwrite: bool = False,
    executor: Executor | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Score the domains' held-out text, and samples of each expert, under every expert of the recipe's library.

    What an interrupted run has scored is not scored again. Started by torchrun, the ranks share the work.

    Args:
        recipe: Recipe of the experts.
        overwrite: Whether to discard scores of other experts, text or settings.
        executor: Executor of one task per shard, whose workers must see the library and the base. None: in this
            process, or in those of torchrun.
        progress: Whether to show progress on stderr.
    Returns:
        `score_summary` of the cache.
    Raises:
        ConfigError: no text is held out, or settings do not fit the experts.
        DataError, ExpertError, NumericsError, CheckpointError: as `prepare`, `open_base`, `ExpertPool` and `score`.
    """
    config = recipe.gating_settings
    group = process_group(recipe)
    first = group is None or bool(group.is_main_process)
    progress = progress and first
    with alone(recipe.run) if first else nullcontext():
        with nullcontext() if group is None else group.main_process_first():
            data = prepare(recipe.data, recipe.prepared_folder, progress=progress)
        texts = held_out_texts(data, config)
        experts = pool_sources(recipe) if executor is not None else _open_pool(recipe, data, group)
        cache = score(
            experts,
            texts,
            recipe.scores_folder,
            config.scores,
            eos_id=data.tokenizer.eos_id,
            executor=executor,
            dtype=recipe.expert_settings.dtype,
            overwrite=overwrite,
            tokens=False,
            show=progress,
        )
        return score_summary(cache)


def _open_pool(recipe: Recipe, data: PreparedData, group: PartialState | None) -> ExpertPool:
    """The experts of a recipe's gate, on the device of this process."""
    section = recipe.expert_settings
    device = choose_runtime(section.training, parameters=0).device if group is None else group.device
    pool = recipe.gating_settings.pool
    if pool is None:
        return ExpertPool.load(pool_sources(recipe), base=open_base(recipe, data).model, device=device)
    opened = ExpertPool.load(pool, dtype=section.dtype, device=device)
    check_tokenizer(opened, data.tokenizer)
    return opened


def pool_sources(recipe: Recipe) -> list[ExpertSource]:
    """Where the experts of a recipe's gate can be loaded from, by any process that sees the same folders.

    Raises:
        ExpertError: there is no library.
    """
    config = recipe.gating_settings
    if config.pool is not None:
        return list(config.pool)
    library = ExpertLibrary.open(recipe.library_folder)
    place = str(library.folder.resolve())
    names = config.experts if config.experts is not None else library.names
    return [ExpertSource(name=name, library=place, expert=name) for name in names]


def check_tokenizer(pool: ExpertPool, tokenizer: Tokenizer) -> None:
    """Refuse experts of another tokenizer than the data's: token ids would mean other text.

    Raises:
        DataError: they are.
    """
    if pool.tokenizer is None:
        log.warning("the experts bring no tokenizer to compare; make sure that the data was tokenised for them")
    elif pool.tokenizer != tokenizer.vocabulary_fingerprint:
        raise DataError(
            "the data was tokenised with another tokenizer than the experts'; prepare it with data.tokenizer: "
            "{pretrained: one of the experts}, in a folder of its own (prepared)"
        )


def held_out_texts(data: PreparedData, config: GatingConfig) -> dict[str, Source]:
    """The text that is scored, by domain: held out, so that no expert was trained on it.

    Raises:
        ConfigError: there is none, or of a domain that was asked for.
    """
    held: dict[str, Source] = {domain.name: domain.heldout for domain in data.domains if domain.heldout is not None}
    if not held:
        raise ConfigError("nothing is held out to score; raise data.split.fraction, or give data.heldout")
    every = [domain.name for domain in data.domains]
    if config.domains is not None:
        check_domains(config.domains, every, "gating.domains")
    wanted = every if config.domains is None else config.domains
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
    domains = {}
    for name, text in cache.domains.items():
        tokens = token_count(text)
        means_E = -text.logq_NE.sum(dim=0) / tokens
        domains[name] = {
            "sequences": len(text),
            "tokens": tokens,
            "nats_per_token": {
                expert: finite_or_none(float(mean)) for expert, mean in zip(cache.experts, means_E, strict=True)
            },
        }
    return {
        "folder": str(cache.folder),
        "fingerprint": cache.fingerprint,
        "length": cache.config.length,
        "experts": list(cache.experts),
        "domains": domains,
        "samples": {
            name: {"sequences": len(text), "tokens": token_count(text)} for name, text in cache.samples.items()
        },
    }


def token_count(text: ScoredSequences) -> int:
    """Scored tokens of a set of a score cache."""
    assert text.tokens_N is not None
    return int(text.tokens_N.sum())


# -- fitting ------------------------------------------------------------------------------------------------------


def fit_gate(recipe: Recipe, *, progress: bool = True) -> dict[str, Any]:
    """Fit the gate that is best against the worst mixture of the scored domains; no expert is run.

    A fit that is there already, of the same scores and settings, is kept; an interrupted one goes on from its last
    report; one of other scores or settings is replaced once the new one is done.

    Args:
        recipe: Recipe of the experts and the gate.
        progress: Whether to show the fit's history on stderr.
    Returns:
        What fit.json holds: identity, problem (`problem_identity`) and `fit_facts`.
    Raises:
        ConfigError: the gate, the offsets or the mixtures do not fit what was scored.
        DataError: nothing is scored yet, or a set is too small to be split.
        NumericsError: a loss stops being finite.
        CheckpointError: the gate cannot be written.
    """
    with alone(recipe.run):
        config = recipe.gating_settings
        scores = open_scores(recipe)
        folder, artifact = recipe.gate_folder, fit_artifact(recipe, scores.cache)
        found = kept(artifact)
        if found is not None:
            return found
        state = unfinished_state(artifact, folder / STATE, FitState.load)
        if state is None:
            (folder / STATE).unlink(missing_ok=True)
            artifact.begin()
        result = fit_robust_gate(
            scores.split.domains,
            scores.split.samples or None,
            gate=config.gate,
            config=config.fit,
            state=state,
            on_progress=fit_reporter(scores.names, config.fit, state, folder / STATE, enabled=progress),
            on_stop=lambda now: now.save(folder / STATE),
            **scores.problem,
        )
        facts = {"problem": problem_identity(recipe, scores.cache), **fit_facts(result, scores)}
        for name in (FIT, CERTIFICATE, PAGE):
            (folder / name).unlink(missing_ok=True)
        save_gate(result.gate, folder / GATE)
        made = artifact.finish(facts, [GATE])
        (folder / STATE).unlink(missing_ok=True)
        return made


def fit_artifact(recipe: Recipe, cache: ScoreCache) -> Artifact:
    """The fitted gate of a run, decided by the scores, the seed of the split, the gate and its settings."""
    without = ("scores", "experts", "pool", "domains", "students")
    identity = {
        "scores": cache.fingerprint, "seed": recipe.seed, "gating": settings(recipe.gating_settings, without=without)
    }  # fmt: skip
    return Artifact(recipe.gate_folder / FIT, identity, "fit it again (weftlm gate fit) after deleting fit.json")


def problem_identity(recipe: Recipe, cache: ScoreCache) -> str:
    """Hash of what decides on which sequences, and relative to what, a model is measured: whatever the gate."""
    config = recipe.gating_settings
    value = config.model_dump(mode="json", include={"offsets", "mixtures", "held_out_fraction"})
    return checksum([cache.fingerprint, recipe.seed, value, config.fit.unit])


def kept(artifact: Artifact) -> dict[str, Any] | None:
    """The facts of a finished result; None where there is none of this identity, or it is damaged."""
    try:
        return artifact.reuse()
    except DataError as error:
        log.warning("%s; it is made again", error)
        return None


def unfinished_state(artifact: Artifact, state: Path, load: Callable[[Path], FoundState]) -> FoundState | None:
    """The state from which interrupted work resumes; None where there is none of this identity, or it is damaged.

    Args:
        artifact: The result that is wanted.
        state: The file.
        load: Reads it.
    """
    try:
        if artifact.resume() and state.exists():
            return load(state)
    except (DataError, CheckpointError) as error:
        log.warning("%s; it begins again", error)
    return None


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

    @property
    def names(self) -> tuple[str, ...]:
        """Of the domains."""
        return tuple(self.cache.domains)


def open_scores(recipe: Recipe, *, causal: bool | None = None) -> OpenScores:
    """Open a run's scores and put together what the recipe asks of a gate over them.

    Args:
        recipe: Recipe of the experts and the gate.
        causal: Whether gates over them will be causal, which need scores of tokens; None: as the recipe's gate is.
    Raises:
        ConfigError: a gate that sees whole sequences and no samples, a domain without an expert of its own where the
            offsets need one, or a domain that is named and was not scored.
        DataError: nothing is scored yet, or with other settings than the recipe's.
    """
    config = recipe.gating_settings
    causal = gates[config.gate.gate].causal if causal is None else causal
    cache = ScoreCache.open(recipe.scores_folder, tokens=causal)
    asked = config.scores.model_dump(mode="json")
    changed = changed_keys(cache.config.model_dump(mode="json"), asked, "gating.scores")
    wanted = config.experts if config.pool is None else [source.name for source in config.pool]
    if wanted is not None and list(cache.experts) != wanted:
        key = "gating.experts" if config.pool is None else "gating.pool"
        changed.append(f"{key}: {', '.join(cache.experts)} before, {', '.join(wanted)} now")
    if config.domains is not None and list(cache.domains) != config.domains:
        changed.append(f"gating.domains: {', '.join(cache.domains)} before, {', '.join(config.domains)} now")
    if changed:
        raise DataError(
            f"the scores in {cache.folder} were made with other settings ({'; '.join(changed)}); score again (weftlm "
            "score --overwrite)"
        )
    names = list(cache.domains)
    if not causal:
        check_samples(config, scored=bool(cache.samples))
    problem: dict[str, Any] = {
        "offsets": config.offsets_over(names),
        "mixtures": config.mixtures.over(names),
        "own_experts": None,
    }
    if config.offsets == "expert":
        problem["own_experts"] = own_experts(names, cache.experts)
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
    places = {name: place for place, name in enumerate(experts)}
    alone = [name for name in domains if folder_name(name) not in places]
    if alone:
        raise ConfigError(
            f"gating.offsets is 'expert' and {', '.join(alone)} has no expert of its own among those scored; take "
            "offsets 'none' or numbers, or leave the domain out (gating.domains)"
        )
    return [places[folder_name(name)] for name in domains]


def fit_facts(result: FitResult, scores: OpenScores) -> dict[str, Any]:
    """A fit as JSON; nats of `unit`, measured on the sequences of the fit.

    Returns:
        scores (fingerprint), experts, gate (section), unit, length (of the windows), steps (taken), stopped_early
        (`FitState.finished`), worst, worst_domain, gap (None where it was not asked for),
        gap_kind, z, mu, nu; by domain: sequences, value, lam;
        history, a list of `Progress`.
    """
    names = scores.names
    return {
        "scores": scores.cache.fingerprint,
        "experts": list(scores.cache.experts),
        "gate": result.gate.config.model_dump(mode="json"),
        "unit": result.unit,
        "length": scores.cache.config.length,
        "steps": result.state.step,
        "stopped_early": result.state.finished and result.state.step < result.state.config.steps,
        "worst": float(result.worst),
        "worst_domain": names[result.worst_domain],
        "gap": finite_or_none(float(result.gap)),
        "gap_kind": result.gap_kind,
        "z": float(result.z),
        "mu": float(result.mu),
        "nu": result.nu.tolist(),
        "domains": {
            name: {
                "sequences": len(scores.split.domains[name]),
                "value": float(result.values[place]),
                "lam": float(result.lam[place]),
            }
            for place, name in enumerate(names)
        },
        "history": [dataclasses.asdict(line) for line in result.history],
    }


def fit_reporter(
    domains: Sequence[str], config: FitConfig, state: FitState | None, save: Path, *, enabled: bool
) -> Callable[[Progress, FitState], None]:
    """What keeps each state of a fit and shows a line of its history on stderr.

    Args:
        domains: Names of the domains.
        config: Settings of the fit.
        state: State from which the fit resumes; None: its beginning.
        save: File of the states.
        enabled: Whether to show lines.
    """
    pace = Pace(0 if state is None else state.step)

    def report(line: Progress, now: FitState) -> None:
        now.save(save)
        if not enabled:
            return
        mixture = weights_text(dict(zip(domains, line.lam, strict=True)), 3)
        left = "stops here" if now.finished else pace.eta(line.step, config.steps)
        gap = f"adversary's gap {line.gap:.4f}" if line.duality_gap is None else f"duality gap {line.duality_gap:.4f}"
        write_line(
            f"fit {line.step}/{config.steps}  worst {line.worst_domain} {line.worst:.4f} nats/{config.unit}  {gap}  "
            f"Z {line.z:.4f}  {left}  lambda {mixture}"
        )

    return report


def read_facts(path: Path) -> dict[str, Any] | None:
    """A JSON file of a gate or its students; None where there is none.

    Raises:
        DataError: it is torn or holds something else.
    """
    return read_object(path, "delete it and run the command again")


# -- certifying ---------------------------------------------------------------------------------------------------


def certify_gate(recipe: Recipe) -> Certificate:
    """Measure the fitted gate on the sequences that were held out, and write its certificate and its page.

    Raises:
        ConfigError: as `fit_gate`.
        DataError: there is no gate, or it was fitted on other scores or with other settings than the recipe's.
        CheckpointError: the gate's file is torn.
    """
    with alone(recipe.run):
        config = recipe.gating_settings
        scores = open_scores(recipe)
        folder = recipe.gate_folder
        gate, facts = open_gate(recipe, scores)
        measured = certify(
            gate,
            scores.split.held_domains,
            scores.split.held_samples or None,
            nu=facts["nu"],
            unit=config.fit.unit,
            config=config.fit,
            **scores.problem,
        )
        found = dataclasses.replace(measured, length=scores.cache.config.length)
        write_object(folder / CERTIFICATE, found.to_json(), nan=False)
        write_gate_page(recipe.run)
        return found


def open_gate(recipe: Recipe, scores: OpenScores) -> tuple[Gate, dict[str, Any]]:
    """The fitted gate and its facts (`fit_facts`).

    Raises:
        DataError: there is no gate, or it was fitted on other scores or with other settings than the recipe's.
        CheckpointError: the gate's file is torn.
    """
    folder = recipe.gate_folder
    artifact = fit_artifact(recipe, scores.cache)
    if not artifact.record.exists():
        raise DataError(f"{folder} holds no fitted gate; fit one first (weftlm gate fit)")
    if (changed := artifact.changed()) is not None:
        raise DataError(f"the gate in {folder} is of something else ({changed}); fit it again (weftlm gate fit)")
    facts = artifact.reuse()
    assert facts is not None
    return load_gate(folder / GATE), facts
