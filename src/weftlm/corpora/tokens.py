"""Tokenizers: train a byte-level BPE on the corpora, or take any Hugging Face tokenizer.

A `Tokenizer` turns documents into token ids without special tokens; the store appends one end-of-document token per
document. Its fingerprint names everything that decides the ids, so a store can refuse tokens of another tokenizer.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tokenizers
from numpy.typing import NDArray
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from weftlm.corpora.config import TokenizerConfig, TrainConfig
from weftlm.corpora.store import Vocabulary
from weftlm.errors import ConfigError, DataError, reason
from weftlm.files import parse_json
from weftlm.places import locate

log = logging.getLogger(__name__)

END_OF_DOCUMENT = "<|endoftext|>"
PIECE_CHARACTERS = 1 << 20

_TOKENIZER_FILE = re.compile(r"^(.*token.*\.json|vocab.*|merges\.txt|.*(token|spiece|spm).*\.model)$")
_LONG_RUNS = pre_tokenizers.Split(tokenizers.Regex(r"\S{1024}|\s{1024}"), "isolated")
"""Cuts runs without white space, or of nothing else, while merges are learnt, which takes time in the square of a run:
400 kB of one letter took 214 s whole and take 0.2 s in pieces."""


class TextLoss(NamedTuple):
    """What a tokenizer keeps of a text.

        given back = 1 - max(bytes lost, bytes added) / bytes

    of decode(encode(text)) against the text, both as multisets of characters: a substituted character counts once, and
    a text that differs in order only as one byte. One blank added or dropped at the very beginning does not count.

    Attributes:
        given_back: Share of the UTF-8 bytes that decode(encode(text)) gives back.
        unknown: Share of the tokens that are the unknown token.
    """

    given_back: float
    unknown: float

    @property
    def lost(self) -> float:
        """The larger of the two: share of bytes not given back, share of unknown tokens."""
        return max(1.0 - self.given_back, self.unknown)


class NoEndOfTextError(ConfigError):
    """A tokenizer without an end-of-sequence token."""


class Tokenizer:
    """Text to token ids and back, over any Hugging Face tokenizer.

    Ids never hold special tokens: text that spells one (`<|endoftext|>` in a document about tokenizers) is encoded as
    ordinary text, so the end-of-document id marks the ends of documents and nothing else.

    A tokenizer may be pickled and sent to other processes.

    Attributes:
        hf: Hugging Face tokenizer, for `save_pretrained` beside a model.
        eos_id: Id of the end-of-document token.
        vocab_size: Highest id + 1.
        fingerprint: Hash of the contents of tokenizer.json that decide the ids, and of the end-of-document token.
        vocabulary_fingerprint: The same without the end-of-document token. Tokenizers that share it give a text the
            same ids, though models of theirs may end a text differently (a base and its chat model often do).
    Raises:
        ConfigError: The tokenizer has no end-of-sequence token.
    """

    def __init__(self, hf: PreTrainedTokenizerBase, name: str = "tokenizer") -> None:
        eos_id = hf.eos_token_id
        if not isinstance(eos_id, int):
            raise NoEndOfTextError(
                f"tokenizer {name} has no end-of-sequence token, which weftlm puts after every document; use one "
                f"that has an eos_token, or set it (tokenizer.eos_token = ...; tokenizer.save_pretrained(folder)) and "
                f"name that folder"
            )
        self.hf = hf
        self.eos_id: int = eos_id
        self.vocab_size: int = max([*hf.get_vocab().values(), eos_id]) + 1
        self._backend: tokenizers.Tokenizer | None = None
        contents: dict[str, Any] = {"class": type(hf).__name__, "vocab": hf.get_vocab()}
        if isinstance(hf, PreTrainedTokenizerFast):
            self._backend = tokenizers.Tokenizer.from_str(hf.backend_tokenizer.to_str())
            self._backend.no_truncation()
            self._backend.no_padding()
            self._backend.encode_special_tokens = True
            contents = parse_json(self._backend.to_str())
            del contents["post_processor"]  # only adds special tokens, which are never asked for
        self._unknown_ids = _unknown_ids(hf, contents.get("model", {}))
        self.fingerprint: str = _fingerprint([contents, eos_id])
        self.vocabulary_fingerprint: str = _fingerprint(contents)

    def __repr__(self) -> str:
        return f"Tokenizer(vocab_size={self.vocab_size}, eos_id={self.eos_id}, fingerprint={self.fingerprint!r})"

    @property
    def vocabulary(self) -> Vocabulary:
        """What a token store writer needs to know of this tokenizer."""
        return Vocabulary(self.vocab_size, self.eos_id, self.fingerprint)

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.uint32]]:
        """Token ids of each text, without special tokens; in the threads of the `tokenizers` library.

        Texts of more than a million characters are encoded in pieces, so that memory stays a small multiple of the
        text; no token spans two pieces.
        """
        if self._backend is None:
            plain = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
            return [np.asarray(self.hf(text, **plain)["input_ids"], dtype=np.uint32) for text in texts]
        short = iter(self._encode([text for text in texts if len(text) <= PIECE_CHARACTERS]))
        return [next(short) if len(text) <= PIECE_CHARACTERS else self._encode_long(text) for text in texts]

    def _encode_long(self, text: str) -> NDArray[np.uint32]:
        starts = range(0, len(text), PIECE_CHARACTERS)
        return np.concatenate([self._encode([text[start : start + PIECE_CHARACTERS]])[0] for start in starts])

    def _encode(self, texts: list[str]) -> list[NDArray[np.uint32]]:
        assert self._backend is not None
        encodings = self._backend.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.uint32) for encoding in encodings]

    def decode(self, ids: Iterable[int] | NDArray[Any]) -> str:
        """The text of token ids; special tokens are written out."""
        plain = [int(token) for token in ids]
        if self._backend is not None:
            return self._backend.decode(plain, skip_special_tokens=False)
        text = self.hf.decode(plain, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text

    def loss(self, texts: Sequence[str]) -> TextLoss:
        """Measure what is lost between texts and their tokens."""
        total = apart = tokens = unknown = 0
        for text, ids_N in zip(texts, self.encode_batch(texts), strict=True):
            total += len(text.encode("utf-8"))
            apart += _bytes_apart(text, self.decode(ids_N))
            tokens += len(ids_N)
            unknown += int(np.isin(ids_N, self._unknown_ids).sum())
        return TextLoss(1 - apart / max(1, total), unknown / max(1, tokens))

    def save(self, folder: str | Path) -> None:
        """Write the tokenizer so that `AutoTokenizer.from_pretrained(folder)` and `Tokenizer.load` open it."""
        self.hf.save_pretrained(str(folder))

    @classmethod
    def load(cls, folder: str | Path) -> Tokenizer:
        """Open a saved tokenizer.

        Raises:
            DataError: the folder holds no readable tokenizer.
            ConfigError: the tokenizer has no end-of-sequence token.
        """
        if not Path(folder).is_dir():
            raise DataError(f"tokenizer folder {folder} does not exist")
        try:
            hf = _open(str(folder), None)
        except DataError as error:
            raise DataError(f"tokenizer folder {folder} cannot be read: {error}; copy or download it again") from error
        return cls(hf, str(folder))

    def __reduce__(self) -> tuple[Any, ...]:
        return Tokenizer, (self.hf,)


def train_tokenizer(texts: Iterable[str], config: TrainConfig) -> Tokenizer:
    """Learn a byte-level BPE from the first `config.sample_bytes` of the texts; the same texts give the same tokenizer.

    Every byte is in the vocabulary, so any text can be encoded and comes back unchanged. Pass the texts interleaved
    when they come from several domains: the sample is taken from the front.

    Raises:
        DataError: there is no text.
    """
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        min_frequency=config.min_frequency,
        special_tokens=[END_OF_DOCUMENT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    sample = _front(texts, config.sample_bytes)
    first = next(sample, None)
    if first is None:
        raise DataError("a tokenizer cannot be trained: the training text is empty")
    byte_level = backend.pre_tokenizer
    backend.pre_tokenizer = pre_tokenizers.Sequence([_LONG_RUNS, byte_level])
    backend.train_from_iterator(chain((first,), sample), trainer=trainer)
    backend.pre_tokenizer = byte_level
    hf: PreTrainedTokenizerBase = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END_OF_DOCUMENT)
    return Tokenizer(hf, "trained on text")


def load_pretrained(name: str, revision: str | None = None) -> Tokenizer:
    """Any Hugging Face tokenizer by folder or hub name; code that comes with it is never run.

    Raises:
        ConfigError: it cannot be loaded, or has no end-of-sequence token.
    """
    name = locate(name, "tokenizer.pretrained", revision=revision)
    try:
        hf = _open(name, revision)
    except DataError as error:
        raise ConfigError(
            f"tokenizer.pretrained {name!r} cannot be loaded: {error}; give a local folder or the name of a tokenizer "
            f"on the hub that needs no code of its own"
        ) from error.__cause__
    return Tokenizer(hf, repr(name))


def find_tokenizer(place: str, revision: str | None = None) -> Tokenizer | None:
    """The tokenizer that comes with a model, in its folder or on the hub; None where there is none.

    One that has no end-of-sequence token, which weftlm cannot use, counts as none, with a line in the log.

    Raises:
        ConfigError: there is one, and it is damaged.
    """
    folder = Path(place)
    if folder.is_dir() and not any(_TOKENIZER_FILE.search(file.name) for file in folder.iterdir()):
        return None
    try:
        return load_pretrained(place, revision)
    except NoEndOfTextError as error:
        log.warning("%s", error)
        return None
    except ConfigError as error:
        if not folder.is_dir() and isinstance(error.__cause__, OSError):
            log.info("no tokenizer beside %s: %s", place, error)
            return None
        raise


def _open(place: str, revision: str | None) -> PreTrainedTokenizerBase:
    """Open a Hugging Face tokenizer, which has a vocabulary; transformers makes an empty one of a folder without.

    Raises:
        DataError: It cannot be opened; the message is the reason alone.
    """
    folder = Path(place)
    for file in sorted(folder.iterdir()) if folder.is_dir() else ():
        if _TOKENIZER_FILE.search(file.name):
            _check_file(file)
    try:
        hf: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            place, revision=revision or "main", trust_remote_code=False
        )
        own = hf.get_vocab().keys() - hf.get_added_vocab().keys() - set(hf.all_special_tokens)
    except Exception as error:
        raise DataError(reason(error)) from error
    if len(own) < 2:
        raise DataError("it has no vocabulary: tokenizer.json (or vocab.json, tokenizer.model, ...) is missing")
    return hf


def _check_file(file: Path) -> None:
    """Refuse a tokenizer's file that cannot be read, is empty, or is JSON by name and torn."""
    try:
        data = file.read_bytes() if file.is_file() else b""  # a pipe or a device would be read for ever
        sound = bool(data.strip()) and (file.suffix != ".json" or isinstance(parse_json(data), dict))
    except (OSError, ValueError):
        sound = False
    if not sound:
        raise DataError(f"{file.name} is empty, torn, a broken link or no JSON object")


