"""From a gate to students that can be served: causal gates over the experts, sparse ones, one dense model.

<run>/students/             student.json and direct.json: what was made, and how good each is on held-out sequences
<run>/students/NAME/        a model `from_pretrained` loads: student, student-top-1, direct, direct-top-2, dense, ...
<run>/students/.making-*/   while work is under way: states to resume from
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

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
from weftlm.errors import ConfigError, DataError
from weftlm.evaluation.result import finite_or_none
from weftlm.files import read_object, remove, whole_folder
from weftlm.gating.experts import ExpertPool
from weftlm.gating.gate import CausalGate, Gate, init_gate
from weftlm.gating.modular_lm import ModularLM
from weftlm.gating.prefix_gate import PrefixGate
from weftlm.gating.problem import Evaluation, Problem, evaluate, make_problem, measure
from weftlm.gating.sequences import ScoredSequences
from weftlm.models.hf import token_losses
from weftlm.models.open import check_written, probe_logits
from weftlm.pipeline.gating import (
    OpenScores,
    fit_artifact,
    kept,
    open_gate,
    open_pool,
    open_scores,
    resume_or_begin,
    resumed,
    run_fit,
)
from weftlm.pipeline.names import DENSE, DIRECT, STUDENT
from weftlm.pipeline.prepared import PreparedData
from weftlm.pipeline.recipe import Recipe
from weftlm.pipeline.run_folder import alone
from weftlm.pipeline.stages.gate import GatingConfig
from weftlm.progress import Pace, write_line
from weftlm.training.runtime import choose_runtime

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
        scores = open_scores(recipe, causal=True)
        fitted = None if direct else open_gate(recipe, scores)[0]
        check_teaching_samples(config, scored=bool(scores.cache.samples), direct=direct)
        folder = recipe.students_folder
        identity = {**fit_artifact(recipe, scores.cache).identity, "students": settings(config.students)}
        artifact = Artifact(folder / f"{kind}.json", identity, _CURE)
        if (known := kept(artifact)) is not None:
            return known
        data, work = PreparedData.load(recipe.prepared_folder), folder / f".making-{kind}"
        pool, every = _scored_pool(recipe, data, scores), config.students.refresh_every
        resume_or_begin(artifact, work)
        teacher, students = _gates(recipe, scores, fitted, work, progress)
        problem = held_out_problem(scores, config)
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
        facts = {
            "scores": scores.cache.fingerprint,
            "experts": list(scores.cache.experts),
            "unit": config.fit.unit,
            "length": scores.cache.config.length,
            "offsets": scores.problem["offsets"],
            "rows": rows,
        }
        files = [path for name in models for path in sorted((folder / name).rglob("*")) if path.is_file()]
        found = artifact.finish(facts, [path.relative_to(folder).as_posix() for path in files])
        remove(work)
        return found


def check_teaching_samples(config: GatingConfig, *, scored: bool, direct: bool) -> None:
    """Refuse distillation without samples of the experts.

    Raises:
        ConfigError: it needs some.
    """
    if not scored and (not direct or config.students.dense is not None):
        raise ConfigError(
            "distillation learns from samples of the experts and none are scored; score some (gating.scores.samples), "
            "or train the causal gate on the objective itself (weftlm gate distil --direct) without a dense student"
        )


def read_students(recipe: Recipe) -> dict[str, dict[str, Any]]:
    """Rows of the students in a run folder, by name; empty where none were made."""
    found: dict[str, dict[str, Any]] = {}
    for kind in (STUDENT, DIRECT):
        known = read_object(recipe.students_folder / f"{kind}.json", _CURE) or {"rows": {}}
        found |= {name: row for name, row in known["rows"].items() if "model" in row}
    return found


def _scored_pool(recipe: Recipe, data: PreparedData, scores: OpenScores) -> ExpertPool:
    """The experts that were scored.

    Raises:
        DataError: they have changed since.
    """
    known = scores.cache.expert_fingerprints
    now = (pool := open_pool(recipe, data, names=list(known))).fingerprints()
    changed = [name for name, fingerprint in known.items() if now.get(name) != fingerprint]
    if changed:
        raise DataError(
            f"{', '.join(changed)}: changed since the experts were scored; score again (weftlm score --overwrite) and "
            "fit the gate again"
        )
    return pool


# -- making them --------------------------------------------------------------------------------------------------


def _gates(
    recipe: Recipe, scores: OpenScores, fitted: Gate | None, work: Path, progress: bool
) -> tuple[Gate, dict[str, CausalGate]]:
    """The teacher, and the causal gates made of it by name: over all experts, and over the best few per token.

    Where no gate was fitted the causal gate of the minimax objective is trained first, and is the teacher.
    """
    section, samples = recipe.gating_settings.students, scores.split.samples
    kind = DIRECT if fitted is None else STUDENT

    def distilled(name: str, distil: Callable[..., Any]) -> Any:
        def line(now: DistilProgress) -> str:
            kl = f"KL {now.kl:.4f} ± {now.error:.4f} nats/sequence"
            return f"distil {name} {now.step}/{section.distil.steps}  {kl}"

        made = partial(distil, config=section.distil)
        state = work / f"{name}.safetensors"
        return resumed(state, DistilState, section.distil.steps, made, line if progress else None).gate

    if fitted is None:
        fit = section.direct.fit.model_copy(update={"unit": recipe.gating_settings.fit.unit})
        gate = fitted = run_fit(scores, section.direct.gate, fit, work / f"{kind}.safetensors", progress=progress).gate
    else:
        start = fitted if isinstance(fitted, PrefixGate) else section.gate
        gate = distilled(kind, partial(distil_structural, fitted, samples, student=start))
    assert isinstance(gate, PrefixGate)
    students: dict[str, CausalGate] = {kind: gate}
    for top in sorted({top for top in section.experts_per_token if top < gate.experts}):
        name = f"{kind}-top-{top}"
        sparse = partial(distil_structural, fitted, samples, student=gate.with_top(top))
        students[name] = distilled(name, sparse) if samples else gate.with_top(top)
    return fitted, students


def _dense(
    recipe: Recipe, scores: OpenScores, teacher: Gate, served: ModularLM, tokenizer: Tokenizer, work: Path, tell: bool
) -> PreTrainedModel:
    """The dense student of best cross-entropy on samples it was not trained on; `served` is for `token_kl`."""
    section, seed = recipe.gating_settings.students.dense, recipe.seed
    assert section is not None
    sets, domains = scores.split.samples, scores.split.domains.values()
    cuts = [one.split_rows(_STOPPING, seed) for one in sets]

    def text(part: int) -> WeightedText:
        chosen = [one.rows(cut[part]) for one, cut in zip(sets, cuts, strict=True)]
        return WeightedText.sampled(weigh(teacher, chosen), [one.tokens_NT1 for one in chosen])

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
        teacher=served.log_probs if section.token_kl > 0.0 else None,
        folder=work / DENSE, seed=seed, runtime=runtime, on_progress=report if tell else None,
    )  # fmt: skip
    served.pool.cpu()
    found.model.cpu()
    assert isinstance(found.model, PreTrainedModel)
    return found.model


# -- how good they are --------------------------------------------------------------------------------------------


def held_out_problem(scores: OpenScores, config: GatingConfig) -> Problem:
    """The problem on the sequences no gate was fitted on."""
    split = scores.split
    return make_problem(split.held_domains, split.held_samples or None, unit=config.fit.unit, **scores.problem)


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
    parts = []
    for part_BT1 in one.tokens_NT1.split(_BATCH):
        tokens_BT1 = part_BT1.to(device, torch.int64)
        parts.append(-token_losses(model, tokens_BT1).double().sum(dim=1).cpu())
    return torch.cat(parts)


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
