"""Students that run m experts per token: the same causal gate, restricted to its best m and renormalised.

Choosing has no gradient, and with m = 1 the weight of what was chosen is always 1: training by the restricted model
alone would learn nothing about which to choose. The restricted model is therefore what the student is scored by, and
the choice learns from the unrestricted weights as well (`log_sparse`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from weftlm.distillation.config import DistilConfig
from weftlm.distillation.structural import DistilProgress, DistilResult, DistilState, distil_structural
from weftlm.errors import ConfigError
from weftlm.gating.features import FLOOR
from weftlm.gating.gate import CausalGate, Features, Gate, SparseGate
from weftlm.gating.modular_cache import catch_up_due, check_refresh_every
from weftlm.gating.prefix_gate import among
from weftlm.gating.sequences import ScoredSequences


def log_sparse(student: SparseGate, features: Features) -> Tensor:
    """log s(x), restricted, with a gradient a sparse student can learn from: three terms' sum over t.

        log sum_{k in top m} w_k q_k(x_t) + log sum_k gamma_k q_k(x_t) + 1[m = 1] sum_k gamma_k log q_k(x_t)

    w: the m largest of gamma, renormalised. The first term moves weights among the chosen. The second, the unrestricted
    mixture, moves those of the others too, straight through the choice, and keeps them from freezing. With m = 1 the
    first has no gradient and the best mixture need not hold the best single expert most: the third, the expected
    log-probability of an expert drawn from gamma, does. log q_k counts within 50 nats of the restricted mixture's.
    """
    logp_BTE, mask_BT = student.tokens(features)
    logits_BTE = student.logits(features)
    logp_BTE = logp_BTE.to(logits_BTE.dtype)
    tokens_BT = torch.logsumexp(student.restricted(logits_BTE) + logp_BTE.clamp_min(-1e4), dim=-1)
    through_BT = torch.logsumexp(torch.log_softmax(logits_BTE, dim=-1) + logp_BTE.clamp_min(-1e4), dim=-1)
    if student.top == 1:
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
    config: DistilConfig | None = None,
    state: DistilState | None = None,
    on_progress: Callable[[DistilProgress, DistilState], None] | None = None,
    on_stop: Callable[[DistilState], None] | None = None,
) -> DistilResult:
    """Train a student further with only its m best experts per token.

    Args:
        gate: Teacher.
        student: A `SparseGate` ("prefix"), as `distil_structural` gave it.
        samples, config, state, on_progress, on_stop: As in `distil_structural`.
        experts_per_token: m. With all of them, training is that of `distil_structural`.
    Returns:
        The result; its gate carries m in its configuration (`top`) and can be saved and driven like any other.
    Raises:
        ConfigError: the student cannot be sparse, or m is not between 1 and the number of experts.
        NumericsError: the restricted student gives a sample no probability, as can be with experts that give 0.
    """
    if not isinstance(student, SparseGate):
        raise ConfigError(f"gate {student.config.gate!r} cannot run a few experts per token; take a 'prefix' gate")
    if not 1 <= experts_per_token <= student.experts:
        raise ConfigError(f"experts_per_token is {experts_per_token}; it must be from 1 to {student.experts}")
    return distil_structural(
        gate, samples, student=student.with_top(experts_per_token), config=config, objective=log_sparse, state=state,
        on_progress=on_progress, on_stop=on_stop,
    )  # fmt: skip


@torch.no_grad()
def log_served(
    student: CausalGate, features: Features, *, known_tokens: int = 0, refresh_every: int | None = None
) -> Tensor:
    """log s(x) as `ModularLM` serves it token by token: experts of weight 0 sleep, and the gate lacks their scores.

    The mixture's own log-probability of a token is taken for that of an inactive expert. An expert that is called again
    reads all it missed, and every `refresh_every` tokens all experts do; from then on the gate knows their scores. The
    model is normalised like any causal gate's, but it is another one than the student that sees all scores; with all
    experts at work, or a `refresh_every` of 1, the two are the same.

    Args:
        student: Any causal gate.
        features: Features of B sequences, with `logp_BTE`.
        known_tokens: Tokens at the start that all experts score, as when a prompt is read.
        refresh_every: Tokens after which every expert catches up, sooner early in a text (`catch_up_due`); None for
            never.
    Returns:
        log s(x), B, nats, float64.
    Raises:
        ConfigError: `refresh_every` is not positive.
    """
    check_refresh_every(refresh_every)
    wide = student.to("cpu", torch.float64)
    logp_BTE, mask_BT = wide.tokens(features)
    logp_BTE = logp_BTE.double()
    mask_BT = torch.ones(logp_BTE.shape[:2], dtype=torch.bool) if mask_BT is None else mask_BT
    known_BTE = torch.zeros_like(logp_BTE, dtype=torch.bool)
    told_BTE = logp_BTE.clone()  # the gate's input: true scores where they are known, else the mixture's own
    state = anchored = wide.begin(len(logp_BTE))
    anchor = 0
    total_B = torch.zeros(len(logp_BTE), dtype=torch.float64)
    for t in range(logp_BTE.shape[1]):
        if t <= known_tokens or catch_up_due(refresh_every, anchor + 1, t + 1):
            for place in range(anchor, t):
                anchored = wide.advance(anchored, logp_BTE[:, place], mask_BT[:, place])
            state, anchor = anchored, t
            logw_BE = wide.current(state)
            known_BTE[:, t] = True
        else:
            state = wide.advance(state, told_BTE[:, t - 1], mask_BT[:, t - 1])
            logw_BE = before_BE = wide.current(state)
            ran_BE = ~torch.isneginf(before_BE)
            late_BE = ran_BE & ~known_BTE[:, anchor:t].all(dim=1)
            if bool(late_BE.any()):
                known_BTE[:, anchor:t] |= late_BE[:, None]
                told_BTE[:, anchor:t] = torch.where(
                    known_BTE[:, anchor:t], logp_BTE[:, anchor:t], told_BTE[:, anchor:t]
                )
                state = anchored
                for place in range(anchor, t):
                    state = wide.advance(state, told_BTE[:, place], mask_BT[:, place])
                logw_BE = among(wide.current(state), ran_BE, before_BE)
            known_BTE[:, t] = ran_BE
        token_B = torch.logsumexp(logw_BE + logp_BTE[:, t], dim=-1)
        told_BTE[:, t] = torch.where(known_BTE[:, t], logp_BTE[:, t], token_B[:, None])
        total_B = total_B + torch.where(mask_BT[:, t], token_B, torch.zeros_like(token_B))
    return total_B
