"""How good a gate is, and how good any could be: every figure says whether it is a bound, an estimate or exact."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

from pydantic import TypeAdapter

from weftlm.errors import DataError, reason
from weftlm.gating.arrays import TOLERANCE, Floats, simplex_vector
from weftlm.gating.capacity import channel_capacity, sampled_capacity
from weftlm.gating.config import FitConfig, Unit
from weftlm.gating.gate import Gate
from weftlm.gating.mixtures import Box
from weftlm.gating.primal_dual import FitResult, best_response
from weftlm.gating.problem import Evaluation, Offsets, Problem, evaluate, make_problem

Label = Literal["bound", "estimate", "exact"]

Z_NORMAL = 1.959963984540054
"""Two-sided 95 % of the normal distribution."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Figure:
    """A number and what it is.

    Attributes:
        value: Number; None where it is infinite.
        label: "bound": the truth is on the stated side, always. "exact": the truth, for the enumerated problem, or
            on the data where `how` says so. "estimate": from samples, or from an optimiser that may stop short.
        how: How it was found, in a sentence.
        low: Lower end of a 95 % interval, None where there is none.
        high: Upper end.
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
        name: Name of the domain.
        sequences: Number of sequences evaluated.
        tokens: Mean scored tokens per sequence, None where unknown.
        cross_entropy: Cross-entropy of the normalised model pi_g / Z.
        offset: Offset taken off.
        value: Cross-entropy minus offset.
        low: Lower end of its 95 % interval, None where exact.
        high: Upper end.
        lam: Weight of the domain in the worst mixture found by the fit, None where no mixture was given.
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
        unit: Unit of all nats here: "sequence" or "token".
        offsets: Reference of the values: "expert", "none", "entropy" or "values".
        causal: Whether the gate is causal; then Z is 1 by construction.
        capacity: Capacity, below which no single normalised model's worst KL can be; None where it is not known.
        worst: Worst case of the gate over the mixtures.
        worst_domain: Name of the domain of largest value.
        lower: The least a gate can have against the fit's mixture.
        gap: Worst minus lower.
        z: Z_g.
        domains: The table.
        length: Tokens of the scored windows, where they are of one length.
    """

    unit: Unit
    offsets: str
    causal: bool
    capacity: Figure | None
    worst: Figure
    worst_domain: str
    lower: Figure | None
    gap: Figure | None
    z: Figure
    domains: tuple[DomainRow, ...]
    length: int | None = None

    def to_json(self) -> dict[str, Any]:
        """As JSON values; no NaN, no infinity."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """What `to_json` gave, also after a round trip through text.

        Raises:
            DataError: it is no certificate.
        """
        try:
            return TypeAdapter(cls).validate_python(value)
        except ValueError as error:
            raise DataError(f"no certificate of a gate: {reason(error)}; write one again with certify") from error


def certify(
    gate: Gate | FitResult,
    domains: Any,
    samples: Any = None,
    *,
    nu: Any = None,
    offsets: Offsets | Any | None = None,
    mixtures: Box | Any | None = None,
    unit: Unit = "sequence",
    own_experts: Sequence[int] | None = None,
    config: FitConfig | None = None,
) -> Certificate:
    """Measure a gate on data it was not fitted on.

    Args:
        gate: Gate, or the result of a fit, which brings its mixture along.
        domains: Held-out `ScoredSequences` of each domain, or P of an enumerated problem.
        samples: Held-out draws of each expert, or Q. None for causal gates.
        nu: Mixture of the fit, over the extreme mixtures (over the domains where all mixtures are allowed); without it
            there is no gap.
        offsets, mixtures, unit, own_experts: As in `make_problem`.
        config: Settings of the steps behind an estimated best response; None for the fit's, or the defaults.
    Raises:
        ConfigError, DataError, NumericsError: as `make_problem`.
    """
    problem = make_problem(domains, samples, offsets=offsets, mixtures=mixtures, unit=unit, own_experts=own_experts)
    mu = 1.0
    if isinstance(gate, FitResult):
        nu, config = gate.nu if nu is None else nu, config or gate.state.config
        mu, gate = gate.mu, gate.gate
    config = config or FitConfig()
    found = evaluate(gate, problem)
    nu_M = None if nu is None else simplex_vector(nu, "nu", len(problem.adversary.weights_MD))
    # What the error of log Z adds to each domain's value. Domains are independent of each other, Z is common to all.
    share_D: Floats = problem.scale_D * (found.z_error / found.z * problem.report)
    lam_D = problem.adversary.lam(found.nu_M)
    own = float((lam_D[lam_D > 0] ** 2 * found.errors_D[lam_D > 0] ** 2).sum())
    how = "largest value over the allowed mixtures, whose maximum is at an extreme mixture"
    if problem.support is None:
        how += "; exact on these sequences, 95 % normal interval over sequences and samples"
        worst = Figure(found.worst, "estimate", how, *_ends(found.worst, math.hypot(own**0.5, lam_D @ share_D)))
    else:
        worst = Figure(found.worst, "exact", how)
    lower, gap = (None, None) if nu_M is None else _duality(gate, problem, found, nu_M, config, mu)
    domains = _table(problem, found, share_D, None if nu_M is None else problem.adversary.lam(nu_M))
    return Certificate(
        unit, problem.offset_kind, gate.causal, _capacity(problem), worst, problem.names[found.worst_domain],
        lower, gap, _normaliser(gate, problem, found), domains,
    )  # fmt: skip


def _ends(value: float, error: float) -> tuple[float | None, float | None]:
    """95 % normal interval; None for an end that is infinite."""
    low, high = (end if math.isfinite(end) else None for end in (value - Z_NORMAL * error, value + Z_NORMAL * error))
    return low, high


def _duality(
    gate: Gate, problem: Problem, found: Evaluation, nu_M: Floats, config: FitConfig, mu: float
) -> tuple[Figure, Figure]:
    """The least a gate can have against the fit's mixture, and the gap."""
    least, kind = best_response(gate, problem, nu_M, config, mu=mu)
    gap = found.worst - least
    if kind == "exact":
        how = "closed form (water-filling) over all sequence-level gates: with Z = 1, none has a worst case below it"
        above = "the worst case is above the optimum over gates with Z = 1 by at most this"
        return Figure(least, "bound", how), Figure(gap, "bound", above)
    steps = config.best_response_steps if gate.learned else 0
    how = f"{steps} steps of a gate of this kind against the mixture, on these sequences; its best may be lower"
    apart = "worst minus an estimated best response; may understate the gap"
    return Figure(least, "estimate", how), Figure(gap, "estimate", apart)


