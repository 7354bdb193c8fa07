"""The contract of a router: adapted modules, forward passes, and what is kept beside a KV cache.

A router is one object for a whole model. Before each forward pass of the model it gets the inputs (`begin`); then every
adapted module asks it, in the order of execution, for the experts of each of its tokens (`route`). The experts that
adapt a module are listed on its `TargetModule`.

A new router is one file in this folder: a config section and a class registered by name. `phatgoose.py` is a good one
to read.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Self

from torch import Tensor, nn

from weftlm.errors import ConfigError, ExpertError
from weftlm.experts.expert import Expert
from weftlm.experts.files import check_gate, check_statistics
from weftlm.routing.config import RouterConfig, router_config, routers

Need = Literal["gate", "statistics"]
"""What a router reads of an expert beside its adapter."""


@dataclass(frozen=True)
class Routing:
    """The experts of each token of one module.

        y = W u + sum_k weights[..., k] scale_k B_k A_k u + background D u          k over the chosen experts

    with D the mean of all the pool's updates, (1/N) sum_z scale_z B_z A_z, cut to the router's `background_rank`.

    Attributes:
        experts_BTK: int64, places in the pool's list of experts; distinct within a token.
        weights_BTK: float32; 0 where a place is not used.
        background_BT: float32, weight of the mean of all experts; None where the router never uses it.
    """

    experts_BTK: Tensor
    weights_BTK: Tensor
    background_BT: Tensor | None = None


@dataclass(frozen=True)
class TargetModule:
    """One adapted module of the base model.

    Attributes:
        name: the module's name in the base model.
        index: place among the targets, in the model's own order.
        experts: places of the experts that adapt it, increasing.
        width: I, of its input.
        reads_encoder: its tokens are the encoder's: the encoder itself, and keys and values of cross-attention.
    """

    name: str
    index: int
    experts: tuple[int, ...]
    width: int
    reads_encoder: bool = False


class Memory:
    """State of a router between the forward passes of one generation, beside the KV cache.

    Every tensor has the batch first, so that beams can be reordered with the cache.

    Attributes:
        tensors: Tensors by name.
        follows_tokens: Whether it sums up the tokens read so far, so that none of them can be taken back.
    """

    def __init__(self, *, follows_tokens: bool = False) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.follows_tokens = follows_tokens

    def select(self, rows_B: Tensor) -> None:
        """Take rows, as `reorder_cache` does with keys and values."""
        self.tensors = {name: value.index_select(0, rows_B.to(value.device)) for name, value in self.tensors.items()}

    def expanded(self, batch: int) -> Memory:
        """The same for a batch in which every row was repeated (beams, several samples per prompt)."""
        other = Memory(follows_tokens=self.follows_tokens)
        for name, value in self.tensors.items():
            times, rest = divmod(batch, value.shape[0])
            if rest:
                raise ConfigError(
                    f"routing was decided for {value.shape[0]} sequences and the model is now given {batch}; pass the "
                    "past_key_values or encoder_outputs that belong to them"
                )
            other.tensors[name] = value if times == 1 else value.repeat_interleave(times, dim=0)
        return other


@dataclass
class Call:
    """One forward pass of the model.

    Attributes:
        input_ids_BT: Token ids of the pass (of the encoder, for encoder-decoder models); None for embeddings.
        mask_BT: True for real tokens, False for padding.
        decisive_BT: Tokens a sequence-level decision may read; a part of the mask.
        memory: Memory of the router beside the cache.
        continues: Whether the pass continues a cached prefix.
        decisions: What the router keeps within this pass.
        record: Function called with every routing, for traces.
        owner: Module whose forward began the pass.
    """

    input_ids_BT: Tensor | None
    mask_BT: Tensor
    decisive_BT: Tensor
    memory: Memory
    continues: bool = False
    decisions: dict[Any, Any] = field(default_factory=dict)
    record: Callable[[TargetModule, Routing], None] | None = None
    owner: nn.Module | None = None


class Router(nn.Module, ABC):
    """Chooses experts. Buffers move with the model and keep their dtype; nothing is trained.

    What a router can do, by which laws, serving and export go:

    Attributes:
        Config: Section of the router.
        needs: What it reads of every expert beside the adapter.
        supports_encoder_decoder: Whether it serves encoder-decoder models.
        reads_ahead: Whether it decides once per text, by all of the prompt, so that a text read in pieces is not routed
            as in one pass.
        by_place: Whether its choice depends on an expert's place in the pool, and not on the expert alone.
        config: Section as given.
        names: Names of the experts, in the pool's order.
    """

    Config: ClassVar[type[RouterConfig]]
    needs: ClassVar[frozenset[Need]] = frozenset()
    supports_encoder_decoder: ClassVar[bool] = True
    reads_ahead: ClassVar[bool] = False
    by_place: ClassVar[bool] = False

    def __init__(self, config: RouterConfig, experts: Sequence[Expert], targets: Sequence[TargetModule]) -> None:
        super().__init__()
        self.config = config
        self.names = tuple(expert.name for expert in experts)

    @property
    def static_weights_E(self) -> Tensor | None:
        """Weights that are the same for every token and module, or None; then nothing need be routed at run time."""
        return None

    @property
    def background_rank(self) -> int:
        """Rank to which the mean of all experts is cut for `Routing.background_BT`; 0: never used."""
        return 0

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Follow the model to a device, but not to another dtype: routing is decided in float32."""
        moved: Self = super()._apply(lambda tensor: tensor.to(fn(tensor).device), recurse)  # type: ignore[no-untyped-call]
        return moved

    def begin(self, call: Call) -> None:
        """Read the inputs of a forward pass, once before it."""

    @abstractmethod
    def route(self, target: TargetModule, u_BTI: Tensor, call: Call) -> Routing:
        """Choose the experts of each token of a module.

        Args:
            target: The module.
            u_BTI: Its input.
            call: The forward pass.
        """


def build_router(
    section: Mapping[str, Any] | RouterConfig | str, experts: Sequence[Expert], targets: Sequence[TargetModule]
) -> Router:
    """The router a section describes, over a pool of experts.

    Raises:
        ConfigError: see `router_config`.
        ExpertError: an expert lacks what the router reads, or has it for other modules, naming it.
    """
    config = router_config(section)
    cls = routers[config.router]
    for need in sorted(cls.needs):
        lacking = [expert.name for expert in experts if getattr(expert, need) is None]
        if lacking:
            usable = [
                name
                for name in routers
                if all(getattr(expert, each) is not None for each in routers[name].needs for expert in experts)
                and not any(field.is_required() for field in routers[name].Config.model_fields.values())
            ]
            raise ExpertError(
                f"router {config.router!r} needs a {need} and {', '.join(lacking)} "
                f"{'has' if len(lacking) == 1 else 'have'} none; make one with `weftlm experts gate`, leave the expert "
                f"out, or use a router that these experts have all it needs for: {', '.join(usable)}"
            )
    for expert in experts:
        if "gate" in cls.needs and expert.gate is not None:
            check_gate(expert.lora, expert.gate)
        if "statistics" in cls.needs and expert.statistics is not None:
            check_statistics(expert.lora, expert.statistics)
    return cls(config, experts, targets)


def buffer_name(target: TargetModule) -> str:
    """A target's name as a buffer may be called."""
    return target.name.replace(".", "/")
