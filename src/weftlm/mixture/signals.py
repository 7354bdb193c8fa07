"""What a report says, checked and put on a scale, before a policy acts on it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from weftlm.errors import ConfigError, NumericsError
from weftlm.mixture.config import AlignmentPolicyConfig, Signal
from weftlm.mixture.policy import Report, missing_signal


def read_alignment(
    report: Report, config: AlignmentPolicyConfig, signal: Signal, groups: Sequence[str]
) -> Tensor | None:
    """The report's alignment on the scale the configuration asks for.

        raw     a_i = <g_i, v>
        scale   a_i = <g_i, v> / (||v|| mean_j ||g_j||)      the mean over groups present; ||g_batch|| without norms
        cosine  a_i = <g_i, v> / (||v|| ||g_i||)

    Args:
        report: with `alignment`.
        config: Configuration of the policy that asks.
        signal: the signal it asked for, for messages.
        groups: the G names, for messages.

    Returns:
        a_G, float64, NaN for a group absent from the probe; None when the probe tells nothing: no group was present,
        or the direction or every gradient is exactly 0.

    Raises:
        ConfigError: no alignment in the report, the wrong number of groups, or norms missing.
        NumericsError: a dot product or a norm of a group that was present is not finite.
    """
    alignment = report.alignment
    if alignment is None:
        raise missing_signal(config.policy, signal)
    dots_G = alignment.dots_G.to(torch.float64)
    if dots_G.shape != (len(groups),):
        raise ConfigError(
            f"alignment holds {tuple(dots_G.shape)} dot products; policy {config.policy!r} has {len(groups)} groups"
        )
    present_G = ~(torch.isnan(dots_G) & (alignment.counts_G == 0))
    _require_finite(dots_G, present_G, "dot products <g_i, v>", groups, report.step)
    if not math.isfinite(alignment.direction_norm):
        raise NumericsError(f"step {report.step}: the norm of the alignment direction v is {alignment.direction_norm}")
    if not bool(present_G.any()) or alignment.direction_norm == 0.0:
        return None
    if config.normalize == "raw":
        return dots_G
    along_G = dots_G / alignment.direction_norm
    norms_G = alignment.norms_G
    if norms_G is not None:
        norms_G = norms_G.to(torch.float64)
        _require_finite(norms_G, present_G, "gradient norms ||g_i||", groups, report.step)
    if config.normalize == "cosine":
        if norms_G is None:
            raise ConfigError(
                f"mixture policy {config.policy!r} with normalize: cosine needs the gradient norm of every group, and "
                "this estimator measures none; use normalize: scale, or the estimator 'separate'"
            )
        cosines_G = torch.where(norms_G == 0.0, 0.0, along_G / norms_G)
        return torch.where(present_G, cosines_G, torch.nan)
    size = float(norms_G[present_G].mean()) if norms_G is not None else alignment.batch_norm
    if size is None:
        raise ConfigError(
            f"mixture policy {config.policy!r} with normalize: scale needs the groups' gradient norms or the norm of "
            "the training gradient (`batch_norm`), and this report has neither; hand one over or use normalize: raw"
        )
    if not math.isfinite(size):
        raise NumericsError(f"step {report.step}: the norm of the training gradient is {size}")
    return along_G / size if size > 0.0 else None


def read_losses(
    values_D: Tensor | None, report: Report, policy: str, signal: Signal, domains: Sequence[str]
) -> Tensor | None:
    """Per-domain losses of a report, checked.

    Args:
        values_D: the report's losses, or excess losses, nats per token; NaN where nothing was drawn.
        report: whose `tokens_D` says which domains were drawn.
        policy: who asks, for messages.
        signal: the signal it asked for, for messages.
        domains: the D names, for messages.

    Returns:
        float64, NaN for a domain not drawn; None when no domain was drawn.

    Raises:
        ConfigError: the losses are missing, or of another number of domains.
        NumericsError: the loss of a domain that was drawn is not finite.
    """
    if values_D is None:
        raise missing_signal(policy, signal)
    values_D = values_D.to(torch.float64)
    if values_D.shape != (len(domains),):
        raise ConfigError(
            f"the report holds {tuple(values_D.shape)} losses; policy {policy!r} has {len(domains)} domains"
        )
    present_D = ~(torch.isnan(values_D) & (report.tokens_D == 0))
    _require_finite(values_D, present_D, "losses", domains, report.step)
    return values_D if bool(present_D.any()) else None


def keep_last(old_D: Tensor, new_D: Tensor) -> Tensor:
    """The new values, and the old one wherever the new is NaN."""
    return torch.where(torch.isnan(new_D), old_D, new_D)


def max_abs(values_G: Tensor) -> float:
    """max_i |x_i| over the entries that are not NaN; 0 when there is none."""
    return float(torch.nan_to_num(values_G, nan=0.0).abs().max())


def _require_finite(values_G: Tensor, present_G: Tensor, what: str, groups: Sequence[str], step: int) -> None:
    bad_G = present_G & ~torch.isfinite(values_G)
    if bool(bad_G.any()):
        listed = [f"{groups[i]}: {float(values_G[i])}" for i in torch.nonzero(bad_G).flatten().tolist()]
        raise NumericsError(
            f"step {step}: {what} are not finite for {', '.join(listed)}; the loss or a gradient overflowed (lower the "
            "learning rate, clip gradients, or look at that domain's text)"
        )
