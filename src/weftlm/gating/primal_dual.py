"""The robust gate by stochastic primal-dual steps: any gate, any number of sequences, nothing but arrays.

    L(theta, nu, mu) = sum_m nu_m [CE_m(pi_g) - offset_m] + mu (Z_g - 1) + rho / 2 (Z_g - 1)^2

theta goes down by Adam, the mixture nu goes up by exponentiated gradient, mu goes up from 1. The iterates circle the
saddle point; what is returned is their average over the last part of the run, or, where the duality gap of the average
before a report is within `gap_tolerance` already, that average, and the fit stops there. Cortes, Mohri and Zhong 2026,
arXiv:2602.17554; control variates, the two-halves penalty, restricted mixtures and early stopping are choices of this
implementation.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from weftlm import interrupt
from weftlm.errors import CheckpointError, ConfigError, NumericsError, reason
from weftlm.gating.adam import Moments, adam_step
from weftlm.gating.arrays import Floats
from weftlm.gating.config import FitConfig, GateConfig, Unit, gate_config, gates
from weftlm.gating.files import joined, named, read_tensors, write_tensors
from weftlm.gating.gate import Features, Gate, init_gate
from weftlm.gating.mixtures import MixtureSet
from weftlm.gating.problem import Evaluation, Offsets, Problem, dual_value, evaluate, fits, log_model, make_problem
from weftlm.gating.sequences import ScoredSequences, prepared
from weftlm.gating.tabular import TabularGate
from weftlm.threads import follow_load

Kind = Literal["exact", "estimate"]

_FEW = 64
"""Sequences of each domain that a causal gate is made for."""

Z_NORMAL = 1.959963984540054
"""Two-sided 95 % of the normal distribution."""


@dataclass(frozen=True)
class Progress:
    """One line of a fit's history; plain numbers.

    Attributes:
        step: steps taken.
        worst: worst case over the mixtures, nats.
        worst_domain: name of the domain of largest value.
        values: of the domains, nats.
        lam: the mixture, one weight per domain.
        z: Z of the gate on the samples of the fit.
        mu: its multiplier.
        gap: worst minus the value against `lam`: the opponent's share of the duality gap, without the gate's.
        duality_gap: worst minus the best a gate can do against `lam` (`best_response`); None where the opponent's share
            or Z - 1 is above `gap_tolerance` already, or no fit may stop early.
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
class FitState:
    """Everything a fit needs to continue as if it had never stopped; mini-batches depend on seed and step alone.

    Attributes:
        config: of the fit.
        step: steps taken.
        gate: theta as it is.
        moments: of Adam.
        log_nu_M: the mixture over the extreme mixtures.
        mu: multiplier of Z.
        averaged: steps in the averages, which begin again with every report and with the last part of the run.
        mean_tensors: average of theta.
        mean_nu_M: average of nu.
        mean_mu: average of mu.
        history: so far.
    """

    config: FitConfig
    step: int
    gate: Gate
    moments: Moments
    log_nu_M: Floats
    mu: float
    averaged: int
    mean_tensors: Mapping[str, Tensor]
    mean_nu_M: Floats
    mean_mu: float
    history: tuple[Progress, ...] = ()

    @property
    def settled(self) -> bool:
        """Whether the fit stops here, its duality gap being within the tolerance."""
        gap, tolerance = self.duality_gap, self.config.gap_tolerance
        return gap is not None and tolerance is not None and gap <= tolerance

    @property
    def duality_gap(self) -> float | None:
        """Of `answer`, where the history holds it for this step."""
        if not self.history or self.history[-1].step != self.step:
            return None
        return self.history[-1].duality_gap

    def answer(self) -> tuple[Gate, Floats, float]:
        """Averaged gate, nu and mu; the present ones where no average has begun."""
        if self.averaged == 0:
            return self.gate, np.exp(self.log_nu_M), self.mu
        return self.gate.replaced(self.mean_tensors), self.mean_nu_M, self.mean_mu

    def save(self, path: str | Path) -> None:
        """Write the state as one safetensors file.

        Raises:
            CheckpointError: the disk is full or not writable.
        """
        moments = {"first": self.moments.first, "second": self.moments.second}
        tensors = joined({"gate": self.gate.tensors, **moments, "mean": self.mean_tensors})
        tensors |= {"log_nu_M": torch.from_numpy(self.log_nu_M), "mean_nu_M": torch.from_numpy(self.mean_nu_M)}
        facts = {
            "config": self.config.model_dump(mode="json"),
            "gate": self.gate.config.model_dump(mode="json"),
            "experts": self.gate.experts,
            "step": self.step,
            "mu": self.mu,
            "averaged": self.averaged,
            "mean_mu": self.mean_mu,
            "history": [dataclasses.asdict(line) for line in self.history],
        }
        write_tensors(Path(path), "fit of a gate", tensors, facts)

    @classmethod
    def load(cls, path: str | Path) -> FitState:
        """Read a state back, exact to the last bit.

        Raises:
            CheckpointError: the file is missing, torn, or of another version.
        """
        tensors, facts = read_tensors(Path(path), "fit of a gate")
        try:
            section, group = gate_config(facts["gate"]), partial(named, tensors)
            return cls(
                config=FitConfig.model_validate(facts["config"]),
                step=int(facts["step"]),
                gate=gates[section.gate](section, int(facts["experts"]), group("gate")),
                moments=Moments(group("first"), group("second")),
                log_nu_M=tensors["log_nu_M"].numpy(),
                mu=float(facts["mu"]),
                averaged=int(facts["averaged"]),
                mean_tensors=group("mean"),
                mean_nu_M=tensors["mean_nu_M"].numpy(),
                mean_mu=float(facts["mean_mu"]),
                history=tuple(
                    Progress(**{**line, "values": tuple(line["values"]), "lam": tuple(line["lam"])})
                    for line in facts["history"]
                ),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{path} holds no fit this version can continue: {reason(error)}") from error


@dataclass(frozen=True, eq=False)
class FitResult:
    """A fitted gate. Values are nats of `unit`, of the normalised model pi_g / Z, offsets taken off.

    They are measured on the sequences of the fit, with the Z reported here; `certify` measures on others.

    Attributes:
        gate: averaged over the last part of the run.
        lam: the averaged mixture of domains, D: the worst mixture there is, up to the gap.
        nu: the same over the extreme mixtures, M; equal to `lam` where all mixtures are allowed.
        mu: averaged multiplier of Z - 1, in nats per sequence.
        z: Z of the gate; exactly 1 for causal gates.
        z_ci: 95 % normal interval of Z; a point where it is exact.
        z_source: where Z was measured: "exact", "held-out samples" or "samples of the fit" (optimistic).
        values: per domain, D.
        worst: worst case over the mixtures.
        worst_domain: number of the domain of largest value.
        gap: worst minus the best a gate can do against `lam`, both with the Z of the fit's samples; NaN where it was
            not asked for.
        gap_kind: "exact" (closed form over all gates with Z = 1: `worst` is above their optimum by at most the gap) or
            "estimate" (steps of the same kind of gate, which may fall short of its best).
        unit: "sequence" or "token".
        history: `Progress` every so many steps.
        state: to continue from.
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
    mixtures: MixtureSet | Any | None = None,
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
        domains: one `ScoredSequences` per domain (or a mapping by name), or P, D x X, of an enumerated problem.
        samples: one `ScoredSequences` of draws per expert, for Z; Q, E x X, with P. None for causal gates.
        gate: name, section or mapping of a registered gate, or a gate to go on from. None: "tabular" where enumerated,
            else "linear".
        config: None: the defaults.
        offsets, mixtures, own_experts: as in `make_problem`.
        held_out_samples: further draws of each expert, on which Z is measured in the end.
        state: continue from here; data, gate and config must be those of the interrupted fit.
        until: stop after so many steps in all, to continue later from `result.state`.
        on_progress: called with each line of the history and the state to continue from.
        on_stop: called with that state where the process is asked to stop, which it then does.
    Returns:
        The averaged gate and what it is worth.
    Raises:
        ConfigError, DataError, NumericsError: as `make_problem`; also where a loss stops being finite.
        CheckpointError: the state is of another fit.
    """
    config = config or FitConfig()
    problem = make_problem(
        domains, samples, offsets=offsets, mixtures=mixtures, unit=config.unit, own_experts=own_experts
    )  # fmt: skip
    held_out = None
    if held_out_samples is not None and problem.support is None:
        held_out = make_problem(
            domains, held_out_samples, offsets=offsets, mixtures=mixtures, unit=config.unit, own_experts=own_experts
        )
    state = _start(problem, gate, config) if state is None else _checked(state, problem, config)
    fits(state.gate, problem)
    problem = dataclasses.replace(problem, domains=prepared(state.gate, problem.domains))
    draw = _Draw(problem, state.gate, config)
    end = config.steps if until is None else min(until, config.steps)
    averaging_from = config.steps - math.ceil(config.final_fraction * config.steps)
    with interrupt.safe_points() if on_stop is not None else nullcontext():
        while state.step < end and not state.settled:
            follow_load()
            state = _step(state, draw(state.step), problem, averaging_from, draw.base_D)
            if state.step % config.report_every_steps == 0 or state.step == config.steps:
                line = _progress(state, problem)
                state = dataclasses.replace(state, history=(*state.history, line))
                if on_progress is not None:
                    on_progress(line, state)
            if on_stop is not None:
                interrupt.point(partial(on_stop, state))
    return _result(state, problem, held_out)


def _start(problem: Problem, gate: Any, config: FitConfig) -> FitState:
    if not isinstance(gate, Gate):
        wanted = gate_config(gate or ("linear" if problem.support is None else "tabular"))
        seen = _seen(problem, gates[wanted.gate].causal)
        gate = init_gate(wanted, problem.experts, seen, config.seed)
    gate = gate.to("cpu", torch.float64)
    log_nu_M = problem.opponent.start()
    learned = {name: gate.tensors[name] for name in gate.learned}
    return FitState(
        config=config,
        step=0,
        gate=gate,
        moments=Moments.zeros(learned),
        log_nu_M=log_nu_M,
        mu=1.0,
        averaged=0,
        mean_tensors={name: torch.zeros_like(each) for name, each in learned.items()},
        mean_nu_M=np.zeros_like(log_nu_M),
        mean_mu=0.0,
    )


def _seen(problem: Problem, causal: bool) -> Features:
    """What a gate is made for: features of all sequences without their tokens; a few with tokens for a causal one."""
    if causal:
        few = [one.features.rows(torch.arange(min(len(one), _FEW))) for one in problem.domains]
        return Features.joined(few)
    sets = (*problem.domains, *problem.samples)
    return Features.joined([dataclasses.replace(one.features, logp_BTE=None, mask_BT=None) for one in sets])


def _checked(state: FitState, problem: Problem, config: FitConfig) -> FitState:
    if state.config != config:
        before, now = state.config.model_dump(), config.model_dump()
        differing = {key: (before[key], now[key]) for key in now if before[key] != now[key]}
        raise CheckpointError(f"the state is of a fit with another config: {differing} (then, now); start afresh")
    if len(state.log_nu_M) != len(problem.opponent.weights_MD):
        raise CheckpointError(
            f"the state mixes {len(state.log_nu_M)} domains or mixtures; the data has "
            f"{len(problem.opponent.weights_MD)}; start afresh"
        )
    return state


@dataclass(frozen=True, eq=False)
class _Batch:
    """Sequences and samples of one step.

    Attributes:
        logq_BE: of the sequences of all domains, float64.
        features: of them.
        domain_B: whose they are.
        weight_B: sum to 1 in each domain.
        control_B: max_k log q_k(x).
        sampled: features of the experts' samples, or None.
        expert_S: whose they are.
        weight_S: sum to 1 for each expert.
        second_S: True in the second half of each expert's; None: all of them at once.
    """

    logq_BE: Tensor
    features: Features
    domain_B: Tensor
    weight_B: Tensor
    control_B: Tensor
    sampled: Features | None
    expert_S: Tensor
    weight_S: Tensor
    second_S: Tensor | None


class _Draw:
    """The batch of a step, a pure function of seed and step."""

    def __init__(self, problem: Problem, gate: Gate, config: FitConfig) -> None:
        self.domains = prepared(gate, problem.domains)
        self.samples = () if gate.causal else problem.samples
        self.config = config
        self.sequences = config.batch_sequences
        self.draws = config.batch_samples or config.batch_sequences
        if self.draws == 1:
            raise ConfigError("batch_samples is 1; the penalty on Z needs two halves: 2 or more")
        self.base_D = _control_means(problem)
        self._totals = {
            id(one): one.weights_N.cumsum(0) for one in (*self.domains, *self.samples) if one.weights_N is not None
        }
        self._whole: _Batch | None = None

    def __call__(self, step: int) -> _Batch:
        if self.sequences is None and self.draws is None:
            if self._whole is None:
                self._whole = self._make(None)
            return self._whole
        return self._make(np.random.default_rng([self.config.seed, step]))

    def _make(self, rng: np.random.Generator | None) -> _Batch:
        sequences = [self._some(one, self.sequences, rng) for one in self.domains]
        logq_BE = torch.cat([one.logq_NE[rows].to(torch.float64) for one, rows, _ in sequences])
        draws = [self._some(one, self.draws, rng) for one in self.samples]
        halves = [torch.arange(len(rows)) % 2 == 1 for _, rows, _ in draws]
        return _Batch(
            logq_BE=logq_BE,
            features=Features.joined([one.features.rows(rows) for one, rows, _ in sequences]),
            domain_B=_labels(sequences),
            weight_B=torch.cat([weights for _, _, weights in sequences]),
            control_B=logq_BE.amax(dim=1),
            sampled=Features.joined([one.features.rows(rows) for one, rows, _ in draws]) if draws else None,
            expert_S=_labels(draws),
            weight_S=torch.cat([weights for _, _, weights in draws]) if draws else torch.zeros(0),
            second_S=torch.cat(halves) if draws and self.draws is not None else None,
        )

    def _some(
        self, one: ScoredSequences, size: int | None, rng: np.random.Generator | None
    ) -> tuple[ScoredSequences, Tensor, Tensor]:
        """(sequences, rows, weights): all rows, or `size` draws with replacement by the sequences' weights."""
        if size is None or rng is None:
            return one, torch.arange(len(one)), one.probability()
        if one.weights_N is None:
            rows = torch.from_numpy(rng.integers(0, len(one), size))
        else:
            rows = torch.searchsorted(self._totals[id(one)], torch.from_numpy(rng.random(size)), right=True)
            rows = rows.clamp_max(len(one) - 1)
        return one, rows, torch.full((size,), 1.0 / size, dtype=torch.float64)


def _labels(parts: list[tuple[ScoredSequences, Tensor, Tensor]]) -> Tensor:
    counts = torch.tensor([len(rows) for _, rows, _ in parts], dtype=torch.int64)
    return torch.repeat_interleave(torch.arange(len(parts)), counts)


def _control_means(problem: Problem) -> Floats:
    """Mean over each domain of - max_k log q_k(x), minus the offset, inside."""
    means = [-float(one.probability() @ one.logq_NE.amax(dim=1).to(torch.float64)) for one in problem.domains]
    based: Floats = problem.scale_D * np.array(means) - problem.offsets_D
    return based


def _losses(gate: Gate, batch: _Batch, scale_D: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Excess of each domain over its control, inside; Z and the product of Z - 1 over two halves."""
    excess_B = batch.control_B - log_model(gate, batch.logq_BE, batch.features)
    excess_D = torch.zeros(len(scale_D), dtype=torch.float64).index_add(0, batch.domain_B, batch.weight_B * excess_B)
    if batch.sampled is None:
        one = torch.ones((), dtype=torch.float64)
        return scale_D * excess_D, one, torch.zeros_like(one)
    g_S = gate.log_weights(batch.sampled).gather(1, batch.expert_S[:, None])[:, 0].exp()
    z = (batch.weight_S * g_S).sum()
    if batch.second_S is None:
        return scale_D * excess_D, z, (z - 1.0) ** 2
    halves = []
    for half_S in (batch.second_S, ~batch.second_S):
        weight_S = batch.weight_S * half_S
        mass_E = torch.zeros(int(batch.expert_S[-1]) + 1, dtype=torch.float64).index_add(0, batch.expert_S, weight_S)
        halves.append((weight_S / mass_E[batch.expert_S] * g_S).sum() - 1.0)
    return scale_D * excess_D, z, halves[0] * halves[1]


def _ridge(config: FitConfig, problem: Problem) -> float:
    """Weight of the sum of squares; 0 where the problem is enumerated, for then nothing is unknown."""
    if problem.support is not None:
        return 0.0
    return config.ridge * len(problem.domains) / sum(len(one) for one in problem.domains)


def _descend(
    state: FitState, batch: _Batch, problem: Problem, nu_M: Floats, lr: float
) -> tuple[dict[str, Tensor], Moments, Floats, float]:
    """One step of Adam on theta: new tensors and moments; the domains' excess and Z before it."""
    config, scale_D = state.config, torch.from_numpy(problem.scale_D)
    names = state.gate.learned
    theta = {name: state.gate.tensors[name].detach().requires_grad_(True) for name in names}
    excess_D, z, squared = _losses(state.gate.replaced(theta), batch, scale_D)
    loss = torch.from_numpy(problem.opponent.lam(nu_M)) @ excess_D + state.mu * (z - 1.0) + 0.5 * config.rho * squared
    loss = loss + 0.5 * _ridge(config, problem) * sum((theta[name] ** 2).sum() for name in state.gate.shrunk)
    if not math.isfinite(float(loss.detach())):
        raise NumericsError(
            f"the loss of the gate became {float(loss.detach())} at step {state.step}; lower lr (now {lr:g}), or look "
            "for broken scores"
        )
    gradients = torch.autograd.grad(loss, list(theta.values())) if names else ()
    moved, moments = adam_step(theta, dict(zip(names, gradients, strict=True)), state.moments, step=state.step, lr=lr)
    return moved, moments, excess_D.detach().numpy(), float(z.detach())


def _step(state: FitState, batch: _Batch, problem: Problem, averaging_from: int, base_D: Floats) -> FitState:
    config = state.config
    final = state.step >= averaging_from
    nu_M = np.exp(state.log_nu_M)
    moved, moments, excess_D, z = _descend(state, batch, problem, nu_M, config.final_lr if final else config.lr)
    log_nu_M = problem.opponent.step(state.log_nu_M, config.eta * problem.payoffs(excess_D + base_D))
    mu = state.mu + config.mu_lr * (z - 1.0)
    every = config.report_every_steps
    begin = averaging_from if final else state.step // every * every + every - math.ceil(config.final_fraction * every)
    averaged = max(0, state.step + 1 - begin)
    means = state.mean_tensors, state.mean_nu_M, state.mean_mu
    if averaged == 1:
        means = moved, np.exp(log_nu_M), mu
    elif averaged:
        part = 1.0 / averaged
        means = (
            {name: mean + part * (moved[name] - mean) for name, mean in state.mean_tensors.items()},
            state.mean_nu_M + part * (np.exp(log_nu_M) - state.mean_nu_M),
            state.mean_mu + part * (mu - state.mean_mu),
        )
    return dataclasses.replace(
        state,
        step=state.step + 1,
        gate=state.gate.replaced(moved),
        moments=moments,
        log_nu_M=log_nu_M,
        mu=mu,
        averaged=averaged,
        mean_tensors=means[0],
        mean_nu_M=means[1],
        mean_mu=means[2],
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
        lam=tuple(problem.opponent.lam(nu_M).tolist()),
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
    draw = _Draw(problem, gate, config)
    steps = config.best_response_steps
    mean: dict[str, Tensor] = {}
    for step in range(steps):
        follow_load()
        moved, moments, _, z = _descend(state, draw(step), problem, nu_M, config.final_lr)
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
    return "exact" if problem.support is not None and isinstance(gate, TabularGate) else "estimate"


def interval(z: float, error: float) -> tuple[float, float]:
    """95 % normal interval."""
    return z - Z_NORMAL * error, z + Z_NORMAL * error


def _result(state: FitState, problem: Problem, held_out: Problem | None) -> FitResult:
    gate, nu_M, mu = state.answer()
    found, gap = evaluate(gate, problem), state.duality_gap
    if gap is None and (state.config.best_response_steps or problem.support is not None):
        gap = found.worst - best_response(gate, problem, nu_M, state.config, mu=mu)[0]
    source: Literal["exact", "held-out samples", "samples of the fit"] = "samples of the fit"
    if gate.causal or problem.support is not None:
        source = "exact"
    elif held_out is not None:
        source = "held-out samples"
        found = evaluate(gate, held_out)
    return FitResult(
        gate=gate,
        lam=problem.opponent.lam(nu_M),
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
