"""What `weftlm plan` says beside what happens: time, memory and disk of real runs on this machine's CPU.

For every size and seed a plan is made first, in a process of its own: steps of the trainer, a batch that is scored and
a few generated tokens are timed for half a second each (`weftlm.planning.probe`); all else is taken in proportion to
FLOPs. Then the work is done, training in a process of its own, whose memory is measured, and compared:

    training step       the training loop's step, on made-up tokens
    with alignment      a step at which every domain's alignment is measured (T_r = 1), by estimator
    expert              `train_expert` as a whole: adapter, validation, gate, statistics
    expert, T5          the same over an encoder-decoder, of as many layers on either side
    scores              `score`: text and samples under every expert: adapters over one model, or whole models
    generation          greedy `generate`, seconds per token, one sequence and eight
    gated generation    the same of adapters under a gate that all take part in
    memory              highest resident memory of the process that trained (VmHWM)
    disk                a checkpoint, the saved model, an expert in its library, a score cache

A figure is planned over measured; the goal is from 0.75 to 1.25. Seconds are of processor time where there is one
thread, for the plan's passes as for the runs.

    python benchmarks/plan_check.py --threads 1  # regenerates benchmarks/results/plan_check.{json,md}
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import _common
import numpy as np
import torch
from transformers import AutoConfig, AutoModelForSeq2SeqLM, PretrainedConfig
from transformers.utils import logging as transformers_logging

from weftlm.corpora.examples import ExampleSource
from weftlm.corpora.source import ArraySource
from weftlm.experts.config import ExpertTraining
from weftlm.experts.expert import BaseReference, LoRAExpert, LoRAFactors
from weftlm.experts.library import ExpertLibrary
from weftlm.experts.train import train_expert
from weftlm.gating.bayes import FixedShareGate
from weftlm.gating.config import ScoreConfig
from weftlm.gating.experts import ExpertPool, Member
from weftlm.gating.modular_lm import ModularLM
from weftlm.gating.scores import score
from weftlm.mixture.policy import MixtureSetting, build_policy
from weftlm.models.factory import build_model, count_parameters
from weftlm.models.lora_targets import linear_widths, lora_targets
from weftlm.pipeline.recipe import Recipe, make_recipe
from weftlm.planning.counts import TARGET_SHARE
from weftlm.planning.hardware import parse_hardware
from weftlm.planning.plan import Assumed, Plan, plan_recipe
from weftlm.planning.probe import Probe
from weftlm.training.loop import Task, Trainer
from weftlm.training.runtime import choose_runtime

SIZES: dict[str, dict[str, int]] = {
    "0.1M": {"hidden_size": 48, "intermediate_size": 128, "num_hidden_layers": 2, "vocab": 512, "T": 64, "B": 16},
    "0.4M": {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3, "vocab": 4096, "T": 256, "B": 16},
    "1.3M": {"hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 4, "vocab": 4096, "T": 256, "B": 16},
    "4.2M": {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4, "vocab": 4096, "T": 256, "B": 8},
    "12M": {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 6, "vocab": 4096, "T": 128, "B": 8},
}
DOMAINS, EXPERTS, RANK, MICRO = 4, 3, 8, 4
ESTIMATORS = {
    "shadow on the batch": "shadow",
    "separate, extra": "separate",
}
PROMPT, NEW, REQUESTS = 32, 48, 8
GOAL = 0.25
STEPS = {"0.1M": 40, "0.4M": 8, "1.3M": 6, "4.2M": 6, "12M": 6}
"""Steps of every training; together about a second or more, since plans are of runs that outlast their beginning."""
TIMES = (
    "training step",
    *(f"with {name}" for name in ESTIMATORS),
    "expert",
    "expert, T5",
    "scores",
    "scores, whole models",
    "generation, 1",
    "generation, 8",
    "gated generation, 1",
    "gated generation, 8",
)
JOBS = ("train", "estimators", "expert", "encoder_decoder", "scores", "whole_models", "generation", "gated")


def recipe_of(size: str, seed: int, estimator: str = "shadow") -> Recipe:
    """The recipe that is planned and run; its text is made up."""
    wanted = SIZES[size]
    model = {key: value for key, value in wanted.items() if "_" in key}
    probe = "batch" if estimator == "shadow" else "extra"
    return make_recipe(
        {
            "run": "unused",
            "seed": seed,
            "data": {
                "corpora": [{"path": f"unused-{d}.jsonl", "label": f"domain {d}"} for d in range(DOMAINS)],
                "target": [{"path": "unused.jsonl"}],
                "tokenizer": {"train": {"vocab_size": wanted["vocab"]}},
            },
            "model": {
                "architecture": "llama",
                "config": {**model, "num_attention_heads": 4, "num_key_value_heads": 4},
            },
            "mixture": {"policy": "dga", "update_every_steps": 1},
            "alignment": {
                "estimator": estimator, "probe": probe, "sequences_per_group": 4, "target_sequences": wanted["B"] // 2,
            },
            "training": {
                "sequence_length": wanted["T"], "batch_sequences": wanted["B"], "micro_batch_sequences": MICRO,
                "steps": STEPS[size], "warmup_steps": 1, "save_every_steps": STEPS[size], "device": "cpu",
            },
            "experts": {
                "lora": {"rank": RANK},
                "training": {
                    "sequence_length": wanted["T"], "batch_sequences": wanted["B"], "steps": STEPS[size],
                    "device": "cpu", "save_every_steps": STEPS[size], "warmup_steps": 1,
                },
                "validate_every_steps": 0,
                "validation_tokens": 2 * wanted["B"] * wanted["T"],
                "gate": {"steps": STEPS[size]},
                "statistics_examples": 2 * wanted["B"],
            },
            "gating": {"scores": {"length": 64, "sequences": 32, "samples": 16}},
        }
    )  # fmt: skip


class Work:
    """The pieces of work of one size and seed, and the clock they are timed by."""

    def __init__(self, size: str, seed: int, clock: Callable[[], float]) -> None:
        self.size, self.seed, self.clock = size, seed, clock
        self.random = np.random.default_rng(seed)
        self.recipe = recipe_of(size, seed)
        transformers_logging.disable_progress_bar()

    def source(self, sequences: int = 64) -> ArraySource:
        wanted = SIZES[self.size]
        count = sequences * (wanted["T"] + 1)
        return ArraySource(self.random.integers(0, wanted["vocab"], count), text_bytes=4 * count)

    def model(self) -> Any:
        wanted = SIZES[self.size]
        return build_model(
            self.recipe.model, vocab_size=wanted["vocab"], sequence_length=wanted["T"], eos_id=0, seed=self.seed
        )

    def spent(self, work: Callable[[], Any]) -> float:
        start = self.clock()
        work()
        return self.clock() - start

    # -- the plan ---------------------------------------------------------------------------------------------------

    def plan(self, estimator: str = "shadow", probe: Probe | None = None, *, whole: bool = True) -> Plan:
        value = recipe_of(self.size, self.seed, estimator).resolved()
        if not whole:
            value |= {"experts": None, "gating": None}
        assumed = Assumed(domains=DOMAINS, experts=EXPERTS, requests=REQUESTS, prompt=PROMPT, new=NEW)
        return plan_recipe(make_recipe(value), parse_hardware("cpu"), assumed=assumed, probe=probe)

    def plan_of_parts(self, probe: Probe, **sections: Any) -> Plan:
        """Of experts over a model that is there, or of a gate over several."""
        value = recipe_of(self.size, self.seed).resolved()
        parts = {**{key: value[key] for key in ("run", "data")}, **sections}
        assumed = Assumed(domains=DOMAINS, requests=REQUESTS, prompt=PROMPT, new=NEW)
        return plan_recipe(make_recipe(parts), parse_hardware("cpu"), assumed=assumed, probe=probe)

    def t5_section(self, base: str) -> dict[str, Any]:
        """The recipe's experts, over an encoder-decoder."""
        wanted, section = SIZES[self.size], dict(recipe_of(self.size, self.seed).resolved()["experts"])
        scored = 2 * wanted["B"] * round(TARGET_SHARE * wanted["T"])
        return {**section, "base": base, "validation_tokens": scored}

    def t5_config(self) -> PretrainedConfig:
        wanted = SIZES[self.size]
        return AutoConfig.for_model(
            "t5", vocab_size=wanted["vocab"], d_model=wanted["hidden_size"], d_kv=wanted["hidden_size"] // 4,
            d_ff=wanted["intermediate_size"], num_layers=wanted["num_hidden_layers"], num_heads=4, eos_token_id=0,
            decoder_start_token_id=0, pad_token_id=0,
        )  # fmt: skip

    def seconds_of_t5(self, probe: Probe, folder: Path) -> float:
        self.t5_config().save_pretrained(folder)
        data = recipe_of(self.size, self.seed).resolved()["data"]
        prompted = {**data, "corpora": [{**corpus, "prompt_field": "prompt"} for corpus in data["corpora"]]}
        plan = self.plan_of_parts(probe, data=prompted, experts=self.t5_section(str(folder)))
        return float(plan.stage("experts").facts["seconds_per_expert"])

    def seconds_of_whole_models(self, probe: Probe, folder: Path) -> float:
        assert self.recipe.gating is not None
        pool = [{"name": f"expert {e}", "model": str(folder / str(e))} for e in range(EXPERTS)]
        for source in pool:
            self.model().config.save_pretrained(source["model"])
        gating = {"pool": pool, "scores": self.recipe.gating.scores.model_dump()}
        return self.plan_of_parts(probe, gating=gating).stage("scores").seconds

    def planned(self) -> dict[str, Any]:
        """Every figure that is checked, as the plan has it."""
        probe = Probe(self.clock)
        plan = self.plan(probe=probe)
        # Adapters, scores and gates were planned over the same base; a plain model's serving needs a plan of its own.
        plain = self.plan(probe=probe, whole=False)
        found = times_of(plain)
        for name, estimator in ESTIMATORS.items():
            if name not in found["estimators"]:
                found["estimators"] |= times_of(self.plan(estimator, probe, whole=False))["estimators"]
        training, experts, scores = (plan.stage(name) for name in ("training", "experts", "scores"))
        gated = plan.stage("gated serving").facts
        with tempfile.TemporaryDirectory() as folder:
            others = {
                "expert, T5": self.seconds_of_t5(probe, Path(folder) / "t5"),
                "scores, whole models": self.seconds_of_whole_models(probe, Path(folder)),
            }
        return {
            **others,
            "gated generation, 1": 1 / gated["tokens_per_second_at_1"],
            f"gated generation, {REQUESTS}": REQUESTS / gated[f"tokens_per_second_at_{REQUESTS}"],
            **{name: found[name] for name in ("training step", "generation, 1", "generation, 8")},
            **{f"with {name}": found["training step"] + more for name, more in found["estimators"].items()},
            "expert": experts.facts["seconds_per_expert"],
            "scores": scores.seconds,
            "memory": sum(training.memory_bytes.values()),
            "memory beyond libraries": sum(training.memory_bytes.values()) - probe.resident,
            "checkpoint": training.disk_bytes["checkpoints"],
            "model": training.disk_bytes["model"],
            "expert in a library": experts.disk_bytes["library"] / EXPERTS,
            "score cache": scores.disk_bytes["score cache"],
        }

    # -- the runs ---------------------------------------------------------------------------------------------------

    def trainer(self, folder: Path, policy: Mapping[str, Any], recipe: Recipe) -> Trainer:
        names = tuple(f"domain {d}" for d in range(DOMAINS))
        built = build_policy(policy)
        sources = tuple(self.source() for _ in names)
        model = self.model()
        runtime = choose_runtime(recipe.training, parameters=count_parameters(model))
        task = Task(
            domains=names, sources=sources, policy=built,
            setting=MixtureSetting(names, torch.tensor([len(s) for s in sources], dtype=torch.float64)),
            target=self.source(),
        )  # fmt: skip
        return Trainer(
            model, task, recipe.training, alignment=recipe.alignment, runtime=runtime, folder=folder, seed=self.seed
        )

    def steps(self, trainer: Trainer) -> float:
        """Mean over steps after a first one; means, since a plan is about sums."""
        trainer.module.train()
        trainer.train_step()
        return statistics.mean(self.spent(trainer.train_step) for _ in range(STEPS[self.size] - 1))

    def train(self, folder: Path) -> dict[str, float]:
        libraries = resident("VmRSS")
        trainer = self.trainer(folder, {"policy": "uniform"}, self.recipe)
        seconds = self.steps(trainer)
        peak = resident("VmHWM")
        trainer.save()
        trainer.save_model(folder / "model")
        trainer.metrics.close()
        return {
            "training step": seconds,
            "memory": peak,
            "memory beyond libraries": peak - libraries,
            "checkpoint": bytes_in(folder / "checkpoints"),
            "model": bytes_in(folder / "model"),
        }

    def estimators(self, folder: Path) -> dict[str, float]:
        found = {}
        for name, estimator in ESTIMATORS.items():
            recipe = recipe_of(self.size, self.seed, estimator)
            trainer = self.trainer(folder / estimator, recipe.mixture.model_dump(), recipe)
            found[f"with {name}"] = self.steps(trainer)
            trainer.metrics.close()
        return found

    def expert(self, folder: Path) -> dict[str, float]:
        assert self.recipe.experts is not None
        config: ExpertTraining = self.recipe.experts.expert_training
        model, reference, source = self.model(), BaseReference("made-up"), self.source()
        runtime = choose_runtime(config.training, parameters=count_parameters(model))
        held = self.source(2 * config.training.batch_sequences)
        made: list[Any] = []

        def work() -> None:
            made.append(
                train_expert(
                    model, reference, source, config, name="one", folder=folder / "work", seed=self.seed,
                    heldout=held, runtime=runtime,
                )
            )  # fmt: skip

        seconds = self.spent(work)
        ExpertLibrary.open(folder / "library", made[0].lora.base).add(made[0])
        return {"expert": seconds, "expert in a library": bytes_in(folder / "library" / "one")}

    def encoder_decoder(self, folder: Path) -> dict[str, float]:
        """As `expert`, of prompts of T tokens and targets of a quarter of that, their last tokens included."""
        recipe = self.recipe.resolved()
        section = self.t5_section("made-up")
        config = make_recipe({**{key: recipe[key] for key in ("run", "data")}, "experts": section}).experts
        torch.manual_seed(self.seed)
        model = AutoModelForSeq2SeqLM.from_config(self.t5_config())
        wanted, runtime = SIZES[self.size], choose_runtime(config.training, parameters=count_parameters(model))
        target = round(TARGET_SHARE * wanted["T"])

        def examples(count: int) -> ExampleSource:
            draw = functools.partial(self.random.integers, 1, wanted["vocab"])
            return ExampleSource([(draw(wanted["T"] - 1), draw(target - 1)) for _ in range(count)], 0)

        source, held = examples(64), examples(2 * wanted["B"])
        seconds = self.spent(
            lambda: train_expert(
                model, BaseReference("made-up"), source, config.expert_training, name="one", folder=folder / "work",
                seed=self.seed, heldout=held, runtime=runtime,
            )
        )  # fmt: skip
        return {"expert, T5": seconds}

    def scores(self, folder: Path) -> dict[str, float]:
        seconds = self.scored(self.pool(), folder)
        return {"scores": seconds, "score cache": bytes_in(folder / "scores")}

    def whole_models(self, folder: Path) -> dict[str, float]:
        pool = ExpertPool([Member(f"expert {e}", self.model()) for e in range(EXPERTS)])
        return {"scores, whole models": self.scored(pool, folder)}

    def scored(self, pool: ExpertPool, folder: Path) -> float:
        assert self.recipe.gating is not None
        config: ScoreConfig = self.recipe.gating.scores
        choose_runtime(self.recipe.training, parameters=count_parameters(pool))
        tokens = config.sequences * (config.length + 1)
        domains = {
            f"domain {d}": ArraySource(self.random.integers(0, SIZES[self.size]["vocab"], tokens))
            for d in range(DOMAINS)
        }
        return self.spent(lambda: score(pool, domains, folder / "scores", config, show=False))

    def pool(self) -> ExpertPool:
        """Adapters over one model."""
        model = self.model()
        return ExpertPool([Member(f"expert {e}", model, self.adapter(model)) for e in range(EXPERTS)])

    def adapter(self, model: Any) -> LoRAExpert:
        factors = {}
        for name in lora_targets(model, "all-linear"):
            inputs, outputs = linear_widths(model.get_submodule(name)) or (0, 0)
            factors[name] = LoRAFactors(0.01 * torch.randn(RANK, inputs), 0.01 * torch.randn(outputs, RANK), 1.0)
        return LoRAExpert("made-up", BaseReference("made-up"), factors, {})

    def generation(self, folder: Path) -> dict[str, float]:
        return self.generated(self.model().eval(), "generation")

    def gated(self, folder: Path) -> dict[str, float]:
        gate = FixedShareGate.of(np.full(EXPERTS, 1 / EXPERTS), 0.02)
        return self.generated(ModularLM(self.pool(), gate), "gated generation")

    def generated(self, model: Any, name: str) -> dict[str, float]:
        """Seconds per token, alone and of several at once."""
        choose_runtime(self.recipe.training, parameters=count_parameters(model))
        model.generation_config.eos_token_id = None
        model.generation_config.pad_token_id = 0
        found = {}
        for batch in (1, REQUESTS):
            tokens = torch.zeros(batch, PROMPT, dtype=torch.int64)

            def work(count: int, tokens: torch.Tensor = tokens) -> None:
                model.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=count, do_sample=False)

            work(2)
            spent = [self.spent(lambda: work(NEW)) - self.spent(lambda: work(1)) for _ in range(3)]
            found[f"{name}, {batch}"] = statistics.median(spent) / (NEW - 1)
        return found


