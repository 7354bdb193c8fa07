"""Tokenizers: text comes back, training is deterministic, fingerprints follow contents, transformers loads them."""

import copy
import json
import time
import warnings
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import pytest
import tokenizers
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerFast

from weftlm.config import validate
from weftlm.corpora import tokens
from weftlm.corpora.config import TokenizerConfig, TrainConfig
from weftlm.corpora.tokens import (
    END_OF_DOCUMENT,
    Tokenizer,
    find_tokenizer,
    load_pretrained,
    make_tokenizer,
    train_tokenizer,
)
from weftlm.errors import ConfigError, DataError

TEXTS = [f"def f_{i}(x):\n    return x + {i}  # éß {i * 7919}\n\n\nthe cat sat on the mat\n" for i in range(300)]
SMALL = TrainConfig(vocab_size=400)


TOKENIZER = train_tokenizer(TEXTS, SMALL)


@given(st.text())
@example(f"a{END_OF_DOCUMENT}b")
def test_text_comes_back_unchanged(text: str) -> None:
    (ids,) = TOKENIZER.encode_batch([text])
    assert TOKENIZER.decode(ids) == text
    assert TOKENIZER.eos_id not in ids


def test_training_is_deterministic_and_needs_text(tmp_path: Path) -> None:
    assert train_tokenizer(iter(TEXTS), SMALL).fingerprint == TOKENIZER.fingerprint
    assert train_tokenizer(TEXTS, TrainConfig(vocab_size=401)).fingerprint != TOKENIZER.fingerprint
    for texts in ([], [""]):
        with pytest.raises(DataError, match="training text is empty"):
            train_tokenizer(texts, SMALL)
    TOKENIZER.save(tmp_path)
    untouched = (pytest.fail("the text was read") for _ in range(1))
    made = make_tokenizer(TokenizerConfig(pretrained=str(tmp_path)), untouched)
    assert made.fingerprint == make_tokenizer(TokenizerConfig(train=SMALL), iter(TEXTS)).fingerprint


