"""The second scenario of DGA's paper: many domains found by clustering, and a target known from a handful of documents.

The importance-sampling histogram of so few documents is almost empty; DGA reweights distributions over the clusters
instead. Every method trains the same model on the same number of tokens, from the same initial weights. `--split dev`
uses another target and other seeds: settings are chosen there, `--split report` (the default) only reports.

    python benchmarks/dga_few_examples.py --data PATH      # regenerates benchmarks/results/dga_few_examples.{json,md}
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from _common import environment_lines
from _domains_text import TextDomain, TokenisedDomain, encode, make_tokenizer, read_texts, shuffled
from _mixture_runs import LEGEND, Data, Method, experiment, rows_table
from numpy.typing import NDArray

from weftlm.domains.cluster import fit_clusters
from weftlm.domains.config import ClusterConfig, EmbedderConfig
from weftlm.domains.embed import make_embedder
from weftlm.domains.histogram import basis_from_sets
from weftlm.domains.histogram import histogram as domain_histogram

TARGETS = {
    "report": TextDomain("cs.RO", "arxiv_cs", "cs.RO"),
    "dev": TextDomain("q-bio.BM", "arxiv_bio_stat_econ", "q-bio.BM"),
}
FILES = (
    "arxiv_cs", "arxiv_math", "arxiv_physics", "arxiv_bio_stat_econ", "qa_medical", "legal_uscode", "novels_en",
    "chat_taskdialog", "math_word", "math_latex", "encyc_factbook", "wikipedia_en", "reviews_movies", "biomed_fulltext",
)  # fmt: skip
AUXILIARY = (
    *(TextDomain(n, "arxiv_cs", n) for n in ("cs.CR", "cs.LO", "cs.SE", "cs.GT", "cs.DB", "cs.SD", "cs.NE")),
    *(TextDomain(n, "arxiv_math", n) for n in ("math.FA", "math.GT")),
    *(TextDomain(n, "arxiv_physics", n) for n in ("physics.plasm-ph", "nlin.CD")),
    *(TextDomain(n, "arxiv_bio_stat_econ", n) for n in ("stat.AP", "q-bio.NC", "eess.IV")),
    *(TextDomain(n, n) for n in ("novels_en", "qa_medical", "chat_taskdialog")),
)
"""Small sets a team might own besides the target; only their histograms over the clusters are used."""
BYTES_PER_FILE, BYTES_PER_DOCUMENT = 1_000_000, 4_000
TARGET_HELDOUT, HELDOUT_PER_CLUSTER, AUXILIARY_DOCUMENTS = 120, 2, 20
VOCABULARY = 1024
EXAMPLES = 5
CLUSTERS = (64,)

EVERY = {"update_every_steps": 10}
DGA = {"policy": "dga", "reweight": "basis", "eta": 15.0, "initial": "importance", "anchor": 0.1, **EVERY}
PROBE = {"estimator": "shadow", "probe": "extra", "sequences_per_group": 6, "target_sequences": 48}
"""Chosen on the development target with two seeds (docs/log.md)."""
METHODS: dict[str, Method] = {
    "uniform": ({"policy": "uniform", **EVERY}, {}),
    "proportional": ({"policy": "proportional", **EVERY}, {}),
    "importance": ({"policy": "importance", **EVERY}, {}),
    "dga": (DGA, PROBE),
    "dga, no EMA": ({**DGA, "ema": 1.0}, PROBE),
    "target alone": (None, {}),
}


@functools.cache
def _pool(source: str, split: str) -> tuple[list[str], NDArray[np.float32], Any]:
    """The generic documents (the target's category left out), their embeddings and the embedder."""
    texts: list[str] = []
    for file in FILES:
        taken = 0
        for text in shuffled(list(_without_target(Path(source), file, split)), seed=0):
            texts.append(text[:BYTES_PER_DOCUMENT])
            taken += len(texts[-1])
            if taken >= BYTES_PER_FILE:
                break
    embedder = make_embedder(EmbedderConfig(), texts, 0)
    return texts, embedder.embed(texts), embedder


def _without_target(folder: Path, file: str, split: str) -> list[str]:
    target = TARGETS[split]
    banned = set(read_texts(folder, target)) if file == target.file else set()
    return [text for text in read_texts(folder, TextDomain(file, file)) if text not in banned]


@functools.lru_cache(maxsize=2)
def make_data(source: str, split: str, clusters: int, examples: int, seed: int) -> Data:
    """Cluster the pool, cut held-out documents per cluster, and place the target and the auxiliary sets among them."""
    folder = Path(source)
    tokenizer = make_tokenizer(folder, tuple(TextDomain(file, file) for file in FILES), VOCABULARY)
    texts, embeddings_NE, embedder = _pool(source, split)
    fitted = fit_clusters(embeddings_NE, ClusterConfig(n=clusters), seed)
    labels_N = fitted.assign(embeddings_NE)
    domains = []
    kept = []
    for number in range(len(fitted)):
        here = [texts[index] for index in np.flatnonzero(labels_N == number)]
        train = encode(tokenizer, here[HELDOUT_PER_CLUSTER:]) if len(here) > 2 * HELDOUT_PER_CLUSTER else None
        if train is not None and len(train) > 600:
            kept.append(number)
            held = encode(tokenizer, here[:HELDOUT_PER_CLUSTER])
            domains.append(TokenisedDomain(f"cluster {number}", train, held, tuple(here[HELDOUT_PER_CLUSTER:])))
    mask_C = np.isin(np.arange(len(fitted)), kept)
    fitted = fitted.keep(mask_C)
    ordered = shuffled(list(read_texts(folder, TARGETS[split])), seed=0)
    chosen = shuffled(ordered[TARGET_HELDOUT:], seed)[:examples]

    def places(documents: list[str]) -> NDArray[np.int64]:
        return fitted.assign(embedder.embed(documents))

    sets = [
        places(
            [
                text[:BYTES_PER_DOCUMENT]
                for text in shuffled(list(read_texts(folder, other)), seed)[:AUXILIARY_DOCUMENTS]
            ]
        )
        for other in AUXILIARY
        if other != TARGETS[split]
    ]
    target = places(chosen)
    basis = np.concatenate(
        [basis_from_sets([*sets, target], len(domains)), np.full((1, len(domains)), 1 / len(domains))]
    )
    return Data(
        domains=tuple(domains),
        target_train=encode(tokenizer, chosen),
        target_heldout=encode(tokenizer, ordered[:TARGET_HELDOUT]),
        target_histogram=tuple(domain_histogram(target, len(domains)).tolist()),
        basis=tuple(tuple(row) for row in basis.tolist()),
        vocab_size=tokenizer.vocab_size,
        eos_id=tokenizer.eos_id,
    )


def to_markdown(record: Mapping[str, Any]) -> str:
    """One table per setting."""
    lines = [
        "# DGA with many domains and few target examples",
        "",
        f"Target {record['target']}; {record['parameters']:,} parameters; {record['train_tokens']:,} training tokens "
        f"for every method; {record['seeds']} seeds. DGA reweights distributions over the clusters: the histograms of "
        f"small auxiliary sets, the target's own and the uniform one. {LEGEND}",
    ]
    for setting, rows in record["settings"].items():
        lines += ["", f"## {setting}", "", rows_table(rows)]
    return "\n".join([*lines, "", environment_lines(record)])


def main() -> None:
    """Run every method in every setting and seed, then report."""
    settings = {
        f"{clusters} clusters, {EXAMPLES} target documents": {"clusters": clusters, "examples": EXAMPLES}
        for clusters in CLUSTERS
    }
    targets = {split: target.name for split, target in TARGETS.items()}
    experiment("dga_few_examples", str(__doc__), METHODS, settings, make_data, to_markdown, targets=targets)


if __name__ == "__main__":
    main()
