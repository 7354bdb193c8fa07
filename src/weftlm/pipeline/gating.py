"""From scores to a robust gate, its certificate, and students of it that can be served.

<run>/gate/                 gate.safetensors, fit.json, certificate.json; during a fit state.safetensors too
<run>/students/             student.json and direct.json: what was made, and how good each is on held-out sequences
<run>/students/NAME/        a model `from_pretrained` loads: student, student-top-1, direct, direct-top-2, dense, ...
<run>/students/.making-*/   while work is under way: states to resume from
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from weftlm.artifact import Artifact
from weftlm.config import settings
from weftlm.corpora.tokens import Tokenizer
from weftlm.distillation.dense import DenseProgress, WeightedText, distil_dense
from weftlm.distillation.sparse import log_served
from weftlm.distillation.structural import (
    DistilProgress,
    DistilState,
    distil_structural,
    model_kl,
    student_kl,
    weigh,
)
from weftlm.errors import CheckpointError, DataError
from weftlm.evaluation.result import finite_or_none
from weftlm.files import read_object, remove, whole_folder, write_object
from weftlm.gating.certificate import Certificate, certify
from weftlm.gating.config import FitConfig
from weftlm.gating.gate import CausalGate, Gate, init_gate, load_gate, save_gate
from weftlm.gating.modular_lm import ModularLM
from weftlm.gating.prefix_gate import PrefixGate
from weftlm.gating.primal_dual import FitResult, FitState, Progress, fit_robust_gate
from weftlm.gating.problem import Evaluation, Problem, evaluate, measure
from weftlm.gating.sequences import ScoredSequences
from weftlm.gating.state import GateState
from weftlm.models.hf import token_losses
from weftlm.models.open import check_written, probe_logits
from weftlm.pipeline.names import CERTIFICATE, DENSE, DIRECT, FIT, GATE, STATE, STUDENT
from weftlm.pipeline.prepared import PreparedData
from weftlm.pipeline.recipe import Recipe
from weftlm.pipeline.run_folder import alone
from weftlm.pipeline.scoring import OpenScores, check_samples, open_scores, scored_pool
from weftlm.progress import Pace, weights_text, write_line
from weftlm.training.runtime import choose_runtime

log = logging.getLogger(__name__)
Result = TypeVar("Result")

BASELINES: Mapping[str, Mapping[str, Any]] = {
    "uniform": {"gate": "fixed_share", "share": 1.0},
    "bayes": {"gate": "bayes"},
    "fixed share": {"gate": "fixed_share"},
}
"""Causal gates that need no training, by the name a table gives them."""
_CURE = "delete it and run the command again"
_STOPPING = 0.2
"""Part of the samples a dense student is not trained on, by which its best weights are chosen."""
_BATCH = 32


# -- work that resumes --------------------------------------------------------------------------------------------


def finished(artifact: Artifact, states: Path) -> dict[str, Any] | None:
    """The facts of a finished result; None where its work begins now, or goes on from its states.

    What is damaged is made again. `states`, a file or folder, is removed where it is of work of another identity.
    """
    try:
        if (facts := artifact.reuse()) is not None:
            return facts
        goes_on = artifact.resume()
    except DataError as error:
        log.warning("%s; it is made again", error)
        goes_on = False
    if not goes_on:
        remove(states)
        artifact.begin()
    return None


def resumed(
    path: Path, kind: type[GateState], steps: int, work: Callable[..., Result], line: Callable[[Any], str] | None
) -> Result:
    """The result of work on a gate, resumed from its state, which is kept at every report and at an interruption.

    Args:
        path, kind: File of the state, and its type.
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


# -- the gate -----------------------------------------------------------------------------------------------------


