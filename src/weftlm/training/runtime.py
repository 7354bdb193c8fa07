"""Settings tuned for the machine a run finds itself on, each with its reason.

The choices rest on measurements: on CPUs without fast bf16 matrix units autocast is an order of magnitude slower and
compilation gains nothing for small models; glibc returns large tensors to the system after every step, which costs page
faults that a higher threshold avoids.
"""

from __future__ import annotations

import ctypes
import os
import platform
import subprocess
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import Any

import torch

from weftlm import __version__
from weftlm.models.device import choose_device
from weftlm.threads import fix_threads, start_following, usable_cores
from weftlm.training.config import TrainingConfig

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3
"""glibc's mallopt parameter numbers (malloc.h)."""

MALLOC_GAINS_BELOW_PARAMETERS = 8_000_000


@dataclass(frozen=True)
class Choice:
    """One setting chosen for this machine, and why."""

    setting: str
    value: str
    reason: str


@dataclass(frozen=True)
class Runtime:
    """What a run uses: `bf16` autocast, compilation, device, and the reasons for the log."""

    device: torch.device
    bf16: bool
    compile: bool
    choices: tuple[Choice, ...]


def choose_runtime(config: TrainingConfig, *, parameters: int, processes: int = 1) -> Runtime:
    """Choose device, precision, compilation, threads and malloc settings, and apply the process-wide ones.

    Args:
        config: the `training` section; explicit settings win over measured defaults.
        parameters: model size.
        processes: training processes on this machine.
    """
    device = choose_device(config.device)
    gpu = device.type == "cuda"
    bf16, compiled = config.bf16(fast=gpu and torch.cuda.is_bf16_supported()), config.compiled(gpu=gpu)
    asked = "asked for"
    choices = [
        Choice("device", device.type, asked if config.device == "cpu" else "what torch finds here"),
        Choice(
            "precision", "bf16" if bf16 else "fp32",
            asked if config.precision != "auto" else "fast bf16 matrix units" if bf16 else "no fast bf16 here",
        ),
        Choice(
            "compile", str(compiled).lower(),
            asked if config.compile != "auto" else "pays on GPUs" if compiled
            else "gains nothing for small models on a CPU and costs its start-up",
        ),
    ]  # fmt: skip
    if processes > 1:
        how = "each process holds the model whole"
        if config.sharded(processes):
            how = "asked for; each process holds its part of the model"
        choices.append(Choice("parallel", config.parallel, how))
    elif config.parallel == "fsdp2":
        choices.append(Choice("parallel", "none", "there is one process"))
    if device.type == "cpu":
        choices.append(_set_threads(config.threads, processes))
        choices.append(_set_malloc(parameters))
    else:
        torch.set_float32_matmul_precision("high")
        choices.append(Choice("float32 matmul", "high", "TF32 for what stays in fp32"))
    return Runtime(device, bf16, compiled, tuple(choices))


def _set_threads(asked: int | None, processes: int) -> Choice:
    if asked is not None:
        fix_threads(asked)
        return Choice("threads", str(asked), "asked for")
    if "OMP_NUM_THREADS" in os.environ:
        return Choice("threads", str(torch.get_num_threads()), "OMP_NUM_THREADS")
    most = max(1, usable_cores() // processes)
    return Choice("threads", str(start_following(most)), f"up to {most}, as other processes leave cores free")


def _set_malloc(parameters: int) -> Choice:
    if platform.libc_ver()[0] != "glibc":
        return Choice("malloc", "default", "not glibc")
    if parameters >= MALLOC_GAINS_BELOW_PARAMETERS:
        return Choice("malloc", "default", "no gain at this model size")
    libc = ctypes.CDLL(None)
    for parameter, value in ((M_MMAP_THRESHOLD, 2**31 - 1), (M_TRIM_THRESHOLD, 2**31 - 1), (M_TOP_PAD, 256 << 20)):
        libc.mallopt(parameter, value)
    return Choice("malloc", "keep freed memory", "spares a page fault per large tensor and step")


def environment(seed: int, runtime: Runtime, fingerprints: dict[str, str]) -> dict[str, Any]:
    """What run.json records: versions, git commit, seeds, fingerprints and the choices above."""
    packages = ("torch", "transformers", "accelerate", "peft", "tokenizers", "numpy", "scikit-learn")
    return {
        "weftlm": __version__,
        "python": platform.python_version(),
        "packages": {name: metadata.version(name) for name in packages},
        "git": git_commit(),
        "platform": f"{platform.system()} {platform.machine()}",
        "seed": seed,
        "fingerprints": fingerprints,
        "runtime": [asdict(choice) for choice in runtime.choices],
    }


def git_commit() -> str | None:
    """The commit of the working folder's repository with `+changes` when it is dirty; None outside one."""
    command = ["git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+changes"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