def _unknown_ids(hf: PreTrainedTokenizerBase, model: Any) -> list[int]:
    """Ids of the unknown token; the end-of-text token, which text never gives, is not among them."""
    named = model.get("unk_token") if isinstance(model, dict) else None
    ids = {hf.unk_token_id, None if named is None else hf.get_vocab().get(named)}
    if isinstance(model, dict) and isinstance(model.get("unk_id"), int):
        ids.add(model["unk_id"])
    return sorted(token for token in ids if isinstance(token, int) and token != hf.eos_token_id)


def _bytes_apart(text: str, decoded: str) -> int:
    """UTF-8 bytes by which a text and its decoded tokens differ, at most those of the text; see `TextLoss`."""
    if text in (decoded, decoded.removeprefix(" ")) or text.removeprefix(" ") == decoded:
        return 0
    before, after = Counter(text), Counter(decoded)
    lost, added = (
        sum(count * len(character.encode("utf-8", errors="replace")) for character, count in rest.items())
        for rest in (before - after, after - before)
    )
    return min(len(text.encode("utf-8")), max(lost, added, 1))


def make_tokenizer(config: TokenizerConfig, texts: Iterable[str]) -> Tokenizer:
    """The tokenizer a recipe asks for; `texts` is read only when one is to be trained."""
    if config.pretrained is not None:
        return load_pretrained(config.pretrained, config.revision)
    assert config.train is not None
    return train_tokenizer(texts, config.train)


def _fingerprint(value: Any) -> str:
    canonical = json.dumps(value, sort_keys=True, ensure_ascii=True)
    return hashlib.blake2b(canonical.encode("ascii"), digest_size=16).hexdigest()


def _front(texts: Iterable[str], limit: int) -> Iterator[str]:
    """The texts up to `limit` UTF-8 bytes, the last one cut."""
    for text in texts:
        data = text.encode("utf-8")[:limit]
        limit -= len(data)
        if data:
            yield data.decode("utf-8", errors="ignore")
        if limit <= 0:
            return
