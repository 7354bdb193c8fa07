"""One function decides where a model runs, and every door that takes a device asks it."""

from __future__ import annotations

import pytest
import torch
import typer

from weftlm.cli.main import commands
from weftlm.errors import ConfigError
from weftlm.integrations import lm_eval
from weftlm.models.device import choose_device
from weftlm.training.config import TrainingConfig


def test_auto_takes_what_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device().type == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert choose_device() == torch.device("cuda:0")
    assert choose_device("cpu").type == "cpu"
    with pytest.raises(ConfigError, match="has 1, counted from 0"):
        choose_device("cuda:3")


@pytest.mark.parametrize("asked", ["gpu0", "", "cuda:x", "cuda"])
def test_what_is_no_device_here_is_refused(asked: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="device is"):
        choose_device(asked)


def test_every_option_called_device_is_auto() -> None:
    waiting, found = [commands()], []
    while waiting:
        command = waiting.pop()
        if hasattr(command, "list_commands"):
            context = typer.Context(command)
            waiting += [command.get_command(context, name) for name in command.list_commands(context)]
        found += [option.default for option in command.params if "--device" in option.opts]
    assert found
    assert set(found) == {"auto"}
    assert TrainingConfig(steps=1).device == "auto"


@pytest.mark.parametrize("handed", [None, "cuda", "cuda:0"])
def test_the_harness_default_is_no_crash_without_cuda(
    handed: str | None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert lm_eval._device(handed) == torch.device("cpu")
    assert ("running on the CPU" in caplog.text) == (handed is not None)
