"""A command given a folder of another kind ends with one line that names it."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.command_line import Call

COMMANDS = [
    "train", "run", "status", "report", "experts list", "experts show", "route trace", "serve --port 0",
    "export --output new", "route build --to new",
]  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("folder", ["data", "empty", "./nowhere"])
def test_another_folder_is_named(
    command: str, folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "prepared.json").write_text("{}")
    words = [*command.split(), folder, *(["text"] if command == "route trace" else [])]
    said = Call(capsys)(*words, code=1 if command in ("experts list", "experts show", "route build --to new") else 2)
    assert said.startswith("weftlm: ")
    assert folder.removeprefix("./") in said
    assert said.strip().count("\n") == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "empty"]
