"""Training speed alone and beside one busy process, by the number of threads and how they wait for each other.

Every cell is a training run of its own process: a model of 0.4M parameters, uniform over three domains, weftlm's own
trainer. "weftlm" is what a user gets without any setting: the number of threads follows the load. The others fix the
number and the waiting: active threads spin until work comes, passive ones sleep. Runs of one round follow each other,
each setting alone and beside a process that computes on one core, every second round in the opposite order. The best
fixed setting of a column is that of the highest median over the rounds; ratios to it are taken within a round.

    python benchmarks/shared_machine.py  # regenerates benchmarks/results/shared_machine.{json,md}
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import _common
import numpy as np
import torch
from transformers import LlamaConfig

from weftlm.corpora.source import ArraySource
from weftlm.mixture.policy import MixtureSetting, build_policy
from weftlm.models.factory import count_parameters
from weftlm.models.open import from_architecture
from weftlm.training.config import AlignmentConfig, TrainingConfig
from weftlm.training.loop import Task, Trainer
from weftlm.training.runtime import choose_runtime

SETTINGS: dict[str, dict[str, str]] = {
    "weftlm": {},
    "two threads, active": {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "ACTIVE"},
    "two threads, passive": {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "PASSIVE"},
    "one thread": {"OMP_NUM_THREADS": "1"},
}
OPENMP = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
ALONE, BESIDE = "alone", "beside one busy process"
GOALS = {ALONE: 0.97, BESIDE: 0.90}
SEQUENCE, BATCH, LAYERS, HIDDEN, VOCABULARY = 256, 16, 2, 96, 2048
BUSY = "x = 0\nwhile True: x += 1"


def train(steps: int, warm_up: int) -> None:
    """One cell: train and print tokens per second after the warm-up."""
    rng = np.random.default_rng(0)
    names = ("a", "b", "c")
    sources = tuple(ArraySource(rng.integers(0, VOCABULARY, 200_000)) for _ in names)
    tokens_D = torch.tensor([float(len(source)) for source in sources], dtype=torch.float64)
    model = from_architecture(
        LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=256, num_hidden_layers=LAYERS,
            num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=SEQUENCE, tie_word_embeddings=True,
        )
    )  # fmt: skip
    parameters = count_parameters(model)
    config = TrainingConfig(
        tokens=steps * SEQUENCE * BATCH, sequence_length=SEQUENCE, batch_sequences=BATCH, log_every_steps=1,
        save_every_steps=10**6, warmup_steps=1, precision="fp32", device="cpu",
    )  # fmt: skip
    times: list[float] = []

    class Clock:
        def log(self, values: Mapping[str, float], step: int) -> None:
            if "train/loss" in values:
                times.append(time.perf_counter())

        def finish(self) -> None:
            pass

    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model, Task(names, sources, build_policy({"policy": "uniform"}), MixtureSetting(names, tokens_D)),
            config, alignment=AlignmentConfig(), runtime=choose_runtime(config, parameters=parameters),
            folder=Path(folder), seed=0, trackers=(Clock(),),
        )  # fmt: skip
        trainer.run()
    measured = times[warm_up:]
    speed = (len(measured) - 1) * SEQUENCE * BATCH / (measured[-1] - measured[0])
    print(json.dumps({"tokens_per_second": speed, "parameters": parameters}))


def cell(setting: Mapping[str, str], steps: int, warm_up: int) -> dict[str, float]:
    """Run one training process in a setting."""
    environment = {name: value for name, value in os.environ.items() if name not in OPENMP} | dict(setting)
    finished = subprocess.run(
        [sys.executable, __file__, "--train", str(steps), str(warm_up)],
        capture_output=True, text=True, check=True, env=environment,
    )  # fmt: skip
    found: dict[str, float] = json.loads(finished.stdout.splitlines()[-1])
    return found


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    settings = {name: SETTINGS[name] for name in arguments.settings}
    speeds: dict[str, dict[str, list[float]]] = {where: {name: [] for name in settings} for where in arguments.places}
    parameters = 0.0
    for round_ in range(arguments.seeds):
        for where, by_setting in speeds.items():
            order = list(settings.items())
            for name, setting in order[:: 1 if round_ % 2 == 0 else -1]:
                busy = subprocess.Popen([sys.executable, "-c", BUSY]) if where == BESIDE else None
                try:
                    found = cell(setting, arguments.steps, arguments.warm_up)
                finally:
                    if busy is not None:
                        busy.kill()
                        busy.wait()
                by_setting[name].append(found["tokens_per_second"])
                parameters = found["parameters"]
                _common.say(f"round {round_ + 1}, {where}, {name}: {by_setting[name][-1]:,.0f} tokens/s")
    return {
        "parameters": parameters,
        "steps": arguments.steps,
        "warm_up": arguments.warm_up,
        "rounds": arguments.seeds,
        "speeds": {
            where: {name: _common.spread(values).as_json() for name, values in by_setting.items()}
            for where, by_setting in speeds.items()
        },
        "over_best": {
            where: _common.spread(
                [own / best for own, best in zip(by_setting["weftlm"], _best_fixed(by_setting), strict=True)]
            ).as_json()
            for where, by_setting in speeds.items()
        },
        "goals": GOALS,
    }


def _best_fixed(by_setting: Mapping[str, list[float]]) -> list[float]:
    """Speeds, round by round, of the fixed setting with the highest median."""
    return max((values for name, values in by_setting.items() if name != "weftlm"), key=statistics.median)


def to_markdown(record: Mapping[str, Any]) -> str:
    rows = [
        [name, *(_show(by_setting[name], "{:,.0f}") for by_setting in record["speeds"].values())]
        for name in next(iter(record["speeds"].values()))
    ]
    rows.append(["weftlm over the best fixed setting", *(_show(one, "{:.2f}") for one in record["over_best"].values())])
    rows.append(["goal", *(f"≥ {goal:g}" for goal in (record["goals"][where] for where in record["speeds"]))])
    return "\n".join(
        [
            "# Training beside other processes",
            "",
            f"Tokens per second after {record['warm_up']} of {record['steps']} steps, median (range) over "
            f"{record['rounds']} rounds; {record['parameters'] / 1e6:.1f}M parameters, {BATCH} sequences of {SEQUENCE} "
            "tokens, fp32. The best fixed setting of a column is that of the highest median.",
            "",
            _common.table(["setting", *record["speeds"]], rows),
            "",
            _common.environment_lines(record),
        ]
    )


def _show(spread: Mapping[str, float], form: str) -> str:
    return _common.Spread(spread["median"], spread["low"], spread["high"], int(spread["n"])).show(form)


def main() -> None:
    flags = _common.parser((__doc__ or "").splitlines()[0])
    flags.add_argument("--steps", type=int, default=100, help="optimizer steps of a cell")
    flags.add_argument("--warm-up", type=int, default=20, help="steps of a cell that are not measured")
    flags.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS), help="what is compared")
    flags.add_argument("--train", type=int, nargs=2, help=argparse.SUPPRESS)
    arguments = flags.parse_args()
    arguments.places = list(GOALS)
    if arguments.train:
        train(*arguments.train)
        return
    if arguments.quick:
        arguments.seeds, arguments.steps, arguments.warm_up = 1, 4, 1
        arguments.settings, arguments.places = ["weftlm", "one thread"], [BESIDE]
    _common.finish("shared_machine", arguments, run(arguments), to_markdown)


if __name__ == "__main__":
    main()
