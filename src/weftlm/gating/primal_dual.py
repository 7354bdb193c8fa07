"""The robust gate by stochastic primal-dual steps: any gate, any number of sequences, nothing but arrays.

    L(theta, nu, mu) = sum_m nu_m [CE_m(pi_g) - offset_m] + mu (Z_g - 1) + rho / 2 (Z_g - 1)^2

theta goes down by Adam, the mixture nu goes up by exponentiated gradient, mu goes up from 1. The iterates circle the
saddle point; what is returned is their average over the last part of the run, or, where the fit stops at a report
before (`FitState.finished`), over the last part of the steps since the report before that. Cortes, Mohri and Zhong
2026, arXiv:2602.17554; control variates, the two-halves penalty, restricted mixtures and early stopping are choices of
this implementation.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from weftlm.config import Section, differences
from weftlm.errors import CheckpointError, ConfigError, NumericsError
from weftlm.gating.arrays import Floats
from weftlm.gating.config import FitConfig, GateConfig, Unit, gate_config, gates
from weftlm.gating.gate import Features, Gate, init_gate
from weftlm.gating.mixtures import Box
from weftlm.gating.problem import Evaluation, Offsets, Problem, dual_value, evaluate, fits, log_model, make_problem
from weftlm.gating.sequences import Joined
from weftlm.gating.state import GateState, adam_step, run_steps
from weftlm.threads import follow_load

Kind = Literal["exact", "estimate"]

PLATEAU = 3
"""Reports without progress after which a fit stops whose gap is not measured."""
_FEW = 64
"""Sequences of each domain that a causal gate is made for."""

Z_NORMAL = 1.959963984540054
"""Two-sided 95 % of the normal distribution."""


@dataclass(frozen=True)
class Progress:
    """One line of a fit's history; plain numbers.

    Attributes:
        step: Steps taken.
        worst: Worst case over the mixtures, nats.
        worst_domain: Name of the domain of largest value.
        values: Value of each domain, nats.
        lam: Mixture, one weight per domain.
        z: Z of the gate on the samples of the fit.
        mu: Multiplier of Z - 1.
        gap: Worst case minus the value against `lam`: the adversary's share of the duality gap, without the gate's.
        duality_gap: Worst case minus the best a gate can do against `lam` (`best_response`); None where the adversary's
            share or Z - 1 is above `gap_tolerance` already, or it is not measured.
    """

    step: int
    worst: float
    worst_domain: str
    values: tuple[float, ...]
    lam: tuple[float, ...]
    z: float
    mu: float
    gap: float
    duality_gap: float | None = None


@dataclass(frozen=True, eq=False)
class FitState(GateState):
    """A fit under way.

    Attributes:
        log_nu_M: Log of the mixture over the extreme mixtures.
        mu: Multiplier of Z - 1.
        averaged: Steps in the averages, which begin again with every report and with the last part of the run.
        mean: Average of theta.
        mean_nu_M: Average of nu.
        mean_mu: Average of mu.
    """

    config: FitConfig
    log_nu_M: Floats
    mu: float
    averaged: int
    mean: Mapping[str, Tensor]
    mean_nu_M: Floats
    mean_mu: float

    kind: ClassVar[str] = "fit of a gate"
    Config: ClassVar[type[Section]] = FitConfig
    Line: ClassVar[type] = Progress

    @property
    def finished(self) -> bool:
        """Whether the fit stops at this report.

        Its duality gap is within `gap_tolerance`; or, where no gap is measured (`best_response_steps` 0), the last
        three reports did not lower the worst case by the tolerance.
        """
        tolerance, history = self.config.gap_tolerance, self.history
        if tolerance is None or not history or history[-1].step != self.step:
            return False
        if history[-1].duality_gap is not None:
            return bool(history[-1].duality_gap <= tolerance)
        if self.config.best_response_steps or len(history) <= PLATEAU:
            return False
        before, last = (min(line.worst for line in part) for part in (history[:-PLATEAU], history[-PLATEAU:]))
        return bool(last > before - tolerance)

    def answer(self) -> tuple[Gate, Floats, float]:
        """Averaged gate, nu and mu; the present ones where no average has begun."""
        if self.averaged == 0:
            return self.gate, np.exp(self.log_nu_M), self.mu
        return self.gate.replaced(self.mean), self.mean_nu_M, self.mean_mu


@dataclass(frozen=True, eq=False)
class FitResult:
    """A fitted gate. Values are nats of `unit`, of the normalised model pi_g / Z, offsets taken off.

    They are measured on the sequences of the fit, with the Z reported here; `certify` measures on others.

    Attributes:
        gate: Gate averaged over the last part of the run.
        lam: Averaged mixture of domains, D: the worst mixture there is, up to the gap.
        nu: The same over the extreme mixtures, M; equal to `lam` where all mixtures are allowed.
        mu: Averaged multiplier of Z - 1, in nats per sequence.
        z: Z of the gate; exactly 1 for causal gates.
        z_ci: 95 % normal interval of Z; a point where it is exact.
        z_source: Where Z was measured: "exact", "held-out samples" or "samples of the fit" (optimistic).
        values: Value of each domain, D.
        worst: Worst case over the mixtures.
        worst_domain: Number of the domain of largest value.
        gap: Worst case minus the best a gate can do against `lam`, both with the Z of the fit's samples; NaN where it
            was not asked for.
        gap_kind: "exact" (closed form over all gates with Z = 1: `worst` is above their optimum by at most the gap) or
            "estimate" (steps of the same kind of gate, which may fall short of its best).
        unit: "sequence" or "token".
        history: `Progress` every so many steps.
        state: State to continue from.
    """

    gate: Gate
    lam: Floats
    nu: Floats
    mu: float
    z: float
    z_ci: tuple[float, float]
    z_source: Literal["exact", "held-out samples", "samples of the fit"]
    values: Floats
    worst: float
    worst_domain: int
    gap: float
    gap_kind: Kind
    unit: Unit
    history: tuple[Progress, ...]
    state: FitState

    @property
    def value(self) -> float:
        """`worst`, under the name the exact programme uses."""
        return self.worst


def fit_robust_gate(
    domains: Any,
    samples: Any = None,
    *,
    gate: str | Mapping[str, Any] | GateConfig | Gate | None = None,
    config: FitConfig | None = None,
    offsets: Offsets | Any | None = None,
    mixtures: Box | Any | None = None,
    own_experts: Sequence[int] | None = None,
    held_out_samples: Any = None,
    state: FitState | None = None,
    until: int | None = None,
    on_progress: Callable[[Progress, FitState], None] | None = None,
    on_stop: Callable[[FitState], None] | None = None,
) -> FitResult:
    """Fit the gate that is best against the worst mixture of domains.

        min over theta, max over mixtures and mu of   L(theta, nu, mu)        (top of this file)

    Domains' losses in a mini-batch are measured as means of max_k log q_k(x) - log pi_g(x), whose spread is small, plus
    the mean of - max_k log q_k(x) over all data. The squared penalty is (Z_a - 1)(Z_b - 1) over two halves of the
    samples, unbiased. With unit "token" the problem inside is scaled by the mean sequence length, so that one set of
    learning rates serves both units.

    Args:
        domains: One `ScoredSequences` per domain (or a mapping by name), or P, D x X, of an enumerated problem.
        samples: One `ScoredSequences` of draws per expert, for Z; Q, E x X, with P. None for causal gates.
        gate: Name, section or mapping of a registered gate, or a gate to go on from. None: "tabular" where enumerated,
            else "linear".
        config: Settings of the fit; None: the defaults.
        offsets, mixtures, own_experts: As in `make_problem`.
        held_out_samples: Further draws of each expert, on which Z is measured in the end.
        state: State to continue from; data, gate and config must be those of the interrupted fit.
        until: Steps in all after which to stop, to continue later from `result.state`.
        on_progress: Called with each line of the history and the state to continue from.
        on_stop: Called with that state where the process is asked to stop, which it then does.
    Returns:
        The averaged gate and its figures.
    Raises:
        ConfigError, DataError, NumericsError: as `make_problem`; also where a loss stops being finite.
        CheckpointError: the state is of another fit.
    """
    config = config or FitConfig()
    given: dict[str, Any] = {
        "offsets": offsets, "mixtures": mixtures, "unit": config.unit, "own_experts": own_experts
    }  # fmt: skip
    problem = make_problem(domains, samples, **given)
    held_out = None
    if held_out_samples is not None and problem.support is None:
        held_out = make_problem(domains, held_out_samples, **given)
    state = _start(problem, gate, config) if state is None else _checked(state, problem, config)
    fits(state.gate, problem)
    draw = _Draw(problem, state.gate, config)

    def report(now: FitState) -> FitState:
        line = _progress(now, problem)
        now = dataclasses.replace(now, history=(*now.history, line))
        if on_progress is not None:
            on_progress(line, now)
        return now

    end = config.steps if until is None else min(until, config.steps)
    every = config.report_every_steps
    state = run_steps(state, end, every, lambda now: _step(now, draw, problem), report, on_stop)
    return _result(state, problem, held_out)


def _start(problem: Problem, gate: Any, config: FitConfig) -> FitState:
    if not isinstance(gate, Gate):
        wanted = gate_config(gate or ("linear" if problem.support is None else "tabular"))
        seen = _seen(problem, gates[wanted.gate].causal)
        gate = init_gate(wanted, problem.experts, seen, config.seed)
    gate = gate.to("cpu", torch.float64)
    log_nu_M = problem.adversary.start()
    return FitState(config, 0, gate, {}, (), log_nu_M, 1.0, 0, {}, np.zeros_like(log_nu_M), 0.0)


def _seen(problem: Problem, causal: bool) -> Features:
    """What a gate is made for: features of all sequences without their tokens; a few with tokens for a causal one."""
    if causal:
        few = [one.features.rows(torch.arange(min(len(one), _FEW))) for one in problem.domains]
        return Features.joined(few)
    sets = (*problem.domains, *problem.samples)
    return Features.joined([dataclasses.replace(one.features, logp_BTE=None, mask_BT=None) for one in sets])


def _checked(state: FitState, problem: Problem, config: FitConfig) -> FitState:
    if found := differences(state.config.model_dump(), config.model_dump()):
        raise CheckpointError(f"the state is of a fit with another config ({found}); start afresh")
    if len(state.log_nu_M) != len(problem.adversary.weights_MD):
        raise CheckpointError(
            f"the state mixes {len(state.log_nu_M)} domains or mixtures; the data has "
            f"{len(problem.adversary.weights_MD)}; start afresh"
        )
    return state


class _Draw:
    """The domains' sequences and the experts' samples of a step, a pure function of seed and step.

    Attributes:
        base_D: Mean over each domain of - max_k log q_k(x), minus the offset, inside.
    """

    def __init__(self, problem: Problem, gate: Gate, config: FitConfig) -> None:
        self._seed, self._sequences = config.seed, config.batch_sequences
        self._draws = config.batch_samples or config.batch_sequences
        if self._draws == 1:
            raise ConfigError("batch_samples is 1; the penalty on Z needs two halves: 2 or more")
        self._domains = Joined.of(problem.domains)
        self._samples = Joined.of(problem.samples) if problem.samples and not gate.causal else None
        means = [-float(one.probability() @ one.logq_NE.amax(dim=1).to(torch.float64)) for one in problem.domains]
        self.base_D: Floats = problem.scale_D * np.array(means) - problem.offsets_D

    def __call__(self, step: int) -> tuple[Joined, Joined | None]:
        rng, domains, samples = np.random.default_rng([self._seed, step]), self._domains, self._samples
        if self._sequences is not None:
            domains = domains.drawn(self._sequences, rng)
        if self._draws is not None and samples is not None:
            samples = samples.drawn(self._draws, rng)
        return domains, samples

    def losses(self, gate: Gate, step: int, scale_D: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Excess of each domain over its control max_k log q_k, inside; Z and the product of Z - 1 over two halves."""
        batch, sampled = self(step)
        excess_B = batch.logq_NE.amax(dim=1) - log_model(gate, batch.logq_NE, batch.features)
        excess_D = torch.zeros_like(scale_D).index_add(0, batch.set_N, batch.weights_N * excess_B)
        if sampled is None:
            one = torch.ones((), dtype=torch.float64)
            return scale_D * excess_D, one, torch.zeros_like(one)
        g_S = gate.log_weights(sampled.features).gather(1, sampled.set_N[:, None])[:, 0].exp()
        z = (sampled.weights_N * g_S).sum()
        if self._draws is None:
            return scale_D * excess_D, z, (z - 1.0) ** 2
        g_ES = g_S.view(-1, self._draws)
        halves = [g_ES[:, part::2].mean(dim=1).sum() - 1.0 for part in (0, 1)]
        return scale_D * excess_D, z, halves[0] * halves[1]


