"""The inspector's page and questions over HTTP: what is served, how it answers, how it refuses."""

from __future__ import annotations

import asyncio
import json
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from support.served import write_model

from weftlm.pipeline.any_model import OpenModel, open_model
from weftlm.serving import inspector as inspector_module
from weftlm.serving.api_errors import CLIENT_LEFT, add_handlers
from weftlm.serving.inspection import Inspector
from weftlm.serving.inspection_facts import FieldError
from weftlm.serving.inspector import PAGE, inspector_router
from weftlm.serving.request import Finished, Generator, Load, QueueFullError, Sampling, Token

TEXT = "the river runs over old stones and the <script>alert(1)</script> waits"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, OpenModel]:
    folder = tmp_path_factory.mktemp("models")
    return {kind: open_model(write_model(folder / kind, kind)) for kind in ("plain", "routed", "gated")}


def app_of(models: dict[str, OpenModel], engines: dict[str, Generator] | None = None) -> FastAPI:
    app = FastAPI()
    add_handlers(app)
    app.include_router(inspector_router(models, engines or {}))
    return app


@pytest.fixture(scope="module")
def client(models: dict[str, OpenModel]) -> Iterator[TestClient]:
    with TestClient(app_of(models), raise_server_exceptions=False) as client:
        yield client


class FakeEngine:
    """Answers with what it is told to, from a thread of its own."""

    def __init__(self, opened: OpenModel, events: list[Token | Finished], full: bool = False) -> None:
        self.opened, self.events, self.full = opened, events, full
        self.asked: list[tuple[list[int], Sampling]] = []
        self.timeout_s: float | None = -1.0
        self.cancelled = 0

    def submit(
        self,
        prompt_ids: list[int],
        sampling: Sampling,
        *,
        timeout_s: float | None = None,
        on_event: Callable[[], None] | None = None,
    ) -> FakeEngine:
        if self.full:
            raise QueueFullError(9, 3.2)
        self.asked.append((prompt_ids, sampling))
        self.timeout_s = timeout_s
        self.ready = threading.Event()

        def tell() -> None:
            self.ready.set()
            assert on_event is not None
            on_event()

        threading.Timer(0.01, tell).start()
        return self

    def next(self, timeout_s: float | None = None) -> Token | Finished:
        if not self.ready.is_set():
            raise TimeoutError
        return self.events.pop(0)

    def cancel(self) -> None:
        self.cancelled += 1

    def load(self) -> Load:
        return Load(0, 0, 0, 0, {})

    def close(self) -> None:
        pass


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
    assert client.get("/page/colours.css").text.count("--c:") >= 12
    assert "style=" not in page.text
    assert "innerHTML" not in "".join(script.read_text() for script in PAGE.glob("*.js"))


@pytest.mark.parametrize("name", ["nothing.js", "..%2Finspector.py", "%00", "../inspector.py"])
def test_there_are_no_other_files(client: TestClient, name: str) -> None:
    assert client.get(f"/page/{name}").status_code == 404


def test_models_are_told_with_what_can_be_asked_of_them(client: TestClient) -> None:
    told = {one["name"]: one for one in client.get("/api/models").json()["models"]}
    assert list(told) == ["plain", "routed", "gated"]
    assert told["routed"]["layers"][1]["label"] == "layer 1"
    assert told["gated"]["experts"] == ["base", "other"]
    assert (told["plain"]["max_tokens"], told["plain"]["max_characters"]) == (256, 3328)


def test_a_text_is_inspected(client: TestClient) -> None:
    answer = client.post("/api/inspect", json={"model": "routed", "text": TEXT})
    assert answer.status_code == 200
    told = answer.json()
    assert "".join(token["text"] for token in told["tokens"]) == TEXT
    assert told["tokens"][0]["logprob"] is None
    assert len(told["tokens"][3]["top"]) == 5
    assert [view["name"] for view in told["views"]] == ["all", "layer:model.layers.0", "layer:model.layers.1"]
    name = told["experts"][0]
    module = told["modules"][0]["name"]
    off = client.post("/api/inspect", json={"model": "routed", "text": TEXT, "without": name, "module": module}).json()
    assert off["experts"] == told["experts"][1:]
    assert [view["name"] for view in off["views"]] == [f"module:{module}"]
    assert off["totals"]["nats"] != told["totals"]["nats"]
    assert module not in [one["name"] for one in off["modules"]]  # which no other expert adapts
    assert set(off["views"][0]["weights"]) == {"0"}


