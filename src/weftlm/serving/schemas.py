"""Request and response bodies in OpenAI's form, checked strictly.

Fields of OpenAI's API that would change the answer and are not offered pass with their neutral value only
(`NotOffered`); fields that change nothing here (`user`, `metadata`, `store`, ...) pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, GetCoreSchemaHandler, GetJsonSchemaHandler, model_validator
from pydantic_core import CoreSchema, PydanticCustomError, core_schema
from typing_extensions import TypedDict

from weftlm.errors import did_you_mean
from weftlm.serving.request import FinishReason

SEED_BITS = 63
MAX_CHOICES, MAX_PROMPTS, MAX_MESSAGES, MAX_CHARACTERS = 16, 1_000, 1_000, 500_000


class Body(BaseModel):
    """Base of request bodies: nothing unknown, nothing coerced.

    Unknown fields are collected and refused together: an error for each would make a body of many slow to refuse.
    """

    model_config = ConfigDict(extra="allow", strict=True, json_schema_extra={"additionalProperties": False})

    @model_validator(mode="after")
    def _nothing_unknown(self) -> Body:
        for name in self.model_extra or ():
            hint = did_you_mean(name[:100], type(self).model_fields)
            raise PydanticCustomError("unknown_field", "unknown field {name}{hint}", {"name": name[:100], "hint": hint})
        return self


@dataclass(frozen=True)
class NotOffered:
    """Annotation of a field that is accepted with null or a neutral value only.

    Attributes:
        what: what the field would ask for, plural.
        neutral: values that ask for nothing.
    """

    what: str
    neutral: tuple[Any, ...] = ()

    def _check(self, value: Any) -> Any:
        kind = isinstance(value, bool)
        if value is None or any(kind == isinstance(one, bool) and value == one for one in self.neutral):
            return value
        raise PydanticCustomError("unsupported_value", "{what} are not offered; leave it out", {"what": self.what})

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(self._check)

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"enum": [None, *self.neutral]}


# Lists stop at their first fault: a body of many small ones must not be reported at length.
Text = Annotated[str, Field(max_length=MAX_CHARACTERS)]
TokenIds = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1, fail_fast=True)]
Several = Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)
Count = Annotated[int, Field(ge=1)]
Top = Annotated[int, Field(ge=0, le=20)]
StopText = Annotated[str, Field(min_length=1, max_length=1_000)]
Label = Annotated[str, Field(max_length=1_000)]
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class StreamOptions(Body):
    """How an answer is streamed.

    Attributes:
        include_usage: Whether the token counts are sent in a last chunk of their own.
        include_obfuscation: Accepted; the chunks are not padded.
    """

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class Asked(Body):
    """What both kinds of request share.

    Attributes:
        model: Name of the model, as in `/v1/models`.
        n: Answers to each prompt; each is drawn with a seed of its own, `seed` + its number.
        temperature: 0 takes the most likely token.
        top_p: Smallest set of most likely tokens with at least this probability; 0 takes the most likely token.
        seed: Random seed of the draw; the same seed gives the same answer whatever else the server does.
        stop: Texts that end the answer and are not part of it.
        stream: Whether the answer is sent while it is generated, as server-sent events.
        stream_options: Options of the stream.
        timeout: Request timeout in seconds, including time in the queue; at most the server's own.
        ignore_eos: Whether generation goes on after the end-of-text token, up to the limit of tokens.
    """

    model: Annotated[str, Field(min_length=1, max_length=200)]
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None = None
    seed: Annotated[int, Field(ge=-(1 << SEED_BITS), le=(1 << SEED_BITS) - 1)] | None = None
    stop: StopText | Annotated[list[StopText], Field(max_length=4)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    timeout: Seconds | None = None
    ignore_eos: bool | None = None
    user: Label | None = None
    metadata: Annotated[dict[str, Any], Field(max_length=16)] | None = None
    store: bool | None = None
    service_tier: Label | None = None
    safety_identifier: Label | None = None
    prompt_cache_key: Label | None = None
    presence_penalty: Annotated[Any, NotOffered("penalties", (0,))] = None
    frequency_penalty: Annotated[Any, NotOffered("penalties", (0,))] = None
    logit_bias: Annotated[Any, NotOffered("biased logits", ({},))] = None

    @property
    def choices(self) -> int:
        """Answers to each prompt."""
        return 1 if self.n is None else self.n

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop texts."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


class CompletionRequest(Asked):
    """A request to `/v1/completions`.

    Attributes:
        prompt: A text, token ids, or a list of either; the empty text begins a document.
        max_tokens: Maximum number of tokens to generate; 16 by default, or what the model's context leaves.
        logprobs: Alternatives reported for each token; 0 for the tokens' own log-probabilities alone.
        best_of: 1, or the same as `n`.
        add_special_tokens: Whether the model's own tokens come before a text (a beginning-of-text token); default true.
    """

    prompt: Text | Annotated[list[Text], Several] | TokenIds | Annotated[list[TokenIds], Several]
    max_tokens: Count | None = None
    logprobs: Top | None = None
    best_of: Count | None = None
    add_special_tokens: bool | None = None
    echo: Annotated[Any, NotOffered("answers with their prompt", (False,))] = None
    suffix: Annotated[Any, NotOffered("insertions", ("",))] = None


class TextPart(Body):
    """A part of a message's content; only text is read."""

    type: Literal["text"]
    text: Text


