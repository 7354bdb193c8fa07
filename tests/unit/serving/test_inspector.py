"""The inspector's page and questions over HTTP: what is served, how it answers, how it refuses."""

from __future__ import annotations

import asyncio
import json
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from support.served import write_model

from weftlm.pipeline.any_model import OpenModel, open_model
from weftlm.serving import inspector as inspector_module
from weftlm.serving.api_errors import CLIENT_LEFT, ApiError, add_handlers
from weftlm.serving.inspection import Inspector
from weftlm.serving.inspector import PAGE, inspector_router

TEXT = "the river runs over old stones and the <script>alert(1)</script> waits"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, OpenModel]:
    folder = tmp_path_factory.mktemp("models")
    return {kind: open_model(write_model(folder / kind, kind)) for kind in ("plain", "routed", "gated")}


def app_of(models: dict[str, OpenModel]) -> FastAPI:
    app = FastAPI()
    add_handlers(app)
    app.include_router(inspector_router(models))
    return app


@pytest.fixture(scope="module")
def client(models: dict[str, OpenModel]) -> Iterator[TestClient]:
    with TestClient(app_of(models), raise_server_exceptions=False) as client:
        yield client


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
    assert client.get("/page/trace.css").text.count("--c:") >= 12
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


@pytest.mark.parametrize(
    ("body", "status", "param", "told"),
    [
        ({"model": "routed", "text": ""}, 400, "text", "is empty"),
        ({"model": "routed", "text": "x" * 8193}, 400, "text", "8192"),
        ({"model": "routed", "text": "x" * 3329}, 400, "text", "at most 3328"),
        ({"model": "routed", "text": "q " * 300}, 400, "text", "can read 256"),
        ({"model": "rooted", "text": "x"}, 404, "model", "did you mean 'routed'"),
        ({"model": "routed", "text": "x", "without": "nobody"}, 404, "without", "no expert"),
        ({"model": "plain", "text": "x", "without": "base"}, 404, "without", "without experts"),
        ({"model": "gated", "text": "x", "module": "lm_head"}, 404, "module", "only routed models"),
        ({"model": "routed", "text": "x", "top": 9}, 400, "top", "unknown field"),
        ({"model": "routed"}, 400, "text", "required"),
    ],
)
def test_what_is_wrong_is_said(client: TestClient, body: dict[str, Any], status: int, param: str, told: str) -> None:
    answer = client.post("/api/inspect", json=body)
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
    assert client.post("/api/inspect", content=b"x", headers={"content-type": "text/plain"}).status_code == 400


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
        raise ApiError(400, "enough")

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
