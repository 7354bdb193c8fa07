"""What Dynamic Gradient Alignment costs beside plain training: time, error and memory of every estimator.

Time: in each round a plain training step and each way of measuring alignments run one after the other on the same model
and tokens; a figure is the median over rounds and seeds of (time of the measurement) / (time of the plain step of its
round). DGA measures every T_r steps, so its overhead is

    (direction + probed step - plain step) / (T_r plain step)      measuring on the training batch
    (direction + probe) / (T_r plain step)                         measuring on as many extra sequences

and the figures for T_r = 1, 10 and 100 follow from one round. "End to end" checks this: 20 steps with one measurement
and one policy update among them against 20 plain steps, interleaved. The direction takes B / 8 target sequences at
T_r = 1 and 32 (the default) otherwise.

Error: largest |a_b - a_b(separate)| / (||g_b|| ||v||) over single sequences, after the rounds have trained the model a
little. Memory: peak resident memory of a process that trains and measures, less that of one that only trains.
"""

from __future__ import annotations

import argparse
import re
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import _common
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from weftlm.mixture.config import policies
from weftlm.mixture.policy import MixtureSetting, Report
from weftlm.models.hf import sequence_losses
from weftlm.training.alignment import (
    Probe,
    ShadowProbe,
    estimators,
    gradient_direction,
    group_alignment,
)

BATCH, MICRO = 64, 8
SIZES = {
    "0.4M": {"vocab_size": 4096, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3},
    "1.3M": {"vocab_size": 4096, "hidden_size": 128, "intermediate_size": 320, "num_hidden_layers": 4},
}
MEMORY_SIZE = {"vocab_size": 8192, "hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 6}  # 13.8M
WAYS = (
    "shadow on the batch",
    "separate, extra",
    "shadow, extra",
)


def build(size: Mapping[str, int], seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**size, num_attention_heads=4, num_key_value_heads=4, tie_word_embeddings=True))


def each(name: str, model: nn.Module, losses: Any, tokens_BT1: Tensor, v: Any, micro_batch: int | None = None) -> Any:
    """What an estimator measures where every sequence is a group of its own."""
    groups_B = torch.arange(len(tokens_BT1))
    return estimators[name]().measure(Probe(model, losses, tokens_BT1, groups_B, len(groups_B), v, micro_batch))


class Text:
    """Made-up text: each domain draws a third of its tokens in a Zipf order of its own and repeats itself otherwise."""

    def __init__(self, vocabulary: int, length: int, seed: int) -> None:
        self.random = torch.Generator().manual_seed(seed)
        self.vocabulary, self.length = vocabulary, length
        self.zipf = 1.0 / torch.arange(1, vocabulary + 1)

    def draw(self, domains_B: Tensor) -> Tensor:
        count = len(domains_B) * (self.length + 1)
        ranks = torch.multinomial(self.zipf, count, replacement=True, generator=self.random).view(len(domains_B), -1)
        return (ranks * (2 * domains_B.unsqueeze(1) + 1) + 37 * domains_B.unsqueeze(1)) % self.vocabulary


