"""A causal gate that makes the model of a sequence-level gate, fitted on samples of the frozen experts.

    minimise over phi   KL(pi_g / Z || s_phi)           s_phi(x) = prod_t sum_k gamma_k(x_<t) q_k(x_t | x_<t)

For every prefix the best weights solve a concave problem: the mixture of the experts' next-token distributions that is
nearest to the teacher's. The router gamma_k(x_<t) prop. to q_k(x_<t) E_{q_k}[g(x, k) | x_<t] is exact for constant
gates; for others it is a start: it follows who wrote the prefix, not what is best said next. Cortes, Mohri and Zhong
2026, arXiv:2602.17554; weights, start and selection are choices of this implementation.

An example: two experts over two sequences, a and b, enumerated, and a constant gate g = (1/2, 1/2).

    q_1 = (0.9, 0.1), q_2 = (0.3, 0.7)          pi_g(a) = 0.45 + 0.15 = 0.6, pi_g(b) = 0.4, Z = 1
    `weigh`, "gate":    m(x from q_k) = q_k(x) g_k: 0.45, 0.05 (from q_1), 0.15, 0.35 (from q_2)
    `weigh`, "balance": m(x from q_k) = q_k(x) pi_g(x) / (q_1(x) + q_2(x)): 0.45, 0.05, 0.15, 0.35

Either way the mass of a is 0.6 and that of b 0.4, and the sum is Z; of samples that were drawn, "balance" gives every
copy of a sequence the same weight whoever drew it. A step draws sequences by mass and goes up log s of them (`_Draw`,
`_step`); every `evaluate_every_steps` the student's KL on held-out sequences decides whether it is kept (`_Measure`).
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from weftlm import interrupt
from weftlm.distillation.config import DistilConfig, Weighting
from weftlm.errors import CheckpointError, ConfigError, DataError, NumericsError, reason
from weftlm.gating.adam import Moments, adam_step
from weftlm.gating.arrays import simplex_vector
from weftlm.gating.config import GateConfig, PrefixGateConfig, gate_config, gates
from weftlm.gating.files import joined, named, read_tensors, write_tensors
from weftlm.gating.gate import CausalGate, Features, Gate, init_gate
from weftlm.gating.prefix_gate import PrefixGate
from weftlm.gating.problem import log_gates, log_model, log_models, squared_error
from weftlm.gating.sequences import ScoredSequences, prepared
from weftlm.threads import follow_load

LogModel = Callable[[CausalGate, Features], Tensor]
"""log of a student's probability of B sequences, with a gradient: what training goes up."""

log = logging.getLogger(__name__)

_KIND = "distillation of a gate"
_STANDARDISED_ON = 512


@dataclass(frozen=True)
class DistilProgress:
    """One measurement; plain numbers.

    Attributes:
        step: steps taken.
        kl: KL(pi_g / Z || student) on held-out samples, nats per sequence.
        error: its standard error; 0 where enumerated, NaN where a single sequence was held out.
        loss: what is selected by: (1 - r) kl + r (cross-entropy on held-out real text, nats per sequence).
        best: whether the student is the best so far, and kept.
    """

    step: int
    kl: float
    error: float
    loss: float
    best: bool


def _with_nan(line: Mapping[str, Any]) -> dict[str, Any]:
    """A measurement as it was before it went through JSON, which has no NaN."""
    return {key: math.nan if value is None else value for key, value in line.items()}


