"""Two gloo ranks that split a model between them (FSDP2) train what one process trains, and a run moves between all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support.ranks import Ranks
from torch import distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from weftlm.corpora.source import ArraySource
from weftlm.errors import ConfigError
from weftlm.evaluation.config import EvaluationConfig
from weftlm.evaluation.suite import evaluate_suite
from weftlm.experts.lora import load_trained
from weftlm.mixture.policy import MixtureSetting, build_policy
from weftlm.models.config import LoRASection, ModelConfig
from weftlm.models.factory import build_model
from weftlm.training.checkpoint import latest_checkpoint
from weftlm.training.config import AlignmentConfig, TrainingConfig
from weftlm.training.loop import Task, Trainer
from weftlm.training.runtime import choose_runtime

pytestmark = pytest.mark.distributed

NAMES, LENGTH, STEPS, MIDDLE = ("a", "b", "c"), 12, 6, 3
SIZES = {
    "hidden_size": 12,
    "intermediate_size": 25,  # neither this nor the vocabulary can be cut in two equal parts
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}
POLICIES: dict[str, dict[str, Any]] = {
    "cosine": {"mixture": {"policy": "dga", "normalize": "cosine"}, "estimator": "auto"},
    # In float64: Adam divides by moments near 0, which turns float32 rounding of other processors into differences.
    "adam": {"mixture": {"policy": "dga", "precondition": "adam"}, "estimator": "separate", "double": True},
    "doge": {"mixture": {"policy": "doge"}, "estimator": "separate"},
    "doremi": {"mixture": {"policy": "doremi"}},
    "odm": {"mixture": {"policy": "odm"}},
}


def source(low: int, seed: int, tokens: int = 2000) -> ArraySource:
    """A noisy cycle through 20 tokens of its own."""
    rng = np.random.default_rng(seed)
    cycle = low + (np.arange(tokens) * 3) % 20
    return ArraySource(
        np.where(rng.random(tokens) < 0.8, cycle, rng.integers(low, low + 20, tokens)), text_bytes=3 * tokens
    )


def model(section: ModelConfig | None = None) -> nn.Module:
    section = section or ModelConfig(architecture="llama", config=SIZES)
    return build_model(section, vocab_size=61, sequence_length=LENGTH, eos_id=0, seed=0)


def evaluate(module: nn.Module) -> Mapping[str, Any]:
    settings = EvaluationConfig(max_tokens_per_set=36, batch_size=1)
    heldout = {"a": source(0, seed=50, tokens=200)}
    return evaluate_suite(module, heldout, sequence_length=LENGTH, config=settings, distributed=True).to_json()


def trainer(
    folder: Path,
    *,
    parallel: str = "fsdp2",
    mixture: Mapping[str, Any] | None = None,
    estimator: str = "separate",
    net: nn.Module | None = None,
    double: bool = False,
    may_shard: bool = True,
    **training: Any,
) -> Trainer:
    """A run whose ranks never have equal work to do in a probe: 3 target and 3 probe sequences, one at a time."""
    values = {
        "sequence_length": LENGTH, "batch_sequences": 4, "micro_batch_sequences": 1, "steps": STEPS, "lr": 1e-2,
        "warmup_steps": 1, "log_every_steps": 1, "save_every_steps": MIDDLE, "device": "cpu", "threads": 1,
        "parallel": parallel, **training,
    }  # fmt: skip
    config = TrainingConfig.model_validate(values)
    policy = build_policy({"update_every_steps": 2, **(mixture or {"policy": "dga"})})
    tokens_D = torch.tensor([2000.0] * 3, dtype=torch.float64)
    net = net or model()
    return Trainer(
        net.double() if double else net,
        Task(
            NAMES, tuple(source(20 * i, seed=i) for i in range(3)), policy, MixtureSetting(NAMES, tokens_D),
            source(20, seed=9, tokens=300), model() if "reference_losses" in policy.needs else None,
        ),
        config,
        alignment=AlignmentConfig.model_validate(
            {"target_sequences": 3, "sequences_per_group": 1, "estimator": estimator}
        ),
        runtime=choose_runtime(config, parameters=1000),
        folder=folder,
        seed=5,
        evaluate=evaluate,
        evaluate_every_steps=MIDDLE,
        may_shard=may_shard,
    )  # fmt: skip


def finish(run: Trainer, folder: Path) -> None:
    assert run.run().step == run.config.total_steps
    run.save_model(folder / "model")


def stop_in_the_middle(run: Trainer) -> None:
    run._log_mixture(None)
    run._evaluate()
    while run.step < MIDDLE:
        run.train_step()
    run._evaluate()
    run.save()


def lora(base: Path) -> nn.Module:
    """Adapters in float32 over a base in bfloat16."""
    section = ModelConfig(pretrained=str(base), dtype="bfloat16", lora=LoRASection(rank=3, target_modules="all-linear"))
    return model(section)


# -- what the two ranks do --------------------------------------------------------------------------------------------


def train_everything(rank: int, world: int, folder: Path) -> dict[str, Any]:
    """Every run of two processes that a test below looks at; what one process left in `folder/one` is continued."""
    found: dict[str, Any] = {}
    here = folder / "two"
    whole = trainer(here / "whole")
    found["split"] = {name: isinstance(p, DTensor) for name, p in whole.parameters.items()}
    found["elements"] = sum(p.to_local().numel() for p in whole.parameters.values())
    finish(whole, here / "whole")
    found["moments"] = sum(s["exp_avg"].to_local().numel() for s in whole.optimizer.state.values())
    found["mixture"] = whole.task.policy.weights(whole.mixture.state).tolist()
    found["sum"] = float(sum(p.detach().double().sum().full_tensor() for p in whole.parameters.values()))

    for before in ("fsdp2", "ddp"):
        stop_in_the_middle(trainer(here / f"{before} to one", parallel=before))
    dist.barrier()
    for before, after in (("fsdp2", "fsdp2"), ("fsdp2", "ddp"), ("ddp", "fsdp2")):
        if rank == 0:
            shutil.copytree(here / f"{before} to one", here / f"{before} to {after}")
        dist.barrier()
        finish(trainer(here / f"{before} to {after}", parallel=after), here / f"{before} to {after}")
    for after in ("fsdp2", "ddp"):
        finish(trainer(folder / f"one/to {after}", parallel=after), folder / f"one/to {after}")

    for name, options in POLICIES.items():
        finish(trainer(here / name, **options, steps=4), here / name)
    finish(trainer(here / "lora", net=lora(folder / "base"), steps=4), here / "lora")
    finish(trainer(here / "bf16", precision="bf16", steps=4), here / "bf16")

    for name, attempt in {
        "shadow": lambda: trainer(here / "refused", estimator="shadow"),
        "unasked": lambda: trainer(here / "refused", may_shard=False),
        "scalar": lambda: trainer(here / "refused", net=with_scalar()),
    }.items():
        try:
            attempt()
        except ConfigError as error:
            found[f"refused {name}"] = str(error)
    return found


def with_scalar() -> nn.Module:
    net = model()
    net.scale = nn.Parameter(torch.tensor(1.0))
    return net


# -- what one process makes of it -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    shared_folder = tmp_path_factory.mktemp("shared")
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    model().save_pretrained(shared_folder / "base")
    finish(trainer(shared_folder / "one/whole"), shared_folder / "one/whole")
    stop_in_the_middle(trainer(shared_folder / "one/to fsdp2"))
    shutil.copytree(shared_folder / "one/to fsdp2", shared_folder / "one/to ddp")
    torch.set_num_threads(threads)
    return shared_folder


@pytest.fixture(scope="module")
def found(folder: Path, ranks: Ranks) -> list[Any]:
    return ranks(__file__, "train_everything", folder)


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_same_run(one: Path, two: Path, *, bound: float = 1e-5) -> None:
    """Weights, mixture, alignments, losses and evaluations of the two runs agree."""
    weights = [load_file(next((folder / "model").glob("*.safetensors"))) for folder in (one, two)]
    assert weights[0].keys() == weights[1].keys()
    for name in weights[0]:
        assert (weights[0][name] - weights[1][name]).abs().max().item() <= bound, name
    rows = [{(row["kind"], row["step"]): row for row in lines(folder)} for folder in (one, two)]
    assert {key for key in rows[0] if key[0] != "train"} == {key for key in rows[1] if key[0] != "train"}
    for key in rows[0].keys() & rows[1].keys():
        left, right = (dict(numbers(row[key])) for row in rows)
        assert left.keys() == right.keys(), key
        for path in left.keys() - {"/tokens_per_second"}:
            assert left[path] == pytest.approx(right[path], rel=bound, abs=bound), (key, path)


def numbers(value: Any, path: str = "") -> list[tuple[str, float]]:
    if isinstance(value, dict):
        return [found for name, item in value.items() for found in numbers(item, f"{path}/{name}")]
    return [(path, float(value))] if isinstance(value, int | float) else []


@pytest.mark.slow
def test_two_ranks_equal_one_process(folder: Path, found: list[Any]) -> None:
    assert_same_run(folder / "one/whole", folder / "two/whole")
    kinds = [line["kind"] for line in lines(folder / "two/whole")]
    assert [kinds.count(kind) for kind in ("train", "mixture", "eval")] == [6, 4, 3]
    assert found[0]["mixture"] == found[1]["mixture"]
    assert found[0]["sum"] == found[1]["sum"]


@pytest.mark.slow
def test_each_rank_holds_its_part_alone(folder: Path, found: list[Any]) -> None:
    parameters = sum(p.numel() for p in model().parameters())
    for rank in found:
        assert all(rank["split"].values())
        assert rank["elements"] == rank["moments"]
        assert rank["elements"] < 0.55 * parameters
    assert sum(rank["elements"] for rank in found) == parameters


@pytest.mark.slow
def test_the_model_is_a_plain_folder(folder: Path, found: list[Any]) -> None:
    folders = [folder / run / "whole/model" for run in ("one", "two")]
    files = [sorted(file.name for file in each.iterdir()) for each in folders]
    assert files[0] == files[1]
    settings = [(each / "config.json").read_text() for each in folders]
    assert settings[0] == settings[1]
    one, two = (AutoModelForCausalLM.from_pretrained(each) for each in folders)
    assert two.lm_head.weight is two.model.embed_tokens.weight
    tokens = torch.arange(10)[None]
    torch.testing.assert_close(one(tokens).logits, two(tokens).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["fsdp2", "ddp"])
def test_one_process_continues_what_two_began(folder: Path, found: list[Any], layout: str) -> None:
    run = folder / f"two/{layout} to one"
    finish(trainer(run), run)
    assert_same_run(folder / "one/whole", run)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["fsdp2", "ddp"])
def test_two_ranks_continue_what_one_process_began(folder: Path, found: list[Any], layout: str) -> None:
    assert_same_run(folder / "one/whole", folder / f"one/to {layout}")


@pytest.mark.slow
def test_two_ranks_continue_what_two_began(folder: Path, found: list[Any]) -> None:
    assert_same_run(folder / "two/whole", folder / "two/fsdp2 to fsdp2", bound=0.0)
    assert_same_run(folder / "one/whole", folder / "two/fsdp2 to ddp")
    assert_same_run(folder / "one/whole", folder / "two/ddp to fsdp2")


@pytest.mark.slow
def test_a_checkpoint_does_not_know_its_layout(folder: Path, found: list[Any]) -> None:
    one, two = (latest_checkpoint(folder / run / "whole/checkpoints") for run in ("one", "two"))
    assert one is not None
    assert two is not None
    assert one.tensors.keys() == two.tensors.keys()
    for name, tensor in one.tensors.items():
        assert two.tensors[name].shape == tensor.shape
        assert two.tensors[name].dtype == tensor.dtype
        torch.testing.assert_close(two.tensors[name], tensor, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", list(POLICIES))
def test_every_signal_is_that_of_one_process(folder: Path, found: list[Any], name: str) -> None:
    run = folder / "one" / name
    finish(trainer(run, **POLICIES[name], steps=4), run)
    assert_same_run(run, folder / "two" / name)


@pytest.mark.slow
def test_an_adapter_is_trained_and_saved_alone(folder: Path, found: list[Any]) -> None:
    run = folder / "one/lora"
    finish(trainer(run, net=lora(folder / "base"), steps=4), run)
    assert_same_run(run, folder / "two/lora")
    assert (folder / "two/lora/model/adapter_config.json").exists()
    adapted = load_trained(folder / "two/lora/model", dtype="bfloat16")
    factors = [p for name, p in adapted.named_parameters() if "lora_B" in name]
    assert all(bool(factor.count_nonzero()) for factor in factors)


@pytest.mark.slow
def test_bf16_stays_near_fp32(folder: Path, found: list[Any]) -> None:
    run = folder / "one/fp32"
    finish(trainer(run, steps=4), run)
    plain, coarse = (
        [line["loss"] for line in lines(each) if line["kind"] == "train"] for each in (run, folder / "two/bf16")
    )
    assert coarse == pytest.approx(plain, rel=1e-2)
    assert coarse != plain
    kept = load_file(folder / "two/bf16/model/model.safetensors")
    assert {tensor.dtype for tensor in kept.values()} == {torch.float32}


@pytest.mark.slow
def test_what_cannot_be_split_is_refused_by_name(folder: Path, found: list[Any]) -> None:
    for rank in found:
        assert "parameters are sharded" in rank["refused shadow"]
        assert "usable here: separate on extra" in rank["refused shadow"]
        assert "use parallel: ddp" in rank["refused unasked"]
        assert "use parallel: ddp" in rank["refused scalar"]
