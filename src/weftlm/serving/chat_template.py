"""Chat templates, which are code from a model's folder, run in a process that is killed when one does not end.

Run as a program it reads one job per line and writes one result per line, both JSON; it needs jinja2 alone.
"""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from typing import Any

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

try:
    import resource
except ModuleNotFoundError:  # no POSIX
    resource = None  # type: ignore[assignment]

TEMPLATE_SECONDS = 2.0
MEMORY_BYTES = 1 << 30
MAX_WRITTEN = 8_000_000
"""Characters a chat template may write."""


class ClosedError(Exception):
    """The server stops."""


class RefusedError(Exception):
    """A template refuses the messages, or fails on them."""


class Templates:
    """One process that renders templates, begun at the first; a template that takes too long ends it.

    Attributes:
        pool: The one thread that may call `render`.
    """

    def __init__(self) -> None:
        self.pool = ThreadPoolExecutor(1, "weftlm-template")
        self._process: subprocess.Popen[str] | None = None
        self._closed = False

    def render(self, template: str, tokens: Mapping[str, Any], messages: Sequence[Mapping[str, str]]) -> str:
        """Render a chat template.

        Args:
            template: Text of the template.
            tokens: Special tokens by name.
            messages: Messages with `role`, `content` and perhaps `name`.
        Raises:
            RefusedError: The template refuses the messages, or fails on them.
            TimeoutError: It does not end in time, or writes too much.
            ClosedError: `close` was called.
        """
        if self._process is None:
            self._process = self._start()
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        deadline = threading.Timer(TEMPLATE_SECONDS, process.kill)
        deadline.start()
        try:
            process.stdin.write(json.dumps({"template": template, "tokens": tokens, "messages": messages}) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except OSError:
            line = ""
        finally:
            deadline.cancel()
        if not line.endswith("\n"):
            self._end()
            if self._closed:
                raise ClosedError
            raise TimeoutError(f"the model's chat template did not end within {TEMPLATE_SECONDS:g} s")
        answer: dict[str, str] = json.loads(line)
        if "refused" in answer:
            raise RefusedError(answer["refused"])
        return answer["text"]

    def close(self) -> None:
        """End the process and start no other."""
        self._closed = True
        if self._process is not None:
            self._process.kill()
        self.pool.shutdown(wait=True)
        self._end()

    def _start(self) -> subprocess.Popen[str]:
        if self._closed:
            raise ClosedError
        # -P: the folder of this file is no place to import from.
        process = subprocess.Popen(
            [sys.executable, "-P", __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, text=True, encoding="ascii",
        )  # fmt: skip
        assert process.stdout is not None
        process.stdout.readline()  # it is ready: its start does not count
        return process

    def _end(self) -> None:
        if self._process is None:
            return
        self._process.kill()
        with contextlib.suppress(OSError):
            self._process.communicate()
        self._process = None


# ------------------------------------------------------------------------------------------------- in the other process


def main() -> None:
    """Render templates until the input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if resource is not None:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    _tell("ready")
    for line in sys.stdin:
        _tell(_render(**json.loads(line)))


def _tell(value: Any) -> None:
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()


def _render(template: str, tokens: Mapping[str, Any], messages: Sequence[Any]) -> dict[str, str]:
    parts: list[str] = []
    size = 0
    try:
        made = _environment().from_string(template)
        for part in made.generate(messages=messages, add_generation_prompt=True, **tokens):
            size += len(part)
            if size > MAX_WRITTEN:
                return {"refused": f"it writes more than {MAX_WRITTEN:,} characters"}
            parts.append(part)
    except Exception as error:  # noqa: BLE001 (a template may do anything)
        return {"refused": str(error)[:500] or type(error).__name__}
    return {"text": "".join(parts)}


class _Generation(Extension):
    """`{% generation %}` marks what an assistant said, which changes nothing that is written."""

    tags = {"generation"}  # noqa: RUF012 (as jinja has it)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> jinja2.Environment:
    """jinja as chat templates expect it, sandboxed."""

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    made = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    made.filters["tojson"] = tojson
    made.globals["raise_exception"] = refuse
    made.globals["strftime_now"] = lambda form: datetime.now().astimezone().strftime(form)
    return made


if __name__ == "__main__":
    main()
