"""Whatever JSON comes: 2xx, or a 4xx with OpenAI's error object; and the next request is answered."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError
from starlette.testclient import TestClient
from support.fake_engine import FakeEngine, words

from weftlm.pipeline.any_model import OpenModel
from weftlm.serving.app import build_app
from weftlm.serving.schemas import ChatRequest, CompletionRequest
from weftlm.serving.serve_config import ServeConfig

NUMBERS = [
    b"NaN", b"-Infinity", b"1e999", b"1e308", b"-0.0", b"1E2", b"01", b"+1", b"1_0", b"-9223372036854775809",
    b"18446744073709551616", b"1" + b"0" * 5000, b"1.5", b"true", b"null", b'"1"', b"[1]", b"{}",
]  # fmt: skip
FIELDS = ["seed", "max_tokens", "n", "logprobs", "best_of", "temperature", "top_p", "timeout"]
TEXTS = [
    b'"\\ud800"', b'"\\u0000"', b'"\x00"', b'"\x1b[31m"', b'"\\ud83d\\ude00"', b'"\xed\xa0\x80"', b'"\xff"', b'"\\x41"',
    b'"\\"', b"'a'", b'"\\u202e"', b'"\xef\xbb\xbf"', b'""', b"[]", b"[[]]", b"[null]", b"[[1],[\"a\"]]", b"[1e999]",
    b"[99999999999999999999]", b'{"a":1}', b"[" * 500 + b"]" * 500, b'{"a":' * 5_000 + b"1" + b"}" * 5_000,
]  # fmt: skip
WHOLE = [
    b"", b"\x00", b"null", b"[]", b'"a"', b"{", b"{}", b'{"model"}', b'{"model":"tiny",}', b"\xef\xbb\xbf{}",
    b'{"model":"tiny","prompt":"a"}{}', '{"model":"tiny","prompt":"a"}'.encode("utf-16"),
    b'{"prompt":"a","prompt":[1],"model":"tiny"}', b'{"model":"tiny","prompt":"a","\\u0000":1}',
    b'{"model":"tiny","prompt":"a","__class__":1}', b'{"model":"tiny","prompt":"a","\\ud800":1}',
    b'{"model":{"tiny":1},"prompt":"a"}', b'{"model":"\\u001b[2J","prompt":"a"}',
    b'{"model":"tiny","prompt":"a","stop":[null]}', b'{"model":"tiny","prompt":"a","stop":"\\ud800"}',
    b'{"model":"tiny","prompt":"a","stream_options":[]}', b'{"model":"tiny","prompt":"a","logit_bias":{"1":NaN}}',
    b'{"model":"tiny","prompt":"a","metadata":{"a":{"b":{}}}}', b'{"model":"tiny","prompt":"a","stream":"yes"}',
]  # fmt: skip
MESSAGES = b'{"model":"tiny","max_tokens":1,"messages":%s}'
ALL = {
    "/v1/completions": [
        *(
            b'{"model":"tiny","prompt":"a","%s":%s}' % (field.encode(), number)
            for field in FIELDS
            for number in NUMBERS
        ),
        *(b'{"model":"tiny","max_tokens":1,"prompt":%s}' % text for text in TEXTS),
        *WHOLE,
    ],
    "/v1/chat/completions": [
        *(MESSAGES % text for text in TEXTS),
        *(MESSAGES % (b'[{"role":"user","content":%s}]' % text) for text in TEXTS),
        *(MESSAGES % (b'[{"role":%s,"content":"a","name":%s}]' % (text, text)) for text in TEXTS),
        *WHOLE,
    ],
    "/api/inspect": [
        *(b'{"model":"tiny","text":%s}' % text for text in TEXTS),
        *(b'{"model":%s,"text":"a","without":%s}' % (text, text) for text in TEXTS),
        *WHOLE,
    ],
}


@pytest.fixture(scope="module")
def client(opened: OpenModel) -> TestClient:
    engines = {"tiny": FakeEngine(opened, words(opened))}
    return TestClient(build_app(engines, ServeConfig()), raise_server_exceptions=False)


@pytest.mark.parametrize("route", ALL)
def test_every_body_has_a_clean_answer(client: TestClient, route: str) -> None:
    wrong: list[Any] = []
    for body in ALL[route]:
        response = client.post(route, content=body, headers={"content-type": "application/json"})
        if response.status_code == 200:
            continue
        error = response.json().get("error", {})
        clean = 400 <= response.status_code < 500 and set(error) == {"message", "type", "param", "code"}
        said = str(error.get("message", ""))
        if not clean or not said or (not said.isascii() and not said.isprintable()) or "\x1b" in said:
            wrong.append((body[:60], response.status_code, said[:200]))
    assert wrong == []
    assert client.post("/v1/completions", json={"model": "tiny", "prompt": "a", "max_tokens": 1}).status_code == 200


@pytest.mark.parametrize(
    ("model", "fields"),
    [
        (CompletionRequest, {"prompt": [[{}] * 1_000] * 100}),
        (CompletionRequest, {"prompt": "a", **{f"a{number}": 1 for number in range(1_000)}}),
        (ChatRequest, {"messages": [{"role": "user", "content": [{}] * 100}] * 100}),
        (ChatRequest, {"messages": [{"role": "user", "content": "a", **{f"a{n}": 1 for n in range(1_000)}}]}),
    ],
)
def test_a_body_of_many_faults_is_reported_by_its_first(model: Any, fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError) as caught:
        model.model_validate({"model": "tiny", **fields})
    assert 1 <= caught.value.error_count() <= 8
