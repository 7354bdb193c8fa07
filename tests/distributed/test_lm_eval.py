"""Two gloo ranks give the harness the numbers one process gives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from lm_eval import evaluator, simple_evaluate
from lm_eval.tasks import TaskManager
from support.ranks import Ranks
from transformers import LlamaConfig, LlamaForCausalLM

from weftlm.corpora.config import TrainConfig
from weftlm.corpora.tokens import train_tokenizer
from weftlm.integrations.lm_eval import WeftLM

TEXTS = [f"mast sail wind {word} rope anchor." for word in ("tide", "deck", "hull", "keel", "bow")]


def write(folder: Path) -> None:
    """A tiny model with its tokenizer, and five questions."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=280, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=64, initializer_range=0.3, bos_token_id=None, eos_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    train_tokenizer(TEXTS, TrainConfig(vocab_size=280)).save(folder / "model")
    rows = [{"text": text, "answer": place % 2} for place, text in enumerate(TEXTS)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def measure(folder: Path) -> dict[str, float] | None:
    """Accuracy, bits per byte and exact match by the harness; None on ranks other than 0."""
    data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}}}
    both = {**data, "test_split": "test", "doc_to_text": "{{text}}", "doc_to_target": "{{answer}}"}
    tasks = [
        {
            **both, "task": "ranked", "output_type": "multiple_choice", "doc_to_choice": ["storm", "calm"],
            "metric_list": [{"metric": "acc"}],
        },
        {
            **both, "task": "texts", "output_type": "loglikelihood_rolling", "doc_to_text": "",
            "doc_to_target": "{{text}}", "metric_list": [{"metric": "bits_per_byte"}],
        },
        {
            **both, "task": "written", "output_type": "generate_until", "metric_list": [{"metric": "exact_match"}],
            "generation_kwargs": {"until": ["."], "max_gen_toks": 2},
        },
    ]  # fmt: skip
    lm = WeftLM(path=str(folder / "model"), batch_size=2, device="cpu")
    manager = TaskManager(include_defaults=False)
    found = simple_evaluate(lm, tasks=tasks, task_manager=manager, bootstrap_iters=0, log_samples=False)
    if found is None:
        return None
    metrics = {"ranked": "acc,none", "texts": "bits_per_byte,none", "written": "exact_match,none"}
    return {name: found["results"][name][metric] for name, metric in metrics.items()}


def together(rank: int, world: int, folder: Path) -> Any:
    datasets.config.HF_DATASETS_CACHE = folder / "cache"
    evaluator.add_env_info = lambda results: None
    return measure(folder)


@pytest.mark.distributed
@pytest.mark.slow
def test_two_ranks_measure_what_one_does(tmp_path: Path, ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("HF_HUB_OFFLINE", "1"), ("HF_DATASETS_CACHE", str(tmp_path / "cache"))):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)
    write(tmp_path)
    alone = measure(tmp_path)
    first, second = ranks(__file__, "together", tmp_path)
    assert second is None
    assert first == pytest.approx(alone, rel=1e-6)
