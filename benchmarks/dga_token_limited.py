"""The first scenario of DGA's paper: a target known from few documents, and few tokens in every generic domain.

Importance sampling repeats the narrow pocket nearest to the target and overfits it; DGA should notice and move on.
Every method trains the same model on the same number of tokens, from the same initial weights, at three budgets of
tokens per domain. `--split dev` uses another target and other seeds: settings are chosen there, `--split report` (the
default) only reports.

    python benchmarks/dga_token_limited.py --data PATH      # regenerates benchmarks/results/dga_token_limited.{json,md}
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from _common import environment_lines
from _domains_text import TextDomain, encode, histogram, make_tokenizer, read_texts, shuffled, tokenised_domains
from _mixture_runs import LEGEND, Data, Method, experiment, rows_table

DOMAINS = (
    *(TextDomain(name, "arxiv_cs", name) for name in ("cs.CR", "cs.LO", "cs.SE", "cs.GT", "cs.DB")),
    *(TextDomain(name, "arxiv_math", name) for name in ("math.FA", "math.GT", "math.LO")),
    *(TextDomain(n, "arxiv_physics", n) for n in ("cond-mat.quant-gas", "physics.plasm-ph", "nlin.CD")),
    *(TextDomain(n, "arxiv_bio_stat_econ", n) for n in ("stat.AP", "q-bio.NC", "eess.IV", "q-bio.PE")),
    *(TextDomain(n, n) for n in ("novels_en", "legal_uscode", "chat_taskdialog", "qa_medical", "math_word")),
)
TARGETS = {
    "report": TextDomain("cs.RO", "arxiv_cs", "cs.RO"),
    "dev": TextDomain("q-bio.BM", "arxiv_bio_stat_econ", "q-bio.BM"),
}
TARGET_DOCUMENTS, TARGET_HELDOUT, DOMAIN_HELDOUT = 40, 120, 12
VOCABULARY = 1024
BUDGETS = (10_000, 30_000, 100_000)
SIZES = 2.0 ** np.linspace(-0.5, 0.5, len(DOMAINS))
"""Domain sizes over the budget, dealt out by the seed: proportional is then not the same as uniform."""

EVERY = {"update_every_steps": 10}
DGA = {"policy": "dga", "eta": 15.0, "initial": "importance", "precondition": "adam", "anchor": 0.1, **EVERY}
PROBE = {"estimator": "shadow", "probe": "extra", "sequences_per_group": 6, "target_sequences": 48}
"""Chosen on the development target with two seeds (docs/log.md)."""
METHODS: dict[str, Method] = {
    "uniform": ({"policy": "uniform", **EVERY}, {}),
    "proportional": ({"policy": "proportional", **EVERY}, {}),
    "importance": ({"policy": "importance", **EVERY}, {}),
    "dga": (DGA, PROBE),
    "dga, no EMA": ({**DGA, "ema": 1.0}, PROBE),
    "doge": ({"policy": "doge", **EVERY}, PROBE),
    "target alone": (None, {}),
}


@functools.lru_cache(maxsize=4)
def make_data(source: str, split: str, budget: int, seed: int) -> Data:
    """Tokenise the domains at a budget; the seed decides which documents each gets and how the sizes are dealt out."""
    folder = Path(source)
    tokenizer = make_tokenizer(folder, DOMAINS, VOCABULARY)
    sizes = np.random.default_rng(seed).permutation(SIZES)
    domains = tokenised_domains(
        folder, DOMAINS, tokenizer, train_tokens=[int(budget * size) for size in sizes],
        heldout_documents=DOMAIN_HELDOUT, seed=seed,
    )  # fmt: skip
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
    """One table per budget."""
    lines = [
        "# DGA with few tokens per domain",
        "",
        f"Target {record['target']} from {TARGET_DOCUMENTS} documents; {len(DOMAINS)} domains; "
        f"{record['parameters']:,} parameters; {record['train_tokens']:,} training tokens for every method; "
        f"{record['seeds']} seeds. {LEGEND}",
    ]
    for setting, rows in record["settings"].items():
        lines += ["", f"## {setting}", "", rows_table(rows)]
    return "\n".join([*lines, "", environment_lines(record)])


def main() -> None:
    """Run every method at every budget and seed, then report."""
    settings = {f"{budget:,} tokens per domain": {"budget": budget} for budget in BUDGETS}
    targets = {split: target.name for split, target in TARGETS.items()}
    experiment("dga_token_limited", str(__doc__), METHODS, settings, make_data, to_markdown, targets=targets)


if __name__ == "__main__":
    main()
