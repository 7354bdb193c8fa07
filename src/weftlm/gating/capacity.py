"""The capacity of the channel domain -> sequence: no single normalised model is better on its worst domain.

    C = max_lambda JSD_lambda(p_1 .. p_D) = min_m max_d KL(p_d || m)              m: any normalised model

Gallager 1979 and Ryabko 1979 for the equality; Blahut 1972 and Arimoto 1972 for the iteration and its bounds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from weftlm.errors import ConfigError, DataError
from weftlm.gating.arrays import Floats, log_distributions, to_log_likelihoods, to_tensor
from weftlm.gating.mixtures import Box, Player, player


@dataclass(frozen=True)
class CapacityResult:
    """What Blahut-Arimoto found.

    Attributes:
        value: Lower end of the bracket, nats per sequence, or as scaled: of enumerated distributions every normalised
            model's worst KL(p_d || m) is at least this; of samples see `sampled_capacity`.
        lam_D: Mixture that attains it.
        iterations: Steps taken.
        gap: Upper end minus `value`; the capacity is within. 0 up to the tolerance once converged.
        standard_error: Error of `value` as a mean over samples at this mixture, nats; None where it is exact.
    """

    value: float
    lam_D: Floats
    iterations: int
    gap: float
    standard_error: float | None = None


def channel_capacity(logP_DX: Any, *, tolerance: float = 1e-9, max_iterations: int = 20_000) -> CapacityResult:
    """Capacity of a channel with an enumerated output.

        D_d      = KL(p_d || p_lambda)
        lambda_d <- lambda_d exp(D_d) / sum_j lambda_j exp(D_j)
        sum_d lambda_d D_d  <=  C  <=  max_d D_d

    It stops when the best lower and upper bounds so far are within `tolerance`, or after `max_iterations`; the bracket
    is valid either way. Where a domain barely counts the iteration is slow (1 / n), and `gap` says how far it came.

    Args:
        logP_DX: One row per domain, log-probabilities (nats) or probabilities of X sequences, normalised.
        tolerance: Width of the bracket at which to stop, nats.
        max_iterations: Steps at most.
    Raises:
        ConfigError: not D x X, or nonsensical limits.
        NumericsError: NaN, or a row that does not sum to 1.
    """
    logp_DX = log_distributions(logP_DX, "logP_DX", "DX")
    p_DX = logp_DX.exp()

    def divergences(lam_D: Floats) -> Floats:
        mix_X = torch.logsumexp(torch.from_numpy(lam_D).log()[:, None] + logp_DX, dim=0)
        apart_DX = p_DX * torch.where(p_DX > 0, logp_DX - mix_X, torch.zeros_like(logp_DX))
        found: Floats = apart_DX.sum(dim=1).numpy()
        return found

    return _climbed(divergences, player(None, len(logp_DX)), 1.0, tolerance, max_iterations, stalls=False)


def sampled_capacity(
    logp: Sequence[Any],
    *,
    mixtures: Box | Player | Any | None = None,
    scale_D: Any = None,
    tolerance: float = 1e-6,
    max_iterations: int = 2_000,
) -> CapacityResult:
    """Estimate of the capacity where sequences can be drawn and scored, not listed.

        max over allowed lambda of  sum_d lambda_d s_d D_d        D_d = mean over samples x of domain d of
            log p_d(x) - log sum_k mu_k p_k(x),   mu_k = lambda_k s_k / sum_j lambda_j s_j

    No normalised model m has a worst mixture max_lambda sum_d lambda_d s_d KL(p_d || m) below it: for a fixed lambda,
    m = sum_k mu_k p_k makes the sum least. Its gradient is s_d D_d, and exponentiated gradient with steps of 1 / max s
    is the iteration of Blahut and Arimoto where s = 1 and all mixtures are allowed. `value` is the largest sum met,
    `gap` reaches to the smallest max_lambda sum_d lambda_d s_d D_d met.

    Samples drawn from the models themselves make `value` an estimate of the capacity between the models. Real text
    scored by models of its domains makes it an estimate of a lower bound (for a fixed mixture, in expectation: Barber
    and Agakov 2003) of the capacity between the real domains. In both cases the mixture is chosen on the same samples,
    which flatters it a little; the standard error does not count that.

    Args:
        logp: For each domain d, an array N_d x D: log-likelihood of its samples under each domain's model, nats.
        mixtures: Allowed lambda, as in `fit_robust_gate`; None for all.
        scale_D: s, positive: 1 / tokens for nats per token; None for 1.
        tolerance: Change of `value` in a step at which to stop, nats, before it is scaled.
        max_iterations: Steps at most.
    Raises:
        ConfigError: shapes do not fit, or a scale is not positive.
        DataError: a domain without samples, or a sample its own domain's model gives probability 0.
        NumericsError: NaN or +inf.
    """
    if len(logp) == 0:
        raise DataError("the capacity of no domains is undefined; give the samples of one domain at least")
    domains = len(logp)
    sets = [to_log_likelihoods(part, f"logp[{d}]", "ND").to(torch.float64) for d, part in enumerate(logp)]
    for d, part_ND in enumerate(sets):
        if part_ND.shape[1] != domains:
            raise ConfigError(
                f"logp[{d}] has {part_ND.shape[1]} columns for {domains} domains; it needs one per domain"
            )
        if len(part_ND) == 0:
            raise DataError(f"domain {d} has no samples; draw some, or leave the domain out")
        if bool(torch.isneginf(part_ND[:, d]).any()):
            raise DataError(f"a sample of domain {d} has probability 0 under that domain's own model; check the scores")
    scales_D = np.ones(domains) if scale_D is None else to_tensor(scale_D, "scale_D", "D").double().numpy()
    if len(scales_D) != domains or not bool((scales_D > 0).all() and np.isfinite(scales_D).all()):
        raise ConfigError(f"scale_D is {scales_D}; it needs a positive number for each of the {domains} domains")

    def gains(lam_D: Floats) -> list[Tensor]:
        """log p_d(x) - log sum_k mu_k p_k(x) of each domain's samples; 0 where no allowed mixture holds the domain."""
        log_mu_D = torch.from_numpy(lam_D * scales_D / (lam_D @ scales_D)).log()
        found = (part_ND[:, d] - torch.logsumexp(log_mu_D + part_ND, dim=1) for d, part_ND in enumerate(sets))
        return [gain_N if lam_D[d] > 0 else torch.zeros_like(gain_N) for d, gain_N in enumerate(found)]

    def divergences(lam_D: Floats) -> Floats:
        scaled: Floats = scales_D * np.array([float(gain_N.mean()) for gain_N in gains(lam_D)])
        return scaled

    adversary, largest = player(mixtures, domains), float(scales_D.max())
    found = _climbed(divergences, adversary, largest, tolerance, max_iterations, stalls=True)
    spreads = [float(gain_N.var(correction=0)) / max(1, len(gain_N) - 1) for gain_N in gains(found.lam_D)]
    error = float(np.sqrt((found.lam_D * scales_D) ** 2 @ np.array(spreads)))
    return CapacityResult(found.value, found.lam_D, found.iterations, found.gap, error)


