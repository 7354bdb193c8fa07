"""The first scenario of DGA's paper: a target known from few documents, and few tokens in every generic domain.

Importance sampling repeats the narrow pocket nearest to the target and overfits it; DGA should notice and move on. Every
method trains the same model on the same number of tokens, from the same initial weights, at three budgets of tokens per
domain. `--split dev` uses another target and other seeds: settings are chosen there, `--split report` (the default) only
reports.

    python benchmarks/dga_token_limited.py --data PATH      # regenerates benchmarks/results/dga_token_limited.{json,md}
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from _common import environment_lines, finish, parser, spread, table
from _domains_text import TextDomain, encode, histogram, make_tokenizer, read_texts, shuffled, tokenised_domain
from _mixture_runs import Data, RunSpec, roughness, run_all

DOMAINS = (
    *(TextDomain(name, "arxiv_cs", name) for name in ("cs.CR", "cs.LO", "cs.SE", "cs.GT", "cs.DB")),
    *(TextDomain(name, "arxiv_math", name) for name in ("math.FA", "math.GT", "math.LO")),
    *(TextDomain(n, "arxiv_physics", n) for n in ("cond-mat.quant-gas", "physics.plasm-ph", "nlin.CD")),
    *(TextDomain(n, "arxiv_bio_stat_econ", n) for n in ("stat.AP", "q-bio.NC", "eess.IV", "q-bio.PE")),
    *(TextDomain(n, n) for n in ("novels_en", "legal_uscode", "chat_taskdialog", "qa_medical", "math_word")),
)
TARGETS = {"report": TextDomain("cs.RO", "arxiv_cs", "cs.RO"), "dev": TextDomain("q-bio.BM", "arxiv_bio_stat_econ", "q-bio.BM")}
FIRST_SEED = {"report": 0, "dev": 100}
TARGET_DOCUMENTS, TARGET_HELDOUT, DOMAIN_HELDOUT = 40, 200, 16
VOCABULARY = 1024
BUDGETS = (10_000, 30_000, 100_000)
SIZES = 2.0 ** np.linspace(-0.5, 0.5, len(DOMAINS))
"""Domain sizes over the budget, dealt out by the seed: proportional is then not the same as uniform."""

MODEL = {
    "architecture": "llama",
    "config": {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 4},
}
TRAINING = {
    "sequence_length": 128, "batch_sequences": 24, "tokens": 1_600_000, "lr": 3e-3, "warmup_steps": 30,
    "save_every_steps": 1_000_000, "log_every_steps": 50, "threads": 1,
}  # fmt: skip
DGA = {"policy": "dga", "update_every_steps": 10}
METHODS: dict[str, Mapping[str, Any] | None] = {
    "uniform": {"policy": "uniform", "update_every_steps": 10},
    "proportional": {"policy": "proportional", "update_every_steps": 10},
    "importance": {"policy": "importance", "update_every_steps": 10},
    "dga": DGA,
    "dga, no EMA": {**DGA, "ema": 1.0},
    "doge": {"policy": "doge", "update_every_steps": 10},
    "target alone": None,
}
ALIGNMENT = {"target_sequences": 24}


@functools.lru_cache(maxsize=4)
def make_data(source: str, split: str, budget: int, seed: int) -> Data:
    """Tokenise the domains at a budget; the seed decides which documents each gets and how the sizes are dealt out."""
    folder = Path(source)
    tokenizer = make_tokenizer(folder, DOMAINS, VOCABULARY)
    sizes = np.random.default_rng(seed).permutation(SIZES)
    domains = tuple(
        tokenised_domain(
            folder, domain, tokenizer, train_tokens=int(budget * size), heldout_documents=DOMAIN_HELDOUT, seed=seed
        )
        for domain, size in zip(DOMAINS, sizes, strict=True)
    )
    ordered = shuffled(list(read_texts(folder, TARGETS[split])), seed=0)
    heldout, rest = ordered[:TARGET_HELDOUT], shuffled(ordered[TARGET_HELDOUT:], seed)
    examples = rest[:TARGET_DOCUMENTS]
    return Data(
        domains=domains,
        target_train=encode(tokenizer, examples),
        target_heldout=encode(tokenizer, heldout),
        target_histogram=histogram([domain.train_texts for domain in domains], examples, seed=seed),
        basis=None,
        vocab_size=tokenizer.vocab_size,
        eos_id=tokenizer.eos_id,
    )


def to_markdown(record: Mapping[str, Any]) -> str:
    """One table per budget: final target and generic bits per byte, mean over seeds with their range."""
    lines = [
        "# DGA with few tokens per domain",
        "",
        f"Target {record['target']} from {TARGET_DOCUMENTS} documents; {len(DOMAINS)} domains; {record['parameters']:,} parameters; "
        f"{record['train_tokens']:,} training tokens for every method; {record['seeds']} seeds. Bits per byte on held-out text, "
        "median (lowest .. highest) over seeds; `generic` is the mean over the domains. `margin` is the method's target "
        "bits per byte minus DGA's, seed by seed: positive where DGA is better. `jumps` is the total-variation distance "
        "between the mixtures of neighbouring updates.",
    ]
    for budget, rows in record["budgets"].items():
        lines += ["", f"## {int(budget):,} tokens per domain", ""]
        header = ["method", "target", "margin to DGA", "best on the way", "generic", "epochs of the most read", "jumps", "alignment share of time"]
        body = [
            [
                name,
                _show(row["target"], "{:.4f}"),
                _show(row["margin"], "{:+.4f}"),
                _show(row["target_best"], "{:.4f}"),
                _show(row["generic"], "{:.4f}"),
                _show(row["epochs_max"], "{:.0f}"),
                _show(row["jumps"], "{:.3f}"),
                _show(row["alignment_share"], "{:.0%}"),
            ]
            for name, row in rows.items()
        ]
        lines += [table(header, body)]
    return "\n".join([*lines, "", environment_lines(record)])


def _show(values: Mapping[str, float], form: str) -> str:
    low, high = form.format(values["low"]), form.format(values["high"])
    middle = form.format(values["median"])
    return middle if low == high else f"{middle} ({low} .. {high})"


def summarise(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Spread over seeds of every figure, by budget and method."""
    summary: dict[str, Any] = {}
    for budget in dict.fromkeys(result["data"]["budget"] for result in results):
        here = [result for result in results if result["data"]["budget"] == budget]
        dga = {result["seed"]: result["target"] for result in here if result["method"] == "dga"}
        rows = {}
        for method in dict.fromkeys(result["method"] for result in here):
            runs = [result for result in here if result["method"] == method]
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
            rows[method]["final_weights"] = [run["weights"] for run in runs]
        summary[str(budget)] = rows
    return summary


