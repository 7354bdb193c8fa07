"""Embeddings: documents of a kind lie together, and a saved embedder is the same embedder."""

import builtins
import os
import subprocess
import sys
import types
from typing import Any

import numpy as np
import pytest

from weftlm.config import validate
from weftlm.domains.config import EmbedderConfig
from weftlm.domains.embed import TfidfSvd, make_embedder, unit_rows
from weftlm.errors import ConfigError, DataError

KINDS = {
    "sea": "the ship sails over deep water past the harbour and a grey wave breaks on the hull",
    "code": "def f(x): return x + 1; for i in range(n): total += f(i); print(total)",
    "law": "the licensee shall not be liable for damages arising out of the agreement herein",
}


def planted(per_kind: int = 12) -> tuple[list[str], list[str]]:
    rng = np.random.default_rng(0)
    texts, labels = [], []
    for label, text in KINDS.items():
        words = text.split()
        for _ in range(per_kind):
            texts.append(" ".join(rng.choice(words, size=30)))
            labels.append(label)
    return texts, labels


@pytest.mark.parametrize("analyzer", ["word", "char", "both"])
def test_documents_of_a_kind_lie_together(analyzer: Any) -> None:
    texts, labels = planted()
    rows = TfidfSvd.fit(texts, EmbedderConfig(dimensions=8, analyzer=analyzer), seed=0).embed(texts)
    assert rows.dtype == np.float32
    assert np.allclose(np.linalg.norm(rows, axis=1), 1.0, atol=1e-5)
    cosines = rows @ rows.T
    same = np.array([[a == b for a in labels] for b in labels])
    assert cosines[same].mean() > 0.8
    assert cosines[~same].mean() < 0.4


def test_unknown_and_empty_text_is_a_zero_row() -> None:
    embedder = TfidfSvd.fit(planted()[0], EmbedderConfig(dimensions=6), seed=0)
    assert not embedder.embed(["", "Ωμέγα"]).any()
    assert embedder.embed([]).shape == (0, embedder.dimensions)


def test_only_the_first_characters_count_and_the_vocabulary_is_bounded() -> None:
    texts, _ = planted()
    embedder = TfidfSvd.fit(texts, EmbedderConfig(dimensions=6, max_chars=40, vocabulary=20), seed=0)
    assert sum(map(len, embedder.vocabularies)) == 20
    assert np.array_equal(embedder.embed([texts[0][:40]]), embedder.embed([texts[0][:40] + " ship" * 9]))


def test_the_fit_does_not_depend_on_the_process() -> None:
    setup = "texts = [f'{w} alpha beta {i % 5}' for i in range(40) for w in ('sea', 'law')]"
    found: dict[str, Any] = {}
    exec(setup, found)
    here = TfidfSvd.fit(found["texts"], EmbedderConfig(dimensions=4), 3).fingerprint
    seed = "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"
    there = subprocess.run(
        [
            sys.executable,
            "-c",
            "from weftlm.domains.embed import *\n"
            f"{setup}\nprint(TfidfSvd.fit(texts, EmbedderConfig(dimensions=4), 3).fingerprint)",
        ],
        env={**os.environ, "PYTHONHASHSEED": seed},
        check=True,
        capture_output=True,
        text=True,
    ).stdout.strip()
    assert there == here


def test_a_sample_without_features_is_an_error() -> None:
    with pytest.raises(DataError, match="cannot be embedded"):
        TfidfSvd.fit(["", "  "], EmbedderConfig(), seed=0)
    assert TfidfSvd.fit(["one document"], EmbedderConfig(), seed=0).embed(["one"]).shape == (1, 1)


def test_a_model_is_needed_exactly_where_it_belongs() -> None:
    for wrong in ({"kind": "sentence_transformers"}, {"model": "m"}):
        with pytest.raises(ConfigError, match="model goes with kind"):
            validate(EmbedderConfig, wrong, "embedder")


def test_a_missing_package_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def refuse(name: str, *rest: Any, **named: Any) -> Any:
        if name == "sentence_transformers":
            raise ImportError(name)
        return original(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ConfigError, match=r"pip install '\.\[embed\]'"):
        make_embedder(EmbedderConfig(kind="sentence_transformers", model="m"), [], 0)


def test_a_sentence_transformers_model_is_used_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    class Model:
        def __init__(self, name: str) -> None:
            if name != "good":
                raise OSError("no such model")

        def encode(self, texts: list[str], **named: Any) -> Any:
            return np.array([[len(text), text.count("a"), 1.0] for text in texts])

    module = types.ModuleType("sentence_transformers")
    module.SentenceTransformer = Model  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "sentence_transformers", module)
    monkeypatch.setattr("weftlm.places._asked", lambda *_: None)
    embedder = make_embedder(EmbedderConfig(kind="sentence_transformers", model="good", max_chars=3), [], 0)
    assert embedder.dimensions == 3
    assert np.allclose(embedder.embed(["aab ignored"]), unit_rows(np.array([[3.0, 2.0, 1.0]])))
    with pytest.raises(ConfigError, match="'bad' cannot be loaded"):
        make_embedder(EmbedderConfig(kind="sentence_transformers", model="bad"), [], 0)