def _ridge(config: FitConfig, problem: Problem) -> float:
    """Weight of the sum of squares; 0 where the problem is enumerated, for then nothing is unknown."""
    if problem.support is not None:
        return 0.0
    return config.ridge * len(problem.domains) / sum(len(one) for one in problem.domains)


def _descend(
    state: FitState, draw: _Draw, problem: Problem, nu_M: Floats, lr: float
) -> tuple[dict[str, Tensor], dict[str, Tensor], Floats, float]:
    """One step of Adam on theta: new tensors and moments; the domains' excess and Z before it."""
    config, scale_D = state.config, torch.from_numpy(problem.scale_D)
    theta = {name: state.gate.tensors[name].detach().requires_grad_(True) for name in state.gate.learned}
    excess_D, z, squared = draw.losses(state.gate.replaced(theta), state.step, scale_D)
    loss = torch.from_numpy(problem.adversary.lam(nu_M)) @ excess_D + state.mu * (z - 1.0) + 0.5 * config.rho * squared
    loss = loss + 0.5 * _ridge(config, problem) * sum((theta[name] ** 2).sum() for name in state.gate.shrunk)
    if not math.isfinite(float(loss.detach())):
        raise NumericsError(
            f"the loss of the gate became {float(loss.detach())} at step {state.step}; lower lr (now {lr:g}), or look "
            "for broken scores"
        )
    gradients = dict(zip(theta, torch.autograd.grad(loss, list(theta.values())), strict=True)) if theta else {}
    moved, moments = adam_step(state.gate, gradients, state.moments, step=state.step, lr=lr)
    return moved, moments, excess_D.detach().numpy(), float(z.detach())


