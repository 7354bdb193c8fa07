"""Documents to vectors: TF-IDF with truncated SVD offline, or a sentence-transformers model where there is one.

Embeddings are unit rows of float32, so that Euclidean distance and cosine order neighbours alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import hstack
from sklearn.feature_extraction.text import CountVectorizer, TfidfTransformer
from sklearn.utils.extmath import randomized_svd

from weftlm.domains.config import EmbedderConfig
from weftlm.errors import ConfigError, DataError, install_hint, reason
from weftlm.places import locate

_WORDS = r"(?u)\w+|[^\w\s]"


class Embedder(Protocol):
    """Texts to unit vectors.

    Attributes:
        dimensions: E.
    """

    dimensions: int

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Unit rows (zero where nothing in a text is known), shape (N, E)."""
        ...


def _analyzers(analyzer: str) -> list[CountVectorizer]:
    words = CountVectorizer(analyzer="word", token_pattern=_WORDS, lowercase=True)
    characters = CountVectorizer(analyzer="char_wb", ngram_range=(3, 3), lowercase=True)
    return {"word": [words], "char": [characters], "both": [words, characters]}[analyzer]


class TfidfSvd:
    """Latent semantic vectors.

        x_v = (1 + ln tf_v) (1 + ln((1 + N) / (1 + df_v)))
        e   = normalise(normalise(x) W^T)                       W_EV: truncated SVD of the sample's rows x

    Deerwester et al. 1990, "Indexing by latent semantic analysis". Features that occur in one document of the sample
    only are left out unless the sample is tiny.

    Args:
        texts: A sample of documents, on which it is fitted.
        config: How many features and dimensions, of which analyzer.
        seed: Random seed of the decomposition.
    Raises:
        DataError: the sample holds no feature at all.
    """

    def __init__(self, texts: Sequence[str], config: EmbedderConfig, seed: int) -> None:
        self.config = config
        self._counters = _analyzers(config.analyzer)
        vocabularies = [_vocabulary(each, self._cut(texts), config) for each in _analyzers(config.analyzer)]
        if not any(vocabularies):
            raise DataError(
                f"documents cannot be embedded: none of {len(texts)} sampled documents holds a word or a repeated "
                f"character run; check the corpora, or embed with analyzer: char"
            )
        for counter, names in zip(self._counters, vocabularies, strict=True):
            counter.set_params(vocabulary={name: number for number, name in enumerate(names)})
        self._tfidf = TfidfTransformer(sublinear_tf=True)
        weighted_NV = self._tfidf.fit_transform(self._counts(texts))
        rank = max(1, min(config.dimensions, min(weighted_NV.shape) - 1))
        _, _, components_EV = randomized_svd(weighted_NV, rank, n_iter=5, random_state=seed)
        self._components_EV = np.ascontiguousarray(components_EV, dtype=np.float32)
        self.dimensions = rank

    def _cut(self, texts: Sequence[str]) -> list[str]:
        return [text[: self.config.max_chars] for text in texts]

    def _counts(self, texts: Sequence[str]) -> Any:
        counts = [counter.transform(self._cut(texts)) for counter in self._counters]
        return hstack(counts, format="csr").astype(np.float64)

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        if not texts:
            return np.zeros((0, self.dimensions), np.float32)
        return unit_rows(np.asarray(self._tfidf.transform(self._counts(texts)) @ self._components_EV.T))


def _vocabulary(counter: CountVectorizer, texts: Sequence[str], config: EmbedderConfig) -> list[str]:
    """The most frequent features, ties and order by name."""
    for least in (2, 1):
        counter.set_params(min_df=least, max_features=None)
        try:
            counts = counter.fit_transform(texts)
        except ValueError:  # an empty vocabulary, or nothing left of it
            continue
        names = counter.get_feature_names_out()
        if least == 2 and len(names) < 16:
            continue
        totals = np.asarray(counts.sum(axis=0)).ravel()
        order = np.lexsort((names, -totals))[: config.vocabulary]
        return sorted(str(names[number]) for number in order)
    return []


class SentenceTransformerEmbedder:
    """Vectors of a sentence-transformers model, on the device that package chooses.

    Raises:
        ConfigError: the package or the model is missing.
    """

    def __init__(self, config: EmbedderConfig) -> None:
        assert config.model is not None
        try:
            from sentence_transformers import SentenceTransformer  # noqa: PLC0415 - an optional extra
        except ImportError as error:
            raise ConfigError(
                "embedder kind sentence_transformers needs sentence-transformers; "
                f"{install_hint('embed')}, or use kind: tfidf"
            ) from error
        place = locate(config.model, "embedder model")
        try:
            self._model = SentenceTransformer(place)
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"embedder model {config.model!r} cannot be loaded: {reason(error)}; give a local folder or a "
                f"name on the hub, or use kind: tfidf"
            ) from error
        self.config = config
        self.dimensions = int(self.embed(["a"]).shape[1])

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        if not texts:
            return np.zeros((0, self.dimensions), np.float32)
        cut = [text[: self.config.max_chars] for text in texts]
        found = self._model.encode(
            cut, batch_size=self.config.batch_documents, show_progress_bar=False, convert_to_numpy=True
        )
        return unit_rows(np.asarray(found))


def unit_rows(rows: NDArray[Any]) -> NDArray[np.float32]:
    """Each row divided by its Euclidean norm; zero rows stay."""
    rows = rows.astype(np.float64)
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    result: NDArray[np.float32] = (rows / np.where(norms > 0, norms, 1.0)).astype(np.float32)
    return result


def make_embedder(config: EmbedderConfig, sample: Sequence[str], seed: int) -> Embedder:
    """The embedder a configuration asks for; only `tfidf` looks at the sample."""
    if config.kind == "tfidf":
        return TfidfSvd(sample, config, seed)
    return SentenceTransformerEmbedder(config)
