"""From a gate to students that can be served: causal gates over the experts, sparse ones, one dense model.

<run>/students/             student.json and direct.json: what was made, and how good each is on held-out sequences
<run>/students/NAME/        a model `from_pretrained` loads: student, student-top-1, direct, direct-top-2, dense, ...
<run>/students/.making-*/   while work is under way: finished gates, and states to continue from
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
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
from weftlm.files import check_sealed, remove, whole_folder
from weftlm.gating.experts import ExpertPool
from weftlm.gating.gate import CausalGate, Gate, init_gate, load_gate, save_gate
from weftlm.gating.modular_lm import ModularLM
from weftlm.gating.prefix_gate import PrefixGate
from weftlm.gating.primal_dual import FitState, fit_robust_gate
from weftlm.gating.problem import Evaluation, Problem, evaluate, make_problem, measure
from weftlm.gating.sequences import ScoredSequences
from weftlm.models.hf import token_losses
from weftlm.models.open import check_written, probe_logits
from weftlm.pipeline.gate_recipe import DenseStudentConfig, GatingConfig
from weftlm.pipeline.gating import (
    FoundState,
    OpenScores,
    fit_artifact,
    fit_reporter,
    kept,
    open_gate,
    open_scores,
    pool_sources,
    problem_identity,
    read_facts,
    unfinished_state,
)
from weftlm.pipeline.names import DENSE, DIRECT, STUDENT
from weftlm.pipeline.prepared import PreparedData
from weftlm.pipeline.recipe import Recipe
from weftlm.pipeline.report import write_gate_page
from weftlm.pipeline.run_folder import alone
from weftlm.progress import Pace, write_line
from weftlm.training.runtime import choose_runtime

log = logging.getLogger(__name__)

BASELINES: Mapping[str, Mapping[str, Any]] = {
    "uniform": {"gate": "fixed_share", "share": 1.0},
    "bayes": {"gate": "bayes"},
    "fixed share": {"gate": "fixed_share"},
}
"""Causal gates that need no training, by the name a table gives them."""
ALL_RUN = ", all experts run"
"""Suffix of a sparse student's row with every expert up to date at every token."""
_STOPPING = 0.2
"""Part of the samples a dense student is not trained on, by which its best weights are chosen."""
_BATCH = 32


def distil_gate(recipe: Recipe, *, direct: bool = False, progress: bool = True) -> dict[str, Any]:
    """Make what can be served of the fitted gate, or of a causal gate trained on the minimax objective itself.

    Students that are there already, of the same gate and settings, are kept; interrupted work goes on from its last
    report.

    Args:
        recipe: Recipe of the experts, the gate and the students.
        direct: Whether to train a causal gate on the minimax objective, and make sparse and dense students of that.
        progress: Whether to show a line per report on stderr.
    Returns:
        What the kind's JSON file holds: identity, scores (fingerprint), fit (identity of the gate that was distilled),
        problem (`problem_identity`), experts, unit, length (of the windows), offsets, and rows by
        model: `table_row`, with role (baseline, gate, student), and kl, kl_error, experts_per_token, all_experts and
        model (folder) where there are such.
    Raises:
        ConfigError: the recipe's settings do not fit what was scored, or samples are missing.
        DataError: nothing is scored or fitted yet, or experts have changed since they were scored.
        NumericsError: a loss stops being finite.
        CheckpointError: a file cannot be written.
    """
    with alone(recipe.run):
        config, kind = recipe.gating_settings, DIRECT if direct else STUDENT
        scores = open_scores(recipe, causal=True)
        fitted = None if direct else open_gate(recipe, scores)
        check_teaching_samples(config, scored=bool(scores.cache.samples), direct=direct)
        folder, artifact = recipe.students_folder, _artifact(recipe, scores, kind)
        if (known := _kept_students(artifact)) is not None:
            return known
        pool, tokenizer = _open_pool(recipe, scores)
        work = _Work(folder / f".making-{kind}", artifact, progress)
        if direct:
            teacher: Gate = _direct(scores, config, work)
            students: dict[str, CausalGate] = {DIRECT: _causal(teacher)}
        else:
            assert fitted is not None
            teacher = fitted[0]
            students = {STUDENT: _distilled(teacher, scores, config, work)}
        students |= _sparse(teacher, students[kind], kind, scores, config, work)
        rows = _rows(teacher, students, scores, config, robust=not direct)
        models: dict[str, PreTrainedModel] = {}
        for name, gate in students.items():
            models[name] = ModularLM(pool, gate, refresh_every=config.students.refresh_every)
        if config.students.dense is not None:
            name = DENSE if kind == STUDENT else f"{kind}-{DENSE}"
            served = ModularLM(pool, students[kind])
            dense = _Dense(teacher, served, scores, config, recipe.seed)
            models[name] = dense.train(tokenizer, work.folder / DENSE, work.tell)
            rows[name] = {**dense.row(models[name]), "role": "student"}
        (folder / f"{kind}.json").unlink(missing_ok=True)
        for old in (kind, *(each.name for each in folder.glob(f"{kind}-*")), *([DENSE] if kind == STUDENT else [])):
            remove(folder / old)
        for name, model in models.items():
            with whole_folder(folder / name, "student") as making:
                model.save_pretrained(making)
                tokenizer.save(making)
                if not isinstance(model, ModularLM):  # of those a gate is written, which is digested like every file
                    check_written(making, probe_logits(model))
            rows[name]["model"] = str(folder / name)
        facts = {
            "scores": scores.cache.fingerprint,
            "fit": None if fitted is None else fitted[1]["identity"],
            "problem": problem_identity(recipe, scores.cache),
            "experts": list(scores.cache.experts),
            "unit": config.fit.unit,
            "length": scores.cache.config.length,
            "offsets": scores.problem["offsets"],
            "rows": rows,
        }
        found = artifact.finish(facts)
        work.done()
        write_gate_page(recipe.run)
        return found


