"""Put the recorded figures of benchmarks/results into the README and docs; `--check` fails where one is stale.

`HEADLINES` says which figures of a benchmark's record stand in the tables, each beside its goal, so that none is ever
typed by hand. A record without an entry there gets a row that leads to its page. The README shows about ten rows, those
that are `chosen`; docs/benchmarks.md lists the benchmarks, docs/benchmarks/NAME.md has all rows and the page of one.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- benchmarks: begin (docs/benchmark_table.py) -->", "<!-- benchmarks: end -->"


def records() -> dict[str, dict[str, Any]]:
    """The recorded results by theme, in alphabetical order; not those on which settings were chosen (`<theme>.dev`)."""
    return {
        path.stem: json.loads(path.read_text(encoding="utf-8"))
        for path in sorted(RESULTS.glob("*.json"))
        if not path.stem.endswith(".dev")
    }


class Row(NamedTuple):
    """One line of a table: what was measured, the value with its spread, what it should be; is it in the README."""

    figure: str
    measured: str
    goal: str
    chosen: bool = False


def show(spread: Mapping[str, float], form: str = "{:.2f}", scale: float = 1.0) -> str:
    """`median (low .. high)` of a recorded spread; the median alone where nothing was repeated."""
    middle, low, high = (form.format(spread[key] * scale) for key in ("median", "low", "high"))
    return middle if spread["n"] == 1 else f"{middle} ({low} .. {high})"


def alignment_cost(record: Mapping[str, Any]) -> Iterator[Row]:
    """Overhead of the estimator that is the usual choice, and the errors of the cheap ones."""
    way = "shadow on the batch"
    largest = max(record["sizes"].values(), key=lambda size: float(size["parameters"]))
    for size in record["sizes"].values():
        model = f"{size['parameters'] / 1e6:.1f}M parameters"
        for groups, by_every in size["overhead"][way].items():
            for every, goal in (("100", "≤ 2 %"), ("1", "≤ 50 %")):
                measured = show(by_every[every], "{:.1f}", 100) + " %"
                figure = f"DGA over plain training, {groups} domains, T_r = {every}, {model}"
                yield Row(figure, measured, goal, chosen=size is largest and (groups, every) == ("64", "100"))
        cheap = [error for name, error in size["error"]["float32"].items() if name.endswith("on the batch")]
        measured = f"{max(error['high'] for error in cheap):.0e}"
        figure = f"worst error of the alignments taken on the batch, float32, {model}"
        yield Row(figure, measured, "≤ 1e-4")


def faults(record: Mapping[str, Any]) -> Iterator[Row]:
    """Faults that were injected, and those that were neither noticed nor mended."""
    kinds = record["kinds"].values()
    tried, failures = (sum(kind[key] for kind in kinds) for key in ("tried", "failures"))
    yield Row("faults on disk neither noticed nor mended", f"{failures} of {tried}", "0")


def comparison(record: Mapping[str, Any]) -> Iterator[Row]:
    """How far behind DGA, in the target's bits per byte and seed by seed, the fixed mixtures are."""
    for setting, methods in record["settings"].items():
        margins = [
            f"{name} {show(methods[name]['margin'], '{:+.3f}')}"
            for name in ("uniform", "importance")
            if name in methods
        ]
        figure = f"target bits per byte beyond DGA's, {setting}, {record['parameters'] / 1e6:.1f}M parameters"
        chosen = setting in ("64 clusters, 5 target documents", "30,000 tokens per domain")
        yield Row(figure, "; ".join(margins), "all above 0", chosen)


def prepare_memory(record: Mapping[str, Any]) -> Iterator[Row]:
    """Whether peak memory stays flat while the corpus grows."""
    ratios = record["ratios_last_to_first"]
    figure = f"peak memory of preparing a corpus {ratios['corpus']:.0f} times as large"
    yield Row(figure, f"{ratios['peak_memory']:.2f} times", "about 1 time")


def shared_machine(record: Mapping[str, Any]) -> Iterator[Row]:
    """Training speed over the best fixed number of threads, alone and beside a busy process."""
    for where, ratio in record["over_best"].items():
        size = f"{record['parameters'] / 1e6:.1f}M parameters"
        figure = f"training speed over the best fixed number of threads, {where}, {size}"
        yield Row(figure, f"{show(ratio)} times", f"≥ {record['goals'][where]:g} times")