def test_a_saved_folder_loads_everywhere_without_a_word(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    TOKENIZER.save(tmp_path / "t")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hf = AutoTokenizer.from_pretrained(tmp_path / "t")
        loaded = Tokenizer.load(tmp_path / "t")
    assert capfd.readouterr() == ("", "")
    text = TEXTS[3] + " 🧵"
    assert hf(text, add_special_tokens=False)["input_ids"] == loaded.encode_batch([text])[0].tolist()
    assert hf.eos_token_id == loaded.eos_id == TOKENIZER.eos_id
    again = [loaded, ForkingPickler.loads(ForkingPickler.dumps(loaded)), load_pretrained(str(tmp_path / "t"))]
    assert {each.fingerprint for each in again} == {TOKENIZER.fingerprint}


def test_tokenizers_of_other_ends_share_a_vocabulary() -> None:
    hf = copy.deepcopy(TOKENIZER.hf)
    hf.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    base, chat = Tokenizer(hf), copy.deepcopy(hf)
    chat.eos_token = "<|im_end|>"
    assert Tokenizer(chat).eos_id != base.eos_id
    assert Tokenizer(chat).fingerprint != base.fingerprint
    assert Tokenizer(chat).vocabulary_fingerprint == base.vocabulary_fingerprint != TOKENIZER.vocabulary_fingerprint


def _words() -> tokenizers.Tokenizer:
    found = tokenizers.Tokenizer(models.WordLevel({"[UNK]": 0, "</s>": 1, "cat": 2}, unk_token="[UNK]"))
    found.pre_tokenizer = pre_tokenizers.Whitespace()
    return found


def test_tokenizers_of_other_kinds_keep_their_texts_whole_and_survive_a_round_trip(tmp_path: Path) -> None:
    backend = _words()
    backend.enable_truncation(2)
    backend.enable_padding(length=8)
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>").save_pretrained(tmp_path / "words")
    words, in_python = load_pretrained(str(tmp_path / "words")), Tokenizer(ByT5Tokenizer(), "byt5")
    assert [ids.tolist() for ids in words.encode_batch(["cat cat cat dog", ""])] == [[2, 2, 2, 0], []]
    (ids,) = in_python.encode_batch(["héllo </s>"])
    assert in_python.decode(ids) == "héllo </s>"
    assert in_python.eos_id not in ids
    for number, tokenizer in enumerate((words, in_python)):
        tokenizer.save(tmp_path / str(number))
        assert Tokenizer.load(tmp_path / str(number)).fingerprint == tokenizer.fingerprint
    PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(tmp_path / "endless")
    with pytest.raises(ConfigError, match=r"has no end-of-sequence token.*eos_token"):
        load_pretrained(str(tmp_path / "endless"))


def test_the_configuration_is_one_of_two() -> None:
    assert TokenizerConfig().train == TrainConfig()
    assert validate(TokenizerConfig, {"pretrained": "x", "revision": "y"}, "tokenizer").train is None
    for value in ({"train": {}, "pretrained": "x"}, {"revision": "x"}, {"train": {"vocab_size": 256}}):
        with pytest.raises(ConfigError):
            validate(TokenizerConfig, value, "tokenizer")
    resolved = TokenizerConfig().model_dump()
    assert validate(TokenizerConfig, resolved, "tokenizer") == TokenizerConfig()


@pytest.mark.parametrize("length", [7, 8, 9, 16, 1000])
def test_long_texts_are_encoded_in_pieces(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    text = ("\n".join(TEXTS))[:length]
    monkeypatch.setattr(tokens, "PIECE_CHARACTERS", 8)
    ids = TOKENIZER.encode_batch(["short", text, "end"])
    assert [TOKENIZER.decode(each) for each in ids] == ["short", text, "end"]
    pieces = [text[at : at + 8] for at in range(0, length, 8)]
    assert ids[1].tolist() == [token for each in TOKENIZER.encode_batch(pieces) for token in each]


@pytest.mark.parametrize("run", ["a" * 400_000, " " * 400_000, "é" * 400_000])
def test_learning_from_one_long_run_takes_no_time(run: str) -> None:
    begin = time.process_time()
    learnt = train_tokenizer([run, *TEXTS[:20]], SMALL)
    assert time.process_time() - begin < 8
    assert learnt.decode(learnt.encode_batch([run])[0]) == run


def _uncased() -> tokenizers.Tokenizer:
    found = tokenizers.Tokenizer(models.BPE())
    found.normalizer = normalizers.Sequence([normalizers.NFD(), normalizers.Lowercase(), normalizers.StripAccents()])
    found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    found.decoder = decoders.ByteLevel()
    alphabet = sorted({*pre_tokenizers.ByteLevel.alphabet(), *"".join(TEXTS)})
    found.train_from_iterator(
        TEXTS,
        trainers.BpeTrainer(vocab_size=700, special_tokens=["</s>"], initial_alphabet=alphabet, show_progress=False),
    )
    return found


LOSSY = {"word level": (_words, 0.3, 0.5), "uncased": (_uncased, 0.001, 0.0)}


@pytest.mark.parametrize("kind", LOSSY)
def test_what_a_tokenizer_loses_is_measured(kind: str) -> None:
    make, lost, unknown = LOSSY[kind]
    wrapped = Tokenizer(PreTrainedTokenizerFast(tokenizer_object=make(), eos_token="</s>"))
    loss = wrapped.loss([f"The Cat sat\n\n{text}" for text in TEXTS[:20]])
    assert 1 - loss.given_back > lost
    assert (loss.unknown > unknown) == (unknown > 0)
    assert loss.lost == max(1 - loss.given_back, loss.unknown)


@pytest.mark.parametrize("name", ["LlamaTokenizerFast", "Qwen2Tokenizer"])
def test_a_byte_level_tokenizer_loses_nothing_whatever_class_is_named_beside_it(tmp_path: Path, name: str) -> None:
    """transformers before 5.22 rebuilt such a tokenizer as Llama's own and dropped every blank."""
    assert TOKENIZER.loss([*TEXTS, " \t\r\n ", "<|endoftext|>"]) == TOKENIZER.loss([]) == (1.0, 0.0)
    TOKENIZER.save(tmp_path)
    settings_file = tmp_path / "tokenizer_config.json"
    settings_file.write_text(json.dumps({**json.loads(settings_file.read_text()), "tokenizer_class": name}))
    assert Tokenizer.load(tmp_path).loss(TEXTS).lost == 0.0


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("damage", ["torn", "empty", "odd", "deep"])
def test_a_torn_tokenizer_is_an_error_and_never_none(tmp_path: Path, name: str, damage: str) -> None:
    TOKENIZER.save(tmp_path)
    data = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(
        {"torn": data[: len(data) // 2], "empty": b"", "odd": b"[]", "deep": b"[" * 99_999}[damage]
    )
    for door, kind in ((Tokenizer.load, DataError), (load_pretrained, ConfigError), (find_tokenizer, ConfigError)):
        with pytest.raises(kind, match=name) as caught:
            door(str(tmp_path))
        assert "Errno" not in str(caught.value)
    (tmp_path / "empty").mkdir()
    assert find_tokenizer(str(tmp_path / "empty")) is None
    for place, says in (("empty", "cannot be read"), ("none", "does not exist")):
        with pytest.raises(DataError, match=says):
            Tokenizer.load(tmp_path / place)
