"""Pools of tiny experts for gated models: whole models, and random adapters over one base."""

from __future__ import annotations

from dataclasses import replace

import torch
from support import experts as tiny
from support.tiny_expert import random_expert
from torch import Tensor

from weftlm.gating.experts import ExpertPool, Member

VOCAB = tiny.VOCAB


def mixed_pool(dtype: torch.dtype = torch.float32) -> ExpertPool:
    """Two adapters and the bare base around a whole model, in an order that is not the backbones'."""
    base = tiny.llama(0).to(dtype)
    first, second = (replace(random_expert(base, seed=i, size=0.5), name=f"a{i}") for i in (1, 2))
    whole = tiny.llama(7).to(dtype)
    return ExpertPool(
        [Member("first", base, first), Member("whole", whole), Member("second", base, second), Member("base", base)]
    )


def whole_pool(experts: int = 3) -> ExpertPool:
    """Whole models."""
    return ExpertPool.of({f"w{seed}": tiny.llama(seed + 10) for seed in range(experts)})


def tokens(batch: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(1, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))
