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
from weftlm.training.checkpoint import Checkpoint, checkpoint_path, latest_checkpoint, load_checkpoint, save_checkpoint


def make(step: int) -> Checkpoint:
    return Checkpoint(
        step, {"model.w": torch.full((3,), float(step)), "model.n": torch.tensor(step)}, {"policy": {"x": 0.1}}
    )


def test_round_trip_is_exact(tmp_path: Path) -> None:
    weights = torch.randn(5, 7)
    state = {"weights": [0.1, 1 / 3, float("nan")], "name": "ä"}
    save_checkpoint(tmp_path, Checkpoint(3, {"model.w": weights}, state))
    loaded = latest_checkpoint(tmp_path)
    assert loaded is not None
    assert loaded.step == 3
    assert torch.equal(loaded.tensors["model.w"], weights)
    assert repr(loaded.state) == repr(state)


def test_no_folder_means_no_checkpoint(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path / "absent") is None
    assert latest_checkpoint(tmp_path) is None


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        save_checkpoint(tmp_path, make(step), keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000003", "step-00000004"]


@pytest.mark.parametrize("name", ["tensors.safetensors", "state.json", "digests.json"])
@pytest.mark.parametrize("harm", ["flip", "truncate", "delete", "empty"])
def test_a_harmed_checkpoint_is_passed_over_with_a_warning(
    tmp_path: Path, name: str, harm: str, caplog: pytest.LogCaptureFixture
) -> None:
    save_checkpoint(tmp_path, make(1))
    path = save_checkpoint(tmp_path, make(2)) / name
    data = path.read_bytes()
    if harm == "flip":
        middle = len(data) // 2
        path.write_bytes(data[:middle] + bytes([data[middle] ^ 0xFF]) + data[middle + 1 :])
    elif harm == "truncate":
        path.write_bytes(data[:-2])  # more than a newline at the end
    elif harm == "delete":
        path.unlink()
    else:
        path.write_bytes(b"")
    with caplog.at_level(logging.WARNING):
        loaded = latest_checkpoint(tmp_path)
    assert loaded is not None
    assert loaded.step == 1
    assert "step-00000002" in caplog.text
    assert "before it" in caplog.text


def test_when_none_is_whole_it_says_so(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, make(1))
    (path / "state.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"none of the 1 checkpoints .* is whole"):
        latest_checkpoint(tmp_path)


def test_leftovers_of_an_interrupted_write_are_ignored_and_removed(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, make(1))
    leftover = tmp_path / f".step-00000002.{dead_process()}@{host()}.writing"
    leftover.mkdir()
    (leftover / "state.json").write_text("{")
    loaded = latest_checkpoint(tmp_path)
    assert loaded is not None
    assert loaded.step == 1
    assert not leftover.exists()


def test_a_full_disk_leaves_the_last_good_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_checkpoint(tmp_path, make(1))

    def full(tensors: object, path: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(module, "save_file", full)
    with pytest.raises(CheckpointError, match="the disk is full"):
        save_checkpoint(tmp_path, make(2))
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    assert load_checkpoint(checkpoint_path(tmp_path, 1)).step == 1


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, make(1))
    save_checkpoint(tmp_path, Checkpoint(1, {"model.w": torch.zeros(1)}, {"policy": {}}))
    assert torch.equal(load_checkpoint(checkpoint_path(tmp_path, 1)).tensors["model.w"], torch.zeros(1))


def test_a_checkpoint_is_on_disk_before_it_has_its_name_and_before_the_old_one_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_checkpoint(tmp_path, make(1))
    flushed: dict[str, set[str]] = {}
    sync = files.sync_file

    def watched(path: Path) -> None:
        flushed[path.name] = {each.suffix for each in tmp_path.iterdir()}
        sync(path)

    monkeypatch.setattr(files, "sync_file", watched)
    save_checkpoint(tmp_path, make(1))
    unnamed, named = {"", ".writing"}, {"", ".removing"}
    expected = {"tensors.safetensors": unnamed, "state.json": unnamed, "digests.json": unnamed, tmp_path.name: named}
    assert flushed.items() >= expected.items()