def fit_gate(recipe: Recipe, *, progress: bool = True) -> dict[str, Any]:
    """Fit the gate that is best against the worst mixture of the scored domains; no expert is run.

    A fit that is there already, of the same scores and settings, is kept; an interrupted one goes on from its last
    report; one of other scores or settings is replaced once the new one is done.

    Returns:
        What fit.json holds: identity, scores (fingerprint), experts, gate (section), unit, length (of the windows),
        steps (taken), stopped_early (`FitState.finished`), worst, worst_domain, gap (None where it was not asked for),
        gap_kind, z, mu, nu; by domain: sequences, value, lam; history, a list of `Progress`. Nats of `unit`, measured
        on the sequences of the fit.
    """
    with alone(recipe.run):
        config, scores, folder = recipe.gating_settings, open_scores(recipe), recipe.gate_folder
        artifact = _fit_artifact(recipe, scores)
        if (known := finished(artifact, folder / STATE)) is not None:
            return known
        result = _fitted(scores, config.gate, config.fit, folder / STATE, progress)
        state, names = result.state, list(scores.fit.domains)
        sizes, values, lam = map(len, scores.fit.domains.values()), result.values.tolist(), result.lam.tolist()
        facts = {
            **scores.facts,
            "gate": result.gate.config.model_dump(mode="json"),
            "unit": result.unit,
            "steps": state.step,
            "stopped_early": state.finished and state.step < state.config.steps,
            "worst": float(result.worst),
            "worst_domain": names[result.worst_domain],
            "gap": finite_or_none(float(result.gap)),
            "gap_kind": result.gap_kind,
            "z": float(result.z),
            "mu": float(result.mu),
            "nu": result.nu.tolist(),
            "domains": {
                name: dict(zip(("sequences", "value", "lam"), row, strict=True))
                for name, *row in zip(names, sizes, values, lam, strict=True)
            },
            "history": [dataclasses.asdict(line) for line in result.history],
        }
        for name in (FIT, CERTIFICATE):
            (folder / name).unlink(missing_ok=True)
        save_gate(result.gate, folder / GATE)
        made = artifact.finish(facts, [GATE])
        (folder / STATE).unlink(missing_ok=True)
        return made


def certify_gate(recipe: Recipe) -> Certificate:
    """Measure the fitted gate on the sequences that were held out, and write its certificate.

    Raises:
        ConfigError: as `open_scores`.
        DataError: there is no gate, or it was fitted on other scores or with other settings than the recipe's.
        CheckpointError: the gate's file is torn.
    """
    with alone(recipe.run):
        config, scores = recipe.gating_settings.fit, open_scores(recipe)
        gate, facts = open_gate(recipe, scores)
        held, samples = scores.held.domains, scores.held.samples or None
        measured = certify(gate, held, samples, nu=facts["nu"], unit=config.unit, config=config, **scores.problem)
        found = dataclasses.replace(measured, length=scores.cache.config.length)
        write_object(recipe.gate_folder / CERTIFICATE, found.to_json(), nan=False)
        return found


def open_gate(recipe: Recipe, scores: OpenScores) -> tuple[Gate, dict[str, Any]]:
    """The fitted gate and what fit.json holds of it; errors as `certify_gate`."""
    folder, artifact = recipe.gate_folder, _fit_artifact(recipe, scores)
    facts = artifact.reuse()
    if facts is None and artifact.record.exists():
        raise DataError(
            f"the gate in {folder} is of something else ({artifact.changed()}); fit it again (weftlm gate fit)"
        )
    if facts is None:
        raise DataError(f"{folder} holds no fitted gate; fit one first (weftlm gate fit)")
    return load_gate(folder / GATE), facts


def _fit_artifact(recipe: Recipe, scores: OpenScores) -> Artifact:
    """The fitted gate of a run, decided by the scores, the seed of the split, the gate and its settings."""
    without = ("scores", "experts", "pool", "domains", "students")
    section = settings(recipe.gating_settings, without=without)
    identity = {"scores": scores.cache.fingerprint, "seed": recipe.seed, "gating": section}
    return Artifact(recipe.gate_folder / FIT, identity, "fit it again (weftlm gate fit) after deleting fit.json")