def _capacity(problem: Problem) -> Figure | None:
    """The capacity, below which no normalised model's worst KL(p || model) is, in the certificate's unit.

    Computed where the problem is enumerated; estimated between the domains' own experts from their samples with offsets
    "expert"; None where neither applies.
    """
    relative = ""
    draws = [problem.samples[k] for k in problem.own_D if problem.samples]
    if problem.support is not None:
        if problem.adversary.bounded:
            return None
        known = channel_capacity(problem.adversary.weights_MD @ problem.support[0])
        how = "Blahut-Arimoto, lower end"
    elif not draws or any(one.weights_N is not None for one in draws):
        return None
    else:
        scale_D = problem.scale_D * problem.report if problem.unit == "token" else None
        scored = [one.logq_NE[:, list(problem.own_D)] for one in draws]
        known = sampled_capacity(scored, mixtures=problem.adversary, scale_D=scale_D)
        how = "Blahut-Arimoto on samples of the domains' own experts: the capacity between the experts"
        relative = ", over the mixtures that are allowed" if problem.adversary.restricted else "; all mixtures allowed"
    if problem.offset_kind != "entropy":
        relative += f"; the two compare only as far as {problem.offset_kind!r} offsets equal the domains' entropies"
    if known.standard_error is None:
        return Figure(known.value, "bound", how + relative)
    return Figure(known.value, "estimate", how + relative, *_ends(known.value, known.standard_error))


def _normaliser(gate: Gate, problem: Problem, found: Evaluation) -> Figure:
    if gate.causal:
        return Figure(1.0, "exact", "a causal gate is normalised by construction")
    if problem.support is not None:
        return Figure(found.z, "exact", "summed over the support")
    low, high = _ends(found.z, found.z_error)
    clustered = any(one.clusters_N is not None for one in problem.samples)
    kind = "cluster-robust normal" if clustered else "normal"
    how = f"mean over {sum(map(len, problem.samples))} samples of {problem.experts} experts, 95 % {kind} interval"
    if low is not None and high is not None and not low - TOLERANCE <= 1.0 <= high + TOLERANCE:
        off = (
            f"the interval excludes 1: the gate makes {'more' if found.z > 1.0 else 'less'} than a distribution, and "
            "figures are those of pi_g divided by this estimate; fit on more samples of the experts, or with more ridge"
        )
        log.warning("Z is %.4g, 95 %% from %.4g to %.4g: %s", found.z, low, high, off)
        how = f"{how}; {off}"
    return Figure(found.z, "estimate", how, low, high)


def _table(problem: Problem, found: Evaluation, share_D: Floats, lam_D: Floats | None) -> tuple[DomainRow, ...]:
    rows = []
    for d, one in enumerate(problem.domains):
        value, offset = (float(each[d]) * problem.report for each in (found.values_D, problem.offsets_D))
        ends = _ends(value, math.hypot(float(found.errors_D[d]), float(share_D[d])))
        low, high = ends if problem.support is None else (None, None)
        tokens = None if one.tokens_N is None else float(one.probability() @ one.tokens_N)
        lam = None if lam_D is None else float(lam_D[d])
        rows.append(DomainRow(one.name, len(one), tokens, float(found.ce_D[d]), offset, value, low, high, lam))
    return tuple(rows)
