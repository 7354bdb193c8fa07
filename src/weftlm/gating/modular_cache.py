"""What a gated model carries from token to token: keys and values per expert, the gate's state, how far each has read.

A slot is a place in the timeline of a batch: the token every sequence has there, padding included. The store of a
backbone has one row per (expert, sequence), and each row has its slots at the same places, filled as far as the expert
has read. A pass takes some rows and the slots from `start` on; attention sees a row's own earlier slots and nothing
else, so that a row which did not run for a while catches up in one pass, exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from weftlm.errors import ConfigError
from weftlm.gating.gate import State

ROOM = 32
"""Slots added at least when a store grows."""


class SlotStore:
    """Keys and values of one backbone's rows.

    Attributes:
        keys: Keys by layer, rows x heads x slots x width.
        values: Values, likewise.
    """

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    def select(self, rows_X: Tensor) -> None:
        """Take rows, in any order and number."""
        self.rows = len(rows_X)
        for held in (self.keys, self.values):
            held[:] = [tensor.index_select(0, rows_X.to(tensor.device)) for tensor in held]

    def write(self, layer: int, rows_X: Tensor | slice, start: int, keys: Tensor, values: Tensor) -> tuple[Tensor, ...]:
        """Store a layer's new keys and values; all of the rows' so far, rows x heads x slots x width."""
        end = start + keys.shape[2]
        found = []
        for held, new in ((self.keys, keys), (self.values, values)):
            if layer == len(held):
                held.append(new.new_empty(self.rows, new.shape[1], end + ROOM, new.shape[3]))
            if end > held[layer].shape[2]:
                old = held[layer]
                room = max(end + ROOM, old.shape[2] + old.shape[2] // 2)
                held[layer] = old.new_empty(*old.shape[:2], room, old.shape[3])
                held[layer][:, :, : old.shape[2]] = old
            held[layer][rows_X, :, start:end] = new.to(held[layer].dtype)
            found.append(held[layer][:, :, :end][rows_X])
        return tuple(found)


class SlotWindow(Cache):
    """Some rows of a store as the cache of one forward pass, whose new slots begin at `start`."""

    def __init__(self, store: SlotStore, rows_X: Tensor | slice, start: int) -> None:
        super().__init__(layers=[])
        self._store, self._rows, self._start = store, rows_X, start

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write a layer's new slots and give all of them."""
        keys, values = self._store.write(layer_idx, self._rows, self._start, key_states, value_states)
        return keys, values

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Slots before this pass."""
        return self._start

    def get_mask_sizes(self, query_length: Any, layer_idx: int) -> tuple[int, int]:
        """Slots attention sees, from slot 0 on."""
        count = len(query_length) if isinstance(query_length, Tensor) and query_length.ndim else int(query_length)
        return self._start + count, 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: a cache of any length."""
        return -1


