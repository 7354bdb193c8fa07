"""What the tests of routing share: problems for its kernels with a float64 answer, and ways to run routed models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.experts import prompts
from torch import Tensor

from weftlm.routing import kernels
from weftlm.routing.routed_model import RoutedModel
from weftlm.routing.router import Call, Memory, Routing

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2}
"""Largest error over the sum of the terms' absolute values. Inputs are rounded before both; what is left is rounding on
the way, which cancelling terms do not make smaller."""

Problem = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def kernel_problem(
    tokens: int,
    chosen: int,
    experts: int,
    rank: int,
    width: int,
    out: int,
    assigned: str,
    dtype: torch.dtype,
    seed: int = 0,
) -> Problem:
    """Random u_NI, experts_NK, weights_NK (a third of them zero), A_ERI, B_ERO.

    Args:
        assigned: "even" over the experts, "skewed" to the first ones, or "drawn" at random; distinct within a token.
    """
    generator = torch.Generator().manual_seed(seed * 10_007 + tokens * 31 + chosen * 7 + experts + rank)
    if assigned == "even":
        experts_NK = torch.arange(tokens * chosen).view(tokens, chosen) % experts
    else:
        odds_E = torch.ones(experts) if assigned == "drawn" else 8.0 ** -torch.arange(experts).float()
        order_NE = torch.rand(tokens, experts, generator=generator).log() / odds_E.clamp_min(1e-30)
        experts_NK = order_NE.topk(chosen, dim=1).indices
    weights_NK = torch.rand(tokens, chosen, generator=generator)
    weights_NK[torch.rand(tokens, chosen, generator=generator) < 0.3] = 0.0
    return (
        torch.randn(tokens, width, generator=generator).to(dtype),
        experts_NK,
        weights_NK,
        torch.randn(experts, rank, width, generator=generator).to(dtype),
        torch.randn(experts, rank, out, generator=generator).to(dtype),
    )


def loop_reference(u_NI: Tensor, experts_NK: Tensor, weights_NK: Tensor, A_ERI: Tensor, B_ERO: Tensor) -> Tensor:
    """delta[n] = sum_k w[n, k] B[e[n, k]] A[e[n, k]] u[n], one product at a time in float64."""
    delta_NO = torch.zeros(u_NI.shape[0], B_ERO.shape[2], dtype=torch.float64)
    u_NI, weights_NK, A_ERI, B_ERO = u_NI.double(), weights_NK.double(), A_ERI.double(), B_ERO.double()
    for n, chosen_K in enumerate(experts_NK.tolist()):
        for k, expert in enumerate(chosen_K):
            delta_NO[n] += weights_NK[n, k] * (B_ERO[expert].T @ (A_ERI[expert] @ u_NI[n]))
    return delta_NO


def assert_solve(problem: Problem, **found: Tensor) -> None:
    """The updates of kernels are those of the loop, within the rounding of their dtype."""
    u_NI, experts_NK, weights_NK, A_ERI, B_ERO = problem
    expected_NO = loop_reference(*problem)
    size_NO = loop_reference(u_NI.abs(), experts_NK, weights_NK.abs(), A_ERI.abs(), B_ERO.abs())
    for way, delta_NO in found.items():
        assert delta_NO.dtype == A_ERI.dtype, way
        assert delta_NO.shape == expected_NO.shape, way
        wrong_NO = (delta_NO.cpu().double() - expected_NO).abs() > TOLERANCE[A_ERI.dtype] * size_NO
        assert not bool(wrong_NO.any()), way


def inputs_for(model: Any, *, seed: int = 0, batch: int = 2, tokens: int = 6) -> dict[str, Tensor]:
    """Token ids for one pass; for an encoder-decoder model also the decoder's."""
    given = {"input_ids": prompts(batch, tokens, seed=seed)}
    if model.config.is_encoder_decoder:
        given["decoder_input_ids"] = torch.cat([torch.zeros(batch, 1, dtype=torch.int64), prompts(batch, 3, seed=9)], 1)
    return given


def logits(model: Any, **given: Any) -> Tensor:
    """One pass without gradient."""
    with torch.no_grad():
        found: Tensor = model(**given).logits
    return found


def generate(model: Any, ids_BT: Tensor, mask_BT: Tensor, **options: Any) -> Tensor:
    """Six tokens without sampling; what a decoder-only model was given is cut off."""
    settings = {"do_sample": False, "max_new_tokens": 6, **options}
    found: Tensor = model.generate(ids_BT, attention_mask=mask_BT, **settings)
    return found if model.config.is_encoder_decoder else found[:, ids_BT.shape[1] :]


def recorded(routed: RoutedModel, **given: Any) -> dict[str, Routing]:
    """Every target's routing in one pass."""
    found: dict[str, Routing] = {}
    with routed.recording(lambda target, routing: found.__setitem__(target.name, routing)):
        logits(routed, **given)
    return found


def call_for(batch: int, tokens: int) -> Call:
    """A pass over sequences without padding, of which only the shape is known."""
    mask_BT = torch.ones(batch, tokens, dtype=torch.bool)
    return Call(None, mask_BT, mask_BT, Memory())


WAYS: dict[str, Callable[..., Tensor]] = {
    "routed": kernels.routed_delta,
    "gather": kernels.gather_delta,
    "each": kernels.each_delta,
    "dense": kernels.dense_delta,
    "grouped": kernels.grouped_delta,
}
"""All ways to the routed product."""

kernel_problems = pytest.mark.parametrize(
    "problems",
    [
        pytest.param(
            [kernel_problem(tokens, *sizes, assigned, dtype) for tokens in (1, 5, 40)], id=f"{label}-{assigned}-{dtype}"
        )
        for label, sizes in {"one": (1, 1, 8, 16, 24), "few": (2, 5, 16, 32, 8), "many": (3, 40, 8, 64, 64)}.items()
        for assigned in ("even", "skewed", "drawn")
        for dtype in (torch.float32, torch.bfloat16)
    ],
)
"""One, few and many experts, each with few and many tokens."""
