"""The sections of a recipe about corpora and tokenizers."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from weftlm.config import Section

Format = Literal["auto", "jsonl", "csv", "text", "code", "parquet"]


class CorpusConfig(Section):
    """One input: exactly one of `path`, `dataset` and `builtin`.

    Attributes:
        path: File, glob (`**` allowed) or folder, which is searched with its subfolders. Hidden entries are left out;
            links that leave the folder (of a glob: its part before the first wildcard) are left out and counted.
        dataset: Hugging Face dataset: a name on the hub, a local folder, or a folder saved by `save_to_disk`.
        builtin: `all`, or names of built-in corpora; each document is labelled with its corpus.
        config: Configuration of a `dataset`.
        split: Split of a `dataset`.
        revision: Branch, tag or commit of a `dataset` on the hub.
        streaming: Whether to read a `dataset` as a stream rather than download it first.
        format: Format of the files: `jsonl` (JSON Lines; a file that ends in `.json` may hold one array of objects
            instead), `csv` (with a header; `.tsv`: tab-separated), `text`, `code` (a file per document), `parquet`, or
            `auto`: by suffix. Any but Parquet may end in `.gz`, `.zst`, `.xz` or `.bz2`. A document may hold 256 MiB.
        split_documents: Document of a text file: the whole `file`, or each run of lines between `blank_lines`.
        suffixes: Suffixes of the files of a folder to read, such as `[".py"]` (`""`: files without one); default those
            of the format.
        text_field: Field of the text in a JSON object, Parquet row or dataset row; may be dotted (`data.text`).
        prompt_field: Field of the prompt to which the text is the answer; may be dotted. Each document is then an
            example, a prompt and a target, and its text is the two one after the other, with nothing put between them.
        label: Domain of every document.
        label_field: Field of the domain in a record; may be dotted. A whole number is taken as its decimal form.
        label_from: Source of the domain: the name of the `file` without suffixes, or of its `folder`.
        max_documents: Largest number of documents (of each, for `builtin`).
        max_bytes: Largest number of UTF-8 bytes of text (of each, for `builtin`).
        on_error: What to do about a faulty record: `stop` with an error that names file and line, or `skip` and count.
    """

    path: str | None = None
    dataset: str | None = None
    builtin: Literal["all"] | tuple[str, ...] | None = None
    config: str | None = None
    split: str = "train"
    revision: str | None = None
    streaming: bool = True
    format: Format = "auto"
    split_documents: Literal["file", "blank_lines"] = "file"
    suffixes: tuple[str, ...] | None = None
    text_field: str = Field(default="text", min_length=1)
    prompt_field: str | None = Field(default=None, min_length=1)
    label: str | None = Field(default=None, min_length=1)
    label_field: str | None = Field(default=None, min_length=1)
    label_from: Literal["file", "folder"] | None = None
    max_documents: int | None = Field(default=None, ge=1)
    max_bytes: int | None = Field(default=None, ge=1)
    on_error: Literal["stop", "skip"] = "stop"

    @model_validator(mode="after")
    def _consistent(self) -> CorpusConfig:
        kinds = [kind for kind in ("path", "dataset", "builtin") if getattr(self, kind) is not None]
        if len(kinds) != 1:
            raise ValueError(f"set exactly one of path, dataset and builtin, not {' and '.join(kinds) or 'none'}")
        labels = [name for name in ("label", "label_field", "label_from") if getattr(self, name) is not None]
        if len(labels) > 1:
            raise ValueError(f"set at most one of label, label_field and label_from, not {' and '.join(labels)}")
        only = {
            "path": ("format", "split_documents", "suffixes", "label_from"),
            "dataset": ("config", "split", "revision", "streaming"),
            "builtin": (),
        }
        changed = {name for name, field in type(self).model_fields.items() if getattr(self, name) != field.default}
        for kind, names in only.items():
            wrong = sorted(changed & set(names)) if kind != kinds[0] else []
            if wrong:
                raise ValueError(f"{', '.join(wrong)} goes with {kind}, not with {kinds[0]}")
        if kinds[0] == "builtin" and (self.label_field or self.prompt_field or self.text_field != "text"):
            raise ValueError("built-in corpora have no fields; leave text_field, prompt_field and label_field out")
        if self.format in ("text", "code") and self.prompt_field is not None:
            raise ValueError(f"prompt_field needs records; files of format {self.format} have none")
        if self.format in ("text", "code") and self.label_field is not None:
            raise ValueError(f"label_field needs records; files of format {self.format} have none: use label_from")
        if self.split_documents != "file" and self.format not in ("auto", "text"):
            raise ValueError(f"split_documents goes with format text, not {self.format}")
        if self.suffixes is not None and not all(suffix[:1] in ("", ".") for suffix in self.suffixes):
            raise ValueError(
                f"suffixes {list(self.suffixes)} must each begin with a dot, or be empty for files without one"
            )
        return self

    @property
    def name(self) -> str:
        """The input in a word, for messages."""
        if self.builtin is not None:
            return f"builtin:{self.builtin if self.builtin == 'all' else ','.join(self.builtin)}"
        return str(self.path or self.dataset)


class TrainConfig(Section):
    """How a byte-level BPE is trained.

    Attributes:
        vocab_size: Tokens in all: 256 bytes, the end-of-document token and the merges. Fewer if the text is too small.
        min_frequency: Least number of occurrences of a pair to be merged.
        sample_bytes: UTF-8 bytes of text to learn from, taken from the front of what the trainer is given.
    """

    vocab_size: int = Field(default=4096, ge=257)
    min_frequency: int = Field(default=2, ge=1)
    sample_bytes: int = Field(default=32_000_000, ge=1)


class TokenizerConfig(Section):
    """The tokenizer of a recipe: `train` one (the default) or name a `pretrained` one, never both.

    Attributes:
        train: Settings of a byte-level BPE learnt from the training text.
        pretrained: Hugging Face tokenizer: a local folder or a name on the hub. Code from the hub is never run.
        revision: Branch, tag or commit of a `pretrained` hub name.
    """

    train: TrainConfig | None = None
    pretrained: str | None = None
    revision: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _train_by_default(cls, value: Any) -> Any:
        if isinstance(value, dict) and value.get("train") is None and value.get("pretrained") is None:
            return {**value, "train": {}}
        return value

    @model_validator(mode="after")
    def _one_of_two(self) -> TokenizerConfig:
        if self.train is not None and self.pretrained is not None:
            raise ValueError("set either train or pretrained, not both")
        if self.revision is not None and self.pretrained is None:
            raise ValueError("revision goes with pretrained; a trained tokenizer has none")
        return self
