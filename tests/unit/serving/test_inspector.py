"""The inspector tells what the model does, over HTTP, and changes nothing of the model that is served."""

from __future__ import annotations

import contextlib
import gc
import http.client
import json
import math
import re
import threading
import weakref
from typing import Any

import pytest
import torch
from fastapi.testclient import TestClient
from support.fake_engine import FakeEngine
from support.served import KINDS
from support.web import serving, wait_until

from weftlm.pipeline.any_model import OpenModel, open_model
from weftlm.reporting.traces import SCALE
from weftlm.routing.routed_model import RoutedModel
from weftlm.serving.app import build_app
from weftlm.serving.inspector import PAGE, Inspector
from weftlm.serving.limits import ApiError
from weftlm.serving.serve_config import ServeConfig

TEXT = "the river runs over old stones\n\tand é 日 <b>&amp; then"


@pytest.fixture(scope="module")
def inspectors(models: dict[str, OpenModel]) -> dict[str, Inspector]:
    return {kind: Inspector(kind, opened) for kind, opened in models.items()}


@pytest.fixture(scope="module")
def client(models: dict[str, OpenModel]) -> TestClient:
    app = build_app({kind: FakeEngine(opened) for kind, opened in models.items()}, ServeConfig())
    return TestClient(app, raise_server_exceptions=False)


def ids_of(opened: OpenModel) -> torch.Tensor:
    return torch.tensor([opened.tokenizer.encode_batch([TEXT])[0].astype("int64").tolist()])


def log_probs(model: Any, ids_1T: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return torch.log_softmax(model(input_ids=ids_1T).logits[0].float(), dim=-1)


def unpacked(found: dict[str, Any], packed: list[int]) -> list[dict[str, float]]:
    """Packed weights by the experts' names."""
    names, numbers = found["trace"]["experts"], iter(packed)
    return [{names[next(numbers)]: next(numbers) / SCALE for _ in range(count)} for count in numbers]


def nats(found: dict[str, Any]) -> float:
    return -sum(token["logprob"] or 0.0 for token in found["tokens"])


# -- what is told -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_alternatives_are_the_models_own(
    kind: str, models: dict[str, OpenModel], inspectors: dict[str, Inspector]
) -> None:
    ids_1T = ids_of(models[kind])
    logq_TV = log_probs(models[kind].model, ids_1T)
    found = inspectors[kind].inspect(TEXT)
    assert [token["id"] for token in found["tokens"]] == ids_1T[0].tolist()
    assert "".join(token["text"] for token in found["tokens"]) == TEXT
    assert (found["tokens"][0]["logprob"], found["tokens"][0]["top"]) == (None, [])
    for place, token in enumerate(found["tokens"][1:], 1):
        assert token["logprob"] == pytest.approx(float(logq_TV[place - 1, token["id"]]), abs=2e-5)
        best = logq_TV[place - 1].topk(5)
        assert [guess["logprob"] for guess in token["top"]] == pytest.approx(best.values.tolist(), abs=2e-5)
        assert [guess["id"] for guess in token["top"]] == best.indices.tolist()
        assert all(guess["text"] == models[kind].tokenizer.decode([guess["id"]]) for guess in token["top"])
    assert found["next"][0]["id"] == int(logq_TV[-1].argmax())
    assert (found["trace"] is None) == (kind == "plain")
    alone = inspectors[kind].inspect("t")  # one token
    assert ([token["logprob"] for token in alone["tokens"]], len(alone["next"])) == ([None], 5)


def test_the_texts_of_the_tokens_join_to_the_text(inspectors: dict[str, Inspector]) -> None:
    for text in ("   ", "\r\n\r\n", "日本語", "<|endoftext|> x", "\x00\x07 a\u202eb", "𝄞𝄞"):
        assert "".join(token["text"] for token in inspectors["plain"].inspect(text)["tokens"]) == text


def test_routing_weights_are_those_of_a_trace(models: dict[str, OpenModel], inspectors: dict[str, Inspector]) -> None:
    model: RoutedModel = models["routed"].model
    trace = model.trace(ids_of(models["routed"]))[0]
    found = inspectors["routed"].inspect(TEXT)
    assert tuple(found["trace"]["experts"]) == trace.experts
    assert [module["name"] for module in found["trace"]["modules"]] == list(trace.modules)
    means = unpacked(found, found["trace"]["mean"])
    part = unpacked(found, found["trace"]["rows"][found["trace"]["parts"][2]["row"]])
    for rows, weights_TE in ((means, trace.token_weights_TE), (part, trace.weights_STE[2])):
        for row, weights_E in zip(rows, weights_TE.tolist(), strict=True):
            expected = dict(zip(trace.experts, weights_E, strict=True))
            assert {name: row.get(name, 0.0) for name in expected} == pytest.approx(expected, abs=1e-3)


