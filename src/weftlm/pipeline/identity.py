"""What decides a result, and how two such descriptions differ."""

from __future__ import annotations

from typing import Any

from weftlm.corpora.reading import corpus_fingerprint
from weftlm.pipeline.data_config import DataConfig

MANIFEST = "prepared.json"
SETS = ("target_heldout", "target", "heldout", "corpora")
STEPS_VERSION = 2
"""Raised whenever the same configuration and inputs would be prepared differently."""


def changed_keys(old: Any, new: Any, place: str = "") -> list[str]:
    """Dotted keys at which two resolved configurations differ, with both values."""
    if isinstance(old, dict) and isinstance(new, dict):
        found = []
        for key in sorted(old.keys() | new.keys()):
            found += changed_keys(old.get(key), new.get(key), f"{place}.{key}" if place else key)
        return found
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return [
            line
            for number, pair in enumerate(zip(old, new, strict=True))
            for line in changed_keys(*pair, f"{place}.{number}")
        ]
    return [] if old == new else [f"{place}: {old!r:.60} before, {new!r:.60} now"]


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
