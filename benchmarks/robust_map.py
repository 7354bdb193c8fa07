"""Where experts under one gate beat a monolith of their total size and tokens, and where it beats them: a map.

Tokens per domain x capacity x distance between domains x kind of experts (whole models branched from a shared base,
adapters over a shared base that has most of the parameters), everything else as in `robust_quality.py`. Monoliths are
trained on the uniform mixture: one of the experts' total parameters, one of the size of a single branched expert.

    python benchmarks/robust_map.py --data PATH --work PATH     # regenerates results/robust_map.* and picture
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import torch
from _common import environment_lines, finish, parser, say, spread, table, write_atomically
from _robust_setting import COMPUTE, SETS, SHARED, Scale, Setting, architecture, in_processes, quick_scale, train_all
from robust_quality import DIRECT, DIRECT_GATE, VERSION, Comparison, figures, read, scored
from transformers.utils import logging as transformers_logging

from weftlm.gating import fit_robust_gate

PICTURE = Path(__file__).resolve().parents[1] / "docs" / "assets" / "robust_map.svg"
TOKENS = (50_000, 150_000, 600_000)
"""Training tokens of each branched expert after its base, which is trained on twice as many."""
DOMAIN_TOKENS = 400_000
CAPACITIES = {
    "small": (architecture(32, 84, 2), architecture(96, 288, 2), architecture(96, 272, 2)),
    "large": (architecture(64, 168, 2), architecture(144, 448, 3), architecture(144, 432, 3)),
}
"""Architectures of a branched expert, of a monolith of six experts' parameters, and of the base under adapters."""
BRANCHED, ADAPTERS = "branched", "adapters"
GATED = ("oracle expert", "uniform mixture", "bayes", "fixed share", "direct gate")
MONOLITH = "monolith uniform"
ROWS = (MONOLITH, COMPUTE, *(f"{row}, {kind}" for kind in (BRANCHED, ADAPTERS) for row in GATED))
MEASURES = ("own expert", "best known", "mean", "changing")


def scale(tokens: int, capacity: str) -> Scale:
    """Sizes of one cell."""
    expert, monolith, shared = CAPACITIES[capacity]
    return Scale(
        expert=expert, monolith=monolith, shared=shared, base_tokens=2 * tokens, expert_tokens=tokens,
        domain_tokens=DOMAIN_TOKENS, policies=("uniform",),
    )  # fmt: skip


def cell(setting: Setting, quick: bool) -> dict[str, dict[str, dict[str, float]]]:
    """Every row's measures and how far they are behind the monolith's, kept in the work folder.

    Regrets are to the own experts of the row's kind, and for the expert-sized monolith to the branched ones.
    """
    key = json.dumps(
        [VERSION, DIRECT.model_dump(mode="json"), DIRECT_GATE, [str(setting.folder(r)) for r in setting.runs]]
    )
    digest = hashlib.blake2b(key.encode(), digest_size=6).hexdigest()
    path = setting.folder(MONOLITH) / f"map-{digest}.json"
    if path.exists():
        kept: dict[str, dict[str, dict[str, float]]] = json.loads(path.read_text())
        return kept
    torch.set_num_threads(1)
    transformers_logging.disable_progress_bar()
    gate_text = read(setting, "gate").domains
    config = DIRECT.model_copy(update={"steps": 20}) if quick else DIRECT
    found: dict[str, dict[str, dict[str, float]]] = {}
    for kind in (BRANCHED, ADAPTERS):
        comparison = Comparison(setting, kind, quick)
        comparison.single_models()
        comparison.untrained_gates()
        domains = {name: scored(comparison.pool, gate_text[name], name) for name in setting.names}
        comparison.add_gate("direct gate", fit_robust_gate(domains, None, gate=DIRECT_GATE, config=config).gate)
        known = {"bytes_per_token": dict(comparison.report.bytes_per_token), "documents": comparison.documents()}
        rows = figures({"rows": comparison.rows, **known})
        measured = {
            name: {**rows[name]["worst"], "mean": rows[name]["mean"], "changing": rows[name]["changing"]}
            for name in (MONOLITH, COMPUTE, *GATED)
        }
        for name, row in measured.items():
            behind = {measure: row[measure] - measured[MONOLITH][measure] for measure in MEASURES}
            found.setdefault(f"{name}, {kind}" if name in GATED else name, {"value": row, "behind_monolith": behind})
    write_atomically(path, json.dumps(found))
    say(f"{setting.work.name}: {json.dumps(found)[:200]}")
    return found


def combine(cells: Sequence[Mapping[str, Mapping[str, Mapping[str, float]]]]) -> dict[str, Any]:
    """Spreads over seeds of every row's measures and of their distance to the monolith's."""
    return {
        name: {
            measure: {
                what: spread([one[name][what][measure] for one in cells]).as_json()
                for what in ("value", "behind_monolith")
            }
            for measure in MEASURES
        }
        for name in ROWS
    }


