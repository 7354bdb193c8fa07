"""The routed low-rank product: per token, the weighted sum of its chosen experts' updates.

    delta[n] = sum_k w[n, k] B[e[n, k]] (A[e[n, k]] u[n])

Six ways to the same numbers, chosen by size and device; the cost grows with the tokens and the chosen K, and with the
pool only as far as its factors must be read, or as all experts cost less than the calls that choosing would take.

| way     | used                            | how                                                               |
|---------|---------------------------------|-------------------------------------------------------------------|
| gather  | a handful of tokens             | each assignment's own factors are copied, two batched products    |
| each    | CPU, few tokens: decoding       | a product per assignment with A, then rows of B summed in place   |
| dense   | few experts                     | all experts on every token, those not chosen with weight 0        |
| packed  | CPU, without gradient           | assignments sorted by expert into rows of equal number, batched   |
|         |                                 | products over the pool; what exceeds the rows, expert by expert   |
| grouped | accelerators, and with gradient | assignments sorted by expert, two grouped products                |
| loop    | where grouped products are not  | the same sorted order, one expert after the other                 |
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
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
ACCELERATOR_CALL_FLOPS = 1e8
"""Operations in the time of one kernel launch, about 5 us at 2e13 a second: an estimate for float32 on a GPU."""
KEPT_BYTES = 1 << 28
"""Scratch buffers larger than this are not kept between calls."""
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
    if _can_group(A_ERI, B_ERO):
        return grouped_delta(u_NI, experts_NK, weights_NK, A_ERI, B_ERO)
    if _dense_pays(u_NI.shape[0], assignments, A_ERI, B_ERO):
        return dense_delta(u_NI, experts_NK, weights_NK, A_ERI, B_ERO)
    return loop_delta(u_NI, experts_NK, weights_NK, A_ERI, B_ERO)


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


def dense_delta(u_NI: Tensor, experts_NK: Tensor, weights_NK: Tensor, A_ERI: Tensor, B_ERO: Tensor) -> Tensor:
    """By two products with all experts' factors side by side, masked by the weights between; see `routed_delta`."""
    experts, rank, width = A_ERI.shape
    weights_NE = u_NI.new_zeros(u_NI.shape[0], experts).scatter_add(1, experts_NK, weights_NK.to(u_NI.dtype))
    h_NER = (u_NI @ A_ERI.reshape(experts * rank, width).T).view(-1, experts, rank) * weights_NE[:, :, None]
    delta_NO: Tensor = h_NER.flatten(1) @ B_ERO.reshape(experts * rank, -1)
    return delta_NO


def packed_delta(u_NI: Tensor, experts_NK: Tensor, weights_NK: Tensor, A_ERI: Tensor, B_ERO: Tensor) -> Tensor:
    """By one batched product over the pool, and products of their own for what crowded experts have beyond its rows.

    Assignments are laid out as rows: C rows for each of the E experts (its first tokens, then rows nobody reads), after
    them, expert by expert, the tokens beyond the first C. Rows are scratch memory kept between calls: fresh memory
    costs more than the products. No gradient. See `routed_delta`.
    """
    tokens, chosen = experts_NK.shape
    experts, rank, width = A_ERI.shape
    out = B_ERO.shape[2]
    flat_M = experts_NK.flatten()
    order_M = flat_M.argsort(stable=True)
    sorted_M = flat_M[order_M]
    counts_E = torch.bincount(flat_M, minlength=experts)
    counts = counts_E.tolist()
    capacity = _capacity(counts, rank, width, out, A_ERI.element_size())
    packed = experts * capacity
    # The r-th token of expert e is in row e C + r while r < C, and otherwise among the rows beyond.
    rank_M = torch.arange(len(flat_M), device=flat_M.device) - (counts_E.cumsum(0) - counts_E)[sorted_M]
    beyond_E = (counts_E - capacity).clamp_min_(0)
    first_beyond_E = beyond_E.cumsum(0) - beyond_E + (packed - capacity)
    row_M = torch.where(rank_M < capacity, sorted_M * capacity, first_beyond_E[sorted_M]) + rank_M
    rows = packed + sum(count - capacity for count in counts if count > capacity)
    token_X = flat_M.new_zeros(rows)
    token_X[row_M] = order_M.div(chosen, rounding_mode="floor")
    u_XI = torch.index_select(u_NI, 0, token_X, out=_scratch("inputs", (rows, width), u_NI))
    h_XR = _scratch("hidden", (rows, rank), u_NI)
    update_XO = _scratch("outputs", (rows, out), u_NI)
    if capacity:
        h_ECR = h_XR[:packed].view(experts, capacity, rank)
        torch.bmm(u_XI[:packed].view(experts, capacity, width), A_ERI.transpose(1, 2), out=h_ECR)
        torch.bmm(h_ECR, B_ERO, out=update_XO[:packed].view(experts, capacity, out))
    crowded = [(expert, count - capacity) for expert, count in enumerate(counts) if count > capacity]
    sizes = [packed, *(count for _, count in crowded)]
    pieces = zip(crowded, u_XI.split(sizes)[1:], h_XR.split(sizes)[1:], update_XO.split(sizes)[1:], strict=True)
    for (expert, _), u_CI, h_CR, update_CO in pieces:
        torch.mm(u_CI, A_ERI[expert].T, out=h_CR)
        torch.mm(h_CR, B_ERO[expert], out=update_CO)
    row_NK = torch.empty_like(flat_M)
    row_NK[order_M] = row_M
    return F.embedding_bag(
        row_NK.view(tokens, chosen), update_XO, per_sample_weights=weights_NK.to(update_XO.dtype), mode="sum"
    )


