"""A causal gate that makes the model of a sequence-level gate, fitted on samples of the frozen experts.

    minimise over phi   KL(pi_g / Z || s_phi)           s_phi(x) = prod_t sum_k gamma_k(x_<t) q_k(x_t | x_<t)

For every prefix the best weights solve a concave problem: the mixture of the experts' next-token distributions that is
nearest to the teacher's. The router gamma_k(x_<t) prop. to q_k(x_<t) E_{q_k}[g(x, k) | x_<t] is exact for constant
gates; for others it is a start: it follows which expert the prefix is from, not what is best said next. Cortes, Mohri
and Zhong 2026, arXiv:2602.17554; weights, start and selection are choices of this implementation.

An example: two experts over two sequences, a and b, enumerated, and a constant gate g = (1/2, 1/2).

    q_1 = (0.9, 0.1), q_2 = (0.3, 0.7)          pi_g(a) = 0.45 + 0.15 = 0.6, pi_g(b) = 0.4, Z = 1
    `weigh`: m(x from q_k) = q_k(x) pi_g(x) / (q_1(x) + q_2(x)): a 0.45, b 0.05 (from q_1), a 0.15, b 0.35 (from q_2)

The mass of a is 0.6 and that of b 0.4, and the sum is Z; of samples that were drawn, every copy of a sequence has the
same weight whichever expert drew it. A step draws sequences by mass and goes up log s of them (`_step`); every
`evaluate_every_steps` the student's KL on held-out sequences decides whether it is kept (`_measured`).
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from weftlm.distillation.config import DistilConfig
from weftlm.distillation.sparse import log_sparse
from weftlm.errors import CheckpointError, ConfigError, NumericsError
from weftlm.gating.config import GateConfig, gate_config, gates
from weftlm.gating.gate import CausalGate, Features, Gate, init_gate
from weftlm.gating.prefix_gate import PrefixGate
from weftlm.gating.problem import log_gates, log_model, log_models
from weftlm.gating.sequences import Joined, ScoredSequences, squared_error
from weftlm.gating.state import GateState, adam_step, run_steps

log = logging.getLogger(__name__)

_STANDARDISED_ON = 512


@dataclass(frozen=True)
class DistilProgress:
    """One measurement; plain numbers.

    Attributes:
        step: Steps taken.
        kl: KL(pi_g / Z || student) on held-out samples, nats per sequence, by which students are selected.
        error: Standard error of `kl`; 0 where enumerated, NaN where a single sequence was held out.
        best: Whether the student is the best so far, and kept.
    """

    step: int
    kl: float
    error: float
    best: bool


@dataclass(frozen=True, eq=False)
class DistilState(GateState):
    """A distillation under way; `gate` is the student as it is.

    Attributes:
        best: Learned tensors of the best student so far.
        best_kl: Its held-out KL; inf before the first measurement.
        stale: Measurements since.
    """

    config: DistilConfig
    gate: CausalGate
    history: tuple[DistilProgress, ...]
    best: Mapping[str, Tensor]
    best_kl: float = math.inf
    stale: int = 0

    kind: ClassVar[str] = "distillation of a gate"

    @property
    def finished(self) -> bool:
        """Whether no step is left to take."""
        patience, steps = self.config.patience, self.config.steps
        return self.step >= steps or not self.gate.learned or (patience is not None and self.stale >= patience)


@dataclass(frozen=True, eq=False)
class DistilResult:
    """A distilled gate.

    Attributes:
        gate: Student of the best held-out measurement.
        kl: KL(pi_g / Z || student) on the samples of the training, nats per sequence.
        held_out_kl: The same on held-out samples. The student was selected on them, among few: use `student_kl` on
            others for a figure without that bias.
        held_out_error: Its standard error.
        step: Steps the kept student had taken.
        history: Measurements.
        state: State to continue from.
    """

    gate: CausalGate
    kl: float
    held_out_kl: float
    held_out_error: float
    step: int
    history: tuple[DistilProgress, ...]
    state: DistilState


@dataclass(frozen=True, eq=False)
class Weighted:
    """Sequences that stand for pi_g.

    Attributes:
        samples: Experts' samples one after the other, in their order.
        mass_B: Weight of each, float64; E_{pi_g}[f] = sum_b mass_b f(x_b), and their sum estimates Z.
        log_model_B: log pi_g(x), not divided by Z, nats.
        causal: Whether the gate is causal, and so Z known to be 1.
    """

    samples: tuple[ScoredSequences, ...]
    mass_B: Tensor
    log_model_B: Tensor
    causal: bool = False

    @property
    def z(self) -> float:
        """Z of the gate: on these samples, or 1 of a causal one."""
        return 1.0 if self.causal else float(self.mass_B.sum())

    @property
    def exact(self) -> bool:
        """Whether they are an enumerated support."""
        return self.samples[0].weights_N is not None


def weigh(gate: Gate, samples: Sequence[ScoredSequences]) -> Weighted:
    """Weights under which samples of the experts stand for the gated model.

        m(x) = a w(x) pi_g(x) / sum_j a_j q_j(x)            whichever expert drew x; a_j: expert j's share

    w: 1 / N_k for each of N_k samples, or the point's probability where the support is enumerated. It is the
    conditional expectation, given x, of w(x) g(x, k) over which expert k drew it (the balance heuristic of Veach and
    Guibas 1995), hence of the identity E_{pi_g}[f] = sum_k E_{x ~ q_k}[g(x, k) f(x)] with less noise, and holds for a
    causal gate too. It needs samples drawn from the experts as they were scored: temperature 1, nothing cut off.

    Args:
        gate: Teacher, of either kind.
        samples: Draws of each expert in order, scored by all experts.
    Raises:
        ConfigError: samples of another number of experts, or some enumerated and some not.
        NumericsError: the gate's Z is not positive and finite.
    """
    sets = tuple(samples)
    if len(sets) != gate.experts or any(one.experts != gate.experts for one in sets):
        raise ConfigError(
            f"samples of {len(sets)} experts, scored by {sorted({one.experts for one in sets})}, came for a gate over "
            f"{gate.experts}; draw some from each expert and score them with all"
        )
    exact = sets[0].weights_N is not None
    if any((one.weights_N is not None) != exact for one in sets):
        raise ConfigError("some experts' samples are enumerated and some drawn; give all of one kind")
    total = sum(map(len, sets))
    log_share_E = torch.tensor([1.0 / len(sets) if exact else len(one) / total for one in sets]).double().log()
    masses, logs = [], []
    with torch.no_grad():
        for k, one in enumerate(sets):
            logm_N = log_models(gate, one).double()
            ratio_N = logm_N - torch.logsumexp(one.logq_NE.double() + log_share_E, dim=1) + log_share_E[k]
            masses.append(one.probability() * ratio_N.exp())
            logs.append(logm_N)
    found = Weighted(sets, torch.cat(masses), torch.cat(logs), gate.causal)
    if not math.isfinite(found.z) or found.z <= 0.0:
        raise NumericsError(f"Z of the gate on these samples is {found.z}; it must be positive and finite")
    return found


def student_kl(gate: Gate, student: CausalGate, samples: Sequence[ScoredSequences]) -> tuple[float, float]:
    """KL(pi_g / Z || student) on samples of the experts, nats per sequence, and its standard error.

        KL = (1 / M) sum_b m_b (log pi_g(x_b) - log s(x_b)) - log Z         M = sum_b m_b;  Z = M, or 1 of a causal gate

    Self-normalised: the error is that of the ratio (delta method), over sequences or clusters within each expert. Of
    samples the estimate can come out below 0; of an enumerated support it is exact, with error 0.

    Args:
        gate: Teacher.
        student: Any causal gate over the same experts.
        samples: Draws of each expert with `logp_BTE` in their features; not those the student was fitted on.
    Raises:
        ConfigError, NumericsError: as `weigh`; also where the student gives a sample no probability.
    """
    return _kl(weigh(gate, samples), student)


def distil_structural(
    gate: Gate,
    samples: Sequence[ScoredSequences],
    *,
    student: str | Mapping[str, Any] | GateConfig | CausalGate | None = None,
    held_out: Sequence[ScoredSequences] | None = None,
    config: DistilConfig | None = None,
    state: DistilState | None = None,
    until: int | None = None,
    on_progress: Callable[[DistilProgress, DistilState], None] | None = None,
    on_stop: Callable[[DistilState], None] | None = None,
) -> DistilResult:
    """Fit a causal gate to the model of a gate: maximise E_{pi_g / Z}[log s(x)].

    Sequences of a step are drawn by their weights (`weigh`), so each counts alike. The student of the best held-out KL
    is kept, the untrained one among them: for a constant gate that one is exact already.

    Args:
        gate: Teacher; what it needs must be in the samples' features.
        samples: Draws of each expert, in the experts' order, scored per token (`features.logp_BTE`), or an enumerated
            support.
        student: Name, section or mapping of a registered causal gate, or a causal gate to go on from. None: "prefix".
            A new one starts with prior E_{x ~ q_k}[g(x, k)] / Z (`CausalGate.with_prior`). One with `top` experts per
            token goes up `log_sparse` in place of log s(x); measurements are of log s(x) in any case.
        held_out: Further draws to stop by. None: a part of `samples`, or all of them where they are enumerated.
        config: Settings; None: the defaults.
        state: State to continue from; gate, data and config must be those of the interrupted distillation.
        until: Steps in all after which to stop, to continue later from `result.state`.
        on_progress: Called with each measurement and the state to continue from.
        on_stop: Called with that state where the process is asked to stop, which it then does.
    Raises:
        ConfigError: shapes or numbers of experts differ, the student is not causal, or tokens are missing.
        DataError: too few samples to hold some out.
        NumericsError: a loss stops being finite.
        CheckpointError: the state is of another distillation.

    A held-out KL clearly below 0 is logged as a warning: no student can be nearer than the model itself, so the samples
    are not draws from the experts as scored (another temperature, a cut tail, other prompts).
    """
    config = config or DistilConfig()
    sets = tuple(samples)
    for one in sets:
        one.features.get("tokens", "student")
    if held_out is None:
        parts = [
            (one, one) if one.weights_N is not None else one.split(config.held_out_fraction, config.seed)
            for one in sets
        ]
        sets, held_out = zip(*parts, strict=True)
    train, test = weigh(gate, sets), weigh(gate, held_out)
    if state is None:
        state = _measured(DistilState(config, 0, _student(student, gate, train, config), {}, (), {}), test=test)
        if on_progress is not None:
            on_progress(state.history[-1], state)
    elif state.config != config:
        raise CheckpointError(f"the state is of a distillation with config {state.config}; now {config}; start afresh")
    if state.gate.experts != gate.experts:
        raise ConfigError(f"the student is over {state.gate.experts} experts; the gate over {gate.experts}")
    joined = Joined.of([dataclasses.replace(one, features=_tokens(one.features)) for one in sets])
    shares_N, one_set_N = train.mass_B / train.mass_B.sum(), torch.zeros_like(joined.set_N)
    joined = dataclasses.replace(joined, weights_N=shares_N, set_N=one_set_N)
    # With an enumerated support nothing is unknown, and the ridge of a prior has no place.
    ridge = 0.0 if train.exact else config.ridge * len(sets) / len(train.mass_B)
    step, measure = partial(_step, samples=joined, ridge=ridge), partial(_measured, test=test)
    state = run_steps(state, until, config.evaluate_every_steps, step, measure, on_progress, on_stop)
    kept = state.gate.replaced(state.best).to("cpu", torch.float64)
    held_kl, held_error = _kl(test, kept)
    if held_kl < -max(5.0 * held_error, 1e-6):
        log.warning(
            f"KL to the gated model is {held_kl:.4g} with standard error {held_error:.2g}: below 0, so the samples are "
            "not what the experts would write by these scores; draw them at temperature 1, uncut, and score them as "
            "they were drawn"
        )
    taken = max((line.step for line in state.history if line.best), default=0)
    return DistilResult(kept, _kl(train, kept)[0], held_kl, held_error, taken, state.history, state)


def log_student(student: CausalGate, features: Features) -> Tensor:
    """log s(x) of B sequences, nats."""
    logp_BTE = features.get("tokens", student.config.gate)
    return log_model(student, logp_BTE[:, :0].sum(dim=1), features)


def _tokens(features: Features) -> Features:
    """The scores of tokens alone."""
    return Features(logp_BTE=features.logp_BTE, mask_BT=features.mask_BT)


def _student(wanted: Any, gate: Gate, train: Weighted, config: DistilConfig) -> CausalGate:
    """The student before its first step, in the float type of the steps."""
    dtype = torch.float32 if config.precision == "float32" else torch.float64
    section = wanted.config if isinstance(wanted, Gate) else gate_config(wanted or "prefix", "student")
    if not gates[section.gate].causal:
        raise ConfigError(f"gate {section.gate!r} is not causal and cannot be a student; try 'prefix'")
    if not isinstance(wanted, Gate):
        few = torch.arange(_STANDARDISED_ON)
        seen = Features.joined([_tokens(one.features.rows(few[: len(one)])) for one in train.samples])
        wanted = init_gate(section, gate.experts, seen, config.seed)
        if not gate.causal:
            wanted = wanted.with_prior(_responsibilities(gate, train))
    student: CausalGate = wanted.to("cpu", dtype)
    return student


def _responsibilities(gate: Gate, train: Weighted) -> Tensor:
    """E_{x ~ q_k}[g(x, k)] / Z of each expert."""
    with torch.no_grad():
        parts = [one.probability() @ log_gates(gate, one).double()[:, k].exp() for k, one in enumerate(train.samples)]
    shares_E = torch.stack(parts)
    return shares_E / shares_E.sum()


def _step(state: DistilState, *, samples: Joined, ridge: float) -> DistilState:
    """One step of Adam on the student, on sequences that are a function of seed and step."""
    config, gate = state.config, state.gate
    if config.batch_sequences is not None:
        samples = samples.drawn(config.batch_sequences, np.random.default_rng([config.seed, state.step]))
    theta = {name: gate.tensors[name].detach().requires_grad_(True) for name in gate.learned}
    moving = gate.replaced(theta)
    if isinstance(moving, PrefixGate) and moving.top is not None:
        logs_B = log_sparse(moving, samples.features)
    else:
        logs_B = log_student(moving, samples.features)
    loss = -(samples.weights_N.to(logs_B.dtype) * logs_B).sum()
    found = torch.autograd.grad(loss, list(theta.values()), allow_unused=True, materialize_grads=True)
    gradients = {
        name: gradient + ridge * theta[name].detach() if name in gate.shrunk else gradient
        for name, gradient in zip(theta, found, strict=True)
    }
    if not math.isfinite(float(loss.detach())) or not all(bool(each.isfinite().all()) for each in gradients.values()):
        raise NumericsError(
            f"the student's loss became {float(loss.detach())} at step {state.step}, or its gradient no number; lower "
            f"lr (now {config.lr:g}), or look for sequences no expert can write"
        )
    fraction, cosine = config.final_lr_fraction, 0.5 * (1.0 + math.cos(math.pi * state.step / config.steps))
    lr = config.lr * (fraction + (1.0 - fraction) * cosine)
    moved, moments = adam_step(gate, gradients, state.moments, step=state.step, lr=lr)
    return dataclasses.replace(state, step=state.step + 1, gate=gate.replaced(moved), moments=moments)


def _measured(state: DistilState, *, test: Weighted) -> DistilState:
    """The state with the student measured on held-out samples, and kept if it is the best so far."""
    kl, error = _kl(test, state.gate)
    better = kl < state.best_kl
    return dataclasses.replace(
        state,
        best={name: state.gate.tensors[name] for name in state.gate.learned} if better else state.best,
        best_kl=kl if better else state.best_kl,
        stale=0 if better else state.stale + 1,
        history=(*state.history, DistilProgress(state.step, kl, error, better)),
    )


@torch.no_grad()
def _kl(data: Weighted, student: CausalGate) -> tuple[float, float]:
    """See `student_kl`."""
    wide = student.to("cpu", torch.float64)
    return model_kl(data, torch.cat([log_models(wide, one) for one in data.samples]))


def model_kl(data: Weighted, logs_B: Tensor) -> tuple[float, float]:
    """KL(pi_g / Z || s) of any model, nats per sequence, and its standard error; see `student_kl`.

    Args:
        data: What `weigh` made of the teacher and samples of the experts.
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
