"""Every mixture policy at its defaults beside uniform and proportional: mean over seven domains, and the worst.

Each trains the same model on the same number of tokens of the same domains, from the same initial weights. Seeds are of
initial weights, draws and the choice of training documents. Policies that follow a target get documents of all domains
in equal numbers, so that every policy works for the same end. The reference model of a policy that needs one is trained
on the uniform mixture for as many tokens, and its time counts as overhead.

    python benchmarks/all_policies.py --data PATH      # regenerates benchmarks/results/all_policies.{json,md}
"""

from __future__ import annotations

import functools
import json
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from _common import environment_lines, finish, parser, spread, table
from _domains_text import TextDomain, encode, histogram, make_tokenizer, read_texts, shuffled, tokenised_domains
from _mixture_runs import QUICK_MODEL, QUICK_TOKENS, Data, RunSpec, run_all

from weftlm.mixture.config import policies

DOMAINS: tuple[str, ...] = (
    "arxiv_cs", "biomed_fulltext", "novels_en", "legal_uscode", "rp_c4", "rp_stackexchange", "wikipedia_en",
)  # fmt: skip
"""Of unlike size (600,000 to 1,900,000 tokens) and unlike difficulty."""
TARGET_DOCUMENTS, HELDOUT_DOCUMENTS = 6, 40
VOCABULARY = 4096
TRAIN_SHARE = 0.9
BASELINES = ("uniform", "proportional")
MODEL: dict[str, Any] = {
    "architecture": "llama",
    "config": {
        "hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 4, "tie_word_embeddings": True,
    },
}  # fmt: skip
TRAINING: dict[str, Any] = {
    "sequence_length": 128, "batch_sequences": 32, "tokens": 4_096_000, "lr": 2e-3, "warmup_steps": 50,
    "save_every_steps": 1_000_000, "log_every_steps": 1_000_000, "threads": 1,
}  # fmt: skip


@functools.lru_cache(maxsize=2)
def make_data(source: str, names: tuple[str, ...], tokens: int, seed: int) -> Data:
    """Domains in the proportions of their files, `tokens` in all, and a target of all of them."""
    folder, chosen = Path(source), tuple(TextDomain(name, name) for name in names)
    tokenizer = make_tokenizer(folder, chosen, VOCABULARY)
    sizes = [sum(map(len, read_texts(folder, domain))) for domain in chosen]
    domains = tokenised_domains(
        folder, chosen, tokenizer, train_tokens=[int(tokens * size / sum(sizes)) for size in sizes],
        heldout_documents=HELDOUT_DOCUMENTS, seed=seed,
    )  # fmt: skip
    examples, heldout = [], []
    for domain, cut in zip(chosen, domains, strict=True):
        taken = set(cut.train_texts)
        left = [text for text in shuffled(list(read_texts(folder, domain)), seed=0) if text not in taken]
        heldout += left[:TARGET_DOCUMENTS]
        examples += left[-TARGET_DOCUMENTS:]
    return Data(
        domains=domains,
        target_train=encode(tokenizer, examples),
        target_heldout=encode(tokenizer, heldout),
        target_histogram=histogram([domain.train_texts for domain in domains], examples, seed=seed),
        basis=None,
        vocab_size=tokenizer.vocab_size,
        eos_id=tokenizer.eos_id,
    )


def row(runs: Sequence[Mapping[str, Any]], baselines: Mapping[str, Mapping[int, Mapping[str, Any]]]) -> dict[str, Any]:
    """Figures of one policy over seeds, and its differences to the baselines seed by seed."""

    def mean(run: Mapping[str, Any]) -> float:
        return statistics.fmean(run["domains"].values())

    def worst(run: Mapping[str, Any]) -> float:
        return float(max(run["domains"].values()))

    found = {"mean": list(map(mean, runs)), "worst": list(map(worst, runs))}
    for name, by_seed in baselines.items():
        found[f"mean - {name}"] = [mean(run) - mean(by_seed[run["seed"]]) for run in runs]
        found[f"worst - {name}"] = [worst(run) - worst(by_seed[run["seed"]]) for run in runs]
    found["overhead"] = [
        (run["seconds"]["alignment"] + run["reference_seconds"]) / run["seconds"]["train"] for run in runs
    ]
    return {key: spread(values).as_json() for key, values in found.items()}


