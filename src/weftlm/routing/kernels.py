"""The routed low-rank product: per token, the weighted sum of its chosen experts' updates.

    delta[n] = sum_k w[n, k] B[e[n, k]] (A[e[n, k]] u[n])

Four ways to the same numbers, chosen by size and device; the cost grows with the tokens and the chosen K, and with the
pool only as far as its factors must be read, or as all experts cost less than the calls that choosing would take.

| way     | used                      | how                                                                        |
|---------|---------------------------|----------------------------------------------------------------------------|
| gather  | a handful of tokens       | each assignment's own factors are copied, two batched products             |
| each    | CPU, few tokens: decoding | a product per assignment with A, then rows of B summed in place            |
| dense   | few experts               | all experts on every token, those not chosen with weight 0                 |
| grouped | all else                  | assignments sorted by expert, two grouped products, or a pair per expert   |
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

Way = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]

CALL_SECONDS = 1e-5
"""Of one small matrix product, beyond its arithmetic. This and what follows decide only which way is taken: they were
measured on one x86 core with 512-bit vectors, and only how they compare with one another matters."""
COPY_SECONDS_PER_BYTE = 8e-11
READ_SECONDS_PER_BYTE = 3e-11
SECONDS_PER_FLOP = 1.6e-11
LARGE_PRODUCT = 0.7
"""What an operation costs in a large matrix product, as a part of what it costs in a small one."""
FEW_ASSIGNMENTS = 8
FEW_EXPERTS = 16
"""Up to so many, all experts on every token cost less than a pair of products for each."""
_APART = threading.local()


@contextmanager
def tokens_apart() -> Iterator[None]:
    """Inside, no token's update depends on what other tokens chose, to the last bit: none is laid out by expert."""
    _APART.on = True
    try:
        yield
    finally:
        _APART.on = False


def routed_delta(u_NI: Tensor, experts_NK: Tensor, weights_NK: Tensor, A_ERI: Tensor, B_ERO: Tensor) -> Tensor:
    """The weighted sum of the chosen experts' updates of every token.

    Args:
        u_NI: inputs; cast to the factors' dtype.
        experts_NK: int64, places in the stack.
        weights_NK: float32; places of weight 0 add nothing.
        A_ERI, B_ERO: the factors, scale folded into B.
    Returns:
        delta_NO in the factors' dtype.
    """
    u_NI = u_NI.to(A_ERI.dtype)
    grad = torch.is_grad_enabled() and (u_NI.requires_grad or weights_NK.requires_grad)
    assignments = experts_NK.numel()
    if assignments == 0:
        return u_NI.new_zeros(u_NI.shape[0], B_ERO.shape[2])
    apart = getattr(_APART, "on", False)
    if assignments <= FEW_ASSIGNMENTS or (apart and u_NI.device.type != "cpu"):
        return gather_delta(u_NI, experts_NK, weights_NK, A_ERI, B_ERO)
    if u_NI.device.type == "cpu" and not grad:
        return _cheapest(u_NI.shape[0], assignments, A_ERI, B_ERO, apart=apart)(
            u_NI, experts_NK, weights_NK, A_ERI, B_ERO
        )
    if not _can_group(A_ERI, B_ERO) and A_ERI.shape[0] <= FEW_EXPERTS:
        return dense_delta(u_NI, experts_NK, weights_NK, A_ERI, B_ERO)
    return grouped_delta(u_NI, experts_NK, weights_NK, A_ERI, B_ERO)


def gather_delta(u_NI: Tensor, experts_NK: Tensor, weights_NK: Tensor, A_ERI: Tensor, B_ERO: Tensor) -> Tensor:
    """By copying each assignment's factors; see `routed_delta`."""
    tokens, chosen = experts_NK.shape
    flat_M = experts_NK.flatten()
    A_NXI = A_ERI.index_select(0, flat_M).view(tokens, chosen * A_ERI.shape[1], A_ERI.shape[2])
    B_NXO = B_ERO.index_select(0, flat_M).view(tokens, chosen * B_ERO.shape[1], B_ERO.shape[2])
    h_NX = torch.bmm(A_NXI, u_NI[:, :, None]).view(tokens, chosen, -1) * weights_NK.to(u_NI.dtype)[:, :, None]
    return torch.bmm(h_NX.view(tokens, 1, -1), B_NXO)[:, 0]


