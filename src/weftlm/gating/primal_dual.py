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
from functools import partial
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from weftlm.config import differences
from weftlm.errors import CheckpointError, ConfigError, NumericsError
from weftlm.gating.arrays import Floats
from weftlm.gating.config import FitConfig, GateConfig, Unit, gate_config, gates
from weftlm.gating.gate import Features, Gate, init_gate
from weftlm.gating.mixtures import Box
from weftlm.gating.problem import Offsets, Problem, dual_value, evaluate, fits, log_model, make_problem
from weftlm.gating.sequences import Joined
from weftlm.gating.state import GateState, adam_step, run_steps
from weftlm.threads import follow_load

Kind = Literal["exact", "estimate"]

PLATEAU = 3
"""Reports without progress after which a fit stops whose gap is not measured."""
_FEW = 64
"""Sequences of each domain that a causal gate is made for."""


@dataclass(frozen=True)
class Progress:
    """One line of a fit's history; plain numbers.

    Attributes:
        step: Steps taken.
        worst: Worst case over the mixtures, nats.
        worst_domain: Name of the domain of largest value.
        lam: Mixture, one weight per domain.
        z: Z of the gate on the samples of the fit.
        gap: Worst case minus the value against `lam`: the adversary's share of the duality gap, without the gate's.
        duality_gap: Worst case minus the best a gate can do against `lam` (`best_response`); None where the adversary's
            share or Z - 1 is above `gap_tolerance` already, or it is not measured.
    """

    step: int
    worst: float
    worst_domain: str
    lam: tuple[float, ...]
    z: float
    gap: float
    duality_gap: float | None = None


@dataclass(frozen=True, eq=False)
class FitState(GateState):
    """A fit under way.

    Attributes:
        play: `log_nu_M`, log of the mixture over the extreme mixtures, and `mu`, multiplier of Z - 1.
        averaged: Steps in the averages, which begin again with every report and with the last part of the run.
        mean: Averages of theta by name, of `nu_M` and of `mu`.
    """

    config: FitConfig
    history: tuple[Progress, ...]
    play: Mapping[str, Tensor]
    averaged: int
    mean: Mapping[str, Tensor]

    kind: ClassVar[str] = "fit of a gate"

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
        mean = self.mean if self.averaged else _theta(self.gate, self.play)
        gate = self.gate.replaced({name: mean[name] for name in self.gate.learned})
        return gate, mean["nu_M"].numpy(), float(mean["mu"])