def to_markdown(record: Mapping[str, Any]) -> str:
    """One row per policy."""
    forms = {"mean": "{:.4f}", "worst": "{:.4f}", "overhead": "{:.0%}"}

    def show(key: str, value: Mapping[str, float]) -> str:
        middle, low, high = (forms.get(key, "{:+.4f}").format(value[part]) for part in ("median", "low", "high"))
        return f"{middle} ({low} .. {high})"

    columns = list(next(iter(record["policies"].values())))
    rows = [[name, *(show(key, one[key]) for key in columns)] for name, one in record["policies"].items()]
    return "\n".join(
        [
            "# Every mixture policy beside uniform and proportional",
            "",
            f"{len(record['domains'])} domains ({', '.join(record['domains'])}), {record['train_tokens']:,} training "
            f"tokens of {record['parameters']:,} parameters, {record['seeds']} seeds of weights, draws and documents. "
            "Held-out bits per byte, median (lowest .. highest) over seeds: mean over the domains and worst domain; "
            "differences to a baseline are taken seed by seed, below 0 where the policy is better. Overhead: time of "
            "alignments and of training a reference model, over the time of training.",
            "",
            table(["policy", *columns], rows),
            "",
            environment_lines(record),
        ]
    )


def main() -> None:
    """Run every policy with every seed, then report."""
    flags = parser(str(__doc__).splitlines()[0], seeds=5)
    flags.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder with domains/*.jsonl.zst")
    flags.add_argument("--processes", type=int, default=2, help="runs at a time, one thread each")
    flags.add_argument("--work", type=Path, default=None, help="folder of finished runs, to continue later")
    arguments = flags.parse_args()
    if not (arguments.data / "domains").is_dir():
        if not arguments.quick:
            flags.error(f"{arguments.data} holds no domains/*.jsonl.zst; name the folder with --data")
        sys.stdout.write(json.dumps({"theme": "all_policies", "skipped": "no text to read"}) + "\n")
        return
    domains, names = DOMAINS, [name for name in policies if name != "static"]
    training = TRAINING
    sizes: dict[str, Any] = {"model": MODEL, "evaluations": 1, "generic_tokens": 16_384}
    if arguments.quick:
        domains, names, arguments.seeds = DOMAINS[-2:], ["uniform", "proportional", "odm"], 1
        training = {**TRAINING, "tokens": QUICK_TOKENS}
        sizes = {"model": QUICK_MODEL, "evaluations": 1, "generic_tokens": 256}
    tokens = 200_000 if arguments.quick else int(TRAIN_SHARE * TRAINING["tokens"])
    specs = [
        RunSpec(
            data={"source": str(arguments.data), "names": domains, "tokens": tokens, "seed": seed},
            setting="", method=name, mixture={"policy": name}, seed=seed, training=training, **sizes,
        )
        for seed in range(arguments.seeds) for name in names
    ]  # fmt: skip
    with tempfile.TemporaryDirectory() as temporary:
        results = run_all(specs, make_data, arguments.work or Path(temporary), processes=arguments.processes)
    baselines = {name: {run["seed"]: run for run in results if run["method"] == name} for name in BASELINES}
    record = {
        "domains": list(domains),
        "seeds": arguments.seeds,
        "parameters": results[0]["parameters"],
        "train_tokens": results[0]["tokens"],
        "training": dict(training),
        "policies": {name: row([run for run in results if run["method"] == name], baselines) for name in names},
    }
    finish("all_policies", arguments, record, to_markdown)


if __name__ == "__main__":
    main()
