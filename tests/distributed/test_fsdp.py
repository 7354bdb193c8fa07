"""Two gloo ranks that split a model between them (FSDP2) train what one process trains, and a run moves either way."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support import mixtures
from support.mixtures import lines_of
from support.ranks import Ranks
from support.tiny_expert import cyclic_source
from torch import distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from weftlm.errors import ConfigError
from weftlm.evaluation.config import EvaluationConfig
from weftlm.evaluation.suite import evaluate_suite
from weftlm.experts.lora import load_trained
from weftlm.models.config import LoRASection, ModelConfig
from weftlm.models.factory import build_model
from weftlm.training.checkpoint import latest_checkpoint
from weftlm.training.loop import Trainer

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

LENGTH, STEPS, MIDDLE = 12, 4, 3
SIZES = {
    "hidden_size": 12,
    "intermediate_size": 25,  # neither this nor the vocabulary can be cut in two equal parts
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}
POLICIES: dict[str, dict[str, Any]] = {
    "norms": {"mixture": {"policy": "doge", "normalize": "cosine"}, "estimator": "auto"},
    # In float64: Adam divides by moments near 0, which turns float32 rounding of other processors into differences.
    "adam": {"mixture": {"policy": "dga", "precondition": "adam"}, "double": True},
}


def model(section: ModelConfig | None = None) -> nn.Module:
    section = section or ModelConfig(architecture="llama", config=SIZES)
    return build_model(section, vocab_size=61, sequence_length=LENGTH, eos_id=0, seed=0)


def evaluate(module: nn.Module) -> Mapping[str, Any]:
    settings = EvaluationConfig(max_tokens_per_set=36, batch_size=1)
    heldout = {"a": cyclic_source(200, seed=50)}
    return evaluate_suite(module, heldout, sequence_length=LENGTH, config=settings, distributed=True).to_json()


def trainer(
    folder: Path,
    *,
    mixture: Mapping[str, Any] | None = None,
    estimator: str = "separate",
    net: nn.Module | None = None,
    double: bool = False,
    may_shard: bool = True,
    **training: Any,
) -> Trainer:
    """A run whose ranks never have equal work to do in a probe: 3 target and 3 probe sequences, one at a time."""
    net = net or model()
    return mixtures.trainer(
        folder, {"update_every_steps": 2, **(mixture or {"policy": "dga"})},
        alignment={"target_sequences": 3, "sequences_per_group": 1, "estimator": estimator},
        net=net.double() if double else net, length=LENGTH, reference=model,
        options={"evaluate": evaluate, "evaluate_every_steps": MIDDLE, "may_shard": may_shard},
        batch_sequences=4, micro_batch_sequences=1, steps=STEPS, warmup_steps=1, log_every_steps=1,
        save_every_steps=MIDDLE, parallel="fsdp2", **training,
    )  # fmt: skip


def finish(run: Trainer, folder: Path) -> None:
    assert run.run().step == STEPS
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


def with_scalar() -> nn.Module:
    net = model()
    net.scale = nn.Parameter(torch.tensor(1.0))
    return net


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

    stop_in_the_middle(trainer(here / "fsdp2 to one"))
    if rank == 0:
        shutil.copytree(here / "fsdp2 to one", here / "fsdp2 to fsdp2")
    dist.barrier()
    finish(trainer(here / "fsdp2 to fsdp2"), here / "fsdp2 to fsdp2")
    finish(trainer(folder / "one/to fsdp2"), folder / "one/to fsdp2")

    for name, options in POLICIES.items():
        finish(trainer(here / name, **options), here / name)
    finish(trainer(here / "lora", net=lora(folder / "base")), here / "lora")
    finish(trainer(here / "bf16", precision="bf16", mixture={"policy": "doremi"}), here / "bf16")

    for name, options in {
        "shadow": {"estimator": "shadow"}, "unasked": {"may_shard": False}, "scalar": {"net": with_scalar()},
    }.items():  # fmt: skip
        with pytest.raises(ConfigError) as refused:
            trainer(here / "refused", **options)
        found[f"refused {name}"] = str(refused.value)
    return found


# -- what one process makes of it -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    shared_folder = tmp_path_factory.mktemp("shared")
    torch.manual_seed(0)
    model().save_pretrained(shared_folder / "base")
    finish(trainer(shared_folder / "one/whole"), shared_folder / "one/whole")
    stop_in_the_middle(trainer(shared_folder / "one/to fsdp2"))
    return shared_folder


@pytest.fixture(scope="module")
def found(folder: Path, ranks: Ranks) -> list[Any]:
    return ranks(__file__, "train_everything", folder)


def assert_same_run(one: Path, two: Path, *, bound: float = 1e-5) -> None:
    """Weights, mixture, alignments, losses and evaluations of the two runs agree."""
    weights = [load_file(next((folder / "model").glob("*.safetensors"))) for folder in (one, two)]
    assert weights[0].keys() == weights[1].keys()
    for name in weights[0]:
        assert (weights[0][name] - weights[1][name]).abs().max().item() <= bound, name
    rows = [{(row["kind"], row["step"]): row for row in lines_of(folder)} for folder in (one, two)]
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


def test_two_ranks_equal_one_process_and_each_holds_its_part_alone(folder: Path, found: list[Any]) -> None:
    assert_same_run(folder / "one/whole", folder / "two/whole")
    kinds = [line["kind"] for line in lines_of(folder / "two/whole")]
    assert [kinds.count(kind) for kind in ("train", "mixture", "eval")] == [4, 3, 3]
    assert found[0]["mixture"] == found[1]["mixture"]
    assert found[0]["sum"] == found[1]["sum"]
    parameters = sum(p.numel() for p in model().parameters())
    for rank in found:
        assert all(rank["split"].values())
        assert rank["elements"] == rank["moments"] < 0.55 * parameters
    assert sum(rank["elements"] for rank in found) == parameters


def test_the_model_is_a_plain_folder_and_a_checkpoint_does_not_know_its_layout(folder: Path, found: list[Any]) -> None:
    folders = [folder / run / "whole/model" for run in ("one", "two")]
    files = [{file.name for file in each.iterdir()} for each in folders]
    assert files[0] == files[1]
    assert len({(each / "config.json").read_text() for each in folders}) == 1
    one, two = (AutoModelForCausalLM.from_pretrained(each) for each in folders)
    assert two.lm_head.weight is two.model.embed_tokens.weight
    tokens = torch.arange(10)[None]
    torch.testing.assert_close(one(tokens).logits, two(tokens).logits, rtol=1e-4, atol=1e-4)
    kept = [latest_checkpoint(folder / run / "whole/checkpoints") for run in ("one", "two")]
    first, second = (each.tensors for each in kept if each is not None)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, rtol=1e-3, atol=1e-5)


def test_a_run_moves_between_one_process_and_two(folder: Path, found: list[Any]) -> None:
    run = folder / "two/fsdp2 to one"
    finish(trainer(run), run)
    for moved in (run, folder / "one/to fsdp2"):
        assert_same_run(folder / "one/whole", moved)
    assert_same_run(folder / "two/whole", folder / "two/fsdp2 to fsdp2", bound=0.0)


@pytest.mark.parametrize("name", list(POLICIES))
def test_every_signal_is_that_of_one_process(folder: Path, found: list[Any], name: str) -> None:
    run = folder / "one" / name
    finish(trainer(run, **POLICIES[name]), run)
    assert_same_run(run, folder / "two" / name)


def test_an_adapter_is_trained_and_saved_alone(folder: Path, found: list[Any]) -> None:
    run = folder / "one/lora"
    finish(trainer(run, net=lora(folder / "base")), run)
    assert_same_run(run, folder / "two/lora")
    assert (folder / "two/lora/model/adapter_config.json").exists()
    adapted = load_trained(folder / "two/lora/model", dtype="bfloat16")
    factors = [p for name, p in adapted.named_parameters() if "lora_B" in name]
    assert all(bool(factor.count_nonzero()) for factor in factors)


def test_bf16_stays_near_fp32_with_a_reference_model(folder: Path, found: list[Any]) -> None:
    run = folder / "one/bf16"
    finish(trainer(run, mixture={"policy": "doremi"}), run)
    plain, coarse = ([line["loss"] for line in lines_of(each, "train")] for each in (run, folder / "two/bf16"))
    assert coarse == pytest.approx(plain, rel=1e-2)
    assert coarse != plain
    kept = load_file(folder / "two/bf16/model/model.safetensors")
    assert {tensor.dtype for tensor in kept.values()} == {torch.float32}


def test_what_cannot_be_split_is_refused_by_name(found: list[Any]) -> None:
    for rank in found:
        assert "parameters are sharded" in rank["refused shadow"]
        assert "usable here: separate on extra" in rank["refused shadow"]
        assert "use parallel: ddp" in rank["refused unasked"]
        assert "use parallel: ddp" in rank["refused scalar"]