def _fitted(scores: OpenScores, gate: Any, config: FitConfig, state: Path, progress: bool) -> FitResult:
    """A gate fitted to scores, resumed from the state in a file."""
    given, domains = scores.fit, list(scores.cache.domains)

    def line(now: Progress) -> str:
        gap = f"adversary's gap {now.gap:.4f}" if now.duality_gap is None else f"duality gap {now.duality_gap:.4f}"
        mixture = weights_text(dict(zip(domains, now.lam, strict=True)), 3)
        worst = f"worst {now.worst_domain} {now.worst:.4f} nats/{config.unit}"
        return f"fit {now.step}/{config.steps}  {worst}  {gap}  Z {now.z:.4f}  lambda {mixture}"

    fit = partial(fit_robust_gate, given.domains, given.samples or None, gate=gate, config=config, **scores.problem)
    return resumed(state, FitState, config.steps, fit, line if progress else None)


# -- its students -------------------------------------------------------------------------------------------------


def distil_gate(recipe: Recipe, *, direct: bool = False, progress: bool = True) -> dict[str, Any]:
    """Make what can be served of the fitted gate, or (direct) of a causal gate trained on the minimax objective itself.

    Students that are there already, of the same gate and settings, are kept; interrupted work goes on from its last
    report.

    Returns:
        What student.json or direct.json holds: identity, scores (fingerprint), experts, unit, length (of the windows),
        offsets, and rows by model: `table_row`, with role (baseline, gate, student), and kl, kl_error,
        experts_per_token and model (folder) where there are such.
    Raises:
        ConfigError: the recipe's settings do not fit what was scored, or samples are missing.
        DataError: nothing is scored or fitted yet, or experts have changed since they were scored.
    """
    with alone(recipe.run):
        config, kind = recipe.gating_settings, DIRECT if direct else STUDENT
        scores, folder = open_scores(recipe, causal=True), recipe.students_folder
        fitted = None if direct else open_gate(recipe, scores)[0]
        check_samples(config, scored=bool(scores.cache.samples), direct=direct)
        identity = {**_fit_artifact(recipe, scores).identity, "students": settings(config.students)}
        artifact, work = Artifact(folder / f"{kind}.json", identity, _CURE), folder / f".making-{kind}"
        if (known := finished(artifact, work)) is not None:
            return known
        data, every = PreparedData.load(recipe.prepared_folder), config.students.refresh_every
        pool, problem = scored_pool(recipe, data, scores.cache), scores.held_out(recipe)
        teacher, students = _causal_gates(recipe, scores, fitted, work, progress)
        rows = _rows(teacher, students, problem, every, robust=not direct)
        models: dict[str, PreTrainedModel] = {
            name: ModularLM(pool, gate, refresh_every=every) for name, gate in students.items()
        }
        if config.students.dense is not None:
            name, served = DENSE if kind == STUDENT else f"{kind}-{DENSE}", ModularLM(pool, students[kind])
            models[name] = dense = _dense(recipe, scores, teacher, served, data.tokenizer, work, progress)
            drawn_B = torch.cat([log_likelihoods(dense, one) for one in problem.samples])
            kl = _kl(model_kl(weigh(teacher, problem.samples), drawn_B))
            rows[name] = {**model_row(dense, problem), **kl, "role": "student"}
        artifact.record.unlink(missing_ok=True)
        for old in (kind, *(each.name for each in folder.glob(f"{kind}-*")), *([DENSE] if kind == STUDENT else [])):
            remove(folder / old)
        for name, model in models.items():
            with whole_folder(folder / name, "student") as making:
                model.save_pretrained(making)
                data.tokenizer.save(making)
                if not isinstance(model, ModularLM):  # of those a gate is written, which is digested like every file
                    check_written(making, probe_logits(model))
            rows[name]["model"] = str(folder / name)
        facts = {**scores.facts, "unit": config.fit.unit, "offsets": scores.problem["offsets"], "rows": rows}
        files = [path for name in models for path in sorted((folder / name).rglob("*")) if path.is_file()]
        found = artifact.finish(facts, [path.relative_to(folder).as_posix() for path in files])
        remove(work)
        return found