def routing_speed(record: Mapping[str, Any]) -> Iterator[Row]:
    """The goals of routing's cost at every size, met or not."""
    for goal in record["goals"]:
        unit = "" if goal["at_most"] is None else " times"
        bound = "yes" if goal["at_most"] is None else f"{'≤' if goal['at_most'] else '≥'} {goal['limit']:g} times"
        measured = show(goal["measured"]) + unit if unit else ("yes" if goal["met"] else "no")
        figure = f"routing: {goal['goal']}, hidden size {goal['hidden']}"
        chosen = str(goal["hidden"]) == "512" and goal["goal"] in (
            "prefill with 166 experts over the base's", "PEFT Arrow's prefill with 166 experts over ours",
        )  # fmt: skip
        yield Row(figure, measured, bound, chosen)


def routing_quality(record: Mapping[str, Any]) -> Iterator[Row]:
    """Bits per byte by router, on data experts were trained for and on data no expert saw."""
    for group, said in (("held_in", "experts' own held-out data"), ("unseen", "data no expert saw")):
        values = {name: row["groups"][group]["bits_per_byte"] for name, row in record["rows"].items()}
        shown = ("base", "merged", "arrow", "retrieval by 32 tokens", "phatgoose", "blend", "oracle expert")
        measured = "; ".join(f"{name} {show(values[name], '{:.3f}')}" for name in shown)
        figure = f"bits per byte by router, {record['experts']} experts, {len(record['sets'][group])} sets: {said}"
        yield Row(figure, measured, "phatgoose ahead of other gates on unseen data; blend ahead of all", chosen=True)


def routing_switch(record: Mapping[str, Any]) -> Iterator[Row]:
    """How soon after a change of domain the right expert has most of the weight, and what the loss is then."""
    rows = record["rows"]
    for stretch in ("5 to 16", "17 to 64"):
        shown = ("base", "retrieval, first half", "phatgoose", "blend", "oracle")
        measured = "; ".join(f"{name} {show(rows[name]['bits'][stretch], '{:.2f}')}" for name in shown)
        yield Row(f"bits per token, {stretch} tokens after a change of domain", measured, "below a choice per sequence")


def gate_fit(record: Mapping[str, Any]) -> Iterator[Row]:
    """How the time of fitting grows, how far from the exact programme it ends, and what few sequences cost."""
    for goal in record["goals"]:
        how = f"{goal['way']}, {goal['gate']}, {goal['experts']} experts"
        figure = f"fitting a gate, {how}: exponent of time over sequences"
        yield Row(figure, show(goal["measured"]), f"≤ {goal['limit']:g}")
    rows = record["exact"]["rows"]
    if rows:
        measured = f"{max(abs(row['difference'][end]) for row in rows for end in ('low', 'high')):.0e} nats"
        points = rows[-1]["points"]
        yield Row(f"fitted robust value off the exact programme's, up to {points:,} points", measured, "≤ 1e-3")


def modular_serving(record: Mapping[str, Any]) -> Iterator[Row]:
    """Time per token of one expert per token over one expert alone."""
    for goal in record["goals"]:
        if goal["text"] == "stays":
            figure = f"gated model, {goal['who']}, over one expert alone: time per token, {goal['cell']}"
            chosen = goal["who"] == "top-1" and goal["cell"] == "hidden 512, batch 8"
            yield Row(figure, show(goal["measured"]) + " times", f"≤ {record['goal']:g} times", chosen)


def robust_quality(record: Mapping[str, Any]) -> Iterator[Row]:
    """Worst domain by regret to its own expert and to the best known single model, in each setting."""
    shown = (
        "monolith uniform", "monolith doremi", "monolith expert-sized", "oracle expert", "fixed share", "robust gate",
        "student", "direct gate",
    )  # fmt: skip
    for title, one in record["comparisons"].items():
        for offset, over in (("own expert", "its own expert"), ("best known", "the best known model")):
            values = {name: one["rows"][name]["worst"][offset] for name in shown}
            measured = "; ".join(f"{name} {show(value, '{:.3f}')}" for name, value in values.items())
            figure = f"worst domain over {over}, nats per token: {title}"
            chosen = (title, offset) == ("far domains, experts adapters", "own expert")
            yield Row(figure, measured, "gates ahead", chosen)