def _kept_students(artifact: Artifact) -> dict[str, Any] | None:
    """The facts of finished students; None where there are none of this identity, or one is gone or damaged."""
    known = kept(artifact)
    try:
        for place in (Path(row["model"]) for row in (known or {"rows": {}})["rows"].values() if "model" in row):
            if not place.is_dir():
                return None
            check_sealed(place, "it is made again")
    except DataError as error:
        log.warning("%s", error)
        return None
    return known


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
    """Rows of the students that lie in a run folder, by name; empty where none were made.

    Raises:
        DataError: a file is torn.
    """
    found: dict[str, dict[str, Any]] = {}
    for kind in (STUDENT, DIRECT):
        known = read_facts(recipe.students_folder / f"{kind}.json") or {"rows": {}}
        found |= {Path(row["model"]).name: row for row in known["rows"].values() if "model" in row}
    return found


def _artifact(recipe: Recipe, scores: OpenScores, kind: str) -> Artifact:
    """The students of a run, decided by the fit's identity and their own section."""
    identity = {**fit_artifact(recipe, scores.cache).identity, "students": settings(recipe.gating_settings.students)}
    return Artifact(recipe.students_folder / f"{kind}.json", identity, "delete it and run the command again")


class _Work:
    """Work under way: finished gates and states to resume from, removed where they are of something else."""

    def __init__(self, folder: Path, artifact: Artifact, progress: bool) -> None:
        self.folder = folder
        self.progress = progress
        self.artifact = artifact
        try:
            resumed = artifact.resume()
        except DataError:
            resumed = False
        if not resumed:
            remove(folder)
            artifact.begin()
        folder.mkdir(parents=True, exist_ok=True)

    def tell(self, text: str) -> None:
        """A line on stderr."""
        if self.progress:
            write_line(text)

    def done(self) -> None:
        """Nothing is left to continue."""
        remove(self.folder)

    def state(self, name: str) -> Path:
        """File of an interrupted part's state."""
        return self.folder / f"{name}.state.safetensors"

    def gate(self, name: str, make: Callable[[], Gate]) -> Gate:
        """A finished gate, or one made now."""
        path = self.folder / f"{name}.safetensors"
        found = unfinished_state(self.artifact, path, load_gate)
        if found is None:
            save_gate(make(), path)
            self.state(name).unlink(missing_ok=True)
            found = load_gate(path)
        return found

    def unfinished(self, name: str, load: Callable[[Path], FoundState]) -> FoundState | None:
        """A part's state to go on from."""
        return unfinished_state(self.artifact, self.state(name), load)

    def distilling(
        self, name: str, steps: int
    ) -> tuple[DistilState | None, Callable[[DistilProgress, DistilState], None]]:
        """A state to continue from, and what keeps states and tells of them."""
        state = self.unfinished(name, DistilState.load)
        pace = Pace(0 if state is None else state.step)

        def report(line: DistilProgress, now: DistilState) -> None:
            now.save(self.state(name))
            left = "stops here" if now.finished else pace.eta(line.step, steps)
            self.tell(f"distil {name} {line.step}/{steps}  KL {line.kl:.4f} ± {line.error:.4f} nats/sequence  {left}")

        return state, report