def to_markdown(record: Mapping[str, Any]) -> str:
    """One table per measure: gates' margin to the monolith by cell."""

    def show(value: Mapping[str, float], form: str) -> str:
        middle, low, high = (form.format(value[key]) for key in ("median", "low", "high"))
        return middle if low == high else f"{middle} ({low} .. {high})"

    lines = [
        "# Where modular wins",
        "",
        f"Six domains, seeds: {record['seeds']}. Nats per token on report text, median (lowest .. highest) where there "
        "are several seeds. The monolith has the experts' total parameters and is trained on the base's, the experts' "
        "and the gates' tokens together; every token costs it six times what it costs a branched expert, and as much "
        "as an adapter. The expert-sized monolith has a branched expert's parameters and the monolith's tokens. "
        "Branched: whole models that go on from a base of their size. Adapters: LoRA over a shared base; together they "
        "have the monolith's parameters and tokens. Below 0: ahead of the monolith. The direct gate is fitted to "
        "regret to the own expert throughout. Regrets are to the own experts of a row's kind, those of the monoliths "
        f"to the branched ones. A domain has at most {DOMAIN_TOKENS:,} tokens of text: in the rows of the most tokens "
        "per expert it is read up to three times, by the monoliths too.",
    ]
    titles = {
        "own expert": "Worst domain by regret to the own expert",
        "best known": "Worst domain by regret to the best known single model",
        "mean": "Mean cross-entropy of the domains",
        "changing": "Text that changes domain midway",
    }
    for measure, title in titles.items():
        shown = [name for name in ROWS if name != MONOLITH]
        lines += [
            "",
            f"## {title}: behind the monolith by",
            "",
            table(
                ["domains", "capacity", "tokens per expert", "monolith", *shown],
                [
                    [
                        one["set"], one["capacity"], f"{one['tokens']:,}",
                        show(one["rows"][MONOLITH][measure]["value"], "{:.3f}"),
                        *(show(one["rows"][name][measure]["behind_monolith"], "{:+.3f}") for name in shown),
                    ]
                    for one in record["cells"]
                ],
            ),
        ]  # fmt: skip
    lines += ["", "![margin to the monolith](../../docs/assets/robust_map.svg)"]
    return "\n".join([*lines, "", environment_lines(record)])


LINES = {COMPUTE: "0.5", f"direct gate, {BRANCHED}": "C0", f"direct gate, {ADAPTERS}": "C1"}
"""Models drawn, and their colours."""


def draw(record: Mapping[str, Any], path: Path) -> None:
    """Margin to the monolith over tokens per expert, a panel for each set of domains and measure."""
    mpl.rcParams["svg.hashsalt"] = "weftlm"
    measures = {"best known": "worst domain,\nbest known offset", "mean": "mean", "changing": "changing text"}
    sets = list(dict.fromkeys(one["set"] for one in record["cells"]))
    figure, grid = plt.subplots(
        len(sets), len(measures), figsize=(9, 2.6 * len(sets)), sharex=True, constrained_layout=True, squeeze=False
    )
    for row, name in enumerate(sets):
        for column, (measure, title) in enumerate(measures.items()):
            axes = grid[row][column]
            for capacity, style in zip(CAPACITIES, ("--", "-"), strict=True):
                cells = [one for one in record["cells"] if one["set"] == name and one["capacity"] == capacity]
                for model, colour in LINES.items():
                    margins = [one["rows"][model][measure]["behind_monolith"] for one in cells]
                    tokens = [one["tokens"] for one in cells]
                    axes.plot(
                        tokens, [one["median"] for one in margins], style, color=colour, label=f"{model}, {capacity}"
                    )
                    axes.fill_between(
                        tokens, [one["low"] for one in margins], [one["high"] for one in margins], color=colour,
                        alpha=0.15, linewidth=0,
                    )  # fmt: skip
            axes.axhline(0, color="0.7", linewidth=1)
            axes.set_xscale("log")
            axes.set_xticks(TOKENS, [f"{tokens:,}" for tokens in TOKENS], fontsize=8)
            axes.minorticks_off()
            axes.spines[["top", "right"]].set_visible(False)
            if row == 0:
                axes.set_title(title, fontsize=9)
            if row == len(sets) - 1:
                axes.set_xlabel("tokens per expert")
            if column == 0:
                axes.set_ylabel(f"{name} domains:\nnats per token over the monolith", fontsize=8)
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, ncols=3, fontsize=8, loc="outside lower center")
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def main() -> None:
    """Train what is not there yet, evaluate every cell, report and draw."""
    flags = parser(str(__doc__).splitlines()[0])
    flags.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder with domains/")
    flags.add_argument("--work", type=Path, default=None, help="where trained models and results are kept")
    flags.add_argument("--processes", type=int, default=2, help="models trained at a time, one thread each")
    arguments = flags.parse_args()
    if not (arguments.data / "domains").is_dir():
        if not arguments.quick:
            flags.error(f"{arguments.data} holds no domains/*.jsonl.zst; name the folder with --data")
        sys.stdout.write(json.dumps({"theme": "robust_map", "skipped": "no text; name it with --data"}) + "\n")
        return
    quick = arguments.quick
    torch.set_num_threads(1)
    transformers_logging.disable_progress_bar()
    places = [(name, capacity, tokens) for name in SETS for capacity in CAPACITIES for tokens in TOKENS]
    seeds = range(1 if quick else arguments.seeds)
    with tempfile.TemporaryDirectory() as temporary:
        work = arguments.work or Path(temporary)
        places = places[:1] if quick else places
        settings = [
            Setting(
                arguments.data,
                work / f"map-{name}-{capacity}-{tokens}-{seed}",
                SETS[name][: 3 if quick else None],
                seed,
                replace(quick_scale(), policies=("uniform",)) if quick else scale(tokens, capacity),
            )
            for name, capacity, tokens in places
            for seed in seeds
        ]
        processes = 1 if quick else arguments.processes
        train_all(settings, ["base", SHARED, "branched", "adapter", MONOLITH, COMPUTE], processes=processes)
        found = in_processes(cell, [(setting, quick) for setting in settings], processes=processes)
    cells = [
        {"set": name, "capacity": capacity, "tokens": tokens, "rows": combine(found[first : first + len(seeds)])}
        for (name, capacity, tokens), first in zip(places, range(0, len(found), len(seeds)), strict=True)
    ]
    record = {"seeds": len(seeds), "cells": cells}
    finish("robust_map", arguments, record, to_markdown)
    if not quick:
        draw(record, PICTURE)


if __name__ == "__main__":
    main()