def robust_map(record: Mapping[str, Any]) -> Iterator[Row]:
    """How far behind the monolith everything is where experts are trained longest."""
    most = max(one["tokens"] for one in record["cells"])
    for one in record["cells"]:
        if one["tokens"] == most:
            shown = ("monolith expert-sized", "direct gate, branched", "direct gate, adapters")
            values = {name: one["rows"][name]["mean"]["behind_monolith"] for name in shown}
            measured = "; ".join(f"{name} {show(value, '{:+.3f}')}" for name, value in values.items())
            seeds = "one seed" if record["seeds"] == 1 else f"{record['seeds']} seeds"
            where = f"{one['set']} domains, {one['capacity']} models, {most:,} tokens per expert, {seeds}"
            figure = f"mean cross-entropy over that of a monolith of all experts' parameters, nats per token: {where}"
            yield Row(figure, measured, "below 0")


def plan_check(record: Mapping[str, Any]) -> Iterator[Row]:
    """How many of a plan's figures are within the goal of what was measured, and the farthest off."""
    figure = f"figures of `weftlm plan` before it was rewritten, within {record['setting']['goal']:.0%} of the measured"
    every = [one for row in record["rows"].values() for one in row.values()]
    yield Row(f"{figure}, all sizes", f"{sum(one['met'] for one in every)} of {len(every)}", "all")
    for size, row in record["rows"].items():
        met = sum(one["met"] for one in row.values())
        worst = max(row, key=lambda name: abs(row[name]["ratio"]["median"] - 1.0))
        measured = f"{met} of {len(row)}; farthest: {worst} {show(row[worst]['ratio'])} times"
        yield Row(f"{figure}, {size} parameters", measured, "all")


def serving_load(record: Mapping[str, Any]) -> Iterator[Row]:
    """Whether a server stood a load, and whether its memory stayed flat."""
    figure = f"`weftlm serve` under {record['clients']} clients for {record['minutes']:.0f} minutes"
    measured = (
        f"{record['requests']:,} requests, {record['wrong']} wrong or missing answers, {record['server_errors']} of "
        f"500 and above; memory late over early {record['memory_late_over_early']:.3f}"
    )
    yield Row(figure, measured, "0, 0, ≤ 1.1", chosen=True)


def serving_stall(record: Mapping[str, Any]) -> Iterator[Row]:
    """The longest that heavy requests kept another client waiting, over all kinds of them."""
    kinds = {kind: one for kind, one in record["kinds"].items() if one["statuses"]}
    worst = max(kinds, key=lambda kind: kinds[kind]["longest_ms"]["median"])
    measured = f"{show(kinds[worst]['longest_ms'])} ms, beside {worst}"
    yield Row("longest answer of `weftlm serve` while 8 clients send heavy requests", measured, "≤ 100 ms")


def sampler(record: Mapping[str, Any]) -> Iterator[Row]:
    """Speed against the best peer, and what the peers do when weights change."""
    over_best = show(record["weftlm_over_best_peer"]) + " times"
    yield Row("sampler's tokens/s over the best peer's, as documented", over_best, "≥ 3 times", chosen=True)
    by_hand = show(record["weftlm_over_best_peer_with_code_by_hand"]) + " times"
    yield Row("the same, over peers whose rows are read by code of our own", by_hand, "")
    acts = {name: act for name, act in record["behaviour"].items() if "by hand" not in name}
    right = [
        name
        for name, act in acts.items()
        if act["batches_until_change"] == 0 and act["repeated"] == 0 and act["resumes_after_change"]
    ]
    ours = [name for name in acts if name.startswith("weftlm")]
    figure = "change of weights at the step promised, nothing repeated, exact resume after it"
    peers = len(acts) - len(ours)
    measured = f"weftlm: {'yes' if set(ours) <= set(right) else 'no'}; {len(set(right) - set(ours))} of {peers} peers"
    yield Row(figure, measured, "weftlm alone")


