"""Keys and values of many experts over one timeline: any of them, for any sequences, may run now and others later.

A slot is a place in the timeline of a batch: the token every sequence has there, padding included. The store of a
backbone has one row per (expert, sequence), and each row has its slots at the same places, filled as far as the expert
has read. A pass takes some rows and the slots from `start` on; attention sees a row's own earlier slots and nothing
else, so that a row which did not run for a while catches up in one pass, exactly.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

ROOM = 32
"""Slots added at least when a store grows."""


class SlotStore:
    """Keys and values of one backbone's rows.

    Attributes:
        keys: by layer, rows x heads x slots x width.
        values: likewise.
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

    def window(self, rows_X: Tensor | slice, start: int) -> SlotWindow:
        """What a pass reads and writes: some rows, new slots from `start` on."""
        return SlotWindow(self, rows_X, start)

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
    """Some rows of a store as the cache of one forward pass."""

    def __init__(self, store: SlotStore, rows_X: Tensor | slice, start: int) -> None:
        super().__init__(layers=[])
        self._store = store
        self._rows = rows_X
        self._start = start

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
        """None."""
        return -1


def rows_of(index_X: Tensor) -> Tensor | slice:
    """A slice where rows follow one another, so that nothing need be copied; else the rows."""
    first, count = int(index_X[0]), len(index_X)
    if int(index_X[-1]) - first + 1 == count and bool((index_X == torch.arange(first, first + count)).all()):
        return slice(first, first + count)
    return index_X