def _capacity(counts: Sequence[int], rank: int, width: int, out: int, element_size: int) -> int:
    """Rows per expert in the batched product that make the whole cheapest.

    The batched product reads every expert's factors and works on as many rows as the capacity says, wanted or not; what
    is beyond costs two calls per expert that has more. Only the experts' own counts need be tried, and 0: no batched
    product at all.
    """
    row = 2 * rank * (width + out) * SECONDS_PER_FLOP + width * element_size * COPY_SECONDS_PER_BYTE
    read = len(counts) * rank * (width + out) * element_size * READ_SECONDS_PER_BYTE
    sorted_E = np.sort(counts)
    capacity_C = np.unique(sorted_E[sorted_E > 0])
    within_C = np.searchsorted(sorted_E, capacity_C, side="right")  # experts with no more than that
    wasted_C = within_C * capacity_C - np.cumsum(sorted_E)[within_C - 1]
    cost_C = read + (len(counts) - within_C) * 2 * CALL_SECONDS + wasted_C * row
    best = int(cost_C.argmin())
    return int(capacity_C[best]) if cost_C[best] < np.count_nonzero(sorted_E) * 2 * CALL_SECONDS else 0


def _sorted(experts_NK: Tensor, weights_NK: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Assignments sorted by expert: their tokens and weights, and how many each expert has."""
    flat_M = experts_NK.flatten()
    order_M = flat_M.argsort(stable=True)
    counts_E = torch.bincount(flat_M, minlength=experts)
    return order_M.div(experts_NK.shape[1], rounding_mode="floor"), weights_NK.flatten()[order_M], counts_E


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
        packed_delta: torch.inf if apart else 30 * CALL_SECONDS + 2 * pool + assignments * (flop + copied / 16) * 1.5,
    }
    return min(costs, key=costs.__getitem__)


def _dense_pays(tokens: int, assignments: int, A_ERI: Tensor, B_ERO: Tensor) -> bool:
    """Whether all experts on every token cost less than three calls for each expert that has tokens."""
    experts = A_ERI.shape[0]
    needless = (tokens * experts - assignments) * 2 * (A_ERI[0].numel() + B_ERO[0].numel())
    call = CALL_SECONDS / SECONDS_PER_FLOP if A_ERI.device.type == "cpu" else ACCELERATOR_CALL_FLOPS
    return needless <= 3 * min(experts, assignments) * call


def _can_group(A_ERI: Tensor, B_ERO: Tensor) -> bool:
    """Grouped products want rows of a multiple of 16 bytes and no float64; on CUDA bfloat16 is the surest type."""
    size = A_ERI.element_size()
    if A_ERI.dtype == torch.float64 or not hasattr(F, "grouped_mm"):
        return False
    return all(width * size % 16 == 0 for width in (A_ERI.shape[1], A_ERI.shape[2], B_ERO.shape[2])) and (
        A_ERI.device.type != "cuda" or A_ERI.dtype == torch.bfloat16
    )


_SCRATCH = threading.local()
"""Memory kept between calls, per thread: one buffer per use and dtype, grown when needed."""


def _scratch(use: str, shape: Sequence[int], like: Tensor) -> Tensor:
    numbers = math.prod(shape)
    buffers: dict[str, Tensor] = _SCRATCH.__dict__
    key = f"{use} in {like.dtype}"
    held = buffers.get(key)
    if held is None or held.numel() < numbers or held.device != like.device:
        with torch.inference_mode(False):  # a tensor born in inference mode could not be written outside it
            held = torch.empty(numbers, dtype=like.dtype, device=like.device)
        if numbers * like.element_size() <= KEPT_BYTES:
            buffers[key] = held
    return held[:numbers].view(tuple(shape))