def each_delta(u_NI: Tensor, experts_NK: Tensor, weights_NK: Tensor, A_ERI: Tensor, B_ERO: Tensor) -> Tensor:
    """By a product of its own with A for every assignment, and B's rows summed where they lie; see `routed_delta`.

    The sum over rank and experts, delta[n] = sum_kr (w[n, k] h[n, k, r]) B[e[n, k], r], is a weighted bag of K R rows
    of the table B, so that no factor is copied. No gradient.
    """
    tokens, chosen = experts_NK.shape
    experts, rank, out = B_ERO.shape
    h_NKR = u_NI.new_empty(tokens, chosen, rank)
    for u_I, h_KR, chosen_K in zip(u_NI.unbind(), h_NKR.unbind(), experts_NK.tolist(), strict=True):
        for h_R, expert in zip(h_KR.unbind(), chosen_K, strict=True):
            torch.mv(A_ERI[expert], u_I, out=h_R)
    h_NKR *= weights_NK.to(u_NI.dtype)[:, :, None]
    row_NKR = experts_NK[:, :, None] * rank + torch.arange(rank, device=experts_NK.device)
    table_XO = B_ERO.reshape(experts * rank, out)
    return F.embedding_bag(row_NKR.flatten(1), table_XO, per_sample_weights=h_NKR.flatten(1), mode="sum")


def grouped_delta(u_NI: Tensor, experts_NK: Tensor, weights_NK: Tensor, A_ERI: Tensor, B_ERO: Tensor) -> Tensor:
    """By products over assignments sorted by expert; see `routed_delta`.

    Experts [[2, 0], [0, 2]] of two tokens are four assignments 2 0 0 2, sorted 0 0 2 2: rows 2 0 1 3 of the updates, of
    which token 0 sums rows 2 and 0, and token 1 rows 1 and 3.
    """
    flat_M = experts_NK.flatten()
    order_M = flat_M.argsort(stable=True)
    counts_E = torch.bincount(flat_M, minlength=A_ERI.shape[0])
    u_MI = u_NI.index_select(0, order_M.div(experts_NK.shape[1], rounding_mode="floor"))
    if _can_group(A_ERI, B_ERO):
        offsets_E = counts_E.cumsum(0).to(torch.int32)
        h_MR = F.grouped_mm(u_MI, A_ERI.transpose(1, 2), offs=offsets_E)
        update_MO = F.grouped_mm(h_MR, B_ERO, offs=offsets_E)
    else:
        parts = enumerate(u_MI.split(counts_E.tolist()))
        update_MO = torch.cat([part_XI @ A_ERI[e].T @ B_ERO[e] for e, part_XI in parts if len(part_XI)])
    row_M = torch.empty_like(order_M)
    row_M[order_M] = torch.arange(len(order_M), device=order_M.device)
    weights_NK = weights_NK.to(update_MO.dtype)
    return F.embedding_bag(row_M.view(experts_NK.shape), update_MO, per_sample_weights=weights_NK, mode="sum")


def dense_delta(u_NI: Tensor, experts_NK: Tensor, weights_NK: Tensor, A_ERI: Tensor, B_ERO: Tensor) -> Tensor:
    """By two products with all experts' factors side by side, masked by the weights between; see `routed_delta`."""
    experts, rank, width = A_ERI.shape
    weights_NE = u_NI.new_zeros(u_NI.shape[0], experts).scatter_add(1, experts_NK, weights_NK.to(u_NI.dtype))
    h_NER = (u_NI @ A_ERI.reshape(experts * rank, width).T).view(-1, experts, rank) * weights_NE[:, :, None]
    delta_NO: Tensor = h_NER.flatten(1) @ B_ERO.reshape(experts * rank, -1)
    return delta_NO


def _cheapest(tokens: int, assignments: int, A_ERI: Tensor, B_ERO: Tensor, *, apart: bool = False) -> Way:
    """The way that costs least on a CPU: what it copies and reads, its arithmetic, and its calls."""
    experts = A_ERI.shape[0]
    numbers = A_ERI[0].numel() + B_ERO[0].numel()
    copied = numbers * A_ERI.element_size() * COPY_SECONDS_PER_BYTE
    pool = experts * numbers * A_ERI.element_size() * READ_SECONDS_PER_BYTE
    flop = 2 * numbers * SECONDS_PER_FLOP
    costs = {
        each_delta: 3 * CALL_SECONDS + assignments * (CALL_SECONDS / 2 + copied),
        dense_delta: 4 * CALL_SECONDS + pool + tokens * experts * flop * LARGE_PRODUCT,
        grouped_delta: (30 + 2 * experts) * CALL_SECONDS + 2 * pool + assignments * (flop + copied / 16) * 1.5,
    }
    if apart:
        del costs[grouped_delta]
    return min(costs, key=costs.__getitem__)


def _can_group(A_ERI: Tensor, B_ERO: Tensor) -> bool:
    """Grouped products want rows of a multiple of 16 bytes and no float64; on CUDA bfloat16 is the surest type."""
    size = A_ERI.element_size()
    if A_ERI.dtype == torch.float64 or not hasattr(F, "grouped_mm"):
        return False
    return all(width * size % 16 == 0 for width in (A_ERI.shape[1], A_ERI.shape[2], B_ERO.shape[2])) and (
        A_ERI.device.type != "cuda" or A_ERI.dtype == torch.bfloat16
    )