def _step(state: FitState, draw: _Draw, problem: Problem) -> FitState:
    config, nu_M = state.config, np.exp(state.log_nu_M)
    averaging_from = config.steps - math.ceil(config.final_fraction * config.steps)
    final = state.step >= averaging_from
    moved, moments, excess_D, z = _descend(state, draw, problem, nu_M, config.final_lr if final else config.lr)
    log_nu_M = problem.adversary.step(state.log_nu_M, config.eta * problem.payoffs(excess_D + draw.base_D))
    mu = state.mu + config.mu_lr * (z - 1.0)
    every = config.report_every_steps
    begin = averaging_from if final else state.step // every * every + every - math.ceil(config.final_fraction * every)
    averaged = max(0, state.step + 1 - begin)
    means = state.mean, state.mean_nu_M, state.mean_mu
    if averaged == 1:
        means = moved, np.exp(log_nu_M), mu
    elif averaged:
        part = 1.0 / averaged
        means = (
            {name: mean + part * (moved[name] - mean) for name, mean in state.mean.items()},
            state.mean_nu_M + part * (np.exp(log_nu_M) - state.mean_nu_M),
            state.mean_mu + part * (mu - state.mean_mu),
        )
    gate, (mean, mean_nu_M, mean_mu) = state.gate.replaced(moved), means
    return FitState(
        config, state.step + 1, gate, moments, state.history, log_nu_M, mu, averaged, mean, mean_nu_M, mean_mu
    )