@dataclass(frozen=True, eq=False)
class DistilState:
    """Everything a distillation needs to continue as if it had never stopped; draws depend on seed and step alone.

    Attributes:
        config: of the distillation.
        step: steps taken.
        student: phi as it is.
        moments: of Adam.
        best: learned tensors of the best student so far.
        best_loss: its held-out loss; inf before the first measurement.
        stale: measurements since.
        history: so far.
    """

    config: DistilConfig
    step: int
    student: CausalGate
    moments: Moments
    best: Mapping[str, Tensor]
    best_loss: float
    stale: int
    history: tuple[DistilProgress, ...] = ()

    @property
    def finished(self) -> bool:
        """Whether no step is left to take."""
        patience = self.config.patience
        return self.step >= self.config.steps or (patience is not None and self.stale >= patience)

    def save(self, path: str | Path) -> None:
        """Write the state as one safetensors file.

        Raises:
            CheckpointError: the disk is full or not writable.
        """
        moments = {"first": self.moments.first, "second": self.moments.second}
        tensors = joined({"student": self.student.tensors, **moments, "best": self.best})
        facts = {
            "config": self.config.model_dump(mode="json"),
            "student": self.student.config.model_dump(mode="json"),
            "experts": self.student.experts,
            "step": self.step,
            "best_loss": self.best_loss if math.isfinite(self.best_loss) else None,
            "stale": self.stale,
            "history": [
                {key: value if math.isfinite(value) else None for key, value in dataclasses.asdict(line).items()}
                for line in self.history
            ],
        }
        write_tensors(Path(path), _KIND, tensors, facts)

    @classmethod
    def load(cls, path: str | Path) -> DistilState:
        """Read a state back, exact to the last bit.

        Raises:
            CheckpointError: the file is missing, torn, or of another version.
        """
        tensors, facts = read_tensors(Path(path), _KIND)
        try:
            section, group = gate_config(facts["student"]), partial(named, tensors)
            student = gates[section.gate](section, int(facts["experts"]), group("student"))
            return cls(
                config=DistilConfig.model_validate(facts["config"]),
                step=int(facts["step"]),
                student=_causal(student),
                moments=Moments(group("first"), group("second")),
                best=group("best"),
                best_loss=math.inf if facts["best_loss"] is None else float(facts["best_loss"]),
                stale=int(facts["stale"]),
                history=tuple(DistilProgress(**_with_nan(line)) for line in facts["history"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{path} holds no distillation this version can continue: {reason(error)}") from error


@dataclass(frozen=True, eq=False)
class DistilResult:
    """A distilled gate.

    Attributes:
        gate: the student of the best held-out measurement.
        kl: KL(pi_g / Z || student) on the samples of the training, nats per sequence.
        kl_error: its standard error; 0 where enumerated.
        held_out_kl: the same on held-out samples. The student was selected on them, among few: use `student_kl` on
            others for a figure without that bias.
        held_out_error: its standard error.
        z: Z of the teacher on the samples of the training, by which its model was divided.
        exact: the samples were enumerated, so all figures are exact, and "held out" is the whole support too.
        step: steps the kept student had taken.
        history: measurements.
        state: to continue from.
    """

    gate: CausalGate
    kl: float
    kl_error: float
    held_out_kl: float
    held_out_error: float
    z: float
    exact: bool
    step: int
    history: tuple[DistilProgress, ...]
    state: DistilState


@dataclass(frozen=True, eq=False)
class Weighted:
    """Sequences that stand for pi_g.

    Attributes:
        samples: the experts' samples one after the other, in their order.
        mass_B: weight of each, float64; E_{pi_g}[f] = sum_b mass_b f(x_b), and their sum estimates Z.
        log_model_B: log pi_g(x), not divided by Z, nats.
        expert_B: who drew it.
        causal: whether the gate is, and so Z known to be 1.
    """

    samples: tuple[ScoredSequences, ...]
    mass_B: Tensor
    log_model_B: Tensor
    expert_B: Tensor
    causal: bool = False

    @property
    def z(self) -> float:
        """Z of the gate: on these samples, or 1 of a causal one."""
        return 1.0 if self.causal else float(self.mass_B.sum())

    @property
    def exact(self) -> bool:
        """Whether they are an enumerated support."""
        return self.samples[0].weights_N is not None


def weigh(gate: Gate, samples: Sequence[ScoredSequences], *, weighting: Weighting = "balance") -> Weighted:
    """Weights under which samples of the experts stand for the gated model.

        gate       m(x) = w(x) g(x, k)                                      for x drawn from expert k
        balance    m(x) = a w(x) pi_g(x) / sum_j a_j q_j(x)                 whoever drew x; a_j: expert j's share

    w: 1 / N_k for each of N_k samples, or the point's probability where the support is enumerated. The first is the
    identity E_{pi_g}[f] = sum_k E_{x ~ q_k}[g(x, k) f(x)]. The second is its conditional expectation given x over which
    expert drew it (the balance heuristic of Veach and Guibas 1995): the same sums with less noise, and the only one for
    a causal gate. Both need samples drawn from the experts as they were scored: temperature 1, nothing cut off.

    Args:
        gate: the teacher, of either kind.
        samples: draws of each expert in order, scored by all experts.
        weighting: which.
    Raises:
        ConfigError: samples of another number of experts, some enumerated and some not, or "gate" for a causal gate.
        NumericsError: the gate's Z is not positive and finite.
    """
    sets = tuple(samples)
    if len(sets) != gate.experts or any(one.experts != gate.experts for one in sets):
        raise ConfigError(
            f"samples of {len(sets)} experts, scored by {sorted({one.experts for one in sets})}, came for a gate over "
            f"{gate.experts}; draw some from each expert and score them with all"
        )
    enumerated = {one.weights_N is not None for one in sets}
    if len(enumerated) != 1:
        raise ConfigError("some experts' samples are enumerated and some drawn; give all of one kind")
    if gate.causal and weighting == "gate":
        raise ConfigError(f"gate {gate.config.gate!r} is causal and has no g(x, k) of whole sequences; use 'balance'")
    total = sum(len(one) for one in sets)
    exact = enumerated.pop()
    log_share_E = torch.tensor([1.0 / len(sets) if exact else len(one) / total for one in sets]).double().log()
    masses, logs = [], []
    with torch.no_grad():
        for k, one in enumerate(sets):
            logq_NE = one.logq_NE.double()
            logm_N = log_models(gate, one).double()
            if weighting == "gate":
                ratio_N = log_gates(gate, one).double()[:, k]
            else:
                ratio_N = logm_N - torch.logsumexp(logq_NE + log_share_E, dim=1) + log_share_E[k]
            masses.append(one.probability() * ratio_N.exp())
            logs.append(logm_N)
    labels_B = torch.repeat_interleave(torch.arange(len(sets)), torch.tensor([len(one) for one in sets]))
    found = Weighted(sets, torch.cat(masses), torch.cat(logs), labels_B, gate.causal)
    if not math.isfinite(found.z) or found.z <= 0.0:
        raise NumericsError(f"Z of the gate on these samples is {found.z}; it must be positive and finite")
    return found


def student_kl(
    gate: Gate, student: CausalGate, samples: Sequence[ScoredSequences], *, weighting: Weighting = "balance"
) -> tuple[float, float]:
    """KL(pi_g / Z || student) on samples of the experts, nats per sequence, and its standard error.

        KL = (1 / M) sum_b m_b (log pi_g(x_b) - log s(x_b)) - log Z         M = sum_b m_b;  Z = M, or 1 of a causal gate

    Self-normalised: the error is that of the ratio (delta method), over sequences or clusters within each expert. Of
    samples the estimate can come out below 0; of an enumerated support it is exact, with error 0.

    Args:
        gate: the teacher.
        student: any causal gate over the same experts.
        samples: draws of each expert with `logp_BTE` in their features; not those the student was fitted on.
        weighting: see `weigh`.
    Raises:
        ConfigError, NumericsError: as `weigh`; also where the student gives a sample no probability.
    """
    return _kl(weigh(gate, samples, weighting=weighting), student)


def distil_structural(
    gate: Gate,
    samples: Sequence[ScoredSequences],
    *,
    student: str | Mapping[str, Any] | GateConfig | CausalGate | None = None,
    held_out: Sequence[ScoredSequences] | None = None,
    real: Mapping[str, ScoredSequences] | Sequence[ScoredSequences] = (),
    lam: Any = None,
    config: DistilConfig | None = None,
    objective: LogModel | None = None,
    state: DistilState | None = None,
    until: int | None = None,
    on_progress: Callable[[DistilProgress, DistilState], None] | None = None,
    on_stop: Callable[[DistilState], None] | None = None,
) -> DistilResult:
    """Fit a causal gate to the model of a gate.

        maximise   (1 - r) E_{pi_g / Z}[log s(x)] + r sum_d lam_d E_{p_d}[log s(x)]         r: `real_fraction`

    Sequences of a step are drawn by their weights (`weigh`), so each counts alike. The student of the best held-out
    loss is kept, the untrained one among them: for a constant gate that one is exact already.

    Args:
        gate: the teacher; what it needs must be in the samples' features.
        samples: draws of each expert, in the experts' order, scored per token (`features.logp_BTE`), or an enumerated
            support.
        student: name, section or mapping of a registered causal gate, or a causal gate to go on from. None: "prefix".
            A new "prefix" gate starts with prior E_{x ~ q_k}[g(x, k)] / Z.
        held_out: further draws to stop by. None: a part of `samples`, or all of them where they are enumerated.
        real: scored sequences of the domains, for `config.real_fraction` above 0; the same part of them is held out.
        lam: the mixture of domains they are drawn by; None: equal parts.
        config: None: the defaults.
        objective: what the steps go up, in place of log s(x); measurements are of log s(x) in any case. None:
            `log_student`.
        state: continue from here; gate, data and config must be those of the interrupted distillation.
        until: stop after so many steps in all, to continue later from `result.state`.
        on_progress: called with each measurement and the state to continue from.
        on_stop: called with that state where the process is asked to stop, which it then does.
    Raises:
        ConfigError: shapes or numbers of experts differ, the student is not causal, tokens or real text are missing.
        DataError: too few samples to hold some out.
        NumericsError: a loss stops being finite.
        CheckpointError: the state is of another distillation.

    A held-out KL clearly below 0 is logged as a warning: no student can be nearer than the model itself, so the samples
    are not draws from the experts as scored (another temperature, a cut tail, other prompts).
    """
    config = config or DistilConfig()
    objective = objective or log_student
    sets = tuple(samples)
    for number, one in enumerate(sets):
        one.features.get("tokens", "student")
        if len(one) < 1:
            raise DataError(f"expert {number} has no samples; draw some")
    if held_out is None:
        sets, held_out = _halves(sets, config)
    train, test = (weigh(gate, each, weighting=config.weighting) for each in (sets, held_out))
    texts = tuple(real.values()) if isinstance(real, Mapping) else tuple(real)
    if (config.real_fraction > 0.0) != bool(texts):
        raise ConfigError(
            f"real_fraction is {config.real_fraction} and {len(texts)} sets of real text came; give both or neither"
        )
    even_D = [1.0 / max(len(texts), 1)] * len(texts)
    lam_D = simplex_vector(even_D if lam is None else lam, "lam", len(texts)).tolist() if texts else []
    texts, real_test = _halves(texts, config)
    measure = _Measure(test, real_test, lam_D, config.real_fraction, on_progress)
    if state is None:
        first = _student(student, gate, train, config)
        learned = _learned(first)
        state = DistilState(config, 0, first, Moments.zeros(learned), learned, math.inf, 0)
        state = measure(state)
    elif state.config != config:
        raise CheckpointError(f"the state is of a distillation with config {state.config}; now {config}; start afresh")
    if state.student.experts != gate.experts:
        raise ConfigError(f"the student is over {state.student.experts} experts; the gate over {gate.experts}")
    draw = _Draw(train, texts, lam_D, config, state.student)
    end = config.steps if until is None else min(until, config.steps)
    with interrupt.safe_points() if on_stop is not None else nullcontext():
        while state.step < end and not state.finished and state.student.learned:
            follow_load()
            state = _step(state, draw, objective)
            if state.step % config.evaluate_every_steps == 0 or state.step == config.steps:
                state = measure(state)
            if on_stop is not None:
                interrupt.point(partial(on_stop, state))
    kept = state.student.to("cpu", torch.float64).replaced(_wide(state.best))
    kl, error = _kl(train, kept)
    held_kl, held_error = _kl(test, kept)
    if held_kl < -max(5.0 * held_error, 1e-6):
        log.warning(
            "KL to the gated model is %.4g with standard error %.2g: below 0, so the samples are not what the experts "
            "would write by these scores; draw them at temperature 1, uncut, and score them as they were drawn",
            held_kl,
            held_error,
        )
    step = max((line.step for line in state.history if line.best), default=0)
    return DistilResult(kept, kl, error, held_kl, held_error, train.z, train.exact, step, state.history, state)


def log_student(student: CausalGate, features: Features) -> Tensor:
    """log s(x) of B sequences, nats."""
    logp_BTE = features.get("tokens", student.config.gate)
    return log_model(student, logp_BTE[:, :0].sum(dim=1), features)


def _causal(gate: Gate) -> CausalGate:
    if not isinstance(gate, CausalGate):
        raise ConfigError(f"gate {gate.config.gate!r} is not causal and cannot be a student; try 'prefix'")
    return gate


def _student(wanted: Any, gate: Gate, train: Weighted, config: DistilConfig) -> CausalGate:
    """The student before its first step, in the float type of the steps."""
    dtype = torch.float32 if config.precision == "float32" else torch.float64
    if isinstance(wanted, Gate):
        return _causal(wanted).to("cpu", dtype)
    section = gate_config(wanted or "prefix", "student")
    if not gates[section.gate].causal:
        raise ConfigError(f"gate {section.gate!r} is not causal and cannot be a student; try 'prefix'")
    few = torch.arange(_STANDARDISED_ON)
    parts = [one.features.rows(few[: len(one)]) for one in train.samples]
    parts = [Features(logp_BTE=each.logp_BTE, mask_BT=each.mask_BT) for each in parts]
    seen = parts[0] if len({each.logp_BTE.shape[1] for each in parts if each.logp_BTE is not None}) > 1 else None
    seen = seen or Features.joined(parts)
    if isinstance(section, PrefixGateConfig):
        prior_E = torch.full((gate.experts,), 1.0 / gate.experts, dtype=torch.float64)
        if not gate.causal:
            prior_E = _responsibilities(gate, train)
        return PrefixGate.of(prior_E, section, config.seed).standardised(seen).to("cpu", dtype)
    return _causal(init_gate(section, gate.experts, seen, config.seed)).to("cpu", dtype)


def _responsibilities(gate: Gate, train: Weighted) -> Tensor:
    """E_{x ~ q_k}[g(x, k)] / Z of each expert."""
    with torch.no_grad():
        parts = [one.probability() @ log_gates(gate, one).double()[:, k].exp() for k, one in enumerate(train.samples)]
    shares_E = torch.stack(parts)
    return shares_E / shares_E.sum()


class _Draw:
    """The sequences of a step, a pure function of seed and step: (features, weights that sum to 1) in parts.

    Attributes:
        ridge: weight of half the sum of squares; 0 where the samples are enumerated, for then nothing is unknown.
    """

    def __init__(
        self,
        train: Weighted,
        real: tuple[ScoredSequences, ...],
        lam_D: list[float],
        config: DistilConfig,
        student: CausalGate,
    ) -> None:
        self.config = config
        self.parts: list[tuple[float, tuple[ScoredSequences, ...], Tensor]] = []
        samples = prepared(student, train.samples)
        self.parts.append((1.0 - config.real_fraction, samples, train.mass_B / train.mass_B.sum()))
        if real:
            for one in real:
                one.features.get("tokens", "student")
            weights_B = torch.cat([part * one.probability() for part, one in zip(lam_D, real, strict=True)])
            self.parts.append((config.real_fraction, prepared(student, real), weights_B))
        self._totals = [weights_B.cumsum(0) for _, _, weights_B in self.parts]
        self.ridge = 0.0 if train.exact else config.ridge * len(train.samples) / len(train.mass_B)

    def __call__(self, step: int) -> list[tuple[Features, Tensor]]:
        size, rng = self.config.batch_sequences, np.random.default_rng([self.config.seed, step])
        drawn = []
        for (share, sets, weights_B), totals_B in zip(self.parts, self._totals, strict=True):
            if size is None:
                rows_B, weight_B = torch.arange(len(weights_B)), share * weights_B
            else:
                count = max(1, round(share * size))
                places = torch.from_numpy(rng.random(count)) * totals_B[-1]
                rows_B = torch.searchsorted(totals_B, places, right=True).clamp_max(len(weights_B) - 1)
                rows_B, counts_B = torch.unique(rows_B, return_counts=True)
                weight_B = counts_B.double() * (share / count)
            first = 0
            for one in sets:
                mine_B = (rows_B >= first) & (rows_B < first + len(one))
                if bool(mine_B.any()):
                    drawn.append((one.features.rows(rows_B[mine_B] - first), weight_B[mine_B]))
                first += len(one)
        return _merged(drawn)


def _merged(drawn: list[tuple[Features, Tensor]]) -> list[tuple[Features, Tensor]]:
    """Tokens of parts of equal length in one piece, so that they are evaluated at once."""
    by_shape: dict[tuple[int, bool], list[tuple[Features, Tensor]]] = {}
    for features, weight_B in drawn:
        assert features.logp_BTE is not None
        tokens = Features(logp_BTE=features.logp_BTE, mask_BT=features.mask_BT, prepared=features.prepared)
        by_shape.setdefault((features.logp_BTE.shape[1], features.mask_BT is None), []).append((tokens, weight_B))
    return [
        (Features.joined([one for one, _ in parts]), torch.cat([weight for _, weight in parts]))
        for parts in by_shape.values()
    ]


def _step(state: DistilState, draw: _Draw, objective: LogModel) -> DistilState:
    """One step of Adam on the student."""
    config, names = state.config, state.student.learned
    theta = {name: state.student.tensors[name].detach().requires_grad_(True) for name in names}
    student = state.student.replaced(theta)
    total = 0.0
    gradients = {
        name: draw.ridge * each.detach() if name in student.shrunk else torch.zeros_like(each)
        for name, each in theta.items()
    }
    for features, weight_B in draw(state.step):
        logs_B = objective(student, features)
        loss = -(weight_B.to(logs_B.dtype) * logs_B).sum()
        total += float(loss.detach())
        for name, each in zip(names, torch.autograd.grad(loss, list(theta.values()), allow_unused=True), strict=True):
            if each is not None:
                gradients[name] = gradients[name] + each
    if not math.isfinite(total) or not all(bool(torch.isfinite(each).all()) for each in gradients.values()):
        raise NumericsError(
            f"the student's loss became {total} at step {state.step}, or its gradient no number; lower lr (now "
            f"{config.lr:g}), or look for sequences no expert can write"
        )
    fraction = config.final_lr_fraction
    cosine = 0.5 * (1.0 + math.cos(math.pi * state.step / config.steps))
    lr = config.lr * (fraction + (1.0 - fraction) * cosine)
    moved, moments = adam_step(theta, gradients, state.moments, step=state.step, lr=lr)
    return dataclasses.replace(state, step=state.step + 1, student=state.student.replaced(moved), moments=moments)


@dataclass(frozen=True, eq=False)
class _Measure:
    """Measures the student on what was held out, and keeps it if it is the best so far."""

    test: Weighted
    real: tuple[ScoredSequences, ...]
    lam_D: list[float]
    fraction: float
    on_progress: Callable[[DistilProgress, DistilState], None] | None

    def __call__(self, state: DistilState) -> DistilState:
        kl, error = _kl(self.test, state.student)
        loss = (1.0 - self.fraction) * kl
        for part, one in zip(self.lam_D, self.real, strict=True):
            if part > 0.0:
                loss -= self.fraction * part * float(one.probability() @ log_students(state.student, one))
        better = loss < state.best_loss
        line = DistilProgress(state.step, kl, error, loss, better)
        state = dataclasses.replace(
            state,
            best=_learned(state.student) if better else state.best,
            best_loss=loss if better else state.best_loss,
            stale=0 if better else state.stale + 1,
            history=(*state.history, line),
        )
        if self.on_progress is not None:
            self.on_progress(line, state)
        return state


def _halves(
    sets: tuple[ScoredSequences, ...], config: DistilConfig
) -> tuple[tuple[ScoredSequences, ...], tuple[ScoredSequences, ...]]:
    """Sets to train on and sets held out; enumerated ones serve as both."""
    parts = [
        (one, one) if one.weights_N is not None else one.split(config.held_out_fraction, config.seed) for one in sets
    ]
    return tuple(first for first, _ in parts), tuple(second for _, second in parts)


def _learned(gate: Gate) -> dict[str, Tensor]:
    return {name: gate.tensors[name] for name in gate.learned}


def _wide(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}


def log_students(student: CausalGate, one: ScoredSequences) -> Tensor:
    """log s(x) of every sequence of a set, float64 and without gradient."""
    with torch.no_grad():
        return log_models(student.to("cpu", torch.float64), one).double()


def _kl(data: Weighted, student: CausalGate) -> tuple[float, float]:
    """See `student_kl`."""
    return model_kl(data, torch.cat([log_students(student, one) for one in data.samples]))


def model_kl(data: Weighted, logs_B: Tensor) -> tuple[float, float]:
    """KL(pi_g / Z || s) of any model, nats per sequence, and its standard error; see `student_kl`.

    Args:
        data: what `weigh` made of the teacher and samples of the experts.
        logs_B: log s(x) of those samples in order, nats.
    Raises:
        NumericsError: the model gives a sample no probability.
    """
    logs_B = logs_B.to(torch.float64)
    carrying_B = data.mass_B > 0
    excess_B = torch.where(carrying_B, data.log_model_B - logs_B, torch.zeros_like(logs_B))
    if not bool(torch.isfinite(excess_B).all()):
        raise NumericsError(
            f"the student gives {int((~torch.isfinite(excess_B)).sum())} of {len(excess_B)} samples no probability"
        )
    total = float(data.mass_B.sum())
    mean = float(data.mass_B @ excess_B) / total
    kl = mean - math.log(data.z)
    if data.exact:
        return kl, 0.0
    influence_B = data.mass_B * (excess_B - mean - (0.0 if data.causal else 1.0)) / total
    variance, first = 0.0, 0
    for one in data.samples:
        terms_N = influence_B[first : first + len(one)]
        first += len(one)
        variance += squared_error(terms_N - terms_N.mean(), one)
    return kl, math.sqrt(variance)
