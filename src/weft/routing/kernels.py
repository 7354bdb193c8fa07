"""The routed low-rank product: per token, the weighted sum of its chosen experts' updates.

    delta[n] = sum_k w[n, k] B[e[n, k]] (A[e[n, k]] u[n])

Four ways to the same numbers, chosen by size and device; the cost grows with the tokens and the chosen K, and with the
pool only as far as its factors must be read.

| way     | used                            | how                                                               |
|---------|---------------------------------|-------------------------------------------------------------------|
| gather  | few tokens: decoding            | each assignment's own factors are copied, two batched products    |
| packed  | CPU, without gradient           | assignments sorted by expert into rows of equal number, batched   |
|         |                                 | products over the pool; crowded experts get products of their own |
| grouped | accelerators, and with gradient | assignments sorted by expert, two grouped products                |
| loop    | where grouped products are not  | the same sorted order, one expert after the other                 |
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

COPY_SECONDS_PER_BYTE = 1e-10
CALL_SECONDS = 9e-6
"""Costs behind the choice on the CPU: of copying factors, and of one small matrix product. Rough on purpose."""


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
    if _cheap_to_copy(assignments, A_ERI, B_ERO):
        return gather_delta(u_NI, experts_NK, weights_NK, A_ERI, B_ERO)
    if u_NI.device.type == "cpu" and not grad:
        return packed_delta(u_NI, experts_NK, weights_NK, A_ERI, B_ERO)
    if _can_group(A_ERI, B_ERO):
        return grouped_delta(u_NI, experts_NK, weights_NK, A_ERI, B_ERO)
    return loop_delta(u_NI, experts_NK, weights_NK, A_ERI, B_ERO)


def gather_delta(u_NI: Tensor, experts_NK: Tensor, weights_NK: Tensor, A_ERI: Tensor, B_ERO: Tensor) -> Tensor:
    """By copying each assignment's factors; see `routed_delta`."""
    tokens, chosen = experts_NK.shape
    flat_M = experts_NK.flatten()
    A_NXI = A_ERI.index_select(0, flat_M).view(tokens, chosen * A_ERI.shape[1], A_ERI.shape[2])
    B_NXO = B_ERO.index_select(0, flat_M).view(tokens, chosen * B_ERO.shape[1], B_ERO.shape[2])
    h_NX = torch.bmm(A_NXI, u_NI[:, :, None]).view(tokens, chosen, -1) * weights_NK.to(u_NI.dtype)[:, :, None]
    return torch.bmm(h_NX.view(tokens, 1, -1), B_NXO)[:, 0]


def loop_delta(u_NI: Tensor, experts_NK: Tensor, weights_NK: Tensor, A_ERI: Tensor, B_ERO: Tensor) -> Tensor:
    """By one pair of products per expert that has tokens; see `routed_delta`."""
    tokens_M, weights_M, counts_E = _sorted(experts_NK, weights_NK, A_ERI.shape[0])
    pieces = []
    for expert, rows in enumerate(tokens_M.split(counts_E.tolist())):
        if len(rows):
            pieces.append(u_NI.index_select(0, rows) @ A_ERI[expert].T @ B_ERO[expert])
    update_MO = torch.cat(pieces) * weights_M.to(u_NI.dtype)[:, None]
    return u_NI.new_zeros(u_NI.shape[0], B_ERO.shape[2]).index_add(0, tokens_M, update_MO)


def grouped_delta(u_NI: Tensor, experts_NK: Tensor, weights_NK: Tensor, A_ERI: Tensor, B_ERO: Tensor) -> Tensor:
    """By two grouped matrix products over assignments sorted by expert; see `routed_delta`."""
    tokens_M, weights_M, counts_E = _sorted(experts_NK, weights_NK, A_ERI.shape[0])
    offsets_E = counts_E.cumsum(0).to(torch.int32)
    h_MR = F.grouped_mm(u_NI.index_select(0, tokens_M), A_ERI.transpose(1, 2), offs=offsets_E)
    update_MO = F.grouped_mm(h_MR * weights_M.to(u_NI.dtype)[:, None], B_ERO, offs=offsets_E)
    return u_NI.new_zeros(u_NI.shape[0], B_ERO.shape[2]).index_add(0, tokens_M, update_MO)


