"""What an inspection tells: values that are written as JSON and read by the inspector's page."""

from __future__ import annotations

from dataclasses import dataclass

from weftlm.errors import ConfigError
from weftlm.pipeline.any_model import Kind


class FieldError(ConfigError):
    """A field of a question is wrong.

    Attributes:
        field: its name.
        code: what is wrong, for programs.
        missing: it names something that is not there.
    """

    def __init__(self, message: str, field: str, code: str = "invalid_value", *, missing: bool = False) -> None:
        super().__init__(message)
        self.field, self.code, self.missing = field, code, missing


@dataclass(frozen=True)
class Guess:
    """A token that might stand at a place.

    Attributes:
        id: in the vocabulary.
        text: of the token alone.
        logprob: nats.
    """

    id: int
    text: str
    logprob: float


@dataclass(frozen=True)
class TokenFacts:
    """A token of the text.

    Attributes:
        id: in the vocabulary.
        text: its part of the text; the parts join to the text. Empty where a token completes a character.
        logprob: nats, given the tokens before; None for the first.
        top: the most likely tokens at its place, most likely first; empty for the first.
    """

    id: int
    text: str
    logprob: float | None
    top: tuple[Guess, ...]


@dataclass(frozen=True)
class View:
    """Weights of the experts on every token.

    Attributes:
        name: `all` (mean over the modules), `layer:NAME` (mean over a layer's), `module:NAME`, or `gate`.
        weights: thousandths, as `weftlm.reporting.traces.packed` writes them: per token how many experts worked, then
            expert and weight of each, in base 64 with the digits 0-9 A-Z a-z - _; one digit for a count or an expert
            (two from 64 experts on), two for a weight. A token on which no expert worked has a count of 0.
    """

    name: str
    weights: str


@dataclass(frozen=True)
class ModuleUsage:
    """Who works in a module.

    Attributes:
        name: the module's name in the base model.
        layer: of the module.
        usage: mean weight of each expert over the text.
        entropy: of the usage, nats; ln(experts) when all work alike.
    """

    name: str
    layer: str
    usage: tuple[float, ...]
    entropy: float


@dataclass(frozen=True)
class Totals:
    """Loss of a text.

    Attributes:
        tokens: scored.
        bytes: of the scored tokens' text, UTF-8.
        nats: sum over the scored tokens.
    """

    tokens: int
    bytes: int
    nats: float


@dataclass(frozen=True)
class Inspection:
    """What a model makes of a text.

    Attributes:
        model: its name.
        kind: plain, routed or gated.
        without: the expert switched off, None for none.
        experts: those that may work, in the order of the weights; last `(mean of all)` where a router uses it.
        tokens: of the text.
        next: the most likely tokens after the text.
        totals: the loss.
        views: weights per token. Of a routed model: when a token is read. Of a gated one: when it is predicted.
        modules: of a routed model, in the order of execution.
    """

    model: str
    kind: Kind
    without: str | None
    experts: tuple[str, ...]
    tokens: tuple[TokenFacts, ...]
    next: tuple[Guess, ...]
    totals: Totals
    views: tuple[View, ...]
    modules: tuple[ModuleUsage, ...]


@dataclass(frozen=True)
class Segment:
    """A piece of text between two places where both models' tokens end.

    Attributes:
        text: the piece.
        a: first token of the one model and the one after the last.
        b: of the other model.
        nats_a: loss; None where a token of either model's is not scored.
        nats_b: of the other model.
    """

    text: str
    a: tuple[int, int]
    b: tuple[int, int]
    nats_a: float | None
    nats_b: float | None


@dataclass(frozen=True)
class Comparison:
    """Two models on one text.

    Attributes:
        a: what the one makes of it.
        b: what the other makes of it.
        segments: pieces of the text both can be compared on; single tokens where both cut the text alike.
        totals_a: over the segments both score.
        totals_b: over the same segments.
    """

    a: Inspection
    b: Inspection
    segments: tuple[Segment, ...]
    totals_a: Totals
    totals_b: Totals


@dataclass(frozen=True)
class ExpertCost:
    """What leaving one expert out costs.

    Attributes:
        expert: its name.
        nats: loss of the text without it.
        change: nats more than with it; negative where the others do better alone.
        worst: place of the token that suffers most; None where nothing is scored.
        worst_change: nats more on that token.
    """

    expert: str
    nats: float
    change: float
    worst: int | None
    worst_change: float


@dataclass(frozen=True)
class Part:
    """A module or layer.

    Attributes:
        name: in the base model.
        label: short.
    """

    name: str
    label: str


@dataclass(frozen=True)
class Layer(Part):
    """A layer with its routed modules."""

    modules: tuple[Part, ...]


@dataclass(frozen=True)
class ModelFacts:
    """What can be asked of a model.

    Attributes:
        name: as it is served.
        kind: plain, routed or gated.
        by: its router or gate; None for a plain model.
        experts: names.
        layers: with routed modules, in the order of execution.
        max_tokens: of a text.
        max_characters: of a text.
    """

    name: str
    kind: Kind
    by: str | None
    experts: tuple[str, ...]
    layers: tuple[Layer, ...]
    max_tokens: int
    max_characters: int
