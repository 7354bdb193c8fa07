"""Counts of a plan against models that are really built and run, and figures against files that really exist."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_project import recipe_value
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, DynamicCache, PretrainedConfig

from weftlm.errors import ConfigError, ExpertError
from weftlm.experts.expert import BaseReference, LoRAExpert, LoRAFactors
from weftlm.experts.lora import write_lora
from weftlm.gating.config import ExpertSource
from weftlm.models.config import LoRASection, ModelConfig
from weftlm.models.factory import build_model, count_parameters
from weftlm.models.hf import token_losses
from weftlm.models.open import pretrained_config
from weftlm.pipeline.recipe import make_recipe
from weftlm.planning import counts
from weftlm.planning.counts import Counted, record
from weftlm.planning.hardware import DEVICES, parse_hardware
from weftlm.planning.machine import Machine, Stage
from weftlm.planning.plan import Assumed, Plan, plan_recipe
from weftlm.planning.pool import experts_stage, fit_bytes, fit_seconds, score_cache_bytes, sharings_of
from weftlm.planning.probe import Probe
from weftlm.planning.training import Run, settle
from weftlm.training.config import TrainingConfig
from weftlm.training.loop import adamw

SIZES: dict[str, dict[str, Any]] = {
    "llama": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4},
    "qwen2": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2},
}


def config_of(kind: str = "llama", **sizes: Any) -> PretrainedConfig:
    common = {"vocab_size": 96, "pad_token_id": None, "bos_token_id": 0, "eos_token_id": 0}
    if kind != "gpt2":
        common["num_key_value_heads"] = 2
    return AutoConfig.for_model(kind, **{**common, **SIZES[kind], **sizes})


def real(config: PretrainedConfig) -> nn.Module:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config)


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
    with pytest.raises(ConfigError, match=said.replace("(", r"\(")):
        parse_hardware(text)


def test_rings_over_machines_share_their_ports() -> None:
    one, several = parse_hardware("8xH100"), parse_hardware("2x8xH100")
    device = DEVICES["H100"]
    assert one.exchange == pytest.approx(0.8 * device.link)
    assert several.exchange == pytest.approx(0.8 * 8 * device.network)


# -- counts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SIZES)
@pytest.mark.parametrize("rank", [None, 4])
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False")
def test_parameters_are_those_of_the_built_model(kind: str, rank: int | None, tmp_path: Path) -> None:
    config = config_of(kind)
    real(config).save_pretrained(tmp_path)
    section = ModelConfig(pretrained=str(tmp_path), lora=None if rank is None else LoRASection(rank=rank))
    built = build_model(section, vocab_size=96, sequence_length=16, eos_id=0, seed=0)
    planned = Counted(pretrained_config(str(tmp_path)), adapter=section.lora).sizes
    assert planned.parameters == count_parameters(built)
    assert planned.trainable == count_parameters(built, trainable=True)
    assert planned.tensors == sum(p.requires_grad for p in built.parameters())
    if rank is not None:
        assert planned.trainable == sum(rank * (i + o) for i, o in planned.adapted)


@pytest.mark.parametrize("kind", SIZES)
def test_flops_are_those_counted_while_a_real_model_runs(kind: str) -> None:
    config, tokens = config_of(kind), torch.zeros(3, 17, dtype=torch.int64)
    model, planned = real(config).eval(), Counted(config)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as forward, torch.no_grad():
        token_losses(model, tokens)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as step:
        token_losses(model, tokens).mean().backward()
    assert planned.forward(3, 16).flops == pytest.approx(forward.get_total_flops(), rel=0.02)
    assert planned.step(3, 16).flops == pytest.approx(step.get_total_flops(), rel=0.05)
    cache = DynamicCache(config=config)
    with torch.no_grad():
        model(input_ids=tokens[:, :16], past_key_values=cache, use_cache=True)
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as decode:
            model(input_ids=tokens[:, :1], past_key_values=cache, use_cache=True)
    assert planned.decode(3, 16).flops == pytest.approx(decode.get_total_flops(), rel=0.02)


def test_closed_forms_hold_for_a_wide_model() -> None:
    config = config_of(hidden_size=256, intermediate_size=768, num_hidden_layers=4, tie_word_embeddings=False)
    planned, length = Counted(config), 256
    matrices = planned.sizes.parameters - 96 * 256
    formula = 2.0 * matrices + 4.0 * 4 * 256 * length
    assert planned.forward(1, length).flops / length == pytest.approx(formula, rel=0.01)
    assert planned.step(1, length).flops == pytest.approx(3 * planned.forward(1, length).flops, rel=0.1)
    recomputing = Counted(config, checkpointing=True)
    assert recomputing.step(1, length).flops == pytest.approx(4 * planned.forward(1, length).flops, rel=0.1)
    assert recomputing.step(1, length).peak < planned.step(1, length).peak


def test_an_adapters_step_leaves_out_the_weights_gradients() -> None:
    config = config_of(hidden_size=128, intermediate_size=256)
    whole, adapter = Counted(config).step(2, 16), Counted(config, adapter=LoRASection(rank=4)).step(2, 16)
    assert 0.6 < adapter.flops / whole.flops < 0.8


def test_shapes_tell_what_real_tensors_do() -> None:
    config, tokens = config_of(tie_word_embeddings=True), torch.zeros(2, 9, dtype=torch.int64)
    model, planned = real(config), Counted(config).step(2, 8)
    found = record(lambda: token_losses(model, tokens).mean().backward())
    # Reading the position ids, eight operations that the shapes are spared, is all the difference.
    assert 0 <= found.calls - planned.calls <= 8
    assert planned.flops == found.flops
    assert planned.peak == pytest.approx(found.peak, rel=0.01)
    assert planned.kept == 4 * Counted(config).sizes.parameters, "after the first micro-batch its gradients stay"


def test_a_deep_model_is_counted_along_a_straight_line(monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(num_hidden_layers=5)
    line = Counted(config).step(2, 8)
    monkeypatch.setattr(counts, "SHALLOW", (1, 100))
    whole = Counted(config).step(2, 8)
    assert line.flops == pytest.approx(whole.flops, rel=1e-9)
    assert line.calls == pytest.approx(whole.calls, rel=1e-9)
    assert line.peak == pytest.approx(whole.peak, rel=0.02)


def test_a_model_whose_configuration_is_elsewhere_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"local folder that holds its config\.json"):
        pretrained_config("nobody/has-this-model")


# -- encoder-decoders ------------------------------------------------------------------------------------------------


def t5(layers: int = 2, **changes: Any) -> PretrainedConfig:
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": layers, "num_heads": 4}
    return AutoConfig.for_model("t5", vocab_size=96, decoder_start_token_id=0, **{**sizes, **changes})


def test_an_encoder_decoder_is_counted_as_it_runs() -> None:
    config, planned = t5(), Counted(t5())
    torch.manual_seed(0)
    model = AutoModelForSeq2SeqLM.from_config(config).eval()
    assert planned.sizes.parameters == count_parameters(model)
    prompt, labels = torch.zeros(3, 16, dtype=torch.int64), torch.zeros(3, 4, dtype=torch.int64)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as forward, torch.no_grad():
        model(input_ids=prompt, labels=labels)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as step:
        model(input_ids=prompt, labels=labels).loss.backward()
    assert planned.forward(3, 16).flops == pytest.approx(forward.get_total_flops(), rel=0.02)
    assert planned.step(3, 16).flops == pytest.approx(step.get_total_flops(), rel=0.05)


@pytest.mark.parametrize("adapter", [None, LoRASection(rank=4)])
def test_a_deep_encoder_decoder_is_counted_along_a_straight_line(
    adapter: LoRASection | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = Counted(t5(layers=5), adapter=adapter)
    found = line.step(2, 8)
    monkeypatch.setattr(counts, "SHALLOW", (1, 100))
    wanted = Counted(t5(layers=5), adapter=adapter).step(2, 8)
    assert (found.flops, found.calls) == pytest.approx((wanted.flops, wanted.calls), rel=1e-9)
    assert found.peak == pytest.approx(wanted.peak, rel=0.02)


def test_an_encoder_and_a_decoder_of_different_depth_are_counted_whole() -> None:
    uneven = Counted(t5(layers=5, num_decoder_layers=3)).step(2, 8)
    assert Counted(t5(layers=3)).step(2, 8).flops < uneven.flops < Counted(t5(layers=5)).step(2, 8).flops


def prompted_value(base: Path) -> dict[str, Any]:
    """Experts over an encoder-decoder, of text with prompts."""
    data = recipe_value()["data"]
    corpora = [{**corpus, "prompt_field": "prompt"} for corpus in data["corpora"]]
    experts = {
        "base": str(base), "lora": {"rank": 4}, "domains": ["a", "b", "c", "d", "e"],
        "training": {"steps": 10, "batch_sequences": 8, "sequence_length": 32},
    }  # fmt: skip
    return {"run": "unused", "data": {**data, "corpora": corpora}, "experts": experts}


def test_layers_left_out_at_random_are_counted(tmp_path: Path) -> None:
    AutoConfig.for_model("m2m_100").save_pretrained(tmp_path)
    assert plan_value(prompted_value(tmp_path), "H100").seconds > 0


def test_whatever_cannot_be_counted_is_refused_by_name(tmp_path: Path) -> None:
    AutoConfig.for_model("prophetnet").save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="a prophetnet model cannot be counted on shapes"):
        plan_value(prompted_value(tmp_path), "H100")


def test_experts_over_an_encoder_decoder_are_planned_and_no_gate(tmp_path: Path) -> None:
    t5(layers=3).save_pretrained(tmp_path)
    value = prompted_value(tmp_path)
    found = plan_value(value, "2xH100")
    assert [stage.name for stage in found.stages] == ["data", "experts"]
    facts = found.stage("experts").facts
    # 4 linear modules of attention and 2 of the feed-forward layer in the encoder, 8 and 2 in the decoder.
    widths = 3 * (4 * 64 + 2 * 96) + 3 * (8 * 64 + 2 * 96)
    assert facts["parameters_per_expert"] == 4 * widths
    assert facts["experts"] == 5, "those that the recipe names"
    assert found.stage("data").facts["tokens"] == 5 * 10 * 8 * 32
    assert any("targets as 25% of that" in line for line in found.assumptions)


def test_a_mixture_over_an_encoder_decoder_is_refused_with_what_to_do(tmp_path: Path) -> None:
    t5().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"encoder-decoder model, and a mixture trains .*experts\.base"):
        plan_of(model={"pretrained": str(tmp_path)})


# -- memory and disk -------------------------------------------------------------------------------------------------


def test_memory_is_that_of_a_real_optimizer() -> None:
    config = config_of()
    model = real(config)
    optimizer = adamw(dict(model.named_parameters()), TrainingConfig(steps=1))
    token_losses(model, torch.zeros(2, 9, dtype=torch.int64)).mean().backward()
    optimizer.step()
    moments = sum(t.nbytes for state in optimizer.state.values() for key, t in state.items() if key != "step")
    training = TrainingConfig(steps=1, batch_sequences=2, sequence_length=8)
    planned = Run(Counted(config), training, machine_on("1xH100").training(training), 1).memory
    assert planned["Adam moments"] == moments
    assert planned["gradients"] == sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    assert planned["weights"] == sum(p.nbytes for p in model.parameters())


def machine_on(hardware: str, mfu: float = 0.4) -> Machine:
    return Machine(parse_hardware(hardware), mfu, Probe())


def run_of(hardware: str, *, hidden: int = 4096, layers: int = 32, micro: int = 1) -> Run:
    sizes = {"hidden_size": hidden, "intermediate_size": 3 * hidden, "num_hidden_layers": layers}
    config = config_of(**sizes, num_attention_heads=32)
    training = TrainingConfig(steps=1, batch_sequences=64, sequence_length=512, micro_batch_sequences=micro)
    machine = machine_on(hardware).training(training)
    return Run(Counted(config), training, machine, machine.hardware.devices)


def test_a_model_too_large_for_ddp_is_split() -> None:
    run, layout, problems = settle(run_of("8xH100"))
    assert run.sharded
    assert "set training.parallel: fsdp2" in layout
    assert problems == ()
    assert run.sent == pytest.approx(7 / 8 * 8 * run.counted.sizes.parameters * 8)


def test_what_fits_nowhere_is_told_how_to_fit() -> None:
    _, _, problems = settle(run_of("1xRTX4090"))
    assert len(problems) == 1
    assert "devices with training.parallel: fsdp2" in problems[0]
    _, _, problems = settle(run_of("1xL40S", hidden=1024, layers=24, micro=64))
    assert "micro_batch_sequences: 1" in problems[0] or "gradient_checkpointing" in problems[0]


def test_a_score_cache_is_as_large_as_its_arrays() -> None:
    texts, samples, length, experts = 6, 4, 8, 3
    arrays = (texts + samples) * (length * experts * 4 + (length + 1) * 4 + 8)
    assert score_cache_bytes(texts + samples, length, experts) == arrays


# -- fitted and measured speeds ----------------------------------------------------------------------------------------


def test_the_time_of_a_fit_is_near_what_was_measured() -> None:
    path = Path(__file__).parents[3] / "benchmarks" / "results" / "gate_fit.json"
    measured = json.loads(path.read_text())
    sizes, batch = measured["setting"]["sequences"], measured["setting"]["batch"]
    off = []
    for way, by_gate in measured["growth"].items():
        for gate, by_experts in by_gate.items():
            for name, one in by_experts.items():
                for total, seconds in zip(sizes, one["seconds"], strict=False):
                    experts = int(name)
                    each = max(4, total // (2 * experts))
                    found = fit_seconds(
                        each * experts, each * experts, experts, experts, steps=measured["setting"]["steps"],
                        batch=max(2, batch // experts) if way == "mini-batches" else None,
                        hidden=32 if gate == "mlp" else 0,
                    )  # fmt: skip
                    off.append(abs(found / seconds["median"] - 1.0))
    off.sort()
    assert off[len(off) // 2] < 0.25
    assert off[-1] < 1.0
    assert fit_bytes(1_000_000, 8) == pytest.approx(99 * 2**20, rel=0.02)


# -- whole plans -----------------------------------------------------------------------------------------------------


def plan_value(value: dict[str, Any], hardware: str, **options: Any) -> Plan:
    return plan_recipe(make_recipe(value), parse_hardware(hardware), **options)


def plan_of(hardware: str = "8xH100", *, assumed: Assumed | None = None, **changes: Any) -> Plan:
    return plan_value({**recipe_value(), **changes}, hardware, assumed=assumed)


def test_a_plan_has_the_stages_of_its_recipe() -> None:
    found = plan_of()
    assert [stage.name for stage in found.stages] == ["data", "training", "alignment", "evaluation", "serving"]
    training = found.stage("training").facts
    assert training["tokens"] == 60 * 8 * 32
    assert found.stage("alignment").facts["groups"] == 3
    assert found.stage("alignment").facts["updates"] == 15
    assert found.seconds > 0
    assert found.problems == ()
    assert json.loads(json.dumps(found.to_json()))["hardware"] == "8xH100"


def test_mfu_counts_where_arithmetic_limits() -> None:
    counted = Counted(config_of(hidden_size=4096, intermediate_size=8192))
    slow, fast = (machine_on("1xH100", mfu).time(counted, "step", 64, 512) for mfu in (0.2, 0.4))
    assert slow.limit == "compute"
    assert slow.parts["compute"] == pytest.approx(2 * fast.parts["compute"])
    with pytest.raises(ConfigError, match="above 0"):
        plan_value(recipe_value(), "H100", mfu=1.5)


def test_alignment_costs_by_groups_not_by_domains() -> None:
    data = recipe_value()["data"]
    many = {"by": "clusters", "clusters": {"n": 600}}
    by_domain = plan_of(data={**data, "domains": many}).stage("alignment").facts
    basis = {**many, "basis": {"of": "groups", "count": 6}}
    by_basis = plan_of(
        data={**data, "domains": basis}, mixture={"policy": "dga", "reweight": "basis", "update_every_steps": 4}
    ).stage("alignment").facts  # fmt: skip
    assert (by_domain["groups"], by_basis["groups"]) == (600, 6)
    assert by_domain["sequences_per_measurement"] == 8 + 600 * 8
    assert by_basis["sequences_per_measurement"] == 8 + 6 * 8
    assert by_domain["overhead"] > 3 * by_basis["overhead"]


def test_the_reference_of_doremi_is_trained_too() -> None:
    uniform = plan_of("3xH100", mixture={"policy": "uniform"})
    assert any("cannot be shared equally by 3 devices" in line for line in uniform.assumptions)
    plain = uniform.stage("training")
    doremi = plan_of("3xH100", mixture={"policy": "doremi"}).stage("training")
    assert doremi.flops == pytest.approx((2 + 1 / 3) * plain.flops, rel=0.05)
    assert doremi.memory["reference model"] == plain.memory["weights"]


def test_experts_pools_scores_and_gates_are_planned() -> None:
    assumed = Assumed(domains=50, experts=20)
    found = plan_of(experts={"lora": {"rank": 4}, "training": {"steps": 10}}, routing={}, gating={}, assumed=assumed)
    names = ["data", "training", "alignment", "evaluation", "experts", "serving", "scores", "gate", "gated serving"]
    assert [stage.name for stage in found.stages] == names
    experts, pool, scores = (found.stage(name) for name in ("experts", "serving", "scores"))
    assert experts.facts["experts_at_once"] == 8
    widths = 2 * (4 * (32 + 32) + 2 * (32 + 64) + (64 + 32))
    assert pool.memory["experts' factors"] == 20 * 4 * widths * 4
    assert scores.disk["score cache"] == score_cache_bytes(50 * 80 + 20 * 80, 32, 20)
    assert any("50 domains" in line for line in found.assumptions)


def test_only_the_stages_of_the_recipe_are_planned() -> None:
    experts = {"lora": {"rank": 4}, "training": {"steps": 10}}
    found = plan_of(experts=experts, routing={})
    assert [stage.name for stage in found.stages][-2:] == ["experts", "serving"]
    assert not any("sequences as the recipe asks for" in line for line in found.assumptions)
    assert [stage.name for stage in plan_of(experts=experts).stages][-1] == "experts"


@pytest.mark.parametrize("by", ["label", "file"])
def test_domains_of_a_glob_are_those_of_its_folders(by: str, tmp_path: Path) -> None:
    for name in ("law/a", "law/b", "medicine/c", "code/d", "code/e"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).with_suffix(".txt").write_text("text")
    corpus = {"path": str(tmp_path / "*/*.txt"), **({"label_from": "folder"} if by == "label" else {})}
    data = {**recipe_value()["data"], "corpora": [corpus], "domains": {"by": by}}
    found = plan_of(data=data)
    assert found.stage("data").facts["domains"] == (3 if by == "label" else 5)
    assert not any("number of domains" in line for line in found.assumptions)


def test_imported_adapters_are_not_trained() -> None:
    imports = [{"source": "a", "domain": "cooking"}, {"source": "b", "domain": "sailing"}, {"source": "c"}]
    counted = Counted(config_of(), adapter=LoRASection())
    experts = {"base": "some/base", "training": {"steps": 10, "sequence_length": 32}, "gate": {"steps": 2}}
    small = {key: recipe_value()[key] for key in ("run", "data")}
    config = make_recipe({**small, "experts": {**experts, "imports": imports}}).experts

    def stage(trained: int, imported: int) -> Stage:
        many = {"trained": trained, "imported": imported, "gated": min(2, imported)}
        return experts_stage(config, counted, machine_on("H100"), heldout=None, **many)

    trained, found, mixed = stage(3, 0), stage(0, 3), stage(1, 3)
    assert (found.facts["imported"], found.facts["of_them_gated"]) == (3, 2)
    assert found.disk["checkpoints"] == 0.0
    assert 0.0 < found.flops < trained.flops
    assert found.time is not None
    assert found.time.seconds == pytest.approx(2 * found.facts["seconds_per_imported_expert"])
    assert mixed.flops == pytest.approx(trained.flops / 3 + found.flops)


def test_baselines_are_planned_as_the_trainings_they_are() -> None:
    experts = {"lora": {"rank": 4}, "training": {"steps": 10, "batch_sequences": 4, "sequence_length": 32}}
    compare = {"mixtures": ["uniform", "doremi"], "monolith": True}
    found = plan_of(experts=experts, compare=compare, assumed=Assumed(experts=6))
    names = [stage.name for stage in found.stages]
    assert names[:7] == [
        "data",
        "training",
        "alignment",
        "evaluation",
        "baseline uniform",
        "baseline doremi",
        "baseline monolith",
    ]
    plain = plan_of(mixture={"policy": "uniform"})
    uniform, training = found.stage("baseline uniform"), plain.stage("training")
    assert uniform.flops == pytest.approx(training.flops + plain.stage("evaluation").flops)
    assert uniform.facts["seconds_of_training"] == pytest.approx(training.time.seconds if training.time else 0.0)
    assert uniform.disk == training.disk
    assert uniform.time is not None
    assert uniform.time.seconds == pytest.approx(sum(s.time.seconds for s in plain.stages if s.time is not None))
    assert found.stage("baseline doremi").flops > 2 * training.flops
    assert found.stage("baseline monolith").facts["tokens"] == 6 * 10 * 4 * 32
    imports = {**experts, "imports": [{"source": "somewhere"}], "domains": ["algebra", "cooking"]}
    fewer = plan_of(experts=imports, compare={"monolith": True})
    assert fewer.stage("experts").facts["experts"] == 3
    assert fewer.stage("baseline monolith").facts["tokens"] == 2 * 10 * 4 * 32, "imports are trained on nothing"
    assert found.stage("baseline monolith").facts["parameters"] == found.stage("training").facts["parameters"]


def pool_value(tmp_path: Path, *, vocabulary: int = 96) -> dict[str, Any]:
    """Two whole models and two adapters over the first, as configurations and without weights of the models."""
    config_of().save_pretrained(tmp_path / "first")
    config_of(hidden_size=64, vocab_size=vocabulary).save_pretrained(tmp_path / "second")
    for name, rank in (("small", 2), ("large", 5)):
        modules = {
            f"model.layers.{layer}.self_attn.q_proj": LoRAFactors(torch.ones(rank, 32), torch.ones(32, rank), 1.0)
            for layer in range(2)
        }
        adapter = LoRAExpert(name, BaseReference(str(tmp_path / "first")), modules, {})
        write_lora(tmp_path / name, adapter)
    small = {key: recipe_value()[key] for key in ("run", "data")}
    pool = [{"name": name, "model": str(tmp_path / name)} for name in ("first", "second", "small", "large")]
    scores = {"length": 32, "sequences": 40, "samples": 16, "batch_size": 4}
    return {**small, "gating": {"pool": pool, "scores": scores}}


def test_a_gate_over_models_that_are_there_is_planned(tmp_path: Path) -> None:
    value = pool_value(tmp_path)
    found = plan_value(value, "H100", assumed=Assumed(domains=3, requests=8, prompt=32, new=64))
    assert [stage.name for stage in found.stages] == ["data", "scores", "gate", "gated serving"]
    scores, serving = found.stage("scores"), found.stage("gated serving")
    assert scores.facts["text_sequences"] == 3 * 40
    assert scores.facts["sample_sequences"] == 4 * 16
    assert scores.disk["score cache"] == score_cache_bytes(120 + 64, 32, 4)
    first, second = (Counted(pretrained_config(str(tmp_path / name)), bf16=True) for name in ("first", "second"))
    assert scores.memory["weights"] == first.sizes.weight_bytes + second.sizes.weight_bytes
    assert scores.memory["experts' factors"] == 3 * 5 * 2 * (32 + 32) * 4, "three run on the first model, of rank 5"
    rows = (120 + 64) / 4
    alone = 3 * first.forward(4, 32).flops + second.forward(4, 32).flops
    assert serving.facts["tokens_per_second_at_8"] > serving.facts["tokens_per_second_at_1"]
    drawn = scores.flops - rows * alone
    assert 0 < drawn < 0.5 * scores.flops
    assert found.stage("data").facts["tokens"] == 3 * 40 * 32


def test_what_is_served_is_held_in_the_type_of_its_parameters(tmp_path: Path) -> None:
    value = pool_value(tmp_path)
    for dtype, bytes_each in (("float32", 4), ("bfloat16", 2)):
        for precision in ("bf16", "fp32"):
            scores = {**value["gating"]["scores"], "precision": precision}
            changed = {**value, "experts": {"dtype": dtype}, "gating": {**value["gating"], "scores": scores}}
            facts = plan_value(changed, "H100").stage("gated serving").facts
            # 2 layers of 2 heads; 8 wide for the first model and its two adapters, 16 wide for the second
            assert facts["kv_bytes_per_token"] == 2 * 2 * 2 * (3 * 8 + 16) * bytes_each


def test_a_pool_that_cannot_be_mixed_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"one vocabulary, and these differ in size: .*first 96, .*second 128"):
        plan_value(pool_value(tmp_path, vocabulary=128), "H100")
    t5().save_pretrained(tmp_path / "t5")
    AutoConfig.for_model("vit").save_pretrained(tmp_path / "vit")

    def pool(*models: str) -> None:
        sources = [ExpertSource(name=model, model=str(tmp_path / model)) for model in models]
        sharings_of(sources, dtype="float32", bf16=False)

    pool("first", "small")
    for model in ("t5", "vit"):
        with pytest.raises(ConfigError, match=f"a {model} model; a gate combines decoder-only"):
            pool(model)
    config_of(hidden_size=48).save_pretrained(tmp_path / "first")
    with pytest.raises(ExpertError, match="made for another base"):
        pool("small")


def test_an_unknown_vocabulary_is_asked_for() -> None:
    data = {**recipe_value()["data"], "tokenizer": {"pretrained": "nobody/has-this-tokenizer"}}
    with pytest.raises(ConfigError, match="size of the vocabulary is not known"):
        plan_of(data=data)


# -- this machine ----------------------------------------------------------------------------------------------------


def test_this_machine_is_measured_by_three_steps_of_the_recipes_model() -> None:
    ticks = iter(range(1_000_000))
    probe = Probe(clock=lambda: float(next(ticks)))
    experts = {"lora": {"rank": 4}, "training": {"steps": 10}}
    value = {**recipe_value(), "experts": experts, "routing": {}, "gating": {}}
    found = plan_value(value, "cpu", probe=probe)
    training, expert = found.stage("training").facts, found.stage("experts").facts
    assert training["seconds_per_step"] == pytest.approx(1 / 3), "one tick over three steps"
    assert found.stage("alignment").facts["overhead"] > 0
    assert expert["seconds_per_adapter_step"] == pytest.approx(1 / 3)
    assert found.mfu is None
    assert all(stage.limit in ("measured", "compute", "disk") for stage in found.stages)
    assert any("were timed on this machine" in line for line in found.assumptions)


def test_a_large_model_is_timed_in_part() -> None:
    ticks = iter(range(1_000_000))
    probe = Probe(clock=lambda: float(next(ticks)))
    config = config_of(hidden_size=256, intermediate_size=768, num_hidden_layers=6, vocab_size=512)
    small = Counted(config.__class__(**{**config.to_dict(), "num_hidden_layers": 2}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("weftlm.planning.probe.LARGEST_FLOPS", 2 * small.step(1, 32).flops)
        seconds = probe.training_step(Counted(config), TrainingConfig(steps=1, batch_sequences=64, sequence_length=32))
    assert seconds == pytest.approx(Counted(config).step(64, 32).flops / small.step(2, 32).flops / 3, rel=0.01)