class Message(Body):
    """A message of a chat; those of the assistant may repeat the empty fields of an answer.

    Attributes:
        role: Author of the message.
        content: Text of the message, whole or in parts.
        name: Name of the author, for chat templates that use it.
    """

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[TextPart], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
    name: Label | None = None
    refusal: Annotated[Any, NotOffered("refusals")] = None
    audio: Annotated[Any, NotOffered("spoken answers")] = None
    annotations: Annotated[Any, NotOffered("annotations", ([],))] = None
    function_call: Annotated[Any, NotOffered("tools")] = None
    tool_calls: Annotated[Any, NotOffered("tools", ([],))] = None

    def fields(self) -> dict[str, str]:
        """The fields a chat template reads."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": self.role, "content": text, **({"name": self.name} if self.name else {})}


class ChatRequest(Asked):
    """A request to `/v1/chat/completions`.

    Attributes:
        messages: The conversation so far.
        max_completion_tokens: Maximum number of tokens to generate; what the model's context leaves by default.
        max_tokens: Older name of `max_completion_tokens`, which takes precedence.
        logprobs: Whether the log-probability of each token is reported.
        top_logprobs: Alternatives reported for each token; counts only with `logprobs`.
    """

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
    max_completion_tokens: Count | None = None
    max_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Top | None = None
    response_format: Annotated[Any, NotOffered("constrained formats", ({"type": "text"},))] = None
    modalities: Annotated[Any, NotOffered("answers other than text", (["text"],))] = None
    tools: Annotated[Any, NotOffered("tools", ([],))] = None
    functions: Annotated[Any, NotOffered("tools", ([],))] = None
    tool_choice: Annotated[Any, NotOffered("tools", ("none", "auto"))] = None
    function_call: Annotated[Any, NotOffered("tools", ("none", "auto"))] = None
    audio: Annotated[Any, NotOffered("spoken answers")] = None
    web_search_options: Annotated[Any, NotOffered("web searches")] = None
    reasoning_effort: Annotated[Any, NotOffered("degrees of reasoning", ("none",))] = None
    verbosity: Annotated[Any, NotOffered("degrees of verbosity", ("medium",))] = None
    prediction: Annotated[Any, NotOffered("predicted outputs")] = None
    parallel_tool_calls: bool | None = None


# --------------------------------------------------------------------------------------------------------- responses


class Usage(TypedDict):
    """Token counts of a request over all its answers; a prompt counts once, whatever `n` is."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class ModelCard(TypedDict):
    """A served model."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class ModelList(TypedDict):
    """All served models."""

    object: Literal["list"]
    data: list[ModelCard]


class CompletionLogprobs(TypedDict):
    r"""Log-probabilities of the generated tokens, nats, under the model's own distribution.

    A token that is no text by itself is written `bytes:\xe2\x96`. `text_offset` counts characters of the answer.
    """

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]] | None
    text_offset: list[int]


class CompletionChoice(TypedDict):
    """One answer, or a piece of one.

    `index` is the number of the prompt times `n`, plus the number of the answer. `finish_reason` is `stop` for a stop
    text or the end of the text, `length` for the limit of tokens, `timeout` for the limit of time, `cancelled` when the
    server stops, and null while the answer goes on.
    """

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None


class Completion(TypedDict):
    """A response of `/v1/completions`, or one event of its stream."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage


class Alternative(TypedDict):
    """A likely token."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(Alternative):
    """A generated token and what else was likely."""

    top_logprobs: list[Alternative]


class ChatLogprobs(TypedDict):
    """Log-probabilities of a message's tokens, nats."""

    content: list[TokenLogprob]
    refusal: None


class ChatMessage(TypedDict):
    """The assistant's message."""

    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(TypedDict):
    """One answer; fields as in `CompletionChoice`."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None


class Chat(TypedDict):
    """A response of `/v1/chat/completions`; events of its stream have a `delta` in place of a `message`."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class ErrorDetail(TypedDict):
    """What went wrong: a message for people, its family, the field at fault and a name for programs."""

    message: str
    type: str
    param: str | None
    code: str


class ErrorBody(TypedDict):
    """The body of every error."""

    error: ErrorDetail
