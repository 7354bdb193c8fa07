"""The robust problem as fitting and certifying see it: data, offsets, units, the adversary, and what a gate is worth.

    value_d(g) = s_d (CE_d(pi_g) + log Z_g) - offset_d        worst(g) = max over nu of  nu . (V value + shift)

Every figure is that of the normalised model pi_g / Z_g, so a gate cannot look better by making more than one unit of
probability. With unit "token" each domain's figures are divided by its mean number of tokens.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from weftlm.errors import ConfigError, DataError, NumericsError
from weftlm.gating.arrays import Floats, cross_entropies, entropies, log_support, refuse_impossible, to_tensor
from weftlm.gating.config import Unit
from weftlm.gating.gate import Features, Gate
from weftlm.gating.mixtures import Box, Player, kl_projection, player
from weftlm.gating.sequences import ScoredSequences, enumerated, squared_error

Offsets = Literal["expert", "none", "entropy"]

CHUNK, TOKEN_CHUNK = 1 << 22, 1 << 18
"""Numbers evaluated at a time: sequences x experts, and sequences x tokens x experts for causal gates, where `prefix`
makes about a hundred of each."""


@dataclass(frozen=True, eq=False)
class Problem:
    """What is to be solved. Values inside are in nats of `unit` over `report`; `report` turns them into nats of `unit`.

    Attributes:
        domains: Sequences of each of D domains, named.
        samples: Draws of each of E experts, for Z; empty where only causal gates will be asked about.
        own_D: Expert of each domain; empty where offsets do not need it.
        offset_kind: "expert", "none", "entropy" or "values".
        offsets_D: Offsets, inside.
        scale_D: s_d, from nats per sequence to inside.
        shift_M: Mixture of offsets minus the offset of each extreme mixture, inside.
        adversary: The adversary, who mixes the domains.
        unit: Unit of the reported values.
        report: Factor from inside to reported.
        support: (p_DX, q_EX) where the problem is enumerated.
    """

    domains: tuple[ScoredSequences, ...]
    samples: tuple[ScoredSequences, ...]
    own_D: tuple[int, ...]
    offset_kind: str
    offsets_D: Floats
    scale_D: Floats
    shift_M: Floats
    adversary: Player
    unit: Unit
    report: float
    support: tuple[Floats, Floats] | None

    @property
    def experts(self) -> int:
        """E."""
        return self.domains[0].experts

    @property
    def names(self) -> tuple[str, ...]:
        """One name per domain."""
        return tuple(domain.name for domain in self.domains)

    def payoffs(self, values_D: Floats) -> Floats:
        """Value of each extreme mixture, inside."""
        payoffs: Floats = self.adversary.weights_MD @ values_D + self.shift_M
        return payoffs

    def against(self, values_D: Floats, nu_M: Floats) -> float:
        """Value of a fixed mixture, reported nats."""
        return float(nu_M @ self.payoffs(values_D)) * self.report


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What a gate is worth on a problem's data.

    Attributes:
        ce_D: Cross-entropy of pi_g / Z_g, reported nats.
        values_D: Cross-entropy minus offset, inside.
        errors_D: Standard error of each value over sequences (over clusters where there are), reported nats; 0 where
            enumerated. That of Z is not counted.
        z: Z_g; exactly 1 for a causal gate.
        z_error: Its standard error over samples (over clusters where there are).
        worst: Worst case over the mixtures, reported nats.
        nu_M: Best response of the adversary, a vertex.
        worst_domain: Number of the domain of largest value.
    """

    ce_D: Floats
    values_D: Floats
    errors_D: Floats
    z: float
    z_error: float
    worst: float
    nu_M: Floats
    worst_domain: int


