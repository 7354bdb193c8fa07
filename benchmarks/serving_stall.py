"""How long `weftlm serve` keeps others waiting while clients send what takes long to read, to write or to template.

A tiny model is served; one client asks `/healthz` again and again, one request after the other, while other clients
send one kind of heavy request. What is reported is the longest of its answers: time for which the event loop, and so
every other client, stood still. The asking client is a process of its own; a second thread in it wakes every 5 ms, and
time for which it did not, because the machine ran something else, is not counted as the server's.

    python benchmarks/serving_stall.py  # regenerates benchmarks/results/serving_stall.{json,md}
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import Executor, ProcessPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from _common import environment_lines, finish, parser, say, spread, table
from serving_load import Wire
from transformers import LlamaConfig, LlamaForCausalLM

from weftlm.corpora.config import TrainConfig
from weftlm.corpora.tokens import train_tokenizer

GOAL_MS = 100.0
PAUSE_S = 0.005
"""Between two answers of the client that asks after the server's health."""
BODY = 1_900_000
POSITIONS = 512
LOOPING = "{% for a in range(100000) %}{% for b in range(100000) %}{% endfor %}{% endfor %}{{ messages[0].content }}"
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


def model_folder(folder: Path) -> Path:
    """A random model of two layers; its chat template never ends."""
    rng = random.Random(0)
    words = ["".join(rng.choice("abcdefghijklmnop") for _ in range(rng.randint(2, 7))) for _ in range(300)]
    tokenizer = train_tokenizer((" ".join(rng.choices(words, k=30)) for _ in range(200)), TrainConfig(vocab_size=400))
    tokenizer.save(folder)
    (folder / "chat_template.jinja").write_text(LOOPING)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=400, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=POSITIONS, eos_token_id=None, bos_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def attacks(model: str) -> dict[str, tuple[str, bytes]]:
    """Kinds of heavy requests: route and body."""

    def body(**fields: Any) -> bytes:
        return json.dumps({"model": model, **fields}).encode()

    def message(text: str) -> list[dict[str, str]]:
        return [{"role": "user", "content": text}]

    return {
        "nothing": ("", b""),
        "1.9 MB of messages": (CHAT, body(messages=message("x") * (BODY // 34))),
        "1.9 MB of token ids": (COMPLETIONS, body(prompt=[[1]] * (BODY // 5))),
        "1.9 MB of nested lists": (COMPLETIONS, b'{"prompt": ' + b"[" * (BODY // 2) + b"]" * (BODY // 2) + b"}"),
        "1.9 MB of one text": (COMPLETIONS, body(prompt="mnop " * (BODY // 5))),
        "a chat template without end": (CHAT, body(messages=message("x"))),
        "16 answers of 200 tokens with 20 alternatives": (
            COMPLETIONS,
            body(prompt="abc", n=16, max_tokens=200, logprobs=20),
        ),
    }


async def asked(address: tuple[str, int], method: str, path: str, body: bytes) -> int:
    """The status of one request, its answer read to the end."""
    wire = await Wire.open(*address)
    try:
        status, headers = await wire.send(method, path, body)
        async for _ in wire.chunks(headers):
            pass
        return status
    finally:
        wire.close()


class Pauses(threading.Thread):
    """Notes when a thread that only sleeps was not woken in time: pauses of the machine or of this process.

    Attributes:
        found: begin and end of each, by `time.perf_counter`.
    """

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.found: list[tuple[float, float]] = []
        self.over = threading.Event()

    def run(self) -> None:
        last = time.perf_counter()
        while not self.over.wait(PAUSE_S):
            now = time.perf_counter()
            if now - last > 4 * PAUSE_S:
                self.found.append((last + PAUSE_S, now))
            last = now

    def within(self, begin: float, end: float) -> float:
        """Seconds between two times that were pauses."""
        return sum(max(0.0, min(end, stop) - max(begin, start)) for start, stop in self.found)


def ask_for_health(address: tuple[str, int], seconds: float) -> dict[str, Any]:
    """Ask after the server's health, one request after the other; times in milliseconds."""
    pauses = Pauses()
    pauses.start()
    until = time.monotonic() + seconds
    answers = []

    async def ask() -> None:
        while time.monotonic() < until:
            begin = time.perf_counter()
            status = await asked(address, "GET", "/healthz", b"")
            answers.append((begin, time.perf_counter()))
            assert status == 200, status
            await asyncio.sleep(PAUSE_S)

    asyncio.run(ask())
    time.sleep(4 * PAUSE_S)
    pauses.over.set()
    pauses.join()
    took = [1000 * (end - begin - pauses.within(begin, end)) for begin, end in answers]
    paused = max((1000 * (end - begin) for begin, end in pauses.found), default=0.0)
    return {"longest": max(took), "median": statistics.median(took), "asked": len(took), "paused": paused}


def probe(address: tuple[str, int], path: str, body: bytes, senders: int, seconds: float, asking: Executor) -> Any:
    """Ask after the server's health while `senders` clients send one kind of request."""
    until = time.monotonic() + seconds
    statuses: Counter[str] = Counter()

    async def send() -> None:
        while time.monotonic() < until:
            try:
                statuses[str(await asked(address, "POST", path, body))] += 1
            except (ConnectionError, asyncio.IncompleteReadError, IndexError):
                statuses["closed"] += 1

    async def send_all() -> None:
        await asyncio.gather(*(send() for _ in range(senders if path else 0)))

    health = asking.submit(ask_for_health, address, seconds)
    asyncio.run(send_all())
    return {**health.result(), "statuses": dict(statuses)}


def measure(senders: int, seconds: float, rounds: int, most: int | None = None) -> dict[str, Any]:
    """Serve and probe under every kind of request, or the first `most` of them, all kinds in every round."""
    with tempfile.TemporaryDirectory() as folder:
        place = model_folder(Path(folder) / "model")
        command = [sys.executable, "-m", "weftlm", "serve", str(place), "--name", "tiny", "--port", "0", "--json"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
        server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        try:
            assert server.stdout is not None
            url = urlsplit(json.loads(server.stdout.readline())["address"])
            address = (str(url.hostname), int(url.port or 0))
            kinds = dict(list(attacks("tiny").items())[:most])
            found: dict[str, list[dict[str, Any]]] = {kind: [] for kind in kinds}
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as asking:
                for path, body in list(kinds.values())[1:]:  # processes that check bodies start, models warm up
                    probe(address, path, body, senders, 0.1, asking)
                for number in range(rounds):
                    for kind, (path, body) in kinds.items():
                        found[kind].append(probe(address, path, body, senders, seconds, asking))
                        say(f"round {number}: {kind}: longest {found[kind][-1]['longest']:.0f} ms")
        finally:
            server.send_signal(signal.SIGTERM)
            code = server.wait(60)
    return {
        "senders": senders, "seconds": seconds, "exit_code": code, "goal_ms": GOAL_MS,
        "kinds": {
            kind: {
                "longest_ms": spread([one["longest"] for one in each]).as_json(),
                "median_ms": spread([one["median"] for one in each]).as_json(),
                "paused_ms": spread([one["paused"] for one in each]).as_json(),
                "asked": sum(one["asked"] for one in each),
                "statuses": dict(sum((Counter(one["statuses"]) for one in each), Counter())),
            }
            for kind, each in found.items()
        },
    }  # fmt: skip


def to_markdown(record: Mapping[str, Any]) -> str:
    """Times by kind of request."""

    def show(value: Mapping[str, float]) -> str:
        return f"{value['median']:.1f} ({value['low']:.1f} .. {value['high']:.1f})"

    rows = [
        [
            kind,
            show(one["median_ms"]),
            show(one["longest_ms"]),
            show(one["paused_ms"]),
            ", ".join(f"{count} x {status}" for status, count in sorted(one["statuses"].items())) or "-",
        ]
        for kind, one in record["kinds"].items()
    ]
    return "\n".join(
        [
            "# How long heavy requests keep others waiting",
            "",
            f"`weftlm serve` of a random two-layer model; {record['senders']} clients send one kind of request for "
            f"{record['seconds']:.0f} s while another asks `/healthz` {1000 * PAUSE_S:.0f} ms after each answer. "
            f"Clients and server share the machine, whose own pauses are not counted. Goal: "
            f"the longest answer stays within {record['goal_ms']:.0f} ms. "
            "Median (lowest .. highest) over rounds, milliseconds.",
            "",
            table(
                ["beside", "median answer", "longest answer", "longest pause of the machine", "what the senders got"],
                rows,
            ),
            "",
            environment_lines(record),
        ]
    )


def main() -> None:
    """Serve and probe."""
    arguments = parser(str(__doc__).splitlines()[0]).parse_args()
    record = measure(1, 0.5, 1, most=3) if arguments.quick else measure(8, 10.0, arguments.seeds)
    finish("serving_stall", arguments, record, to_markdown)
    if record["exit_code"] != 0:
        sys.exit(f"the server ended with code {record['exit_code']} after SIGTERM")


if __name__ == "__main__":
    main()
