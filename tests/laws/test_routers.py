"""Laws every registered router obeys; a new router inherits them by registering itself.

A case is a router's section: its defaults, where they are a section, and its `example`. Another package runs the suite
over its own routers with `from laws.test_routers import *`; see examples/plugin.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.experts import llama, make_expert, make_pool, padded, prompts, renamed, t5
from support.routing import WAYS, Problem, assert_solve, generate, inputs_for, kernel_problem, logits, recorded
from torch import Tensor

from weftlm.errors import ConfigError, ExpertError
from weftlm.experts.expert import Expert
from weftlm.routing import kernels
from weftlm.routing.config import routers
from weftlm.routing.routed_model import RoutedModel

EXPERTS = ("a", "b", "c", "d")


def cases() -> Iterator[Any]:
    for name in routers:
        config = routers[name].Config
        found = [] if any(field.is_required() for field in config.model_fields.values()) else [config(router=name)]
        found += [each for each in (config.example(EXPERTS),) if each not in found]
        for number, each in enumerate(found):
            yield pytest.param(each.model_dump(mode="json"), id="-".join([name, "example"][: 1 + number]))


every_router = pytest.mark.parametrize("section", list(cases()))


def cases_without(attribute: str) -> Any:
    """Cases whose router does not have a capability."""
    kept = [case for case in cases() if not getattr(routers[case.values[0]["router"]], attribute)]
    return pytest.mark.parametrize("section", kept)


ROWS = [prompts(1, length, seed=length)[0] for length in (7, 4, 6)]


@functools.cache
def pool_of(make: Callable[[], Any], *, mixed: bool = True) -> list[Expert]:
    """Four experts, which nobody changes."""
    return make_pool(make(), mixed=mixed)


_BUILT: dict[str, RoutedModel] = {}


def route(section: dict[str, Any], *, mixed: bool = True) -> RoutedModel:
    """A routed model that tests run and leave as it is."""
    key = f"{section} {mixed}"
    if key not in _BUILT:
        _BUILT[key] = RoutedModel(llama(), pool_of(llama, mixed=mixed), section)
    return _BUILT[key]


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@every_router
@pytest.mark.parametrize("mixed", [False, True], ids=["alike", "mixed"])
def test_weights_are_shares_of_different_experts(section: dict[str, Any], mixed: bool) -> None:
    routed = route(section, mixed=mixed)
    weights_E = routed.router.static_weights_E
    if weights_E is not None:
        assert weights_E.shape == (4,)
        assert bool((weights_E >= 0).all())
        assert float(weights_E.sum()) == pytest.approx(1.0)
        return
    ids_BT, mask_BT = padded(ROWS, left=True)
    found = recorded(routed, input_ids=ids_BT, attention_mask=mask_BT)
    assert list(found) == [target.name for target in routed.targets]
    for routing in found.values():
        experts_BTK, weights_BTK = routing.experts_BTK, routing.weights_BTK
        assert experts_BTK.dtype == torch.int64
        assert weights_BTK.dtype == torch.float32
        assert experts_BTK.shape == weights_BTK.shape
        assert experts_BTK.shape[:2] == ids_BT.shape
        assert bool(((experts_BTK >= 0) & (experts_BTK < 4)).all())
        ordered_BTK = experts_BTK.sort(dim=-1).values
        assert bool((ordered_BTK[..., 1:] > ordered_BTK[..., :-1]).all())
        assert bool((weights_BTK >= 0).all())
        total_BT = weights_BTK.sum(dim=-1)
        if routing.background_BT is not None:
            assert bool((routing.background_BT >= 0).all())
            total_BT = total_BT + routing.background_BT
        torch.testing.assert_close(total_BT, torch.ones_like(total_BT), rtol=0, atol=1e-5)


@cases_without("by_place")
def test_the_order_of_the_pool_does_not_matter(section: dict[str, Any]) -> None:
    pool = pool_of(llama)
    inputs = inputs_for(llama())
    shuffled = [pool[place] for place in (2, 0, 3, 1)]
    close(logits(RoutedModel(llama(), shuffled, section), **inputs), logits(route(section), **inputs))


@every_router
def test_equal_experts_make_the_choice_irrelevant(section: dict[str, Any]) -> None:
    pool = pool_of(llama, mixed=False)
    alike = [replace(expert, lora=renamed(pool[0], expert.name).lora) for expert in pool]
    inputs = inputs_for(llama())
    expected = logits(RoutedModel(llama(), pool[:1], {"router": "single", "expert": "a"}), **inputs)
    close(logits(RoutedModel(llama(), alike, section), **inputs), expected)


@every_router
def test_a_pool_of_one_is_that_expert(section: dict[str, Any]) -> None:
    expert = renamed(make_expert(llama(), seed=1), section.get("expert", "a"))
    section = routers[section["router"]].Config.example([expert.name]).model_dump(mode="json")
    inputs = inputs_for(llama())
    expected = logits(RoutedModel(llama(), [expert], {"router": "single", "expert": expert.name}), **inputs)
    close(logits(RoutedModel(llama(), [expert], section), **inputs), expected)


@every_router
def test_batch_order_and_padding_change_nothing(section: dict[str, Any]) -> None:
    routed = route(section)
    alone = [logits(routed, input_ids=row[None])[0] for row in ROWS]
    for left in (True, False):
        ids_BT, mask_BT = padded(ROWS, left=left)
        positions_BT = (mask_BT.cumsum(1) - 1).clamp_min(0)
        for order in (torch.arange(3), torch.tensor([2, 0, 1])):
            found = logits(
                routed, input_ids=ids_BT[order], attention_mask=mask_BT[order], position_ids=positions_BT[order]
            )
            for row, place in zip(found, order.tolist(), strict=True):
                close(row[mask_BT[place].bool()], alone[place])


@cases_without("reads_ahead")
def test_later_tokens_do_not_change_earlier_ones(section: dict[str, Any]) -> None:
    routed = route(section)
    ids_BT = prompts(2, 8)
    changed_BT = torch.cat([ids_BT[:, :5], prompts(2, 3, seed=8)], dim=1)
    assert not torch.equal(ids_BT, changed_BT)
    close(logits(routed, input_ids=changed_BT)[:, :5], logits(routed, input_ids=ids_BT)[:, :5])


@cases_without("reads_ahead")
def test_a_cached_prefix_continued_equals_one_pass(section: dict[str, Any]) -> None:
    routed = route(section)
    ids_BT, mask_BT = padded(ROWS, left=True)
    with torch.no_grad():
        whole = routed(input_ids=ids_BT, attention_mask=mask_BT).logits
        cache = routed(input_ids=ids_BT[:, :4], attention_mask=mask_BT[:, :4], use_cache=True).past_key_values
        pieces = []
        for start, end in ((4, 6), (6, 7)):
            out = routed(input_ids=ids_BT[:, start:end], attention_mask=mask_BT[:, :end], past_key_values=cache)
            pieces.append(out.logits)
            cache = out.past_key_values
    close(torch.cat(pieces, dim=1), whole[:, 4:])


@every_router
def test_a_prompt_in_a_batch_generates_what_it_generates_alone(section: dict[str, Any]) -> None:
    routed = route(section)
    ids_BT, mask_BT = padded(ROWS, left=True)
    together = generate(routed, ids_BT, mask_BT, num_beams=2, max_new_tokens=4)
    if not routers[section["router"]].reads_ahead:
        without = generate(routed, ids_BT, mask_BT, num_beams=2, max_new_tokens=4, use_cache=False)
        assert torch.equal(together, without)
    tokens = ROWS[1]
    alone = generate(routed, tokens[None], torch.ones(1, 4, dtype=torch.int64), num_beams=2, max_new_tokens=4)
    assert torch.equal(together[1], alone[0])


@every_router
def test_a_pass_repeated_and_a_router_rebuilt_give_the_same_bits(section: dict[str, Any]) -> None:
    routed = route(section)
    inputs = inputs_for(llama())
    expected = logits(routed, **inputs)
    assert torch.equal(logits(routed, **inputs), expected)
    config = routed.router.config.model_dump(mode="json")
    assert config["router"] == section["router"]
    assert torch.equal(logits(RoutedModel(llama(), pool_of(llama), config), **inputs), expected)


@every_router
def test_inference_mode_autocast_and_half_precision_are_served(section: dict[str, Any]) -> None:
    routed = route(section)
    inputs = inputs_for(llama())
    expected = logits(routed, **inputs)
    with torch.inference_mode():
        close(routed(**inputs).logits.clone(), expected)
    close(logits(routed, **inputs), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert bool(logits(routed, **inputs).isfinite().all())
    half = logits(copy.deepcopy(routed).to(torch.bfloat16), **inputs)
    assert half.dtype == torch.bfloat16
    assert bool(half.isfinite().all())
    assert all(buffer.dtype != torch.bfloat16 for buffer in routed.router.buffers())


@every_router
def test_switched_off_the_base_is_left(section: dict[str, Any]) -> None:
    inputs = inputs_for(llama())
    expected = logits(llama(), **inputs)
    routed = RoutedModel(llama(), pool_of(llama), section)
    with routed.disabled():
        assert torch.equal(logits(routed, **inputs), expected)
    assert not torch.allclose(logits(routed, **inputs), expected, atol=1e-2)
    assert torch.equal(logits(routed.unload(), **inputs), expected)


@every_router
def test_encoder_decoder_models_are_served_or_refused(section: dict[str, Any]) -> None:
    model = t5()
    pool = pool_of(t5)
    if not routers[section["router"]].supports_encoder_decoder:
        with pytest.raises(ConfigError, match=section["router"]):
            RoutedModel(model, pool, section)
        assert logits(model, **inputs_for(model)).isfinite().all()
        return
    routed = RoutedModel(model, pool, section)
    ids_BT, mask_BT = padded(ROWS, left=False)
    decoder_BT = inputs_for(model, batch=3)["decoder_input_ids"]
    whole = logits(routed, input_ids=ids_BT, attention_mask=mask_BT, decoder_input_ids=decoder_BT)
    for row, tokens in enumerate(ROWS):
        close(logits(routed, input_ids=tokens[None], decoder_input_ids=decoder_BT[row : row + 1])[0], whole[row])
    # Whatever a router reads ahead is the encoder's text: the decoder never sees its own future.
    shorter = logits(routed, input_ids=ids_BT, attention_mask=mask_BT, decoder_input_ids=decoder_BT[:, :2])
    close(shorter, whole[:, :2])
    with torch.no_grad():
        outputs = routed.get_encoder()(input_ids=ids_BT, attention_mask=mask_BT)
    ahead = logits(routed, encoder_outputs=outputs, attention_mask=mask_BT, decoder_input_ids=decoder_BT)
    close(ahead, whole)


@every_router
def test_what_an_expert_lacks_is_named_and_what_is_not_read_is_not_asked_for(section: dict[str, Any]) -> None:
    needs = routers[section["router"]].needs
    whole = pool_of(llama)
    lacking: dict[str, Any] = {need: None for need in ("gate", "statistics") if need not in needs}
    bare = [replace(expert, **lacking) for expert in whole]
    inputs = inputs_for(llama())
    assert torch.equal(logits(RoutedModel(llama(), bare, section), **inputs), logits(route(section), **inputs))
    for need in needs:
        less: dict[str, Any] = {need: None}
        with pytest.raises(ExpertError, match=f"needs a {need} and c has none"):
            RoutedModel(llama(), [*whole[:2], replace(whole[2], **less), whole[3]], section)


# -- the kernels ----------------------------------------------------------------------------------------------------

QUICK = settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    experts = draw(st.integers(1, 12))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16]))
    width, out = draw(st.sampled_from([1, 5, 8, 16])), draw(st.sampled_from([1, 3, 8, 24]))
    return kernel_problem(
        draw(st.integers(1, 20)), draw(st.integers(1, min(experts, 4))), experts, draw(st.integers(1, 9)), width, out,
        draw(st.sampled_from(["even", "skewed", "drawn"])), dtype, seed=draw(st.integers(0, 5)),
    )  # fmt: skip


@QUICK
@given(problem=problems())
def test_every_way_to_the_routed_product_agrees(problem: Problem) -> None:
    assert_solve(problem, **{way: kernel(*problem) for way, kernel in WAYS.items()})


@QUICK
@given(problem=problems(), data=st.data())
def test_tokens_and_experts_may_be_relabelled(problem: Problem, data: st.DataObject) -> None:
    u_NI, experts_NK, weights_NK, A_ERI, B_ERO = problem
    tokens = torch.tensor(data.draw(st.permutations(range(len(u_NI)))))
    order = torch.tensor(data.draw(st.permutations(range(len(A_ERI)))))
    relabelled = (u_NI[tokens], order.argsort()[experts_NK[tokens]], weights_NK[tokens], A_ERI[order], B_ERO[order])
    delta_NO = kernels.routed_delta(*problem)
    other_NO = torch.empty_like(delta_NO)
    other_NO[tokens] = kernels.routed_delta(*relabelled)
    assert_solve(problem, first=delta_NO, relabelled=other_NO)
