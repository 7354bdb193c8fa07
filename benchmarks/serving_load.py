"""`weftlm serve` under load: many clients, slow readers, clients that leave, malformed requests, for minutes.

What must hold: no crash, memory that stays flat, every answer the one its prompt gets alone (temperature 0, compared to
the character), every refusal a 4xx with a JSON body. Models are those of `make demo`, unless --models names others.

    python benchmarks/serving_load.py                    # 200 clients for 10 minutes
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from _common import environment_lines, finish, parser, say, table

FLAT = 1.1
"""Memory at the end over memory early on, at most: a leak grows beyond it in minutes."""
DEMO = Path(__file__).resolve().parents[1] / "runs" / "demo"
DEMO_MODELS = ("model", "routed/phatgoose", "routed/blend", "students/student")
PROMPTS = 16
MAX_TOKENS = 12
WAYS = {"plain": 40, "stream": 30, "slow reader": 8, "leaves": 10, "malformed": 12}
"""Ways of clients, by how often in a hundred."""
MALFORMED: tuple[tuple[str, str, bytes], ...] = (
    ("POST", "/v1/completions", b"{not json"),
    ("POST", "/v1/completions", b'{"model": 3, "prompt": []}'),
    ("POST", "/v1/completions", b'{"prompt": "x", "temperature": NaN}'),
    ("POST", "/v1/completions", b'{"model": "nobody", "prompt": "x"}'),
    ("POST", "/v1/completions", b'{"model": "MODEL", "prompt": "x", "max_tokens": -1}'),
    ("POST", "/v1/completions", b'{"model": "MODEL", "prompt": "' + b"x" * 3_000_000 + b'"}'),
    ("POST", "/v1/chat/completions", b'{"model": "MODEL", "messages": "hello"}'),
    ("POST", "/v1/completions", b"\xff\xfe\x00"),
    ("DELETE", "/v1/completions", b""),
    ("GET", "/v1/nothing", b""),
)


@dataclass
class Seen:
    """What the clients saw."""

    ended: Counter[str] = field(default_factory=Counter)
    statuses: Counter[int] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Reply:
    """A response: status, headers by lower-case name, body."""

    status: int
    headers: Mapping[str, str]
    body: bytes


class Wire:
    """One HTTP/1.1 connection, read as slowly as asked for."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    @classmethod
    async def open(cls, host: str, port: int) -> Wire:
        return cls(*await asyncio.open_connection(host, port))

    async def send(self, method: str, path: str, body: bytes) -> tuple[int, dict[str, str]]:
        head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: application/json\r\n"
        self.writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        with suppress(ConnectionError):  # a large body may be refused before it is read; the answer is still to come
            await self.writer.drain()
        status = int((await self.reader.readline()).split()[1])
        headers = {}
        while (line := (await self.reader.readline()).strip()) != b"":
            name, _, value = line.decode().partition(":")
            headers[name.lower()] = value.strip()
        return status, headers

    async def chunks(self, headers: Mapping[str, str], pause_s: float = 0.0) -> Any:
        """The body, piece by piece."""
        if headers.get("transfer-encoding") != "chunked":
            yield await self.reader.readexactly(int(headers.get("content-length", "0")))
            return
        while size := int((await self.reader.readline()).strip() or b"0", 16):
            yield await self.reader.readexactly(size)
            await self.reader.readexactly(2)
            if pause_s:
                await asyncio.sleep(pause_s)

    def close(self) -> None:
        self.writer.close()