def test_two_models_are_compared(client: TestClient) -> None:
    told = client.post("/api/compare", json={"a": "plain", "b": "gated", "text": TEXT}).json()
    assert (told["a"]["model"], told["b"]["model"]) == ("plain", "gated")
    assert len(told["segments"]) == len(told["a"]["tokens"])
    difference = sum(one["nats_a"] - one["nats_b"] for one in told["segments"][1:])
    assert difference == pytest.approx(told["totals_a"]["nats"] - told["totals_b"]["nats"])


def test_experts_are_ordered_by_what_leaving_them_out_costs(client: TestClient) -> None:
    told = client.post("/api/leave-one-out", json={"model": "routed", "text": TEXT}).json()
    changes = [cost["change"] for cost in told["costs"]]
    assert changes == sorted(changes, reverse=True)
    assert len(changes) == 3
    for cost in told["costs"]:
        assert cost["nats"] - told["totals"]["nats"] == pytest.approx(cost["change"], abs=1e-6)


def test_a_text_is_generated_without_an_engine(client: TestClient) -> None:
    body = {"model": "gated", "text": "the river", "max_tokens": 5, "temperature": 0}
    first = client.post("/api/generate", json=body).json()["text"]
    assert first
    assert client.post("/api/generate", json=body).json()["text"] == first
    assert client.post("/api/generate", json={**body, "text": "", "seed": 7, "temperature": 1.0}).status_code == 200


def test_a_text_is_generated_through_the_engine(models: dict[str, OpenModel]) -> None:
    engine = FakeEngine(models["plain"], [Token(1, "over "), Token(2, "st"), Finished("length", "ones")])
    with TestClient(app_of(models, {"plain": engine})) as client:
        body = {"model": "plain", "text": "the river ", "max_tokens": 400, "temperature": 0.5, "seed": 11}
        assert client.post("/api/generate", json=body).json() == {"text": "over stones"}
        ids, sampling = engine.asked[0]
        assert ids == models["plain"].tokenizer.encode_batch(["the river "])[0].tolist()
        assert (sampling.max_tokens, sampling.temperature, sampling.seed) == (256 - len(ids), 0.5, 11)
        assert engine.timeout_s is None, "a server's limit of time is its engines'"
        assert engine.cancelled == 1
        engine.events = [Finished("error", message="the engine broke")]
        assert client.post("/api/generate", json=body).json()["error"]["message"] == "the engine broke"
        engine.events = [Finished("timeout")]
        assert client.post("/api/generate", json=body).status_code == 503
        engine.full = True
        full = client.post("/api/generate", json=body)
        assert (full.status_code, full.headers["retry-after"]) == (429, "4")
        client.app.state.stopping = True  # type: ignore[attr-defined]
        assert client.post("/api/generate", json=body).json()["error"]["code"] == "stopping"


@pytest.mark.parametrize(
    ("path", "body", "status", "param", "told"),
    [
        ("inspect", {"model": "routed", "text": ""}, 400, "text", "is empty"),
        ("inspect", {"model": "routed", "text": "x" * 8193}, 400, "text", "8192"),
        ("inspect", {"model": "routed", "text": "x" * 3329}, 400, "text", "3328 are looked at"),
        ("inspect", {"model": "routed", "text": "q " * 300}, 400, "text", "can read 256"),
        ("inspect", {"model": "rooted", "text": "x"}, 404, "model", "did you mean 'routed'"),
        ("inspect", {"model": "routed", "text": "x", "without": "nobody"}, 404, "without", "no expert"),
        ("inspect", {"model": "plain", "text": "x", "without": "base"}, 404, "without", "without experts"),
        ("inspect", {"model": "gated", "text": "x", "module": "lm_head"}, 404, "module", "routed models alone"),
        ("inspect", {"model": "routed", "text": "x", "top": 9}, 400, "top", "unknown field"),
        ("inspect", {"model": "routed"}, 400, "text", "missing"),
        ("compare", {"a": "plain", "b": "nobody", "text": "x"}, 404, "b", "no model"),
        ("leave-one-out", {"model": "plain", "text": "x"}, 404, "model", "needs two"),
        ("generate", {"model": "plain", "text": "x", "max_tokens": 0}, 400, "max_tokens", "greater than"),
        ("generate", {"model": "plain", "text": "q " * 128}, 400, "text", "fills the 256"),
    ],
)
def test_what_is_wrong_is_said(
    client: TestClient, path: str, body: dict[str, Any], status: int, param: str, told: str
) -> None:
    answer = client.post(f"/api/{path}", json=body)
    assert answer.status_code == status
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["param"] == param
    assert told in error["message"]