def _progress(state: FitState, problem: Problem) -> Progress:
    gate, nu_M, mu = state.answer()
    config, found = state.config, evaluate(gate, problem)
    gap, duality_gap = found.worst - against(found, problem, nu_M), None
    measured = config.best_response_steps > 0 or _kind(gate, problem) == "exact"
    if measured and config.gap_tolerance is not None and max(gap, abs(found.z - 1.0)) <= config.gap_tolerance:
        duality_gap = found.worst - best_response(gate, problem, nu_M, config, mu=mu)[0]
    return Progress(
        step=state.step,
        worst=found.worst,
        worst_domain=problem.names[found.worst_domain],
        values=tuple((found.values_D * problem.report).tolist()),
        lam=tuple(problem.adversary.lam(nu_M).tolist()),
        z=found.z,
        mu=mu,
        gap=gap,
        duality_gap=duality_gap,
    )


def against(found: Evaluation, problem: Problem, nu_M: Floats) -> float:
    """Value of an evaluated gate against a fixed mixture, reported nats."""
    return float(nu_M @ problem.payoffs(found.values_D)) * problem.report


def best_response(
    gate: Gate, problem: Problem, nu_M: Floats, config: FitConfig, *, mu: float = 1.0
) -> tuple[float, Kind]:
    """The least a gate can lose against a fixed mixture, reported nats: the lower end of the duality gap.

    "exact": over all sequence-level gates with Z = 1, in closed form (`dual_value`), for a tabular gate on an
    enumerated problem; the optimum over them is not below it. "estimate": `config.best_response_steps` steps of theta
    and mu from the given gate with the mixture held still, the second half averaged, at `config.final_lr`; the better
    of the gates before and after. That may fall short of the best gate of its kind, and so understate the gap.

    Raises:
        NumericsError: a loss stops being finite.
    """
    if _kind(gate, problem) == "exact":
        return dual_value(problem, nu_M), "exact"
    start = against(evaluate(gate, problem), problem, nu_M)
    if config.best_response_steps == 0 or not gate.learned:
        return start, "estimate"
    state = dataclasses.replace(_start(problem, gate, config), mu=mu)
    draw, steps = _Draw(problem, gate, config), config.best_response_steps
    mean: dict[str, Tensor] = {}
    for step in range(steps):
        follow_load()
        moved, moments, _, z = _descend(state, draw, problem, nu_M, config.final_lr)
        state = dataclasses.replace(
            state,
            step=step + 1,
            gate=state.gate.replaced(moved),
            moments=moments,
            mu=state.mu + config.mu_lr * (z - 1.0),
        )
        taken = step + 1 - steps // 2
        if taken >= 1:
            mean = {name: mean.get(name, 0.0) + (each - mean.get(name, 0.0)) / taken for name, each in moved.items()}
    after = against(evaluate(gate.replaced(mean), problem), problem, nu_M)
    return min(start, after), "estimate"


