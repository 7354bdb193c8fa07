"""Files and folders: whole or not there, gone at once, checked when read, whatever kills a process in between."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from support.faults import Killed, dead_process, flip, host, killing

from weftlm.errors import CheckpointError, DataError
from weftlm.files import (
    SEAL,
    check_sealed,
    read_object,
    remove,
    room,
    seal,
    sweep,
    whole_folder,
    write_object,
    write_whole,
)  # fmt: skip


def folder_at(place: Path) -> Path:
    """A folder with files and a folder in it."""
    (place / "inner").mkdir(parents=True)
    (place / "a.bin").write_bytes(bytes(range(200)))
    (place / "inner" / "b.json").write_text('{"x": 1}')
    return place


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


@pytest.mark.parametrize("step", range(12))
def test_a_removed_folder_is_whole_or_gone_at_every_step(tmp_path: Path, step: int) -> None:
    whole = names(folder_at(tmp_path / "run"))
    try:
        with killing(step):
            remove(tmp_path / "run")
    except Killed:
        assert not (tmp_path / "run").exists() or names(tmp_path / "run") == whole
    remove(tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("step", range(14))
def test_a_new_folder_is_whole_or_not_there_at_every_step(tmp_path: Path, step: int) -> None:
    def make() -> None:
        with whole_folder(tmp_path / "model", "model") as making:
            (making / "a.bin").write_bytes(b"1")
            (making / "inner").mkdir()
            write_whole(making / "inner" / "b.json", "{}")

    try:
        with killing(step):
            make()
    except Killed:
        if not (tmp_path / "model").exists():
            make()
    check_sealed(tmp_path / "model", "")
    assert names(tmp_path / "model") == {"a.bin", "inner", "inner/b.json", SEAL}


def test_what_dead_processes_left_is_swept_and_nothing_else(tmp_path: Path) -> None:
    dead = dead_process()
    for name in (f".model.{dead}@{host()}.writing", f".data.{dead}@{host()}.removing"):
        folder_at(tmp_path / name)
    kept = {f".model.{os.getppid()}@{host()}.writing", f".model.{dead}@elsewhere.writing", ".hidden", "model"}
    for name in kept:
        folder_at(tmp_path / name)
    sweep(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == kept


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda folder: flip(folder / "a.bin", 100), "a.bin was altered"),
        (lambda folder: (folder / "a.bin").write_bytes(b"short"), "a.bin has 5 bytes, 200"),
        (lambda folder: (folder / "inner" / "b.json").unlink(), "b.json is missing"),
        (lambda folder: (folder / "adapter_config.json").write_text("{}"), "adapter_config.json was added"),
        (lambda folder: flip(folder / SEAL, 30), SEAL),
        (lambda folder: (folder / SEAL).write_text("{"), f"{SEAL} cannot be read"),
    ],
)
def test_a_sealed_folder_names_what_was_done_to_it(tmp_path: Path, damage: Callable[[Path], None], named: str) -> None:
    folder = folder_at(tmp_path / "model")
    seal(folder)
    (folder / ".DS_Store").write_text("of a file browser")
    (folder / "README.md").write_text("notes")
    check_sealed(folder, "make it again")
    damage(folder)
    with pytest.raises(DataError, match=named) as caught:
        check_sealed(folder, "make it again")
    assert "make it again" in str(caught.value)


def test_every_altered_byte_of_an_object_is_noticed_or_changes_nothing(tmp_path: Path) -> None:
    value = {"worst": 0.123456789, "rows": {"a": [1, 2], "b": None}, "name": "größe"}
    path = tmp_path / "fit.json"
    write_object(path, value)
    assert read_object(path, "fit again") == value
    data = path.read_bytes()
    for place in range(len(data)):
        path.write_bytes(data)
        flip(path, place)
        try:
            found = read_object(path, "fit again")
        except DataError:
            continue
        assert found is not None
        assert {key: found[key] for key in value} == value


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EFBIG, "File too large"),
        RuntimeError("I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_says_where_and_how_much(tmp_path: Path, error: Exception) -> None:
    with (
        pytest.raises(CheckpointError, match=r"run/model.* full.*5\.0 MB needed.* MB free"),
        room(tmp_path / "run" / "model", 5_000_000),
    ):
        raise error
    with pytest.raises(ValueError, match="something else"), room(tmp_path):
        raise ValueError("something else")


def test_a_folder_that_cannot_be_filled_leaves_nothing(tmp_path: Path) -> None:
    def fill() -> None:
        with whole_folder(tmp_path / "model", "model") as making:
            (making / "a").write_text("a")
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(CheckpointError, match="full"):
        fill()
    assert not list(tmp_path.iterdir())