class ModularCache(Cache):
    """One KV cache per expert on one timeline of slots, and a gate's state beside them.

    Args:
        backbones: Number of experts of each backbone.
        batch: B.
        begin: Function that gives the gate's first state for B sequences.
        device: Device of tokens and states.

    Attributes:
        stores: Keys and values, one store per backbone; row m B + b is expert m of the backbone on sequence b.
        ids_BS: Tokens so far, padding included.
        real_BS: False for padding.
        anchor: Slots that all experts have read.
        anchored: State of the gate after them, exact.
        logq_EBV: Log-probabilities of each expert after the last of them.
        state: State of the gate now; the mixture's own scores stand in for those of inactive experts.
        active_BM: Experts that run until all catch up; None where all run always.
        logq_BMV: Log-probabilities of those after the last slot.
        mixed_BV: Log-probabilities last served.
    """

    def __init__(
        self, backbones: Sequence[int], batch: int, begin: Callable[[int], State], device: torch.device | str = "cpu"
    ) -> None:
        super().__init__(layers=[])
        self._facts = tuple(backbones), begin, device
        self.stores = [SlotStore(size * batch) for size in backbones]
        self.ids_BS = torch.empty((batch, 0), dtype=torch.int64, device=device)
        self.real_BS = torch.empty((batch, 0), dtype=torch.bool, device=device)
        self.all_real = True
        self.logq_EBV: Tensor | None = None
        self.active_BM: Tensor | None = None
        self.logq_BMV: Tensor | None = None
        self.mixed_BV: Tensor | None = None
        self.settle({name: tensor.to(device) for name, tensor in begin(batch).items()})

    @property
    def length(self) -> int:
        """Slots so far."""
        return self.ids_BS.shape[1]

    def append(self, ids_BK: Tensor, real_BK: Tensor) -> None:
        """Take new slots up."""
        self.ids_BS = torch.cat([self.ids_BS, ids_BK], dim=1)
        self.real_BS = torch.cat([self.real_BS, real_BK], dim=1)
        self.all_real = self.all_real and bool(real_BK.all())

    def settle(self, state: State) -> None:
        """All experts have read all slots, and the gate their scores."""
        self.anchored, self.state, self.anchor = state, state, self.length

    def first_scores(self, experts_M: Tensor) -> Tensor:
        """What experts said of the token in the first slot that not all have read, MB1; 0 of the very first."""
        if self.logq_EBV is None:
            return torch.zeros(len(experts_M), self.batch_size, 1, device=self.ids_BS.device)
        token_B1 = self.ids_BS[:, self.anchor : self.anchor + 1]
        return self.logq_EBV[experts_M].gather(2, token_B1.expand(len(experts_M), -1, -1))

    def counted(self, logp_BE: Tensor, slot: int) -> tuple[Tensor, Tensor]:
        """The gate's input for a slot's token, and whether it counts: logp_BE and mask_B; the first is context."""
        before_B = self.real_BS[:, slot - 1] if slot else torch.zeros_like(self.real_BS[:, 0])
        mask_B = self.real_BS[:, slot] & before_B
        return torch.where(mask_B[:, None], logp_BE, 0.0), mask_B

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Slots so far."""
        return self.length

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: a cache of any length."""
        return -1

    @property
    def batch_size(self) -> int:
        """B."""
        return self.ids_BS.shape[0]

    @property
    def is_croppable(self) -> bool:
        """A gate's state sums up the text; no token of it can be taken back."""
        return False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take sequences in another order, as beams do."""

        def pick(tensor: Tensor, axis: int = 0) -> Tensor:
            return tensor.index_select(axis, beam_idx.to(tensor.device))

        before, chosen = self.batch_size, beam_idx.cpu()
        for store in self.stores:
            experts = store.rows // before
            store.select((torch.arange(experts)[:, None] * before + chosen[None]).flatten())
        self.logq_EBV = None if self.logq_EBV is None else pick(self.logq_EBV, 1)
        for name in ("ids_BS", "real_BS", "active_BM", "logq_BMV", "mixed_BV"):
            held = getattr(self, name)
            setattr(self, name, None if held is None else pick(held))
        self.anchored = {name: pick(tensor) for name, tensor in self.anchored.items()}
        self.state = {name: pick(tensor) for name, tensor in self.state.items()}

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some sequences, by number or by a mask."""
        self.reorder_cache(indices.nonzero()[:, 0] if indices.dtype == torch.bool else indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Take every sequence so many times in a row."""
        self.reorder_cache(torch.arange(self.batch_size).repeat_interleave(repeats))

    def reset(self) -> None:
        """Forget all tokens."""
        backbones, begin, device = self._facts
        ModularCache.__init__(self, backbones, self.batch_size, begin, device)

    def crop(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused: see `is_croppable`.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(
            "a gated model follows the text token by token and cannot take tokens back; assisted and speculative "
            "generation are not supported: use greedy decoding, sampling or beams"
        )


def rows_of(index_X: Tensor) -> Tensor | slice:
    """A slice where rows follow one another, so that nothing need be copied; else the rows."""
    first, count = int(index_X[0]), len(index_X)
    if int(index_X[-1]) - first + 1 == count and bool((index_X == torch.arange(first, first + count)).all()):
        return slice(first, first + count)
    return index_X
