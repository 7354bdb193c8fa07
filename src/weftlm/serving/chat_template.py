"""Chat templates are code from a model's folder: a process of its own renders them, limited in time and in memory.

Run as a program, this file reads a job from every line of its input and writes one line of result, both JSON.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import weakref
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

TEMPLATE_SECONDS = 2.0
MEMORY_BYTES = 1 << 30
"""Address space of the process."""
MAX_WRITTEN = 8_000_000
"""Maximum characters a template may write."""


class Renderer:
    """The process, started at the first template and again after it ended; one thread at a time may use it."""

    _process: subprocess.Popen[str] | None = None

    def render(self, template: str, messages: Sequence[Mapping[str, str]], tokens: Mapping[str, Any]) -> str:
        """What a chat template writes, in transformers' sandbox.

        Args:
            template: Text of the template.
            messages: `role`, `content` and perhaps `name` of each.
            tokens: Special tokens by name.
        Raises:
            ValueError: The template refuses the messages, fails on them, or needs too much memory.
            RuntimeError: It does not end in time, or ends the process.
        """
        process = self._process
        if process is None or process.poll() is not None:
            process = self._process = subprocess.Popen(  # -P: the folder of this file is no place to import from
                [sys.executable, "-P", __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL, text=True, encoding="ascii",
            )  # fmt: skip
            weakref.finalize(self, _end, process)
        assert process.stdin is not None
        assert process.stdout is not None
        job = {"template": template, "messages": messages, "tokens": tokens, "seconds": TEMPLATE_SECONDS}
        line = ""
        with suppress(OSError):
            process.stdin.write(json.dumps(job) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        if not line.endswith("\n"):
            _end(process)
            raise RuntimeError(
                f"the model's chat template did not end within {TEMPLATE_SECONDS:g} s, or ended its process"
            )
        result: dict[str, str] = json.loads(line)
        if "refused" in result:
            raise ValueError(result["refused"])
        return result["text"]


def _end(process: subprocess.Popen[str]) -> None:
    process.kill()
    with suppress(OSError, ValueError):
        process.communicate()


def main() -> None:
    """Render templates until the input ends: the program of the process."""
    import resource  # noqa: PLC0415  (POSIX alone has it)

    from transformers.utils.chat_template_utils import render_jinja_template  # noqa: PLC0415  (slow)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with suppress(OSError, ValueError):  # systems that do not limit it
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    for line in sys.stdin:
        job = json.loads(line)
        conversations, options = [job["messages"]], {"add_generation_prompt": True, **job["tokens"]}
        # No handler: the system ends the process, also within one long operation.
        signal.setitimer(signal.ITIMER_REAL, job["seconds"])
        try:
            written = render_jinja_template(conversations, chat_template=job["template"], **options)[0]
            text = "".join(written)  # a list with the text of the one conversation
            if len(text) > MAX_WRITTEN:
                raise ValueError(f"it writes more than {MAX_WRITTEN:,} characters")
            result = {"text": text}
        except Exception as error:  # noqa: BLE001 (a template may do anything)
            result = {"refused": str(error)[:500] or type(error).__name__}
        signal.setitimer(signal.ITIMER_REAL, 0)
        sys.stdout.write(json.dumps(result) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