def times_of(plan: Plan) -> dict[str, Any]:
    """Seconds of a step, of a measurement by estimator, and per generated token."""
    training, serving = plan.stage("training").facts, plan.stage("serving").facts
    chosen = training["alignment_estimator"].split()[0]
    estimator = next(name for name, value in ESTIMATORS.items() if value == chosen)
    return {
        "training step": training["seconds_per_step"],
        "estimators": {estimator: training["seconds_per_alignment"]},
        "generation, 1": 1 / serving["tokens_per_second_at_1"],
        "generation, 8": REQUESTS / serving[f"tokens_per_second_at_{REQUESTS}"],
    }


def resident(key: str) -> float:
    """Bytes by /proc/self/status; NaN where there is none."""
    try:
        text = Path("/proc/self/status").read_text(encoding="utf-8")
    except OSError:
        return float("nan")
    found = re.search(rf"^{key}:\s+(\d+) kB", text, re.MULTILINE)
    return float("nan") if found is None else 1024.0 * int(found[1])


def bytes_in(folder: Path) -> float:
    return float(sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()))


# -- the whole ------------------------------------------------------------------------------------------------------


def clock_of(threads: int) -> Callable[[], float]:
    return time.process_time if threads == 1 else time.perf_counter


def do(jobs: str, size: str, seed: int) -> dict[str, float]:
    """Pieces of work by their names with commas between, in this process."""
    work = Work(size, seed, clock_of(torch.get_num_threads()))
    if jobs == "plan":
        return work.planned()
    found: dict[str, float] = {}
    for job in jobs.split(","):
        with tempfile.TemporaryDirectory() as folder:
            found |= getattr(work, job)(Path(folder))
    return found


