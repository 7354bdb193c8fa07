"""A merged adapter is the average of updates, exactly, or the nearest of a lower rank."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from weftlm.errors import ConfigError, ExpertError
from weftlm.experts.expert import BaseReference, LoRAExpert, LoRAFactors
from weftlm.experts.merge import merge_experts

BASE = BaseReference("tiny", None, "f" * 32)


def expert(name: str, ranks: dict[str, int], scale: float, base: BaseReference = BASE) -> LoRAExpert:
    generator = torch.Generator().manual_seed(len(name) + 10 * sum(ranks.values()))
    modules = {
        module: LoRAFactors(
            torch.randn(rank, 12, generator=generator), torch.randn(9, rank, generator=generator), scale
        )
        for module, rank in ranks.items()
    }  # fmt: skip
    return LoRAExpert(name, base, modules, {"task_type": "CAUSAL_LM", "fan_in_fan_out": True})


EXPERTS = [
    expert("one", {"a": 2, "b": 3}, 2.0),
    expert("second", {"a": 1}, -0.5),
    expert("the third", {"a": 4, "c": 2}, 0.25),
]


def update(lora: LoRAExpert, module: str) -> Tensor:
    if module not in lora.modules:
        return torch.zeros(9, 12, dtype=torch.float64)
    part = lora.modules[module]
    return part.scale * part.B_OR.double() @ part.A_RI.double()


@pytest.mark.parametrize("weights", [None, [0.2, 0.3, 0.5], [1.0, -2.0, 0.0]])
def test_a_merge_is_the_dense_weighted_sum(weights: list[float] | None) -> None:
    merged = merge_experts(EXPERTS, weights, name="all")
    assert merged.name == "all"
    assert merged.base == BASE
    assert {module: part.rank for module, part in merged.modules.items()} == {"a": 7, "b": 3, "c": 2}
    for module in "abc":
        dense = sum(w * update(lora, module) for w, lora in zip(weights or [1 / 3] * 3, EXPERTS, strict=True))
        torch.testing.assert_close(update(merged, module), dense, rtol=0, atol=1e-5)
        assert merged.modules[module].A_RI.dtype == merged.modules[module].B_OR.dtype == torch.float32
    assert merged.peft_config["task_type"] == "CAUSAL_LM"
    assert merged.peft_config["fan_in_fan_out"] is True


@pytest.mark.parametrize("rank", [1, 2, 5])
def test_a_truncated_merge_is_the_truncated_dense_svd(rank: int) -> None:
    exact, merged = merge_experts(EXPERTS, name="x"), merge_experts(EXPERTS, name="x", rank=rank)
    for module in "abc":
        U, S, Vh = torch.linalg.svd(update(exact, module))
        nearest = U[:, :rank] * S[:rank] @ Vh[:rank]
        assert merged.modules[module].rank == min(rank, exact.modules[module].rank)
        torch.testing.assert_close(update(merged, module), nearest, rtol=0, atol=1e-5)


def test_truncation_works_where_the_ranks_exceed_the_widths_and_is_deterministic() -> None:
    many = [expert("x" * n, {"a": 5}, 1.0) for n in range(1, 5)]
    merged, again = merge_experts(many, name="m", rank=4), merge_experts(many, name="m", rank=4)
    assert torch.equal(merged.modules["a"].A_RI, again.modules["a"].A_RI)
    B_OR = merged.modules["a"].B_OR  # whatever signs the decomposition gives
    assert bool((B_OR.gather(0, B_OR.abs().argmax(0, keepdim=True)) > 0).all())
    U, S, Vh = torch.linalg.svd(update(merge_experts(many, name="m"), "a"))
    torch.testing.assert_close(update(merged, "a"), U[:, :4] * S[:4] @ Vh[:4], rtol=0, atol=1e-5)
    full = merge_experts(many, name="m", rank=19)
    assert full.modules["a"].rank == 9
    torch.testing.assert_close(update(full, "a"), update(merge_experts(many, name="m"), "a"), rtol=0, atol=1e-5)


def test_one_expert_merges_to_itself_and_untrained_ones_to_nothing() -> None:
    torch.testing.assert_close(update(merge_experts(EXPERTS[:1], name="m"), "b"), update(EXPERTS[0], "b"))
    part = EXPERTS[0].modules["a"]
    zero = LoRAExpert("z", BASE, {"a": LoRAFactors(part.A_RI, torch.zeros_like(part.B_OR), 1.0)}, {})
    assert not update(merge_experts([zero, zero], name="m", rank=1), "a").any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"experts": []}, "at least one expert"),
        ({"weights": [1.0]}, "one finite number for each of 3 experts"),
        ({"weights": [1.0, 1.0, float("nan")]}, "one finite number"),
        ({"rank": 0}, "merge rank is 0; must be at least 1"),
    ],
)
def test_wrong_arguments_are_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        merge_experts(**{"experts": EXPERTS, "name": "m", **arguments})  # type: ignore[arg-type]


def test_experts_of_different_bases_are_refused() -> None:
    stranger = expert("stranger", {"a": 1}, 1.0, BaseReference("other", None, "0" * 32))
    with pytest.raises(ExpertError, match="'one' and 'stranger' adapt different bases"):
        merge_experts([EXPERTS[0], stranger], name="m")
    unknown = expert("unknown", {"a": 1}, 1.0, BaseReference("tiny"))
    assert merge_experts([unknown, EXPERTS[0]], name="m").base == BASE
    wide = LoRAExpert("wide", BASE, {"a": LoRAFactors(torch.ones(1, 13), torch.ones(9, 1), 1.0)}, {})
    with pytest.raises(ExpertError, match="'one' and 'wide' disagree on a: 12 to 9, 13 to 9"):
        merge_experts([EXPERTS[0], wide], name="m")
