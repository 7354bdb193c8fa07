"""The command line, called in the test's own process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

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
