"""The API over a generator without a model: forms, limits, errors."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx2 as httpx
import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient
from support.fake_engine import FakeEngine, words
from support.served import POSITIONS, VOCAB, write_model

from weftlm.cli.serve import hosts_of
from weftlm.errors import ConfigError
from weftlm.pipeline.any_model import OpenModel, open_model
from weftlm.serving.app import build_app
from weftlm.serving.request import Finished, Token
from weftlm.serving.serve_config import ServeConfig


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> OpenModel:
    return open_model(write_model(tmp_path_factory.mktemp("served"), "plain"))


@pytest.fixture
def engine(opened: OpenModel) -> FakeEngine:
    return FakeEngine(opened, words(opened))


def client_of(engine: FakeEngine, **settings: Any) -> TestClient:
    app = build_app({"tiny": engine}, ServeConfig(**settings))
    return TestClient(app, raise_server_exceptions=False)


@pytest.fixture
def client(engine: FakeEngine) -> Iterator[TestClient]:
    with client_of(engine) as client:
        yield client


@pytest.fixture(scope="module")
def asked(opened: OpenModel) -> list[Any]:
    """Requests that reached the engine of `refusing`."""
    return []


@pytest.fixture(scope="module")
def refusing(opened: OpenModel, asked: list[Any]) -> TestClient:
    """A client whose engine remembers that it was asked; one for all requests that must not reach it."""
    script = words(opened)

    def remember(prompt_ids: list[int], sampling: Any) -> Any:
        asked.append(prompt_ids)
        return script(prompt_ids, sampling)

    return client_of(FakeEngine(opened, remember))


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


def test_models_are_listed(client: TestClient) -> None:
    listed = client.get("/v1/models").json()
    assert listed["object"] == "list"
    assert [card["id"] for card in listed["data"]] == ["tiny"]
    assert client.get("/v1/models/tiny").json() == listed["data"][0]
    for missing in (client.get("/v1/models/huge"), complete(client, model="huge")):
        error = error_of(missing, 404)
        assert (error["param"], error["code"]) == ("model", "model_not_found")
        assert "tiny" in error["message"]
    assert client.get("/healthz").json() == {"status": "ok"}


def test_a_completion(client: TestClient, engine: FakeEngine, opened: OpenModel) -> None:
    ids = opened.tokenizer.encode_batch(["the sea"])[0].tolist()
    answer = complete(client, max_tokens=len(ids), temperature=0.5, top_p=0.25, seed=7, stop="x", timeout=3).json()
    assert answer["object"] == "text_completion"
    assert answer["model"] == "tiny"
    assert answer["choices"] == [{"index": 0, "text": "the sea", "logprobs": None, "finish_reason": "length"}]
    assert answer["usage"] == {"prompt_tokens": len(ids), "completion_tokens": len(ids), "total_tokens": 2 * len(ids)}
    ticket = engine.requests[0]
    assert ticket.prompt == tuple(ids)
    assert ticket.timeout_s == 3
    sampling = ticket.sampling
    assert (sampling.temperature, sampling.top_p, sampling.seed, sampling.stop) == (0.5, 0.25, 7, ("x",))
    assert sampling.logprobs is None


@pytest.mark.parametrize(("prompt", "count"), [("a b", 1), (["a", "b c"], 2), ([65, 66], 1), ([[65], [66, 67]], 2)])
def test_the_four_forms_of_a_prompt(
    client: TestClient, engine: FakeEngine, opened: OpenModel, prompt: Any, count: int
) -> None:
    answer = complete(client, prompt=prompt, max_tokens=2).json()
    assert [choice["index"] for choice in answer["choices"]] == list(range(count))
    assert len(engine.requests) == count
    if prompt == [[65], [66, 67]]:
        assert [list(ticket.prompt) for ticket in engine.requests] == prompt
        assert answer["usage"]["prompt_tokens"] == 3
    assert complete(client, prompt="").status_code == 200
    assert engine.requests[-1].prompt == (opened.tokenizer.eos_id,), "the empty prompt begins a document"


def test_each_of_n_is_a_request_with_a_seed_of_its_own(client: TestClient, engine: FakeEngine) -> None:
    answer = complete(client, prompt=["a", "b"], n=3, seed=5).json()
    assert [choice["index"] for choice in answer["choices"]] == list(range(6))
    assert [ticket.sampling.seed for ticket in engine.requests] == [5, 6, 7, 5, 6, 7]
    assert answer["usage"]["prompt_tokens"] == 2
    complete(client, n=2, seed=2**63 - 1)
    assert [ticket.sampling.seed for ticket in engine.requests[-2:]] == [2**63 - 1, 0]
    complete(client, n=2)
    assert [ticket.sampling.seed for ticket in engine.requests[-2:]] == [None, None]


def test_logprobs_of_a_completion(client: TestClient, opened: OpenModel) -> None:
    text = "tie é"
    ids = opened.tokenizer.encode_batch([text])[0].tolist()
    answer = complete(client, prompt=text, max_tokens=len(ids), logprobs=2).json()
    found = answer["choices"][0]["logprobs"]
    assert found["token_logprobs"] == [-0.25] * len(ids)
    assert found["tokens"][-2:] == ["bytes:\\xc3", "bytes:\\xa9"]
    assert "".join(found["tokens"][:-2]) == "tie "
    names = [opened.tokenizer.decode([token]) for token in (0, 1)]
    assert found["top_logprobs"][0] == {names[0]: -0.5, names[1]: -1.5, found["tokens"][0]: -0.25}
    offsets = found["text_offset"]
    assert offsets[0] == 0
    assert all(text[place:].startswith(token) for place, token in list(zip(offsets, found["tokens"], strict=True))[:-2])
    plain = complete(client, logprobs=0).json()["choices"][0]["logprobs"]
    assert plain["top_logprobs"] is None
    assert set(plain["token_logprobs"]) == {-0.25}


def test_logprobs_that_json_cannot_hold(opened: OpenModel) -> None:
    engine = FakeEngine(opened, lambda *_: [Token(65, "b", float("-inf"), ((66, 1e-9),)), Finished("stop")])
    found = complete(client_of(engine), logprobs=1).json()["choices"][0]["logprobs"]
    assert found["token_logprobs"] == [-9999.0]
    assert sorted(found["top_logprobs"][0].values()) == [-9999.0, 0.0]


def test_a_chat(client: TestClient, engine: FakeEngine, opened: OpenModel) -> None:
    messages = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]},
    ]
    answer = chat(client, messages=messages, max_completion_tokens=4, max_tokens=9).json()
    assert answer["object"] == "chat.completion"
    message = answer["choices"][0]["message"]
    assert (message["role"], message["refusal"]) == ("assistant", None)
    assert answer["usage"]["completion_tokens"] == 4
    assert opened.tokenizer.decode(engine.requests[0].prompt) == "system: be brief\nuser: hello\nassistant:"
    history = [*messages, message, {"role": "user", "content": "more"}]
    assert chat(client, messages=history).status_code == 200, "an answer may be sent back as it came"
    last = engine.requests[-1]
    assert last.sampling.max_tokens == POSITIONS - len(last.prompt), "to the end of the context unless told"


def test_logprobs_of_a_chat(client: TestClient) -> None:
    answer = chat(client, logprobs=True, top_logprobs=2, max_tokens=1).json()
    content = answer["choices"][0]["logprobs"]["content"]
    assert len(content) == 1
    assert content[0]["logprob"] == -0.25
    assert bytes(content[0]["bytes"]).decode() == content[0]["token"]
    assert [other["logprob"] for other in content[0]["top_logprobs"]] == [-0.5, -1.5]
    bare = chat(client, logprobs=True, max_tokens=1).json()["choices"][0]["logprobs"]["content"][0]
    assert bare["top_logprobs"] == []
    assert chat(client, top_logprobs=2, max_tokens=1).json()["choices"][0]["logprobs"] is None


def test_the_tokenizers_chat_template_writes_the_prompt(tmp_path: Path) -> None:
    model = open_model(write_model(tmp_path, "plain"))
    model.tokenizer.hf.chat_template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
        "<|endoftext|>{{ m.role }}/{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<|endoftext|>assistant/{% endif %}"
    )
    engine = FakeEngine(model, words(model))
    client = client_of(engine)
    assert chat(client, max_tokens=1).status_code == 200
    ids = engine.requests[0].prompt
    assert model.tokenizer.decode(ids) == "<|endoftext|>user/hello<|endoftext|>assistant/"
    assert ids.count(model.tokenizer.eos_id) == 2, "the template's special tokens are special"
    refused = chat(client, messages=[{"role": "system", "content": "x"}])
    assert "no system here" in error_of(refused, 400)["message"]


def test_a_streamed_completion(client: TestClient, opened: OpenModel) -> None:
    events = events_of(complete(client, max_tokens=20, stream=True, n=2, logprobs=1))
    for index in (0, 1):
        pieces = [event["choices"][0] for event in events if event["choices"][0]["index"] == index]
        whole = complete(client, max_tokens=20, logprobs=1).json()["choices"][0]
        assert "".join(piece["text"] for piece in pieces) == whole["text"]
        assert [piece["finish_reason"] for piece in pieces] == [None] * 20 + ["length"]
        offsets = [place for piece in pieces[:-1] for place in piece["logprobs"]["text_offset"]]
        assert offsets == whole["logprobs"]["text_offset"]
    assert all("usage" not in event for event in events)
    assert len({event["id"] for event in events}) == 1


def test_a_streamed_chat_with_usage(client: TestClient) -> None:
    events = events_of(chat(client, max_tokens=3, stream=True, stream_options={"include_usage": True}))
    assert {event["object"] for event in events} == {"chat.completion.chunk"}
    deltas = [event["choices"][0]["delta"] for event in events[:-1]]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert deltas[-1] == {}
    assert events[-2]["choices"][0]["finish_reason"] == "length"
    assert events[-1]["choices"] == []
    usage = events[-1]["usage"]
    assert usage["completion_tokens"] == 3
    assert usage["total_tokens"] == usage["prompt_tokens"] + 3
    assert all(event["usage"] is None for event in events[:-1])
    whole = chat(client, max_tokens=3).json()
    assert "".join(delta.get("content", "") for delta in deltas) == whole["choices"][0]["message"]["content"]


def test_text_held_back_comes_with_the_end(opened: OpenModel) -> None:
    engine = FakeEngine(opened, lambda *_: [Token(65, "a"), Token(66, ""), Finished("stop", "bc")])
    client = client_of(engine)
    assert complete(client).json()["choices"][0]["text"] == "abc"
    assert [event["choices"][0]["text"] for event in events_of(complete(client, stream=True))] == ["a", "bc"]
    assert chat(client).json()["choices"][0]["message"]["content"] == "abc"
    streamed = events_of(chat(client, stream=True))
    assert "".join(event["choices"][0]["delta"].get("content", "") for event in streamed) == "abc"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("end", "status", "kind"),
    [
        (Finished("timeout"), 408, "timeout_error"),
        (Finished("cancelled"), 503, "overloaded_error"),
        (Finished("error", message="nan"), 500, "server_error"),
    ],
)
def test_what_ends_before_it_begins_is_an_error(
    opened: OpenModel, end: Finished, status: int, kind: str, stream: bool
) -> None:
    client = client_of(FakeEngine(opened, lambda *_: [end]))
    assert error_of(complete(client, stream=stream), status)["type"] == kind
    assert error_of(chat(client, stream=stream), status)["type"] == kind


def test_an_answer_begun_is_ended_with_what_there_is(opened: OpenModel) -> None:
    client = client_of(FakeEngine(opened, lambda *_: [Token(65, "a"), Finished("timeout")]))
    choice = complete(client).json()["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("a", "timeout")
    assert events_of(complete(client, stream=True))[-1]["choices"][0]["finish_reason"] == "timeout"


def test_a_failure_in_a_stream_is_its_last_event(opened: OpenModel) -> None:
    client = client_of(FakeEngine(opened, lambda *_: [Token(65, "a"), Finished("error", message="nan")]))
    lines = [line for line in complete(client, stream=True).text.split("\n\n") if line]
    last = json.loads(lines[-1].removeprefix("data: "))
    assert last["error"]["type"] == "server_error"
    assert "nan" in last["error"]["message"]
    assert error_of(complete(client), 500)["code"] == "generation_failed"


def test_a_full_queue_says_when_to_come_back_and_keeps_nothing(opened: OpenModel) -> None:
    engine = FakeEngine(opened, places=2)
    client = client_of(engine)
    response = complete(client, n=3)
    assert error_of(response, 429)["type"] == "rate_limit_error"
    assert response.headers["retry-after"] == "1"
    assert [ticket.given_up.is_set() for ticket in engine.requests] == [True, True]
    assert engine.running == 0


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
    refusing: TestClient, asked: list[Any], ask: Callable[..., httpx.Response], wrong: dict[str, list[Any]]
) -> None:
    found = [(param, error_of(ask(refusing, **{param: value}), 400)) for param in wrong for value in wrong[param]]
    assert [error["param"] for _, error in found] == [param for param, _ in found]
    assert {error["type"] for _, error in found} == {"invalid_request_error"}
    for fields, param in (
        ({"max_tokens": POSITIONS - 1}, "prompt" if ask is complete else "messages"),
        ({"prompt": ["a"] * 9, "n": 8} if ask is complete else {"n": 65}, "n"),
    ):  # fmt: skip
        assert error_of(ask(refusing, **fields), 400)["param"] == param
    assert asked == []


def test_fields_not_offered_are_explained_and_unknown_ones_suggested(client: TestClient) -> None:
    assert "presence_penalty is not offered" in error_of(complete(client, presence_penalty=1), 400)["message"]
    assert "did you mean 'temperature'" in error_of(complete(client, temprature=1), 400)["message"]


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


def test_a_top_p_of_zero_is_greedy(client: TestClient, engine: FakeEngine) -> None:
    assert complete(client, top_p=0, temperature=1.5, max_tokens=1).status_code == 200
    assert (engine.requests[0].sampling.temperature, engine.requests[0].sampling.top_p) == (0.0, 1.0)


def test_each_model_has_its_own_limits(opened: OpenModel) -> None:
    small = OpenModel(
        "small", "plain", SimpleNamespace(config=SimpleNamespace(max_position_embeddings=16)), opened.tokenizer, ()
    )
    engines = {"small": FakeEngine(small, words(small)), "large": FakeEngine(opened, words(opened))}
    client = TestClient(build_app(engines, ServeConfig()), raise_server_exceptions=False)
    for model, most in (("small", 15), ("large", POSITIONS - 1)):
        assert complete(client, model=model, prompt=[1], max_tokens=most).status_code == 200
        assert error_of(complete(client, model=model, prompt=[1], max_tokens=most + 1), 400)["param"] == "prompt"
        assert complete(client, model=model, prompt=[1] * most, max_tokens=1).status_code == 200
        assert error_of(complete(client, model=model, prompt=[1] * (most + 1), max_tokens=1), 400)["param"] == "prompt"


VALID = b'{"model": "tiny", "prompt": "a"}'


def test_content_types(client: TestClient) -> None:
    for kind in ("application/json", "application/json; charset=UTF-8", "application/x+json"):
        assert client.post("/v1/completions", content=VALID, headers={"content-type": kind}).status_code == 200
    for headers in ({}, {"content-type": "text/plain"}, {"content-type": "x"}, {"content-type": "a\x00b"}):
        assert error_of(client.post("/v1/completions", content=VALID, headers=headers), 400)["code"] == "bad_request"


def test_unknown_paths_and_methods(client: TestClient) -> None:
    error_of(client.get("/v1/nothing"), 404)
    error_of(client.get("/%ff%00"), 404)
    response = client.get("/v1/completions")
    error_of(response, 405)
    assert response.headers["allow"] == "POST"
    error_of(client.post("/healthz"), 405)


def test_large_bodies_are_refused_with_and_without_a_length(engine: FakeEngine) -> None:
    client = client_of(engine, max_body_bytes=100)
    assert client.post("/v1/completions", json={"model": "tiny", "prompt": "a", "max_tokens": 1}).status_code == 200
    error_of(client.post("/v1/completions", json={"model": "tiny", "prompt": "a" * 100}), 413)
    pieces = iter([VALID[:-1]] + [b" " * 50] * 3 + [b"}"])
    chunked = client.post("/v1/completions", content=pieces, headers={"content-type": "application/json"})
    assert "content-length" not in chunked.request.headers
    assert error_of(chunked, 413)["code"] == "body_too_large"


def test_keys_open_all_but_the_health_check(engine: FakeEngine) -> None:
    client = client_of(engine, api_keys=("one", "two"))
    assert client.get("/healthz").status_code == 200
    for path in ("/v1/models", "/metrics", "/openapi.json", "/api/models", "/nothing"):
        response = client.get(path)
        assert error_of(response, 401)["type"] == "authentication_error"
        assert response.headers["www-authenticate"] == "Bearer"
    for given in ("Bearer three", "Basic one", "one", "Bearer", "Bearer on", "Bearer one two", b"Bearer \xff"):
        error_of(client.get("/v1/models", headers={"authorization": given}), 401)
    for given in ("Bearer one", "bearer two"):
        assert client.get("/v1/models", headers={"authorization": given}).status_code == 200
    error_of(complete(client), 401)
    assert engine.requests == []


@pytest.mark.parametrize("place", ["/weftlm", "/page/weftlm", "/healthz"])
def test_keys_cover_the_same_paths_where_the_app_is_mounted_in_another(engine: FakeEngine, place: str) -> None:
    outer = FastAPI()
    outer.mount(place, build_app({"tiny": engine}, ServeConfig(api_keys=("one",))))
    client = TestClient(outer, raise_server_exceptions=False)
    assert client.get(f"{place}/healthz").status_code == 200
    assert error_of(client.get(f"{place}/page/nothing.js"), 404)
    for path in ("/v1/models", "/metrics", "/openapi.json"):
        error_of(client.get(f"{place}{path}"), 401)
        assert client.get(f"{place}{path}", headers={"authorization": "Bearer one"}).status_code == 200


def test_hosts(engine: FakeEngine) -> None:
    client = client_of(engine, hosts=("hub.Example:8443",))
    for host in (
        "localhost", "LOCALHOST:8000", "127.0.0.1:8000", "127.8.9.10", "[::1]:8000", "weftlm.localhost", "192.0.2.1:80",
        "[2001:db8::1]:8000", "Hub.example:1", "hub.example.",
    ):  # fmt: skip
        assert client.get("/v1/models", headers={"host": host}).status_code == 200, host
    for host in (
        "evil.example:8000", "localhost.evil.example", "", "127.0.0.1.evil.example", "notlocalhost", "0x7f.1"
    ):  # fmt: skip
        for path in ("/v1/models", "/healthz", "/metrics"):
            error = error_of(client.get(path, headers={"host": host}), 403)
            assert error["code"] == "host_not_allowed"
            assert "--allow-host" in error["message"]
        headers = {"host": host, "content-type": "application/json"}
        error_of(client.post("/v1/completions", content=VALID, headers=headers), 403)
        assert client_of(engine).get("/v1/models", headers={"host": host}).status_code == 200, "any name unless told"
    assert engine.requests == []


def test_the_names_of_a_server_follow_where_it_listens() -> None:
    own = socket.gethostname()
    assert hosts_of("127.0.0.1", [], open_to_all=False) == ["127.0.0.1", own]
    assert hosts_of("box", ["hub.example"], open_to_all=False) == ["box", own, "hub.example"]
    assert hosts_of("0.0.0.0", [], open_to_all=True) is None
    assert hosts_of("0.0.0.0", ["hub.example"], open_to_all=True) == ["0.0.0.0", own, "hub.example"]
    for wrong in ("https://hub.example", "", "  ", "hub example", "a/b"):
        with pytest.raises(ConfigError, match="without scheme or path"):
            hosts_of("127.0.0.1", [wrong], open_to_all=False)


def test_keys_are_not_shown() -> None:
    assert "secret" not in repr(ServeConfig(api_keys=("secret",)))


def test_metrics(client: TestClient) -> None:
    complete(client, max_tokens=3)
    complete(client, n=0)
    client.get("/some/path")
    text = client.get("/metrics").text
    assert 'weftlm_http_requests_total{method="POST",route="/v1/completions",status="200"} 1.0' in text
    assert 'weftlm_http_requests_total{method="POST",route="/v1/completions",status="400"} 1.0' in text
    assert 'weftlm_http_requests_total{method="GET",route="none",status="404"} 1.0' in text
    assert "/some/path" not in text
    assert 'weftlm_time_to_first_token_seconds_count{model="tiny"} 1.0' in text
    assert 'weftlm_time_per_token_seconds_count{model="tiny"} 1.0' in text
    assert 'weftlm_running_requests{model="tiny"} 0.0' in text
    assert 'weftlm_generated_tokens_total{model="tiny"} 7.0' in text
    assert 'weftlm_finished_requests_total{model="tiny",reason="stop"} 3.0' in text


def test_every_app_counts_for_itself(engine: FakeEngine) -> None:
    first, second = client_of(engine), client_of(engine)
    complete(first)
    assert 'route="/v1/completions"' not in second.get("/metrics").text


def test_a_bug_is_a_json_error_too(opened: OpenModel) -> None:
    def script(*_: Any) -> list[Any]:
        raise ZeroDivisionError

    error = error_of(complete(client_of(FakeEngine(opened, script))), 500)
    assert error["type"] == "server_error"
    assert "Zero" not in error["message"]


def test_names_that_cannot_be_served(engine: FakeEngine) -> None:
    for name in ("", "a/b", "a\n", "x" * 201):
        with pytest.raises(ConfigError, match="name"):
            build_app({name: engine}, ServeConfig())
    with pytest.raises(ConfigError, match="no model"):
        build_app({}, ServeConfig())
