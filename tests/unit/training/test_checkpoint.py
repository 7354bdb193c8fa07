"""Checkpoints are whole or not there."""

from __future__ import annotations

import errno
import logging
import os
from pathlib import Path

import pytest
import torch
from support.faults import dead_process, host

from weftlm import files
from weftlm.errors import CheckpointError
from weftlm.training import checkpoint as module
from weftlm.training.checkpoint import Checkpoint, latest_checkpoint, save_checkpoint


def save(folder: Path, step: int) -> Path:
    return save_checkpoint(folder, Checkpoint(step, {"model.w": torch.full((3,), float(step))}, {"policy": {"x": 0.1}}))


def latest(folder: Path) -> Checkpoint:
    found = latest_checkpoint(folder)
    assert found is not None
    return found


def test_round_trip_is_exact_a_step_may_be_saved_again_and_the_newest_are_kept(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path / "absent") is latest_checkpoint(tmp_path) is None
    weights, state = torch.randn(5, 7), {"weights": [0.1, 1 / 3, float("nan")], "name": "ä"}
    for step in (1, 2, 3, 3):
        save(tmp_path, step)
    save_checkpoint(tmp_path, Checkpoint(3, {"model.w": weights}, state), keep=2)
    loaded = latest(tmp_path)
    assert (loaded.step, repr(loaded.state)) == (3, repr(state))
    assert torch.equal(loaded.tensors["model.w"], weights)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000002", "step-00000003"]


@pytest.mark.parametrize("name", ["tensors.safetensors", "state.json", "digests.json"])
@pytest.mark.parametrize("harm", ["flip", "truncate", "delete", "empty"])
def test_a_harmed_checkpoint_is_passed_over_with_a_warning(
    tmp_path: Path, name: str, harm: str, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path, 1)
    path = save(tmp_path, 2) / name
    data, middle = path.read_bytes(), path.stat().st_size // 2
    flipped = data[:middle] + bytes([data[middle] ^ 0xFF]) + data[middle + 1 :]
    harmed = {"flip": flipped, "truncate": data[:-2], "empty": b""}  # more than a newline at the end
    path.unlink()
    if harm in harmed:
        path.write_bytes(harmed[harm])
    with caplog.at_level(logging.WARNING):
        assert latest(tmp_path).step == 1
    assert "step-00000002" in caplog.text
    assert "before it" in caplog.text


def test_when_none_is_whole_it_says_so_and_leftovers_are_removed(tmp_path: Path) -> None:
    leftover = tmp_path / f".step-00000002.{dead_process()}@{host()}.writing"
    leftover.mkdir(parents=True)
    (leftover / "state.json").write_text("{")
    path = save(tmp_path, 1)
    assert latest(tmp_path).step == 1
    assert not leftover.exists()
    (path / "state.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"none of the 1 checkpoints .* is whole"):
        latest_checkpoint(tmp_path)


def test_a_full_disk_leaves_the_last_good_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1)

    def full(tensors: object, path: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(module, "save_file", full)
    with pytest.raises(CheckpointError, match="the disk is full"):
        save(tmp_path, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    assert latest(tmp_path).step == 1


def test_a_checkpoint_is_on_disk_before_it_has_its_name_and_before_the_old_one_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 1)
    flushed: dict[str, set[str]] = {}
    sync = files.sync_file

    def watched(path: Path) -> None:
        flushed[path.name] = {each.suffix for each in tmp_path.iterdir()}
        sync(path)

    monkeypatch.setattr(files, "sync_file", watched)
    save(tmp_path, 1)
    unnamed, named = {"", ".writing"}, {"", ".removing"}
    expected = {"tensors.safetensors": unnamed, "state.json": unnamed, "digests.json": unnamed, tmp_path.name: named}
    assert flushed.items() >= expected.items()