HEADLINES: Mapping[str, Callable[[Mapping[str, Any]], Iterator[Row]]] = {
    "alignment_cost": alignment_cost,
    "dga_few_examples": comparison,
    "dga_token_limited": comparison,
    "gate_fit": gate_fit,
    "modular_serving": modular_serving,
    "faults": faults,
    "plan_check": plan_check,
    "prepare_memory": prepare_memory,
    "robust_map": robust_map,
    "robust_quality": robust_quality,
    "routing_quality": routing_quality,
    "routing_speed": routing_speed,
    "routing_switch": routing_switch,
    "sampler": sampler,
    "shared_machine": shared_machine,
    "serving_load": serving_load,
    "serving_stall": serving_stall,
}


def headlines(theme: str, record: Mapping[str, Any]) -> list[Row]:
    """The rows of a record."""
    return (
        list(HEADLINES[theme](record))
        if theme in HEADLINES
        else [Row(theme.replace("_", " "), "see its page", "", chosen=True)]
    )


HEADER = (
    "| figure | measured: median (lowest .. highest) over seeds | goal |",
    "| --- | --- | --- |",
)


def chosen_table(found: Mapping[str, Mapping[str, Any]]) -> str:
    """The chosen rows of all benchmarks, each with links to its script and its page."""
    rows = [
        f"| {row.figure} | {row.measured} | {row.goal} | [script](benchmarks/{theme}.py), "
        f"[page](docs/benchmarks/{theme}.md) |"
        for theme, record in found.items()
        for row in headlines(theme, record)
        if row.chosen
    ]
    if not rows:
        return "No figures are recorded in this revision: `make bench FULL=1` records them."
    return "\n".join([f"{HEADER[0]} benchmark |", f"{HEADER[1]} --- |", *rows])


def index_table(found: Mapping[str, Mapping[str, Any]]) -> str:
    """One row per benchmark: its page, and the first line of its script's docstring."""
    rows = []
    for theme in found:
        script = ROOT / "benchmarks" / f"{theme}.py"
        asks = script.read_text(encoding="utf-8").split("\n", 1)[0].strip('"') if script.exists() else ""
        rows.append(f"| [{theme}](benchmarks/{theme}.md) | {asks} |")
    return "\n".join(["| benchmark | what it measures |", "| --- | --- |", *rows])


def page(theme: str, record: Mapping[str, Any]) -> str:
    """The page of one benchmark: its headline figures, then what it recorded."""
    path = RESULTS / f"{theme}.md"
    if not path.exists():
        raise FileNotFoundError(f"{path.relative_to(ROOT)} is missing beside its .json; run benchmarks/{theme}.py")
    heading, _, body = path.read_text(encoding="utf-8").partition("\n")
    body = body.replace("(../../docs/assets/", "(../assets/").strip()
    rows = [f"| {row.figure} | {row.measured} | {row.goal} |" for row in headlines(theme, record)]
    table = "\n".join([*HEADER, *rows]) + "\n\n" if rows else ""
    command = f"Written by `.venv/bin/python benchmarks/{theme}.py` and `docs/benchmark_table.py`."
    return f"{heading}\n\n{command}\n\n{table}{body}\n"


def between_markers(text: str, inner: str, name: str) -> str:
    """The text with everything between the two markers replaced."""
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"{name} must hold the markers once each: {BEGIN} and {END}")
    head, rest = text.split(BEGIN)
    return f"{head}{BEGIN}\n\n{inner}\n\n{END}{rest.split(END)[1]}"


def main() -> int:
    """Write the files, or with `--check` compare them; 1 where one is stale."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail where a file is stale")
    check = parser.parse_args().check
    found = records()
    wanted = {
        name: between_markers((ROOT / name).read_text(encoding="utf-8"), inner, name)
        for name, inner in {"README.md": chosen_table(found), "docs/benchmarks.md": index_table(found)}.items()
    }
    wanted |= {f"docs/benchmarks/{theme}.md": page(theme, record) for theme, record in found.items()}
    stale = []
    for name, new in wanted.items():
        path = ROOT / name
        if not path.exists() or path.read_text(encoding="utf-8") != new:
            stale.append(name)
            if not check:
                path.parent.mkdir(exist_ok=True)
                path.write_text(new, encoding="utf-8")
    for path in (ROOT / "docs" / "benchmarks").glob("*.md"):
        if path.stem not in found:
            stale.append(f"docs/benchmarks/{path.name}")
            if not check:
                path.unlink()
    if check and stale:
        print(f"stale: {', '.join(stale)}; run `make fix`", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
