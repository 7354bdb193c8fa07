"""Tokens per second of drawing and reading a mixture, against its peers, and what each does when weights change.

    python benchmarks/sampler.py [--quick] [--json] [--with-mosaic] [--mosaic-env FOLDER]

All contestants draw batches of the same rows from memory-mapped files in one run, in turns, and deliver int64 tensors.
mosaicml-streaming wants older packages than weftlm's, so it runs in a process and a virtual environment of its own,
made on demand (`--with-mosaic`) in FOLDER or in a temporary folder.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import _common
import datasets
import torch
from _sampler_behaviour import behaviour, seconds
from _sampler_peers import IN_PROCESS, Task, write

MOSAIC = "mosaicml-streaming StreamingDataset"
OURS = "weftlm"
DOMAINS, LENGTH, BATCH = 8, 256, 64
WEIGHTS = [(index + 1) / 36 for index in range(DOMAINS)]
HERE = Path(__file__).resolve().parent


class MosaicProcess:
    """The contestant at the other end of a pipe."""

    def __init__(self, python: Path, task: Task) -> None:
        facts = {
            "weights": task.weights, "batch": task.batch, "seed": task.seed, "epoch_rows": task.epoch_rows,
        }  # fmt: skip
        (task.folder / "task.json").write_text(json.dumps(facts), encoding="utf-8")
        self._log = (task.folder / "mosaic.log").open("w+", encoding="utf-8")
        self._process = subprocess.Popen(
            [str(python), str(HERE / "_sampler_mosaic.py"), str(task.folder)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        self.versions: dict[str, str] = self._answer()

    def ask(self, **request: Any) -> Any:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._log.seek(0)
            raise SystemExit("the mosaicml-streaming process ended:\n" + self._log.read()[-3000:])
        return json.loads(line)

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)
        self._log.close()


def mosaic_python(folder: Path) -> Path:
    """The interpreter of the peer's own environment, made if it is not there yet."""
    python = folder / "bin" / "python"
    if not (folder / "ready").exists():
        _common.say(f"making an environment for mosaicml-streaming with torch {torch.__version__.partition('+')[0]}")
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        wanted = [f"torch=={torch.__version__.partition('+')[0]}", "mosaicml-streaming"]
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", *wanted], check=True, stdout=sys.stderr)
        (folder / "ready").touch()
    return python


def measure(task: Task, rounds: int, python: Path | None, target_seconds: float) -> dict[str, Any]:
    """Median seconds per batch of each contestant, taken in turns."""
    started = {}
    contestants = {}
    for name, make in IN_PROCESS.items():
        before = time.perf_counter()
        contestants[name] = make(task)
        contestants[name].next()
        started[name] = time.perf_counter() - before
    timers = {name: lambda count, one=one: seconds(one, count) for name, one in contestants.items()}
    mosaic = MosaicProcess(python, task) if python else None
    if mosaic:
        timers[MOSAIC] = lambda count: mosaic.ask(do="time", batches=count)
    batches = {}
    for name, timer in timers.items():
        timer(10)
        batches[name] = max(5, min(400, int(target_seconds / (timer(20) / 20))))
    taken: dict[str, list[float]] = {name: [] for name in timers}
    for _ in range(rounds):
        for name, timer in timers.items():
            taken[name].append(timer(batches[name]) / batches[name])
    result: dict[str, Any] = {"seconds_per_batch": taken, "first_batch_seconds": started}
    if mosaic:
        result["mosaic"] = {"versions": mosaic.versions}
        mosaic.close()
    return result


