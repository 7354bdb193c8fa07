"""Counts of a plan against models that are really built and run, and figures of whole plans."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_project import recipe_value
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PretrainedConfig

from weftlm.errors import ConfigError, ExpertError
from weftlm.experts.expert import BaseReference, LoRAExpert, LoRAFactors
from weftlm.experts.lora import write_lora
from weftlm.gating.config import ExpertSource
from weftlm.models.config import LoRASection, ModelConfig
from weftlm.models.factory import build_model, count_parameters
from weftlm.models.hf import token_losses
from weftlm.pipeline.recipe import make_recipe
from weftlm.planning.counts import LOGITS, Counted
from weftlm.planning.hardware import DEVICES, Hardware, parse_hardware
from weftlm.planning.plan import Assumed, Plan, plan_recipe
from weftlm.planning.probe import Probe
from weftlm.planning.training import Run
from weftlm.training.config import TrainingConfig
from weftlm.training.loop import adamw

SIZES: dict[str, dict[str, Any]] = {
    "llama": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4},
}


def config_of(kind: str = "llama", **sizes: Any) -> PretrainedConfig:
    common = {"vocab_size": 96, "pad_token_id": None, "bos_token_id": 0, "eos_token_id": 0}
    if kind != "gpt2":
        common["num_key_value_heads"] = 2
    return AutoConfig.for_model(kind, **{**common, **SIZES[kind], **sizes})


def t5(layers: int = 2) -> PretrainedConfig:
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": layers, "num_heads": 4}
    return AutoConfig.for_model("t5", vocab_size=96, decoder_start_token_id=0, **sizes)


def real(config: PretrainedConfig) -> nn.Module:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config)


def flops_of(run: Callable[[], Any]) -> int:
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


# -- hardware --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "nodes", "devices", "name"),
    [
        ("8xH100", 1, 8, "H100"), ("2x8xA100-80", 2, 8, "A100-80"), ("h200", 1, 1, "H200"), ("4xA100", 1, 4, "A100-80"),
        ("1x4090", 1, 1, "RTX4090"), ("64x8xmi300x", 64, 8, "MI300X"), ("cpu", 1, 1, "cpu"), ("1xcpu", 1, 1, "cpu"),
    ],
)  # fmt: skip
def test_hardware_is_read(text: str, nodes: int, devices: int, name: str) -> None:
    found = parse_hardware(text)
    assert (found.nodes, found.devices_per_node, found.device.name) == (nodes, devices, name)
    assert parse_hardware(found.name) == found


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("8xH1000", "did you mean 'H100'"), ("eight H100s", "8xH100"), ("0xH100", "at least 1"), ("8xcpu", "give cpu"),
        ("", "8xH100"), ("2x2x2xH100", "2x8xH100"),
    ],
)  # fmt: skip
def test_other_hardware_is_refused(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        parse_hardware(text)


def test_time_is_that_of_the_slowest_resource() -> None:
    """Rings over machines share their ports."""
    assert parse_hardware("8xH100").exchange == pytest.approx(0.8 * DEVICES["H100"].link)
    assert parse_hardware("2x8xH100").exchange == pytest.approx(0.8 * 8 * DEVICES["H100"].network)
    work = Counted(config_of(hidden_size=4096, intermediate_size=8192)).step(64, 512)
    slow, fast = (Hardware(1, 1, DEVICES["H100"], mfu).time(work, half=False) for mfu in (0.2, 0.4))
    assert slow == (pytest.approx(2 * fast[0]), "compute")
    with pytest.raises(ConfigError, match="above 0"):
        plan_value(recipe_value(), "H100", mfu=1.5)


# -- counts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SIZES)
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False")
def test_parameters_and_flops_are_those_of_the_built_model(kind: str, tmp_path: Path) -> None:
    config, tokens = config_of(kind), torch.zeros(3, 17, dtype=torch.int64)
    model, planned = real(config).eval(), Counted(config)
    model.save_pretrained(tmp_path)
    for lora in (None, LoRASection(rank=4)):
        section, counted = ModelConfig(pretrained=str(tmp_path), lora=lora), Counted(config, adapter=lora)
        built = build_model(section, vocab_size=96, sequence_length=16, eos_id=0, seed=0)
        assert counted.parameters == count_parameters(built) == count_parameters(counted.build("meta"))
        assert counted.trainable == count_parameters(built, trainable=True)
    with torch.no_grad():
        assert planned.forward(3, 16).flops == pytest.approx(flops_of(lambda: token_losses(model, tokens)), rel=0.02)
        cache = DynamicCache(config=config)
        model(input_ids=tokens[:, :16], past_key_values=cache, use_cache=True)
        token = flops_of(lambda: model(input_ids=tokens[:, :1], past_key_values=cache, use_cache=True))
    assert planned.forward(3, 1, 16).flops == pytest.approx(token, rel=0.03)
    step = flops_of(lambda: token_losses(model, tokens).mean().backward())
    assert planned.step(3, 16).flops == pytest.approx(step, rel=0.1)


def test_other_models_are_counted_by_what_a_token_meets() -> None:
    """An encoder reads the prompt and a decoder the target; a mixture of experts runs those it chooses."""
    attention, ffn, head = 4 * 32 * 32, 2 * 32 * 64, 32 * 96
    found = Counted(t5(1)).per_token(16, lambda i, o: float(i * o))
    assert found == 16 * (attention + ffn) + 4 * (2 * attention + ffn + head)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    experts = {"vocab_size": 96, "num_key_value_heads": 2, "num_local_experts": 8}
    one, all_ = (
        Counted(AutoConfig.for_model("mixtral", **sizes, **experts, num_experts_per_tok=chosen)) for chosen in (1, 8)
    )
    assert one.parameters == all_.parameters
    assert all_.forward(1, 8).flops - one.forward(1, 8).flops == 2 * 8 * 7 * (2 * 3 * 32 * 64)


def test_what_learns_and_what_is_recomputed_decide_work_and_memory() -> None:
    config = config_of(hidden_size=128, intermediate_size=256, num_hidden_layers=4)
    whole, recomputing = Counted(config), Counted(config, checkpointing=True)
    assert 0.6 < Counted(config, adapter=LoRASection(rank=4)).step(2, 16).flops / whole.step(2, 16).flops < 0.8
    assert recomputing.step(2, 16).flops == pytest.approx(4 * whole.forward(2, 16).flops)
    assert recomputing.activations(2, 16) < 0.6 * whole.activations(2, 16)


def test_memory_is_about_what_training_keeps() -> None:
    """Activations are those that autograd keeps; moments, gradients and weights those of a real optimizer."""
    config, kept = config_of(hidden_size=64, intermediate_size=176, num_hidden_layers=4), {}
    model = real(config)
    own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = token_losses(model, torch.zeros(4, 65, dtype=torch.int64)).mean()
    logits = 4 * 64 * 96 * 4  # of which autograd keeps the log-probabilities alone
    assert sum(kept.values()) == pytest.approx(Counted(config).activations(4, 64) - (LOGITS - 1) * logits, rel=0.25)
    optimizer = adamw(dict(model.named_parameters()), TrainingConfig(steps=1))
    loss.backward()
    optimizer.step()
    moments = sum(t.nbytes for state in optimizer.state.values() for key, t in state.items() if key != "step")
    training = TrainingConfig(steps=1, batch_sequences=2, sequence_length=8)
    planned = Run(Counted(config), training, parse_hardware("1xH100"), 1).memory
    assert planned["Adam moments"] == moments
    assert planned["gradients"] == sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    assert planned["weights"] == sum(p.nbytes for p in model.parameters())


# -- layouts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("hardware", "sizes", "said"),
    [
        ("8xH100", {}, "set training.parallel: fsdp2"),
        ("1xRTX4090", {}, "devices with training.parallel: fsdp2"),
        ("1xL40S", {"hidden": 1024, "layers": 24, "micro": 64}, "set training.micro_batch_sequences: 1"),
    ],
)
def test_what_does_not_fit_is_changed_as_little_as_possible(hardware: str, sizes: dict[str, int], said: str) -> None:
    hidden = sizes.get("hidden", 4096)
    widths = {"hidden_size": hidden, "intermediate_size": 3 * hidden, "num_hidden_layers": sizes.get("layers", 32)}
    training = TrainingConfig(
        steps=1, batch_sequences=64, sequence_length=512, micro_batch_sequences=sizes.get("micro", 1)
    )
    found = parse_hardware(hardware)
    asked = Run(Counted(config_of(**widths, num_attention_heads=32), bf16=True), training, found, found.devices)
    run, layout, problems = asked.fitting()
    assert said in (problems[0] if problems else layout)
    assert run.sharded == (not problems)
    if run.sharded:
        assert run.sent == pytest.approx(7 / 8 * 8 * run.counted.parameters * 8)


# -- whole plans -----------------------------------------------------------------------------------------------------

EXPERTS = {"lora": {"rank": 4}, "training": {"steps": 10, "batch_sequences": 4, "sequence_length": 32}}


def plan_value(value: dict[str, Any], hardware: str, **options: Any) -> Plan:
    return plan_recipe(make_recipe(value), parse_hardware(hardware), **options)


def plan_of(hardware: str = "8xH100", *, assumed: Assumed | None = None, **changes: Any) -> Plan:
    return plan_value({**recipe_value(), **changes}, hardware, assumed=assumed)


def names_of(plan: Plan) -> list[str]:
    return [stage.name for stage in plan.stages]


def test_a_plan_has_the_stages_of_its_recipe_and_no_others() -> None:
    found = plan_of()
    assert names_of(found) == ["data", "training", "serving"]
    facts = found.stage("training").facts
    assert facts["tokens"] == 60 * 8 * 32
    assert (facts["alignment_groups"], facts["alignments"], facts["evaluations"]) == (3, 15, 3)
    assert found.seconds > 0
    assert found.problems == []
    assert json.loads(json.dumps(found.to_json()))["hardware"] == "8xH100"
    assert names_of(plan_of(experts=EXPERTS))[2:] == ["experts"]
    routed = plan_of(experts=EXPERTS, routing={})
    assert names_of(routed)[2:] == ["experts", "serving"]
    assert not routed.problems


def test_alignment_costs_by_groups_not_by_domains() -> None:
    data = recipe_value()["data"]
    many = {"by": "clusters", "clusters": {"n": 600}}
    by_domain = plan_of(data={**data, "domains": many}).stage("training").facts
    basis = {**many, "basis": {"of": "groups", "count": 6}}
    policy = {"policy": "dga", "reweight": "basis", "update_every_steps": 4}
    by_basis = plan_of(data={**data, "domains": basis}, mixture=policy).stage("training").facts
    assert (by_domain["alignment_groups"], by_basis["alignment_groups"]) == (600, 6)
    assert by_domain["sequences_per_alignment"] == 8 + 600 * 8
    assert by_basis["sequences_per_alignment"] == 8 + 6 * 8
    assert by_domain["alignment_overhead"] > 3 * by_basis["alignment_overhead"]


@pytest.mark.parametrize(("parallel", "devices"), [("ddp", 1), ("fsdp2", 8)])
def test_the_memory_of_alignments_is_that_of_the_estimator_of_the_layout(parallel: str, devices: int) -> None:
    training = {**recipe_value()["training"], "parallel": parallel}
    found = plan_of(training=training).stage("training")
    held = 4.0 * found.facts["trainable_parameters"] / devices
    assert found.facts["alignment_estimator"].startswith("separate" if parallel == "fsdp2" else "shadow")
    assert found.memory_bytes.get("estimator") == (held if parallel == "fsdp2" else None)
    assert found.memory_bytes["direction"] == held


def test_the_reference_of_doremi_is_trained_too() -> None:
    evaluation = {"max_tokens_per_set": 1}
    plans = [plan_of("3xH100", mixture={"policy": name}, evaluation=evaluation) for name in ("uniform", "doremi")]
    plain, doremi = (plan.stage("training") for plan in plans)
    assert any("2 of 3 devices" in line for line in plans[0].assumptions)
    assert doremi.flops == pytest.approx((2 + 1 / 3) * plain.flops, rel=0.05)
    assert doremi.memory_bytes["reference model"] == plain.memory_bytes["weights"]


@pytest.mark.parametrize("causal", [False, True])
def test_experts_pools_scores_and_gates_are_planned(causal: bool) -> None:
    gating = {"gate": {"gate": "bayes"}, "fit": {"batch_sequences": 16}} if causal else {}
    found = plan_of(experts=EXPERTS, routing={}, gating=gating, assumed=Assumed(domains=50, experts=20))
    assert names_of(found) == ["data", "training", "experts", "serving", "scores", "gate", "gated serving"]
    widths = 2 * (4 * (32 + 32) + 2 * (32 + 64) + (64 + 32))
    assert found.stage("experts").facts["parameters_per_expert"] == 4 * widths
    assert found.stage("serving").memory_bytes["experts' factors"] == 20 * 4 * widths * 4
    sequences, length, experts = 50 * 80 + 20 * 80, 32, 20
    arrays = sequences * (length * experts * 4 + (length + 1) * 4 + 8)
    assert found.stage("scores").disk_bytes["score cache"] == arrays
    held = found.stage("gate").memory_bytes
    assert held["token ids"] == 4 * sequences * (length + 1)
    assert held.get("scores of tokens") == (3 * 4 * sequences * length * experts if causal else None)
    assert any("50 domains" in line for line in found.assumptions)


@pytest.mark.parametrize("by", ["label", "file"])
def test_domains_of_a_glob_are_those_of_its_folders(by: str, tmp_path: Path) -> None:
    for name in ("law/a", "law/b", "medicine/c", "code/d", "code/e"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).with_suffix(".txt").write_text("text")
    corpus = {"path": str(tmp_path / "*/*.txt"), **({"label_from": "folder"} if by == "label" else {})}
    found = plan_of(data={**recipe_value()["data"], "corpora": [corpus], "domains": {"by": by}})
    assert found.stage("data").facts["domains"] == (3 if by == "label" else 5)
    assert not any("number of domains" in line for line in found.assumptions)


def test_imported_adapters_are_not_trained() -> None:
    imports = [{"source": "a", "domain": "cooking"}, {"source": "b", "domain": "sailing"}, {"source": "c"}]
    trained, found = (
        plan_of(experts={**EXPERTS, **changes}).stage("experts") for changes in ({}, {"imports": imports})
    )
    assert [found.facts[key] for key in ("experts", "imported", "tokens")] == [3, 3, 0]
    assert found.disk_bytes["checkpoints"] == 0.0
    assert 0.0 < found.flops < trained.flops
    assert found.seconds == pytest.approx(2 * found.facts["seconds_per_imported_expert"], rel=0.01)


def test_baselines_are_planned_as_the_trainings_they_are() -> None:
    compare = {"mixtures": ["uniform", "doremi"], "monolith": True}
    found = plan_of(experts=EXPERTS, compare=compare, assumed=Assumed(experts=6))
    assert names_of(found)[1:5] == ["training", "baseline uniform", "baseline doremi", "baseline monolith"]
    uniform, plain = found.stage("baseline uniform"), plan_of(mixture={"policy": "uniform"}).stage("training")
    assert (uniform.flops, uniform.seconds, uniform.disk_bytes) == (plain.flops, plain.seconds, plain.disk_bytes)
    assert found.stage("baseline monolith").facts["tokens"] == 6 * 10 * 4 * 32
    imports = {**EXPERTS, "imports": [{"source": "somewhere"}], "domains": ["algebra", "cooking"]}
    fewer = plan_of(experts=imports, compare={"monolith": True})
    assert fewer.stage("experts").facts["experts"] == 3
    assert fewer.stage("baseline monolith").facts["tokens"] == 2 * 10 * 4 * 32, "imports are trained on nothing"


def test_experts_over_an_encoder_decoder_are_planned_and_no_mixture(tmp_path: Path) -> None:
    t5(layers=3).save_pretrained(tmp_path)
    data = recipe_value()["data"]
    corpora = [{**corpus, "prompt_field": "prompt"} for corpus in data["corpora"]]
    experts = {**EXPERTS, "base": str(tmp_path), "domains": ["a", "b", "c", "d", "e"]}
    found = plan_value({"run": "unused", "data": {**data, "corpora": corpora}, "experts": experts}, "2xH100")
    assert names_of(found) == ["data", "experts"]
    # 4 linear modules of attention and 2 of the feed-forward layer in the encoder, 8 and 2 in the decoder.
    widths = 3 * (4 * 64 + 2 * 96) + 3 * (8 * 64 + 2 * 96)
    assert found.stage("experts").facts["parameters_per_expert"] == 4 * widths
    assert found.stage("data").facts["tokens"] == 5 * 10 * 4 * 32
    assert any("targets as 25% of that" in line for line in found.assumptions)
    with pytest.raises(ConfigError, match="is an encoder-decoder model"):
        plan_of(model={"pretrained": str(tmp_path)})
    with pytest.raises(ConfigError, match="size of the vocabulary is not known"):
        plan_of(data={**data, "tokenizer": {"pretrained": "nobody/has-this-tokenizer"}})


# -- a gate over models that are there ---------------------------------------------------------------------------------


def pool_of(folder: Path, **changes: Any) -> list[dict[str, Any]]:
    """Two whole models and two adapters over the first, as configurations and without weights of the models."""
    config_of().save_pretrained(folder / "first")
    config_of(**{"hidden_size": 64, **changes}).save_pretrained(folder / "second")
    for name, rank in (("small", 2), ("large", 5)):
        modules = {
            f"model.layers.{layer}.self_attn.q_proj": LoRAFactors(torch.ones(rank, 32), torch.ones(32, rank), 1.0)
            for layer in range(2)
        }
        write_lora(folder / name, LoRAExpert(name, BaseReference(str(folder / "first")), modules, {}))
    names = ("first", "second", "small", "large")
    return [ExpertSource(name=name, model=str(folder / name)).model_dump() for name in names]


def gate_plan(pool: list[dict[str, Any]], dtype: str = "float32") -> Plan:
    gating = {"pool": pool, "scores": {"length": 32, "sequences": 40, "samples": 16, "batch_size": 4}}
    value = {**{key: recipe_value()[key] for key in ("run", "data")}, "gating": gating, "experts": {"dtype": dtype}}
    return plan_value(value, "H100", assumed=Assumed(domains=3, requests=8, prompt=32, new=64))


@pytest.mark.parametrize(("dtype", "item"), [("float32", 4), ("bfloat16", 2)])
def test_a_gate_over_models_that_are_there_is_planned(dtype: str, item: int, tmp_path: Path) -> None:
    found = gate_plan(pool_of(tmp_path), dtype)
    assert names_of(found) == ["data", "scores", "gate", "gated serving"]
    scores, serving = found.stage("scores"), found.stage("gated serving")
    assert (scores.facts["text_sequences"], scores.facts["sample_sequences"]) == (3 * 40, 4 * 16)
    sizes = [count_parameters(real(config_of(hidden_size=hidden))) for hidden in (32, 64)]
    assert scores.memory_bytes["weights"] == sum(sizes) * item
    assert scores.memory_bytes["experts' factors"] == 3 * 5 * 2 * (32 + 32) * item, "on the first model, of rank 5"
    # 2 layers of 2 heads; 8 wide for the first model and its two adapters, 16 wide for the second
    assert serving.facts["kv_bytes_per_token"] == 2 * 2 * 2 * (3 * 8 + 16) * item
    assert serving.facts["tokens_per_second_at_8"] > serving.facts["tokens_per_second_at_1"]
    assert found.stage("data").facts["tokens"] == 3 * 40 * 32


def test_a_pool_that_cannot_be_scored_is_refused(tmp_path: Path) -> None:
    with pytest.raises((ConfigError, ExpertError), match="a vocabulary of 96 and 'second' one of 128"):
        gate_plan(pool_of(tmp_path, vocab_size=128))


# -- this machine ----------------------------------------------------------------------------------------------------


def test_this_machine_is_timed_by_what_does_the_work() -> None:
    ticks = itertools.count()
    value = {**recipe_value(), "experts": EXPERTS, "routing": {}, "gating": {"scores": {"samples": 4}}}
    value["training"] |= {"exhaustion": "stop", "max_epochs": 1.0}  # a probe has little text and reads it often
    probe = Probe(clock=lambda: float(next(ticks)))
    found = plan_value(value, "cpu", probe=probe, assumed=Assumed(experts=3, requests=2, new=8))
    # The clock is read after every run.
    assert found.stage("training").facts["seconds_per_step"] == 1.0
    assert found.stage("experts").facts["seconds_per_adapter_step"] == 1.0
    assert found.stage("gated serving").facts["tokens_per_second_at_1"] > 0
    assert found.mfu is None
    assert {stage.name: stage.limit for stage in found.stages if stage.seconds} == dict.fromkeys(
        ("training", "experts", "scores"), "measured"
    )
    assert any("was timed on this machine" in line for line in found.assumptions)


def test_a_large_model_is_timed_in_part(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = itertools.count()
    config = config_of(hidden_size=256, intermediate_size=768, num_hidden_layers=6, vocab_size=512)
    whole, small = Counted(config), Counted(config).shallow(2)
    monkeypatch.setattr("weftlm.planning.probe.LARGEST_FLOPS", 2 * small.step(1, 32).flops)
    training = TrainingConfig(steps=1, batch_sequences=64, sequence_length=32)
    seconds = Probe(clock=lambda: float(next(ticks))).step(whole, training)
    assert seconds == pytest.approx(whole.step(64, 32).flops / small.step(2, 32).flops)
