"""Where a model runs: one answer for every command that takes a device."""

from __future__ import annotations

import torch

from weftlm.errors import ConfigError

AUTO = "auto"


def choose_device(asked: str = AUTO) -> torch.device:
    """The device that is asked for; `auto`: the CUDA device of this process where there is one, else the CPU.

    Raises:
        ConfigError: it is no device, or this machine has none like it.
    """
    if asked == AUTO:
        asked = f"cuda:{torch.cuda.current_device()}" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(asked)
    except (RuntimeError, TypeError, ValueError):
        raise ConfigError(f"device is {asked!r}; allowed: auto, cpu, cuda, cuda:1") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device is {asked!r} and PyTorch finds no CUDA device here; use auto or cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device is {asked!r} and this machine has {torch.cuda.device_count()}, counted from 0")
    return device