class Client:
    """One client; its way is drawn anew for every request."""

    def __init__(self, load: Load, number: int) -> None:
        self.load, self.random = load, random.Random(number)

    async def work(self) -> None:
        while time.monotonic() < self.load.deadline:
            way = self.random.choices(list(WAYS), list(WAYS.values()))[0]
            start = time.perf_counter()
            try:
                ended = await asyncio.wait_for(self.one(way), 180)
            except (ConnectionError, asyncio.IncompleteReadError, IndexError) as error:
                ended = "connection lost"
                self.load.seen.wrong.append(f"{way}: connection lost ({type(error).__name__})")
            except TimeoutError:
                ended = "no answer"
                self.load.seen.wrong.append(f"{way}: no answer in 180 s")
            self.load.seen.ended[f"{way}: {ended}"] += 1
            if ended == "as alone":
                self.load.seen.seconds.append(time.perf_counter() - start)
            if ended == "busy":
                await asyncio.sleep(self.random.uniform(0.2, 1.0))

    async def one(self, way: str) -> str:
        wire = await Wire.open(self.load.host, self.load.port)
        try:
            if way == "malformed":
                return await self.malformed(wire)
            model, prompt = self.random.choice(list(self.load.alone))
            stream = way != "plain"
            body = {"model": model, "prompt": prompt, "max_tokens": MAX_TOKENS, "temperature": 0, "stream": stream}
            status, headers = await wire.send("POST", "/v1/completions", json.dumps(body).encode())
            self.load.seen.statuses[status] += 1
            text = b""
            events = 0
            async for chunk in wire.chunks(headers, self.random.uniform(0.05, 0.3) if way == "slow reader" else 0.0):
                text += chunk
                events += 1
                if way == "leaves" and events >= self.random.randint(1, 3):
                    return "left"
            if status == 429:
                if "retry-after" not in headers or "error" not in json.loads(text):
                    self.load.seen.wrong.append("429 without Retry-After or a JSON error")
                return "busy"
            if status != 200:
                self.load.seen.wrong.append(f"{way}: status {status}: {text[:200]!r}")
                return "refused"
            try:
                found = streamed(text) if stream else json.loads(text)["choices"][0]["text"]
            except (ValueError, KeyError, IndexError):
                self.load.seen.wrong.append(f"{way}: no whole answer: {text[-200:]!r}")
                return "broken off"
            if found != self.load.alone[model, prompt]:
                self.load.seen.wrong.append(f"{model}: {found!r} instead of {self.load.alone[model, prompt]!r}")
                return "another answer"
            return "as alone"
        finally:
            wire.close()

    async def malformed(self, wire: Wire) -> str:
        method, path, body = self.random.choice(MALFORMED)
        model = self.random.choice(list(self.load.alone))[0]
        status, headers = await wire.send(method, path, body.replace(b"MODEL", model.encode()))
        self.load.seen.statuses[status] += 1
        text = b"".join([chunk async for chunk in wire.chunks(headers)])
        try:
            named = bool(json.loads(text)["error"]["message"])
        except (ValueError, KeyError, TypeError):
            named = False
        if not 400 <= status < 500 or not named:
            self.load.seen.wrong.append(f"malformed {method} {path} {body[:60]!r}: {status} {text[:200]!r}")
            return "badly refused"
        return "refused with a reason"


def streamed(text: bytes) -> str:
    """The answer in a stream of events.

    Raises:
        ValueError, KeyError, IndexError: the stream does not end as it should, or an event is no piece of an answer.
    """
    lines = [line[6:] for line in text.decode().splitlines() if line.startswith("data: ")]
    if lines[-1] != "[DONE]":
        raise ValueError(lines[-1])
    return "".join(json.loads(line)["choices"][0]["text"] for line in lines[:-1] if json.loads(line)["choices"])


@dataclass
class Load:
    """A server under load.

    Attributes:
        host, port: of the server.
        deadline: when clients stop, on the monotonic clock.
        alone: each (model, prompt)'s answer when nothing else ran.
        seen: by the clients.
    """

    host: str
    port: int
    deadline: float = 0.0
    alone: dict[tuple[str, str], str] = field(default_factory=dict)
    seen: Seen = field(default_factory=Seen)

    async def learn(self, models: Sequence[str]) -> None:
        """Ask every prompt once, one after the other."""
        rng = random.Random(0)
        words = "def class return import the of and model theorem matrix license value = ( ) { } 0 1 2".split()
        for model in models:
            for _ in range(PROMPTS):
                prompt = " ".join(rng.choice(words) for _ in range(rng.randint(1, 40)))
                wire = await Wire.open(self.host, self.port)
                body = {"model": model, "prompt": prompt, "max_tokens": MAX_TOKENS, "temperature": 0}
                status, headers = await wire.send("POST", "/v1/completions", json.dumps(body).encode())
                text = b"".join([chunk async for chunk in wire.chunks(headers)])
                assert status == 200, text
                self.alone[model, prompt] = json.loads(text)["choices"][0]["text"]
                wire.close()

    async def press(self, clients: int, seconds: float, pid: int) -> list[int]:
        """Let the clients work; resident memory of the server in bytes, every two seconds."""
        self.deadline = time.monotonic() + seconds
        work = asyncio.gather(*(Client(self, number).work() for number in range(clients)))
        memory = []
        while not work.done():
            memory.append(resident(pid))
            await asyncio.sleep(2.0)
        await work
        return memory