def alone(job: str, size: str, seed: int, threads: int) -> dict[str, float]:
    """Pieces of work, in a process of their own."""
    command = [sys.executable, __file__, "--job", job, size, str(seed), "--threads", str(threads)]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    if ran.returncode:
        raise SystemExit(f"{job} of {size} failed:\n{ran.stderr}")
    found: dict[str, float] = json.loads(ran.stdout.splitlines()[-1])
    return found


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    rows: dict[str, dict[str, Any]] = {}
    for size in arguments.sizes:
        ratios: dict[str, list[float]] = {}
        values: dict[str, list[tuple[float, float]]] = {}
        for seed in range(arguments.seeds):
            if arguments.quick:
                pairs = quick(size, seed)
            else:
                planned = alone("plan", size, seed, arguments.threads)
                measured: dict[str, float] = {}
                others = ",".join(job for job in arguments.jobs if job != "train")
                for jobs in filter(None, ["train" if "train" in arguments.jobs else "", others]):
                    measured |= alone(jobs, size, seed, arguments.threads)
                pairs = {name: (planned[name], value) for name, value in measured.items()}
            for name, (plan, value) in pairs.items():
                ratios.setdefault(name, []).append(plan / value)
                values.setdefault(name, []).append((plan, value))
            said = ", ".join(f"{name} {plan / value:.2f}" for name, (plan, value) in pairs.items())
            _common.say(f"{size}, seed {seed}: {said}")
        rows[size] = {
            name: {
                "ratio": _common.spread(found).as_json(),
                "planned": statistics.median(plan for plan, _ in values[name]),
                "measured": statistics.median(value for _, value in values[name]),
                "met": abs(statistics.median(found) - 1.0) <= GOAL,
            }
            for name, found in ratios.items()
        }
    every = [one for row in rows.values() for one in row.values()]
    return {
        "setting": {
            "seeds": arguments.seeds, "goal": GOAL, "steps": STEPS, "domains": DOMAINS, "experts": EXPERTS,
            "rank": RANK, "prompt": PROMPT, "new": NEW, "sizes": {size: SIZES[size] for size in rows},
        },
        "rows": rows,
        "met": sum(one["met"] for one in every),
        "of": len(every),
    }  # fmt: skip