def test_gate_weights_are_told_with_the_token_they_predict(
    models: dict[str, OpenModel], inspectors: dict[str, Inspector]
) -> None:
    found = inspectors["gated"].inspect(TEXT)
    rows = unpacked(found, found["trace"]["mean"])
    assert tuple(found["trace"]["experts"]) == models["gated"].experts
    assert (rows[0], rows[1]) == ({}, dict.fromkeys(models["gated"].experts, 0.5))
    pool, ids_1T = models["gated"].model.pool, ids_of(models["gated"])
    logq = dict(zip(pool.names, pool.log_probs(ids_1T)[0].unbind(1), strict=True))
    for place, (row, token) in enumerate(zip(rows[1:], found["tokens"][1:], strict=True)):
        mixed = sum(weight * float(logq[name][place, token["id"]].exp()) for name, weight in row.items())
        assert mixed == pytest.approx(math.exp(token["logprob"]), rel=5e-3, abs=1e-6)


def test_a_routed_model_without_an_expert_routes_over_the_others(
    models: dict[str, OpenModel], inspectors: dict[str, Inspector]
) -> None:
    opened = models["routed"]
    left = opened.experts[1]
    before = log_probs(opened.model, ids_of(opened))
    found = inspectors["routed"].inspect(TEXT, without=left)
    others = [expert for expert in opened.model.experts if expert.name != left]
    alone = RoutedModel(open_model(opened.path).model.unload(), others, opened.model.router.config)
    logq_TV = log_probs(alone, ids_of(opened))
    assert found["trace"]["experts"] == [expert.name for expert in others]
    assert found["without"] == left
    for place, token in enumerate(found["tokens"][1:]):
        assert token["logprob"] == pytest.approx(float(logq_TV[place, token["id"]]), abs=1e-5)
    assert nats(found) != pytest.approx(nats(inspectors["routed"].inspect(TEXT)), abs=1e-4)
    assert torch.equal(log_probs(opened.model, ids_of(opened)), before)


def test_a_gated_model_without_an_expert_shares_its_weight_among_the_others(
    models: dict[str, OpenModel], inspectors: dict[str, Inspector]
) -> None:
    opened = models["gated"]
    alone = opened.model.pool.log_probs(ids_of(opened))[0, :, 1]
    found = inspectors["gated"].inspect(TEXT, without=opened.experts[0])
    assert found["trace"]["experts"] == list(opened.experts[1:])
    assert all(row == {opened.experts[1]: 1.0} for row in unpacked(found, found["trace"]["mean"])[1:])
    for place, token in enumerate(found["tokens"][1:]):
        assert token["logprob"] == pytest.approx(float(alone[place, token["id"]]), abs=1e-5)


def test_a_sparse_gated_model_takes_the_best_of_those_left(models: dict[str, OpenModel]) -> None:
    opened = models["gated"]
    config = opened.model.config
    config.top_m = 1
    try:
        sparse = Inspector("sparse", opened)
    finally:
        config.top_m = None
    for without in (None, *opened.experts):
        found = sparse.inspect(TEXT, without=without)
        rows = unpacked(found, found["trace"]["mean"])[1:]
        assert all(list(row.values()) == [1.0] and without not in row for row in rows)
    assert sparse.facts["by"] == "fixed_share, top 1"


# -- the served model stays as it is --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["routed", "gated"])
def test_passes_of_the_served_model_and_inspections_do_not_meet(kind: str, models: dict[str, OpenModel]) -> None:
    opened = models[kind]
    inspector = Inspector(kind, opened)
    weights = [tensor.data_ptr() for tensor in opened.model.state_dict().values()]
    assert [tensor.data_ptr() for tensor in inspector._model.state_dict().values()] == weights
    assert not set(map(id, opened.model.modules())) & set(map(id, inspector._model.modules()))
    ids_1T = ids_of(opened)
    expected = log_probs(opened.model, ids_1T)
    found = {name: inspector.inspect(TEXT, without=name) for name in (None, *opened.experts)}
    wrong: list[str] = []
    done = threading.Event()

    def serve() -> None:
        while not done.is_set():
            if not torch.equal(log_probs(opened.model, ids_1T), expected):
                wrong.append("a pass changed")

    server = threading.Thread(target=serve)
    server.start()
    try:
        for _ in range(3):
            assert {name: inspector.inspect(TEXT, without=name) for name in found} == found
    finally:
        done.set()
        server.join()
    assert not wrong