def resident(pid: int) -> int:
    """Resident memory of a process, bytes."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise ProcessLookupError(f"process {pid} is gone")


def measure(models: Mapping[str, Path], clients: int, seconds: float) -> dict[str, Any]:
    """Serve, learn, press, and let the server end."""
    named = [item for name in models for item in ("--name", name)]
    places = [str(path) for path in models.values()]
    command = [sys.executable, "-m", "weftlm", "serve", *places, *named, "--port", "0", "--json"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        assert server.stdout is not None
        address = urlsplit(json.loads(server.stdout.readline())["address"])
        assert address.hostname is not None
        assert address.port is not None
        load = Load(address.hostname, address.port)
        asyncio.run(load.learn(list(models)))
        say(f"{len(load.alone)} prompts answered alone; {clients} clients for {seconds:.0f} s")
        memory = asyncio.run(load.press(clients, seconds, server.pid))
        alive = server.poll() is None
        metrics = asyncio.run(_get(load, "/healthz"))
    finally:
        server.send_signal(signal.SIGTERM)
        code = server.wait(60)
    fifth = max(1, len(memory) // 5)
    early, late = statistics.median(memory[fifth : 2 * fifth] or memory), statistics.median(memory[-fifth:])
    seen = load.seen
    took = sorted(seen.seconds)
    return {
        "clients": clients, "minutes": seconds / 60, "models": list(models),
        "requests": sum(seen.ended.values()),
        "ended": dict(sorted(seen.ended.items())),
        "statuses": {str(status): count for status, count in sorted(seen.statuses.items())},
        "server_errors": sum(count for status, count in seen.statuses.items() if status >= 500),
        "wrong": len(seen.wrong), "examples_of_wrong": seen.wrong[:10],
        "alive_at_the_end": alive, "healthy_at_the_end": metrics == 200, "exit_code": code,
        "memory_late_over_early": late / early, "memory_mib": round(late / 2**20),
        "answer_seconds": {
            "median": statistics.median(took) if took else None,
            "p99": took[int(0.99 * (len(took) - 1))] if took else None,
        },
    }  # fmt: skip


async def _get(load: Load, path: str) -> int:
    wire = await Wire.open(load.host, load.port)
    status, headers = await wire.send("GET", path, b"")
    async for _ in wire.chunks(headers):
        pass
    wire.close()
    return status


def broken(record: Mapping[str, Any], *, quick: bool) -> list[str]:
    """What did not hold; memory is judged over minutes alone."""
    found = list(record["examples_of_wrong"])
    if record["server_errors"]:
        found.append(f"{record['server_errors']} responses of 500 and above")
    if not (record["alive_at_the_end"] and record["healthy_at_the_end"]):
        found.append("the server was not alive and healthy at the end")
    if record["exit_code"] != 0:
        found.append(f"exit code {record['exit_code']} after SIGTERM")
    if not quick and record["memory_late_over_early"] > FLAT:
        found.append(f"memory grew to {record['memory_late_over_early']:.2f} of what it was; at most {FLAT}")
    return found


def to_markdown(record: Mapping[str, Any]) -> str:
    """Counts by way and ending, and what must hold."""
    rows = [[key, f"{count:,}"] for key, count in record["ended"].items()]
    must = [
        ["wrong or missing answers", record["wrong"]],
        ["responses of 500 and above", record["server_errors"]],
        ["server alive and healthy at the end", record["alive_at_the_end"] and record["healthy_at_the_end"]],
        ["its exit code after SIGTERM", record["exit_code"]],
        ["memory, last fifth of the time over the second", f"{record['memory_late_over_early']:.3f}"],
        ["memory at the end, MiB", record["memory_mib"]],
    ]
    took = record["answer_seconds"]
    seconds = "-" if took["median"] is None else f"{took['median']:.2f} s, 99 % within {took['p99']:.2f} s"
    return "\n".join(
        [
            "# A server under load",
            "",
            f"{record['clients']} clients for {record['minutes']:.1f} minutes on loopback, {record['requests']:,} "
            f"requests over {len(record['models'])} models ({', '.join(record['models'])}), answers of {MAX_TOKENS} "
            f"tokens at temperature 0, compared with what the prompt got alone. Median time of an answer: {seconds} "
            "(clients and server share the machine).",
            "",
            table(["must hold", "seen"], must),
            "",
            table(["way of the client: how it ended", "requests"], rows),
            "",
            "Left: the client closed the connection in the middle of its answer. Busy: 429 with Retry-After.",
            "",
            environment_lines(record),
        ]
    )


def main() -> None:
    """Press the demonstration's models, or others."""
    flags = parser(str(__doc__).splitlines()[0])
    flags.add_argument("--models", nargs="+", type=Path, default=None, help="folders of models to serve")
    flags.add_argument("--clients", type=int, default=200, help="at a time")
    flags.add_argument("--minutes", type=float, default=10.0, help="of load")
    arguments = flags.parse_args()
    paths = arguments.models or [DEMO / name for name in DEMO_MODELS if (DEMO / name).is_dir()]
    if not paths:
        if not arguments.quick:
            flags.error(f"there are no models in {DEMO}; run make demo first, or name some with --models")
        sys.stdout.write(json.dumps({"theme": "serving_load", "skipped": "no models; run make demo"}) + "\n")
        return
    clients, seconds = (8, 5.0) if arguments.quick else (arguments.clients, 60 * arguments.minutes)
    models = {"-".join(path.parts[-2:]): path for path in (paths[:2] if arguments.quick else paths)}
    record = measure(models, clients, seconds)
    finish("serving_load", arguments, record, to_markdown)
    if found := broken(record, quick=arguments.quick):
        sys.exit("the server did not hold: " + "; ".join(found))


if __name__ == "__main__":
    main()
