"""What clients send, checked strictly: OpenAI's fields, bounded, and two of weftlm's own.

The models of a server are made for its limits (`request_models`), so its OpenAPI document says what is checked and
nothing else. Fields of OpenAI's API that would change the answer and are not offered pass with their neutral value
only; fields that change nothing here (`user`, `metadata`, `store`, ...) pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, create_model

Kind = Literal["completion", "chat"]
KINDS: tuple[Kind, ...] = ("completion", "chat")
SEED_BITS = 63
SHORTEST_TIMEOUT_SECONDS = 1.0
"""A request may ask for; nothing can be promised in less."""


def _whole(value: Any) -> Any:
    """JSON knows one kind of number: 2.0 is a whole one."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value


def _wholes(value: Any) -> Any:
    """`_whole` for a list; one of integers alone is recognised without a look at each."""
    return list(map(_whole, value)) if isinstance(value, list) and float in set(map(type, value)) else value


WHOLE = BeforeValidator(_whole)
"""Makes an integer one as JSON Schema has it; it stands after the bounds, so that they show in the schema."""


def _no(value: bool) -> bool:
    if value:
        raise ValueError("Input should be false")
    return value


No = Annotated[bool, AfterValidator(_no), Field(json_schema_extra={"const": False})]
Zero = Annotated[float, Field(ge=0, le=0, allow_inf_nan=False)]
StopText = Annotated[str, Field(min_length=1, max_length=1_000)]
Label = Annotated[str, Field(max_length=1_000)]
Metadata = Annotated[
    dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]], Field(max_length=16)
]


class Sent(BaseModel):
    """Base of what a client sends: nothing unknown, nothing coerced."""

    model_config = ConfigDict(extra="forbid", strict=True)


