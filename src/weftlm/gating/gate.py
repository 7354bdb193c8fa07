"""The contract of a gate: what it sees of a sequence, and the log-weights over experts it answers with.

    pi_g(x) = sum_k g(x, k) q_k(x)              sum_k g(x, k) = 1

A gate is a frozen value: a configuration and named tensors. `log_weights` is a pure function of them, so that fitting,
averaging, saving and moving to a device need nothing of the gate's own. A sequence-level gate (`causal` False) sees the
whole sequence and answers BE: it scores, but cannot generate until it is distilled. A causal gate answers BTE, the
weights at t from tokens before t alone; the model it makes is normalised by construction.

A new gate is one file in this folder: a config section and a class registered by name. `linear.py` is a good one to
read.
"""

from __future__ import annotations

import dataclasses
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from weftlm.errors import CheckpointError, ConfigError, NumericsError, reason
from weftlm.files import parse_json, room, whole
from weftlm.gating.config import GateConfig, gate_config, gates

FLOOR = 50.0
"""Nats per token below the best expert at which a score is clipped: -inf becomes a number a gate can weigh."""

Need = Literal["sequence", "points", "tokens"]
"""What a gate can ask of `Features`."""

_FIELDS: Mapping[Need, tuple[str, str]] = {
    "sequence": ("sequence_BF", "make them with `sequence_features`"),
    "points": ("points_B", "give each sequence's place in the enumerated support"),
    "tokens": ("logp_BTE", "give the experts' log-probability of every token"),
}
"""The field of each, and what to do where it is missing."""


@dataclass(frozen=True, eq=False)
class Features:
    """What gates may see of B sequences; a field no gate asks for may be None.

    Attributes:
        count: B; taken from the other fields where it is not given.
        sequence_BF: Features of whole sequences, finite. They must not give the length away (`sequence_features`).
        names: One name per column of `sequence_BF`.
        points_B: Place of each sequence in an enumerated support, int64.
        logp_BTE: Log-probability of every token under every expert given those before it, nats; -inf is legal.
        mask_BT: True for real tokens; None: all are. Padding is worth nothing to any gate.
    """

    count: int = -1
    sequence_BF: Tensor | None = None
    names: tuple[str, ...] = ()
    points_B: Tensor | None = None
    logp_BTE: Tensor | None = None
    mask_BT: Tensor | None = None

    def __post_init__(self) -> None:
        sizes = {name: len(tensor) for name, tensor in self._tensors().items()}
        if self.count >= 0:
            sizes["count"] = self.count
        if len(set(sizes.values())) != 1:
            raise ConfigError(f"features of how many sequences? {sizes or 'nothing came'}; give one count throughout")
        object.__setattr__(self, "count", next(iter(sizes.values())))
        if self.sequence_BF is not None:
            if self.sequence_BF.ndim != 2 or len(self.names) not in (0, self.sequence_BF.shape[1]):
                raise ConfigError(
                    f"sequence features have shape {tuple(self.sequence_BF.shape)} and {len(self.names)} names; they "
                    "need two axes, sequences x features, and a name per feature or none"
                )
            if not bool(torch.isfinite(self.sequence_BF).all()):
                raise NumericsError("sequence features hold NaN or infinity; `sequence_features` clips -inf scores")
        if self.logp_BTE is not None:
            if self.logp_BTE.ndim != 3:
                raise ConfigError(f"token scores have shape {tuple(self.logp_BTE.shape)}; they need B x T x E")
            if self.logp_BTE.numel() and not bool(self.logp_BTE.max() < math.inf):  # NaN where an entry is
                raise NumericsError("token scores hold NaN or +inf; a log-probability is finite or -inf")
        if self.mask_BT is not None and (self.logp_BTE is None or self.mask_BT.shape != self.logp_BTE.shape[:2]):
            raise ConfigError(f"the mask has shape {tuple(self.mask_BT.shape)}; it must be that of the tokens, B x T")

    def _tensors(self) -> dict[str, Tensor]:
        found = {name: getattr(self, name) for name in ("sequence_BF", "points_B", "logp_BTE", "mask_BT")}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def __len__(self) -> int:
        return self.count

    def rows(self, index_B: Tensor) -> Features:
        """The features of some of the sequences."""
        chosen: dict[str, Any] = {name: tensor[index_B] for name, tensor in self._tensors().items()}
        return dataclasses.replace(self, count=len(index_B), **chosen)

    @staticmethod
    def joined(parts: list[Features]) -> Features:
        """The features of several sets in order; all must carry the same fields, and tokens the same T.

        Raises:
            ConfigError: they do not.
        """
        kinds = {(tuple(part._tensors()), part.names) for part in parts}
        if len(kinds) != 1:
            raise ConfigError(
                f"the sets of sequences carry different features: {sorted(kinds)}; make them all in the same way"
            )
        try:
            names, sets = parts[0]._tensors(), [part._tensors() for part in parts]
            joined: dict[str, Any] = {name: torch.cat([each[name] for each in sets]) for name in names}
        except RuntimeError as error:
            raise ConfigError(
                f"the sets' features differ in width or length: {reason(error)}; pad and mask tokens"
            ) from error
        return Features(count=sum(part.count for part in parts), names=parts[0].names, **joined)

    def get(self, need: Need, gate: str) -> Tensor:
        """The tensor a gate needs.

        Raises:
            ConfigError: it is not there.
        """
        field, cure = _FIELDS[need]
        found: Tensor | None = getattr(self, field)
        if found is None:
            raise ConfigError(f"gate {gate!r} needs {field}, and the features have none; {cure}")
        return found


