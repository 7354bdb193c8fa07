"""Gated models in shared passes: every request's experts side by side, every request's gate by itself.

The experts' passes are ragged passes (`ragged.py`) with a place for each expert of each request. Gates are small and
are asked request by request, at the shapes they have alone. Sparse models (`top_m` below the number of experts) share
passes while the experts a token needs have read all before it; a token at which one catches up, or all do, has the
model's own pass to itself. When that is depends on the request alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from weftlm.experts.low_rank import Rows
from weftlm.gating.experts import Backbone
from weftlm.gating.gate import State
from weftlm.gating.modular_cache import ModularCache, catch_up_due
from weftlm.gating.modular_lm import ModularLM
from weftlm.pipeline.any_model import OpenModel
from weftlm.serving.ragged import Attention, Lane, RaggedCache, ragged_pass


@dataclass
class Plait:
    """What `RaggedGated` keeps of a request: the model's own cache."""

    cache: ModularCache | None = None


@dataclass(frozen=True)
class _Turn:
    """A request's part in a shared pass.

    Attributes:
        row: its place.
        cache: its cache, the new token in it.
        state: its gate's, with the new token's scores.
        logw_1E: log gate weights for the next token.
        chosen: the experts to run, in the pool's order.
    """

    row: int
    cache: ModularCache
    state: State
    logw_1E: Tensor
    chosen: tuple[int, ...]


