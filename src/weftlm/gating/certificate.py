"""How good a gate is, and how good any could be: every figure says whether it is a bound, an estimate or exact."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch

from weftlm.errors import ConfigError, DataError, reason
from weftlm.files import parse_json
from weftlm.gating.arrays import TOLERANCE, Floats, simplex_vector
from weftlm.gating.capacity import CapacityResult, channel_capacity, sampled_capacity
from weftlm.gating.config import FitConfig, Unit
from weftlm.gating.gate import Gate
from weftlm.gating.mixtures import MixtureSet
from weftlm.gating.primal_dual import Z_NORMAL, FitResult, against, best_response, interval
from weftlm.gating.problem import Evaluation, Offsets, Problem, evaluate, make_problem

Label = Literal["bound", "estimate", "exact"]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Figure:
    """A number and what it is.

    Attributes:
        value: the number; None where it is infinite.
        label: "bound": the truth lies on the stated side, always. "exact": the truth, for the enumerated problem, or
            on the data where `how` says so. "estimate": from samples, or from an optimiser that may stop short.
        how: how it was found, in a sentence.
        low: lower end of a 95 % interval, None where there is none.
        high: upper end.
    """

    value: float | None
    label: Label
    how: str
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class DomainRow:
    """A domain's line in the table; nats of the certificate's unit.

    Attributes:
        name: of the domain.
        sequences: evaluated.
        tokens: mean scored tokens per sequence, None where unknown.
        cross_entropy: of the normalised model pi_g / Z.
        offset: taken off.
        value: cross-entropy minus offset.
        low: lower end of its 95 % interval, None where exact.
        high: upper end.
        lam: the domain's weight in the worst mixture found by the fit, None where no mixture was given.
    """

    name: str
    sequences: int
    tokens: float | None
    cross_entropy: float
    offset: float
    value: float
    low: float | None
    high: float | None
    lam: float | None


@dataclass(frozen=True)
class Certificate:
    """What is known of a gate's worst case.

    Attributes:
        unit: "sequence" or "token": of all nats here.
        offsets: what values are relative to: "expert", "none", "entropy" or "values".
        causal: whether the gate is causal; then Z is 1 by construction.
        capacity: below which no single normalised model's worst KL can be; None where nothing is known of it.
        worst: the gate's worst case over the mixtures.
        worst_domain: name of the domain of largest value.
        at_lam: the gate's value against the fit's mixture; the opponent's best response is `worst`.
        lower: the least a gate can have against the fit's mixture.
        gap: worst minus lower.
        z: Z_g.
        domains: the table.
        length: tokens of the scored windows, where they are of one length.
    """

    unit: Unit
    offsets: str
    causal: bool
    capacity: Figure | None
    worst: Figure
    worst_domain: str
    at_lam: Figure | None
    lower: Figure | None
    gap: Figure | None
    z: Figure
    domains: tuple[DomainRow, ...]
    length: int | None = None

    def to_json(self) -> dict[str, Any]:
        """As JSON values; no NaN, no infinity."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any] | str) -> Self:
        """What `to_json` gave, also after a round trip through text.

        Raises:
            DataError: it is no certificate.
        """
        try:
            fields = dict(parse_json(value) if isinstance(value, str) else value)
            for name in ("capacity", "worst", "at_lam", "lower", "gap", "z"):
                fields[name] = None if fields[name] is None else Figure(**fields[name])
            fields["domains"] = tuple(DomainRow(**row) for row in fields["domains"])
            return cls(**fields)
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"no certificate of a gate: {reason(error)}; write one again with certify") from error


