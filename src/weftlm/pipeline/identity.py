"""What decides a result, and how two such descriptions differ."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from weftlm.config import settings
from weftlm.corpora.reading import corpus_fingerprint
from weftlm.pipeline.data_config import DataConfig

MANIFEST = "prepared.json"
SETS = ("target_heldout", "target", "heldout", "corpora")
STEPS_VERSION = 2
"""Raised whenever the same configuration and inputs would be prepared differently."""


def input_states(config: DataConfig) -> Iterator[tuple[str, Callable[[], str]]]:
    """Key of every corpus a configuration names, and a call that gives the state of its files or says what is wrong."""
    for name in SETS:
        for number, corpus in enumerate(getattr(config, name)):
            yield f"{name}.{number} ({corpus.name})", partial(corpus_fingerprint, corpus)
    if config.domains.basis is not None:
        for number, corpus in enumerate(config.domains.basis.sets):
            yield f"domains.basis.sets.{number} ({corpus.name})", partial(corpus_fingerprint, corpus)


def data_identity(config: DataConfig) -> dict[str, Any]:
    """What decides the result: configuration, state of the inputs, version of these steps."""
    inputs = {key: state() for key, state in input_states(config)}
    return {"config": settings(config), "inputs": inputs, "steps": STEPS_VERSION}