def _climbed(
    divergences: Any, adversary: Player, largest: float, tolerance: float, max_iterations: int, *, stalls: bool
) -> CapacityResult:
    """Exponentiated gradient up lambda . D(lambda), with steps of 1 / `largest`; the best value met and its bracket.

    D, scaled by at most `largest`, is `divergences` of a mixture. `tolerance` is the width of the bracket, before it is
    scaled, at which to stop; with `stalls` a step that changes the value by less stops it too.
    """
    if not (np.isfinite(tolerance) and tolerance >= 0.0) or max_iterations < 1:
        raise ConfigError(f"tolerance {tolerance} and max_iterations {max_iterations}; need 0 or more, and 1 or more")
    log_nu_M, value, upper = adversary.start(), -math.inf, math.inf
    best_D = adversary.lam(np.exp(log_nu_M))
    for taken in range(1, max_iterations + 1):  # noqa: B007
        lam_D = adversary.lam(np.exp(log_nu_M))
        payoffs_M = adversary.weights_MD @ divergences(lam_D)
        now = float(np.exp(log_nu_M) @ payoffs_M)
        upper, change = min(upper, adversary.best(payoffs_M)[0]), now - value
        if now > value:
            best_D, value = lam_D, now
        if upper - value <= tolerance * largest or (stalls and abs(change) < tolerance * largest):
            break
        log_nu_M = adversary.step(log_nu_M, payoffs_M / largest)
    return CapacityResult(value, best_D, taken, max(upper - value, 0.0))