class RaggedGated:
    """Gated models, one pass per backbone for all running requests; see the top of this file.

    Args:
        opened: the model.
        rows: requests of every pass, wanted or not; a multiple of 8.
    """

    together = True

    def __init__(self, opened: OpenModel, rows: int) -> None:
        self._model: ModularLM = opened.model
        self._device = opened.model.device
        self._rows = rows
        self._backbones = [each for each in self._model.pool.backbones if isinstance(each, Backbone)]
        self._experts = len(self._model.pool)
        self._attention = Attention([backbone.model for backbone in self._backbones])
        # Where each expert is: its backbone and its place there.
        self._place = {
            expert: (number, place)
            for number, backbone in enumerate(self._backbones)
            for place, expert in enumerate(backbone.experts)
        }

    def begin(self) -> Plait:
        return Plait()

    def read(self, state: Plait, ids: Sequence[int]) -> Tensor:
        output = self._model(
            input_ids=torch.tensor([ids], device=self._device),
            past_key_values=state.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        assert isinstance(output.past_key_values, ModularCache)
        state.cache = output.past_key_values
        logits_V: Tensor = output.logits[0, -1]
        return logits_V

    def step(self, states: Sequence[Plait], tokens: Sequence[int]) -> Sequence[Tensor]:
        found: dict[int, Tensor] = {}
        turns: list[_Turn] = []
        for row, (state, token) in enumerate(zip(states, tokens, strict=True)):
            assert state.cache is not None
            turn = self._turn(row, state.cache, token)
            if turn is None:
                found[row] = self.read(state, [token])
            else:
                turns.append(turn)
        if turns:
            logq = self._pass(turns, tokens)
            for turn in turns:
                found[turn.row] = self._mixed(turn, logq)
        return [found[row] for row in range(len(states))]

    def close(self) -> None:
        self._attention.restore()

    def _turn(self, row: int, cache: ModularCache, token: int) -> _Turn | None:
        """Tell a request's gate of its token; None, and nothing is changed, where the model has a pass of its own."""
        model, gate = self._model, self._model.gate
        ids_11 = torch.tensor([[token]], device=self._device)
        if model.sparse and catch_up_due(model.config.refresh_every, cache.anchor, cache.length + 1):
            return None
        assert cache.logq_EBV is not None
        assert cache.mixed_BV is not None
        current_E = cache.done_EB[:, 0] == cache.length
        said_E = cache.logq_EBV[:, 0, token]
        # What a sleeping expert would have said is stood in for by the mixture's own, as the model does.
        logp_1E = torch.where(current_E.to(said_E.device), said_E, cache.mixed_BV[0, token])[None]
        state = gate.advance(cache.state, logp_1E, torch.ones(1, dtype=torch.bool, device=self._device))
        logw_1E = gate.current(state)
        chosen = tuple(range(self._experts))
        if model.sparse:
            chosen = tuple(sorted(logw_1E[0].topk(model.config.top_m).indices.tolist()))
            if not bool(current_E[list(chosen)].all()):
                return None
        cache.append(ids_11, torch.ones_like(ids_11, dtype=torch.bool))
        return _Turn(row, cache, state, logw_1E, chosen)

    def _pass(self, turns: Sequence[_Turn], tokens: Sequence[int]) -> dict[tuple[int, int], Tensor]:
        """Log-probabilities after each request's token by each expert that runs, by (row, expert), V."""
        found: dict[tuple[int, int], Tensor] = {}
        ids_B, places_B = torch.zeros((2, self._rows), dtype=torch.int64)
        for turn in turns:
            ids_B[turn.row] = tokens[turn.row]
            places_B[turn.row] = turn.cache.length - 1
        for number, backbone in enumerate(self._backbones):
            if self._model.sparse:
                depth, rows, lanes, wanted = self._sparse(turns, number)
            else:
                depth, rows, lanes, wanted = self._dense(turns, number, backbone)
            if not lanes:
                continue
            cache = RaggedCache(lanes)
            with ragged_pass(cache):
                logits_XV = backbone.run(
                    rows,
                    ids_B.repeat(depth)[:, None].to(self._device),
                    cache=cache,
                    position_ids=places_B.repeat(depth)[:, None].to(self._device),
                )[:, -1]
            logq_XV = torch.log_softmax(logits_XV.float(), dim=-1)
            found |= {key: logq_XV[row] for key, row in wanted.items()}
        return found

    def _dense(self, turns: Sequence[_Turn], number: int, backbone: Backbone) -> _Layout:
        """All experts of a backbone: block after block of `rows` requests."""
        size = len(backbone)
        lanes = [
            Lane(slice(turn.row, None, self._rows), turn.cache.stores[number], slice(0, size), turn.cache.length - 1)
            for turn in turns
        ]
        wanted = {
            (turn.row, expert): place * self._rows + turn.row
            for place, expert in enumerate(backbone.experts)
            for turn in turns
        }
        return size, Rows(one=0) if size == 1 else Rows(blocks=tuple(range(size))), lanes, wanted

    def _sparse(self, turns: Sequence[_Turn], number: int) -> _Layout:
        """The chosen experts of a backbone: as many blocks as may be chosen, each request's first in the first."""
        depth = min(self._model.config.top_m, len(self._backbones[number]))
        place_X = torch.zeros(depth * self._rows, dtype=torch.int64)
        lanes, wanted = [], {}
        for turn in turns:
            here = [expert for expert in turn.chosen if self._place[expert][0] == number]
            for block, expert in enumerate(here):
                place, row = self._place[expert][1], block * self._rows + turn.row
                place_X[row] = place
                store, start = turn.cache.stores[number], turn.cache.length - 1
                lanes.append(Lane(slice(row, row + 1), store, slice(place, place + 1), start))
                wanted[turn.row, expert] = row
        # Always sequence by sequence: which experts meet in a pass must not decide how it is computed.
        return depth, Rows(each=place_X.to(self._device)), lanes, wanted

    def _mixed(self, turn: _Turn, logq: dict[tuple[int, int], Tensor]) -> Tensor:
        """Log-probabilities of the mixture, V, kept in the request's cache as the model itself keeps them."""
        cache, sparse = turn.cache, self._model.sparse
        assert cache.logq_EBV is not None
        logq_MV = torch.stack([logq[turn.row, expert] for expert in turn.chosen])
        chosen_M = torch.tensor(turn.chosen)
        cache.done_EB[chosen_M] = cache.length
        if sparse:
            cache.logq_EBV[chosen_M.to(self._device), 0] = logq_MV
            cache.state = turn.state
            logw_M = torch.log_softmax(turn.logw_1E[0, chosen_M.to(self._device)], dim=-1).float()
        else:
            cache.logq_EBV = logq_MV[:, None]
            cache.settle(turn.state)
            logw_M = turn.logw_1E[0].float()
        mixed_V = logq_MV[0] if len(turn.chosen) == 1 else torch.logsumexp(logq_MV + logw_M[:, None], dim=0)
        cache.mixed_BV = mixed_V[None]
        return mixed_V


_Layout = tuple[int, Rows, list[Lane], dict[tuple[int, int], int]]
"""Blocks of a pass, who runs through what, the lanes, and the row of each (request, expert)."""
