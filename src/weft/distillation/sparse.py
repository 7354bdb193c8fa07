"""Students that run m experts per token: the same causal gate, restricted to its best m and renormalised.

Choosing has no gradient, and with m = 1 the weight of what was chosen is always 1: training by the restricted model
alone would learn nothing about whom to choose. The restricted model is therefore what the student is scored by, and the
choice learns from the unrestricted weights as well (`log_sparse`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from weft.distillation.structural import (
    DistilConfig,
    DistilProgress,
    DistilResult,
    DistilState,
    distil_structural,
    log_students,
    student_kl,
)
from weft.errors import ConfigError
from weft.gating.features import FLOOR
from weft.gating.gate import CausalGate, Features, Gate
from weft.gating.prefix_gate import PrefixGate, fill_unseen, with_top
from weft.gating.sequences import ScoredSequences


@dataclass(frozen=True)
class SparseRow:
    """What a student with m experts per token is worth; one line of a table.

    Attributes:
        experts_per_token: m; None: all.
        kl: KL(pi_g / Z || student) on the samples it was measured on, nats per sequence.
        error: standard error of `kl`; 0 where enumerated.
        ce: cross-entropy of each domain that came, nats per token where tokens are counted, else per sequence.
        ce_unseen: the same where experts that did not run on a token leave its score unknown to the gate.
    """

    experts_per_token: int | None
    kl: float
    error: float
    ce: Mapping[str, float]
    ce_unseen: Mapping[str, float]


def log_sparse(student: CausalGate, features: Features) -> Tensor:
    """log s(x), restricted, with a gradient a sparse student can learn from: three terms' sum over t.

        log sum_{k in top m} w_k q_k(x_t) + log sum_k gamma_k q_k(x_t) + 1[m = 1] sum_k gamma_k log q_k(x_t)

    w: the m largest of gamma, renormalised. The first term moves weights among the chosen. The second, the unrestricted
    mixture, moves those of the others too, straight through the choice, and keeps them from freezing. With m = 1 the
    first has no gradient and the best mixture need not hold the best single expert most: the third, the expected
    log-probability of an expert drawn from gamma, does. log q_k counts within 50 nats of the restricted mixture's.

    Raises:
        ConfigError: the student is no "prefix" gate.
    """
    if not isinstance(student, PrefixGate):
        raise ConfigError(f"gate {student.config.gate!r} has no `top`; a sparse student is a 'prefix' gate")
    logp_BTE, mask_BT = student.tokens(features)
    logits_BTE = student.logits(features)
    logp_BTE = logp_BTE.to(logits_BTE.dtype)
    tokens_BT = torch.logsumexp(student.restricted(logits_BTE) + logp_BTE.clamp_min(-1e4), dim=-1)
    through_BT = torch.logsumexp(torch.log_softmax(logits_BTE, dim=-1) + logp_BTE.clamp_min(-1e4), dim=-1)
    if student.config.top == 1:
        gain_BTE = (logp_BTE - tokens_BT.detach()[..., None]).clamp(-FLOOR, FLOOR)
        through_BT = through_BT + (torch.softmax(logits_BTE, dim=-1) * gain_BTE).sum(dim=-1)
    total_BT = tokens_BT + through_BT - through_BT.detach()
    if mask_BT is not None:
        total_BT = torch.where(mask_BT, total_BT, torch.zeros_like(total_BT))
    return total_BT.sum(dim=-1)


def distil_sparse(
    gate: Gate,
    student: CausalGate,
    samples: Sequence[ScoredSequences],
    experts_per_token: int,
    *,
    held_out: Sequence[ScoredSequences] | None = None,
    real: Mapping[str, ScoredSequences] | Sequence[ScoredSequences] = (),
    lam: Any = None,
    config: DistilConfig | None = None,
    state: DistilState | None = None,
    until: int | None = None,
    on_progress: Callable[[DistilProgress, DistilState], None] | None = None,
) -> DistilResult:
    """Train a student further with only its m best experts per token.

    Args:
        gate: the teacher.
        student: a "prefix" gate, as `distil_structural` gave it.
        samples, held_out, real, lam, config, state, until, on_progress: as in `distil_structural`.
        experts_per_token: m. With all of them, training is that of `distil_structural`.
    Returns:
        The result; its gate carries m in its configuration (`top`) and can be saved and driven like any other.
    Raises:
        ConfigError: the student is no "prefix" gate, or m is not between 1 and the number of experts.
        NumericsError: the restricted student gives a sample no probability, as can be with experts that give 0.
    """
    if not isinstance(student, PrefixGate):
        raise ConfigError(f"gate {student.config.gate!r} came; a sparse student is a 'prefix' gate")
    if not 1 <= experts_per_token <= student.experts:
        raise ConfigError(f"experts_per_token is {experts_per_token}; it must be from 1 to {student.experts}")
    start = with_top(student, experts_per_token)
    return distil_structural(
        gate, samples, student=start, held_out=held_out, real=real, lam=lam, config=config, objective=log_sparse,
        state=state, until=until, on_progress=on_progress,
    )  # fmt: skip


def sparse_table(
    gate: Gate,
    students: Sequence[CausalGate],
    samples: Sequence[ScoredSequences],
    domains: Mapping[str, ScoredSequences] | None = None,
    *,
    known_tokens: int = 0,
) -> tuple[SparseRow, ...]:
    """KL and cross-entropies of students side by side, on data none was fitted on.

    Args:
        gate: the teacher.
        students: causal gates; m is read from their configuration.
        samples: held-out draws of the experts, for KL.
        domains: real text, for cross-entropies.
        known_tokens: tokens at the start of each text that every expert scores even in sparse serving, as a prompt.
    Raises:
        ConfigError, NumericsError: as `student_kl`.
    """
    rows = []
    for student in students:
        kl, error = student_kl(gate, student, samples)
        ce, unseen = {}, {}
        for name, one in (domains or {}).items():
            ce[name] = _cross_entropy(one, log_students(student, one))
            unseen[name] = _cross_entropy(one, log_served(student, one.features, known_tokens=known_tokens))
        rows.append(SparseRow(getattr(student.config, "top", None), kl, error, ce, unseen))
    return tuple(rows)


@torch.no_grad()
def log_served(student: CausalGate, features: Features, *, known_tokens: int = 0) -> Tensor:
    """log s(x) as sparse serving has it: experts of weight 0 do not run, and the gate never learns their scores.

    What did not run is filled in by `fill_unseen`. The model is normalised like any causal gate's, but it is another
    one than the student that sees all scores; with all experts at work the two are the same.

    Args:
        student: any causal gate.
        features: of B sequences, with `logp_BTE`.
        known_tokens: tokens at the start that all experts score, as when a prompt is read.
    Returns:
        log s(x), B, nats, float64.
    """
    wide = student.to("cpu", torch.float64)
    logp_BTE, mask_BT = wide.tokens(features)
    logp_BTE = logp_BTE.double()
    state = wide.begin(len(logp_BTE))
    total_B = torch.zeros(len(logp_BTE), dtype=torch.float64)
    for t in range(logp_BTE.shape[1]):
        logw_BE, logp_BE = wide.current(state), logp_BTE[:, t]
        mask_B = None if mask_BT is None else mask_BT[:, t]
        token_B = torch.logsumexp(logw_BE + logp_BE, dim=-1)
        total_B = total_B + (token_B if mask_B is None else torch.where(mask_B, token_B, torch.zeros_like(token_B)))
        if t >= known_tokens:
            logp_BE = fill_unseen(logw_BE, logp_BE, ~torch.isneginf(logw_BE))
        state = wide.advance(state, logp_BE, mask_B)
    return total_B


def _cross_entropy(one: ScoredSequences, logs_N: Tensor) -> float:
    weights_N = one.probability()
    total = -float(weights_N @ logs_N)
    if one.tokens_N is not None:
        total /= float(weights_N @ one.tokens_N)
    return total if math.isfinite(total) else math.inf
