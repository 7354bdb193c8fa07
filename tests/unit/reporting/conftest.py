"""Run folders as the training loop writes them, with curves a small model could have shown."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from weftlm.evaluation.result import SetResult, WindowScores, mean_result, save_windows
from weftlm.evaluation.suite import SuiteResult

NINE = (
    "python-code", "cpp-headers", "ml-prose", "mathematics", "doctests", "bytecode", "type-stubs", "json", "licences",
)  # fmt: skip
STEPS, UPDATE, EVALUATE, LOG = 800, 40, 100, 20
TOKENS_PER_STEP = 4096
LOSSES = {"uniform": 1.827, "importance": 1.886, "dga": 1.784}


def set_result(name: str, own_seed: list[int], nats: float, *, count: int = 300) -> SetResult:
    """Scores of windows whose hardness is common to all runs."""
    hardness = np.random.default_rng([7, *name.encode()]).normal(0.0, 0.35, count)
    own = np.random.default_rng([*own_seed, *name.encode()]).normal(0.0, 0.05, count)
    tokens = np.full(count, 256, dtype=np.int64)
    totals = (nats + hardness - hardness.mean() + own - own.mean()) * tokens
    scores = WindowScores(f"fingerprint {name}", np.arange(count, dtype=np.int64) * 256, tokens, totals, 3.1)
    return SetResult.of(scores, round(tokens.sum() * 3.1))


def write_run(
    folder: Path,
    policy: str,
    domains: Sequence[str] = NINE,
    *,
    seed: int = 0,
    stop: int = STEPS,
    target_bits: float | None = None,
    windows: bool = True,
) -> Path:
    """Write a whole run, or one that has come as far as step `stop`."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng([seed, *policy.encode()])
    end = (LOSSES.get(policy, 1.9) if target_bits is None else target_bits) * math.log(2) * 3.1
    start = np.full(len(domains), 1 / len(domains))
    last = start if policy == "uniform" else rng.dirichlet(np.full(len(domains), 0.35)) * 0.92 + 0.08 / len(domains)
    hard = np.random.default_rng(1).uniform(1.2, 3.2, len(domains))
    lines: list[dict[str, Any]] = []

    def curve(step: int, final: float) -> float:
        return final + 3 * math.exp(-step / (0.18 * STEPS)) + 0.35 * math.exp(-step / (0.7 * STEPS)) - 0.084

    def suite(step: int) -> SuiteResult:
        own_seed = [seed, *policy.encode()]
        by_domain = {
            name: set_result(name, own_seed, curve(step, 1.6 * hard[i] - 0.35 * math.log(last[i] * 9 + 0.3)), count=60)
            for i, name in enumerate(domains)
        }
        target = set_result("target", own_seed, curve(step, end))
        return SuiteResult({"target": target, **by_domain}, mean_result(by_domain))

    weights = start
    for step in range(stop + 1):
        tokens = step * TOKENS_PER_STEP
        if step % LOG == 0 and step:
            noise, speed = rng.normal(0, 0.08), 30_500 + rng.normal(0, 500)
            loss = {"loss": curve(step, 3.6) + noise, "lr": 1e-3, "tokens_per_second": speed}
            lines.append({"kind": "train", "step": step, "tokens": tokens, **loss})
        if step % UPDATE == 0:
            share = 1 - math.exp(-3 * step / STEPS)
            weights = ((1 - share) * start + share * last) * np.exp(rng.normal(0, 0.08 * share, len(domains)))
            weights = weights / weights.sum()
            by_name = dict(zip(domains, weights.tolist(), strict=True))
            record = {"weights": by_name, "epochs": dict.fromkeys(domains, step / STEPS)}
            if policy == "dga" and step:
                aligned = dict(zip(domains, (last - start + rng.normal(0, 0.03)).tolist(), strict=True))
                record["alignment"] = aligned | {domains[-1]: None}
            lines.append({"kind": "mixture", "step": step, "tokens": tokens, **record})
        if step % EVALUATE == 0:
            lines.append({"kind": "eval", "step": step, "tokens": tokens, **suite(step).to_json()})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    recipe = {
        "run": f"runs/{policy}",
        "seed": seed,
        "mixture": {"policy": policy, "update_every_steps": UPDATE, **({"eta": 5.0} if policy == "dga" else {})},
        "training": {"total_steps": STEPS, "batch_sequences": 16, "sequence_length": 256, "lr": 1e-3},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    facts = {
        "packages": {"torch": "2.13.0", "transformers": "5.23.0"},
        "seed": seed,
        "fingerprints": {"data": "5f1e", "run": policy},
        "runtime": [{"setting": "precision", "value": "fp32", "reason": "no fast bf16 here"}],
    }
    (folder / "run.json").write_text(json.dumps(facts))
    if stop == STEPS:
        final = suite(STEPS)
        result = {
            "policy": policy, "steps": STEPS, "train_tokens": STEPS * TOKENS_PER_STEP, "parameters": 1_245_312,
            "seconds": {"train": 107.4, "alignment": 2.9 if policy == "dga" else 0.0, "eval": 14.2},
            "weights": dict(zip(domains, weights.tolist(), strict=True)),
            "epochs": dict.fromkeys(domains, 1.5), **final.to_json(),
        }  # fmt: skip
        (folder / "result.json").write_text(json.dumps(result))
        if windows:
            save_windows(folder / "windows.safetensors", final.sets)
    return folder


@pytest.fixture
def make_run() -> Callable[..., Path]:
    return write_run


@pytest.fixture(scope="session")
def three_runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Finished runs of uniform, importance and dga on nine domains; read only."""
    root = tmp_path_factory.mktemp("runs")
    return [write_run(root / policy, policy) for policy in ("uniform", "importance", "dga")]