def _kind(gate: Gate, problem: Problem) -> Kind:
    """How `best_response` knows."""
    return "exact" if problem.support is not None and "points" in gate.needs else "estimate"


def interval(z: float, error: float) -> tuple[float, float]:
    """95 % normal interval."""
    return z - Z_NORMAL * error, z + Z_NORMAL * error


def _result(state: FitState, problem: Problem, held_out: Problem | None) -> FitResult:
    gate, nu_M, mu = state.answer()
    found, config = evaluate(gate, problem), state.config
    gap = state.history[-1].duality_gap if state.history and state.history[-1].step == state.step else None
    if gap is None and (config.best_response_steps or problem.support is not None):
        gap = found.worst - best_response(gate, problem, nu_M, config, mu=mu)[0]
    source: Literal["exact", "held-out samples", "samples of the fit"] = "samples of the fit"
    if gate.causal or problem.support is not None:
        source = "exact"
    elif held_out is not None:
        source = "held-out samples"
        found = evaluate(gate, held_out)
    return FitResult(
        gate=gate,
        lam=problem.adversary.lam(nu_M),
        nu=nu_M,
        mu=mu,
        z=found.z,
        z_ci=interval(found.z, found.z_error),
        z_source=source,
        values=found.values_D * problem.report,
        worst=found.worst,
        worst_domain=found.worst_domain,
        gap=math.nan if gap is None else gap,
        gap_kind=_kind(gate, problem),
        unit=problem.unit,
        history=state.history,
        state=state,
    )
