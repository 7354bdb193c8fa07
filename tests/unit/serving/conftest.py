"""Tiny models of every kind, written once."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.served import KINDS, write_model

from weftlm.pipeline.any_model import OpenModel, open_model


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {kind: write_model(folder / kind, kind) for kind in KINDS}


@pytest.fixture(scope="module")
def models(folders: dict[str, Path]) -> dict[str, OpenModel]:
    return {kind: open_model(folder) for kind, folder in folders.items()}


@pytest.fixture(scope="module")
def opened(models: dict[str, OpenModel]) -> OpenModel:
    return models["plain"]
