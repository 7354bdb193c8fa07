"""Fixtures for tests that run the real command line."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from support.command_line import Call
from support.tiny_project import write_corpora, write_recipe


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Call:
    """The command line in this process, in the test's folder."""
    monkeypatch.chdir(tmp_path)
    return Call(capsys)


@pytest.fixture
def recipe(tmp_path: Path) -> Callable[..., Path]:
    """Write corpora and a recipe with some top-level sections replaced; returns the recipe's path."""
    write_corpora(tmp_path / "corpora")

    def write(changes: Mapping[str, Any] | None = None, name: str = "recipe.yaml") -> Path:
        return write_recipe(tmp_path, changes, name)

    return write