@dataclass(frozen=True, eq=False)
class Gate(ABC):
    """A gate as a value.

    Attributes:
        Config: Configuration section.
        causal: Whether weights at t come from tokens before t alone, and `log_weights` answers BTE.
        needs: Fields of `Features` it reads.
        learned: Names of the tensors that fitting moves; the others are constants of the fit.
        shrunk: Names of those that are pulled to 0 where data are few (`FitConfig.ridge`).
        config: Section it was made with.
        experts: E.
        tensors: Parameters and constants by name.
    """

    config: GateConfig
    experts: int
    tensors: Mapping[str, Tensor]

    Config: ClassVar[type[GateConfig]]
    causal: ClassVar[bool] = False
    needs: ClassVar[frozenset[Need]] = frozenset()
    learned: ClassVar[tuple[str, ...]] = ()
    shrunk: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        if self.experts < 1:
            raise ConfigError(f"a gate over {self.experts} experts; it needs one at least")

    @classmethod
    @abstractmethod
    def init(cls, config: Any, experts: int, features: Features, seed: int) -> Self:
        """The gate before fitting; uniform over the experts unless its class says otherwise.

        Args:
            config: `Config` of the class.
            experts: E.
            features: Features of all sequences of its fit, for standardisation and two sizes: axis F is as long as
                `sequence_BF` is wide, axis X as there are points. All others follow from config and experts.
            seed: Random seed of its parameters.
        """

    @abstractmethod
    def log_weights(self, features: Features) -> Tensor:
        """log g: BE, or BTE of a causal gate; nats, logsumexp over E is 0.

        Raises:
            ConfigError: the features lack what the gate needs, or do not fit it.
        """

    def replaced(self, tensors: Mapping[str, Tensor]) -> Self:
        """The same gate with some tensors exchanged."""
        return dataclasses.replace(self, tensors={**self.tensors, **tensors})

    def to(self, device: torch.device | str, dtype: torch.dtype = torch.float32) -> Self:
        """The same gate elsewhere, or in another float type (float32 or better)."""
        moved = {name: t.to(device, dtype if t.is_floating_point() else t.dtype) for name, t in self.tensors.items()}
        return self.replaced(moved)


State = Mapping[str, Tensor]
"""What a causal gate carries from token to token: tensors whose first axis is B."""


class CausalGate(Gate):
    """A gate that is driven token by token, as generation does; its weights at t come from tokens before t alone."""

    causal: ClassVar[bool] = True
    needs: ClassVar[frozenset[Need]] = frozenset({"tokens"})

    @abstractmethod
    def begin(self, batch: int) -> State:
        """The state before the first token of B sequences."""

    @abstractmethod
    def current(self, state: State) -> Tensor:
        """log gamma_BE for the next token."""

    @abstractmethod
    def advance(self, state: State, logp_BE: Tensor, mask_B: Tensor | None = None) -> State:
        """The state after a token.

        Args:
            state: State before it.
            logp_BE: Log-probability every expert gave it, nats.
            mask_B: False for padding, which changes nothing.
        """

    def log_weights(self, features: Features) -> Tensor:
        logp_BTE, mask_BT = self.tokens(features)
        rows = [self.current(state) for state in self.states(logp_BTE, mask_BT)]
        return torch.stack(rows, dim=1) if rows else logp_BTE

    def states(self, logp_BTE: Tensor, mask_BT: Tensor | None) -> Iterator[State]:
        """The state before each token."""
        state: State = {name: tensor.to(logp_BTE.device) for name, tensor in self.begin(len(logp_BTE)).items()}
        for t in range(logp_BTE.shape[1]):
            yield state
            state = self.advance(state, logp_BTE[:, t], None if mask_BT is None else mask_BT[:, t])

    def all_states(self, logp_BTE: Tensor, mask_BT: Tensor | None) -> State:
        """The states before all tokens (one at least), B x T before their other axes."""
        states = list(self.states(logp_BTE, mask_BT))
        return {name: torch.stack([state[name] for state in states], dim=1) for name in states[0]}

    @property
    def top(self) -> int | None:
        """Experts per token the gate gives weight to (`prefix`); None for all."""
        found: int | None = getattr(self.config, "top", None)
        return found

    def with_prior(self, prior_E: Tensor) -> Self:
        """The same gate with these weights before the first token; a gate without such a constant as it is."""
        return self

    def tokens(self, features: Features) -> tuple[Tensor, Tensor | None]:
        """Scores and mask of the tokens, checked against the number of experts."""
        logp_BTE = features.get("tokens", self.config.gate)
        if logp_BTE.shape[2] != self.experts:
            raise ConfigError(
                f"token scores of {logp_BTE.shape[2]} experts came to gate {self.config.gate!r} over {self.experts}"
            )
        return logp_BTE, features.mask_BT


