"""Preparing a corpus takes the same memory whatever its size: reading, duplicate removal, tokenising and the store.

Synthetic corpora of growing size are prepared, each in a process of its own, whose peak resident memory is recorded.
The text is random words of a fixed vocabulary with a Zipf distribution, in JSON Lines; one document in fifty is a copy.

    python benchmarks/prepare_memory.py [--quick] [--json] [--sizes-mb 10 40 160]
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from _common import environment_lines, finish, parser, say, table

from weftlm.corpora.config import CorpusConfig, TrainConfig
from weftlm.corpora.reading import ReadingReport, read_documents
from weftlm.corpora.source import Document
from weftlm.corpora.store_writer import tokenise_by_label
from weftlm.corpora.tokens import Tokenizer, train_tokenizer

SIZES_MB = (10, 40, 160)
QUICK_SIZES_MB = (1, 3)
WORDS = 20_000


def documents(megabytes: float, seed: int = 0) -> Iterator[str]:
    """Random documents of about 2 kB until their UTF-8 text reaches the size."""
    rng = np.random.Generator(np.random.Philox(seed))
    letters = rng.choice(list("etaoinshrdlucmfwypvbgk"), size=(WORDS, 9))
    lengths = rng.integers(2, 10, size=WORDS)
    words = np.array(["".join(row[:length]) for row, length in zip(letters, lengths, strict=True)], dtype=object)
    cumulative = np.cumsum(1.0 / np.arange(1, WORDS + 1))
    written = 0
    text = ""
    while written < megabytes * 1e6:
        for draws in rng.random((50, 350)):
            text = " ".join(words[np.searchsorted(cumulative, draws * cumulative[-1])])
            written += len(text)
            yield text
        yield text


def prepare(corpus: str, tokenizer: str, folder: str) -> dict[str, float]:
    """What one process does; returns its own peak memory."""
    loaded = Tokenizer.load(tokenizer)
    before = peak_mb()
    report = ReadingReport()
    start = time.perf_counter()
    seen: set[bytes] = set()
    documents = read_documents(CorpusConfig(path=corpus, label="d"), report)

    def unique() -> Iterator[Document]:
        for document in documents:
            if (digest := document.digest()) not in seen:
                seen.add(digest)
                yield document

    store = tokenise_by_label(unique(), loaded, Path(folder) / "store")["d"]
    seconds = time.perf_counter() - start
    return {
        "peak_mb": peak_mb(),
        "imports_mb": before,
        "seconds": seconds,
        "text_mb": report.bytes / 1e6,
        "documents": report.documents,
        "dropped": report.documents - len(seen),
        "tokens": len(store),
    }


def peak_mb() -> float:
    """Peak resident memory of this process, MiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1 << 20) if sys.platform == "darwin" else peak / 1024


def measure(sizes_mb: list[float]) -> dict[str, Any]:
    rows = []
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        train_tokenizer(documents(2, seed=1), TrainConfig(vocab_size=4096)).save(root / "tokenizer")
        for size in sizes_mb:
            corpus = root / "corpus.jsonl"
            with corpus.open("w", encoding="utf-8") as file:
                for text in documents(size):
                    file.write(json.dumps({"text": text}) + "\n")
            work = root / f"work-{size:g}"
            work.mkdir()
            command = [sys.executable, __file__, "--one", str(corpus), str(root / "tokenizer"), str(work)]
            out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            rows.append({"size_mb": size, **json.loads(out)})
            rows[-1]["mb_per_second"] = rows[-1]["text_mb"] / rows[-1]["seconds"]
            say(f"{size:g} MB: peak {rows[-1]['peak_mb']:.0f} MiB, {rows[-1]['mb_per_second']:.1f} MB/s")
    first, last = rows[0], rows[-1]
    ratios = {
        "corpus": last["text_mb"] / first["text_mb"],
        "peak_memory": last["peak_mb"] / first["peak_mb"],
        "added_mib_per_added_mb": (last["peak_mb"] - first["peak_mb"]) / (last["text_mb"] - first["text_mb"]),
        "speed": last["mb_per_second"] / first["mb_per_second"],
    }
    return {"rows": rows, "ratios_last_to_first": ratios}


def to_markdown(record: Mapping[str, Any]) -> str:
    header = ["text, MB", "documents", "dropped as copies", "tokens", "peak memory, MiB", "after imports, MiB", "MB/s"]
    rows = [
        [
            f"{row['text_mb']:.0f}",
            row["documents"],
            row["dropped"],
            row["tokens"],
            f"{row['peak_mb']:.0f}",
            f"{row['imports_mb']:.0f}",
            f"{row['mb_per_second']:.1f}",
        ]
        for row in record["rows"]
    ]
    ratios = record["ratios_last_to_first"]
    return f"""# Peak memory of preparing a corpus

JSON Lines are read, exact copies dropped, the rest tokenised (4096-token BPE) and stored, in one process per size.

{table(header, rows)}

From the smallest to the largest corpus the text grows {ratios["corpus"]:.1f} times, peak memory
{ratios["peak_memory"]:.2f} times ({ratios["added_mib_per_added_mb"]:.2f} MiB per added MB of text), speed changes
{ratios["speed"]:.2f} times.

{environment_lines(record)}
"""


def main() -> None:
    if sys.argv[1:2] == ["--one"]:
        sys.stdout.write(json.dumps(prepare(*sys.argv[2:5])))
        return
    flags = parser(__doc__.splitlines()[0], seeds=1)
    flags.add_argument("--sizes-mb", type=float, nargs="+", help="sizes of text to prepare, MB")
    arguments = flags.parse_args()
    sizes = arguments.sizes_mb or list(QUICK_SIZES_MB if arguments.quick else SIZES_MB)
    finish("prepare_memory", arguments, measure(sizes), to_markdown)


if __name__ == "__main__":
    main()
