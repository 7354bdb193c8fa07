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

NINE = tuple("python-code cpp-headers ml-prose mathematics doctests bytecode type-stubs json licences".split())
STEPS, UPDATE, EVALUATE, LOG = 800, 40, 100, 20
TOKENS_PER_STEP = 4096
LOSSES = {"uniform": 1.827, "importance": 1.886, "dga": 1.784}


def set_result(name: str, own_seed: list[int], nats: float) -> SetResult:
    """Scores of windows whose hardness is common to all runs."""
    count = 300 if name == "target" else 60
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
    start = np.full(len(domains), 1 / len(domains))
    last = start if policy == "uniform" else rng.dirichlet(np.ones(len(domains)))
    end = (LOSSES.get(policy, 1.9) if target_bits is None else target_bits) * math.log(2) * 3.1
    levels = {"target": end, **{name: 4.0 - last[place] for place, name in enumerate(domains)}}

    def suite(step: int) -> SuiteResult:
        fall, own_seed = 3 * math.exp(-6 * step / STEPS), [seed, *policy.encode()]
        sets = {name: set_result(name, own_seed, level + fall) for name, level in levels.items()}
        return SuiteResult(sets, mean_result({name: sets[name] for name in domains}))

    lines: list[dict[str, Any]] = []
    weights = dict(zip(domains, start.tolist(), strict=True))
    for step in range(0, stop + 1, LOG):
        where = {"step": step, "tokens": step * TOKENS_PER_STEP}
        if step:
            lines.append({"kind": "train", **where, "loss": 4 + rng.normal(0, 0.1), "tokens_per_second": 30_500})
        if step % UPDATE == 0:
            share = step / STEPS
            weights = dict(zip(domains, ((1 - share) * start + share * last).tolist(), strict=True))
            record = {"weights": weights, "epochs": dict.fromkeys(domains, share)}
            if policy == "dga" and step:
                record["alignment"] = dict.fromkeys(domains, rng.normal()) | {domains[-1]: None}
            lines.append({"kind": "mixture", **where, **record})
        if step % EVALUATE == 0:
            lines.append({"kind": "eval", **where, **suite(step).to_json()})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    recipe = {
        "run": f"runs/{policy}",
        "seed": seed,
        "mixture": {"policy": policy, **({"eta": 5.0} if policy == "dga" else {})},
        "training": {"batch_sequences": 16, "sequence_length": 256, "lr": 1e-3},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    facts = {
        "packages": {"torch": "2.13.0"},
        "fingerprints": {"data": "5f1e", "run": policy},
        "runtime": [{"setting": "precision", "value": "fp32", "reason": "no fast bf16 here"}],
    }
    (folder / "run.json").write_text(json.dumps(facts))
    if stop == STEPS:
        final = suite(STEPS)
        result = {
            "policy": policy, "steps": STEPS, "train_tokens": STEPS * TOKENS_PER_STEP,
            "seconds": {"train": 107.4, "alignment": 2.9 if policy == "dga" else 0.0, "eval": 14.2},
            "weights": weights, "epochs": dict.fromkeys(domains, 1.5), **final.to_json(),
        }  # fmt: skip
        (folder / "result.json").write_text(json.dumps(result))
        if windows:
            save_windows(folder / "windows.safetensors", final.sets)
    return folder


@pytest.fixture(scope="session")
def make_run() -> Callable[..., Path]:
    return write_run


@pytest.fixture(scope="session")
def three_runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Finished runs of uniform, importance and dga on nine domains; read only."""
    root = tmp_path_factory.mktemp("runs")
    return [write_run(root / policy, policy) for policy in ("uniform", "importance", "dga")]
