"""An online mixture inside TRL's SFTTrainer, whose fused head gives log-probabilities instead of logits."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from support import mixtures
from support.mixtures import LENGTH, VOCAB, model, online, train_with_weftlm
from support.mixtures import updates_of as updates
from transformers import PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from weftlm.errors import ConfigError
from weftlm.integrations.hf_trainer import MixtureCallback, OnlineMixture

READY = {"dataset_kwargs": {"skip_prepare_dataset": True}}


@pytest.fixture(autouse=True, scope="module")
def _quick() -> Iterator[None]:
    with mixtures.light_collections():
        yield


def sft(folder: Path, mixture: OnlineMixture, **changes: Any) -> SFTTrainer:
    words = {f"<{index}>": index for index in range(VOCAB)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<1>"))
    arguments = mixtures.arguments(folder, bf16=False, **{"activation_checkpointing": False, **READY, **changes})
    return SFTTrainer(
        model(),
        SFTConfig(**arguments),
        train_dataset=mixture.dataset,
        processing_class=PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<0>"),
        callbacks=[MixtureCallback(mixture)],
    )


@pytest.mark.parametrize("policy", ["dga", "group_dro"])
def test_alignments_and_weights_are_those_of_our_own_loop(tmp_path: Path, policy: str) -> None:
    module, expected = train_with_weftlm(tmp_path / "own", {"policy": policy})
    saving = {"save_strategy": "steps", "save_steps": 6, "activation_checkpointing": policy == "dga"}
    trainer = sft(tmp_path / "sft", online({"policy": policy}), **saving)
    trainer.train()
    found = updates(trainer)
    assert [entry["step"] for entry in found] == [4, 8, 12]
    for ours, theirs in zip(expected, found, strict=True):
        for name, value in ours.items():
            assert theirs[name] == pytest.approx(value, abs=1e-6), name
    theirs, ours = trainer.model.state_dict(), module.state_dict()
    # The fused head sums in an order of its own, whose rounding twelve steps of Adam carry on; processors differ in it.
    assert max(float((ours[name] - theirs[name]).abs().max()) for name in ours) < 5e-6

    resumed = sft(tmp_path / "resumed", online({"policy": policy}), **saving)
    resumed.train(resume_from_checkpoint=str(tmp_path / "sft" / "checkpoint-6"))
    assert updates(resumed) == found
    again = resumed.model.state_dict()
    assert all(bool((again[name] == theirs[name]).all()) for name in theirs)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataset_kwargs": None}, "skip_prepare_dataset"),
        ({"packing": True, "max_length": LENGTH + 1, "packing_strategy": "wrapped"}, "packing is on"),
        ({"padding_free": True, "max_length": None}, "padding_free is on"),
    ],
)
def test_what_would_break_batches_apart_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        sft(tmp_path, online({"policy": "uniform"}), **changes)
