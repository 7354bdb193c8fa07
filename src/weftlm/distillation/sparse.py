"""Students that run m experts per token: the same causal gate, restricted to its best m and renormalised.

Choosing has no gradient, and with m = 1 the weight of what was chosen is always 1: training by the restricted model
alone would learn nothing about which to choose. The restricted model is therefore what the student is scored by, and
the choice learns from the unrestricted weights as well (`log_sparse`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from weftlm.gating.gate import FLOOR, CausalGate, Features
from weftlm.gating.modular_cache import ModularCache
from weftlm.gating.modular_reader import ModularReader
from weftlm.gating.prefix_gate import PrefixGate


def log_sparse(student: PrefixGate, features: Features) -> Tensor:
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


@torch.no_grad()
def log_served(
    student: CausalGate, features: Features, *, known_tokens: int = 0, refresh_every: int | None = None
) -> Tensor:
    """log s(x) as `ModularLM` serves it token by token, some experts inactive and their scores unknown to the gate.

    The model is normalised like any causal gate's, but it is another one than the student that sees all scores; with
    all experts active, or a `refresh_every` of 1, the two are the same. Texts are read by `ModularReader` over a
    vocabulary of one id: what expert e says after slot t is its score of the token in slot t + 1.

    Args:
        student: Any causal gate.
        features: Features of B sequences, with `logp_BTE`; padding only at their ends.
        known_tokens: Tokens at the start that all experts score, as when a prompt is read.
        refresh_every: Tokens after which every expert catches up, sooner early in a text (`catch_up_due`); None for
            never.
    Returns:
        log s(x), B, nats, float64.
    Raises:
        ConfigError: `refresh_every` is not positive.
    """
    wide = student.to("cpu", torch.float64)
    logp_BTE, mask_BT = wide.tokens(features)
    batch, length, experts = logp_BTE.shape
    table_EBT = logp_BTE.double().permute(2, 0, 1)

    def run(cache: ModularCache, number: int, index_X: Tensor, places_X: Tensor, first: int, end: int) -> Tensor:
        return table_EBT[places_X, index_X % batch, first:end, None]

    reader = ModularReader(wide, [range(experts)], run, 1, student.top, refresh_every)
    cache = ModularCache([experts], batch, wide.begin)
    real_BT = torch.ones(batch, length, dtype=torch.bool) if mask_BT is None else mask_BT
    slots_BT = torch.cat([torch.ones_like(real_BT[:, :1]), real_BT[:, :-1]], dim=1)
    served, read = [], 0
    while read < length:
        count = known_tokens + 1 if read == 0 else 1
        part_BK = slots_BT[:, read : read + count]
        ids_BK = torch.zeros_like(part_BK, dtype=torch.int64)
        served.append(reader.read(cache, ids_BK, part_BK, kept=part_BK.shape[1])[..., 0])
        read += count
    return torch.where(real_BT, torch.cat(served, dim=1), 0.0).sum(dim=1)
