"""What a gated model carries from token to token: KV caches per expert, the gate's state, and how far each has read."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from weftlm.errors import ConfigError
from weftlm.gating.gate import State
from weftlm.gating.slots import SlotStore


def check_refresh_every(refresh_every: int | None) -> None:
    """Refuse a number of tokens between catch-ups that is none.

    Raises:
        ConfigError: it is not positive.
    """
    if refresh_every is not None and refresh_every < 1:
        raise ConfigError(f"refresh_every is {refresh_every}; it must be 1 or more, or None for never")


def catch_up_due(refresh_every: int | None, anchor: int, length: int) -> bool:
    """Whether all experts read what they missed with the newest of `length` slots, `anchor` of which all have read.

    After as many slots as all have read, at most `refresh_every`: a text without a prompt is read by all at its slots
    1, 2, 4, 8, .., when a few tokens still decide whom it belongs to.
    """
    return refresh_every is not None and length - anchor >= min(refresh_every, anchor)


class ModularCache(Cache):
    """One KV cache per expert on one timeline of slots, and a gate's state beside them.

    Attributes:
        stores: keys and values, one store per backbone; row m B + b is expert m of the backbone on sequence b.
        ids_BS: tokens so far, padding included.
        real_BS: False for padding.
        done_EB: slots each expert has read of each sequence; on the CPU.
        logq_EBV: each expert's log-probabilities after the last slot it has read.
        mixed_BV: log-probabilities last served.
        anchor: slot up to which every expert's score is known and has entered `anchored`.
        anchored: the gate's state there, exact.
        state: the gate's state now; the mixture's own scores stand in for those of experts that did not run.
        known_BLE: scores of the tokens from `anchor` on, NaN where the expert has not run.
        served_BL: the mixture's own scores of the same tokens.
    """

    def __init__(
        self, experts: int, backbones: list[int], batch: int, device: torch.device, begin: Callable[[int], State]
    ) -> None:
        super().__init__(layers=[])
        self._facts = experts, backbones, device, begin
        self._clear(batch)

    def _clear(self, batch: int) -> None:
        """Hold no slots of so many sequences."""
        experts, backbones, device, begin = self._facts
        self.stores = [SlotStore(size * batch) for size in backbones]
        self.ids_BS = torch.empty((batch, 0), dtype=torch.int64, device=device)
        self.real_BS = torch.empty((batch, 0), dtype=torch.bool, device=device)
        self.done_EB = torch.zeros((experts, batch), dtype=torch.int64)
        self.all_real = True
        self.logq_EBV: Tensor | None = None
        self.mixed_BV: Tensor | None = None
        self.known_BLE = torch.empty((batch, 0, experts), device=device)
        self.served_BL = torch.empty((batch, 0), device=device)
        self.settle({name: tensor.to(device) for name, tensor in begin(batch).items()})

    @property
    def batch(self) -> int:
        """B."""
        return self.ids_BS.shape[0]

    @property
    def length(self) -> int:
        """Slots so far."""
        return self.ids_BS.shape[1]

    def append(self, ids_BK: Tensor, real_BK: Tensor) -> None:
        """New slots; the first one's scores are known from experts that have read all before it."""
        before = self.length
        batch, count = ids_BK.shape
        known_BKE = self.known_BLE.new_full((batch, count, len(self.done_EB)), math.nan)
        served_BK = self.served_BL.new_zeros((batch, count))
        if self.logq_EBV is not None and self.mixed_BV is not None and count:
            first_B1 = ids_BK[:, :1]
            score_EB = self.logq_EBV.gather(2, first_B1.expand(len(self.done_EB), -1, -1))[..., 0]
            current_EB = (self.done_EB == before).to(score_EB.device)
            known_BKE[:, 0] = torch.where(current_EB, score_EB, math.nan).T
            served_BK[:, 0] = self.mixed_BV.gather(1, first_B1)[:, 0]
        self.ids_BS = torch.cat([self.ids_BS, ids_BK], dim=1)
        self.real_BS = torch.cat([self.real_BS, real_BK], dim=1)
        self.all_real = self.all_real and bool(real_BK.all())
        self.known_BLE = torch.cat([self.known_BLE, known_BKE], dim=1)
        self.served_BL = torch.cat([self.served_BL, served_BK], dim=1)

    def scores(self, slot: int) -> tuple[Tensor, Tensor]:
        """The gate's input for a slot's token, and whether it counts: logp_BE and mask_B."""
        place = slot - self.anchor
        if slot == 0:
            return torch.zeros_like(self.known_BLE[:, place]), torch.zeros_like(self.real_BS[:, 0])
        mask_B = self.real_BS[:, slot] & self.real_BS[:, slot - 1]
        known_BE = self.known_BLE[:, place]
        logp_BE = torch.where(known_BE.isnan(), self.served_BL[:, place, None], known_BE)
        return torch.where(mask_B[:, None], logp_BE, 0.0), mask_B

    def settle(self, state: State) -> None:
        """Every score up to now is known and in the state."""
        self.anchored: State = state
        self.state: State = state
        self.anchor = self.length
        self.known_BLE, self.served_BL = self.known_BLE[:, :0], self.served_BL[:, :0]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Slots so far."""
        return self.length

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """None."""
        return -1

    @property
    def batch_size(self) -> int:
        """B."""
        return self.batch

    @property
    def is_croppable(self) -> bool:
        """A gate's state sums up the text; no token of it can be taken back."""
        return False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take sequences in another order, as beams do."""

        def pick(tensor: Tensor, axis: int = 0) -> Tensor:
            return tensor.index_select(axis, beam_idx.to(tensor.device))

        before, chosen = self.batch, beam_idx.cpu()
        for store in self.stores:
            experts = store.rows // before
            store.select((torch.arange(experts)[:, None] * before + chosen[None]).flatten())
        self.ids_BS, self.real_BS, self.done_EB = pick(self.ids_BS), pick(self.real_BS), pick(self.done_EB, 1)
        self.logq_EBV = None if self.logq_EBV is None else pick(self.logq_EBV, 1)
        self.mixed_BV = None if self.mixed_BV is None else pick(self.mixed_BV)
        self.known_BLE, self.served_BL = pick(self.known_BLE), pick(self.served_BL)
        self.anchored = {name: pick(tensor) for name, tensor in self.anchored.items()}
        self.state = {name: pick(tensor) for name, tensor in self.state.items()}

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some sequences, by number or by a mask."""
        self.reorder_cache(indices.nonzero()[:, 0] if indices.dtype == torch.bool else indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Take every sequence so many times in a row."""
        self.reorder_cache(torch.arange(self.batch).repeat_interleave(repeats))

    def reset(self) -> None:
        """Forget all tokens."""
        self._clear(self.batch)

    def crop(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused: see `is_croppable`.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(
            "a gated model follows the text token by token and cannot take tokens back; assisted and speculative "
            "generation are not supported: use greedy decoding, sampling or beams"
        )