# -- making them --------------------------------------------------------------------------------------------------


def _causal(gate: Gate) -> CausalGate:
    assert isinstance(gate, CausalGate)
    return gate


def _direct(scores: OpenScores, config: GatingConfig, work: _Work) -> Gate:
    """The causal gate of the minimax objective; it needs no samples, since its Z is 1."""
    section = config.students.direct
    fit = section.fit.model_copy(update={"unit": config.fit.unit})

    def make() -> Gate:
        state = work.unfinished(DIRECT, FitState.load)
        found = fit_robust_gate(
            scores.split.domains,
            None,
            gate=section.gate,
            config=fit,
            state=state,
            on_progress=fit_reporter(scores.names, fit, state, work.state(DIRECT), enabled=work.progress),
            on_stop=lambda now: now.save(work.state(DIRECT)),
            **scores.problem,
        )
        return found.gate

    return work.gate(DIRECT, make)


def _distilled(teacher: Gate, scores: OpenScores, config: GatingConfig, work: _Work) -> CausalGate:
    """The causal gate nearest to the fitted one."""
    section, split = config.students, scores.split

    def make() -> Gate:
        state, report = work.distilling(STUDENT, section.distil.steps)
        found = distil_structural(
            teacher,
            split.samples,
            student=teacher if isinstance(teacher, PrefixGate) else section.gate,
            config=section.distil,
            state=state,
            on_progress=report,
            on_stop=lambda now: now.save(work.state(STUDENT)),
        )
        return found.gate

    return _causal(work.gate(STUDENT, make))


def _sparse(
    teacher: Gate, student: CausalGate, kind: str, scores: OpenScores, config: GatingConfig, work: _Work
) -> dict[str, CausalGate]:
    """A student for each number of experts per token; cut down and not trained further where there are no samples."""
    assert isinstance(student, PrefixGate)
    section, found = config.students, {}
    for top in sorted(set(section.experts_per_token)):
        if top >= student.experts:
            continue
        name = f"{kind}-top-{top}"

        def make(name: str = name, top: int = top) -> Gate:
            if not scores.split.samples:
                return student.with_top(top)
            state, report = work.distilling(name, section.distil.steps)
            made = distil_structural(
                teacher,
                scores.split.samples,
                student=student.with_top(top),
                config=section.distil,
                state=state,
                on_progress=report,
                on_stop=lambda now: now.save(work.state(name)),
            )
            return made.gate

        found[name] = _causal(work.gate(name, make))
    return found


def _open_pool(recipe: Recipe, scores: OpenScores) -> tuple[ExpertPool, Tokenizer]:
    """The experts that were scored, and the tokenizer of their text.

    Raises:
        DataError: they have changed since.
    """
    sources = {source.name: source for source in pool_sources(recipe)}
    missing = [name for name in scores.cache.experts if name not in sources]
    if missing:
        raise DataError(f"{', '.join(missing)}: scored, and not among the experts any more; score again")
    pool = ExpertPool.load([sources[name] for name in scores.cache.experts], dtype=recipe.expert_settings.dtype)
    now = pool.fingerprints()
    changed = [name for name, known in scores.cache.expert_fingerprints.items() if now.get(name) != known]
    if changed:
        raise DataError(
            f"{', '.join(changed)}: changed since the experts were scored; score again (weftlm score --overwrite) and "
            "fit the gate again"
        )
    return pool, PreparedData.load(recipe.prepared_folder).tokenizer


