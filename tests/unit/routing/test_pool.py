"""Stacks of adapters, and which way a product is taken."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.routing import kernel_problem
from torch import Tensor

from weftlm.experts.expert import LoRAFactors
from weftlm.routing import kernels
from weftlm.routing.pool import RANK_MULTIPLE, ModulePool
from weftlm.routing.router import Routing, TargetModule


def factors(rank: int, width: int = 6, out: int = 5, scale: float = 1.0, seed: int = 0) -> LoRAFactors:
    generator = torch.Generator().manual_seed(seed)
    return LoRAFactors(
        torch.randn(rank, width, generator=generator), torch.randn(out, rank, generator=generator), scale
    )


def update(lora: LoRAFactors) -> Tensor:
    return lora.scale * (lora.B_OR.double() @ lora.A_RI.double())


def test_ranks_are_padded_scales_folded_and_absent_experts_add_nothing() -> None:
    adapters = [factors(1, scale=0.5), factors(5, scale=-2.0, seed=1)]
    pool = ModulePool(TargetModule("m", 0, (1, 3), 6), adapters, 4, torch.float32)
    assert pool.A_ERI.shape == (2, 2 * RANK_MULTIPLE, 6)
    assert pool.place_E.tolist() == [-1, 0, -1, 1]
    u_BTI = torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(2))
    routing = Routing(torch.tensor([0, 3, 1]).expand(2, 3, 3), torch.tensor([0.5, 0.25, 0.25]).expand(2, 3, 3))
    expected = u_BTI.double() @ (0.25 * update(adapters[1]) + 0.25 * update(adapters[0])).T
    torch.testing.assert_close(pool.delta(u_BTI, routing).double(), expected, rtol=1e-5, atol=1e-5)
    weights_E = torch.tensor([9.0, 0.5, 9.0, -1.0])
    dense_OI = 0.5 * update(adapters[0]) - update(adapters[1])
    torch.testing.assert_close(pool.dense_delta(weights_E).double(), dense_OI, rtol=1e-5, atol=1e-5)


def test_the_background_is_the_mean_of_all_experts_cut_to_a_rank() -> None:
    adapters = [factors(2), factors(3, seed=1)]
    pool = ModulePool(TargetModule("m", 0, (0, 2), 6), adapters, 4, torch.float32)
    mean_OI = (update(adapters[0]) + update(adapters[1])) / 4
    U_OR, s_R, V_RI = torch.linalg.svd(mean_OI, full_matrices=False)
    u_BTI = torch.randn(1, 4, 6, generator=torch.Generator().manual_seed(2))
    torch.manual_seed(5)
    nobody, drawn = torch.zeros(1, 4, 1), torch.rand(3)
    for rank in (1, 2, 64):
        torch.manual_seed(5)
        pool.set_background(rank)
        assert torch.equal(torch.rand(3), drawn)
        cut_OI = (U_OR[:, :rank] * s_R[:rank]) @ V_RI[:rank]
        routing = Routing(nobody.long(), nobody, torch.tensor([[1.0, 0.5, 0.0, 0.25]]))
        expected = (u_BTI.double() @ cut_OI.T) * torch.tensor([1.0, 0.5, 0.0, 0.25])[None, :, None]
        torch.testing.assert_close(pool.delta(u_BTI, routing).double(), expected, rtol=1e-4, atol=1e-4)
    pool.set_background(0)
    assert pool.mean_A_RI is None


def ways_taken(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    taken: list[str] = []
    for name in ("gather", "each", "dense", "grouped"):
        kernel = getattr(kernels, f"{name}_delta")

        def spy(*args: Any, name: str = name, kernel: Any = kernel) -> Tensor:
            taken.append(name)
            delta_NO: Tensor = kernel(*args)
            return delta_NO

        monkeypatch.setattr(kernels, f"{name}_delta", spy)
    return taken


def test_the_way_taken_depends_on_size_and_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = ways_taken(monkeypatch)
    kernels.routed_delta(*kernel_problem(1, 2, 6, 8, 16, 24, "drawn", torch.float32))
    assert taken == ["gather"]
    for tokens, experts in ((8, 100), (400, 6), (400, 100)):
        problem = kernel_problem(tokens, 2, experts, 8, 16, 24, "drawn", torch.float32)
        u_NI = problem[0].clone().requires_grad_()
        taken.clear()
        with torch.no_grad():
            kernels.routed_delta(u_NI, *problem[1:])
        kernels.routed_delta(*problem)
        assert len(taken) == 2
        assert set(taken) <= {"each", "dense", "grouped"}
        taken.clear()
        kernels.routed_delta(u_NI, *problem[1:]).sum().backward()
        assert taken == ["grouped"]


@pytest.mark.parametrize(
    ("width", "dtype", "old"),
    [(16, torch.float64, False), (15, torch.float32, False), (12, torch.bfloat16, False), (16, torch.float32, True)],
)
def test_gradients_go_through_all_experts_where_grouped_products_cannot(
    width: int, dtype: torch.dtype, old: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = ways_taken(monkeypatch)
    if old:
        monkeypatch.delattr(torch.nn.functional, "grouped_mm")
    problem = kernel_problem(60, 2, 6, 8, width, 24, "drawn", dtype)
    u_NI = problem[0].clone().requires_grad_()
    kernels.routed_delta(u_NI, *problem[1:]).sum().backward()
    assert taken == ["dense"]
    assert u_NI.grad is not None
