"""Registries find methods by importing a folder, and suggest names."""

from __future__ import annotations

import pytest

from weftlm.errors import ConfigError
from weftlm.mixture.config import policies
from weftlm.registry import Registry


def test_discovery_finds_every_policy_file() -> None:
    assert {"uniform", "static", "proportional", "importance", "dga", "doge", "doremi", "group_dro", "odm"} <= set(
        policies
    )
    assert len(policies) == len(set(policies))


def test_unknown_name_gets_a_suggestion() -> None:
    with pytest.raises(ConfigError, match="unknown mixture policy 'dgaa'; did you mean 'dga'"):
        policies["dgaa"]


def test_two_classes_cannot_share_a_name() -> None:
    registry: Registry[object] = Registry("thing", "weftlm.mixture", "policy")
    registry.register("one")(int)
    with pytest.raises(ConfigError, match="registered twice"):
        registry.register("one")(float)
