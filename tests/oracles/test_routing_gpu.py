"""On a CUDA device: the routed product against a float64 loop, and whole models against the CPU."""

from __future__ import annotations

import pytest
import torch
from support.experts import BASES, llama, make_pool, padded, prompts
from support.routing import WAYS, Problem, assert_solve, generate, inputs_for, kernel_problem, kernel_problems, logits

from weftlm.routing import kernels
from weftlm.routing.routed_model import RoutedModel

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(autouse=True)
def _plain_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorFloat-32 rounds to ten bits."""
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)


@kernel_problems
def test_kernels_equal_a_float64_loop_on_cuda(problems: list[Problem]) -> None:
    for problem in problems:
        on_device = [tensor.cuda() for tensor in problem]
        assert_solve(problem, **{way: kernel(*on_device) for way, kernel in WAYS.items() if way != "each"})


@pytest.mark.parametrize(
    ("way", "dtype"), [("dense", torch.float32), ("grouped", torch.float32), ("grouped", torch.bfloat16)]
)
def test_gradients_equal_those_of_the_cpu(way: str, dtype: torch.dtype) -> None:
    u_NI, experts_NK, weights_NK, A_ERI, B_ERO = kernel_problem(40, 2, 7, 8, 16, 24, "skewed", dtype)
    found = []
    for device in ("cpu", "cuda"):
        inputs = [u_NI.to(device).requires_grad_(), weights_NK.to(device).requires_grad_()]
        kernel = kernels.dense_delta if device == "cpu" else WAYS[way]
        delta_NO = kernel(inputs[0], experts_NK.to(device), inputs[1], A_ERI.to(device), B_ERO.to(device))
        found.append([grad.cpu().double() for grad in torch.autograd.grad(delta_NO.float().square().sum(), inputs)])
    for ours, expected in zip(found[1], found[0], strict=True):
        tolerance = 1e-4 if dtype == torch.float32 else 5e-2
        assert float((ours - expected).abs().max() / expected.abs().max()) < tolerance


@pytest.mark.parametrize("section", ["phatgoose", "arrow", "merged", "uniform", "retrieval"])
@pytest.mark.parametrize("name", BASES)
def test_a_routed_model_on_cuda_equals_the_cpu(name: str, section: str) -> None:
    model = BASES[name]()
    routed = RoutedModel(model, make_pool(model, size=0.2), section)
    given = inputs_for(model)
    expected = logits(routed, **given)
    found = logits(routed.to("cuda"), **{key: value.cuda() for key, value in given.items()}).cpu()
    assert float((found - expected).abs().max() / expected.abs().max()) < 1e-4


@pytest.mark.parametrize("section", ["phatgoose", "prefix", "retrieval"])
def test_generation_on_cuda_equals_the_cpu(section: str) -> None:
    routed = RoutedModel(llama(), make_pool(llama()), section)
    ids_BT, mask_BT = padded([prompts(1, length)[0] for length in (7, 5)], left=True)
    expected = generate(routed, ids_BT, mask_BT, num_beams=3)
    assert torch.equal(generate(routed.to("cuda"), ids_BT.cuda(), mask_BT.cuda(), num_beams=3).cpu(), expected)


@pytest.mark.parametrize("name", BASES)
def test_bfloat16_on_cuda_stays_near_float32(name: str) -> None:
    model = BASES[name]()
    given = inputs_for(model)
    section = {"router": "phatgoose", "k": 4}
    expected = logits(RoutedModel(model, make_pool(model, size=0.2), section), **given)
    other = RoutedModel(BASES[name]().to("cuda", torch.bfloat16), make_pool(BASES[name](), size=0.2), section)
    found = logits(other, **{key: value.cuda() for key, value in given.items()}).cpu().float()
    assert float((found - expected).abs().max() / expected.abs().max()) < 0.1
