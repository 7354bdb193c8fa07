"""A causal gate over experts that read a text on: all of them, or the few the gate prefers while the others wait.

Dense, every expert runs on every token. Sparse (`top_m` = m < E), a token is predicted by the m experts of largest
gamma, their weights made to sum to 1 again:

- A pass over several tokens (a prompt, scoring a text) runs every expert in any case; the gate is exact at each of its
  positions and only the mixing is sparse. The m experts it prefers at the end are active from then on.
- Token by token, the active experts run. What an inactive expert would have said of a token is unknown, and the gate
  reads the mixture's own log-probability in its place, which keeps the inactive experts' weights in proportion to one
  another and in sum (sleeping experts: Freund, Schapire, Singer, Warmuth, STOC 1997).
- After `refresh_every` tokens every expert catches up: it reads, in one pass, all it missed. Its keys and values are
  exact, the gate's state is exact again, and the active experts are chosen anew; sooner while the text is short, when
  every token tells most: where s tokens have been read by all, after s more. 1: the gate is exact at every token, and
  what is served is what one pass over the text would give. None: never after the prompt.

The weights at t depend on tokens before t alone in every case, so the model stays a normalised causal one; between
refreshes it is an approximation of the dense one in its weights, never in an expert's own probabilities. With m = E the
two are the same computation.

An example: E = 3, m = 1, `refresh_every` 4, a prompt in slots 0 .. 3. A slot is read by an expert when it is new (r)
or later (c):

    slot        0 1 2 3 | 4 5 6 | 7 | 8
    expert 0    r r r r | r r r | r |             active after slot 3
    expert 1    r r r r | c c c | r | r           active after slot 7
    expert 2    r r r r | c c c | r |

After slot 3 `anchor` is 4 and `anchored` the gate's exact state. With slot 7 `catch_up_due` holds: all experts read
slots 4 to 7 (`_read_all`), the gate reads their scores of tokens 4 to 7 from `anchored` on, and `anchor` becomes 8.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from weftlm.errors import ConfigError
from weftlm.gating import experts as room
from weftlm.gating.gate import CausalGate
from weftlm.gating.modular_cache import ModularCache

PIECE = 64
"""Tokens per sequence that a long prompt is read by, at least."""
_LEAST = -1e4
"""Nats that stand for a log-weight of -inf."""

Run = Callable[[ModularCache, int, Tensor, Tensor, int, int], Tensor]
"""(cache, backbone, rows of its store, its expert of each, first, end) -> log-probabilities after each slot, XKV."""


def catch_up_due(refresh_every: int | None, anchor: int, length: int) -> bool:
    """Whether all experts read what they missed with the newest of `length` slots, `anchor` of which all have read.

    After as many slots as all have read, at most `refresh_every`: a text without a prompt is read by all at its slots
    1, 2, 4, 8, .., when a few tokens still decide whom it belongs to.
    """
    return refresh_every is not None and length - anchor >= min(refresh_every, anchor)


@dataclass(frozen=True, eq=False)
class ModularReader:
    """See the top of this file.

    Attributes:
        gate: Gate, where the experts are.
        backbones: Places of the experts in the pool, by backbone.
        run: Function that runs some rows of a backbone over some slots.
        vocab_size: V.
        top_m: m; None for all experts.
        refresh_every: Tokens after which every expert catches up, at the latest; None for never.
    """

    gate: CausalGate
    backbones: Sequence[Sequence[int]]
    run: Run
    vocab_size: int
    top_m: int | None
    refresh_every: int | None

    def __post_init__(self) -> None:
        if self.refresh_every is not None and self.refresh_every < 1:
            raise ConfigError(f"refresh_every is {self.refresh_every}; it must be 1 or more, or None for never")

    @property
    def sparse(self) -> bool:
        """Whether fewer than all experts run per token."""
        return self.top_m is not None and self.top_m < self.gate.experts

    def read(self, cache: ModularCache, ids_BK: Tensor, real_BK: Tensor, kept: int) -> Tensor:
        """Take new tokens up; log-probabilities after each of the last `kept` of them, BKV.

        Args:
            cache: What came before.
            ids_BK: New tokens.
            real_BK: False for padding.
            kept: Number of tokens answered for, from the end.
        """
        cache.append(ids_BK, real_BK)
        due = catch_up_due(self.refresh_every, cache.anchor, cache.length)
        some = self.sparse and ids_BK.shape[1] == 1 and cache.length > 1 and not due
        logp_BKV = self._read_some(cache) if some else self._read_all(cache, kept)
        cache.mixed_BV = logp_BKV[:, -1]
        return logp_BKV

    def weights(self, logw_XE: Tensor) -> Tensor:
        """The weights of the m preferred experts; -inf for the others."""
        if not self.sparse:
            return logw_XE
        chosen_XE = torch.zeros_like(logw_XE, dtype=torch.bool).scatter_(-1, self._preferred(logw_XE), True)
        return torch.log_softmax(logw_XE.masked_fill(~chosen_XE, -torch.inf), dim=-1)

    def _preferred(self, logw_XE: Tensor) -> Tensor:
        """The m experts of largest weight, in the pool's order, so that sums are the same whichever leads."""
        return logw_XE.topk(self.top_m or self.gate.experts, dim=-1).indices.sort(dim=-1).values

    def _read_all(self, cache: ModularCache, kept: int) -> Tensor:
        """Every expert reads all it has not; the gate's state becomes exact. Answers for the last `kept` slots."""
        end, anchor, batch = cache.length, cache.anchor, cache.batch_size
        answers: dict[int, Tensor] = {}
        scores: dict[int, Tensor] = {}
        for number, places in enumerate(self.backbones):
            places_X = torch.arange(len(places)).repeat_interleave(batch)
            step = max(PIECE, room.LOGITS // (len(places_X) * self.vocab_size))
            tail, said = [], [cache.first_scores(torch.tensor(places))]
            for first in range(anchor, end, step):
                last = min(end, first + step)
                logq_XKV = self.run(cache, number, torch.arange(len(places_X)), places_X, first, last)
                logq_MBKV = logq_XKV.unflatten(0, (len(places), batch))
                labels_BK = cache.ids_BS[:, first + 1 : last + 1]
                each_MBK1 = labels_BK.expand(len(places), -1, -1)[..., None]
                said.append(logq_MBKV[:, :, : labels_BK.shape[1]].gather(-1, each_MBK1)[..., 0])
                if last > end - kept:
                    tail.append(logq_MBKV[:, :, max(0, end - kept - first) :])
            answers |= dict(zip(places, torch.cat(tail, dim=2), strict=True))
            scores |= dict(zip(places, torch.cat(said, dim=2), strict=True))
        logq_EBKV = torch.stack([answers[expert] for expert in range(len(answers))])
        scores_BLE = torch.stack([scores[expert] for expert in range(len(scores))], dim=-1)
        state, rows = cache.anchored, []
        for slot in range(anchor, end):
            state = self.gate.advance(state, *cache.counted(scores_BLE[:, slot - anchor], slot))
            if slot >= end - kept:
                rows.append(self.gate.current(state))
        cache.logq_EBV = logq_EBKV[:, :, -1].clone()
        cache.settle(state)
        if self.sparse:
            cache.active_BM = self._preferred(rows[-1])
            experts_BEV = cache.logq_EBV.transpose(0, 1)
            cache.logq_BMV = torch.take_along_dim(experts_BEV, cache.active_BM[..., None], dim=1)
        logw_EBK = self.weights(torch.stack(rows, dim=1)).to(logq_EBKV.dtype).permute(2, 0, 1)
        return torch.logsumexp(logq_EBKV.add_(logw_EBK[..., None]), dim=0)

    def _read_some(self, cache: ModularCache) -> Tensor:
        """One new slot: the active experts run on it."""
        end, active_BM = cache.length, cache.active_BM
        assert active_BM is not None
        assert cache.logq_BMV is not None
        assert cache.mixed_BV is not None
        token_B1 = cache.ids_BS[:, -1:]
        own_BM = cache.logq_BMV.gather(2, token_B1[..., None].expand(-1, active_BM.shape[1], -1))[..., 0]
        told_BE = cache.mixed_BV.gather(1, token_B1).repeat(1, self.gate.experts).scatter(1, active_BM, own_BM)
        cache.state = self.gate.advance(cache.state, *cache.counted(told_BE, end - 1))
        for number, places in enumerate(self.backbones):
            found_MBM = active_BM.cpu() == torch.tensor(places)[:, None, None]
            place_X, row_X, rank_X = found_MBM.nonzero(as_tuple=True)
            if len(place_X):
                logq_XKV = self.run(cache, number, place_X * cache.batch_size + row_X, place_X, end - 1, end)
                cache.logq_BMV[row_X, rank_X] = logq_XKV[:, 0]
        logw_BM = self.gate.current(cache.state).gather(1, active_BM).clamp_min(_LEAST)
        logw_BM = torch.log_softmax(logw_BM, dim=-1).to(cache.logq_BMV.dtype)
        return torch.logsumexp(cache.logq_BMV + logw_BM[..., None], dim=1)[:, None]
