"""Loads the scripts of docs/ and .ci/, which are files and not modules of a package."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

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