def certify(
    gate: Gate | FitResult,
    domains: Any,
    samples: Any = None,
    *,
    nu: Any = None,
    offsets: Offsets | Any | None = None,
    mixtures: MixtureSet | Any | None = None,
    unit: Unit = "sequence",
    own_experts: Sequence[int] | None = None,
    capacity: CapacityResult | None = None,
    config: FitConfig | None = None,
) -> Certificate:
    """Measure a gate on data it was not fitted on.

    Args:
        gate: a gate, or the result of a fit, which brings its mixture along.
        domains: held-out `ScoredSequences` of each domain, or P of an enumerated problem.
        samples: held-out draws of each expert, or Q. None for causal gates.
        nu: the fit's mixture, over the extreme mixtures (over the domains where all mixtures are allowed); without it
            there is no gap.
        offsets, mixtures, unit, own_experts: as in `make_problem`.
        capacity: of the domains in nats per sequence, where it is known or was estimated. None: computed where the
            problem is enumerated; estimated between the domains' own experts from their samples with offsets "expert".
        config: of the steps behind an estimated best response. None: the fit's, or the defaults.
    Raises:
        ConfigError, DataError, NumericsError: as `make_problem`.
    """
    problem = make_problem(domains, samples, offsets=offsets, mixtures=mixtures, unit=unit, own_experts=own_experts)
    mu = 1.0
    if isinstance(gate, FitResult):
        nu = gate.nu if nu is None else nu
        config = config or gate.state.config
        mu, gate = gate.mu, gate.gate
    config = config or FitConfig()
    found = evaluate(gate, problem)
    nu_M = None if nu is None else simplex_vector(nu, "nu", len(problem.opponent.weights_MD))
    lower, at_lam, gap = (None, None, None) if nu_M is None else _duality(gate, problem, found, nu_M, config, mu)
    exact = problem.support is not None
    error = _worst_error(found, problem)
    return Certificate(
        unit=unit,
        offsets=problem.offset_kind,
        causal=gate.causal,
        capacity=_capacity(problem, capacity),
        worst=Figure(
            found.worst,
            "exact" if exact else "estimate",
            "largest value over the allowed mixtures, whose maximum is at an extreme mixture"
            + ("" if exact else "; exact on these sequences, 95 % normal interval over sequences and samples"),
            None if exact else _finite(found.worst - Z_NORMAL * error),
            None if exact else _finite(found.worst + Z_NORMAL * error),
        ),
        worst_domain=problem.names[found.worst_domain],
        at_lam=at_lam,
        lower=lower,
        gap=gap,
        z=_normaliser(gate, problem, found),
        domains=_table(problem, found, nu_M),
    )


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _z_share(found: Evaluation, problem: Problem) -> Floats:
    """What the error of log Z adds to each domain's value, reported nats."""
    share: Floats = problem.scale_D * (found.z_error / found.z * problem.report)
    return share


def _worst_error(found: Evaluation, problem: Problem) -> float:
    """Standard error of the worst mixture's value: domains are independent of each other, Z is common to all."""
    lam_D = problem.opponent.lam(found.nu_M)
    used = lam_D > 0
    own = float((lam_D[used] ** 2 * found.errors_D[used] ** 2).sum())
    return math.sqrt(own + float(lam_D @ _z_share(found, problem)) ** 2)


def _duality(
    gate: Gate, problem: Problem, found: Evaluation, nu_M: Floats, config: FitConfig, mu: float
) -> tuple[Figure, Figure, Figure]:
    at_lam = against(found, problem, nu_M)
    least, kind = best_response(gate, problem, nu_M, config, mu=mu)
    if kind == "exact":
        how = "closed form (water-filling) over all sequence-level gates: with Z = 1, none has a worst case below it"
        label: Label = "bound"
        gap_how = "the worst case is above the optimum over gates with Z = 1 by at most this"
    else:
        how = (
            f"{config.best_response_steps if gate.learned else 0} steps of a gate of this kind against the mixture, on "
            "these sequences; its best may be lower"
        )
        label = "estimate"
        gap_how = "worst minus an estimated best response; may understate the gap"
    exact = problem.support is not None
    return (
        Figure(least, label, how),
        Figure(
            at_lam,
            "exact" if exact else "estimate",
            "value against the fit's mixture" + ("" if exact else ", exact on these sequences"),
        ),
        Figure(found.worst - least, label, gap_how),
    )


