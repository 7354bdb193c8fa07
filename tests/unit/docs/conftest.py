"""Loads the scripts of docs/ and .ci/, which are files and not modules of a package."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from weftlm.gating.config import gates
from weftlm.mixture.config import policies
from weftlm.routing.config import routers

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def root():
    return ROOT


@pytest.fixture
def load_script(monkeypatch):
    """`load_script("docs/figures.py")` gives the script as a module."""

    def load(path: str) -> ModuleType:
        name = "script_" + Path(path).stem
        spec = importlib.util.spec_from_file_location(name, ROOT / path)
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture
def execute(monkeypatch):
    """Runs the text of a module; policies, routers and gates it registers do not outlive the test."""
    kept = []
    for registry in (policies, routers, gates):
        assert all(map(registry.entry, registry))  # all of them are imported: a module registers itself once
        kept.append((registry, dict(registry._entries)))

    def run(code: str, **known: object) -> ModuleType:
        module = ModuleType("snippet")
        module.__dict__.update(known)
        monkeypatch.setitem(sys.modules, "snippet", module)
        exec(compile(code, "snippet", "exec"), module.__dict__)
        return module

    yield run
    for registry, entries in kept:
        registry._entries.clear()
        registry._entries.update(entries)