@dataclass(frozen=True, eq=False)
class _Dense:
    """A dense student: its texts, its training, its line of the table."""

    teacher: Gate
    served: ModularLM
    scores: OpenScores
    config: GatingConfig
    seed: int

    def train(self, tokenizer: Tokenizer, folder: Path, tell: Callable[[str], None]) -> PreTrainedModel:
        """The student of best cross-entropy on samples it was not trained on."""
        section = self._section()
        cuts = [one.split_rows(_STOPPING, self.seed) for one in self.scores.split.samples]
        fit, stop = (self._text([cut[part] for cut in cuts]) for part in (0, 1))

        pace, steps = Pace(), section.training.total_steps

        def report(line: DenseProgress) -> None:
            loss = "" if line.loss is None else f"  loss {line.loss:.4f}"
            left = pace.eta(line.step, steps)
            tell(f"distil dense {line.step}/{steps}{loss}  cross-entropy {line.ce:.4f} nats/token  {left}")

        runtime = choose_runtime(section.training, parameters=0)
        self.served.pool.to(runtime.device)
        found = distil_dense(
            section.model,
            fit,
            section,
            vocab_size=tokenizer.vocab_size,
            eos_id=tokenizer.eos_id,
            teacher=self.served.log_probs if section.token_kl > 0.0 else None,
            real=self._real() if section.real_fraction > 0.0 else None,
            held_out=stop,
            folder=folder,
            seed=self.seed,
            runtime=runtime,
            on_progress=report,
        )
        self.served.pool.cpu()
        found.model.cpu()
        assert isinstance(found.model, PreTrainedModel)
        return found.model

    def row(self, model: PreTrainedModel) -> dict[str, Any]:
        """Its line, on held-out sequences."""
        split, problem = self.scores.split, held_out_problem(self.scores, self.config)
        logs = [log_likelihoods(model, one) for one in split.held_domains.values()]
        weighted = weigh(self.teacher, split.held_samples)
        drawn = [log_likelihoods(model, one) for one in split.held_samples]
        return {**table_row(measure(logs, problem), problem), **_kl_of(model_kl(weighted, torch.cat(drawn)))}

    def _section(self) -> DenseStudentConfig:
        assert self.config.students.dense is not None
        return self.config.students.dense

    def _text(self, rows: Sequence[Tensor]) -> WeightedText:
        """Some of the samples of the fit, and their token ids."""
        chosen = [one.rows(each) for one, each in zip(self.scores.split.samples, rows, strict=True)]
        return WeightedText.sampled(weigh(self.teacher, chosen), [one.tokens_NT1 for one in chosen])

    def _real(self) -> WeightedText:
        """The domains' sequences of the fit, equal parts of each."""
        sets = self.scores.split.domains.values()
        tokens = torch.cat([one.tokens_NT1 for one in sets if one.tokens_NT1 is not None])
        return WeightedText.of(tokens, weights_N=torch.cat([one.probability() for one in sets]))


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
    return {
        "worst": found.worst,
        "worst_domain": problem.names[found.worst_domain],
        "mean": float(values_D.mean()),
        "domains": {
            name: {
                "value": float(values_D[d]),
                "error": finite_or_none(float(found.errors_D[d])),
                "cross_entropy": float(found.ce_D[d]),
            }
            for d, name in enumerate(problem.names)
        },
    }


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
    teacher: Gate, students: Mapping[str, CausalGate], scores: OpenScores, config: GatingConfig, *, robust: bool
) -> dict[str, dict[str, Any]]:
    """Baselines, the teacher and its students on held-out sequences, each student as it is and as it is served."""
    problem, held = held_out_problem(scores, config), scores.split.held_samples
    features = problem.domains[0].features
    gates: dict[str, Gate] = {
        name: init_gate(section, problem.experts, features) for name, section in BASELINES.items()
    }
    if robust:
        gates["robust"] = teacher
    rows: dict[str, dict[str, Any]] = {}
    for name, gate in {**gates, **students}.items():
        role = "baseline" if name in BASELINES else "student" if name in students else "gate"
        rows[name] = {**table_row(evaluate(gate, problem), problem), "role": role}
        if isinstance(gate, CausalGate) and held:
            rows[name] |= _kl_of(student_kl(teacher, gate, held))
        if isinstance(gate, CausalGate) and gate.top is not None:
            every = config.students.refresh_every
            logs = [_served(gate, one, every) for one in problem.domains]
            rows[f"{name}{ALL_RUN}"] = {**rows[name], "all_experts": True}
            rows[name] = table_row(measure(logs, problem), problem)
            rows[name] |= {"role": role, "experts_per_token": gate.top, "refresh_every": every}
    return rows


def _served(gate: CausalGate, one: ScoredSequences, refresh_every: int | None) -> Tensor:
    """log s(x) of sequences as the model that is kept generates, token by token."""
    parts = torch.arange(len(one)).split(_BATCH)
    return torch.cat([log_served(gate, one.features.rows(rows), refresh_every=refresh_every) for rows in parts])


def _kl_of(found: tuple[float, float]) -> dict[str, float | None]:
    return {"kl": found[0], "kl_error": finite_or_none(found[1])}
