"""What an inspection tells is what the model does, and looking changes nothing of the model that is served."""

from __future__ import annotations

import gc
import math
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.served import write_model

from weftlm.pipeline.any_model import OpenModel, open_model
from weftlm.reporting.traces import DIGITS, SCALE
from weftlm.routing.routed_model import RoutedModel
from weftlm.serving.api_errors import ApiError
from weftlm.serving.inspection import Inspection, Inspector, shadow, tokens_of

TEXT = "the river runs over old stones\n\tand é 日 <b>&amp; then"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, OpenModel]:
    folder = tmp_path_factory.mktemp("models")
    return {kind: open_model(write_model(folder / kind, kind)) for kind in ("plain", "routed", "gated")}


@pytest.fixture(scope="module")
def looking(models: dict[str, OpenModel]) -> dict[str, Inspector]:
    return {kind: Inspector(kind, opened) for kind, opened in models.items()}


def ids_of(opened: OpenModel, text: str = TEXT) -> torch.Tensor:
    return torch.tensor([opened.tokenizer.encode_batch([text])[0].astype("int64").tolist()])


def log_probs(model: Any, ids_1T: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return torch.log_softmax(model(input_ids=ids_1T).logits[0].float(), dim=-1)


def unpacked(told: Inspection, view: str) -> list[dict[str, float]]:
    """The weights of a view, by name."""
    text = next(one.weights for one in told.views if one.name == view)
    place, rows = 0, []
    while place < len(text):
        count, place, row = DIGITS.index(text[place]), place + 1, {}
        for _ in range(count):
            expert, high, low = (DIGITS.index(digit) for digit in text[place : place + 3])
            row[told.experts[expert]] = (64 * high + low) / SCALE
            place += 3
        rows.append(row)
    return rows


@pytest.mark.parametrize("kind", ["plain", "routed", "gated"])
def test_losses_and_alternatives_are_the_models_own(
    kind: str, models: dict[str, OpenModel], looking: dict[str, Inspector]
) -> None:
    ids_1T = ids_of(models[kind])
    logq_TV = log_probs(models[kind].model, ids_1T)
    told = looking[kind].inspect(TEXT)
    assert [token.id for token in told.tokens] == ids_1T[0].tolist()
    assert told.tokens[0].logprob is None
    assert told.tokens[0].top == ()
    for place, token in enumerate(told.tokens[1:], 1):
        assert token.logprob == pytest.approx(float(logq_TV[place - 1, token.id]), abs=2e-5)
        best = logq_TV[place - 1].topk(5)
        assert [guess.logprob for guess in token.top] == pytest.approx(best.values.tolist(), abs=2e-5)
        assert [guess.id for guess in token.top] == best.indices.tolist()
        assert all(guess.text == models[kind].tokenizer.decode([guess.id]) for guess in token.top)
    assert told.next[0].id == int(logq_TV[-1].argmax())
    nats = -sum(token.logprob or 0.0 for token in told.tokens)
    first = len(told.tokens[0].text.encode())
    assert told.totals.nats == pytest.approx(nats)
    assert (told.totals.tokens, told.totals.bytes) == (len(told.tokens) - 1, len(TEXT.encode()) - first)


def test_the_texts_of_the_tokens_join_to_the_text(looking: dict[str, Inspector]) -> None:
    for text in (TEXT, "   ", "\r\n\r\n", "日本語", "<|endoftext|> x", "\x00\x07 a\u202eb", "𝄞𝄞"):
        assert "".join(token.text for token in looking["plain"].inspect(text).tokens) == text


def test_a_tokenizer_without_offsets_is_followed_by_what_it_decodes(
    models: dict[str, OpenModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = models["plain"].tokenizer
    told = tokens_of(tokenizer, TEXT)
    monkeypatch.setattr(type(tokenizer.hf), "is_fast", False)
    ids, ends = tokens_of(tokenizer, TEXT)
    assert ids == told[0]
    assert ends[-1] == len(TEXT)
    ascii_ends = [end for end in told[1] if end < TEXT.index("é")]
    assert ends[: len(ascii_ends)] == ascii_ends


def test_routing_weights_are_those_of_a_trace(models: dict[str, OpenModel], looking: dict[str, Inspector]) -> None:
    model: RoutedModel = models["routed"].model
    trace = model.trace(ids_of(models["routed"]))[0]
    told = looking["routed"].inspect(TEXT)
    assert told.experts == trace.experts
    assert [view.name for view in told.views] == ["all", *(f"layer:{name}" for name in trace.layers())]
    for place, row in enumerate(unpacked(told, "all")):
        expected = dict(zip(trace.experts, trace.token_weights_TE[place].tolist(), strict=True))
        assert {name: row.get(name, 0.0) for name in expected} == pytest.approx(expected, abs=1e-3)
    layer, rows = next(iter(trace.layers().items()))
    means_TE = trace.weights_STE[rows].mean(dim=0)
    for place, row in enumerate(unpacked(told, f"layer:{layer}")):
        assert list(row.values()) == pytest.approx([w for w in means_TE[place].tolist() if w > 5e-4], abs=1e-3)
    assert [module.name for module in told.modules] == list(trace.modules)
    assert [module.entropy for module in told.modules] == pytest.approx(trace.entropy_S.tolist(), abs=1e-5)
    assert told.modules[1].usage == pytest.approx(trace.usage_SE[1].tolist(), abs=1e-4)
    target = trace.modules[2]
    one = looking["routed"].inspect(TEXT, module=target)
    assert [view.name for view in one.views] == [f"module:{target}"]
    for place, row in enumerate(unpacked(one, f"module:{target}")):
        assert list(row.values()) == pytest.approx([w for w in trace.weights_STE[2, place].tolist() if w], abs=1e-3)


def test_gate_weights_stand_at_the_token_they_predict(
    models: dict[str, OpenModel], looking: dict[str, Inspector]
) -> None:
    model = models["gated"].model
    weights_TE = model.weights(ids_of(models["gated"]))[0].exp()
    told = looking["gated"].inspect(TEXT)
    rows = unpacked(told, "gate")
    assert told.experts == models["gated"].experts
    assert rows[0] == {}
    for place, row in enumerate(rows[1:]):
        assert [row.get(name, 0.0) for name in told.experts] == pytest.approx(weights_TE[place].tolist(), abs=1e-3)


def test_a_routed_model_without_an_expert_routes_over_the_others(
    models: dict[str, OpenModel], looking: dict[str, Inspector]
) -> None:
    opened = models["routed"]
    left = opened.experts[1]
    before = log_probs(opened.model, ids_of(opened))
    told = looking["routed"].inspect(TEXT, without=left)
    others = [expert for expert in opened.model.experts if expert.name != left]
    again = open_model(opened.path).model.unload()
    alone = RoutedModel(again, others, opened.model.router.config)
    logq_TV = log_probs(alone, ids_of(opened))
    assert told.experts == tuple(expert.name for expert in others)
    assert told.without == left
    for place, token in enumerate(told.tokens[1:]):
        assert token.logprob == pytest.approx(float(logq_TV[place, token.id]), abs=1e-5)
    assert told.totals.nats != pytest.approx(looking["routed"].inspect(TEXT).totals.nats, abs=1e-4)
    assert torch.equal(log_probs(opened.model, ids_of(opened)), before)


def test_a_variant_shares_the_bases_weights(models: dict[str, OpenModel], looking: dict[str, Inspector]) -> None:
    held = {tensor.data_ptr() for tensor in models["routed"].model.model.parameters()}
    variant = looking["routed"]._without(models["routed"].experts[0])
    assert {tensor.data_ptr() for tensor in variant.model.parameters()} == held


def test_a_gated_model_without_an_expert_shares_its_weight_among_the_others(
    models: dict[str, OpenModel], looking: dict[str, Inspector]
) -> None:
    opened = models["gated"]
    ids_1T = ids_of(opened)
    alone = opened.model.pool.expert(opened.experts[1]).log_probs(ids_1T)[0]
    told = looking["gated"].inspect(TEXT, without=opened.experts[0])
    assert told.experts == opened.experts[1:]
    assert all(row == {opened.experts[1]: 1.0} for row in unpacked(told, "gate")[1:])
    for place, token in enumerate(told.tokens[1:]):
        assert token.logprob == pytest.approx(float(alone[place, token.id]), abs=1e-5)


def test_a_sparse_gated_model_takes_the_best_of_those_left(models: dict[str, OpenModel]) -> None:
    opened = models["gated"]
    config = opened.model.config
    config.top_m = 1
    try:
        sparse = Inspector("sparse", opened)
    finally:
        config.top_m = None
    whole = unpacked(sparse.inspect(TEXT), "gate")
    assert all(len(row) == 1 and math.isclose(sum(row.values()), 1) for row in whole[1:])
    for name in opened.experts:
        assert all(
            name not in row and len(row) == 1 for row in unpacked(sparse.inspect(TEXT, without=name), "gate")[1:]
        )
    assert sparse.facts().by == "fixed_share, top 1"


def test_one_token_alone_is_context(looking: dict[str, Inspector]) -> None:
    for inspector in looking.values():
        told = inspector.inspect("t")
        assert (told.totals.tokens, told.totals.nats) == (0, 0.0)
        assert len(told.next) == 5
        assert looking["plain"].inspect("t").tokens[0].logprob is None


@pytest.mark.parametrize(
    ("ask", "field", "code", "told"),
    [
        (lambda one: one.inspect(""), "text", "invalid_value", "is empty"),
        (lambda one: one.inspect("x" * 8193), "text", "invalid_value", "8193 characters; at most 3328"),
        (lambda one: one.inspect("q " * 300), "text", "context_length_exceeded", "can read 256"),
        (lambda one: one.inspect("x", without="nobody"), "without", "not_found", "no expert 'nobody'"),
        (lambda one: one.inspect("x", module="model.layer.0"), "module", "not_found", "no module 'model.layer.0'"),
    ],
)
def test_a_wrong_question_is_answered_with_what_to_do(
    ask: Callable[[Inspector], Any], field: str, code: str, told: str, looking: dict[str, Inspector]
) -> None:
    with pytest.raises(ApiError) as caught:
        ask(looking["routed"])
    assert told in caught.value.message
    assert (caught.value.param, caught.value.code) == (field, code)


def test_facts_name_layers_and_modules(looking: dict[str, Inspector]) -> None:
    facts = looking["routed"].facts()
    assert (facts.kind, facts.by, facts.max_tokens) == ("routed", "phatgoose", 256)
    assert facts.max_characters == 256 * len("<|endoftext|>")  # the longest token
    assert [layer.label for layer in facts.layers] == ["layer 0", "layer 1"]
    part = facts.layers[0].modules[0]
    assert part.name == f"model.layers.0.{part.label}"
    assert looking["plain"].facts().layers == ()
    assert looking["plain"].facts().by is None


@pytest.mark.parametrize("kind", ["routed", "gated"])
def test_a_shadow_has_every_weight_and_no_module_in_common(kind: str, models: dict[str, OpenModel]) -> None:
    opened = models[kind]
    other = shadow(opened)
    pairs = zip(opened.model.state_dict().values(), other.state_dict().values(), strict=True)
    assert all(a.data_ptr() == b.data_ptr() for a, b in pairs)
    assert not set(map(id, opened.model.modules())) & set(map(id, other.modules()))


@pytest.mark.parametrize("kind", ["routed", "gated"])
def test_passes_of_the_served_model_and_inspections_do_not_meet(kind: str, models: dict[str, OpenModel]) -> None:
    opened = models[kind]
    inspector = Inspector(kind, opened)
    ids_1T = ids_of(opened)
    expected, told = log_probs(opened.model, ids_1T), inspector.inspect(TEXT)
    without = {name: inspector.inspect(TEXT, without=name) for name in opened.experts}
    wrong: list[str] = []
    done = threading.Event()

    def serve() -> None:
        while not done.is_set():
            if not torch.equal(log_probs(opened.model, ids_1T), expected):
                wrong.append("a pass changed")

    server = threading.Thread(target=serve)
    server.start()
    try:
        for _ in range(4):
            assert inspector.inspect(TEXT) == told
            for name in opened.experts:
                assert inspector.inspect(TEXT, without=name) == without[name]
    finally:
        done.set()
        server.join()
    assert not wrong


def test_models_without_an_expert_are_freed_at_once(models: dict[str, OpenModel]) -> None:
    inspector = Inspector("routed", models["routed"])
    alive: list[weakref.ref[Any]] = []
    without = inspector._without

    def watched(expert: str) -> RoutedModel:
        variant = without(expert)
        alive.extend(map(weakref.ref, [variant, *variant._pools.values()]))
        return variant

    inspector._without = watched  # type: ignore[method-assign]
    gc.collect()
    gc.disable()
    try:
        for name in inspector.experts:
            inspector.inspect(TEXT, without=name)
        assert len(alive) > 3
        assert [reference for reference in alive if reference() is not None] == []
    finally:
        gc.enable()
