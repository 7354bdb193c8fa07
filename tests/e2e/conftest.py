"""A tiny corpus and recipe for tests that run the real command line."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

WORDS = {
    "cooking": "pan butter onion garlic simmer stir salt pepper oven roast sauce pot heat slice serve taste".split(),
    "sailing": "mast sail wind harbour tide rope anchor deck hull keel storm captain crew bow stern wave".split(),
    "algebra": "ring field ideal module group kernel image exact functor prime root degree matrix basis norm trace".split(),
}
TARGET_WORDS = "rope wind deck tide sail knot mast gust tack jib".split()

Weft = Callable[..., subprocess.CompletedProcess[str]]


def sentence(rng: random.Random, words: list[str]) -> str:
    """A few words of a domain, some of them repeated, so that there is something to learn."""
    start = rng.randrange(len(words))
    return " ".join(words[(start + i * rng.choice((1, 1, 1, 2))) % len(words)] for i in range(rng.randrange(8, 14))) + "."


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
    return [sys.executable, "-m", "weft", *map(str, arguments)]


@pytest.fixture
def weft(tmp_path: Path) -> Weft:
    """Run `weft ...` in the test's folder and return the finished process."""

    def run(*arguments: str | Path, check: int | None = 0) -> subprocess.CompletedProcess[str]:
        finished = subprocess.run(
            command(*arguments), capture_output=True, text=True, cwd=tmp_path, env=environment(), timeout=300, check=False
        )
        if check is not None:
            assert finished.returncode == check, finished.stderr
        return finished

    return run


def recipe_value(folder: Path) -> dict[str, Any]:
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


@pytest.fixture
def recipe(tmp_path: Path) -> Callable[[Mapping[str, Any]], Path]:
    """Write corpora and a recipe with some top-level sections replaced; returns the recipe's path."""
    write_corpora(tmp_path / "corpora")

    def write(changes: Mapping[str, Any] | None = None, name: str = "recipe.yaml") -> Path:
        path = tmp_path / name
        path.write_text(yaml.safe_dump({**recipe_value(tmp_path), **(changes or {})}))
        return path

    return write
