"""Features of whole sequences from the experts' scores: per token, so that length gives nothing away."""

from __future__ import annotations

from typing import Any

import torch

from weftlm.errors import ConfigError, DataError
from weftlm.gating.arrays import to_log_likelihoods, to_tensor
from weftlm.gating.gate import Features

FLOOR = 50.0
"""Nats per token below the best expert at which a score is clipped: -inf becomes a number a gate can weigh."""


def sequence_features(
    logq_NE: Any,
    tokens_N: Any,
    *,
    logp_NTE: Any = None,
    mask_NT: Any = None,
) -> Features:
    """What sequence-level gates see.

        m_k = log q_k(x) / T            mean log-likelihood per token, nats
        f   = [ m_1 .. m_E, m_1 - max_j m_j .. m_E - max_j m_j ]

    The number of tokens T enters by that division alone: a text said twice over has the features of the text said once,
    so no gate on them can tell domains apart by length or padding. Features that grow with T would also explode where
    lengths differ. Sums over tokens remain what likelihoods are.

    Args:
        logq_NE: log-likelihood of each sequence under each expert, nats, summed over its T scored tokens.
        tokens_N: T, scored tokens of each sequence, 1 or more.
        logp_NTE: scores of single tokens, carried along for causal gates.
        mask_NT: True for real tokens of `logp_NTE`.
    Returns:
        Features with names mean.0 .. , below_best.0 .. ; scores more than 50 nats per token below the best expert's are
        clipped there.
    Raises:
        ConfigError: shapes do not fit, or a sequence has no token.
        DataError: a sequence is impossible under every expert.
        NumericsError: NaN or +inf.
    """
    logq = to_log_likelihoods(logq_NE, "logq_NE", "NE")
    tokens = to_tensor(tokens_N, "tokens_N", "N")
    if len(tokens) != len(logq) or bool((tokens < 1).any()) or bool(torch.isinf(tokens).any()):
        raise ConfigError(
            f"tokens_N has {len(tokens)} entries from {float(tokens.min()) if len(tokens) else 0:g} up for {len(logq)} "
            "sequences; it needs one per sequence, 1 or more"
        )
    refuse_impossible(logq, "features")
    mean = logq / tokens[:, None].to(logq.dtype)
    best = mean.amax(dim=1, keepdim=True)
    below = (mean - best).clamp_min(-FLOOR)
    experts = range(logq.shape[1])
    columns = [best + below, below]
    names = [f"mean.{k}" for k in experts] + [f"below_best.{k}" for k in experts]
    logp = None if logp_NTE is None else to_log_likelihoods(logp_NTE, "logp_NTE", "NTE")
    mask = None if mask_NT is None else torch.as_tensor(mask_NT).to(torch.bool)
    return Features(len(logq), torch.cat(columns, dim=1), tuple(names), logp_BTE=logp, mask_BT=mask)


def refuse_impossible(logq_NE: torch.Tensor, where: str) -> None:
    """Refuse sequences that every expert gives probability 0.

    Raises:
        DataError: there is one.
    """
    dead_N = torch.isneginf(logq_NE).all(dim=1)
    if bool(dead_N.any()):
        raise DataError(
            f"{where}: {int(dead_N.sum())} of {len(dead_N)} sequences have probability 0 under every one of "
            f"{logq_NE.shape[1]} experts (first: number {int(dead_N.nonzero()[0])}), and no gate can give them any; "
            "leave them out or add an expert that knows them"
        )
