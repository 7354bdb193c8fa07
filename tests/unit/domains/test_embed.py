"""Embeddings: documents of a kind lie together."""

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
RNG = np.random.default_rng(0)
TEXTS = [" ".join(RNG.choice(text.split(), size=30)) for text in KINDS.values() for _ in range(12)]


@pytest.mark.parametrize("analyzer", ["word", "char", "both"])
def test_documents_of_a_kind_lie_together(analyzer: Any) -> None:
    embedder = TfidfSvd(TEXTS, EmbedderConfig(dimensions=8, analyzer=analyzer), seed=0)
    rows = embedder.embed(TEXTS)
    assert rows.dtype == np.float32
    assert np.allclose(np.linalg.norm(rows, axis=1), 1.0, atol=1e-5)
    cosines, kinds = rows @ rows.T, np.repeat(np.arange(3), 12)
    same = kinds[:, None] == kinds
    assert cosines[same].mean() > 0.8
    assert cosines[~same].mean() < 0.4


def test_unknown_text_is_a_zero_row_and_only_the_first_characters_count() -> None:
    embedder = TfidfSvd(TEXTS, EmbedderConfig(dimensions=6, max_chars=40, vocabulary=20), seed=0)
    assert not embedder.embed(["", "Ωμέγα"]).any()
    assert embedder.embed([]).shape == (0, embedder.dimensions)
    assert np.array_equal(embedder.embed([TEXTS[0][:40]]), embedder.embed([TEXTS[0][:40] + " ship" * 9]))
    with pytest.raises(DataError, match="cannot be embedded"):
        TfidfSvd(["", "  "], EmbedderConfig(), seed=0)
    assert TfidfSvd(["one document"], EmbedderConfig(), seed=0).embed(["one"]).shape == (1, 1)


def test_a_sentence_transformers_model_is_used_as_it_is_or_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    class Model:
        def __init__(self, name: str) -> None:
            if name != "good":
                raise OSError("no such model")

        def encode(self, texts: list[str], **named: Any) -> Any:
            return np.array([[len(text), text.count("a"), 1.0] for text in texts])

    def make(model: str) -> Any:
        return make_embedder(EmbedderConfig(kind="sentence_transformers", model=model, max_chars=3), [], 0)

    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(ConfigError, match=r"pip install '\.\[embed\]'"):
        make("good")
    module = types.ModuleType("sentence_transformers")
    module.SentenceTransformer = Model  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "sentence_transformers", module)
    monkeypatch.setattr("weftlm.places._asked", lambda *_: None)
    embedder = make("good")
    assert np.allclose(embedder.embed(["aab ignored"]), unit_rows(np.array([[3.0, 2.0, 1.0]])))
    with pytest.raises(ConfigError, match="'bad' cannot be loaded"):
        make("bad")
    for wrong in ({"kind": "sentence_transformers"}, {"model": "m"}):
        with pytest.raises(ConfigError, match="model goes with kind"):
            validate(EmbedderConfig, wrong, "embedder")
