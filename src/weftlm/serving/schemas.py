"""Request and response bodies in OpenAI's form; requests are checked strictly.

Fields of OpenAI's API that would change the answer and are not offered are accepted with their neutral value only
(`NEUTRAL`); fields that change nothing here (`IGNORED`) are accepted with any value.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from weftlm.errors import did_you_mean
from weftlm.serving.request import Sampling

SEED_BITS = 63
MAX_CHOICES, MAX_PROMPTS, MAX_MESSAGES, MAX_CHARACTERS = 16, 1_000, 1_000, 500_000
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "presence_penalty": (0,), "frequency_penalty": (0,), "logit_bias": ({},), "echo": (False,), "suffix": ("",),
    "response_format": ({"type": "text"},), "modalities": (["text"],), "tools": ([],), "functions": ([],),
    "tool_choice": ("none", "auto"), "function_call": ("none", "auto"), "audio": (), "web_search_options": (),
    "reasoning_effort": ("none",), "verbosity": ("medium",), "prediction": (), "refusal": (), "annotations": ([],),
    "tool_calls": ([],),
}  # fmt: skip
"""Fields that are not offered, with the values beside null that ask for nothing."""
IGNORED = frozenset(
    "user metadata store service_tier safety_identifier prompt_cache_key parallel_tool_calls".split()
)  # fmt: skip


def _documented(schema: dict[str, Any]) -> None:
    """The fields beside those of a model, in its JSON schema."""
    schema["properties"] |= {name: {"enum": [None, *values]} for name, values in NEUTRAL.items()}
    schema["properties"] |= {name: {} for name in IGNORED}
    schema["additionalProperties"] = False


class Body(BaseModel):
    """Base of request bodies: nothing unknown, nothing coerced; the first unknown field is reported."""

    model_config = ConfigDict(extra="allow", strict=True, json_schema_extra=_documented)

    @model_validator(mode="after")
    def _nothing_unknown(self) -> Body:
        for name, value in (self.model_extra or {}).items():
            context = {"name": name[:100], "hint": did_you_mean(name[:100], type(self).model_fields)}
            if name in NEUTRAL:
                same = any(isinstance(value, bool) == isinstance(one, bool) and value == one for one in NEUTRAL[name])
                if value is not None and not same:
                    raise PydanticCustomError("unsupported_value", "{name} is not offered; leave it out", context)
            elif name not in IGNORED:
                raise PydanticCustomError("unknown_field", "unknown field {name}{hint}", context)
        return self


# Lists stop at their first fault: a body of many small ones must not be reported at length.
Text = Annotated[str, Field(max_length=MAX_CHARACTERS)]
TokenIds = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1, fail_fast=True)]
Several = Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)
Count = Annotated[int, Field(ge=1)]
Top = Annotated[int, Field(ge=0, le=20)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Seed = Annotated[int, Field(ge=-(1 << SEED_BITS), le=(1 << SEED_BITS) - 1)]
StopText = Annotated[str, Field(min_length=1, max_length=1_000)]


class StreamOptions(Body):
    """Whether a stream ends with the token counts, in a chunk of their own; chunks are never padded."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class GenerationRequest(Body):
    """What both kinds of request share; fields of OpenAI's API mean what they mean there."""

    chat: ClassVar[bool]
    model: Annotated[str, Field(min_length=1, max_length=200)]
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = Field(
        None, description="Answers to each prompt; each is drawn with a seed of its own, `seed` + its number."
    )
    max_tokens: Count | None = Field(
        None, description="By default 16 for completions, and for chats what the model's context leaves."
    )
    temperature: Annotated[Finite, Field(ge=0, le=2)] | None = Field(None, description="0: the most likely token.")
    top_p: Annotated[Finite, Field(ge=0, le=1)] | None = Field(None, description="0: the most likely token.")
    seed: Seed | None = Field(None, description="The same seed gives the same answer whatever else the server does.")
    stop: StopText | Annotated[list[StopText], Field(max_length=4)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    timeout: Annotated[Finite, Field(gt=0)] | None = Field(
        None, description="Request timeout in seconds, including time in the queue; at most the server's own."
    )
    ignore_eos: bool | None = Field(
        None, description="Whether generation goes on after the end-of-text token, up to the limit of tokens."
    )

    @property
    def wanted(self) -> int | None:
        """Maximum number of tokens that the request names."""
        return self.max_tokens

    @property
    def top(self) -> int | None:
        """Alternatives reported for each token; None for no log-probabilities."""
        raise NotImplementedError

    def samplings(self, tokens: int) -> list[Sampling]:
        """How the tokens of each answer to a prompt are drawn: with the seed plus its number, modulo 2^63."""
        first = Sampling(
            max_tokens=tokens,
            temperature=0.0 if self.top_p == 0 else 1.0 if self.temperature is None else self.temperature,
            top_p=self.top_p or 1.0,
            seed=self.seed,
            stop=(self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ()),
            logprobs=self.top,
            ignore_eos=bool(self.ignore_eos),
        )
        seeds = [
            None if self.seed is None else (self.seed + number) % (1 << SEED_BITS) for number in range(self.n or 1)
        ]
        return [first.model_copy(update={"seed": seed}) for seed in seeds]


class CompletionRequest(GenerationRequest):
    """A request to `/v1/completions`: a text, token ids, or a list of either; the empty text begins a document."""

    chat = False
    prompt: Text | Annotated[list[Text], Several] | TokenIds | Annotated[list[TokenIds], Several]
    logprobs: Top | None = Field(None, description="Alternatives reported for each token; 0: its own log-probability.")
    best_of: Count | None = Field(None, description="1, or the same as `n`.")
    add_special_tokens: bool | None = Field(
        None, description="Whether the model's own tokens come before a text (beginning of text); default true."
    )

    @model_validator(mode="after")
    def _nothing_ranked(self) -> CompletionRequest:
        if self.best_of not in (None, self.n or 1):
            context = {"name": "best_of"}
            raise PydanticCustomError("unsupported_value", "{name} must be n: answers are not ranked", context)
        return self

    @property
    def top(self) -> int | None:
        return self.logprobs


class TextPart(Body):
    """A part of a message's content; only text is read."""

    type: Literal["text"]
    text: Text


class Message(Body):
    """A message of a chat; those of the assistant may repeat the empty fields of an answer."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[TextPart], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
    name: Annotated[str, Field(max_length=1_000)] | None = None

    def fields(self) -> dict[str, str]:
        """The fields a chat template reads."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": self.role, "content": text, **({"name": self.name} if self.name else {})}