def _theta(gate: Gate, play: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What is averaged, as it is now."""
    theta = {name: gate.tensors[name] for name in gate.learned}
    return {**theta, "nu_M": play["log_nu_M"].exp(), "mu": play["mu"]}


@dataclass(frozen=True, eq=False)
class FitResult:
    """A fitted gate. Values are nats of `unit`, of the normalised model pi_g / Z, offsets taken off.

    They are measured on the sequences and samples of the fit, which flatter the gate; `certify` measures on others.

    Attributes:
        gate: Gate averaged over the last part of the run.
        lam: Averaged mixture of domains, D: the worst mixture there is, up to the gap.
        nu: The same over the extreme mixtures, M; equal to `lam` where all mixtures are allowed.
        mu: Averaged multiplier of Z - 1, in nats per sequence.
        z: Z of the gate; exactly 1 for causal gates.
        values: Value of each domain, D.
        worst: Worst case over the mixtures.
        worst_domain: Number of the domain of largest value.
        gap: Worst case minus the best a gate can do against `lam`; NaN where it was not asked for.
        gap_kind: "exact" (closed form over all gates with Z = 1: `worst` is above their optimum by at most the gap) or
            "estimate" (steps of the same kind of gate, which may fall short of its best).
        unit: "sequence" or "token".
        state: State to continue from.
    """

    gate: Gate
    lam: Floats
    nu: Floats
    mu: float
    z: float
    values: Floats
    worst: float
    worst_domain: int
    gap: float
    gap_kind: Kind
    unit: Unit
    state: FitState

    @property
    def history(self) -> tuple[Progress, ...]:
        """`Progress` every so many steps."""
        return self.state.history


def fit_robust_gate(
    domains: Any,
    samples: Any = None,
    *,
    gate: str | Mapping[str, Any] | GateConfig | Gate | None = None,
    config: FitConfig | None = None,
    offsets: Offsets | Any | None = None,
    mixtures: Box | Any | None = None,
    own_experts: Sequence[int] | None = None,
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
    problem = make_problem(
        domains, samples, offsets=offsets, mixtures=mixtures, unit=config.unit, own_experts=own_experts
    )
    state = _start(problem, gate, config) if state is None else _checked(state, problem, config)
    fits(state.gate, problem)
    step = partial(_step, draw=_Draw(problem, state.gate, config), problem=problem)
    every, report = config.report_every_steps, partial(_reported, problem=problem)
    return _result(run_steps(state, until, every, step, report, on_progress, on_stop), problem)


def _start(problem: Problem, gate: Any, config: FitConfig) -> FitState:
    if not isinstance(gate, Gate):
        wanted = gate_config(gate or ("linear" if problem.support is None else "tabular"))
        if gates[wanted.gate].causal:
            sets = [one.rows(torch.arange(min(len(one), _FEW))) for one in problem.domains]
        else:
            sets = [one.without_tokens() for one in (*problem.domains, *problem.samples)]
        gate = init_gate(wanted, problem.experts, Features.joined([one.features for one in sets]), config.seed)
    play = {"log_nu_M": torch.from_numpy(problem.adversary.start()), "mu": torch.ones((), dtype=torch.float64)}
    return FitState(config, 0, gate.to("cpu", torch.float64), {}, (), play, 0, {})


def _checked(state: FitState, problem: Problem, config: FitConfig) -> FitState:
    if found := differences(state.config.model_dump(), config.model_dump()):
        raise CheckpointError(f"the state is of a fit with another config ({found}); start afresh")
    if (mixed := len(state.play["log_nu_M"])) != (wanted := len(problem.adversary.weights_MD)):
        raise CheckpointError(f"the state mixes {mixed} domains or mixtures; the data has {wanted}; start afresh")
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

    def losses(self, gate: Gate, step: int, scale_D: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Excess of each domain over its control max_k log q_k, inside; Z and the product of Z - 1 over two halves."""
        rng, batch, sampled = np.random.default_rng([self._seed, step]), self._domains, self._samples
        if self._sequences is not None:
            batch = batch.drawn(self._sequences, rng)
        if self._draws is not None and sampled is not None:
            sampled = sampled.drawn(self._draws, rng)
        excess_B = batch.logq_NE.amax(dim=1) - log_model(gate, batch.logq_NE, batch.features)
        excess_D = scale_D * torch.zeros_like(scale_D).index_add(0, batch.set_N, batch.weights_N * excess_B)
        if sampled is None:
            one = torch.ones((), dtype=torch.float64)
            return excess_D, one, torch.zeros_like(one)
        g_S = gate.log_weights(sampled.features).gather(1, sampled.set_N[:, None])[:, 0].exp()
        z = (sampled.weights_N * g_S).sum()
        if self._draws is None:
            return excess_D, z, (z - 1.0) ** 2
        g_ES = g_S.view(-1, self._draws)
        halves = [g_ES[:, part::2].mean(dim=1).sum() - 1.0 for part in (0, 1)]
        return excess_D, z, halves[0] * halves[1]


def _ridge(config: FitConfig, problem: Problem) -> float:
    """Weight of the sum of squares; 0 where the problem is enumerated, for then nothing is unknown."""
    if problem.support is not None:
        return 0.0
    return config.ridge * len(problem.domains) / sum(len(one) for one in problem.domains)


def _descend(state: FitState, draw: _Draw, problem: Problem, nu_M: Floats, lr: float) -> tuple[FitState, Floats]:
    """One step of Adam on theta and of ascent on mu, the mixture held still; the domains' excess before it."""
    config, scale_D, mu = state.config, torch.from_numpy(problem.scale_D), state.play["mu"]
    theta = {name: state.gate.tensors[name].detach().requires_grad_(True) for name in state.gate.learned}
    excess_D, z, squared = draw.losses(state.gate.replaced(theta), state.step, scale_D)
    loss = torch.from_numpy(problem.adversary.lam(nu_M)) @ excess_D + mu * (z - 1.0) + 0.5 * config.rho * squared
    loss = loss + 0.5 * _ridge(config, problem) * sum((theta[name] ** 2).sum() for name in state.gate.shrunk)
    if not math.isfinite(float(loss.detach())):
        raise NumericsError(
            f"the loss of the gate became {float(loss.detach())} at step {state.step}; lower lr (now {lr:g}), or look "
            "for broken scores"
        )
    gradients = dict(zip(theta, torch.autograd.grad(loss, list(theta.values())), strict=True)) if theta else {}
    moved, moments = adam_step(state.gate, gradients, state.moments, step=state.step, lr=lr)
    play = {**state.play, "mu": mu + config.mu_lr * (z.detach() - 1.0)}
    gate, step = state.gate.replaced(moved), state.step + 1
    now = dataclasses.replace(state, step=step, gate=gate, moments=moments, play=play)
    return now, excess_D.detach().numpy()


def _step(state: FitState, *, draw: _Draw, problem: Problem) -> FitState:
    """One step of theta, nu and mu, and their averages."""
    config, log_nu_M = state.config, state.play["log_nu_M"].numpy()
    averaging_from = config.steps - math.ceil(config.final_fraction * config.steps)
    final, every = state.step >= averaging_from, config.report_every_steps
    begin = averaging_from if final else state.step // every * every + every - math.ceil(config.final_fraction * every)
    now, excess_D = _descend(state, draw, problem, np.exp(log_nu_M), config.final_lr if final else config.lr)
    log_nu_M = problem.adversary.step(log_nu_M, config.eta * problem.payoffs(excess_D + draw.base_D))
    play = {**now.play, "log_nu_M": torch.from_numpy(log_nu_M)}
    averaged = max(0, now.step - begin)
    mean = averages(state.mean, _theta(now.gate, play), averaged)
    return dataclasses.replace(now, play=play, averaged=averaged, mean=mean)


def averages(mean: Mapping[str, Tensor], now: Mapping[str, Tensor], count: int) -> Mapping[str, Tensor]:
    """Running means with one more value, the `count`th; as they were for 0, begun again for 1."""
    if count <= 1:
        return now if count else mean
    return {name: each + (now[name] - each) / count for name, each in mean.items()}


def _reported(state: FitState, *, problem: Problem) -> FitState:
    """The state with a measurement of its answer on all data."""
    gate, nu_M, mu = state.answer()
    config, found = state.config, evaluate(gate, problem)
    gap, duality_gap = found.worst - problem.against(found.values_D, nu_M), None
    measured = config.best_response_steps > 0 or _kind(gate, problem) == "exact"
    if measured and config.gap_tolerance is not None and max(gap, abs(found.z - 1.0)) <= config.gap_tolerance:
        duality_gap = found.worst - best_response(gate, problem, nu_M, config, mu=mu)[0]
    lam, worst_domain = tuple(problem.adversary.lam(nu_M).tolist()), problem.names[found.worst_domain]
    line = Progress(state.step, found.worst, worst_domain, lam, found.z, gap, duality_gap)
    return dataclasses.replace(state, history=(*state.history, line))


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
    least = problem.against(evaluate(gate, problem).values_D, nu_M)
    steps = config.best_response_steps if gate.learned else 0
    if steps == 0:
        return least, "estimate"
    state, draw = _start(problem, gate, config), _Draw(problem, gate, config)
    state = dataclasses.replace(state, play={**state.play, "mu": torch.tensor(mu, dtype=torch.float64)})
    mean: Mapping[str, Tensor] = {}
    for step in range(steps):
        follow_load()
        state, _ = _descend(state, draw, problem, nu_M, config.final_lr)
        mean = averages(mean, {name: state.gate.tensors[name] for name in gate.learned}, max(0, step + 1 - steps // 2))
    after = problem.against(evaluate(gate.replaced(mean), problem).values_D, nu_M)
    return min(least, after), "estimate"


def _kind(gate: Gate, problem: Problem) -> Kind:
    """How `best_response` knows."""
    return "exact" if problem.support is not None and "points" in gate.needs else "estimate"


def _result(state: FitState, problem: Problem) -> FitResult:
    gate, nu_M, mu = state.answer()
    found, config = evaluate(gate, problem), state.config
    gap = next((line.duality_gap for line in state.history[-1:] if line.step == state.step), None)
    if gap is None and (config.best_response_steps or problem.support is not None):
        gap = found.worst - best_response(gate, problem, nu_M, config, mu=mu)[0]
    return FitResult(
        gate, problem.adversary.lam(nu_M), nu_M, mu, found.z, found.values_D * problem.report, found.worst,
        found.worst_domain, math.nan if gap is None else gap, _kind(gate, problem), problem.unit, state,
    )  # fmt: skip
