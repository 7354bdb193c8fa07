"""A trace tells every token's experts, and sums them up."""

from __future__ import annotations

import json
import math

import pytest
import torch
from support.experts import llama, make_pool, padded, prompts, t5
from support.routing import inputs_for, recorded

from weftlm.errors import ConfigError
from weftlm.routing.routed_model import RoutedModel
from weftlm.routing.router import Routing
from weftlm.routing.trace import MEAN, Trace, traces_of

TWO = Trace(
    tokens=(5, 6),
    experts=("a", "b"),
    modules=("model.layers.0.q", "model.layers.0.v", "model.layers.1.q"),
    weights_STE=torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[0.5, 0.5], [0.5, 0.5]], [[1.0, 0.0], [1.0, 0.0]]]),
)


def test_usage_entropy_and_token_weights() -> None:
    assert TWO.usage_SE.tolist() == [[0.5, 0.5], [0.5, 0.5], [1.0, 0.0]]
    torch.testing.assert_close(TWO.entropy_S, torch.tensor([math.log(2), math.log(2), 0.0]).double())
    torch.testing.assert_close(TWO.token_weights_TE, torch.tensor([[2.5, 0.5], [1.5, 1.5]]) / 3)
    assert TWO.layers() == {"model.layers.0": [0, 1], "model.layers.1": [2]}
    found = json.loads(json.dumps(TWO.to_json()))
    assert (found["tokens"], found["experts"]) == ([5, 6], ["a", "b"])
    assert [module["layer"] for module in found["modules"]] == ["model.layers.0", "model.layers.0", "model.layers.1"]
    assert found["modules"][0]["tokens"] == [{"a": 1.0}, {"b": 1.0}]  # an idle expert is left out
    assert found["modules"][1]["entropy_nats"] == found["max_entropy_nats"] == pytest.approx(math.log(2))


def test_one_row_of_a_batch_without_its_padding() -> None:
    routing = Routing(
        torch.tensor([[[0, 2], [2, 0], [0, 2]]] * 2), torch.tensor([[[9.0, 9.0], [0.75, 0.25], [1.0, 0.0]]] * 2)
    )
    batch = torch.tensor([[2, 3, 4]] * 2), torch.tensor([[True] * 3, [False, True, True]]), ["a", "b", "c"]
    trace = traces_of(*batch, {"m.0": routing})[1]
    assert trace.tokens == (3, 4)
    assert trace.weights_STE.tolist() == [[[0.25, 0.0, 0.75], [1.0, 0.0, 0.0]]]
    assert trace.experts == ("a", "b", "c")
    shared = Routing(routing.experts_BTK, routing.weights_BTK / 2, torch.full((2, 3), 0.5))
    with_mean = traces_of(*batch, {"m.0": shared})[1]
    assert with_mean.experts == ("a", "b", "c", MEAN)
    assert with_mean.weights_STE.tolist() == [[[0.125, 0.0, 0.375, 0.5], [0.5, 0.0, 0.0, 0.5]]]


@pytest.mark.parametrize("section", ["phatgoose", "arrow", "retrieval", "prefix"])
def test_a_models_trace_is_what_its_modules_decided(section: str) -> None:
    model = llama()
    routed = RoutedModel(model, make_pool(model, mixed=False), section)
    rows = [prompts(1, length, seed=length)[0] for length in (6, 4)]
    ids_BT, mask_BT = padded(rows, left=True)
    traces = routed.trace(ids_BT, mask_BT)
    decided = recorded(routed, input_ids=ids_BT, attention_mask=mask_BT)
    assert [list(trace.tokens) for trace in traces] == [row.tolist() for row in rows]
    for trace, row, real_T in zip(traces, range(2), mask_BT.bool(), strict=True):
        assert trace.modules == tuple(target.name for target in routed.targets)
        assert trace.weights_STE.shape[:2] == (14, len(trace.tokens))
        torch.testing.assert_close(trace.weights_STE.sum(-1), torch.ones(trace.weights_STE.shape[:2]))
        for place, target in enumerate(trace.modules):
            chosen = trace.weights_STE[place].gather(1, decided[target].experts_BTK[row][real_T])
            torch.testing.assert_close(chosen, decided[target].weights_BTK[row][real_T], rtol=1e-5, atol=1e-6)
    alone = routed.trace(rows[1][None])[0]
    torch.testing.assert_close(alone.weights_STE, traces[1].weights_STE, rtol=1e-4, atol=1e-5)
    assert json.loads(json.dumps(alone.to_json()))["modules"][0]["name"] == trace.modules[0]


def test_of_encoder_decoder_models_the_encoders_tokens_are_told() -> None:
    model = t5()
    routed = RoutedModel(model, make_pool(model))
    given = inputs_for(model, batch=1)
    trace = routed.trace(given["input_ids"], decoder_input_ids=given["decoder_input_ids"])[0]
    assert trace.modules[0].startswith("encoder.")
    told = set(trace.modules)
    assert {target for target in told if target.startswith("decoder.")} == {
        f"decoder.block.{layer}.layer.1.EncDecAttention.{name}" for layer in (0, 1) for name in "kv"
    }
    assert trace.weights_STE.shape[1] == 6


def test_fixed_weights_leave_nothing_to_trace() -> None:
    model = llama()
    routed = RoutedModel(model, make_pool(model), "merged")
    with pytest.raises(ConfigError, match="router 'merged' gives every token the same experts"):
        routed.trace(prompts(1))


def test_a_trace_leaves_no_recorder_behind() -> None:
    model = llama()
    routed = RoutedModel(model, make_pool(model))
    routed.trace(prompts(1))
    with pytest.raises(IndexError):
        routed.trace(prompts(1) + 1000)
    assert routed.switch.passing.record is None
