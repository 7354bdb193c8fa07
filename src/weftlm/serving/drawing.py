"""From a model's logits to the next token: temperature, top-p, seed and log-probabilities of one request."""

from __future__ import annotations

import secrets

import torch
from torch import Tensor

from weftlm.errors import NumericsError
from weftlm.serving.request import Sampling, Token


class Draw:
    """The draws of one request.

        p(v) proportional to exp(log p_model(v) / temperature) over the smallest set of most likely tokens whose
        probability is at least top_p

    One number uniform on [0, 1) is drawn per token, from a generator of the request's own, so that neither other
    requests nor earlier settings change a draw. Everything is computed on the CPU for one request at a time, at the
    same shapes whatever else runs.

    Args:
        sampling: Settings of the request.
    """

    def __init__(self, sampling: Sampling) -> None:
        self._sampling = sampling
        self._generator = torch.Generator()
        self._generator.manual_seed(secrets.randbits(63) if sampling.seed is None else sampling.seed)

    def __call__(self, logits_V: Tensor) -> Token:
        """Draw a token, its text not yet known.

        Args:
            logits_V: Logits of the model, up to a constant; any float type, on any device.
        Raises:
            NumericsError: They hold NaN, or no finite number at all.
        """
        logits_V = logits_V.to(device="cpu", dtype=torch.float32)
        best = logits_V.max()
        if not bool(best.isfinite()):
            raise NumericsError(f"the model's highest logit is {float(best)}; a token cannot be drawn from that")
        sampling = self._sampling
        greedy = sampling.temperature == 0
        if greedy and sampling.logprobs is None:
            return Token(int(logits_V.argmax()))
        logp_V = torch.log_softmax(logits_V, dim=-1)
        token = int(logits_V.argmax()) if greedy else self._sample(logp_V)
        if sampling.logprobs is None:
            return Token(token)
        return Token(token, "", float(logp_V[token]), most_likely(logp_V, sampling.logprobs))

    def _sample(self, logp_V: Tensor) -> int:
        scaled_V = logp_V.double()
        p_V = torch.softmax((scaled_V - scaled_V.max()) / self._sampling.temperature, dim=-1)
        uniform = torch.rand((), generator=self._generator, dtype=torch.float64)
        if self._sampling.top_p == 1.0:
            return _place(p_V, uniform)
        sorted_V, ids_V = p_V.sort(descending=True, stable=True)
        # As few as reach top_p: those before which the sum is still short of it.
        kept = int((sorted_V.cumsum(0) - sorted_V < self._sampling.top_p).sum())
        return int(ids_V[_place(sorted_V[: max(kept, 1)], uniform)])


def _place(weight_V: Tensor, uniform: Tensor) -> int:
    """The first place at which the cumulative weight exceeds a part `uniform` of all of it."""
    sum_V = weight_V.cumsum(0)
    place = int(torch.searchsorted(sum_V, uniform * sum_V[-1], right=True))
    return place if place < len(sum_V) else int(weight_V.nonzero()[-1])  # the product may round up to the sum


def most_likely(logp_V: Tensor, count: int) -> tuple[tuple[int, float], ...]:
    """The most likely tokens, (id, nats), most likely first and the lowest id first among equals."""
    count = min(count, len(logp_V))
    if count == 0:
        return ()
    lowest = logp_V.topk(count).values[-1]
    ids = (logp_V >= lowest).nonzero()[:, 0]
    order = logp_V[ids].sort(descending=True, stable=True)
    return tuple(zip(ids[order.indices[:count]].tolist(), order.values[:count].tolist(), strict=True))