def behaviours(task: Task, python: Path | None) -> dict[str, Any]:
    """What each contestant does when weights change and when it is resumed."""
    found = {name: behaviour(lambda make=make: make(task), task.domains) for name, make in IN_PROCESS.items()}
    if python:
        mosaic = MosaicProcess(python, task)
        found[MOSAIC] = mosaic.ask(do="behaviour")
        mosaic.close()
    return found


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    tokens = BATCH * LENGTH
    rounds, rows, target = (3, 600, 0.05) if arguments.quick else (15, 4000, 0.25)
    runs = []
    with tempfile.TemporaryDirectory() as scratch:
        python = None
        if arguments.with_mosaic or arguments.mosaic_env:
            python = mosaic_python(arguments.mosaic_env or Path(scratch) / "environment")
        for seed in range(arguments.seeds):
            task = Task(Path(scratch) / f"seed-{seed}", WEIGHTS, BATCH, LENGTH, seed, rows)
            task.folder.mkdir()
            write(task)
            runs.append(measure(task, rounds, python, target))
            _common.say(f"seed {seed} measured")
        task = Task(Path(scratch) / "behaviour", WEIGHTS, 16, 32, 0, 4000)
        task.folder.mkdir()
        write(task)
        found = behaviours(task, python)
    for name, one in found.items():
        worst = max(abs(share - weight) for share, weight in zip(one["shares_before"], WEIGHTS, strict=True))
        if worst > 0.1:  # six standard deviations and more
            raise SystemExit(f"{name} is set up wrongly: its domains come as {one['shares_before']}")
    names = list(runs[0]["seconds_per_batch"])
    rates = {
        name: [tokens / _common.spread(one["seconds_per_batch"][name]).median for one in runs] for name in names
    }  # fmt: skip
    # A ratio is taken within a round, where both had the same machine, then the median of a seed's rounds.
    ratios = {
        name: [
            _common.spread(
                [
                    theirs / ours
                    for theirs, ours in zip(one["seconds_per_batch"][name], one["seconds_per_batch"][OURS], strict=True)
                ]
            ).median
            for one in runs
        ]
        for name in names
    }
    peers = [name for name in names if not name.startswith("weftlm")]
    as_documented = [name for name in peers if "by hand" not in name]
    starts = {name: [one["first_batch_seconds"][name] for one in runs] for name in runs[0]["first_batch_seconds"]}

    def over_best(among: list[str]) -> dict[str, float]:
        return _common.spread([min(ratios[name][seed] for name in among) for seed in range(len(runs))]).as_json()

    return {
        "setting": {
            "domains": DOMAINS,
            "sequence_length": LENGTH,
            "batch": BATCH,
            "rows_per_domain": rows,
            "rounds": rounds,
        },
        "seeds": arguments.seeds,
        "tokens_per_second": {name: _common.spread(rates[name]).as_json() for name in names},
        "weftlm_over": {name: _common.spread(ratios[name]).as_json() for name in peers},
        "weftlm_over_best_peer": over_best(as_documented),
        "weftlm_over_best_peer_with_code_by_hand": over_best(peers),
        "first_batch_seconds": {name: _common.spread(values).as_json() for name, values in starts.items()},
        "behaviour": found,
        "peer_versions": {
            "datasets": datasets.__version__,
            "torchdata": metadata.version("torchdata"),
            **({"mosaicml-streaming": runs[0]["mosaic"]["versions"]["version"]} if python else {}),
        },
    }


def markdown(record: Mapping[str, Any]) -> str:
    setting = record["setting"]
    speeds = []
    for name, rate in record["tokens_per_second"].items():
        ratio = record["weftlm_over"].get(name)
        speeds.append([name, _shown(rate, 1e-6), _shown(ratio) if ratio else ""])
    acts = []
    for name, one in record["behaviour"].items():
        late = one["batches_until_change"]
        when = (
            "never (100 batches)" if late is None else "at the step promised" if late == 0 else f"{late} batches late"
        )
        acts.append([
            name, when, f"{one['repeated']:.0%}", "yes" if one["resumes"] else "no",
            "yes" if one["resumes_after_change"] else "no", "yes" if one["resumes_given_new_weights"] else "no",
        ])  # fmt: skip
    versions = ", ".join(f"{name} {version}" for name, version in record["peer_versions"].items())
    return "\n".join([
        "# Drawing a mixture",
        "",
        f"{setting['domains']} domains, {setting['sequence_length']} tokens per sequence, batches of "
        f"{setting['batch']}, {setting['rows_per_domain']} sequences per domain in memory-mapped files, "
        f"{record['seeds']} seeds; median over {setting['rounds']} rounds taken in turns, then median (lowest .. "
        "highest) over seeds. Every contestant shuffles within a domain and delivers int64 tensors, in one process.",
        "",
        _common.table(["", "million tokens/s", "weftlm is faster by"], speeds),
        "",
        f"Against the best peer as documented: {_shown(record['weftlm_over_best_peer'])} times; counting peers "
        f"whose rows are read by code of our own: {_shown(record['weftlm_over_best_peer_with_code_by_hand'])} times.",
        "",
        "## When weights change, and after a resume",
        "",
        "Measured, not read: after 20 batches all weight moves to one domain by whatever the library offers; a second "
        "run is saved, loaded into a fresh object and its next 20 batches compared with the run that went on: without "
        "a change, after one, and after one with the fresh object told the new weights before it is loaded.",
        "",
        _common.table(
            [
                "", "the change takes effect", "rows repeated after it", "resumes exactly", "after a change",
                "and told the new weights",
            ],
            acts,
        ),
        "",
        "`interleave_datasets` has no call for either: its mixture is built anew, which starts every domain from its "
        "beginning again, and its position is kept by the caller.",
        "",
        f"Peers: {versions}. {_common.environment_lines(record)}",
    ])  # fmt: skip


def _shown(spread: Mapping[str, float], scale: float = 1.0) -> str:
    return _common.Spread(spread["median"], spread["low"], spread["high"], int(spread["n"])).show("{:.3g}", scale)


def main() -> None:
    flags = _common.parser(__doc__.partition("\n")[0])
    flags.add_argument("--with-mosaic", action="store_true", help="measure mosaicml-streaming too")
    flags.add_argument("--mosaic-env", type=Path, help="folder of its environment, kept between runs; made if missing")
    arguments = flags.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    datasets.disable_progress_bars()
    logging.getLogger("datasets").setLevel(logging.ERROR)
    _common.finish("sampler", arguments, run(arguments), markdown)


if __name__ == "__main__":
    main()
