"""The best weights of a training so far, by held-out loss."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from weftlm.errors import CheckpointError, reason
from weftlm.files import parse_json, whole


class BestWeights:
    """The weights of the lowest loss so far: in one file that is replaced whole, or in memory.

    A training that goes on from a checkpoint older than the file offers the same weights again, and they are passed
    over as no better.

    Args:
        path: the file; None keeps the weights in memory.
        identity: JSON value that says what is trained; a file of another training is overwritten.
    """

    def __init__(self, path: Path | None, identity: Any) -> None:
        self.path, self.identity = path, parse_json(json.dumps(identity))
        self._kept: tuple[dict[str, Any], dict[str, Tensor]] = {}, {}
        self.loss: float = self._read()[0].get("loss", math.inf)

    def offer(self, step: int, loss: float, parameters: Mapping[str, Tensor]) -> None:
        """Keep these weights if their loss is lower than every one before.

        Raises:
            CheckpointError: the file cannot be written.
        """
        if not loss < self.loss:
            return
        facts = {"identity": self.identity, "step": step, "loss": loss}
        tensors = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in parameters.items()}
        if self.path is None:
            self._kept = facts, tensors
        else:
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with whole(self.path) as temporary:
                    save_file(tensors, temporary, {"weftlm": json.dumps(facts)})
            except (OSError, SafetensorError) as error:
                raise CheckpointError(
                    f"the best weights could not be written to {self.path}: {reason(error)}"
                ) from error
        self.loss = loss

    def restore(self, parameters: Mapping[str, Tensor]) -> int:
        """Put the best weights back; returns their step.

        Raises:
            CheckpointError: there are none of this training.
        """
        facts, tensors = self._read()
        if not facts:
            raise CheckpointError(f"{self.path} is missing or of another run; remove its folder to train again")
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(tensors[name])
        return int(facts["step"])

    def _read(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What is kept of this training, step and loss first; nothing where there is nothing."""
        if self.path is None or not self.path.exists():
            return self._kept
        try:
            with safe_open(self.path, framework="pt") as file:
                facts = parse_json(file.metadata()["weftlm"])
                ours = facts["identity"] == self.identity
                return facts if ours else {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{self.path} holds no weights of this library: {reason(error)}; remove it"
            ) from error
