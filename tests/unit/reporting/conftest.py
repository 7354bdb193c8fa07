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

from weftlm.evaluation.result import SetResult, WindowScores, ratio_and_error, save_windows

NINE = (
    "python-code", "cpp-headers", "ml-prose", "mathematics", "doctests", "bytecode", "type-stubs", "json", "licences",
)  # fmt: skip
STEPS, UPDATE, EVALUATE, LOG = 800, 20, 50, 10
TOKENS_PER_STEP = 4096
LOSSES = {"uniform": 1.827, "importance": 1.886, "dga": 1.784}


def final_weights(policy: str, domains: Sequence[str], rng: np.random.Generator) -> np.ndarray[Any, Any]:
    if policy == "uniform":
        return np.full(len(domains), 1 / len(domains))
    raw = np.sort(rng.dirichlet(np.full(len(domains), 0.35)))[::-1]
    order = np.random.default_rng(len(domains)).permutation(len(domains))
    weights = np.empty(len(domains))
    weights[order] = raw
    return 0.92 * weights + 0.08 / len(domains) if policy == "dga" else weights


def set_result(name: str, own_seed: list[int], nats: float, *, count: int = 300) -> SetResult:
    """Scores of windows whose hardness is common to all runs."""
    hardness = np.random.default_rng([7, *name.encode()]).normal(0.0, 0.35, count)
    own = np.random.default_rng([*own_seed, *name.encode()]).normal(0.0, 0.05, count)
    tokens = np.full(count, 256, dtype=np.int64)
    totals = (nats + hardness - hardness.mean() + own - own.mean()) * tokens
    mean, error = ratio_and_error(totals, tokens)
    scores = WindowScores(f"fingerprint {name}", np.arange(count, dtype=np.int64) * 256, tokens, totals, 3.1)
    scale = 1 / (math.log(2) * 3.1)
    sizes = (int(tokens.sum()), round(tokens.sum() * 3.1))
    return SetResult(
        nats_per_token=mean, nats_per_token_se=error, perplexity=math.exp(mean), bits_per_byte=mean * scale,
        bits_per_byte_se=error * scale, tokens=sizes[0], bytes=sizes[1], windows=scores,
    )  # fmt: skip


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
    scale = math.log(2) * 3.1
    end = (LOSSES.get(policy, 1.9) if target_bits is None else target_bits) * scale
    last = final_weights(policy, domains, rng)
    start = np.full(len(domains), 1 / len(domains))
    hard = np.random.default_rng(1).uniform(1.2, 3.2, len(domains))
    lines: list[dict[str, Any]] = []
    noise = np.zeros(len(domains))
    epochs = np.zeros(len(domains))
    size = np.random.default_rng(2).uniform(2e5, 2e6, len(domains))

    def curve(step: int, final: float, rate: float = 0.18, lift: float = 3.0) -> float:
        return final + lift * math.exp(-step / (rate * STEPS)) + 0.35 * math.exp(-step / (0.7 * STEPS)) - 0.084

    def sets(step: int) -> dict[str, SetResult]:
        overfit = 0.9 * (max(0.0, step / STEPS - 0.45) ** 2 - 0.55**2) if policy == "importance" else 0.0
        own_seed = [seed, *policy.encode()]
        results = {"target": set_result("target", own_seed, curve(step, end) + overfit)}
        for i, name in enumerate(domains):
            gain = 0.35 * math.log(last[i] * len(domains) + 0.3)
            results[name] = set_result(
                name, own_seed, curve(step, hard[i] * 1.6 - gain, 0.15 + 0.02 * (i % 4)), count=60
            )
        return results

    def as_json(results: dict[str, SetResult]) -> dict[str, Any]:
        values = {name: result.to_json() for name, result in results.items()}
        domain_values = [values[name] for name in domains]
        errors = [value["bits_per_byte_se"] for value in domain_values]
        generic = {
            "nats_per_token": sum(value["nats_per_token"] for value in domain_values) / len(domains),
            "bits_per_byte": sum(value["bits_per_byte"] for value in domain_values) / len(domains),
            "bits_per_byte_se": math.hypot(*errors) / len(domains),
        }
        return {"sets": values, "generic": generic}

    weights = start
    for step in range(stop + 1):
        tokens = step * TOKENS_PER_STEP
        if step:
            epochs += weights * TOKENS_PER_STEP / size
        if step % LOG == 0 and step:
            lines.append(
                {
                    "kind": "train", "step": step, "tokens": tokens,
                    "loss": curve(step, 3.6) + float(rng.normal(0, 0.08)), "lr": 1e-3, "grad_norm": 0.9,
                    "tokens_per_second": 30_500 + float(rng.normal(0, 500)) - (900 if policy == "dga" else 0),
                }
            )  # fmt: skip
        if step % UPDATE == 0:
            noise = 0.85 * noise + rng.normal(0, 0.08, len(domains))
            share = 0.0 if policy == "uniform" else 1.0 if policy == "importance" else 1 - math.exp(-3 * step / STEPS)
            mixed = (1 - share) * start + share * last
            weights = mixed * np.exp(noise if policy == "dga" else 0)
            weights = weights / weights.sum()
            record: dict[str, Any] = {
                "kind": "mixture", "step": step, "tokens": tokens,
                "weights": dict(zip(domains, weights.tolist(), strict=True)),
                "epochs": dict(zip(domains, epochs.tolist(), strict=True)),
                "domain_losses": dict.fromkeys(domains, 4.0 if step else None),
                "diagnostics": {},
            }  # fmt: skip
            if policy == "dga" and step:
                aligned = (last * len(domains) - 0.8) * math.exp(-step / STEPS) * 0.05 + rng.normal(
                    0, 0.03, len(domains)
                )
                record["alignment"] = dict(zip(domains, aligned.tolist(), strict=True))
                record["alignment"][domains[-1]] = None
            lines.append(record)
        if step % EVALUATE == 0:
            lines.append({"kind": "eval", "step": step, "tokens": tokens, **as_json(sets(step))})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    recipe = {
        "run": f"runs/{policy}",
        "seed": seed,
        "model": {"architecture": "llama", "layers": 4, "hidden_size": 128},
        "mixture": {"policy": policy, "update_every_steps": UPDATE, **({"eta": 5.0} if policy == "dga" else {})},
        "training": {"total_steps": STEPS, "batch_sequences": 16, "sequence_length": 256, "lr": 1e-3},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    facts = {
        "weftlm": "0.1.0",
        "packages": {"torch": "2.13.0", "transformers": "5.23.0"},
        "git": "0123abcd",
        "seed": seed,
        "fingerprints": {"data": "5f1e", "run": policy},
        "runtime": [{"setting": "precision", "value": "fp32", "reason": "no fast bf16 here"}],
    }
    (folder / "run.json").write_text(json.dumps(facts))
    if stop == STEPS:
        final = sets(STEPS)
        seconds = {"train": 107.4, "alignment": 2.9 if policy == "dga" else 0.0, "eval": 14.2, "save": 1.1}
        result = {
            "policy": policy, "steps": STEPS, "train_tokens": STEPS * TOKENS_PER_STEP, "seconds": seconds,
            "weights": dict(zip(domains, weights.tolist(), strict=True)),
            "epochs": dict(zip(domains, epochs.tolist(), strict=True)),
            "parameters": 1_245_312, **as_json(final),
        }  # fmt: skip
        (folder / "result.json").write_text(json.dumps(result))
        if windows:
            save_windows(folder / "windows.safetensors", final)
    return folder


@pytest.fixture
def make_run() -> Callable[..., Path]:
    return write_run


@pytest.fixture(scope="session")
def three_runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Finished runs of uniform, importance and dga on nine domains; read only."""
    root = tmp_path_factory.mktemp("runs")
    return [write_run(root / policy, policy) for policy in ("uniform", "importance", "dga")]