def student_folders(recipe: Recipe) -> list[Path]:
    """Folders of the students in a run folder, which may have been moved since they were made."""
    records = [read_object(recipe.students_folder / f"{kind}.json", _CURE) for kind in (STUDENT, DIRECT)]
    names = [name for found in records if found for name, row in found["rows"].items() if "model" in row]
    return [recipe.students_folder / name for name in names]


def _causal_gates(
    recipe: Recipe, scores: OpenScores, fitted: Gate | None, work: Path, progress: bool
) -> tuple[Gate, dict[str, CausalGate]]:
    """The teacher, and the causal gates made of it by name: over all experts, and over the best few per token.

    Where no gate was fitted the causal gate of the minimax objective is trained first, and is the teacher.
    """
    section, samples = recipe.gating_settings.students, tuple(scores.fit.samples.values())
    kind = DIRECT if fitted is None else STUDENT

    def distilled(name: str, teacher: Gate, start: Any) -> Any:
        def line(now: DistilProgress) -> str:
            kl = f"KL {now.kl:.4f} ± {now.error:.4f} nats/sequence"
            return f"distil {name} {now.step}/{section.distil.steps}  {kl}"

        distil, state = partial(distil_structural, teacher, samples, student=start), work / f"{name}.safetensors"
        made = partial(distil, config=section.distil)
        return resumed(state, DistilState, section.distil.steps, made, line if progress else None).gate

    if fitted is None:
        fit = section.direct.fit.model_copy(update={"unit": recipe.gating_settings.fit.unit})
        gate = fitted = _fitted(scores, section.direct.gate, fit, work / f"{kind}.safetensors", progress).gate
    else:
        gate = distilled(kind, fitted, fitted if isinstance(fitted, PrefixGate) else section.gate)
    assert isinstance(gate, PrefixGate)
    students: dict[str, CausalGate] = {kind: gate}
    for top in sorted({top for top in section.experts_per_token if top < gate.experts}):
        name, sparse = f"{kind}-top-{top}", gate.with_top(top)
        students[name] = distilled(name, fitted, sparse) if samples else sparse
    return fitted, students


def _dense(
    recipe: Recipe, scores: OpenScores, teacher: Gate, served: ModularLM, tokenizer: Tokenizer, work: Path, tell: bool
) -> PreTrainedModel:
    """The dense student of best cross-entropy on samples it was not trained on; `served` is for `token_kl`."""
    section, seed = recipe.gating_settings.students.dense, recipe.seed
    assert section is not None
    sets, domains = scores.fit.samples.values(), scores.fit.domains.values()
    cuts = [one.split_rows(_STOPPING, seed) for one in sets]

    def text(part: int) -> WeightedText:
        chosen = [one.rows(cut[part]) for one, cut in zip(sets, cuts, strict=True)]
        return WeightedText.sampled(weigh(teacher, chosen))

    real = None
    if section.real_fraction > 0.0:
        tokens = torch.cat([one.tokens_NT1 for one in domains if one.tokens_NT1 is not None])
        real = WeightedText.of(tokens, weights_N=torch.cat([one.probability() for one in domains]))
    pace, steps = Pace(), section.training.total_steps

    def report(line: DenseProgress) -> None:
        loss = "" if line.loss is None else f"  loss {line.loss:.4f}"
        left = pace.eta(line.step, steps)
        write_line(f"distil dense {line.step}/{steps}{loss}  cross-entropy {line.ce:.4f} nats/token  {left}")

    runtime = choose_runtime(section.training, parameters=0)
    served.pool.to(runtime.device)
    found = distil_dense(
        section.model, text(0), section,
        vocab_size=tokenizer.vocab_size, eos_id=tokenizer.eos_id, real=real, held_out=text(1),
        teacher=(lambda ids_BT: served(ids_BT).logits) if section.token_kl > 0.0 else None,
        folder=work / DENSE, seed=seed, runtime=runtime, on_progress=report if tell else None,
    )  # fmt: skip
    served.pool.cpu()
    found.model.cpu()
    assert isinstance(found.model, PreTrainedModel)
    return found.model