def test_models_without_an_expert_share_the_bases_weights_and_are_freed_at_once(
    models: dict[str, OpenModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    inspector = Inspector("routed", models["routed"])
    held = {tensor.data_ptr() for tensor in models["routed"].model.model.parameters()}
    alive: list[weakref.ref[Any]] = []
    without = inspector._without

    def watched(expert: str) -> RoutedModel:
        variant = without(expert)
        assert {tensor.data_ptr() for tensor in variant.model.parameters()} == held
        alive.extend(map(weakref.ref, [variant, *variant._pools]))
        return variant

    monkeypatch.setattr(inspector, "_without", watched)
    gc.collect()
    gc.disable()
    try:
        inspector.inspect(TEXT, without=models["routed"].experts[0])
        assert alive
        assert [reference for reference in alive if reference() is not None] == []
    finally:
        gc.enable()


# -- over HTTP --------------------------------------------------------------------------------------------------------


def test_the_page_and_its_files_load_nothing_from_elsewhere(client: TestClient) -> None:
    page = client.get("/")
    assert page.status_code == 200
    assert page.headers["content-type"].startswith("text/html")
    assert page.headers["content-security-policy"].startswith("default-src 'self'")
    assert "unsafe" not in page.headers["content-security-policy"]
    places = set(re.findall(r'(?:href|src)="(?!#)([^"]+)"', page.text))
    for script in PAGE.glob("*.js"):
        places |= {f"page/{name}" for name in re.findall(r'from "\./([^"]+)"', script.read_text())}
    assert len(places) > 8
    for place in places:
        found = client.get(f"/{place}")
        assert found.status_code == 200, place
        assert found.headers["x-content-type-options"] == "nosniff"
        outside = re.findall(r"https?://[^\s\"')]+", found.text)
        assert set(outside) <= {"http://www.w3.org/2000/svg"}, place
    assert "style=" not in page.text
    assert "innerHTML" not in "".join(script.read_text() for script in PAGE.glob("*.js"))
    for name in ("nothing.js", "..%2Finspector.py", "%00", "../inspector.py"):
        assert client.get(f"/page/{name}").status_code == 404


def test_models_and_inspections(client: TestClient, inspectors: dict[str, Inspector]) -> None:
    listed = {one["name"]: one for one in client.get("/api/models").json()["models"]}
    assert list(listed) == list(KINDS)
    assert (listed["routed"]["by"], listed["gated"]["experts"]) == ("phatgoose", ["base", "other"])
    assert (listed["plain"]["max_tokens"], listed["plain"]["max_characters"]) == (256, 8192)
    for without in (None, listed["routed"]["experts"][0]):
        answer = client.post("/api/inspect", json={"model": "routed", "text": TEXT, "without": without})
        assert answer.status_code == 200
        assert answer.json() == json.loads(json.dumps(inspectors["routed"].inspect(TEXT, without=without)))


@pytest.mark.parametrize(
    ("body", "status", "param", "message"),
    [
        ({"model": "routed", "text": ""}, 400, "text", "is empty"),
        ({"model": "routed", "text": "x" * 8193}, 400, "text", "8192"),
        ({"model": "routed", "text": "q " * 300}, 400, "text", "can read 256"),
        ({"model": "rooted", "text": "x"}, 404, "model", "did you mean 'routed'"),
        ({"model": "routed", "text": "x", "without": "nobody"}, 404, "without", "no expert"),
        ({"model": "plain", "text": "x", "without": "base"}, 404, "without", "without experts"),
        ({"model": "routed", "text": "x", "top": 9}, 400, "top", "unknown field"),
        ({"model": "routed"}, 400, "text", "required"),
        ({"model": "plain", "text": "a\ud800"}, 400, "text", ""),
    ],
    ids=str,
)
def test_what_is_wrong_is_named(
    client: TestClient, body: dict[str, Any], status: int, param: str, message: str
) -> None:
    answer = client.post("/api/inspect", content=json.dumps(body), headers={"content-type": "application/json"})
    assert answer.status_code == status
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["param"] == param
    assert message in error["message"]


def test_questions_are_answered_one_by_one_and_not_begun_once_their_client_has_left(
    models: dict[str, OpenModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    begun, go_on = threading.Event(), threading.Event()

    def inspect(self: Inspector, text: str, **_: Any) -> None:
        seen.append(text)
        begun.set()
        assert go_on.wait(10)
        raise ApiError(400, "enough")

    monkeypatch.setattr(Inspector, "inspect", inspect)
    with serving({"plain": FakeEngine(models["plain"])}) as web:

        def ask(text: str) -> http.client.HTTPConnection:
            asked = len(web.server.server_state.tasks)
            connection = http.client.HTTPConnection(web.address.removeprefix("http://"), timeout=10)
            body = json.dumps({"model": "plain", "text": text})
            connection.request("POST", "/api/inspect", body, {"Content-Type": "application/json"})
            wait_until(lambda: len(web.server.server_state.tasks) == asked + 1)
            return connection

        first, second = ask("one"), ask("two")
        assert begun.wait(10)
        second.close()
        wait_until(lambda: len(web.server.server_state.connections) == 1)
        third = ask("three")
        go_on.set()
        for connection in (first, third):
            with contextlib.closing(connection), connection.getresponse() as response:
                assert response.status == 400
    assert seen == ["one", "three"]
