"""What a router's section may say, what its experts must bring, and what it remembers beside a cache."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from support.experts import llama, make_expert

from weftlm.errors import ConfigError, ExpertError
from weftlm.experts.expert import Gate
from weftlm.routing.config import routers
from weftlm.routing.router import Memory, TargetModule, build_router

MODULE = "model.layers.0.self_attn.q_proj"
TARGETS = [TargetModule(MODULE, 0, (0, 1), 32)]


def two() -> list[Any]:
    return [make_expert(llama(), name, seed=seed, modules=[MODULE]) for seed, name in enumerate(("news", "code"))]


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ("phatgose", "unknown router 'phatgose'; did you mean 'phatgoose'"),
        ({"k": 2}, "router.router is None; it must be one of: arrow, average-activation"),
        ({"router": "phatgoose", "tempreature": 2.0}, "router.tempreature: unknown key; did you mean 'temperature'"),
        ({"router": "phatgoose", "k": 0}, r"router.k: must be .*\(got 0\)"),
        ({"router": "single"}, "router.expert: missing"),
        ({"router": "retrieval", "read_tokens": -1}, "router.read_tokens"),
    ],
)
def test_wrong_sections_are_explained(section: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_router(section, two(), TARGETS)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"router": "single", "expert": "cod"}, "no expert 'cod'; did you mean 'code'"),
        ({"router": "merged", "weights": {"law": 1.0}}, "no expert 'law'; allowed: code, news"),
        ({"router": "merged", "weights": {"code": float("nan")}}, "must be a finite number"),
    ],
)
def test_unknown_experts_and_weights_are_explained(section: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_router(section, two(), TARGETS)


def test_missing_gates_are_listed_with_a_way_out() -> None:
    bare = [replace(expert, gate=None) for expert in two()]
    with pytest.raises(ExpertError, match=r"needs a gate and news, code have none; make one with .*: arrow, average-a"):
        build_router("phatgoose", bare, TARGETS)
    with pytest.raises(ExpertError, match="needs a gate and code has none"):
        build_router("phatgoose", [two()[0], bare[1]], TARGETS)


@pytest.mark.parametrize("lacks", [("gate",), ("statistics",), ("gate", "statistics")])
@pytest.mark.parametrize("router", [name for name in routers if routers[name].needs])
def test_no_router_is_suggested_that_would_be_refused_in_its_turn(router: str, lacks: tuple[str, ...]) -> None:
    experts = [replace(expert, **dict.fromkeys(lacks)) for expert in two()]  # type: ignore[arg-type]
    if routers[router].needs.isdisjoint(lacks):
        build_router(router, experts, TARGETS)
        return
    with pytest.raises(ExpertError) as caught:
        build_router(router, experts, TARGETS)
    suggested = str(caught.value).rpartition(": ")[2].split(", ")
    assert suggested
    for name in suggested:
        build_router(name, experts, TARGETS)


def test_a_gate_or_statistics_of_other_modules_are_refused() -> None:
    news, code = two()
    for vectors in ({}, {MODULE: torch.zeros(31)}, {MODULE: torch.full((32,), torch.nan)}):
        with pytest.raises(ExpertError, match="'code'"):
            build_router("phatgoose", [news, replace(code, gate=Gate(vectors))], TARGETS)
    assert code.statistics is not None
    with pytest.raises(ExpertError, match="'code'"):
        build_router(
            "average-activation", [news, replace(code, statistics=replace(code.statistics, means={}))], TARGETS
        )


def test_statistics_of_different_embedders_do_not_mix() -> None:
    news, code = two()
    assert code.statistics is not None
    other = replace(code, statistics=replace(code.statistics, embedder="tokens-32"))
    with pytest.raises(ExpertError, match=r"embedded differently .*news.*tokens-64.*code.*tokens-32"):
        build_router("retrieval", [news, other], TARGETS)
    old = replace(code, statistics=replace(code.statistics, embedder="sentence-transformers:mini"))
    for pool in ([news, old], [old]):  # of a library made when there were other embedders
        with pytest.raises(ExpertError, match=r"inputs of code .*'sentence-transformers:mini'.*weftlm experts gate"):
            build_router("retrieval", pool, TARGETS)


def test_memory_follows_rows_and_repeats() -> None:
    memory = Memory(follows_tokens=True)
    memory.tensors["choice"] = torch.tensor([[1], [2]])
    repeated = memory.expanded(6)
    assert repeated.follows_tokens
    assert repeated.tensors["choice"].flatten().tolist() == [1, 1, 1, 2, 2, 2]
    repeated.select(torch.tensor([5, 0]))
    assert repeated.tensors["choice"].flatten().tolist() == [2, 1]
    assert memory.tensors["choice"].flatten().tolist() == [1, 2]
    with pytest.raises(ConfigError, match="decided for 2 sequences and the model is now given 3"):
        memory.expanded(3)