def _capacity(problem: Problem, known: CapacityResult | None) -> Figure | None:
    """The capacity as a lower end for worst cases, in the certificate's unit."""
    relative, per_token = "", problem.unit == "token"
    if problem.support is not None and known is None:
        if problem.opponent.bounded:
            return None
        known = channel_capacity(problem.opponent.weights_MD @ problem.support[0])
        lam_D = problem.opponent.lam(known.lam_D)
        how = "Blahut-Arimoto, lower end: no normalised model's worst KL over these mixtures is below it"
    elif known is None:
        if not problem.own_D or not problem.samples or problem.opponent.offsets_M is not None:
            return None
        own = torch.tensor(problem.own_D)
        scored = [problem.samples[k].logq_NE[:, own] for k in problem.own_D]
        if any(problem.samples[k].weights_N is not None for k in problem.own_D):
            return None
        scale_D = problem.scale_D * problem.report if per_token else None
        known = sampled_capacity(scored, mixtures=problem.opponent, scale_D=scale_D)
        lam_D, per_token = known.lam_D, False
        how = "Blahut-Arimoto on samples of the domains' own experts: the capacity between the experts"
        relative = ", over the mixtures that are allowed" if problem.opponent.restricted else "; all mixtures allowed"
    else:
        lam_D = known.lam_D
        how = f"Blahut-Arimoto, {'enumerated' if known.kind == 'exact' else 'from samples'}, as given"
    if len(lam_D) != len(problem.domains):
        raise ConfigError(f"the capacity is of {len(lam_D)} domains; the certificate of {len(problem.domains)}")
    if problem.offset_kind != "entropy":
        relative += (
            f"; it bounds the worst KL(p || model), and values here are relative to {problem.offset_kind!r} offsets: "
            "the two compare only as far as those offsets equal the domains' entropies"
        )
    # sum_d lam_d KL_d <= max_d (KL_d / T_d) sum_d lam_d T_d
    per_unit = 1.0
    if per_token:
        per_unit = 1.0 / float(lam_D @ (1.0 / (problem.scale_D * problem.report)))
    spread = None if known.standard_error is None else Z_NORMAL * known.standard_error * per_unit
    value = known.value * per_unit
    return Figure(
        value,
        "bound" if known.kind == "exact" else "estimate",
        how + relative,
        None if spread is None else value - spread,
        None if spread is None else value + spread,
    )


def _normaliser(gate: Gate, problem: Problem, found: Evaluation) -> Figure:
    if gate.causal:
        return Figure(1.0, "exact", "a causal gate is normalised by construction")
    if problem.support is not None:
        return Figure(found.z, "exact", "summed over the support")
    low, high = interval(found.z, found.z_error)
    draws = sum(len(one) for one in problem.samples)
    clustered = any(one.clusters_N is not None for one in problem.samples)
    kind = "cluster-robust normal" if clustered else "normal"
    how = f"mean over {draws} samples of {problem.experts} experts, 95 % {kind} interval"
    if not low - TOLERANCE <= 1.0 <= high + TOLERANCE:
        off = (
            f"the interval excludes 1: the gate makes {'more' if found.z > 1.0 else 'less'} than a distribution, and "
            "figures are those of pi_g divided by this estimate; fit on more samples of the experts, or with more ridge"
        )
        log.warning("Z is %.4g, 95 %% from %.4g to %.4g: %s", found.z, low, high, off)
        how = f"{how}; {off}"
    return Figure(found.z, "estimate", how, _finite(low), _finite(high))


def _table(problem: Problem, found: Evaluation, nu_M: Floats | None) -> tuple[DomainRow, ...]:
    lam_D = None if nu_M is None else problem.opponent.lam(nu_M)
    share_D = _z_share(found, problem)
    rows = []
    for d, one in enumerate(problem.domains):
        value = float(found.values_D[d]) * problem.report
        half = Z_NORMAL * math.hypot(float(found.errors_D[d]), float(share_D[d]))
        rows.append(
            DomainRow(
                name=problem.names[d],
                sequences=len(one),
                tokens=None if one.tokens_N is None else float(one.probability() @ one.tokens_N),
                cross_entropy=float(found.ce_D[d]),
                offset=float(problem.offsets_D[d]) * problem.report,
                value=value,
                low=None if problem.support is not None else _finite(value - half),
                high=None if problem.support is not None else _finite(value + half),
                lam=None if lam_D is None else float(lam_D[d]),
            )
        )
    return tuple(rows)