def quick(size: str, seed: int) -> dict[str, tuple[float, float]]:
    """The smallest check, in one process: a step, a step with alignment, generation, a checkpoint."""
    work = Work(size, seed, clock_of(torch.get_num_threads()))
    plan = work.plan(probe=Probe(work.clock), whole=False)
    found = times_of(plan)
    shadow = "shadow on the batch"
    planned = {
        "training step": found["training step"],
        f"with {shadow}": found["training step"] + found["estimators"][shadow],
        "generation, 1": found["generation, 1"],
        "checkpoint": plan.stage("training").disk_bytes["checkpoints"],
    }
    with tempfile.TemporaryDirectory() as folder:
        measured = work.train(Path(folder) / "plain")
        trainer = work.trainer(Path(folder) / "aligned", work.recipe.mixture.model_dump(), work.recipe)
        measured[f"with {shadow}"] = work.steps(trainer)
        trainer.metrics.close()
        measured |= work.generation(Path(folder))
    return {name: (value, measured[name]) for name, value in planned.items()}


def to_markdown(record: Mapping[str, Any]) -> str:
    setting, rows = record["setting"], record["rows"]
    sizes = list(rows)
    names = list(dict.fromkeys(name for row in rows.values() for name in row))

    def cell(size: str, name: str) -> str:
        one = rows[size].get(name)
        if one is None:
            return ""
        return _common.Spread(**one["ratio"]).show("{:.2f}") + ("" if one["met"] else " !")

    def unit(name: str, value: float) -> str:
        return f"{value * 1e3:.1f} ms" if name in TIMES else f"{value / 1e6:.2f} MB"

    lines = [
        "# A plan beside what happens", "", __doc__ or "",
        f"{setting['seeds']} seeds; median (lowest .. highest); ! marks a median beyond the goal. Within it: "
        f"{record['met']} of {record['of']}.", "",
        "## Planned over measured", "",
        _common.table(["", *sizes], [[name, *(cell(size, name) for size in sizes)] for name in names]), "",
        "## Planned, measured", "",
        _common.table(
            ["", *sizes],
            [
                [
                    name,
                    *(
                        f"{unit(name, rows[size][name]['planned'])}, {unit(name, rows[size][name]['measured'])}"
                        if name in rows[size]
                        else ""
                        for size in sizes
                    ),
                ]
                for name in names
            ],
        ),
    ]  # fmt: skip
    return "\n".join([*lines, "", _common.environment_lines(record)])


def main(given: Sequence[str] | None = None) -> None:
    flags = _common.parser((__doc__ or "").splitlines()[0])
    flags.add_argument("--sizes", nargs="+", choices=list(SIZES), default=list(SIZES), help="models that are checked")
    flags.add_argument("--jobs", nargs="+", choices=JOBS, default=list(JOBS), help="what is run")
    flags.add_argument("--job", nargs=3, help=argparse.SUPPRESS)
    arguments = flags.parse_args(given)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
        os.environ["OMP_NUM_THREADS"] = str(arguments.threads)  # else the work is given all cores again
    if arguments.job:
        job, size, seed = arguments.job
        sys.stdout.write(json.dumps(do(job, size, int(seed))) + "\n")
        return
    if arguments.quick:
        arguments.seeds, arguments.sizes = 1, ["0.1M"]
    _common.finish("plan_check", arguments, run(arguments), to_markdown)


if __name__ == "__main__":
    main()
