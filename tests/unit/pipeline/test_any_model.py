"""Every kind of model opens by its folder, and what is missing is named."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support import served
from support.experts import make_pool

from weftlm.corpora.tokens import Tokenizer
from weftlm.errors import ConfigError, DataError
from weftlm.experts.expert import BaseReference
from weftlm.experts.library import ExpertLibrary
from weftlm.models.factory import peft_warnings
from weftlm.models.open import load_base
from weftlm.pipeline.any_model import open_model
from weftlm.routing.routed_model import RoutedModel

EXPERTS = {"plain": (), "routed": ("a", "b", "c"), "gated": ("base", "other")}


@pytest.mark.parametrize("kind", served.KINDS)
def test_every_kind_opens_with_its_tokenizer_and_experts(tmp_path: Path, kind: str) -> None:
    found = open_model(served.write_model(tmp_path, kind))
    assert (found.kind, found.experts, found.max_length) == (kind, EXPERTS[kind], served.POSITIONS)
    assert found.tokenizer.fingerprint == served.tokenizer().fingerprint
    ids = torch.from_numpy(found.tokenizer.encode_batch(["mast sail wind"])[0].astype("int64"))[None]
    with torch.no_grad():
        assert found.model(ids).logits.shape == (*ids.shape, served.VOCAB)


def test_a_run_folder_opens_its_adapter_over_its_base_with_the_base_s_tokenizer(tmp_path: Path) -> None:
    base = served.write_model(tmp_path, "plain")
    model = open_model(base).model
    with peft_warnings():
        adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
        adapted.save_pretrained(tmp_path / "run" / "model")
    (tmp_path / "run" / "recipe.yaml").touch()
    found = open_model(tmp_path / "run")
    assert (found.kind, found.max_length) == ("plain", served.POSITIONS)
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        torch.testing.assert_close(found.model(ids).logits, adapted.eval()(ids).logits)


def test_a_routed_model_takes_another_base(tmp_path: Path) -> None:
    path = served.write_model(tmp_path, "routed")
    (tmp_path / "base").rename(tmp_path / "moved")
    with pytest.raises(ConfigError, match="there is no folder"):
        open_model(path)
    assert open_model(path, base=str(tmp_path / "moved")).kind == "routed"


def test_a_routed_encoder_decoder_opens_where_it_will_do(tmp_path: Path) -> None:
    base = served.write_encoder_decoder(tmp_path / "t5")
    model, reference = load_base(str(base)), BaseReference(str(base))
    RoutedModel(model, make_pool(model, 2, base=reference), "phatgoose", base=reference).save_pretrained(tmp_path / "r")
    with pytest.raises(ConfigError, match="is an encoder-decoder model"):
        open_model(tmp_path / "r")
    assert open_model(tmp_path / "r", encoder_decoder=True, tokenizer=str(base)).kind == "routed"


def test_a_tokenizer_is_of_the_revision_of_its_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = served.write_model(tmp_path, "plain")
    library = ExpertLibrary.open(tmp_path / "library", BaseReference(str(base), "v1"))
    library.add(*make_pool(load_base(str(base)), 2, base=library.base))
    asked: list[tuple[str, str | None]] = []

    def found(name: str, revision: str | None) -> Tokenizer:
        asked.append((name, revision))
        return served.tokenizer()

    monkeypatch.setattr("weftlm.pipeline.any_model.find_tokenizer", found)
    open_model(library.folder, router="merged")
    open_model(base, revision="v2")
    open_model(base, revision="v2", tokenizer="another/place")
    assert asked == [(str(base), "v1"), (str(base), "v2"), ("another/place", None)]


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"there is no folder .*nowhere"):
        open_model(tmp_path / "nowhere")
    served.llama().save_pretrained(tmp_path / "bare")
    with pytest.raises(DataError, match="comes without a tokenizer"):
        open_model(tmp_path / "bare")
    base = served.write_model(tmp_path / "made", "plain")
    assert open_model(tmp_path / "bare", tokenizer=str(base)).kind == "plain"
    with pytest.raises(ConfigError, match="base is for routed models"):
        open_model(base, base=str(base))
    with pytest.raises(ConfigError, match=r"dtype 'half'; allowed: "):
        open_model(base, dtype="half")
