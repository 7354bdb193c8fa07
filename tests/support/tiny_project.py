"""A tiny corpus and recipe, and the real command line to run on them."""

from __future__ import annotations

import json
import os
import random
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

WORDS = {
    "cooking": "pan butter onion garlic simmer stir salt pepper oven roast sauce pot heat slice serve taste".split(),
    "sailing": "mast sail wind harbour tide rope anchor deck hull keel storm captain crew bow stern wave".split(),
    "algebra": "ring field ideal module group kernel image exact prime root degree matrix basis norm trace".split(),
}
TARGET_WORDS = WORDS["sailing"][3:13]


def sentence(rng: random.Random, words: list[str]) -> str:
    """A few words of a domain, some of them repeated, so that there is something to learn."""
    start = rng.randrange(len(words))
    return (
        " ".join(words[(start + i * rng.choice((1, 1, 1, 2))) % len(words)] for i in range(rng.randrange(8, 14))) + "."
    )


def write_corpora(folder: Path) -> None:
    """Three labelled domains and a target, as JSON Lines."""
    rng = random.Random(0)
    folder.mkdir(parents=True, exist_ok=True)
    for name, words in WORDS.items():
        texts = [" ".join(sentence(rng, words) for _ in range(6)) for _ in range(60)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    texts = [" ".join(sentence(rng, TARGET_WORDS) for _ in range(6)) for _ in range(24)]
    (folder / "target.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def environment() -> dict[str, str]:
    """One thread per process: the tests share the machine."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false"}


def command(*arguments: str | Path) -> list[str]:
    """The real command line of this environment."""
    return [sys.executable, "-m", "weftlm", *map(str, arguments)]


def recipe_value() -> dict[str, Any]:
    """A recipe over `write_corpora`'s files; every path is relative to the test's folder."""
    return {
        "run": "runs/one",
        "seed": 3,
        "data": {
            "corpora": [{"path": f"corpora/{name}.jsonl", "label": name} for name in WORDS],
            "target": [{"path": "corpora/target.jsonl"}],
            "tokenizer": {"train": {"vocab_size": 320}},
        },
        "model": {
            "architecture": "llama",
            "config": {
                "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
                "num_attention_heads": 2, "num_key_value_heads": 2,
            },
        },
        "mixture": {"policy": "dga", "update_every_steps": 4},
        "alignment": {"target_sequences": 8},
        "training": {
            "sequence_length": 32, "batch_sequences": 8, "steps": 60, "lr": 3e-3, "warmup_steps": 5,
            "save_every_steps": 10, "log_every_steps": 5, "device": "cpu",
        },
        "evaluation": {"every_steps": 30},
    }  # fmt: skip


def write_recipe(folder: Path, changes: Mapping[str, Any] | None = None, name: str = "recipe.yaml") -> Path:
    """Write the recipe with some top-level sections replaced; returns its path."""
    path = folder / name
    path.write_text(yaml.safe_dump({**recipe_value(), **(changes or {})}))
    return path