def init_gate(value: str | Mapping[str, Any] | GateConfig, experts: int, features: Features, seed: int = 0) -> Gate:
    """A gate before fitting.

    Raises:
        ConfigError: as `gate_config`, or the features lack what the gate needs.
    """
    config = gate_config(value)
    cls = gates[config.gate]
    for need in sorted(cls.needs):
        features.get(need, config.gate)
    return cls.init(config, experts, features, seed)


# -- on disk ------------------------------------------------------------------------------------------------------


def save_gate(gate: Gate, path: str | Path) -> None:
    """Write a gate as one safetensors file.

    Raises:
        CheckpointError: the disk is full or not writable.
    """
    write_tensors(Path(path), "gate", gate.tensors, gate_facts(gate))


def load_gate(path: str | Path) -> Gate:
    """Read a gate back, exact to the last bit.

    Raises:
        CheckpointError: the file is missing or torn, or its tensors do not fit its configuration.
    """
    tensors, facts = read_tensors(Path(path), "gate")
    try:
        return restored_gate(facts, tensors)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} holds no gate this version can use: {reason(error)}") from error


def gate_facts(gate: Gate) -> dict[str, Any]:
    """What a file says of a gate beside its tensors, as JSON values; see `restored_gate`."""
    return {"config": gate.config.model_dump(mode="json"), "experts": gate.experts}


def restored_gate(facts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Gate:
    """The gate of a file's facts (config, experts) and tensors.

    Raises:
        ConfigError: names or shapes of the tensors are not those of a new gate of that configuration.
    """
    config, experts = gate_config(facts["config"]), int(facts["experts"])
    axes = {
        axis: size
        for name, tensor in tensors.items()
        for axis, size in zip(name.rpartition("_")[2], tensor.shape, strict=False)
    }
    seen = Features(
        sequence_BF=torch.zeros(1, axes.get("F", 1)),
        points_B=torch.tensor([axes.get("X", 1) - 1]),
        logp_BTE=torch.zeros(1, 1, experts),
    )
    new = gates[config.gate].init(config, experts, seen, 0)
    expected, found = ({name: tuple(each.shape) for name, each in of.items()} for of in (new.tensors, tensors))
    if expected != found:
        wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
        told = "; ".join(f"{name}: {found.get(name, 'none')} for {expected.get(name, 'none')}" for name in wrong)
        raise ConfigError(f"the tensors do not fit the configuration of gate {config.gate!r} ({told})")
    return gates[config.gate](config, experts, tensors)


def write_tensors(path: Path, kind: str, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Write tensors and JSON facts as one safetensors file; the path holds the old file or the new one, never a half.

    Raises:
        CheckpointError: the disk is full or not writable.
    """
    plain = {name: tensor.detach().to("cpu").contiguous().clone() for name, tensor in tensors.items()}
    data = save(plain, metadata={"weftlm": json.dumps({"kind": kind, "format": 1, **facts})})
    try:
        with room(path.parent, len(data)):
            path.parent.mkdir(parents=True, exist_ok=True)
            with whole(path, sync=True) as temporary:
                temporary.write_bytes(data)
    except OSError as error:
        raise CheckpointError(
            f"{kind} cannot be written to {path}: {reason(error)}; check space and permission"
        ) from error


def read_tensors(path: Path, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `write_tensors` wrote.

    Raises:
        CheckpointError: the file is missing or torn, or holds something else.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            facts = parse_json((file.metadata() or {}).get("weftlm", "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is missing, torn or not safetensors: {reason(error)}") from error
    found = (facts.get("kind"), facts.get("format")) if isinstance(facts, dict) else (None, None)
    if found != (kind, 1):
        raise CheckpointError(f"{path} holds {found[0] or 'something else'} in format {found[1]}; expected {kind} in 1")
    return tensors, facts
