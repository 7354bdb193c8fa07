"""Every router over the same experts: held-in domains and tasks, and data no expert saw.

A small base model is trained by weftlm on a uniform mixture of twelve domains, then eighteen experts (twelve domains,
six groups of tasks), each with its gate. Everything is evaluated on each expert's own held-out data and on domains,
sub-domains and tasks that neither base nor experts saw: bits per byte, and accuracy by length-normalised likelihood
where a task has choices. Gates are trained with three seeds. `--split dev` reads other unseen sets and other held-out
documents: settings are chosen there, `--split report` (the default) only reports.

    python benchmarks/routing_quality.py --data PATH      # regenerates benchmarks/results/routing_quality.{json,md}
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from _common import environment_lines, finish, parser, say, spread, table
from _routing_setting import EvaluationSet, Setting

from weftlm import __version__
from weftlm.evaluation.choices import score_choices
from weftlm.evaluation.perplexity import evaluate_source
from weftlm.experts.expert import Expert
from weftlm.routing.config import router_config
from weftlm.routing.routed_model import RoutedModel

BATCH = 16
MIN_TOKENS = 500
"""Sets with less held-out text are left out."""
ROUTERS: dict[str, dict[str, Any]] = {
    "merged": {"router": "merged"},
    "retrieval": {"router": "retrieval"},
    "retrieval by 32 tokens": {"router": "retrieval", "read_tokens": 32},
    "average activation": {"router": "average-activation"},
    "arrow": {"router": "arrow"},
    "random": {"router": "random"},
    "phatgoose": {"router": "phatgoose"},
    "prefix": {"router": "prefix"},
    "blend": {"router": "blend"},
}
"""Rows of the tables, beside base, best single expert, oracle, uniform and multitask; each with its defaults."""
GATED = ("phatgoose", "blend")
ABLATIONS: dict[str, dict[str, Any]] = {
    "phatgoose, k = 1": {"router": "phatgoose", "k": 1},
    "phatgoose, k = 4": {"router": "phatgoose", "k": 4},
}
GATE_STEPS = (0, 20, 400)
GATE_SEEDS = (0, 1, 2)


def score(model: Any, sets: Sequence[EvaluationSet], setting: Setting) -> dict[str, dict[str, float]]:
    """Bits per byte, and accuracy where there are questions, by set."""
    found = {}
    for each in sets:
        result = evaluate_source(
            model, each.heldout, sequence_length=128, batch_size=BATCH, max_tokens=setting.heldout_tokens
        )
        found[each.name] = {"bits_per_byte": result.bits_per_byte}
        if each.questions:
            choices = score_choices(
                model, setting.tokenizer, each.questions, batch_size=BATCH, max_length=384, separator=""
            )
            found[each.name] |= {"accuracy": choices.accuracy, "chance": choices.chance}
    return found


def evaluate(setting: Setting, split: str, *, seeds: Sequence[int], quick: bool) -> dict[str, Any]:
    """All rows on all sets; each is kept in the work folder as soon as it is known."""
    groups = {
        group: [each for each in sets if len(each.heldout) >= MIN_TOKENS] for group, sets in setting.sets(split).items()
    }
    everything = [each for sets in groups.values() for each in sets]
    pool = setting.experts()
    rows: dict[str, Any] = {}

    def row(name: str, make: Any, router: Mapping[str, Any] | None = None) -> None:
        settings = None if router is None else router_config(router).model_dump(mode="json")
        identity = [split, name, settings, __version__, [len(each.questions) for each in everything]]
        digest = hashlib.blake2b(json.dumps(identity).encode(), digest_size=6).hexdigest()
        key = f"scores-{split}-{name}-{digest}".replace(" ", "_").replace("/", "_")
        known = setting.remembered(key)
        if known is None:
            start = time.perf_counter()
            model = make()
            with torch.inference_mode():
                known = score(model, everything, setting)
            setting.remember(key, known)
            say(f"{name}: {time.perf_counter() - start:.0f} s, mean {mean(known, everything):.4f}")
        rows[name] = known

    routed: dict[tuple[int, int], RoutedModel] = {}

    def routed_by(router: Mapping[str, Any], steps: int = 100, seed: int = 0) -> Any:
        def make() -> RoutedModel:
            if (steps, seed) not in routed:
                routed.clear()
                experts = pool if (steps, seed) == (100, 0) else setting.experts(gate_steps=steps, gate_seed=seed)
                routed[steps, seed] = RoutedModel(setting.base(), experts, router)
            routed[steps, seed].use_router(router)
            return routed[steps, seed]

        return make

    row("base", setting.base)
    row("multitask", lambda: RoutedModel(setting.base(), [setting.multitask()], _single("multitask")))
    for expert in pool:
        row(f"expert {expert.name}", routed_by(_single(expert.name)), _single(expert.name))
    for name, router in ROUTERS.items():
        row(name, routed_by(router), router)
    for seed in seeds[1:]:
        for name in GATED:
            row(f"{name}, seed {seed}", routed_by(ROUTERS[name], seed=seed), ROUTERS[name])
    if not quick:
        for name, router in ABLATIONS.items():
            row(name, routed_by(router), router)
        for steps in GATE_STEPS:
            router = ROUTERS["phatgoose"]
            row(f"phatgoose, {steps} gate steps", routed_by(router, steps=steps), router)
    names = {group: [each.name for each in sets] for group, sets in groups.items()}
    return {"sets": names, "rows": combine(rows, pool, names, seeds)}


def _single(name: str) -> dict[str, Any]:
    return {"router": "single", "expert": name}


def mean(scores: Mapping[str, Mapping[str, float]], sets: Sequence[EvaluationSet]) -> float:
    """Mean bits per byte over sets."""
    return sum(scores[each.name]["bits_per_byte"] for each in sets) / len(sets)


def combine(
    rows: Mapping[str, Any], pool: Sequence[Expert], names: Mapping[str, Sequence[str]], seeds: Sequence[int]
) -> dict[str, Any]:
    """Rows of the table: experts become `best single expert` and `oracle expert`, seeds become spreads."""
    every = [name for group in names.values() for name in group]
    experts = {expert.name: rows[f"expert {expert.name}"] for expert in pool}
    best = min(experts, key=lambda name: sum(experts[name][each]["bits_per_byte"] for each in every))
    oracle = {
        each: min((scores[each] for scores in experts.values()), key=lambda s: s["bits_per_byte"]) for each in every
    }
    found: dict[str, Any] = {"base": [rows["base"]], "best single expert": [experts[best]], "oracle expert": [oracle]}
    for name, scores in rows.items():
        if name == "base" or name.startswith("expert ") or ", seed " in name:
            continue
        found[name] = [scores, *(rows[f"{name}, seed {seed}"] for seed in seeds[1:] if f"{name}, seed {seed}" in rows)]

    def averaged(runs: Sequence[Any], members: Sequence[str], what: str) -> dict[str, float] | None:
        known = [each for each in members if what in rows["base"][each]]
        return (
            spread([sum(run[each][what] for each in known) / len(known) for run in runs]).as_json() if known else None
        )

    combined: dict[str, Any] = {
        name: {
            "groups": {
                group: {what: averaged(runs, members, what) for what in ("bits_per_byte", "accuracy")}
                for group, members in names.items()
            },
            "sets": {each: runs[0][each] for each in every},
        }
        for name, runs in found.items()
    }
    combined["best single expert"]["expert"] = best
    return combined


def to_markdown(record: Mapping[str, Any]) -> str:
    """Means over held-in and unseen sets, then every set."""

    def show(values: Mapping[str, float] | None, form: str) -> str:
        if values is None:
            return "-"
        middle, low, high = (form.format(values[key]) for key in ("median", "low", "high"))
        return middle if low == high else f"{middle} ({low} .. {high})"

    rows, groups = record["rows"], list(record["sets"])
    lines = [
        "# Routers over the same experts",
        "",
        f"Base of {record['parameters']:,} parameters, {record['experts']} LoRA experts, {len(record['gate_seeds'])} "
        "seeds of gate training (median, lowest .. highest; rows without a range do not depend on gates or were run "
        "with one seed). Bits per byte on held-out text, lower is better; accuracy by length-normalised likelihood. "
        "`retrieval` reads the whole window it is then scored on, which is more than a causal router knows; "
        "`retrieval by 32 tokens` decides by the window's first quarter. `oracle expert` and `best single expert` are "
        "chosen on the text they are scored on. `multitask` is one adapter trained on all experts' data for as many "
        "steps as all experts together.",
        "",
    ]
    forms = {"bits_per_byte": "{:.4f}", "accuracy": "{:.3f}"}
    header = [f"{group.replace('_', '-')}: {what.replace('_', ' ')}" for group in groups for what in forms]
    body = [
        [name, *(show(row["groups"][group][what], form) for group in groups for what, form in forms.items())]
        for name, row in rows.items()
    ]
    lines.append(table(["router", *header], body))
    main_rows = [name for name in rows if "," not in name]
    for group in groups:
        lines += ["", f"## {group.replace('_', '-').capitalize()} sets, bits per byte (seed 0)", ""]
        scores = [
            [each, *(f"{rows[name]['sets'][each]['bits_per_byte']:.3f}" for name in main_rows)]
            for each in record["sets"][group]
        ]
        lines.append(table(["set", *main_rows], scores))
    return "\n".join([*lines, "", environment_lines(record)])


def main() -> None:
    """Train what is not there yet, evaluate, report."""
    flags = parser(str(__doc__).splitlines()[0])
    flags.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder with domains/ and tasks/")
    flags.add_argument("--split", choices=("report", "dev"), default="report", help="dev: other sets, other text")
    flags.add_argument("--work", type=Path, default=None, help="where trained models and results are kept")
    arguments = flags.parse_args()
    if not (arguments.data / "domains").is_dir():
        if not arguments.quick:
            flags.error(f"{arguments.data} holds no domains/*.jsonl.zst; name the folder with --data")
        sys.stdout.write(json.dumps({"theme": "routing_quality", "skipped": "no text; name it with --data"}) + "\n")
        return
    theme = "routing_quality" if arguments.split == "report" or arguments.quick else "routing_quality.dev"
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        setting = Setting(arguments.data, arguments.work or Path(temporary), quick=arguments.quick)
        setting.train_experts()
        seeds = GATE_SEEDS[:1] if arguments.quick else GATE_SEEDS
        result = evaluate(setting, arguments.split, seeds=seeds, quick=arguments.quick)
        parameters = setting.base().num_parameters()
    record = {
        "split": arguments.split, "parameters": parameters, "experts": len(setting.names), "gate_seeds": list(seeds),
        "training": dict(setting.training), "expert": dict(setting.expert), "routers": ROUTERS | ABLATIONS, **result,
    }  # fmt: skip
    finish(theme, arguments, record, to_markdown)


if __name__ == "__main__":
    main()
