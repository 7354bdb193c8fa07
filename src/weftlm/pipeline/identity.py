"""The record of prepared data: its configuration, the state of its inputs, and the version of these steps decide it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from weftlm.artifact import Artifact
from weftlm.config import settings
from weftlm.corpora.reading import corpus_fingerprint
from weftlm.pipeline.data_config import DataConfig

MANIFEST = "prepared.json"
SETS = ("target_heldout", "target", "heldout", "corpora")
STEPS_VERSION = 3
"""Raised whenever the same configuration and inputs would be prepared differently."""
REMEDY = "prepare again with rebuild (weftlm prepare --rebuild)"


def input_states(config: DataConfig) -> Iterator[tuple[str, Callable[[], str]]]:
    """Key of every corpus a configuration names, and a call that gives the state of its files or says what is wrong."""
    for name in SETS:
        for number, corpus in enumerate(getattr(config, name)):
            yield f"{name}.{number} ({corpus.name})", partial(corpus_fingerprint, corpus)
    if config.domains.basis is not None:
        for number, corpus in enumerate(config.domains.basis.sets):
            yield f"domains.basis.sets.{number} ({corpus.name})", partial(corpus_fingerprint, corpus)


def data_identity(config: DataConfig) -> dict[str, Any]:
    """All that decides prepared data."""
    inputs = {key: state() for key, state in input_states(config)}
    return {"data": settings(config), "inputs": inputs, "steps": STEPS_VERSION}


def prepared_artifact(config: DataConfig, folder: Path) -> Artifact:
    """Prepared data in a folder, finished or under way."""
    return Artifact(folder / MANIFEST, data_identity(config), REMEDY)
