"""Mixtures compared: one small model per (setting, method, seed), on the same data and number of tokens.

A finished run leaves `<work>/<name>.json`; running the benchmark again with the same `--work` continues where it
stopped.
"""

from __future__ import annotations

import hashlib
import json
import math
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from _common import finish, parser, say, spread, table, write_atomically
from _domains_text import TokenisedDomain
from torch import nn

from weftlm.corpora.source import ArraySource
from weftlm.evaluation.config import EvaluationConfig
from weftlm.evaluation.suite import evaluate_suite
from weftlm.mixture.policy import MixtureSetting, build_policy
from weftlm.models.config import ModelConfig
from weftlm.models.factory import build_model, count_parameters
from weftlm.training.config import AlignmentConfig, TrainingConfig
from weftlm.training.loop import Task, Trainer
from weftlm.training.metrics import read_metrics
from weftlm.training.runtime import choose_runtime

MODEL: dict[str, Any] = {
    "architecture": "llama",
    "config": {
        "hidden_size": 64, "intermediate_size": 168, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 4,
    },
}  # fmt: skip
TRAINING: dict[str, Any] = {
    "sequence_length": 128, "batch_sequences": 24, "tokens": 1_200_000, "lr": 3e-3, "warmup_steps": 30,
    "save_every_steps": 1_000_000, "log_every_steps": 1_000_000, "threads": 1,
}  # fmt: skip
FIRST_SEED = {"report": 0, "dev": 100}
QUICK_TOKENS = 20_000
QUICK_MODEL: dict[str, Any] = {
    **MODEL, "config": {**MODEL["config"], "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1},
}  # fmt: skip

Method = tuple[Mapping[str, Any] | None, Mapping[str, Any]]
"""The recipe's `mixture` section (None: train on the target's documents alone) and its `alignment` section."""


@dataclass(frozen=True)
class Data:
    """Everything a run reads: domains, the target and what a histogram or a basis says of it."""

    domains: tuple[TokenisedDomain, ...]
    target_train: ArraySource
    target_heldout: ArraySource
    target_histogram: tuple[float, ...]
    basis: tuple[tuple[float, ...], ...] | None
    vocab_size: int
    eos_id: int


@dataclass(frozen=True)
class RunSpec:
    """One run: where its data comes from and what differs.

    Attributes:
        data: arguments of the benchmark's data function.
        setting, method: the table and the row it belongs to.
        mixture: the recipe's `mixture` section, or None to train on the target alone.
        seed: of weights and draws.
        training, model, alignment: sections of the recipe.
    """

    data: Mapping[str, Any]
    setting: str
    method: str
    mixture: Mapping[str, Any] | None
    seed: int
    training: Mapping[str, Any]
    model: Mapping[str, Any]
    alignment: Mapping[str, Any] = field(default_factory=dict)
    evaluations: int = 4
    generic_tokens: int = 2048

    @property
    def name(self) -> str:
        """A name that changes with every choice."""
        text = json.dumps(self.__dict__, sort_keys=True, default=dict)
        return f"{self.method}-{hashlib.blake2b(text.encode(), digest_size=8).hexdigest()}"


def run_one(spec: RunSpec, make_data: Callable[..., Data], work: Path) -> dict[str, Any]:
    """Train and evaluate one model; returns its curve, its mixture over time and its cost."""
    data = make_data(**spec.data)
    target_only = spec.mixture is None
    names = ("target",) if target_only else tuple(domain.name for domain in data.domains)
    sources = (data.target_train,) if target_only else tuple(domain.train for domain in data.domains)
    setting = MixtureSetting(
        domains=names,
        tokens_D=torch.tensor([len(source) for source in sources], dtype=torch.float64),
        target_histogram_D=None if target_only else torch.tensor(data.target_histogram, dtype=torch.float64),
        basis_ND=None if data.basis is None or target_only else torch.tensor(data.basis, dtype=torch.float64),
    )
    config = TrainingConfig.model_validate(dict(spec.training))

    def make_model(seed: int) -> nn.Module:
        model = ModelConfig.model_validate(dict(spec.model))
        return build_model(
            model, vocab_size=data.vocab_size, sequence_length=config.sequence_length, eos_id=data.eos_id, seed=seed
        )

    model = make_model(spec.seed)
    parameters = count_parameters(model)
    evaluation = EvaluationConfig(max_tokens_per_set=spec.generic_tokens)
    whole = EvaluationConfig(max_tokens_per_set=None)

    def evaluate(module: nn.Module) -> dict[str, Any]:
        target = evaluate_suite(module, {}, data.target_heldout, sequence_length=config.sequence_length, config=whole)
        generic = evaluate_suite(
            module, {d.name: d.heldout for d in data.domains}, sequence_length=config.sequence_length, config=evaluation
        )
        assert generic.generic is not None
        sets = {**generic.sets, "target": target.sets["target"]}
        return {"sets": {name: one.to_json() for name, one in sets.items()}, "generic": generic.generic.to_json()}

    folder = Path(tempfile.mkdtemp(prefix=f"{spec.name}.", dir=work))
    policy = build_policy(dict(spec.mixture or {"policy": "uniform"}))
    reference, reference_seconds = None, 0.0
    if "reference_losses" in policy.needs:
        reference = make_model(spec.seed)
        task = Task(names, sources, build_policy({"policy": "uniform"}), setting)
        runtime = choose_runtime(config, parameters=parameters)
        first = Trainer(
            reference,
            task,
            config,
            alignment=AlignmentConfig(),
            runtime=runtime,
            folder=folder / "reference",
            seed=spec.seed,
        ).run()
        reference_seconds = first.seconds["train"]
    trainer = Trainer(
        model,
        Task(names, sources, policy, setting, data.target_train, reference),
        config,
        alignment=AlignmentConfig.model_validate(dict(spec.alignment)),
        runtime=choose_runtime(config, parameters=parameters),
        folder=folder,
        seed=spec.seed,
        evaluate=evaluate,
        evaluate_every_steps=math.ceil(config.total_steps / spec.evaluations),
    )
    start = time.perf_counter()
    result = trainer.run()
    lines = list(read_metrics(folder / "metrics.jsonl"))
    curve = [
        {
            "tokens": line["tokens"],
            "target": line["sets"]["target"]["bits_per_byte"],
            "generic": line["generic"]["bits_per_byte"],
        }
        for line in lines
        if line["kind"] == "eval" and line["step"] > 0
    ]
    final = next(line["sets"] for line in reversed(lines) if line["kind"] == "eval")
    mixtures = [list(line["weights"].values()) for line in lines if line["kind"] == "mixture"]
    choice = trainer.mixture.choice
    shutil.rmtree(folder)
    found = {
        "setting": spec.setting,
        "method": spec.method,
        "seed": spec.seed,
        "curve": curve,
        "target": curve[-1]["target"],
        "target_best": min(point["target"] for point in curve),
        "generic": curve[-1]["generic"],
        "domains": {name: one["bits_per_byte"] for name, one in final.items() if name != "target"},
        "tokens": result.tokens,
        "steps": result.step,
        "parameters": parameters,
        "seconds": result.seconds,
        "reference_seconds": reference_seconds,
        "wall_seconds": time.perf_counter() - start,
        "alignment_share": result.seconds["alignment"] / (result.seconds["train"] + result.seconds["alignment"]),
        "weights": result.weights,
        "epochs_max": max(result.epochs.values()),
        "mixtures": mixtures,
        "estimator": None if choice is None else [choice.estimator, choice.probe],
    }
    write_atomically(work / f"{spec.name}.json", json.dumps(found))
    return found


def run_all(
    specs: Sequence[RunSpec], make_data: Callable[..., Data], work: Path, *, processes: int
) -> list[dict[str, Any]]:
    """Run what is not done yet, one thread per process, and return every result in the order of `specs`."""
    work.mkdir(parents=True, exist_ok=True)
    todo = [spec for spec in specs if not (work / f"{spec.name}.json").exists()]
    say(f"{len(specs)} runs, {len(specs) - len(todo)} of them done already")
    os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false"}
    start = time.perf_counter()
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        running = {pool.submit(run_one, spec, make_data, work): spec for spec in todo}
        for count, future in enumerate(as_completed(running), start=1):
            spec, result = running[future], future.result()
            say(
                f"[{count}/{len(todo)} {time.perf_counter() - start:.0f}s] "
                f"{spec.setting}, {spec.method}, seed {spec.seed}: "
                f"target {result['target']:.4f} generic {result['generic']:.4f} "
                f"({result['wall_seconds']:.0f}s, alignment {100 * result['alignment_share']:.0f}%)"
            )
    return [json.loads((work / f"{spec.name}.json").read_text()) for spec in specs]


def experiment(
    theme: str,
    about: str,
    methods: Mapping[str, Method],
    settings: Mapping[str, Mapping[str, Any]],
    make_data: Callable[..., Data],
    to_markdown: Callable[[Mapping[str, Any]], str],
    *,
    targets: Mapping[str, str],
) -> None:
    """The command line of a comparison: every method in every setting and seed, then one result.

    Args:
        theme: name of the result.
        about: the benchmark's docstring.
        methods: rows of the tables; the one called `dga` is what margins are taken to.
        settings: tables; further arguments of `make_data`.
        make_data: (source, split, seed, **setting) -> Data, importable by worker processes.
        to_markdown: the record as a page.
        targets: the target's name by split.
    """
    flags = parser(about.splitlines()[0])
    flags.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder with domains/*.jsonl.zst")
    flags.add_argument("--split", choices=("report", "dev"), default="report", help="dev: another target, other seeds")
    flags.add_argument("--processes", type=int, default=2, help="runs at a time, one thread each")
    flags.add_argument("--work", type=Path, default=None, help="where finished runs are kept, to continue later")
    arguments = flags.parse_args()
    if not (arguments.data / "domains").is_dir():
        if not arguments.quick:
            flags.error(f"{arguments.data} holds no domains/*.jsonl.zst; name the folder with --data")
        sys.stdout.write(json.dumps({"theme": theme, "skipped": "no text to read; name its folder with --data"}) + "\n")
        return
    if arguments.split == "dev" and not arguments.quick:
        theme = f"{theme}.dev"
    training = {**TRAINING, "tokens": QUICK_TOKENS} if arguments.quick else TRAINING
    sizes: dict[str, Any] = {"model": MODEL}
    if arguments.quick:
        sizes = {"model": QUICK_MODEL, "evaluations": 1, "generic_tokens": 256}
    chosen = dict(list(settings.items())[:1]) if arguments.quick else settings
    if arguments.quick:
        methods = {name: method for name, method in methods.items() if name in ("uniform", "importance", "dga")}
    first = FIRST_SEED[arguments.split]
    seeds = range(first, first + (1 if arguments.quick else arguments.seeds))
    specs = [
        RunSpec(
            data={"source": str(arguments.data), "split": arguments.split, "seed": seed, **setting},
            setting=name, method=method, mixture=mixture, seed=seed,
            training=training, alignment=alignment, **sizes,
        )
        for name, setting in chosen.items() for seed in seeds for method, (mixture, alignment) in methods.items()
        if mixture is not None or name == next(iter(chosen))
    ]  # fmt: skip
    with tempfile.TemporaryDirectory() as temporary:
        results = run_all(specs, make_data, arguments.work or Path(temporary), processes=arguments.processes)
    record = {
        "split": arguments.split,
        "target": targets[arguments.split],
        "seeds": len(seeds),
        "parameters": results[0]["parameters"],
        "train_tokens": results[0]["tokens"],
        "training": dict(training),
        "methods": {
            name: {"mixture": dict(mixture) if mixture else None, "alignment": dict(alignment)}
            for name, (mixture, alignment) in methods.items()
        },
        "settings": {name: summarise([r for r in results if r["setting"] == name]) for name in chosen},
    }
    finish(theme, arguments, record, to_markdown)


def summarise(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Spread over seeds of every figure, by method."""
    dga = {result["seed"]: result["target"] for result in results if result["method"] == "dga"}
    rows = {}
    for method in dict.fromkeys(result["method"] for result in results):
        runs = [result for result in results if result["method"] == method]
        figures = {
            "target": [run["target"] for run in runs],
            "margin": [run["target"] - dga[run["seed"]] for run in runs],
            "target_best": [run["target_best"] for run in runs],
            "generic": [run["generic"] for run in runs],
            "epochs_max": [run["epochs_max"] for run in runs],
            "jumps": [roughness(run["mixtures"]) for run in runs],
            "alignment_share": [run["alignment_share"] for run in runs],
        }
        rows[method] = {name: spread(values).as_json() for name, values in figures.items()}
        rows[method]["curves"] = [run["curve"] for run in runs]
        rows[method]["estimator"] = runs[0]["estimator"]
    return rows


COLUMNS = {
    "target": "target",
    "margin": "margin to DGA",
    "target_best": "target, best on the way",
    "generic": "generic",
    "epochs_max": "epochs of the most read",
    "jumps": "jumps",
    "alignment_share": "alignment's share of time",
}
FORMS = {"margin": "{:+.4f}", "epochs_max": "{:.1f}", "jumps": "{:.3f}", "alignment_share": "{:.0%}"}
LEGEND = (
    "Bits per byte on held-out text, median (lowest .. highest) over seeds; `generic` is the mean over the domains. "
    "`margin to DGA` is the method's target minus DGA's, seed by seed: positive where DGA is better. `jumps` is the "
    "total-variation distance between the mixtures of neighbouring updates, after the first third of training. "
    "Training on the target alone does not depend on the domains and stands in the first table only."
)


def rows_table(rows: Mapping[str, Any]) -> str:
    """One setting as a Markdown table."""

    def show(values: Mapping[str, float], form: str) -> str:
        middle, low, high = (form.format(values[key]) for key in ("median", "low", "high"))
        return middle if low == high else f"{middle} ({low} .. {high})"

    body = [[name, *(show(row[key], FORMS.get(key, "{:.4f}")) for key in COLUMNS)] for name, row in rows.items()]
    return table(["method", *COLUMNS.values()], body)


def roughness(mixtures: Sequence[Sequence[float]]) -> float:
    """How much a mixture jumps: mean total-variation distance between neighbouring updates, after the first third.

    mean_t  1/2 sum_i |alpha_i(t + 1) - alpha_i(t)|
    """
    late = torch.tensor(mixtures, dtype=torch.float64)[len(mixtures) // 3 :]
    return float(0.5 * (late[1:] - late[:-1]).abs().sum(dim=1).mean()) if len(late) > 1 else 0.0
