"""A merged adapter is the average of updates, exactly."""

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
    assert (merged.name, merged.base) == ("all", BASE)
    assert {module: part.rank for module, part in merged.modules.items()} == {"a": 7, "b": 3, "c": 2}
    for module in "abc":
        dense = sum(w * update(lora, module) for w, lora in zip(weights or [1 / 3] * 3, EXPERTS, strict=True))
        torch.testing.assert_close(update(merged, module), dense, rtol=0, atol=1e-5)
        assert merged.modules[module].A_RI.dtype == merged.modules[module].B_OR.dtype == torch.float32
    assert (merged.peft_config["task_type"], merged.peft_config["fan_in_fan_out"]) == ("CAUSAL_LM", True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"experts": []}, "at least one expert"),
        ({"weights": [1.0]}, "one finite number for each of 3 experts"),
        ({"weights": [1.0, 1.0, float("nan")]}, "one finite number"),
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
