"""One reader judges an adapter behind every command that opens one, and names what is wrong (`test_lora` has more)."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from support import served
from torch import Tensor

from weftlm.errors import WeftError
from weftlm.experts.library import ExpertLibrary
from weftlm.gating.experts import ExpertPool, ExpertSource
from weftlm.models.factory import peft_warnings
from weftlm.models.open import load_base
from weftlm.pipeline.any_model import open_model
from weftlm.pipeline.expert_library import import_experts

Q = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return served.write_model(tmp_path_factory.mktemp("base"), "plain")


@pytest.fixture(scope="module")
def sound(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sound")
    with peft_warnings():
        config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        get_peft_model(load_base(str(base)), config).save_pretrained(folder)
    return folder


@pytest.fixture
def adapter(tmp_path: Path, sound: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "adapter"))


def through_import(adapter: Path, base: Path) -> None:
    import_experts(adapter.parent / "library", [str(adapter)], base=str(base))


def through_open_model(adapter: Path, base: Path) -> None:
    open_model(adapter, device="cpu")


def through_a_gates_pool(adapter: Path, base: Path) -> None:
    ExpertPool.load([ExpertSource(name="a", model=str(adapter))])


DOORS: list[Callable[[Path, Path], None]] = [through_import, through_open_model, through_a_gates_pool]


def configured(**changes: Any) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / CONFIG
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return damage


def rewritten(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        tensors = {name: tensor.clone() for name, tensor in load_file(folder / WEIGHTS).items()}
        change(tensors)
        save_file(tensors, folder / WEIGHTS)

    return damage


def without(part: str) -> Callable[[Path], None]:
    return rewritten(lambda tensors: [tensors.pop(name) for name in list(tensors) if part in name])


def fifo(folder: Path) -> None:
    (folder / CONFIG).unlink()
    os.mkfifo(folder / CONFIG)


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "pickle beside": (lambda folder: (folder / "adapter_model.bin").write_bytes(b"x") and None, "pickled weights"),
    "a module less": (without("v_proj"), "v_proj.* holds nothing for it"),
    "one layer less": (without("layers.1"), r"layers\.1.* holds nothing for it"),
    "foreign keys": (
        rewritten(lambda t: [t.update({n.replace("self_attn", "attention"): t.pop(n)}) for n in list(t)]),
        "attention.q_proj is not in the model|holds nothing for it",
    ),
    "empty tensors": (rewritten(lambda t: t.update({n: torch.empty(0) for n in t})), "ZeRO-3"),
    "NaN": (rewritten(lambda t: t[f"{Q}B.weight"].fill_(float("nan"))), "NaN or infinite"),
    "wrong width": (rewritten(lambda t: t.update({f"{Q}A.weight": torch.ones(2, 31)})), "the adapter 31 to 32"),
    "resized": (
        rewritten(lambda t: t.update({"base_model.model.model.embed_tokens.weight": torch.ones(3, 32)})),
        "vocabulary was resized",
    ),
    "own code": (configured(auto_map={"AutoModel": "x.Y"}), "code of its own"),
    "huge alpha": (configured(lora_alpha=10**400), "lora_alpha: must be at most"),
    "slow rank_pattern": (configured(rank_pattern={r"(.|..)*[!?]": 2}), "rank_pattern.*too much time"),
    "strange base": (configured(base_model_name_or_path=["x"]), "base_model_name_or_path: must be text"),
    "fifo": (fifo, "is no plain file"),
}


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_adapter_is_refused_at_every_door(
    adapter: Path, base: Path, damage: str, door: Callable[[Path, Path], None]
) -> None:
    harm, message = DAMAGES[damage]
    harm(adapter)
    with pytest.raises(WeftError, match=f"(?s){message}"):
        door(adapter, base)
    assert not (adapter.parent / "library").exists()


@pytest.mark.parametrize(
    ("settings", "lacking"),
    [
        ({"target_modules": r".*\.(q|v)_proj"}, "layers.1"),
        ({"target_modules": ["q_proj", "v_proj", "k_proj"], "exclude_modules": r".*k_proj"}, "layers.1"),
        ({"layers_to_transform": [0, 1]}, "layers.1"),
        ({"layers_to_transform": 0}, "layers.0.self_attn.q_proj"),
        ({"layers_to_transform": 0, "layers_pattern": "layers"}, "layers.0.self_attn.q_proj"),
    ],
)
def test_layers_are_compared_with_what_the_settings_mean(
    adapter: Path, base: Path, settings: dict[str, Any], lacking: str
) -> None:
    configured(**settings)(adapter)
    if settings.get("layers_to_transform") == 0:
        without("layers.1")(adapter)
    through_open_model(adapter, base)
    without(lacking)(adapter)
    with pytest.raises(WeftError, match=rf"names .*{lacking}.*holds nothing for it"):
        through_open_model(adapter, base)


@pytest.mark.parametrize("door", DOORS)
def test_unknown_keys_are_ignored(adapter: Path, base: Path, door: Callable[[Path, Path], None]) -> None:
    configured(of_a_later_peft={"a": [1]}, runtime_config=None)(adapter)
    door(adapter, base)


def test_another_base_of_the_same_shape_is_refused_unless_it_is_assumed(
    adapter: Path, base: Path, tmp_path: Path
) -> None:
    other = served.write_model(tmp_path / "other", "plain", seed=1)
    for named in (str(other), "someone/model", None):
        configured(base_model_name_or_path=named)(adapter)
        with pytest.raises(WeftError, match=r"(another base|names the base|does not name its base).*--assume-base"):
            import_experts(tmp_path / "library", [str(adapter)], base=str(base))
        assert not (tmp_path / "library").exists()
    copy = shutil.copytree(base, tmp_path / "copy")
    configured(base_model_name_or_path=str(copy))(adapter)
    import_experts(tmp_path / "library", [str(adapter)], base=str(base))
    configured(base_model_name_or_path="someone/model")(adapter)
    import_experts(tmp_path / "library", [str(adapter)], name="b", assume_base=True)
    library = ExpertLibrary.open(tmp_path / "library")
    assert library.base.fingerprint is not None
    assert library.card("b")["assumed_base"] == {"named": "someone/model", "revision": None}
    assert "assumed_base" not in library.card("adapter")