def make_problem(
    domains: Any,
    samples: Any = None,
    *,
    offsets: Offsets | Any | None = None,
    mixtures: Box | Any | None = None,
    unit: Unit = "sequence",
    own_experts: Sequence[int] | None = None,
) -> Problem:
    """Check data and put a problem together.

    Args:
        domains: Sequences of each domain (a sequence or a name -> `ScoredSequences` mapping), or P, an array D x X of
            probabilities or their logs: then `samples` is Q and the problem enumerated.
        samples: Draws of each expert, in the experts' order, or Q. None where every gate will be causal.
        offsets: "expert": the cross-entropy of the domain's own expert on the same sequences. "none": 0. "entropy"
            (enumerated only): that of the domain, and of the mixed text for an extreme mixture, so that values are KL
            divergences. Or D numbers in nats of `unit`. None: "entropy" where enumerated, else "expert".
        mixtures: None for all mixtures, else the extreme ones, an array M x D, or a `Box`.
        unit: Nats per "sequence" or per "token" (each domain's total over its total of tokens).
        own_experts: Expert of each domain for offsets "expert"; None: the expert of the same number.
    Raises:
        ConfigError: shapes or numbers of experts differ, or an argument does not fit.
        DataError: no domain, a domain or an expert without sequences, sequences impossible under every expert.
        NumericsError: NaN, +inf, or rows that are not normalised.
    """
    support = None
    if _is_array(domains):
        if samples is None or not _is_array(samples):
            raise ConfigError("domains came as an array P (D x X); give the experts as an array Q (E x X) with it")
        logp_DX, logq_EX = log_support(domains, samples)
        support = logp_DX.exp().numpy(), logq_EX.exp().numpy()
        domains, samples = enumerated(domains, samples)
    sets, draws = _listed(domains, "domain"), _listed(() if samples is None else samples, "expert")
    if not sets:
        raise DataError("no domain came; a robust gate needs the sequences of one at least")
    experts = sets[0].experts
    for one in (*sets, *draws):
        if one.experts != experts:
            raise ConfigError(
                f"{one.name} is scored by {one.experts} experts and {sets[0].name} by {experts}; score every sequence "
                "with every expert"
            )
    if draws and len(draws) != experts:
        raise ConfigError(f"samples of {len(draws)} experts came for {experts} experts; draw some from each")
    for one in sets:
        refuse_impossible(one.logq_NE, one.name)
    scale_D, report = _scales(sets, unit)
    kind, offsets_D, own_D = _offsets(sets, offsets, own_experts, support, scale_D, report)
    adversary = player(mixtures, len(sets))
    shift_M = np.zeros(len(adversary.weights_MD))
    if kind == "entropy" and support is not None:
        if adversary.bounded:
            raise ConfigError(
                "offsets 'entropy' take no bounds over mixtures, since the entropy of a mixed text is no mixture of "
                "entropies; give the extreme mixtures, an array M x D, or give the offsets as numbers"
            )
        # The entropy of a mixed text is more than the mixture of the entropies.
        shift_M = adversary.weights_MD @ offsets_D - entropies(adversary.weights_MD @ support[0])
    return Problem(sets, draws, own_D, kind, offsets_D, scale_D, shift_M, adversary, unit, report, support)


def _is_array(value: Any) -> bool:
    if isinstance(value, np.ndarray | Tensor):
        return True
    return isinstance(value, list | tuple) and len(value) > 0 and not isinstance(value[0], ScoredSequences)


def _listed(value: Any, what: str) -> tuple[ScoredSequences, ...]:
    """The sets of a mapping, named by its keys, or of a sequence, with the names they have or by number."""
    named = isinstance(value, Mapping)
    found = []
    for key, one in value.items() if named else enumerate(value):
        if not isinstance(one, ScoredSequences):
            kind = type(one).__name__
            raise ConfigError(f"{what} {key} is {kind}; make it with ScoredSequences.of(log-likelihoods, ...)")
        found.append(dataclasses.replace(one, name=str(key) if named else one.name or f"{what} {key}"))
    return tuple(found)


def _scales(sets: tuple[ScoredSequences, ...], unit: Unit) -> tuple[Floats, float]:
    """s_d and the factor from inside to reported; inside is of the order of sequences whatever the unit."""
    if unit == "sequence":
        return np.ones(len(sets)), 1.0
    if unit != "token":
        raise ConfigError(f"unit is {unit!r}; it must be 'sequence' or 'token'")
    means_D = np.zeros(len(sets))
    for d, one in enumerate(sets):
        if one.tokens_N is None:
            raise ConfigError(f"unit 'token' needs tokens_N, and {one.name} has none")
        means_D[d] = one.probability() @ one.tokens_N
    mean = float(sum(means_D)) / len(sets)
    return mean / means_D, 1.0 / mean


