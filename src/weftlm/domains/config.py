"""The sections of a recipe about embedding and clustering documents."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from weftlm.config import Section


class ClusterConfig(Section):
    """How documents are clustered.

    Attributes:
        n: Clusters asked for; those that stay empty are dropped.
        flat_limit: Most clusters in one level; above, about sqrt(n) groups are clustered further.
        sample_documents: Documents that the centroids are fitted on.
        min_bytes: Least text of a cluster; smaller ones are dissolved, their documents go to the nearest other.
    """

    n: int = Field(ge=1)
    flat_limit: int = Field(default=256, ge=1)
    sample_documents: int = Field(default=20_000, ge=1)
    min_bytes: int = Field(default=4096, ge=0)


class EmbedderConfig(Section):
    """How documents become vectors.

    Attributes:
        kind: Embedder: `tfidf` needs nothing; `sentence_transformers` needs the package of that name and a model.
        model: Folder or hub name of a sentence-transformers model.
        analyzer: Features that `tfidf` counts: words and punctuation marks, runs of 3 characters, or both.
        dimensions: Dimensions of the truncated SVD; fewer where the sample has a lower rank.
        vocabulary: Largest number of features, the most frequent ones.
        max_chars: Characters of a document that are embedded, from its beginning.
        sample_documents: Documents that vocabulary and SVD are fitted on.
        batch_documents: Documents embedded at a time.
    """

    kind: Literal["tfidf", "sentence_transformers"] = "tfidf"
    model: str | None = None
    analyzer: Literal["word", "char", "both"] = "word"
    dimensions: int = Field(default=128, ge=1)
    vocabulary: int = Field(default=30_000, ge=2)
    max_chars: int = Field(default=4000, ge=1)
    sample_documents: int = Field(default=8000, ge=1)
    batch_documents: int = Field(default=256, ge=1)

    @model_validator(mode="after")
    def _model_goes_with_kind(self) -> EmbedderConfig:
        if (self.kind == "sentence_transformers") != (self.model is not None):
            raise ValueError("model goes with kind: sentence_transformers, and is needed there")
        return self