class ChatRequest(GenerationRequest):
    """A request to `/v1/chat/completions`."""

    chat = True
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
    max_completion_tokens: Count | None = Field(None, description="Newer name of `max_tokens`, which takes precedence.")
    logprobs: bool | None = Field(None, description="Whether the log-probability of each token is reported.")
    top_logprobs: Top | None = Field(None, description="Alternatives reported for each token, with `logprobs` alone.")

    @property
    def wanted(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def top(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


class Completion(BaseModel):
    """A response of `/v1/completions` or `/v1/chat/completions`, or one event of its stream.

    Attributes:
        choices: Answers in OpenAI's form. `index` is the number of the prompt times `n`, plus the number of the answer.
            `finish_reason` is `stop` for a stop text or the end of the text, `length` for the limit of tokens,
            `timeout` for the limit of time, `cancelled` when the server stops, and null while the answer goes on.
            Log-probabilities are nats under the model's own distribution; a token that is part of a character is
            written as in the vocabulary, without `bytes`; `text_offset` counts the characters given out before a token.
        usage: Token counts over all answers; a prompt counts once, whatever `n` is.
    """

    id: str
    object: Literal["text_completion", "chat.completion", "chat.completion.chunk"]
    created: int
    model: str
    choices: list[dict[str, Any]]
    usage: dict[str, int] | None = None


class ErrorBody(BaseModel):
    """The body of every error: `message` for people, `type`, `param` (the field at fault) and `code` for programs."""

    error: dict[str, str | None]
