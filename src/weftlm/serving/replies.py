"""What clients receive, in OpenAI's form."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from weftlm.serving.request import FinishReason

Count = Annotated[int, Field(ge=0)]
Nats = Annotated[float, Field(ge=-9999, le=0)]
Byte = Annotated[int, Field(ge=0, le=255)]


class Reply(BaseModel):
    """Base of what is sent."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Usage(Reply):
    """Token counts of a request, over all its answers; a prompt counts once, however many answers it has."""

    prompt_tokens: Count
    completion_tokens: Count
    total_tokens: Count


class ModelCard(Reply):
    """A model that can be asked."""

    id: str
    object: Literal["model"] = "model"
    created: Count
    owned_by: str


class ModelList(Reply):
    """All of them."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class CompletionLogprobs(Reply):
    r"""Log-probabilities of the generated tokens, nats, of the model's own distribution.

    Attributes:
        tokens: their texts; one that is no text by itself is written `bytes:\xe2\x96`.
        token_logprobs: of each.
        top_logprobs: of the most likely tokens at each place, the generated one among them; null where none were asked.
        text_offset: where each begins in the answer, in characters; those of a stop text lie beyond its end.
    """

    tokens: list[str]
    token_logprobs: list[Nats]
    top_logprobs: list[dict[str, Nats]] | None
    text_offset: list[Count]


class CompletionChoice(Reply):
    """One answer, or a piece of one.

    Attributes:
        index: number of the prompt times `n`, plus the number of the answer to it.
        text: the answer.
        logprobs: null where not asked for.
        finish_reason: `stop` for a stop text or the end of the text, `length` for the limit of tokens, `timeout` for
            the limit of time, `cancelled` when the server stops; null while the answer goes on.
    """

    index: Count
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None


class Completion(Reply):
    """The answer to `/v1/completions`."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: Count
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None


class Alternative(Reply):
    """A token that was likely at a place."""

    token: str
    logprob: Nats
    bytes: list[Byte]


class TokenLogprob(Reply):
    """A generated token, its log-probability, and what else was likely."""

    token: str
    logprob: Nats
    bytes: list[Byte]
    top_logprobs: list[Alternative]


class ChatLogprobs(Reply):
    """Log-probabilities of a message's tokens, nats."""

    content: list[TokenLogprob]
    refusal: None = None


class ChatMessage(Reply):
    """The assistant's message."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(Reply):
    """One answer; `finish_reason` as in completions."""

    index: Count
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason


class Chat(Reply):
    """The answer to `/v1/chat/completions`."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: Count
    model: str
    choices: list[ChatChoice]
    usage: Usage


class ChatDelta(Reply):
    """A piece of the assistant's message."""

    role: Literal["assistant"] | None = None
    content: str | None = None


class ChatChunkChoice(Reply):
    """A piece of an answer."""

    index: Count
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None


class ChatChunk(Reply):
    """A piece of a streamed chat."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: Count
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None


class Health(Reply):
    """The server runs."""

    status: Literal["ok"] = "ok"
