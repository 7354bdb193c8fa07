"""Models served for real: the official client of OpenAI, and the command."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
from support.command_line import Call
from support.fake_engine import FakeEngine
from support.served import write_model
from support.tiny_project import command, environment
from support.web import serving

from weftlm.pipeline.any_model import OpenModel, open_model
from weftlm.serving.engine import Engine
from weftlm.serving.request import Finished, Token
from weftlm.serving.serve_config import KEYS_VARIABLE, ServeConfig

PROMPT = "the harbour and the sea"
CHAT: list[Any] = [{"role": "user", "content": "sing of the sea"}]
COMPLETION: dict[str, Any] = {
    "model": "tiny", "prompt": PROMPT, "max_tokens": 24, "extra_body": {"ignore_eos": True},
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("served"), "plain")


@pytest.fixture(scope="module")
def opened(folder: Path) -> OpenModel:
    return open_model(folder)


def client_of(address: str, key: str = "unused") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{address}/v1", api_key=key, max_retries=0, timeout=60)


@pytest.fixture(scope="module")
def client(opened: OpenModel) -> Iterator[openai.OpenAI]:
    engine = Engine(opened, slots=4, max_waiting=8)
    with serving({"tiny": engine}, ServeConfig(max_answers=12)) as web, client_of(web.address) as client:
        yield client


def test_completions_are_the_same_alone_streamed_and_together(client: openai.OpenAI) -> None:
    def text(temperature: float) -> str:
        return client.completions.create(**COMPLETION, temperature=temperature, seed=3).choices[0].text

    alone = {temperature: text(temperature) for temperature in (0.0, 1.0)}
    assert alone[0.0] != alone[1.0]
    for temperature, whole in alone.items():
        pieces = list(client.completions.create(**COMPLETION, temperature=temperature, seed=3, stream=True))
        assert "".join(piece.choices[0].text for piece in pieces) == whole
        assert pieces[-1].choices[0].finish_reason == "length"
    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(text, [0.0, 1.0] * 3)) == [alone[0.0], alone[1.0]] * 3


def test_each_choice_equals_a_request_with_its_seed(client: openai.OpenAI) -> None:
    together = client.completions.create(**COMPLETION, n=3, seed=10)
    assert [choice.index for choice in together.choices] == [0, 1, 2]
    for number, choice in enumerate(together.choices):
        assert choice.text == client.completions.create(**COMPLETION, seed=10 + number).choices[0].text
    assert len({choice.text for choice in together.choices}) == 3


def test_chat_whole_and_streamed_and_carried_on(client: openai.OpenAI) -> None:
    settings: dict[str, Any] = {"model": "tiny", "max_completion_tokens": 10, "temperature": 0}
    answer = client.chat.completions.create(messages=CHAT, **settings)
    message = answer.choices[0].message
    pieces = list(
        client.chat.completions.create(messages=CHAT, **settings, stream=True, stream_options={"include_usage": True})
    )
    text = "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices)
    assert text == message.content
    assert pieces[-1].usage == answer.usage
    history = [*CHAT, message, {"role": "user", "content": "more"}]
    assert client.chat.completions.create(messages=history, **settings).choices[0].message.content


def test_errors_become_the_clients_exceptions(client: openai.OpenAI, opened: OpenModel) -> None:
    with pytest.raises(openai.NotFoundError, match="no model 'huge'") as missing:
        client.completions.create(model="huge", prompt="a")
    assert (missing.value.param, missing.value.code) == ("model", "model_not_found")
    with pytest.raises(openai.BadRequestError, match="reads 256 tokens"):
        client.chat.completions.create(model="tiny", messages=CHAT, max_tokens=250)
    engines = {
        "full": FakeEngine(opened, places=0),
        "late": FakeEngine(opened, lambda *_: [Finished("timeout")]),
        "broken": FakeEngine(opened, lambda *_: [Token(65, "a"), Finished("error", message="not a number")]),
    }
    with (
        serving(engines, ServeConfig(api_keys=("secret",))) as web,
        client_of(web.address, "secret") as client,
        client_of(web.address, "wrong") as stranger,
    ):
        with pytest.raises(openai.AuthenticationError):
            stranger.models.list()
        with pytest.raises(openai.RateLimitError) as busy:
            client.completions.create(model="full", prompt="a")
        assert busy.value.response.headers["retry-after"] == "1"
        with pytest.raises(openai.APIStatusError) as slow:
            client.completions.create(model="late", prompt="a")
        assert slow.value.status_code == 408
        pieces = client.completions.create(model="broken", prompt="a", stream=True)
        assert next(pieces).choices[0].text == "a"
        with pytest.raises(openai.APIError, match="not a number"):
            next(pieces)


def test_the_command_serves_and_stops(folder: Path, tmp_path: Path) -> None:
    arguments = ("serve", folder, folder, "--name", "one", "--name", "two", "--port", "0", "--slots", "2", "--json")
    served = subprocess.Popen(
        command(*arguments), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path,
        env={**environment(), KEYS_VARIABLE: "secret"},
    )  # fmt: skip
    try:
        assert served.stdout is not None
        ready = json.loads(served.stdout.readline())
        with client_of(ready["address"], "secret") as client:
            assert [model.id for model in client.models.list()] == ready["models"] == ["one", "two"]
            with urllib.request.urlopen(ready["address"], timeout=10) as page:
                assert page.headers["content-type"].startswith("text/html")
            stream = client.completions.create(
                model="one", prompt=PROMPT, max_tokens=200, stream=True, extra_body={"ignore_eos": True}
            )
            next(stream)
            served.send_signal(signal.SIGTERM)
            reasons = [piece.choices[0].finish_reason for piece in stream]
            assert reasons[-1] in ("cancelled", "length")
        _, said = served.communicate(timeout=30)
    finally:
        served.kill()
        served.wait()
    assert served.returncode == 0, said
    assert said.splitlines()[-1] == f"serving one, two at {ready['address']}"
    assert "Traceback" not in said


def test_the_command_refuses(call: Call, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KEYS_VARIABLE, raising=False)
    two = ("serve", folder, folder, "--name", "a", "--name", "b")
    for arguments, said in (
        (("serve", folder, "--host", "0.0.0.0"), KEYS_VARIABLE),
        (("serve", folder, folder), "--name"),
        (("serve", folder, "--name", "a", "--name", "b"), "2 names"),
        (("serve", folder, "--timeout-seconds", "0"), "timeout_seconds"),
        (("serve", folder, "--slots", "0"), "slots"),
        (("serve", "./nowhere/at/all", "--port", "0"), "there is no folder"),
        ((*two, "--revision", "main"), "--revision is of one model and 2 came"),
        (("serve", folder, "--port", "0", "--dtype", "half"), "allowed: float32"),
    ):
        assert said in call(*arguments, code=2)
    monkeypatch.setenv(KEYS_VARIABLE, ",")
    assert "holds no key" in call("serve", folder, code=2)


def test_without_its_packages_the_command_names_the_extra() -> None:
    # in a process of its own: modules taken out of this one would leave two of each to the tests that follow
    without = (
        "import sys; sys.modules['fastapi'] = None; from weftlm.cli.main import main; sys.exit(main(sys.argv[1:]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", without, "serve", "anything"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2
    assert "pip install '.[serve]'" in done.stderr