def packed_delta(u_NI: Tensor, experts_NK: Tensor, weights_NK: Tensor, A_ERI: Tensor, B_ERO: Tensor) -> Tensor:
    """By one batched product over experts with few tokens each, and products of their own for crowded ones.

    Assignments are laid out as rows: C rows for each of the E experts (an expert's tokens, then rows nobody reads),
    after them the assignments of experts with more than C tokens, expert by expert. Rows are scratch memory kept
    between calls: fresh memory costs more than the products. No gradient. See `routed_delta`.
    """
    tokens, chosen = experts_NK.shape
    experts, rank, width = A_ERI.shape
    out = B_ERO.shape[2]
    flat_M = experts_NK.flatten()
    order_M = flat_M.argsort(stable=True)
    counts_E = torch.bincount(flat_M, minlength=experts)
    capacity = _capacity(counts_E, rank * (width + out) * A_ERI.element_size())
    crowded_E = counts_E > capacity
    # An expert's first row: expert * capacity, or its place among the crowded ones' assignments after all of those.
    crowded_counts_E = counts_E * crowded_E
    packed = experts * capacity
    first_E = torch.where(
        crowded_E,
        packed + crowded_counts_E.cumsum(0) - crowded_counts_E,
        torch.arange(experts, device=flat_M.device) * capacity,
    )
    sorted_M = flat_M[order_M]
    row_M = (first_E - (counts_E.cumsum(0) - counts_E))[sorted_M] + torch.arange(len(flat_M), device=flat_M.device)
    rows = packed + int(crowded_counts_E.sum())
    token_X = flat_M.new_zeros(rows)
    token_X[row_M] = order_M.div(chosen, rounding_mode="floor")
    u_XI = torch.index_select(u_NI, 0, token_X, out=_scratch("inputs", (rows, width), u_NI))
    h_XR = _scratch("hidden", (rows, rank), u_NI)
    update_XO = _scratch("outputs", (rows, out), u_NI)
    if capacity:
        h_ECR = h_XR[:packed].view(experts, capacity, rank)
        torch.bmm(u_XI[:packed].view(experts, capacity, width), A_ERI.transpose(1, 2), out=h_ECR)
        torch.bmm(h_ECR, B_ERO, out=update_XO[:packed].view(experts, capacity, out))
    begin = packed
    for expert, count in _counts_of(crowded_counts_E):
        end = begin + count
        torch.mm(u_XI[begin:end], A_ERI[expert].T, out=h_XR[begin:end])
        torch.mm(h_XR[begin:end], B_ERO[expert], out=update_XO[begin:end])
        begin = end
    row_NK = torch.empty_like(flat_M)
    row_NK[order_M] = row_M
    return F.embedding_bag(
        row_NK.view(tokens, chosen), update_XO, per_sample_weights=weights_NK.to(update_XO.dtype), mode="sum"
    )


def _capacity(counts_E: Tensor, factor_bytes: int) -> int:
    """Rows per expert in the batched product: all that fit the busiest, unless few experts take most of the tokens.

    A batched product reads every expert's factors and as many rows as the capacity says; a product of its own costs a
    call. Capacities tried are quantiles of the counts.
    """
    experts = len(counts_E)
    ordered = sorted(counts_E.tolist())
    best, cost = 0, sum(1 for count in ordered if count) * 2 * CALL_SECONDS
    for place in (0.5, 0.8, 0.9, 0.95, 1.0):
        capacity = ordered[min(experts - 1, int(place * experts))]
        crowded = sum(1 for count in ordered if count > capacity)
        wasted = experts * capacity - sum(count for count in ordered if count <= capacity)
        read = experts * factor_bytes * COPY_SECONDS_PER_BYTE / 4
        estimate = read + crowded * 2 * CALL_SECONDS + wasted * 3e-7
        if capacity and estimate < cost:
            best, cost = capacity, estimate
    return best


def _counts_of(counts_E: Tensor) -> list[tuple[int, int]]:
    """(expert, tokens) of every expert with tokens."""
    return [(expert, count) for expert, count in enumerate(counts_E.tolist()) if count]


def _sorted(experts_NK: Tensor, weights_NK: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Assignments sorted by expert: their tokens and weights, and how many each expert has."""
    flat_M = experts_NK.flatten()
    order_M = flat_M.argsort(stable=True)
    counts_E = torch.bincount(flat_M, minlength=experts)
    return order_M.div(experts_NK.shape[1], rounding_mode="floor"), weights_NK.flatten()[order_M], counts_E


def _cheap_to_copy(assignments: int, A_ERI: Tensor, B_ERO: Tensor) -> bool:
    """Whether copying the factors of every assignment costs less than sorting and reading the pool once."""
    factor_bytes = (A_ERI[0].numel() + B_ERO[0].numel()) * A_ERI.element_size()
    pool = A_ERI.shape[0] * factor_bytes * COPY_SECONDS_PER_BYTE / 4
    return assignments * factor_bytes * COPY_SECONDS_PER_BYTE < 30 * CALL_SECONDS + pool


def _can_group(A_ERI: Tensor, B_ERO: Tensor) -> bool:
    """Grouped products want rows of a multiple of 16 bytes, and on CUDA bfloat16 is the surest type."""
    size = A_ERI.element_size()
    return all(width * size % 16 == 0 for width in (A_ERI.shape[1], A_ERI.shape[2], B_ERO.shape[2])) and (
        A_ERI.device.type != "cuda" or A_ERI.dtype == torch.bfloat16
    )


class _Scratch(threading.local):
    """Memory kept between calls, per thread: one buffer per use and dtype, grown when needed."""

    def __init__(self) -> None:
        self.buffers: dict[tuple[str, torch.dtype], Tensor] = {}


_SCRATCH = _Scratch()


def _scratch(use: str, shape: Sequence[int], like: Tensor) -> Tensor:
    numbers = 1
    for size in shape:
        numbers *= size
    key = (use, like.dtype)
    held = _SCRATCH.buffers.get(key)
    if held is None or held.numel() < numbers:
        held = _SCRATCH.buffers[key] = torch.empty(numbers, dtype=like.dtype, device=like.device)
    return held[:numbers].view(tuple(shape))
