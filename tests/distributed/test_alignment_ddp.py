"""Two gloo ranks measure what one process measures: under DDP with every estimator, under FSDP2 with `separate`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.experts import VOCAB, llama
from support.ranks import Ranks
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from weftlm.errors import ConfigError
from weftlm.mixture.policy import Alignment, build_policy
from weftlm.models.hf import sequence_losses
from weftlm.training.alignment import (
    Probe,
    ShadowProbe,
    choose_for_policy,
    estimators,
    gradient_direction,
    group_alignment,
)
from weftlm.training.config import AlignmentConfig

pytestmark = pytest.mark.distributed

GROUPS, ROWS, TARGET_ROWS = 4, 8, 5
GROUP_OF_ROW = torch.tensor([0, 0, 1, 1, 2, 2, 2, 0])  # group 3 has no sequence
WEIGHTS = torch.tensor([0.5, 1.5, 1.0, 1.2, 0.8, 0.7, 1.1, 1.2])


def model() -> Any:
    return llama(hidden_size=16, intermediate_size=24, initializer_range=0.02, tie_word_embeddings=True).train()


def draw(rows: int, seed: int) -> Tensor:
    return torch.randint(1, VOCAB, (rows, 13), generator=torch.Generator().manual_seed(seed))


def as_json(found: Alignment) -> dict[str, Any]:
    """NaN as -1e9, so that values compare."""
    norms = None if found.norms_G is None else found.norms_G.nan_to_num(-1e9).tolist()
    return {
        "dots": found.dots_G.nan_to_num(-1e9).tolist(),
        "norms": norms,
        "counts": found.counts_G.tolist(),
        "direction_norm": found.direction_norm,
    }


def extra(found: dict[str, Any], *names: str, **given: Any) -> None:
    """What estimators measure on sequences of their own."""
    for name in names:
        found[name] = as_json(estimators[name]().measure(Probe(losses=sequence_losses, groups=GROUPS, **given)))


def measure(rank: int, world: int, folder: Path | None = None) -> dict[str, Any]:
    """Everything, on this rank's share of the rows; with one rank, the reference."""
    module = model()
    wrapped = DistributedDataParallel(module) if world > 1 else module
    tokens, groups = draw(ROWS, 1)[rank::world], GROUP_OF_ROW[rank::world]
    coefficients = WEIGHTS[rank::world] / (ROWS // world)  # DDP averages over ranks
    v = gradient_direction(wrapped, sequence_losses, draw(TARGET_ROWS, 2)[rank::world], micro_batch=2)
    found: dict[str, Any] = {}
    extra(found, "separate", "shadow", model=wrapped, tokens_BT1=tokens, groups_B=groups, direction=v, micro_batch=3)
    assert all(p.grad is None for p in module.parameters())

    (coefficients * sequence_losses(wrapped, tokens)).sum().backward()
    plain = [p.grad.clone() for p in module.parameters()]
    module.zero_grad()
    with ShadowProbe(wrapped, v) as probe:
        probe.begin(len(tokens))
        (coefficients * sequence_losses(wrapped, tokens)).sum().backward()
        dots = probe.dots(coefficients)
    assert all(torch.equal(p.grad, before) for p, before in zip(module.parameters(), plain, strict=True))
    found["shadow on the batch"] = as_json(group_alignment(dots, groups, GROUPS, v))
    flat = torch.cat([gradient.flatten() for gradient in plain])
    found["gradient"] = (torch.randn(32, len(flat), generator=torch.Generator().manual_seed(3)) @ flat).tolist()
    return found


def measure_lone_rank(rank: int, world: int, folder: Path | None = None) -> dict[str, Any]:
    """Only rank 0 has target and probe sequences; the others still take part and learn the same."""
    net, count, found = model(), ROWS if rank == 0 else 0, {}
    v = gradient_direction(net, sequence_losses, draw(TARGET_ROWS if rank == 0 else 0, 2))
    given = {"tokens_BT1": draw(ROWS, 1)[:count], "groups_B": GROUP_OF_ROW[:count]}
    extra(found, "separate", "shadow", model=net, direction=v, **given)
    return found


def measure_sharded(rank: int, world: int, folder: Path | None = None) -> dict[str, Any]:
    net = model()
    if world > 1:
        for layer in net.model.layers:
            fully_shard(layer)
        fully_shard(net)
    tokens, groups = draw(ROWS, 1)[rank::world], GROUP_OF_ROW[rank::world]
    sequence_losses(net, tokens).mean().backward()
    before = [(local(p.grad).clone(), local(p.detach()).clone()) for p in net.parameters()]
    v = gradient_direction(net, sequence_losses, draw(6, 2)[rank::world], micro_batch=2)
    # Rank 0 has one sequence less than rank 1, so the ranks differ in passes, in all and within groups.
    first, found = 1 if rank == 0 else 0, {}
    given = {"tokens_BT1": tokens[first:], "groups_B": groups[first:]}
    extra(found, "separate", model=net, direction=v, micro_batch=2, **given)
    for parameter, (gradient, weight) in zip(net.parameters(), before, strict=True):
        assert torch.equal(local(parameter.grad), gradient)
        assert torch.equal(local(parameter.detach()), weight)
    doge = build_policy({"policy": "doge"})
    choice = choose_for_policy(doge, AlignmentConfig(), model=net, groups=GROUPS, batch_size=ROWS)
    found["choice"] = choice and choice.estimator
    if world > 1:
        with pytest.raises(ConfigError, match="use separate"):
            ShadowProbe(net, v)
    return found


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def assert_close(found: dict[str, Any], exact: dict[str, Any], first: int = 3) -> None:
    """An estimator's findings are those of backward passes in one process."""
    assert found["counts"] == exact["counts"] == [first, 2, 3, 0]
    assert found["direction_norm"] == pytest.approx(exact["direction_norm"], rel=1e-5)
    bound = 1e-5 * max(exact["norms"]) * exact["direction_norm"]
    assert found["dots"] == pytest.approx(exact["dots"], abs=bound)
    assert found["norms"] is None or found["norms"] == pytest.approx(exact["norms"], rel=1e-5)


def test_ddp_equals_one_process(ranks: Ranks, tmp_path: Path) -> None:
    one, found = measure(0, 1), ranks(__file__, "measure", tmp_path)
    for rank in (one, *found):
        assert rank["gradient"] == pytest.approx(one["gradient"], rel=1e-4, abs=1e-5)
        for key in one.keys() - {"gradient"}:
            assert_close(rank[key], one["separate"])
    assert found[0] == found[1]


def test_a_rank_without_sequences_takes_part(ranks: Ranks, tmp_path: Path) -> None:
    one = measure_lone_rank(0, 1)
    for rank in ranks(__file__, "measure_lone_rank", tmp_path):
        for estimator in one:
            assert_close(rank[estimator], one["separate"])


def test_fsdp2_measures_with_what_sharded_gradients_allow_and_refuses_the_rest(ranks: Ranks, tmp_path: Path) -> None:
    one, found = measure_sharded(0, 1), ranks(__file__, "measure_sharded", tmp_path)
    for rank in found:
        assert_close(rank["separate"], one["separate"], first=2)
        assert rank["choice"] == "separate"
    assert found[0] == found[1]
    assert one["choice"] == "shadow"
