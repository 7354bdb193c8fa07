"""Registries find methods by importing a folder, and suggest names."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from weftlm.errors import ConfigError
from weftlm.mixture.config import policies
from weftlm.registry import Registry


def test_unknown_name_gets_a_suggestion() -> None:
    with pytest.raises(ConfigError, match="unknown mixture policy 'dgaa'; did you mean 'dga'"):
        policies["dgaa"]


def test_two_classes_cannot_share_a_name() -> None:
    registry: Registry[object] = Registry("thing", "weftlm.mixture", "policy", "weftlm.things")
    registry.register("one", does="a", costs="b")(int)
    with pytest.raises(ConfigError, match="registered twice"):
        registry.register("one", does="a", costs="b")(float)


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], Registry[object]]:
    """`plugin(name, code)`: a registry beside which a package with one module is installed."""

    def install(name: str, code: str) -> Registry[object]:
        facts = tmp_path / "things-1.0.dist-info"
        facts.mkdir()
        (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: things\nVersion: 1.0\n")
        (facts / "entry_points.txt").write_text(f"[weftlm.things]\n{name} = some_things\n")
        (tmp_path / "some_things.py").write_text(code)
        monkeypatch.syspath_prepend(str(tmp_path))
        monkeypatch.delitem(sys.modules, "some_things", raising=False)
        return Registry("thing", "weftlm.mixture", "policy", "weftlm.things")

    return install


def test_a_method_of_another_package_is_imported_when_its_name_comes_up(
    plugin: Callable[[str, str], Registry[object]],
) -> None:
    registry = plugin("mine", "class Mine: pass\n")
    assert "mine" in list(registry)
    assert "some_things" not in sys.modules
    with pytest.raises(ConfigError, match=r"thing 'mine' of another package \(some_things.*registers no method"):
        registry.entry("mine")


def test_a_broken_package_is_named(plugin: Callable[[str, str], Registry[object]]) -> None:
    registry = plugin("mine", "import no_such_library\n")
    with pytest.raises(
        ConfigError, match=r"some_things, entry point of weftlm\.things\) cannot be imported .*uninstall"
    ):
        registry.entry("mine")
