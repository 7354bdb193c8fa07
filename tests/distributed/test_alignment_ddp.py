"""Two gloo ranks measure what one process measures: under DDP with every estimator, under FSDP2 with `separate`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.ranks import Ranks
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM

from weftlm.errors import ConfigError
from weftlm.mixture.policy import Alignment
from weftlm.models.hf import sequence_losses
from weftlm.training.alignment import (
    Probe,
    ShadowProbe,
    choose_estimator,
    estimators,
    facts_of,
    gradient_direction,
    group_alignment,
)
from weftlm.training.config import AlignmentConfig

pytestmark = pytest.mark.distributed

GROUPS, ROWS, TARGET_ROWS = 4, 8, 5
GROUP_OF_ROW = torch.tensor([0, 0, 1, 1, 2, 2, 2, 0])  # group 3 has no sequence
WEIGHTS = torch.tensor([0.5, 1.5, 1.0, 1.2, 0.8, 0.7, 1.1, 1.2])


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    return LlamaForCausalLM(
        LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2, tie_word_embeddings=True)
    )


def draw(rows: int, seed: int) -> Tensor:
    return torch.randint(0, 32, (rows, 13), generator=torch.Generator().manual_seed(seed))


def as_json(found: Alignment) -> dict[str, Any]:
    return {
        "dots": [None if x != x else x for x in found.dots_G.tolist()],
        "counts": found.counts_G.tolist(),
        "norms": None if found.norms_G is None else [None if x != x else x for x in found.norms_G.tolist()],
        "direction_norm": found.direction_norm,
    }


def gradients_of(model: nn.Module) -> list[float]:
    """A fingerprint of all gradients: 32 fixed random projections."""
    flat = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    return (torch.randn(32, len(flat), generator=torch.Generator().manual_seed(3)) @ flat).tolist()


def measure(rank: int, world: int, folder: Path | None = None) -> dict[str, Any]:
    """Everything, on this rank's share of the rows; with one rank, the reference."""
    module = llama()
    model = DistributedDataParallel(module) if world > 1 else module
    tokens, groups = draw(ROWS, 1)[rank::world], GROUP_OF_ROW[rank::world]
    coefficients = WEIGHTS[rank::world] / (ROWS // world)  # DDP averages over ranks
    v = gradient_direction(model, sequence_losses, draw(TARGET_ROWS, 2)[rank::world], micro_batch=2)
    found: dict[str, Any] = {}
    for estimator in ("separate", "shadow"):
        probe = Probe(model, sequence_losses, tokens, groups, GROUPS, v, micro_batch=3)
        found[f"{estimator} on extra sequences"] = as_json(estimators[estimator]().measure(probe))
    assert all(p.grad is None for p in module.parameters())

    (coefficients * sequence_losses(model, tokens)).sum().backward()
    plain = [p.grad.clone() for p in module.parameters()]
    module.zero_grad()
    with ShadowProbe(model, v) as probe:
        probe.begin(len(tokens))
        (coefficients * sequence_losses(model, tokens)).sum().backward()
        dots = probe.dots(coefficients)
    assert all(torch.equal(p.grad, before) for p, before in zip(module.parameters(), plain, strict=True))
    found["shadow on the batch"] = as_json(group_alignment(dots, groups, GROUPS, v))
    found["gradient"] = gradients_of(module)
    return found


def measure_lone_rank(rank: int, world: int, folder: Path | None = None) -> dict[str, Any]:
    """Only rank 0 has target and probe sequences; the others still take part and learn the same."""
    model = llama()
    tokens, groups = (draw(ROWS, 1), GROUP_OF_ROW) if rank == 0 else (draw(0, 1), GROUP_OF_ROW[:0])
    v = gradient_direction(model, sequence_losses, draw(TARGET_ROWS if rank == 0 else 0, 2))
    probe = Probe(model, sequence_losses, tokens, groups, GROUPS, v)
    return {estimator: as_json(estimators[estimator]().measure(probe)) for estimator in ("separate", "shadow")}


def measure_sharded(rank: int, world: int, folder: Path | None = None) -> dict[str, Any]:
    model = llama()
    if world > 1:
        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)
    tokens, groups = draw(ROWS, 1)[rank::world], GROUP_OF_ROW[rank::world]
    sequence_losses(model, tokens).mean().backward()
    before = [local(p.grad).clone() for p in model.parameters()]
    weights = [local(p.detach()).clone() for p in model.parameters()]
    v = gradient_direction(model, sequence_losses, draw(6, 2)[rank::world], micro_batch=2)
    # Rank 0 has one sequence less than rank 1, so the ranks differ in passes, in all and within groups.
    first = 1 if rank == 0 else 0
    probe = Probe(model, sequence_losses, tokens[first:], groups[first:], GROUPS, v, micro_batch=2)
    found: dict[str, Any] = {"separate": as_json(estimators["separate"]().measure(probe))}
    for parameter, gradient, weight in zip(model.parameters(), before, weights, strict=True):
        assert torch.equal(local(parameter.grad), gradient)
        assert torch.equal(local(parameter.detach()), weight)
    facts = facts_of(model, groups=GROUPS, batch_size=ROWS)
    found["choice"] = choose_estimator(AlignmentConfig(), facts).estimator
    if world > 1:
        with pytest.raises(ConfigError, match="use separate"):
            ShadowProbe(model, v)
    return found


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def assert_close(found: dict[str, Any], expected: dict[str, Any], dot_bound: float, first: int = 3) -> None:
    assert found["counts"] == expected["counts"] == [first, 2, 3, 0]
    assert found["direction_norm"] == pytest.approx(expected["direction_norm"], rel=1e-5)
    for one, other in zip(found["dots"], expected["dots"], strict=True):
        assert (one is None) == (other is None)
        assert one is None or one == pytest.approx(other, abs=dot_bound)
    if expected["norms"] is not None:
        assert found["norms"][:3] == pytest.approx(expected["norms"][:3], rel=1e-5)


def test_ddp_equals_one_process(ranks: Ranks, tmp_path: Path) -> None:
    one = measure(0, 1)
    found = ranks(__file__, "measure", tmp_path)
    exact = one["separate on extra sequences"]
    scale = max(exact["norms"][:3]) * exact["direction_norm"]
    for rank in found:
        assert rank["gradient"] == pytest.approx(one["gradient"], rel=1e-4, abs=1e-5)
        for key in one.keys() - {"gradient"}:
            assert_close(rank[key], one[key], 1e-5 * scale)
            assert_close(rank[key], {**exact, "norms": None}, 1e-5 * scale)
    assert found[0] == found[1]


def test_a_rank_without_sequences_takes_part(ranks: Ranks, tmp_path: Path) -> None:
    one = measure_lone_rank(0, 1)
    found = ranks(__file__, "measure_lone_rank", tmp_path)
    scale = max(one["separate"]["norms"][:3]) * one["separate"]["direction_norm"]
    for rank in found:
        for estimator, expected in one.items():
            assert_close(rank[estimator], expected, 1e-5 * scale)


def test_fsdp2_measures_with_what_sharded_gradients_allow_and_refuses_the_rest(ranks: Ranks, tmp_path: Path) -> None:
    one = measure_sharded(0, 1)
    found = ranks(__file__, "measure_sharded", tmp_path)
    exact = one["separate"]
    scale = max(exact["norms"][:3]) * exact["direction_norm"]
    for rank in found:
        assert_close(rank["separate"], exact, 1e-5 * scale, first=2)
        assert rank["choice"] == "separate"
    assert found[0] == found[1]
    assert one["choice"] == "shadow"