# -- how good they are --------------------------------------------------------------------------------------------


def table_row(found: Evaluation, problem: Problem) -> dict[str, Any]:
    """A model's line as JSON, nats of the problem's unit.

    Returns:
        worst, worst_domain, mean (over the domains, of values), and by domain: value (cross-entropy minus offset),
        error (standard; None from one document alone), cross_entropy.
    """
    values_D = found.values_D * problem.report
    rows = zip(values_D.tolist(), found.errors_D.tolist(), found.ce_D.tolist(), strict=True)
    domains = {
        name: {"value": value, "error": finite_or_none(error), "cross_entropy": ce}
        for name, (value, error, ce) in zip(problem.names, rows, strict=True)
    }
    worst = problem.names[found.worst_domain]
    return {"worst": found.worst, "worst_domain": worst, "mean": float(values_D.mean()), "domains": domains}


def model_row(model: nn.Module, problem: Problem) -> dict[str, Any]:
    """`table_row` of a causal language model."""
    return table_row(measure([log_likelihoods(model, one) for one in problem.domains], problem), problem)


@torch.inference_mode()
def log_likelihoods(model: nn.Module, one: ScoredSequences) -> Tensor:
    """log p(x) of sequences of a score cache under a causal language model, nats, float64."""
    assert one.tokens_NT1 is not None
    device = next(model.parameters()).device
    losses = (token_losses(model, part_BT1.to(device, torch.int64)) for part_BT1 in one.tokens_NT1.split(_BATCH))
    return torch.cat([-losses_BT.double().sum(dim=1).cpu() for losses_BT in losses])


def _rows(
    teacher: Gate, students: Mapping[str, CausalGate], problem: Problem, refresh_every: int | None, *, robust: bool
) -> dict[str, dict[str, Any]]:
    """Baselines, the teacher and its students on held-out sequences, sparse students as they are served."""
    features = problem.domains[0].features
    baselines = {name: init_gate(section, problem.experts, features) for name, section in BASELINES.items()}
    roles = dict.fromkeys(baselines, "baseline") | {"robust": "gate"} | dict.fromkeys(students, "student")
    gates: dict[str, Gate] = {**baselines, **({"robust": teacher} if robust else {}), **students}
    rows: dict[str, dict[str, Any]] = {}
    for name, gate in gates.items():
        more: dict[str, Any] = {}
        if isinstance(gate, CausalGate) and gate.top is not None:
            found = measure([_served(gate, one, refresh_every) for one in problem.domains], problem)
            more = {"experts_per_token": gate.top, "refresh_every": refresh_every}
        else:
            found = evaluate(gate, problem)
            if isinstance(gate, CausalGate) and problem.samples:
                more = _kl(student_kl(teacher, gate, problem.samples))
        rows[name] = {**table_row(found, problem), **more, "role": roles[name]}
    return rows


def _served(gate: CausalGate, one: ScoredSequences, refresh_every: int | None) -> Tensor:
    """log s(x) of sequences as the model that is kept generates, token by token."""
    parts: Sequence[Tensor] = torch.arange(len(one)).split(_BATCH)
    return torch.cat([log_served(gate, one.features.rows(rows), refresh_every=refresh_every) for rows in parts])


def _kl(found: tuple[float, float]) -> dict[str, float | None]:
    return {"kl": found[0], "kl_error": finite_or_none(found[1])}