def _offsets(
    sets: tuple[ScoredSequences, ...],
    offsets: Any,
    own_experts: Sequence[int] | None,
    support: tuple[Floats, ...] | None,
    scale_D: Floats,
    report: float,
) -> tuple[str, Floats, tuple[int, ...]]:
    """Kind, values inside, and the own experts where the kind needs them."""
    kind = ("entropy" if support is not None else "expert") if offsets is None else offsets
    if not isinstance(kind, str):
        values = to_tensor(offsets, "offsets", "D").double().numpy()
        if len(values) != len(sets) or not np.isfinite(values).all():
            raise ConfigError(f"offsets {values.tolist()} for {len(sets)} domains; one finite number each, in nats")
        return "values", values / report, ()
    if kind == "none":
        return kind, np.zeros(len(sets)), ()
    if kind == "entropy":
        if support is None:
            raise ConfigError("offsets 'entropy' needs enumerated domains; use 'expert', 'none' or values")
        return kind, entropies(support[0]), ()
    if kind != "expert":
        raise ConfigError(f"offsets {kind!r}; allowed: 'expert', 'none', 'entropy', or one number per domain")
    own = tuple(range(len(sets))) if own_experts is None else tuple(own_experts)
    experts = sets[0].experts
    if len(own) != len(sets) or any(not 0 <= k < experts for k in own):
        raise ConfigError(
            f"offsets 'expert' needs each domain's own expert: {len(sets)} domains, {experts} experts, own_experts "
            f"{list(own)}; name one expert from 0 to {experts - 1} per domain in own_experts, or use other offsets"
        )
    values_D = np.zeros(len(sets))
    for d, (one, k) in enumerate(zip(sets, own, strict=True)):
        own_N = one.logq_NE[:, k].to(torch.float64)
        if bool(torch.isneginf(own_N).any()):
            raise DataError(
                f"{one.name}: {int(torch.isneginf(own_N).sum())} sequences have probability 0 under the domain's own "
                f"expert {k}, so its cross-entropy is infinite; use other offsets or leave them out"
            )
        values_D[d] = -float(one.probability() @ own_N) * scale_D[d]
    return kind, values_D, own


def log_model(gate: Gate, logq_BE: Tensor, features: Features) -> Tensor:
    """log pi_g(x) of B sequences, nats, not divided by Z.

    log pi_g(x) = logsumexp_k [ log g(x, k) + log q_k(x) ]                              sequence-level
    log pi_g(x) = sum_t logsumexp_k [ log gamma_k(x_<t) + log q_k(x_t | x_<t) ]         causal; Z is 1
    """
    logw = gate.log_weights(features)
    if not gate.causal:
        return torch.logsumexp(logw + logq_BE.to(logw.dtype), dim=-1)
    logp_BTE = features.get("tokens", gate.config.gate).to(logw.dtype)
    tokens_BT = torch.logsumexp(logw + logp_BTE, dim=-1)
    if features.mask_BT is not None:
        tokens_BT = torch.where(features.mask_BT, tokens_BT, torch.zeros_like(tokens_BT))
    return tokens_BT.sum(dim=-1)


def log_models(gate: Gate, one: ScoredSequences) -> Tensor:
    """`log_model` of every sequence of a set, in its own float type."""
    return torch.cat([log_model(gate, part.logq_NE, part.features) for part in _chunks(gate, one)])


def log_gates(gate: Gate, one: ScoredSequences) -> Tensor:
    """log g(x, k) of every sequence of a set, NE, of a gate that sees whole sequences."""
    return torch.cat([gate.log_weights(part.features) for part in _chunks(gate, one)])


