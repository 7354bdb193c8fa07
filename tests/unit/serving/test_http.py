"""The API over a generator without a model: forms, limits, errors."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from typing import Any

import httpx2 as httpx
import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient
from support.fake_engine import FakeEngine, words
from support.served import POSITIONS, VOCAB

from weftlm.cli.serve import hosts_of
from weftlm.errors import ConfigError
from weftlm.pipeline.any_model import OpenModel
from weftlm.serving.app import build_app
from weftlm.serving.request import Event, Finished, Token
from weftlm.serving.serve_config import ServeConfig


@pytest.fixture
def engine(opened: OpenModel) -> FakeEngine:
    return FakeEngine(opened, words(opened))


def client_of(engine: FakeEngine, **settings: Any) -> TestClient:
    return TestClient(build_app({"tiny": engine}, ServeConfig(**settings)), raise_server_exceptions=False)


@pytest.fixture
def client(engine: FakeEngine) -> TestClient:
    return client_of(engine)


def saying(opened: OpenModel, *events: Event) -> TestClient:
    """A client of an engine that answers everything with the same events."""
    return client_of(FakeEngine(opened, lambda *_: events))


def complete(client: TestClient, **fields: Any) -> httpx.Response:
    return client.post("/v1/completions", json={"model": "tiny", "prompt": "the sea", **fields})


def chat(client: TestClient, **fields: Any) -> httpx.Response:
    messages = [{"role": "user", "content": "hello"}]
    return client.post("/v1/chat/completions", json={"model": "tiny", "messages": messages, **fields})


def error_of(response: httpx.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["message"]
    return body["error"]


def events_of(response: httpx.Response) -> list[Any]:
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = [line for line in response.text.split("\n\n") if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


# -- answers ------------------------------------------------------------------------------------------------------


def test_a_completion(client: TestClient, engine: FakeEngine, opened: OpenModel) -> None:
    ids = opened.tokenizer.encode_batch(["the sea"])[0].tolist()
    answer = complete(client, max_tokens=len(ids), temperature=0.5, top_p=0.25, seed=7, stop="x", timeout=3).json()
    assert answer["object"] == "text_completion"
    assert answer["choices"] == [{"index": 0, "text": "the sea", "logprobs": None, "finish_reason": "length"}]
    assert answer["usage"] == {"prompt_tokens": len(ids), "completion_tokens": len(ids), "total_tokens": 2 * len(ids)}
    (request,) = engine.requests
    assert (request.prompt, request.timeout_s) == (tuple(ids), 3)
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_p, sampling.seed, sampling.stop) == (0.5, 0.25, 7, ("x",))
    assert complete(client, top_p=0, temperature=1.5, max_tokens=1).status_code == 200
    assert (engine.requests[1].sampling.temperature, engine.requests[1].sampling.top_p) == (0.0, 1.0)


@pytest.mark.parametrize(("prompt", "count"), [("a b", 1), (["a", "b c"], 2), ([65, 66], 1), ([[65], [66, 67]], 2)])
def test_the_four_forms_of_a_prompt(client: TestClient, engine: FakeEngine, prompt: Any, count: int) -> None:
    answer = complete(client, prompt=prompt, max_tokens=2).json()
    assert [choice["index"] for choice in answer["choices"]] == list(range(count))
    assert len(engine.requests) == count
    if prompt == [[65], [66, 67]]:
        assert [list(request.prompt) for request in engine.requests] == prompt
        assert answer["usage"]["prompt_tokens"] == 3


def test_each_of_n_has_a_seed_of_its_own(client: TestClient, engine: FakeEngine) -> None:
    for fields in ({"prompt": ["a", "b"], "n": 2, "seed": 5}, {"n": 2, "seed": 2**63 - 1}, {"n": 2}):
        complete(client, **fields)
    seeds = [request.sampling.seed for request in engine.requests]
    assert seeds == [5, 6, 5, 6, 2**63 - 1, 0, None, None]


def test_logprobs_of_a_completion(client: TestClient, opened: OpenModel) -> None:
    text = "tie \u00e9"
    ids = opened.tokenizer.encode_batch([text])[0].tolist()
    found = complete(client, prompt=text, max_tokens=len(ids), logprobs=2).json()["choices"][0]["logprobs"]
    assert found["tokens"][-2:] == opened.tokenizer.hf.convert_ids_to_tokens(ids[-2:]), "parts of a character"
    assert "".join(found["tokens"][:-2]) == "tie "
    names = [opened.tokenizer.decode([token]) for token in (0, 1)]
    assert found["top_logprobs"][0] == {names[0]: -0.5, names[1]: -1.5, found["tokens"][0]: -0.25}
    pairs = list(zip(found["text_offset"], found["tokens"], strict=True))
    assert all(text[place:].startswith(token) for place, token in pairs[:-2])
    plain = complete(client, logprobs=0).json()["choices"][0]["logprobs"]
    assert (plain["top_logprobs"], set(plain["token_logprobs"])) == (None, {-0.25})
    endless = saying(opened, Token(65, "b", float("-inf"), ((66, 1e-9),)), Finished("stop"))
    found = complete(endless, logprobs=1).json()["choices"][0]["logprobs"]
    assert found["token_logprobs"] == [-9999.0], "JSON holds no infinity"
    assert sorted(found["top_logprobs"][0].values()) == [-9999.0, 0.0]


def test_a_chat(client: TestClient, engine: FakeEngine, opened: OpenModel) -> None:
    parts = [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": parts}]
    answer = chat(client, messages=messages, max_completion_tokens=4, max_tokens=9).json()
    assert answer["usage"]["completion_tokens"] == 4
    assert opened.tokenizer.decode(engine.requests[0].prompt) == "system: be brief\nuser: hello\nassistant:"
    assert chat(client, messages=messages).status_code == 200
    last = engine.requests[-1]
    assert last.sampling.max_tokens == POSITIONS - len(last.prompt), "to the end of the context unless told"


def test_logprobs_of_a_chat(client: TestClient) -> None:
    (content,) = chat(client, logprobs=True, max_tokens=1).json()["choices"][0]["logprobs"]["content"]
    assert bytes(content["bytes"]).decode() == content["token"]
    assert content["top_logprobs"] == []
    assert chat(client, top_logprobs=2, max_tokens=1).json()["choices"][0]["logprobs"] is None


# -- streams ------------------------------------------------------------------------------------------------------


def test_offsets_and_ids_of_a_stream(client: TestClient) -> None:
    events = events_of(complete(client, max_tokens=20, stream=True, logprobs=1))
    whole = complete(client, max_tokens=20, logprobs=1).json()["choices"][0]
    offsets = [place for event in events[:-1] for place in event["choices"][0]["logprobs"]["text_offset"]]
    assert offsets == whole["logprobs"]["text_offset"]
    assert all("usage" not in event for event in events)
    assert len({event["id"] for event in events}) == 1


def test_text_held_back_comes_with_the_end(opened: OpenModel) -> None:
    client = saying(opened, Token(65, "a"), Token(66, ""), Finished("stop", "bc"))
    assert complete(client).json()["choices"][0]["text"] == "abc"
    assert [event["choices"][0]["text"] for event in events_of(complete(client, stream=True))] == ["a", "bc"]
    assert chat(client).json()["choices"][0]["message"]["content"] == "abc"
    streamed = events_of(chat(client, stream=True))
    assert "".join(event["choices"][0]["delta"].get("content", "") for event in streamed) == "abc"


def test_a_full_queue_says_when_to_come_back_and_keeps_nothing(opened: OpenModel) -> None:
    engine = FakeEngine(opened, places=2)
    response = complete(client_of(engine), n=3)
    assert error_of(response, 429)["type"] == "rate_limit_error"
    assert response.headers["retry-after"] == "1"
    assert [request.given_up.is_set() for request in engine.requests] == [True, True]
    assert engine.running == 0


# -- what is refused ----------------------------------------------------------------------------------------------

WRONG: dict[str, list[Any]] = {
    "presence_penalty": [0.5], "frequency_penalty": [-1], "logit_bias": [{"50": 1}], "suffix": ["end"], "echo": [True],
    "best_of": [2], "top_k": [5], "temperature": [2.5, True, "1"], "top_p": [-0.1], "n": [0, 1.5, 17],
    "max_tokens": [0, 16_385], "logprobs": [21], "seed": [2**63], "stop": [list("abcde"), ""], "timeout": [0, 1e9],
    "stream_options": [{"what": 1}], "model": [5],
    "prompt": [[], [[]], [True], ["a", 1], [VOCAB], [-1], None, "x " * POSITIONS],
}  # fmt: skip
WRONG_IN_A_CHAT: dict[str, list[Any]] = {
    "tools": [[{"type": "function", "function": {"name": "f"}}]], "tool_choice": ["required"], "functions": [[{}]],
    "response_format": [{"type": "json_object"}], "modalities": [["audio"]], "audio": [{"voice": "x"}],
    "reasoning_effort": ["high"], "top_logprobs": [21],
    "messages": [
        [], [{"role": "tool", "content": "x"}], [{"role": "user"}], [{"role": "user", "content": None}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}],
        [{"role": "user", "content": "x " * POSITIONS}],
    ],
}  # fmt: skip


@pytest.mark.parametrize(("ask", "wrong"), [(complete, WRONG), (chat, WRONG_IN_A_CHAT)])
def test_what_is_wrong_is_named(
    client: TestClient, engine: FakeEngine, ask: Callable[..., httpx.Response], wrong: dict[str, list[Any]]
) -> None:
    found = [(param, error_of(ask(client, **{param: value}), 400)) for param in wrong for value in wrong[param]]
    assert [error["param"] for _, error in found] == [param for param, _ in found]
    assert {error["type"] for _, error in found} == {"invalid_request_error"}
    for fields, param in (
        ({"max_tokens": POSITIONS - 1}, "prompt" if ask is complete else "messages"),
        ({"prompt": ["a"] * 9, "n": 8} if ask is complete else {"n": 65}, "n"),
    ):  # fmt: skip
        assert error_of(ask(client, **fields), 400)["param"] == param
    assert engine.requests == []
    assert "presence_penalty is not offered" in error_of(ask(client, presence_penalty=1), 400)["message"]
    assert "did you mean 'temperature'" in error_of(ask(client, temprature=1), 400)["message"]


def test_neutral_and_harmless_fields_pass(client: TestClient) -> None:
    shared = {
        "presence_penalty": 0, "frequency_penalty": 0.0, "logit_bias": {}, "user": "me", "metadata": {"a": "b"},
        "store": True, "service_tier": "auto", "n": None, "seed": None, "stop": None, "stream": None,
        "stream_options": None,
    }  # fmt: skip
    assert complete(client, **shared, best_of=1, suffix="", echo=False).status_code == 200
    assert complete(client, best_of=3, n=3, max_tokens=1).status_code == 200
    extra = {"tools": [], "tool_choice": "none", "response_format": {"type": "text"}, "modalities": ["text"]}
    assert chat(client, **shared, **extra, parallel_tool_calls=True, max_tokens=1).status_code == 200


VALID = b'{"model": "tiny", "prompt": "a"}'


def test_paths_and_content_types(client: TestClient) -> None:
    for path in ("/v1/nothing", "/%ff%00"):
        error_of(client.get(path), 404)
    for kind in ("application/json; charset=UTF-8", "application/x+json"):
        assert client.post("/v1/completions", content=VALID, headers={"content-type": kind}).status_code == 200
    for headers in ({}, {"content-type": "text/plain"}, {"content-type": "a\x00b"}):
        assert error_of(client.post("/v1/completions", content=VALID, headers=headers), 400)["code"] == "bad_request"


def test_large_bodies_are_refused_with_and_without_a_length(engine: FakeEngine) -> None:
    client = client_of(engine, max_body_bytes=100)
    assert client.post("/v1/completions", json={"model": "tiny", "prompt": "a", "max_tokens": 1}).status_code == 200
    error_of(client.post("/v1/completions", json={"model": "tiny", "prompt": "a" * 100}), 413)
    pieces = iter([VALID[:-1]] + [b" " * 50] * 3 + [b"}"])
    chunked = client.post("/v1/completions", content=pieces, headers={"content-type": "application/json"})
    assert "content-length" not in chunked.request.headers
    assert error_of(chunked, 413)["code"] == "body_too_large"


@pytest.mark.parametrize("place", ["", "/weftlm", "/page/weftlm"])
def test_keys_open_all_but_the_health_check_and_the_page(engine: FakeEngine, place: str) -> None:
    """Also where the application is mounted in another."""
    app = build_app({"tiny": engine}, ServeConfig(api_keys=("one", "two")))
    outer = FastAPI()
    outer.mount(place, app)
    client = TestClient(outer if place else app, raise_server_exceptions=False)
    assert client.get(f"{place}/healthz").status_code == client.get(f"{place}/").status_code == 200
    error_of(client.get(f"{place}/page/nothing.js"), 404)
    for path in ("/v1/models", "/metrics", "/openapi.json", "/api/models", "/nothing"):
        response = client.get(f"{place}{path}")
        assert error_of(response, 401)["type"] == "authentication_error"
        assert response.headers["www-authenticate"] == "Bearer"
    for given, status in (
        ("Bearer one", 200), ("bearer two", 200), ("Bearer three", 401), ("Basic one", 401), ("one", 401),
        ("Bearer", 401), ("Bearer on", 401), ("Bearer one two", 401), (b"Bearer \xff", 401),
    ):  # fmt: skip
        assert client.get(f"{place}/v1/models", headers={"authorization": given}).status_code == status, given
    error_of(client.post(f"{place}/v1/completions", content=VALID), 401)
    assert engine.requests == []
    assert "secret" not in repr(ServeConfig(api_keys=("secret",)))


def test_hosts(engine: FakeEngine) -> None:
    client, free = client_of(engine, hosts=("hub.Example:8443",)), client_of(engine)
    for host in (
        "LOCALHOST:8000",
        "127.8.9.10",
        "[2001:db8::1]:8000",
        "weftlm.localhost",
        "Hub.example:1",
        "hub.example.",
    ):
        assert client.get("/v1/models", headers={"host": host}).status_code == 200, host
    for host in ("evil.example:8000", "localhost.evil.example", "", "127.0.0.1.evil.example", "notlocalhost", "0x7f.1"):
        for path in ("/v1/models", "/healthz", "/metrics"):
            error = error_of(client.get(path, headers={"host": host}), 403)
            assert error["code"] == "host_not_allowed"
            assert "--allow-host" in error["message"]
        assert free.get("/v1/models", headers={"host": host}).status_code == 200, "any name unless told"


def test_the_names_of_a_server_follow_where_it_listens(engine: FakeEngine) -> None:
    own = socket.gethostname()
    assert hosts_of("127.0.0.1", [], open_to_all=False) == ["127.0.0.1", own]
    assert hosts_of("0.0.0.0", [], open_to_all=True) is None
    assert hosts_of("0.0.0.0", ["hub.example"], open_to_all=True) == ["0.0.0.0", own, "hub.example"]
    for wrong in ("https://hub.example", "  ", "hub example"):
        with pytest.raises(ConfigError, match="without scheme or path"):
            hosts_of("127.0.0.1", [wrong], open_to_all=False)
    for name in ("", "a/b", "a\n", "x" * 201):
        with pytest.raises(ConfigError, match="name"):
            build_app({name: engine}, ServeConfig())


def test_metrics(client: TestClient, engine: FakeEngine) -> None:
    complete(client, max_tokens=3)
    complete(client, n=0)
    client.get("/some/path")
    text = client.get("/metrics").text
    for figure in (
        'http_requests_total{method="POST",route="/v1/completions",status="200"} 1.0',
        'http_requests_total{method="POST",route="/v1/completions",status="400"} 1.0',
        'http_requests_total{method="GET",route="none",status="404"} 1.0',
        'time_to_first_token_seconds_count{model="tiny"} 1.0', 'time_per_token_seconds_count{model="tiny"} 1.0',
        'running_requests{model="tiny"} 0.0', 'generated_tokens_total{model="tiny"} 3.0',
        'finished_requests_total{model="tiny",reason="length"} 1.0',
    ):  # fmt: skip
        assert f"weftlm_{figure}" in text
    assert "/some/path" not in text
    assert 'route="/v1/completions"' not in client_of(engine).get("/metrics").text, "every app counts for itself"


def test_a_bug_is_a_json_error_too(opened: OpenModel) -> None:
    def script(*_: Any) -> list[Any]:
        raise ZeroDivisionError

    error = error_of(complete(client_of(FakeEngine(opened, script))), 500)
    assert error["type"] == "server_error"
    assert "Zero" not in error["message"]