def test_half_a_surrogate_pair_is_no_text(client: TestClient) -> None:
    answer = client.post(
        "/api/inspect", content=b'{"model": "plain", "text": "a\\ud800"}', headers={"content-type": "application/json"}
    )
    assert answer.status_code == 400


def test_what_is_no_json_is_refused(client: TestClient) -> None:
    headers = {"content-type": "application/json"}
    broken = client.post("/api/inspect", content=b'{"model": ', headers=headers)
    assert (broken.status_code, broken.json()["error"]["code"]) == (400, "invalid_json")
    assert client.post("/api/inspect", content=b"x", headers={"content-type": "text/plain"}).status_code == 415
    nan = client.post("/api/generate", content=b'{"model":"plain","text":"","temperature":NaN}', headers=headers)
    assert nan.status_code == 400


def test_the_questions_are_described(client: TestClient) -> None:
    paths = client.get("/openapi.json").json()["paths"]
    assert set(paths) == {
        "/api/models", "/api/inspect", "/api/compare", "/api/leave-one-out", "/api/generate"
    }  # fmt: skip
    body = paths["/api/inspect"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert set(body["properties"]) == {"model", "text", "without", "module"}
    assert body["properties"]["text"]["maxLength"] == 3328  # the longest token, as often as the context holds
    assert body["properties"]["model"]["enum"] == ["plain", "routed", "gated"]
    assert body["additionalProperties"] is False
    assert "422" not in paths["/api/inspect"]["post"]["responses"]
    assert "503" in paths["/api/generate"]["post"]["responses"]


def test_too_many_questions_are_told_to_come_back(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inspector_module, "WAITING", 0)
    answer = client.post("/api/inspect", json={"model": "plain", "text": "x"})
    assert answer.status_code == 429
    assert int(answer.headers["retry-after"]) >= 1


def test_questions_to_one_model_are_answered_one_after_the_other(client: TestClient) -> None:
    answers: list[Any] = []

    def ask(text: str) -> None:
        told = client.post("/api/inspect", json={"model": "gated", "text": text}).json()
        answers.append("".join(token["text"] for token in told["tokens"]) == text)

    threads = [threading.Thread(target=ask, args=(f"{TEXT} {number}",)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [True] * 8


def test_a_question_whose_client_has_left_is_not_begun(
    models: dict[str, OpenModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[str] = []
    begun, go_on = threading.Event(), threading.Event()

    def inspect(self: Inspector, text: str, **_: Any) -> None:
        looked.append(text)
        begun.set()
        assert go_on.wait(10)
        raise FieldError("enough", "text")

    monkeypatch.setattr(Inspector, "inspect", inspect)
    app = app_of({"plain": models["plain"]})

    async def ask(text: str, left: asyncio.Event) -> int:
        """The status of the answer to a client that goes when `left` is set."""
        sent = [{"type": "http.request", "body": json.dumps({"model": "plain", "text": text}).encode()}]
        answers: list[Any] = []

        async def receive() -> Any:
            if not sent:
                await left.wait()
            return sent.pop() if sent else {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            answers.append(message)

        headers = [(b"content-type", b"application/json")]
        scope = {"type": "http", "method": "POST", "path": "/api/inspect", "query_string": b"", "headers": headers}
        await app(scope, receive, send)
        return int(answers[0]["status"])

    async def three() -> list[int]:
        stays, leaves = asyncio.Event(), asyncio.Event()
        first = asyncio.create_task(ask("one", stays))
        await asyncio.to_thread(begun.wait, 10)
        second = asyncio.create_task(ask("two", leaves))
        leaves.set()
        left = await second
        go_on.set()
        return [await first, left, await ask("three", stays)]

    assert asyncio.run(three()) == [400, CLIENT_LEFT, 400]
    assert looked == ["one", "three"]


def test_the_package_holds_the_pages_files() -> None:
    told = (Path(__file__).parents[3] / "pyproject.toml").read_text()
    line = next(line for line in told.splitlines() if line.startswith("weftlm = [") and "py.typed" in line)
    assert {file.suffix for file in PAGE.iterdir()} <= {f".{kind}" for kind in re.findall(r"\*\*/\*\.(\w+)", line)}