class StreamOptions(Sent):
    """How an answer is streamed.

    Attributes:
        include_usage: send the token counts in a last chunk of their own.
        include_obfuscation: accepted; the chunks are not padded.
    """

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class Request(Sent):
    """What both kinds of request share.

    Attributes:
        model: name of the model, as in `/v1/models`.
        n: answers to each prompt; each is drawn with a seed of its own, `seed` + its number. A server also bounds the
            answers to all prompts of a request.
        temperature: 0 takes the most likely token.
        top_p: smallest set of most likely tokens with at least this probability; 0 takes the most likely token.
        seed: of the draw; the same seed gives the same answer whatever else the server does.
        stop: texts that end the answer and are not part of it.
        stream: send the answer while it is generated, as server-sent events.
        stream_options: how.
        timeout: seconds the request may take, the wait in the queue included; the server's own limit is the default.
        ignore_eos: go on after the end of the text, up to the limit of tokens.
        user: accepted; changes nothing. So do `metadata`, `store`, `service_tier`, `safety_identifier` and
            `prompt_cache_key`.
        presence_penalty: 0 only. So is `frequency_penalty`.
        logit_bias: empty only.
    """

    model: Annotated[str, Field(min_length=1, max_length=200)]
    n: Annotated[int, Field(ge=1), WHOLE] | None = None
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None = None
    seed: Annotated[int, Field(ge=-(1 << SEED_BITS), le=(1 << SEED_BITS) - 1), WHOLE] | None = None
    stop: StopText | Annotated[list[StopText], Field(max_length=4)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    timeout: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    ignore_eos: bool | None = None
    user: Label | None = None
    metadata: Metadata | None = None
    store: bool | None = None
    service_tier: Label | None = None
    safety_identifier: Label | None = None
    prompt_cache_key: Label | None = None
    presence_penalty: Zero | None = None
    frequency_penalty: Zero | None = None
    logit_bias: Annotated[dict[str, Any], Field(max_length=0)] | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop texts."""
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with the token counts."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)


class CompletionRequest(Request):
    """A request to `/v1/completions`.

    Attributes:
        prompt: a text, token ids, or a list of either. The empty text is the beginning of a document.
        max_tokens: to generate at most; 16 unless told, or what the model's context leaves.
        logprobs: how many alternatives to report for each token; 0 for the tokens' own log-probabilities alone.
        echo: false only.
        best_of: 1, or the same as `n`.
        suffix: empty only.
        add_special_tokens: put the tokens before a text that the model's tokenizer puts there; true unless told. Token
            ids are taken as they are.
    """

    prompt: str | list[str] | list[int] | list[list[int]]
    max_tokens: Annotated[int, Field(ge=1), WHOLE] | None = None
    logprobs: Annotated[int, Field(ge=0), WHOLE] | None = None
    echo: No | None = None
    best_of: Annotated[int, Field(ge=1), WHOLE] | None = None
    suffix: Annotated[str, Field(max_length=0)] | None = None
    add_special_tokens: bool | None = None


class TextPart(Sent):
    """A part of a message's content; only text is read."""

    type: Literal["text"]
    text: str


class Message(Sent):
    """A message of a chat; only those of the assistant may repeat the empty fields of an answer.

    Attributes:
        role: who speaks.
        content: what was said.
        name: of the speaker; for chat templates that use it.
    """

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: Label | None = None
    refusal: None = None
    audio: None = None
    function_call: None = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None
    tool_calls: Annotated[list[Any], Field(max_length=0)] | None = None

    @property
    def text(self) -> str:
        """The content as one text."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class TextFormat(Sent):
    """The only format of an answer: text."""

    type: Literal["text"]


class ChatRequest(Request):
    """A request to `/v1/chat/completions`.

    Attributes:
        messages: the conversation so far.
        max_completion_tokens: to generate at most; what the model's context leaves unless told.
        max_tokens: older name of `max_completion_tokens`, which takes precedence.
        logprobs: report the log-probability of each token.
        top_logprobs: and of so many alternatives; counts only with `logprobs`.
        response_format: text only.
        modalities: text only.
        tools: none. So are `functions`; `tool_choice` and `function_call` name none.
        audio: null only. So is `web_search_options`.
        reasoning_effort: `none` only.
        verbosity: `medium` only.
        prediction: accepted; changes nothing. So does `parallel_tool_calls`.
    """

    messages: list[Message]
    max_completion_tokens: Annotated[int, Field(ge=1), WHOLE] | None = None
    max_tokens: Annotated[int, Field(ge=1), WHOLE] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0), WHOLE] | None = None
    response_format: TextFormat | None = None
    modalities: Annotated[list[Literal["text"]], Field(min_length=1, max_length=1)] | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    functions: Annotated[list[Any], Field(max_length=0)] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    function_call: Literal["none", "auto"] | None = None
    audio: None = None
    web_search_options: None = None
    reasoning_effort: Literal["none"] | None = None
    verbosity: Literal["medium"] | None = None
    prediction: dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None


@dataclass(frozen=True)
class Bounds:
    """What the models and the settings of a server allow.

    Attributes:
        names: of the models that allow the same.
        max_token_id: the largest.
        max_prompt_tokens: of one prompt.
        max_prompt_characters: of one prompt or part of a message.
        max_new_tokens: of one answer.
        max_prompts: of one request.
        max_choices: to one prompt.
        max_answers: to all prompts of a request.
        max_messages: of one chat.
        max_top_logprobs: for each token.
        timeout_seconds: of one request.
    """

    names: Sequence[str]
    max_token_id: int
    max_prompt_tokens: int
    max_prompt_characters: int
    max_new_tokens: int
    max_prompts: int
    max_choices: int
    max_answers: int
    max_messages: int
    max_top_logprobs: int
    timeout_seconds: float


class Forms:
    """The request models of a server by the model a request names.

    Attributes:
        bounds: of each group of models that allow the same.
    """

    def __init__(self, bounds: Sequence[Bounds]) -> None:
        self.bounds = tuple(bounds)
        self.models = tuple(request_models(each) for each in bounds)
        self._group = {name: number for number, each in enumerate(bounds) for name in each.names}

    def of(self, kind: Kind, value: Any) -> type[Request]:
        """The model to check a body with; the first group's where it names none."""
        name = value.get("model") if isinstance(value, dict) else None
        group = self._group.get(name, 0) if isinstance(name, str) else 0
        return self.models[group][KINDS.index(kind)]

    def bounds_of(self, name: str) -> Bounds:
        """What a model allows."""
        return self.bounds[self._group[name]]


def flat(asked: Request) -> dict[str, Any]:
    """A checked request as JSON; messages hold one text each."""
    value = asked.model_dump(mode="json", exclude_unset=True, exclude={"messages"})
    if isinstance(asked, ChatRequest):
        value["messages"] = [{"role": said.role, "content": said.text, "name": said.name} for said in asked.messages]
    return value


def unflattened(model: type[Request], value: dict[str, Any]) -> Request:
    """The request that `flat` was made of."""
    if value.get("stream_options") is not None:
        value["stream_options"] = StreamOptions(**value["stream_options"])
    if "messages" in value:
        value["messages"] = [Message.model_construct(**said) for said in value["messages"]]
    return model.model_construct(**value)


def request_models(bounds: Bounds) -> tuple[type[CompletionRequest], type[ChatRequest]]:
    """The two request models of a server, with its bounds in them."""
    name = Annotated[str, Field(min_length=1, max_length=200, json_schema_extra={"enum": list(bounds.names)})]
    choices = Annotated[int, Field(ge=1, le=bounds.max_choices), WHOLE]
    new_tokens = Annotated[int, Field(ge=1, le=bounds.max_new_tokens), WHOLE]
    top = Annotated[int, Field(ge=0, le=bounds.max_top_logprobs), WHOLE]
    shortest = min(SHORTEST_TIMEOUT_SECONDS, bounds.timeout_seconds)
    timeout = Annotated[float, Field(ge=shortest, le=bounds.timeout_seconds, allow_inf_nan=False)]
    text = Annotated[str, Field(max_length=bounds.max_prompt_characters)]
    token = Annotated[int, Field(ge=0, le=bounds.max_token_id)]
    # Lists stop at their first fault: a body of many small ones must not be reported at length.
    tokens = Annotated[
        list[token], Field(min_length=1, max_length=bounds.max_prompt_tokens, fail_fast=True), BeforeValidator(_wholes)
    ]
    many = Field(min_length=1, max_length=bounds.max_prompts, fail_fast=True)
    prompt = text | Annotated[list[text], many] | tokens | Annotated[list[tokens], many]
    shared: dict[str, Any] = {"model": (name, ...), "n": (choices | None, None), "timeout": (timeout | None, None)}
    # What any request may ask for shows in the schema; the value of `n`, which is neutral too, cannot.
    best_of = Annotated[int, Field(ge=1, le=bounds.max_choices, json_schema_extra={"const": 1}), WHOLE]
    completion = create_model(
        "CompletionRequest",
        __base__=CompletionRequest,
        __doc__=CompletionRequest.__doc__,
        prompt=(prompt, ...),
        max_tokens=(new_tokens | None, None),
        logprobs=(top | None, None),
        best_of=(best_of | None, None),
        **shared,
    )
    part = create_model("TextPart", __base__=TextPart, text=(text, ...))
    several = Field(min_length=1, max_length=bounds.max_messages, fail_fast=True)
    parts = Annotated[list[part], several]
    message = create_model("Message", __base__=Message, __doc__=Message.__doc__, content=(text | parts, ...))
    chat = create_model(
        "ChatRequest",
        __base__=ChatRequest,
        __doc__=ChatRequest.__doc__,
        messages=(Annotated[list[message], several], ...),
        max_completion_tokens=(new_tokens | None, None),
        max_tokens=(new_tokens | None, None),
        top_logprobs=(top | None, None),
        **shared,
    )
    return completion, chat
