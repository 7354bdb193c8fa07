"""The command line, called in the test's own process or in a fork of it."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from weftlm.cli.main import main


class Call:
    """`call("experts", "list", ..., code=0)`: what the command prints, JSON where it was asked for; stderr on failure.

    Attributes:
        err: what the last command said on stderr.
    """

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self.capsys = capsys
        self.err = ""

    def __call__(self, *arguments: str | Path, code: int = 0) -> Any:
        self.capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            main([str(argument) for argument in arguments])
        printed = self.capsys.readouterr()
        self.err = printed.err
        assert (caught.value.code or 0) == code, printed.err
        if code:
            return printed.err
        return json.loads(printed.out) if "--json" in arguments else printed.out


def start(folder: Path, *arguments: str | Path) -> int:
    """A command in a process of its own, forked from this one so that nothing is imported again; its number."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.chdir(folder)
            # The parent's native thread pool is gone after a fork.
            torch.set_num_threads(torch.get_num_threads())
            with open(os.devnull, "w") as out, contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
                main([str(argument) for argument in arguments])
            code = 0
        except SystemExit as ended:
            code = int(ended.code or 0)
        finally:
            os._exit(code)
    return child