def _chunks(gate: Gate, one: ScoredSequences) -> Iterator[ScoredSequences]:
    """A bounded number of sequences at a time."""
    most, width, logp_BTE = CHUNK, one.experts, one.features.logp_BTE
    if gate.causal and logp_BTE is not None:
        most, width = TOKEN_CHUNK, width * logp_BTE.shape[1]
    return map(one.rows, torch.arange(len(one)).split(max(1, most // max(width, 1))))


def evaluate(gate: Gate, problem: Problem) -> Evaluation:
    """What a gate is worth on all data of a problem.

    Raises:
        ConfigError: the gate does not fit the data, or is not causal and there are no samples for Z.
        NumericsError: a domain's cross-entropy is not finite.
    """
    fits(gate, problem)
    with torch.no_grad():
        z, z_error = (1.0, 0.0) if gate.causal else _normaliser(gate, problem)
        logs = [log_models(gate, one) for one in problem.domains]
    return measure(logs, problem, z=z, z_error=z_error)


def measure(logs: Sequence[Tensor], problem: Problem, *, z: float = 1.0, z_error: float = 0.0) -> Evaluation:
    """What any model is worth on all data of a problem, from its log-probabilities of the domains' sequences.

    Args:
        logs: For each domain, log m(x) of its sequences, N, nats.
        problem: Domains, offsets and mixtures.
        z: Number by which m is divided; 1 for a language model.
        z_error: Standard error of z.
    Raises:
        ConfigError: another number of domains or sequences.
        NumericsError: a domain's cross-entropy is not finite.
    """
    if [len(each) for each in logs] != [len(one) for one in problem.domains]:
        raise ConfigError(
            f"log-probabilities of {[len(each) for each in logs]} sequences came for domains of "
            f"{[len(one) for one in problem.domains]}; give every sequence of every domain one"
        )
    if not math.isfinite(z) or z <= 0.0:
        raise NumericsError(f"Z is {z}; it must be positive and finite")
    nats_D, errors_D = np.zeros(len(logs)), np.zeros(len(logs))
    for d, (one, logs_N) in enumerate(zip(problem.domains, logs, strict=True)):
        ce_N, weights_N = -logs_N.detach().to(torch.float64), one.probability()
        nats_D[d] = float(weights_N @ ce_N)
        if not math.isfinite(nats_D[d]):
            raise NumericsError(
                f"{one.name}: the model's cross-entropy is {nats_D[d]}; it gives "
                f"{int((~torch.isfinite(ce_N)).sum())} sequences no probability"
            )
        if problem.support is None:
            if problem.own_D:
                ce_N = ce_N + one.logq_NE[:, problem.own_D[d]]
            mean = float(weights_N @ ce_N)
            centred_N = ce_N - mean
            if problem.unit == "token" and one.tokens_N is not None:
                centred_N = ce_N - one.tokens_N * (mean / float(weights_N @ one.tokens_N))
            errors_D[d] = math.sqrt(squared_error(weights_N * centred_N, one)) * problem.scale_D[d]
    ce_D = problem.scale_D * (nats_D + math.log(z))
    values_D = ce_D - problem.offsets_D
    payoff, nu_M = problem.adversary.best(problem.payoffs(values_D))
    worst, worst_domain = payoff * problem.report, int(values_D.argmax())
    return Evaluation(ce_D * problem.report, values_D, errors_D * problem.report, z, z_error, worst, nu_M, worst_domain)


def fits(gate: Gate, problem: Problem) -> None:
    """Refuse (ConfigError) a gate over another number of experts, or one that needs samples where there are none."""
    if gate.experts != problem.experts:
        raise ConfigError(f"gate {gate.config.gate!r} is over {gate.experts} experts; the data over {problem.experts}")
    if not gate.causal and not problem.samples:
        raise ConfigError(
            f"gate {gate.config.gate!r} sees whole sequences, so its Z must be measured: give samples drawn from every "
            "expert, or use a causal gate"
        )


def _normaliser(gate: Gate, problem: Problem) -> tuple[float, float]:
    """Z = sum_k E_{x ~ q_k} g(x, k), and its standard error."""
    z, variance = 0.0, 0.0
    for k, one in enumerate(problem.samples):
        g_N, weights_N = log_gates(gate, one)[:, k].exp().to(torch.float64), one.probability()
        mean = float(weights_N @ g_N)
        z += mean
        if problem.support is None:
            variance += squared_error(weights_N * (g_N - mean), one)
    return z, math.sqrt(variance)


def dual_value(problem: Problem, nu_M: Floats) -> float:
    """The best any gate can do against a fixed mixture, on an enumerated problem, reported nats; exact.

    Water-filling:

        min over pi of  - sum_x p(x) log pi(x)    s.t.  min_k q_k(x) <= pi(x) <= max_k q_k(x),  sum_x pi(x) = 1
        pi(x) = clip(c p(x), min_k q_k(x), max_k q_k(x))            p = sum_d lambda_d p_d (`kl_projection`)

    The worst case of every gate with Z = 1 is above it. (That of a model pi_g / Z_g with Z_g off 1 need not: it is no
    gate's, and is bounded by the capacity alone.)
    """
    assert problem.support is not None
    p_DX, q_EX = problem.support
    p_X = problem.adversary.lam(nu_M) @ p_DX
    log_p_X = np.log(p_X, out=np.full_like(p_X, -np.inf), where=p_X > 0)
    pi_X = np.exp(kl_projection(log_p_X, q_EX.min(axis=0), q_EX.max(axis=0)))
    return problem.against(-problem.offsets_D, nu_M) + float(cross_entropies(p_X[None], pi_X)[0]) * problem.report
