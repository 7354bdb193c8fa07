"""Routing against other computations of the same: float64 loops, PEFT, runs without cache, batch or padding."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import ArrowConfig, PeftModel
from peft.tuners.lora import create_arrow_model
from support.experts import (
    BASES,
    linear_modules,
    llama,
    make_expert,
    make_pool,
    padded,
    prompts,
    with_gate,
    with_texts,
)
from support.routing import (
    WAYS,
    Problem,
    assert_solve,
    call_for,
    generate,
    inputs_for,
    kernel_problem,
    kernel_problems,
    logits,
)
from torch import Tensor, nn
from transformers import PreTrainedModel

from weftlm.errors import ConfigError
from weftlm.experts.expert import BaseReference, Expert, LoRAFactors
from weftlm.experts.lora import write_lora
from weftlm.routing import kernels
from weftlm.routing.arrow import first_singular_vector
from weftlm.routing.config import RouterConfig
from weftlm.routing.pool import ModulePool
from weftlm.routing.routed_model import RoutedModel
from weftlm.routing.router import Call, Router, Routing, TargetModule, build_router

peft_warnings = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
RETRIEVAL = {"router": "retrieval", "k": 2, "read_tokens": 4}
PER_TOKEN = [pytest.param({"router": "phatgoose"}, id="phatgoose"), pytest.param({"router": "arrow"}, id="arrow")]
GENERATING = [*PER_TOKEN, pytest.param(RETRIEVAL, id="retrieval")]


# -- the kernels ----------------------------------------------------------------------------------------------------


@kernel_problems
def test_kernels_equal_a_float64_loop(problems: list[Problem]) -> None:
    for problem in problems:
        assert_solve(problem, **{way: kernel(*problem) for way, kernel in WAYS.items()})


def test_a_large_pool_is_looped_over_where_products_cannot_be_grouped(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []
    for way in ("dense", "grouped"):
        monkeypatch.setattr(kernels, f"{way}_delta", lambda *_, way=way: taken.append(way))
    for tokens, experts in ((40, 2), (500, 100)):
        u_NI, *rest = kernel_problem(tokens, 2, experts, 8, 256, 256, "drawn", torch.float64)
        kernels.routed_delta(u_NI.requires_grad_(), *rest)
    assert taken == ["dense", "grouped"]


def dense_formula(u_NI: Tensor, experts_NK: Tensor, weights_NK: Tensor, A_ERI: Tensor, B_ERO: Tensor) -> Tensor:
    """The same over all experts at once, plain operations that autograd knows."""
    p_NE = torch.zeros(u_NI.shape[0], A_ERI.shape[0], dtype=u_NI.dtype).scatter_add(1, experts_NK, weights_NK)
    return torch.einsum("ne,ero,eri,ni->no", p_NE, B_ERO, A_ERI, u_NI)


@pytest.mark.parametrize("way", ["routed", "gather", "grouped", "dense"])
@pytest.mark.parametrize("assigned", ["even", "skewed"])
def test_gradients_equal_autograd_of_the_dense_formula(way: str, assigned: str) -> None:
    u_NI, experts_NK, weights_NK, A_ERI, B_ERO = kernel_problem(40, 2, 7, 8, 16, 24, assigned, torch.float32)
    direction_NO = torch.randn(40, 24, generator=torch.Generator().manual_seed(1))
    inputs = [u_NI.requires_grad_(), weights_NK.requires_grad_()]
    found = torch.autograd.grad(
        (WAYS[way](inputs[0], experts_NK, inputs[1], A_ERI, B_ERO) * direction_NO).sum(), inputs
    )
    doubles = [tensor.detach().double().requires_grad_() for tensor in inputs]
    delta_NO = dense_formula(doubles[0], experts_NK, doubles[1], A_ERI.double(), B_ERO.double())
    expected = torch.autograd.grad((delta_NO * direction_NO).sum(), doubles)
    for got, want in zip(found, expected, strict=True):
        assert float((got - want).abs().max() / want.abs().max()) < 1e-5


@pytest.mark.parametrize("way", ["routed", "gather", "dense", "grouped"])
def test_gradcheck_in_float64(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "FEW_ASSIGNMENTS", 0)
    u_NI, experts_NK, weights_NK, A_ERI, B_ERO = kernel_problem(4, 2, 3, 4, 4, 8, "drawn", torch.float64)
    weights_NK = weights_NK.double()
    assert torch.autograd.gradcheck(
        lambda u, weights: WAYS[way](u, experts_NK, weights, A_ERI, B_ERO),
        (u_NI.requires_grad_(), weights_NK.requires_grad_()),
    )


# -- the formula of PHATGOOSE ---------------------------------------------------------------------------------------


def standardised(v_I: Tensor) -> Tensor:
    mean = v_I.mean()
    return (v_I - mean) / torch.sqrt(((v_I - mean) ** 2).mean() + 1e-5)


def phatgoose_choice(u_I: Tensor, gates: Sequence[Tensor], k: int, temperature: float = 1.0) -> dict[int, Tensor]:
    """Weight by place among the gates: softmax over all scores, the k highest, renormalised; float64."""
    u_I = standardised(u_I.double())
    scores_E = torch.stack([u_I @ standardised(gate_I.double()) for gate_I in gates]) / len(u_I) ** 0.5 / temperature
    p_E = scores_E.softmax(0)
    best = scores_E.argsort(descending=True)[:k].tolist()
    total = torch.stack([p_E[place] for place in best]).sum()
    return {place: p_E[place] / total for place in best}


@pytest.mark.parametrize("k", [1, 2, 5])
@pytest.mark.parametrize("temperature", [1.0, 0.3])
def test_phatgoose_weights_are_those_of_the_paper(k: int, temperature: float) -> None:
    model = llama()
    name = "model.layers.1.mlp.down_proj"
    pool = [make_expert(model, letter, seed=seed, modules=[name]) for seed, letter in enumerate("abcde")]
    pool[0] = with_gate(pool[0], lambda v_I: 3.0 * v_I + 7.0)
    target = TargetModule(name, 0, tuple(range(5)), 48)
    router = build_router({"router": "phatgoose", "k": k, "temperature": temperature}, pool, [target])
    u_BTI = 2.0 * torch.randn(2, 6, 48, generator=torch.Generator().manual_seed(0)) + 0.7
    routing = router.route(target, u_BTI, call_for(2, 6))
    gates = [expert.gate.vectors[name] for expert in pool if expert.gate is not None]
    assert routing.experts_BTK.shape == (2, 6, k)
    for b in range(2):
        for t in range(6):
            expected = phatgoose_choice(u_BTI[b, t], gates, k, temperature)
            assert routing.experts_BTK[b, t].tolist() == list(expected)
            torch.testing.assert_close(
                routing.weights_BTK[b, t].double(), torch.stack(list(expected.values())), rtol=1e-5, atol=1e-6
            )


# -- whole models against a loop ------------------------------------------------------------------------------------


class LoopLinear(nn.Module):
    """y = W u + sum over the k best of p_z scale_z B_z A_z u, token by token, in float64."""

    def __init__(self, base: nn.Module, name: str, experts: Sequence[Expert], k: int) -> None:
        super().__init__()
        self.base = base
        self.weight = base.weight
        self.k = k
        self.factors = [expert.lora.modules[name] for expert in experts]
        self.gates = [expert.gate.vectors[name] for expert in experts if expert.gate is not None]

    def forward(self, u_BTI: Tensor) -> Tensor:
        y_BTO = self.base(u_BTI)
        flat_NO = y_BTO.reshape(-1, y_BTO.shape[-1])
        rows = []
        for u_I, y_O in zip(u_BTI.reshape(-1, u_BTI.shape[-1]), flat_NO, strict=True):
            for place, weight in phatgoose_choice(u_I, self.gates, self.k).items():
                lora = self.factors[place]
                y_O = y_O + weight * lora.scale * (lora.B_OR.double() @ (lora.A_RI.double() @ u_I))
            rows.append(y_O)
        return torch.stack(rows).view_as(y_BTO)


def loop_model(model: PreTrainedModel, experts: Sequence[Expert], k: int) -> nn.Module:
    """A float64 copy of the base with every adapted module in the reference form."""
    copied = copy.deepcopy(model).double()
    for name in linear_modules(model):
        adapting = [expert for expert in experts if name in expert.lora.modules]
        if adapting:
            parent, _, child = name.rpartition(".")
            setattr(copied.get_submodule(parent), child, LoopLinear(copied.get_submodule(name), name, adapting, k))
    return copied


@pytest.mark.parametrize("name", BASES)
def test_a_routed_model_equals_a_float64_loop(name: str) -> None:
    model = BASES[name]()
    pool = make_pool(model, 5, size=0.2)
    given = inputs_for(model)
    with torch.no_grad():
        expected = loop_model(model, pool, 2)(**given).logits
        base = model(**given).logits
    routed = logits(RoutedModel(model, pool, "phatgoose"), **given)
    scale = float(expected.abs().max())
    assert float((routed.double() - expected).abs().max()) < 1e-5 * scale
    assert float((routed - base).abs().max()) > 0.1 * scale


@pytest.mark.parametrize(("parts", "k"), [("all", 99), ("disjoint", 2), ("one module", 1)])
def test_odd_pools_equal_a_float64_loop(parts: str, k: int) -> None:
    model = llama()
    names = list(linear_modules(model))
    modules = {
        "all": (None, None),
        "disjoint": (names[::2], names[1::2]),
        "one module": (None, names[3:4]),
    }[parts]
    pool = [
        make_expert(model, letter, seed=seed, modules=each)
        for seed, (letter, each) in enumerate(zip("ab", modules, strict=True))
    ]
    given = inputs_for(model)
    with torch.no_grad():
        expected = loop_model(model, pool, k)(**given).logits
    routed = logits(RoutedModel(model, pool, {"router": "phatgoose", "k": k}), **given)
    assert float((routed.double() - expected).abs().max() / expected.abs().max()) < 1e-5


@pytest.mark.parametrize("way", ["routed", "gather"])
def test_gradients_pass_through_choices_and_updates(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("weftlm.routing.pool.routed_delta", WAYS[way])
    model = llama()
    pool = make_pool(model)
    given = inputs_for(model)
    loops = loop_model(model, pool, 2)
    found = torch.autograd.grad(RoutedModel(model, pool)(**given).logits.square().mean(), embeddings(model))[0]
    expected = torch.autograd.grad(loops(**given).logits.square().mean(), embeddings(loops))[0]
    assert float((found - expected).abs().max() / expected.abs().max()) < 1e-4


def embeddings(model: Any) -> Tensor:
    weight: Tensor = model.get_input_embeddings().weight
    return weight


# -- the base comes back --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("section", [{"router": "phatgoose"}, {"router": "single", "expert": "a"}])
def test_disabled_and_unloaded_equal_the_base_bit_for_bit(name: str, section: dict[str, Any]) -> None:
    model = BASES[name]()
    modules = dict(model.named_modules())
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    given = inputs_for(model)
    expected = logits(model, **given)
    routed = RoutedModel(model, make_pool(model), section)
    before = logits(routed, **given)
    assert not torch.allclose(before, expected, atol=1e-2)
    with routed.disabled():
        assert torch.equal(logits(routed, **given), expected)
        assert torch.equal(logits(routed.model, **given), expected)
    assert torch.equal(logits(routed, **given), before)
    assert routed.unload() is model
    assert torch.equal(logits(model, **given), expected)
    assert list(dict(model.named_modules())) == list(modules)
    assert all(found is modules[key] for key, found in model.named_modules())
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


# -- PEFT -----------------------------------------------------------------------------------------------------------


@peft_warnings
@pytest.mark.parametrize("name", ["gpt2", "t5"])
def test_a_pool_of_one_equals_pefts_active_adapter(name: str, tmp_path: Path) -> None:
    expert = make_expert(BASES[name]())
    write_lora(tmp_path / "a", expert.lora)
    given = inputs_for(BASES[name]())
    expected = logits(PeftModel.from_pretrained(BASES[name](), str(tmp_path / "a")), **given)
    routed = RoutedModel(BASES[name](), [expert])
    for section in ("phatgoose", {"router": "single", "expert": "a"}, "merged", "arrow", "uniform", "retrieval"):
        routed.use_router(section)
        torch.testing.assert_close(logits(routed, **given), expected, rtol=1e-4, atol=1e-4)


def with_gap(expert: Expert) -> Expert:
    """The expert with updates whose singular values fall by a factor of three, for power iterations to converge."""
    modules = {}
    for name, lora in expert.lora.modules.items():
        Q_IR, _ = torch.linalg.qr(lora.A_RI.T)
        P_OR, _ = torch.linalg.qr(lora.B_OR)
        falling_R = 3.0 ** -torch.arange(lora.rank)
        modules[name] = LoRAFactors((falling_R * Q_IR).T.contiguous(), P_OR.contiguous(), lora.scale)
    return Expert(type(expert.lora)(expert.name, expert.lora.base, modules, expert.lora.peft_config))


@peft_warnings
def test_arrow_equals_pefts_in_its_own_setting(tmp_path: Path) -> None:
    pool = [
        with_gap(make_expert(llama(), letter, seed=seed, rank=4, scale=0.5 + seed, size=0.3))
        for seed, letter in enumerate("abcde")
    ]
    for expert in pool:
        write_lora(tmp_path / expert.name, expert.lora)
    peft = create_arrow_model(
        llama(),
        task_specific_adapter_paths=[str(tmp_path / expert.name) for expert in pool],
        arrow_config=ArrowConfig(top_k=3, router_temperature=1.0, rng_seed=0),
    ).eval()
    given = inputs_for(llama())
    expected = logits(peft, **given)
    seen = 0
    for name, module in peft.get_base_model().named_modules():
        if hasattr(module, "lora_arrow"):
            for expert, theirs_I in zip(pool, module.lora_arrow["arrow_router"].prototypes, strict=True):
                ours_I = first_singular_vector(expert.lora.modules[name])
                assert abs(float(ours_I @ theirs_I)) > 1 - 1e-5
                seen += 1
    assert seen == 5 * len(linear_modules(llama()))
    routed = RoutedModel(llama(), pool, {"router": "arrow", "k": 3})
    torch.testing.assert_close(logits(routed, **given), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("rank", "width", "out"), [(1, 8, 5), (3, 8, 5), (6, 8, 5), (10, 8, 12)])
def test_singular_vectors_are_those_of_the_whole_product(rank: int, width: int, out: int) -> None:
    generator = torch.Generator().manual_seed(rank)
    lora = LoRAFactors(
        torch.randn(rank, width, generator=generator), torch.randn(out, rank, generator=generator), scale=2.0
    )
    v_I = first_singular_vector(lora)
    _, _, right_II = torch.linalg.svd(lora.B_OR.double() @ lora.A_RI.double())
    assert abs(abs(float(v_I.double() @ right_II[0])) - 1) < 1e-6
    assert float(v_I[v_I.abs().argmax()]) > 0
    for zero in (LoRAFactors(lora.A_RI, torch.zeros_like(lora.B_OR), 1.0), LoRAFactors(0 * lora.A_RI, lora.B_OR, 1.0)):
        assert torch.equal(first_singular_vector(zero), torch.zeros(width))


# -- generation -----------------------------------------------------------------------------------------------------


ROWS = [prompts(1, length, seed=length)[0] for length in (7, 5, 9)]


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("section", GENERATING)
@pytest.mark.parametrize("name", ["gpt2", "t5"])
def test_generation_does_not_depend_on_cache_batch_or_padding(name: str, section: dict[str, Any], beams: int) -> None:
    model = BASES[name]()
    routed = RoutedModel(model, make_pool(model), section)
    ids_BT, mask_BT = padded(ROWS, left=name != "t5")
    cached = generate(routed, ids_BT, mask_BT, num_beams=beams)
    assert torch.equal(generate(routed, ids_BT, mask_BT, num_beams=beams, use_cache=False), cached)
    for row, tokens in enumerate(ROWS):
        alone = generate(routed, tokens[None], torch.ones(1, len(tokens), dtype=torch.int64), num_beams=beams)
        assert torch.equal(alone[0], cached[row])
    order = torch.tensor([2, 0, 1])
    assert torch.equal(generate(routed, ids_BT[order], mask_BT[order], num_beams=beams), cached[order])
    with routed.disabled():
        assert not torch.equal(generate(routed, ids_BT, mask_BT, num_beams=beams), cached)


@pytest.mark.parametrize("beams", [1, 3])
def test_the_prompts_choice_stays_when_the_text_would_choose_otherwise(beams: int) -> None:
    prompt_BT = prompts(1, 6)
    mask_BT = torch.ones_like(prompt_BT)
    first = make_expert(llama(), "a", seed=0)
    second = make_expert(llama(), "b", seed=1)
    alone = RoutedModel(llama(), [first])
    written_BT = torch.cat([prompt_BT, generate(alone, prompt_BT, mask_BT, num_beams=beams, max_new_tokens=10)], dim=1)
    pool = [with_texts(first, prompt_BT), with_texts(second, written_BT)]
    routed = RoutedModel(llama(), pool, "retrieval")
    router = routed.router
    assert router.sequence_scores(prompt_BT, mask_BT.bool()).argmax(1).tolist() == [0]
    assert router.sequence_scores(written_BT, torch.ones_like(written_BT).bool()).argmax(1).tolist() == [1]
    for use_cache in (True, False):
        found = generate(routed, prompt_BT, mask_BT, num_beams=beams, max_new_tokens=10, use_cache=use_cache)
        assert torch.equal(found, written_BT[:, 6:])


@pytest.mark.parametrize("router", ["phatgoose", "retrieval", "prefix"])
def test_sampling_several_texts_and_static_caches_change_nothing(router: str) -> None:
    routed = RoutedModel(llama(), make_pool(llama()), router)
    ids_BT, mask_BT = padded(ROWS, left=True)
    dynamic = generate(routed, ids_BT, mask_BT)
    fixed = generate(routed, ids_BT, mask_BT, cache_implementation="static", disable_compile=True)
    assert torch.equal(fixed, dynamic)
    several: list[Tensor] = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        options = {"do_sample": True, "num_beams": 3, "num_return_sequences": 2, "use_cache": use_cache}
        several.append(generate(routed, ids_BT, mask_BT, **options))
    assert torch.equal(*several)


def two_choices() -> tuple[RoutedModel, Tensor]:
    """Retrieval between two experts, and two prompts that choose differently."""
    ids_BT = prompts(2, 6)
    pool = [with_texts(make_expert(llama(), name, seed=row), ids_BT[row : row + 1]) for row, name in enumerate("ab")]
    return RoutedModel(llama(), pool, "retrieval"), ids_BT


def test_a_choice_follows_its_rows_when_the_cache_is_reordered_or_cropped() -> None:
    routed, ids_BT = two_choices()
    next_B1 = prompts(2, 1, seed=3)
    with torch.no_grad():
        cache = routed(ids_BT, use_cache=True).past_key_values
        assert cache.weftlm_memory.tensors["retrieval.choice"].flatten().tolist() == [0, 1]
        expected = routed(next_B1, past_key_values=copy.deepcopy(cache), use_cache=True).logits
        routed(prompts(2, 2, seed=4), past_key_values=cache, use_cache=True)
        cache.crop(-2)
        for change, rows in (
            (lambda: None, [0, 1]),
            (lambda: cache.reorder_cache(torch.tensor([1, 0])), [1, 0]),
            (lambda: cache.batch_repeat_interleave(2), [1, 1, 0, 0]),
            (lambda: cache.batch_select_indices(torch.tensor([3, 0])), [0, 1]),
        ):
            change()
            found = routed(next_B1[rows], past_key_values=copy.deepcopy(cache), use_cache=True).logits
            torch.testing.assert_close(found, expected[rows])


class Follower(Router):
    """Counts the tokens read so far and gives all of them the first expert."""

    def begin(self, call: Call) -> None:
        call.memory.follows_tokens = True
        before_B = call.memory.tensors.get("count", torch.zeros(len(call.mask_BT), dtype=torch.int64))
        call.memory.tensors["count"] = before_B + call.mask_BT.sum(1)

    def route(self, target: TargetModule, u_BTI: Tensor, call: Call) -> Routing:
        shape = (*u_BTI.shape[:2], 1)
        return Routing(torch.full(shape, target.experts[0]), torch.ones(shape))


def test_what_follows_tokens_cannot_take_them_back() -> None:
    model = llama()
    routed = RoutedModel(model, make_pool(model))
    routed.use_router(Follower(RouterConfig(router="phatgoose"), routed.experts, routed.targets))
    ids_BT, mask_BT = padded(ROWS[:2], left=True)
    with torch.no_grad():
        cache = routed(ids_BT, attention_mask=mask_BT, use_cache=True).past_key_values
        assert cache.weftlm_memory.tensors["count"].tolist() == [7, 5]
        cache = routed(prompts(2, 1), past_key_values=cache, use_cache=True).past_key_values
    assert cache.weftlm_memory.tensors["count"].tolist() == [8, 6]
    with pytest.raises(ConfigError, match="cannot take tokens back"):
        cache.crop(-1)


# -- routers among each other ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("section", [{"router": "uniform"}, {"router": "merged", "weights": {"a": 0.7, "c": -0.2}}])
def test_fixed_weights_folded_equal_those_computed_for_every_token(
    name: str, section: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = BASES[name]()
    routed = RoutedModel(model, make_pool(model), section)
    given = inputs_for(model)
    folded = logits(routed, **given)
    assert all(module.folded is not None for module in model.modules() if isinstance(module, ModulePool))
    monkeypatch.setattr("weftlm.routing.routed_model.folded_weight", lambda *args: None)
    routed.use_router(section)
    torch.testing.assert_close(logits(routed, **given), folded, rtol=1e-4, atol=1e-4)
    assert not any(module.folded is not None for module in model.modules() if isinstance(module, ModulePool))


@pytest.mark.parametrize("name", ["gpt2", "t5"])
@pytest.mark.parametrize("copied", [True, False])
def test_a_saved_model_gives_the_same_bits(name: str, copied: bool, tmp_path: Path) -> None:
    BASES[name]().save_pretrained(tmp_path / "base")
    model = BASES[name]()
    section = {"router": "phatgoose", "k": 3, "temperature": 0.5}
    routed = RoutedModel(
        model, make_pool(model, base=BaseReference(str(tmp_path / "base"))), section,
        base=BaseReference(str(tmp_path / "base")),
    )  # fmt: skip
    given = inputs_for(model)
    expected = logits(routed, **given)
    routed.save_pretrained(tmp_path / "routed", copy_base=copied)
    assert (tmp_path / "routed" / "base").exists() == copied
    assert torch.equal(logits(routed, **given), expected)
    loaded = RoutedModel.from_pretrained(tmp_path / "routed")
    assert loaded.router.config == routed.router.config
    assert [expert.name for expert in loaded.experts] == [expert.name for expert in routed.experts]
    assert torch.equal(logits(loaded, **given), expected)
    handed = RoutedModel.from_pretrained(tmp_path / "routed", base=BASES[name]())
    assert torch.equal(logits(handed, **given), expected)


@pytest.mark.parametrize("name", ["phatgoose", "average-activation", "arrow"])
def test_scores_below_the_bar_leave_the_base_alone(name: str) -> None:
    model = llama()
    given = inputs_for(model)
    base = logits(model, **given)
    routed = RoutedModel(model, make_pool(model), {"router": name, "abstain_below": 1e6})
    torch.testing.assert_close(logits(routed, **given), base, rtol=0, atol=0)
    routed.use_router(name)
    expected = logits(routed, **given)
    routed.use_router({"router": name, "abstain_below": -1e6})
    assert torch.equal(logits(routed, **given), expected)


# -- experts nobody asks --------------------------------------------------------------------------------------------


def test_an_expert_with_an_empty_gate_is_never_chosen_and_said_so(caplog: pytest.LogCaptureFixture) -> None:
    pool = make_pool(llama(), mixed=False)
    given = inputs_for(llama())
    expected = logits(RoutedModel(llama(), pool[:3]), **given)
    for empty in (torch.zeros_like, lambda v_I: torch.full_like(v_I, 0.5)):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            routed = RoutedModel(llama(), [*pool[:3], with_gate(pool[3], empty)])
        assert "expert d has an empty phatgoose vector in 14 modules" in caplog.text
        torch.testing.assert_close(logits(routed, **given), expected, rtol=1e-5, atol=1e-5)


# -- precision ------------------------------------------------------------------------------------------------------


def test_routing_is_decided_in_float32_under_autocast() -> None:
    model = llama()
    pool = make_pool(model, mixed=False)
    routed = RoutedModel(model, pool)
    inputs: dict[str, Tensor] = {}
    found: dict[str, Routing] = {}
    ask = routed.switch.route

    def route(target: TargetModule, u_BTI: Tensor, call: Call) -> Routing:
        inputs[target.name], found[target.name] = u_BTI.clone(), ask(target, u_BTI, call)
        return found[target.name]

    routed.switch.route = route  # type: ignore[method-assign]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert bool(logits(routed, **inputs_for(model)).isfinite().all())
    for target in routed.targets:
        expected = routed.router.route(target, inputs[target.name], call_for(2, 6))
        assert torch.equal(found[target.name].experts_BTK, expected.experts_BTK)
        assert torch.equal(found[target.name].weights_BTK, expected.weights_BTK)


def test_a_model_cast_after_building_routes_as_one_built_in_that_dtype() -> None:
    given = inputs_for(llama())
    cast = RoutedModel(llama(), make_pool(llama())).to(torch.bfloat16)
    built = RoutedModel(llama().to(torch.bfloat16), make_pool(llama()))
    assert logits(cast, **given).dtype == torch.bfloat16
    assert torch.equal(logits(cast, **given), logits(built, **given))
