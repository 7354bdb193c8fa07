"""The `compare` and `routing` sections of a recipe: the baselines that are trained, and what is made of the routers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, SerializeAsAny, field_validator

from weftlm.config import Section
from weftlm.mixture.config import PolicyConfig, policy_config

BASELINES = "baselines"
"""Folder in a run folder in which baselines are trained, each in a folder of its own."""


def _policy(value: Any) -> Any:
    section = {"policy": value} if isinstance(value, str) else value
    return policy_config(section) if isinstance(section, Mapping) else section


class CompareConfig(Section):
    """Baselines of the model and of the gate, trained beside them on the same data for as many tokens."""

    mixtures: list[Annotated[SerializeAsAny[PolicyConfig], BeforeValidator(_policy)]] = Field(
        default_factory=list, description="other mixtures for the same model: policies by name, or their sections"
    )
    monolith: bool = Field(
        False,
        description="train the experts' base on all their domains together, uniformly, for as many tokens as all "
        "experts: the single model that the gate is compared with",
    )

    @field_validator("mixtures")
    @classmethod
    def _different(cls, value: list[PolicyConfig]) -> list[PolicyConfig]:
        names = [each.policy for each in value]
        if len(set(names)) < len(names):
            raise ValueError(f"a policy is named twice: {', '.join(names)}; name each once")
        return value


class RoutingConfig(Section):
    """Which routers are compared over the experts, and which routed models are written."""

    routers: list[str] | None = Field(
        None,
        min_length=1,
        description="routers compared on held-out text, in one word each (`phatgoose:k=1`); absent: every one that "
        "the experts have what it needs for",
    )
    build: list[str] = Field(
        default_factory=lambda: ["phatgoose"],
        min_length=1,
        description="routed models written to `routed`, one folder each; the report shows the first that chooses by "
        "token at work",
    )
    trace: str | None = Field(
        None, min_length=1, description="text whose routing is shown; absent: held-out text that changes domain midway"
    )
