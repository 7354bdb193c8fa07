"""The settings of every router."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import Field, FiniteFloat, NonNegativeFloat, PositiveFloat, PositiveInt

from weftlm.config import Section, Seed, apply_overrides
from weftlm.corpora.labels import ExpertName
from weftlm.registry import Registry

if TYPE_CHECKING:
    from weftlm.routing.router import Router


MANIFEST = "routed.json"
"""The file by which a saved model of this kind is known."""


class RouterConfig(Section):
    """Base of every router's configuration.

    A subclass narrows `router` to `Literal["<registered name>"]` with that name as default.
    """

    router: str

    @classmethod
    def example(cls, experts: Sequence[str]) -> Self:
        """A valid configuration for these experts that differs from the defaults where a default hides something.

        The conformance suite is built on it, so that a new router joins unasked.
        """
        return cls.model_validate({})


routers: Registry[Router] = Registry("router", "weftlm.routing", "router", "weftlm.routers")


def router_config(section: Mapping[str, Any] | RouterConfig | str) -> RouterConfig:
    """Validate a router's section, or a bare name.

    Raises:
        ConfigError: no such router, or a key it does not have.
    """
    if isinstance(section, RouterConfig):
        return section
    found = routers.settings({"router": section} if isinstance(section, str) else section, "router")
    assert isinstance(found, RouterConfig)
    return found


def parse_router(text: str) -> dict[str, Any]:
    """A router's section from one word: `phatgoose`, or `phatgoose:k=1:temperature=2`.

    Raises:
        ConfigError: as `apply_overrides`.
    """
    name, *options = text.split(":")
    section: dict[str, Any] = apply_overrides({"router": {"router": name}}, [f"router.{each}" for each in options])
    found: dict[str, Any] = section["router"]
    return found


class PrototypeConfig(RouterConfig):
    """What routers by inner product have in common."""

    k: PositiveInt = Field(2, description="experts per token")
    temperature: PositiveFloat = Field(1.0, description="scores are divided by it before the softmax")
    abstain_below: float | None = Field(
        None, description="a token whose best score is lower gets no expert: the base model alone; absent: never"
    )


class PhatgooseConfig(PrototypeConfig):
    """Configuration of `phatgoose`."""

    router: Literal["phatgoose"] = "phatgoose"


class AverageActivationConfig(PrototypeConfig):
    """Configuration of `average-activation`."""

    router: Literal["average-activation"] = "average-activation"


class ArrowConfig(PrototypeConfig):
    """Configuration of `arrow`; PEFT's own setting is k: 3."""

    router: Literal["arrow"] = "arrow"


class RandomConfig(PrototypeConfig):
    """Configuration of `random`."""

    router: Literal["random"] = "random"
    seed: Seed = Field(0, description="random seed of the vectors drawn in place of gates")


class MergedConfig(RouterConfig):
    """Configuration of `merged`."""

    router: Literal["merged"] = "merged"
    weights: dict[ExpertName, float] | None = Field(
        None, description="weight by expert, those not named 0; absent: 1 / N for each"
    )

    @classmethod
    def example(cls, experts: Sequence[str]) -> Self:
        return cls(weights={experts[0]: 0.75, experts[-1]: 0.25} if len(experts) > 1 else {experts[0]: 1.0})


class PrefixConfig(RouterConfig):
    """Configuration of `prefix`."""

    router: Literal["prefix"] = "prefix"
    k: PositiveInt = Field(2, description="experts per token")
    share: FiniteFloat = Field(
        0.02,
        ge=0.0,
        lt=1.0,
        description="probability that the text's expert changes between two tokens; 0: never",
    )
    temperature: PositiveFloat = Field(5.0, description="each token's log-likelihood is divided by it")
    background_rank: PositiveInt = Field(64, description="rank to which the mean of all experts is cut")
    bigram_strength: NonNegativeFloat = Field(
        32.0, description="kappa: a pair's count is trusted over its second token's when much larger"
    )


class BlendConfig(PrefixConfig):
    """Configuration of `blend`."""

    router: Literal["blend"] = "blend"  # type: ignore[assignment]
    gate_weight: NonNegativeFloat = Field(1.0, description="weight of the gates' scores beside the prefix's evidence")


class RetrievalConfig(RouterConfig):
    """Configuration of `retrieval`."""

    router: Literal["retrieval"] = "retrieval"
    k: PositiveInt = Field(1, description="experts per sequence")
    temperature: PositiveFloat = Field(0.1, description="cosines are divided by it before the softmax over the k best")
    read_tokens: PositiveInt | None = Field(
        None, description="tokens at the start of the sequence that decide; absent: all of the input"
    )

    @classmethod
    def example(cls, experts: Sequence[str]) -> Self:
        return cls(k=2, read_tokens=3)


class SingleConfig(RouterConfig):
    """Configuration of `single`."""

    router: Literal["single"] = "single"
    expert: ExpertName = Field(description="the expert's name in the library, or its domain's label")

    @classmethod
    def example(cls, experts: Sequence[str]) -> Self:
        return cls(expert=experts[-1])


class UniformConfig(RouterConfig):
    """Configuration of `uniform`."""

    router: Literal["uniform"] = "uniform"