def main() -> None:
    """Run every method at every budget and seed, then report."""
    flags = parser(__doc__.splitlines()[0])
    flags.add_argument("--data", type=Path, required=True, help="folder with domains/*.jsonl.zst")
    flags.add_argument("--split", choices=("report", "dev"), default="report", help="dev: another target, other seeds")
    flags.add_argument("--processes", type=int, default=2, help="runs at a time, one thread each")
    flags.add_argument("--work", type=Path, default=None, help="where finished runs are kept, to continue later")
    arguments = flags.parse_args()
    training = {**TRAINING, "tokens": 60_000} if arguments.quick else TRAINING
    budgets = BUDGETS[:1] if arguments.quick else BUDGETS
    seeds = range(FIRST_SEED[arguments.split], FIRST_SEED[arguments.split] + (1 if arguments.quick else arguments.seeds))
    specs = [
        RunSpec(
            data={"source": str(arguments.data), "split": arguments.split, "budget": budget, "seed": seed},
            method=method, mixture=mixture, seed=seed, training=training, model=MODEL, alignment=ALIGNMENT,
        )
        for budget in budgets for seed in seeds for method, mixture in METHODS.items()
    ]  # fmt: skip
    with tempfile.TemporaryDirectory() as temporary:
        results = run_all(specs, make_data, arguments.work or Path(temporary), processes=arguments.processes)
    for result in results:
        del result["data"]["source"]
    record = {
        "split": arguments.split,
        "target": TARGETS[arguments.split].name,
        "seeds": len(seeds),
        "parameters": results[0]["parameters"],
        "train_tokens": results[0]["tokens"],
        "methods": {name: dict(mixture) if mixture else "the target's documents alone" for name, mixture in METHODS.items()},
        "alignment": ALIGNMENT,
        "training": dict(training),
        "budgets": summarise(results),
    }
    finish("dga_token_limited", arguments, record, to_markdown)


if __name__ == "__main__":
    main()