class Training:
    """One model being trained, and each way of measuring alignments while it is."""

    def __init__(self, size: Mapping[str, int], length: int, seed: int) -> None:
        self.model = build(size, seed)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=3e-4, fused=True)
        self.text = Text(size["vocab_size"], length, seed)
        self.norm = float("nan")

    def step(self, tokens: Tensor, pieces: Sequence[Tensor] | None = None) -> None:
        """A plain training step."""
        pieces = torch.arange(BATCH).split(MICRO) if pieces is None else pieces
        for piece in pieces:
            (sequence_losses(self.model, tokens[piece]).sum() / BATCH).backward()
        self.finish()

    def finish(self) -> None:
        self.norm = float(torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def direction(self, sequences: int) -> dict[str, Tensor]:
        target = self.text.draw(torch.zeros(sequences, dtype=torch.int64))
        return gradient_direction(self.model, sequence_losses, target, micro_batch=MICRO)

    def warm_up(self) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Groups, tokens and a direction, with a plain step taken before."""
        groups_B = torch.arange(BATCH) % 8
        tokens = self.text.draw(groups_B)
        self.step(tokens)
        return groups_B, tokens, self.direction(BATCH // 8)

    def measure(self, way: str, groups_B: Tensor, tokens: Tensor, v: Mapping[str, Tensor], groups: int) -> Any:
        """One measurement; on the batch it includes the training step."""
        if way == "shadow on the batch":
            dots = []
            with ShadowProbe(self.model, v) as probe:
                for piece in torch.arange(BATCH).split(MICRO):
                    probe.begin(len(piece))
                    (sequence_losses(self.model, tokens[piece]).sum() / BATCH).backward()
                    dots.append(probe.dots(torch.full((len(piece),), 1 / BATCH)))
            self.finish()
            return group_alignment(torch.cat(dots), groups_B, groups, v)
        estimator = way.removesuffix(", extra")
        probe = Probe(self.model, sequence_losses, tokens, groups_B, groups, v, MICRO)
        return estimators[estimator]().measure(probe)


# -- time -------------------------------------------------------------------------------------------------------------


def timed(clock: Callable[[], float], work: Callable[[], Any]) -> float:
    start = clock()
    work()
    return clock() - start


def one_round(training: Training, clock: Callable[[], float], group_counts: Sequence[int]) -> dict[str, float]:
    """Times of everything relative to the plain step of the same round."""
    tokens = training.text.draw(torch.arange(BATCH) % max(group_counts))
    before = timed(clock, lambda: training.step(tokens))
    found: dict[str, float] = {}
    v = training.direction(BATCH // 8)
    for sequences in (BATCH // 8, 32):
        found[f"direction of {sequences}"] = timed(clock, lambda n=sequences: training.direction(n))
    for groups in group_counts:
        groups_B = torch.arange(BATCH) % groups
        for way in WAYS:
            found[f"{way} | {groups}"] = timed(
                clock, lambda w=way, b=groups_B, k=groups: training.measure(w, b, tokens, v, k)
            )
    plain = (before + timed(clock, lambda: training.step(tokens))) / 2  # the round's plain step: its first and last
    return {key: value / plain for key, value in found.items()} | {"plain seconds": plain}


def overhead(ratios: Mapping[str, float], way: str, groups: int, every: int) -> float:
    direction = ratios[f"direction of {BATCH // 8 if every == 1 else 32}"]
    extra = ratios[f"{way} | {groups}"] - (1.0 if way.endswith("batch") else 0.0)
    return (direction + extra) / every


def end_to_end(training: Training, clock: Callable[[], float], groups: int, every: int = 20) -> float:
    """Time of `every` steps with one measurement and one policy update in them over that of `every` plain steps."""
    policy = policies["dga"](policies["dga"].Config(policy="dga"))
    names = tuple(f"domain {i}" for i in range(groups))
    state = policy.init(MixtureSetting(domains=names, tokens_D=torch.ones(groups, dtype=torch.float64)))
    groups_B = torch.arange(BATCH) % groups
    tokens = training.text.draw(groups_B)
    plain = mixed = 0.0

    def update() -> None:
        v = training.direction(32)
        found = training.measure("shadow on the batch", groups_B, tokens, v, groups)
        report = Report(
            step=1, tokens_D=torch.ones(groups, dtype=torch.float64), alignment=replace(found, batch_norm=training.norm)
        )
        policy.weights(policy.update(state, report))

    for step in range(every):  # interleaved, so that both see the same machine
        plain += timed(clock, lambda: training.step(tokens))
        mixed += timed(clock, update if step == every // 2 else lambda: training.step(tokens))
    return mixed / plain - 1.0


# -- error and memory -------------------------------------------------------------------------------------------------


def errors(training: Training, rows: int) -> dict[str, float]:
    """Largest error of each estimator over sequences, relative to ||g_b|| ||v||, in the present precision."""
    model, ones = training.model, torch.full((rows,), 1 / rows)
    tokens = training.text.draw(torch.arange(rows))
    v = training.direction(8)
    exact = each("separate", model, sequence_losses, tokens, v)
    assert exact.norms_G is not None
    scale = exact.norms_G * exact.direction_norm
    found = {"shadow, extra": each("shadow", model, sequence_losses, tokens, v, MICRO).dots_G}
    with ShadowProbe(model, v) as probe:
        probe.begin(rows)
        sequence_losses(model, tokens).mul(ones).sum().backward()
        found["shadow on the batch"] = probe.dots(ones)
    model.zero_grad(set_to_none=True)
    return {way: float(((dots.double() - exact.dots_G).abs() / scale).max()) for way, dots in found.items()}


def peak_bytes(way: str) -> int:
    """Peak resident memory of a fresh process that takes three training steps and, with `way`, measures in each."""
    command = [sys.executable, __file__, "--threads", "1", "--peak-of", way]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def run_for_peak(way: str) -> None:
    training = Training(MEMORY_SIZE, 16, seed=0)
    groups_B = torch.arange(BATCH) % 8
    for _ in range(3):
        tokens = training.text.draw(groups_B)
        if way != "plain":
            v = training.direction(8)
            training.measure(way, groups_B, tokens, v, 8)
            del v
        if not way.endswith("batch"):
            training.step(tokens)
    print(own_peak_bytes())


def own_peak_bytes() -> int:
    """Peak resident memory of this process. Linux's ru_maxrss would count the parent's from before it was started."""
    status = Path("/proc/self/status")
    if status.exists():
        return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text()).group(1))  # type: ignore[union-attr]
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def memory() -> dict[str, Any]:
    parameters = sum(p.numel() for p in build(MEMORY_SIZE, 0).parameters())
    extra: dict[str, list[float]] = {way: [] for way in WAYS}
    plains = []
    for _ in range(3):
        plains.append(peak_bytes("plain"))
        for way, found in extra.items():
            found.append((peak_bytes(way) - plains[-1]) / (4 * parameters))
    return {
        "parameters": parameters,
        "bytes_of_v": 4 * parameters,
        "plain_peak_bytes": _common.spread(plains).as_json(),
        "extra_over_v": {way: _common.spread(found).as_json() for way, found in extra.items()},
    }


# -- the whole --------------------------------------------------------------------------------------------------------


def measure_size(name: str, arguments: argparse.Namespace, clock: Callable[[], float]) -> dict[str, Any]:
    length, rounds = (16, 1) if arguments.quick else (256, arguments.rounds)
    group_counts = (8,) if arguments.quick else (8, 64)
    ratios: list[dict[str, float]] = []
    checks: dict[int, list[float]] = {groups: [] for groups in group_counts}
    precise: dict[str, list[dict[str, float]]] = {"float32": [], "bfloat16 autocast": []}
    for seed in range(arguments.seeds):
        training = Training(SIZES[name], length, seed)
        training.measure(WAYS[0], *training.warm_up(), 8)
        for index in range(rounds):
            ratios.append(one_round(training, clock, group_counts))
            _common.say(f"{name}, seed {seed}, round {index}: plain step {ratios[-1]['plain seconds']:.2f} s")
        for groups in group_counts if name == "0.4M" else ():
            checks[groups].append(end_to_end(training, clock, groups))
            _common.say(f"{name}, seed {seed}, end to end with {groups} groups: {checks[groups][-1]:+.2%}")
        training.text.length = min(length, 64)
        precise["float32"].append(errors(training, rows=8))
        with torch.autocast("cpu", torch.bfloat16):
            precise["bfloat16 autocast"].append(errors(training, rows=8))
        _common.say(f"{name}, seed {seed}: errors done")
    spread = _common.spread
    return {
        "parameters": sum(p.numel() for p in build(SIZES[name], 0).parameters()),
        "sequence_length": length,
        "plain_step_seconds": spread([r["plain seconds"] for r in ratios]).as_json(),
        "relative_to_plain_step": {
            key: spread([r[key] for r in ratios]).as_json() for key in ratios[0] if key != "plain seconds"
        },
        "overhead": {
            way: {
                str(groups): {
                    str(every): spread([overhead(r, way, groups, every) for r in ratios]).as_json()
                    for every in (1, 10, 100)
                }
                for groups in group_counts
            }
            for way in WAYS
        },
        "end_to_end_every_20": {
            str(groups): {
                "measured": spread(values).as_json(),
                "predicted": spread([overhead(r, "shadow on the batch", groups, 20) for r in ratios]).as_json(),
            }
            for groups, values in checks.items()
            if values
        },
        "error": {
            precision: {way: spread([e[way] for e in found]).as_json() for way in found[0]}
            for precision, found in precise.items()
        },
    }


def to_markdown(record: Mapping[str, Any]) -> str:
    def percent(value: Mapping[str, float]) -> str:
        return _common.Spread(**value).show("{:.2f}", 100) + " %"

    lines = ["# Cost of gradient alignment", "", __doc__ or "", f"B = {BATCH} sequences in micro-batches of {MICRO}."]
    for name, size in record["sizes"].items():
        step = _common.Spread(**size["plain_step_seconds"]).show("{:.2f}")
        lines += ["", f"## {name}: {size['parameters']:,} parameters, sequences of {size['sequence_length']}", ""]
        lines += [f"Plain step {step} s. Overhead over plain training, median (lowest .. highest):", ""]
        rows = [
            [way, groups, *(percent(by_every[every]) for every in ("1", "10", "100"))]
            for way, by_groups in size["overhead"].items()
            for groups, by_every in by_groups.items()
        ]
        lines += [_common.table(["estimator", "domains", "T_r = 1", "T_r = 10", "T_r = 100"], rows), ""]
        for groups, check in size["end_to_end_every_20"].items():
            lines.append(
                f"End to end at T_r = 20 with {groups} domains, shadow on the batch: {percent(check['measured'])} "
                f"measured, {percent(check['predicted'])} predicted from the rounds.  "
            )
        rows = [
            [way, *(_common.Spread(**found[way]).show("{:.1e}") for found in size["error"].values())]
            for way in size["error"]["float32"]
        ]
        lines += ["", _common.table(["error against separate", *size["error"]], rows)]
    if record["memory"]:
        memory = record["memory"]
        megabytes = memory["bytes_of_v"] / 2**20
        lines += ["", f"## Memory, {memory['parameters']:,} parameters (v is {megabytes:.0f} MiB)", ""]
        extra = {way: _common.Spread(**found) for way, found in memory["extra_over_v"].items()}
        rows = [[way, found.show("{:.2f}"), found.show("{:.0f}", megabytes)] for way, found in extra.items()]
        lines.append(_common.table(["estimator", "extra peak, in units of v", "MiB"], rows))
    return "\n".join([*lines, "", f"Clock: {record['clock']}. " + _common.environment_lines(record)])


def main() -> None:
    flags = _common.parser((__doc__ or "").splitlines()[0])
    flags.add_argument("--rounds", type=int, default=2, help="rounds per seed and size")
    flags.add_argument(
        "--clock", choices=["wall", "cpu"], default="wall",
        help="cpu: processor time of this process, for a machine busy with other work (use with --threads 1)",
    )  # fmt: skip
    flags.add_argument("--peak-of", help=argparse.SUPPRESS)
    arguments = flags.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if arguments.peak_of:
        run_for_peak(arguments.peak_of)
        return
    if arguments.quick:
        arguments.seeds = 1
    clock = time.perf_counter if arguments.clock == "wall" else time.process_time
    sizes = ("0.4M",) if arguments.quick else tuple(SIZES)
    result = {
        "clock": {"wall": "wall time", "cpu": "processor time of the process"}[arguments.clock],
        "batch_sequences": BATCH,
        "sizes": {name: measure_size(name, arguments, clock) for name in sizes},
        "memory": None if arguments.quick else memory(),
    }
    _common.finish("alignment_cost", arguments, result, to_markdown)


if __name__ == "__main__":
    main()
