"""What decides a result, and how two such descriptions differ."""

from __future__ import annotations

from typing import Any

from weftlm.corpora.reading import corpus_fingerprint
from weftlm.pipeline.data_config import DataConfig

MANIFEST = "prepared.json"
SETS = ("target_heldout", "target", "heldout", "corpora")
STEPS_VERSION = 2
"""Raised whenever the same configuration and inputs would be prepared differently."""


def data_identity(config: DataConfig) -> dict[str, Any]:
    """What decides the result: configuration, state of the inputs, version of these steps."""
    inputs = {
        f"{name}.{number} ({corpus.name})": corpus_fingerprint(corpus)
        for name in SETS
        for number, corpus in enumerate(getattr(config, name))
    }
    if config.domains.basis is not None:
        for number, corpus in enumerate(config.domains.basis.sets):
            inputs[f"domains.basis.sets.{number} ({corpus.name})"] = corpus_fingerprint(corpus)
    return {"config": config.model_dump(mode="json"), "inputs": inputs, "steps": STEPS_VERSION}
