"""What is asked of an engine, how its tokens are drawn, and the events that answer it."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from weftlm.config import Section
from weftlm.errors import ConfigError, NumericsError

FinishReason = Literal["stop", "length", "timeout", "cancelled", "error"]


class Sampling(Section):
    """How tokens are drawn; a value out of range is a pydantic `ValidationError`, which is a ValueError.

    The same seed, prompt and model give the same tokens whatever else runs.
    """

    max_tokens: int = Field(16, ge=1, description="Maximum number of tokens to generate.")
    temperature: float = Field(1.0, ge=0, description="0 takes the most likely token, the lowest id among equals.")
    top_p: float = Field(1.0, gt=0, le=1, description="Probability of the smallest set of most likely tokens.")
    seed: int | None = Field(None, ge=-(1 << 63), lt=1 << 64, description="Random seed of the draw; None draws one.")
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = Field(
        (), description="Texts that end the answer and are not part of it."
    )
    logprobs: int | None = Field(None, ge=0, le=20, description="Most likely tokens reported for each; None for none.")
    ignore_eos: bool = Field(False, description="Whether generation goes on after the end-of-text token.")


@dataclass(frozen=True)
class Token:
    """A generated token.

    Attributes:
        id: Token id.
        text: Text it adds to the answer; empty while a character or a stop text is incomplete.
        logprob: Nats, of the model's own distribution, before temperature and top_p; None where not asked for.
        top: (token id, nats) of the most likely tokens, most likely first; empty where not asked for.
    """

    id: int
    text: str = ""
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Finished:
    """The end of an answer.

    Attributes:
        reason: `stop` (a stop text or end of text), `length`, `timeout`, `cancelled`, or `error`.
        text: Text held back until now, because it might have become a stop text.
        message: Description of the error; empty unless the reason is `error`.
    """

    reason: FinishReason
    text: str = ""
    message: str = ""


Event = Token | Finished


class QueueFullError(ConfigError):
    """The queue has no room for another request."""


class EngineClosedError(ConfigError):
    """The engine takes no more requests."""


class PromptError(ConfigError):
    """A prompt that the model cannot continue; `code` is a name for programs."""

    def __init__(self, message: str, code: str = "invalid_value") -> None:
        super().__init__(message)
        self.code = code


class Draw:
    """The draws of one request.

        p(v) proportional to exp(log p_model(v) / temperature) over the smallest set of most likely tokens whose
        probability is at least top_p

    Draws are made by a generator of the request's own, on the CPU, for one request at a time: neither other requests
    nor what they ask for change them.
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
        highest, count = float(logits_V.max()), self._sampling.logprobs
        if not abs(highest) < torch.inf:
            raise NumericsError(f"the model's highest logit is {highest}; a token cannot be drawn from that")
        token = self._sample(logits_V) if self._sampling.temperature else int(logits_V.argmax())
        if count is None:
            return Token(token)
        logp_V = torch.log_softmax(logits_V, dim=-1)
        top = logp_V.topk(min(count, len(logp_V)))
        likely = zip(top.indices.tolist(), top.values.tolist(), strict=True)
        return Token(token, "", float(logp_V[token]), tuple(likely))

    def _sample(self, logits_V: Tensor) -> int:
        scaled_V = (logits_V.double() - logits_V.max()) / self._sampling.temperature
        p_V = torch.softmax(scaled_V, dim=-1)
        if self._sampling.top_p < 1.0:
            sorted_V, ids_V = p_V.sort(descending=True, stable=True)
            # Those beyond top_p: the sum of those before them has reached it.
            p_V[ids_V[1:][sorted_V.cumsum(0)[:-1] >= self._sampling.top_p]] = 0.0
        return int(torch.multinomial(p_V, 1, generator=self._generator))
