"""Resumable work on a gate, shared by fits and distillations: a state as a value, a step of Adam, and the loop."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar, get_type_hints

import torch
from pydantic import TypeAdapter
from torch import Tensor
from torch.optim import Adam

from weftlm import interrupt
from weftlm.errors import CheckpointError, WeftError, reason
from weftlm.gating.gate import Gate, gate_facts, read_tensors, restored_gate, write_tensors
from weftlm.threads import follow_load

_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True, eq=False)
class GateState:
    """Everything work on a gate needs to continue as if it had never stopped; draws depend on seed and step alone.

    Attributes:
        config: Settings of the work, its `steps` among them.
        step: Steps taken.
        gate: Gate as it is.
        moments: State of Adam, `exp_avg.NAME` and `exp_avg_sq.NAME` of each learned tensor; empty at first.
        history: Measurements so far.
    """

    config: Any
    step: int
    gate: Gate
    moments: Mapping[str, Tensor]
    history: tuple[Any, ...]

    kind: ClassVar[str]

    @property
    @abstractmethod
    def finished(self) -> bool:
        """Whether the work ends here, before its last step."""

    def save(self, path: str | Path) -> None:
        """Write the state as one safetensors file: tensors by field (`mean.logits_E`), all else as facts.

        Raises:
            CheckpointError: the disk is full or not writable.
        """
        facts = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        tensors = {f"gate.{name}": tensor for name, tensor in self.gate.tensors.items()}
        for field, value in list(facts.items()):
            if isinstance(value, Mapping):
                tensors |= {f"{field}.{name}": tensor for name, tensor in facts.pop(field).items()}
        facts["gate"], facts["config"] = gate_facts(self.gate), self.config.model_dump(mode="json")
        facts["history"] = [dataclasses.asdict(line) for line in self.history]
        write_tensors(Path(path), self.kind, tensors, facts)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a state back, exact to the last bit.

        Raises:
            CheckpointError: the file is missing, torn, or of another version.
        """
        tensors, facts = read_tensors(Path(path), cls.kind)
        types = get_type_hints(cls)

        def group(field: str) -> dict[str, Tensor]:
            return {key.removeprefix(f"{field}."): each for key, each in tensors.items() if key.startswith(f"{field}.")}

        try:
            for field in ("config", "history"):
                facts[field] = TypeAdapter(types[field]).validate_python(facts[field])
            facts["gate"] = restored_gate(facts["gate"], group("gate"))
            return cls(**{field.name: facts.get(field.name, group(field.name)) for field in dataclasses.fields(cls)})
        except (KeyError, TypeError, ValueError, WeftError) as error:
            raise CheckpointError(
                f"{path} holds no {cls.kind} this version can continue: {reason(error)}; start again"
            ) from error


State = TypeVar("State", bound=GateState)


def run_steps(
    state: State,
    until: int | None,
    every: int,
    step: Callable[[State], State],
    report: Callable[[State], State],
    on_progress: Callable[[Any, State], None] | None,
    on_stop: Callable[[State], None] | None,
) -> State:
    """Take the steps of the state's config, up to `until`, or until the state is finished.

    `report` adds a measurement to the history: after `every` steps and after the last of all. `on_progress` is called
    with each measurement and the state, `on_stop` with the state where the process is asked to stop, and then stops.
    """
    steps: int = state.config.steps
    with interrupt.safe_points() if on_stop is not None else nullcontext():
        while state.step < min(steps, steps if until is None else until) and not state.finished:
            follow_load()
            state = step(state)
            if state.step % every == 0 or state.step == steps:
                state = report(state)
                if on_progress is not None:
                    on_progress(state.history[-1], state)
            if on_stop is not None:
                interrupt.point(partial(on_stop, state))
    return state


def adam_step(
    gate: Gate, gradients: Mapping[str, Tensor], moments: Mapping[str, Tensor], *, step: int, lr: float
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """One step of PyTorch's Adam on a gate's learned tensors, after `step` steps: the moved tensors, the new moments.

    What is given is not written to; `moments` as in `GateState`.
    """
    moved = {name: gate.tensors[name].detach().clone() for name in gate.learned}
    if not moved:
        return moved, {}
    adam, after = Adam(moved.values(), lr=lr), dict[str, Tensor]()
    for name, tensor in moved.items():
        tensor.grad = gradients[name]
        held = {key: moments[f"{key}.{name}"].clone() if moments else torch.zeros_like(tensor) for key in _MOMENTS}
        adam.state[tensor] = {"step": torch.tensor(float(step)), **held}
        after |= {f"{key}.{name}": each for key, each in held.items()}
    adam.step()
    return {name: tensor.detach() for name, tensor in moved.items()}, after
