"""The plan of a recipe: its stages in order, what they need together, and what was assumed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from weftlm.corpora.builtin import builtin_names
from weftlm.corpora.store_files import DOCUMENT, Vocabulary
from weftlm.corpora.tokens import load_pretrained
from weftlm.errors import ConfigError
from weftlm.gating.config import ExpertSource
from weftlm.mixture.policy import build_policy
from weftlm.models.open import pretrained_config
from weftlm.pipeline.data_config import DataConfig
from weftlm.pipeline.gate_recipe import GatingConfig
from weftlm.pipeline.identity import MANIFEST
from weftlm.pipeline.planning.calibrate import Calibration
from weftlm.pipeline.planning.counts import TARGET_SHARE, Counted, model_config
from weftlm.pipeline.planning.experts import PoolPlan, experts_stage, pool_stage
from weftlm.pipeline.planning.gates import (
    GatePlan,
    Sharing,
    check_positions,
    gate_stage,
    scored_in_bf16,
    scoring_stage,
    sharings_of,
)
from weftlm.pipeline.planning.hardware import Hardware
from weftlm.pipeline.planning.serving import gated, plain, routed, serving_stage
from weftlm.pipeline.planning.speed import Speed, Time
from weftlm.pipeline.planning.stage import DOES_NOT_FIT, Stage
from weftlm.pipeline.planning.training import (
    FSDP2,
    Run,
    alignment_choice,
    alignment_stage,
    machine_for,
    settle,
    training_stage,
)
from weftlm.pipeline.prepared import PreparedData
from weftlm.pipeline.recipe import Recipe, check, make_recipe
from weftlm.training.runtime import choose_runtime

DOCUMENT_TOKENS = 1000
"""Tokens of a document where nothing is known of the text; decides the size of the documents' index alone."""


@dataclass(frozen=True)
class Assumed:
    """What the recipe does not say; None leaves it to the plan.

    Attributes:
        domains: D.
        experts: E.
        data_tokens: training tokens of all domains.
        requests: served at once.
        prompt: tokens of a prompt.
        new: tokens generated.
        chosen: K, experts per token of a routed model.
    """

    domains: int | None = None
    experts: int | None = None
    data_tokens: int | None = None
    requests: int = 32
    prompt: int | None = None
    new: int = 256
    chosen: int = 2


@dataclass(frozen=True)
class Plan:
    """What a recipe will cost.

    Attributes:
        recipe: where it was read from.
        hardware: its name.
        mfu: utilisation assumed of matrix products; None where kernels were measured.
        stages: in the order of work.
        assumptions: in plain sentences.
    """

    recipe: str
    hardware: str
    mfu: float | None
    stages: tuple[Stage, ...]
    assumptions: tuple[str, ...]

    def stage(self, name: str) -> Stage:
        """By name; KeyError where there is none."""
        return {stage.name: stage for stage in self.stages}[name]

    @property
    def seconds(self) -> float:
        """Of all stages that have a time, one after the other."""
        return sum(stage.time.seconds for stage in self.stages if stage.time is not None)

    @property
    def disk_bytes(self) -> float:
        """Of all stages."""
        return sum(stage.disk_bytes for stage in self.stages)

    @property
    def problems(self) -> tuple[str, ...]:
        """Of all stages."""
        return tuple(problem for stage in self.stages for problem in stage.problems)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "recipe": self.recipe,
            "hardware": self.hardware,
            "mfu": self.mfu,
            "stages": [stage.to_json() for stage in self.stages],
            "seconds": self.seconds,
            "disk_bytes": self.disk_bytes,
            "problems": list(self.problems),
            "assumptions": list(self.assumptions),
        }


@dataclass
class _Facts:
    """What is known of the data, and the sentences that say where it came from."""

    domains: int
    vocab_size: int | None
    data_tokens: int | None
    documents: int | None
    said: list[str] = field(default_factory=list)
    heldout: tuple[int, ...] | None = None
    target_heldout: int = 0

    def sequences(self, gating: GatingConfig) -> list[int]:
        """Held-out sequences of each domain that are scored: as many as are asked for, or as there are."""
        asked, length = gating.scores.sequences, gating.scores.length
        if self.heldout is None:
            return [asked] * self.domains
        return [min(asked, math.ceil(max(0, tokens - 1) / length)) for tokens in self.heldout]


def plan_value(
    value: Mapping[str, Any],
    hardware: Hardware,
    *,
    name: str = "recipe",
    mfu: float | None = None,
    assumed: Assumed | None = None,
    calibration: Calibration | None = None,
) -> Plan:
    """Plan a recipe given as a mapping; see `plan_project`.

    Raises:
        ConfigError: the recipe is wrong, or something needed is not known.
    """
    return plan_project(make_recipe(value), hardware, name=name, mfu=mfu, assumed=assumed, calibration=calibration)


def plan_project(
    project: Recipe,
    hardware: Hardware,
    *,
    name: str = "recipe",
    mfu: float | None = None,
    assumed: Assumed | None = None,
    calibration: Calibration | None = None,
) -> Plan:
    """What following a recipe on some hardware will take.

    Nothing is read but the recipe and, where it is there, the prepared data; nothing is allocated. On the CPU kernels
    are timed (`Calibration`), with the threads and the memory settings `weftlm train` would choose.

    Args:
        project: from the recipe.
        hardware: from `parse_hardware`.
        name: how it is called in the plan.
        mfu: part of the peak that matrix products reach; None: the device's default.
        assumed: what the recipe does not say.
        calibration: measurements to go on with.
    Raises:
        ConfigError: the recipe is wrong, or something needed is not known.
    """
    if mfu is not None and not 0.0 < mfu <= 1.0:
        raise ConfigError(f"mfu is {mfu}; it is a part of the peak, above 0 and at most 1")
    assumed = assumed if assumed is not None else Assumed()
    speed = Speed(hardware, mfu, calibration if calibration is not None else Calibration())
    facts = _facts(project, assumed)
    stages: list[Stage] = []
    if project.trains:
        counted = _counted(project, speed, facts, None)  # rivals are the same model: what is counted stays known
        stages += _base_stages(project, counted, speed, facts)
        for each in project.compare.mixtures:
            stages.append(_together(f"rival {each.policy}", _base_stages(project.rival(each), counted, speed, facts)))
    if project.makes_experts:
        stages += _expert_stages(project, speed, facts, assumed)
    if project.has_experts and (gating := project.gating) is not None and gating.pool is not None:
        stages += _pool_stages(project, gating.pool, speed, facts, assumed)
    if project.trains and not project.makes_experts:
        stages.append(_serving(project, speed, facts, assumed))
    stages.insert(0, _prepared_stage(facts, stages))
    used = None if hardware.device.measured else speed.utilisation
    said = dict.fromkeys([*facts.said, *_assumptions(speed, stages)])
    return Plan(name, hardware.name, used, tuple(stages), tuple(said))


# -- stages ----------------------------------------------------------------------------------------------------------


def _base_stages(recipe: Recipe, counted: Counted, speed: Speed, facts: _Facts) -> list[Stage]:
    """A model trained on a mixture."""
    check(recipe)
    machine = machine_for(recipe.training, speed)
    devices = _processes(recipe.training.batch_sequences, speed.hardware.devices, facts)
    if speed.hardware.device.measured:
        choose_runtime(recipe.training, parameters=counted.sizes.parameters)
    policy = build_policy(recipe.mixture.model_dump())
    aligning = bool(policy.needs & {"target_alignment", "generalist_alignment"})
    reference = counted.sizes.weight_bytes if "reference_losses" in policy.needs else 0.0
    memory = {"aligning": aligning, "reference_bytes": reference}
    run, layout, problems = settle(Run(counted, recipe.training, machine, devices), **memory)
    stages = [training_stage(run, policy, layout, problems, aligning=aligning, domains=facts.domains)]
    if aligning and recipe.training.total_steps >= recipe.mixture.update_every_steps:
        groups = _groups(recipe, policy, facts)
        choice, problem = alignment_choice(run, recipe.alignment, policy, groups)
        if choice is None:
            stages.append(Stage("alignment", "no estimator can measure it", limit=DOES_NOT_FIT, problems=(problem,)))
        else:
            stages.append(alignment_stage(run, recipe.alignment, policy, choice, groups))
    stages.append(_evaluation_stage(recipe, run, facts))
    return stages


def _evaluation_stage(recipe: Recipe, run: Run, facts: _Facts) -> Stage:
    """Held-out text of every domain and of the target, so many times; sets are dealt out to the devices."""
    config, steps, length = recipe.evaluation, recipe.training.total_steps, recipe.training.sequence_length
    times = 1 + (math.ceil(steps / config.every_steps) if config.every_steps else 0)
    sets = facts.domains + bool(recipe.data.target)
    most = config.max_tokens_per_set
    if facts.heldout is not None:
        held_out = [*facts.heldout, facts.target_heldout]
        tokens = float(sum(size if most is None else min(size, most) for size in held_out))
    elif most is None:
        held = recipe.data.split.fraction or 0.0
        tokens = (facts.data_tokens or 0) * held / max(1e-9, 1.0 - held)
        facts.said.append(f"Each evaluation scores all held-out text, taken as {held:.0%} of the text.")
    else:
        tokens = float(most * sets)
    work = run.counted.forward(config.batch_size, length)
    passes = times * tokens / (config.batch_size * length)
    time = run.machine.time(work, "forward").times(passes / run.devices)
    return Stage(
        "evaluation", f"{times} times {tokens:,.0f} tokens of {sets} sets", time, time.limit, work.flops * passes,
        {}, 0.0, {}, {"times": times, "tokens_each": tokens, "sets": sets},
    )  # fmt: skip


def _together(name: str, stages: Sequence[Stage]) -> Stage:
    """Stages of one rival as one: what the fullest device holds is that of the fullest stage."""
    training = stages[0]
    time = sum((stage.time for stage in stages if stage.time is not None), Time())
    problems = tuple(problem for stage in stages for problem in stage.problems)
    fullest = max(stages, key=lambda stage: stage.memory_bytes)
    seconds = {f"seconds_of_{stage.name}": stage.time.seconds for stage in stages if stage.time is not None}
    return Stage(
        name,
        training.what,
        time,
        DOES_NOT_FIT if problems else time.limit,
        sum(stage.flops for stage in stages),
        fullest.memory,
        sum(stage.sent for stage in stages),
        {what: size for stage in stages for what, size in stage.disk.items()},
        {**{key: training.facts[key] for key in ("parameters", "tokens", "steps", "layout")}, **seconds},
        problems,
    )


def _expert_stages(project: Recipe, speed: Speed, facts: _Facts, assumed: Assumed) -> list[Stage]:
    recipe, whole = project, project
    config = recipe.experts
    length = config.training.sequence_length
    if config.base is not None:
        base = pretrained_config(config.base, config.revision)
    else:
        assert whole is not None
        base = model_config(whole.model, vocab_size=facts.vocab_size, sequence_length=length)
    if base.is_encoder_decoder:
        _check_encoder_decoder(project)
    named = facts.domains if config.domains is None else len(config.domains)
    stages: list[Stage] = []
    if project.trains_monolith:
        rival = project.monolith(assumed.experts or named)
        stages.append(
            _together("rival monolith", _base_stages(rival, _counted(rival, speed, facts, base), speed, facts))
        )
    machine = machine_for(config.training, speed)
    bf16 = machine.precision == "bf16"
    checkpointing = whole is not None and config.base is None and whole.model.gradient_checkpointing
    counted = Counted(base, config.dtype, bf16, checkpointing, config.lora)
    bare = Counted(base, config.dtype, bf16)
    if speed.hardware.device.measured:
        choose_runtime(config.training, parameters=bare.sizes.parameters)
    experts = assumed.experts or (named if config.trains else 0) + len(config.imports)
    heldout = sum(facts.heldout) / len(facts.heldout) if facts.heldout else None
    if heldout is not None and base.is_encoder_decoder:
        heldout *= counted.share / (1.0 + counted.share)
    plan = PoolPlan(recipe, counted, bare, speed, facts.domains, experts, int(base.vocab_size), heldout)
    prompt, chosen = _prompt(base, length, assumed), min(assumed.chosen, experts)
    stages += [experts_stage(plan), pool_stage(plan, prompt=prompt, chosen=chosen)]
    if base.is_encoder_decoder:
        facts.said.append(
            f"Prompts are taken as long as experts.training.sequence_length, {length:,} tokens, and targets as "
            f"{TARGET_SHARE:.0%} of that; shorter ones take less time. Gates and weftlm serve take decoder-only "
            "models: scores and serving are not planned."
        )
        return stages
    gating = recipe.gating_settings
    over = None
    if gating.pool is None:
        if recipe.gating is not None:
            check_positions(base, gating.scores.length, "the experts' base")
        voices = Counted(base, config.dtype, scored_in_bf16(gating, speed), adapter=config.lora)
        over = GatePlan((Sharing(voices, _wanted(gating, experts)),), gating, speed, facts.sequences(gating))
        stages += [scoring_stage(over), gate_stage(over)]
    size = {"prompt": prompt, "new": assumed.new, "requests": assumed.requests}
    stages.append(serving_stage(routed(plan, chosen), speed, **size))
    if over is not None and recipe.gating is not None:
        stages.append(serving_stage(gated(over), speed, **size))
    return stages


def _check_encoder_decoder(project: Recipe) -> None:
    """Refuse what nothing can be made of over an encoder-decoder.

    Raises:
        ConfigError: a gate or a monolith is wanted, or a corpus has no prompts.
    """
    recipe = project
    name = recipe.experts.base
    if recipe.gating is not None and recipe.gating.pool is None:
        raise ConfigError(f"experts.base {name} is an encoder-decoder model; a gate combines decoder-only models")
    if project.trains_monolith:
        raise ConfigError(
            f"experts.base {name} is an encoder-decoder model, and a mixture trains decoder-only models: "
            "leave compare.monolith out"
        )
    if any(corpus.prompt_field is None for corpus in recipe.data.corpora):
        raise ConfigError(
            f"experts.base {name} is an encoder-decoder model, which learns from prompts and targets; give every "
            "corpus a prompt_field"
        )


def _wanted(gating: GatingConfig, experts: int) -> int:
    """Experts the gate is over."""
    return experts if gating.experts is None else len(gating.experts)


def _pool_stages(
    recipe: Recipe, sources: Sequence[ExpertSource], speed: Speed, facts: _Facts, assumed: Assumed
) -> list[Stage]:
    """A gate over models that are there already."""
    gating, training = recipe.gating, recipe.experts.training
    assert gating is not None
    bf16 = scored_in_bf16(gating, speed)
    sharings = sharings_of(sources, dtype=recipe.experts.dtype, bf16=bf16, length=gating.scores.length)
    plan = GatePlan(sharings, gating, speed, facts.sequences(gating))
    if speed.hardware.device.measured:
        choose_runtime(training, parameters=sum(each.counted.sizes.parameters for each in sharings))
    prompt = min(_prompt(each.counted.config, gating.scores.length, assumed) for each in sharings)
    size = {"prompt": prompt, "new": assumed.new, "requests": assumed.requests}
    return [scoring_stage(plan), gate_stage(plan), serving_stage(gated(plan), speed, **size)]


def _serving(recipe: Recipe, speed: Speed, facts: _Facts, assumed: Assumed) -> Stage:
    config = model_config(recipe.model, vocab_size=facts.vocab_size, sequence_length=recipe.training.sequence_length)
    counted = Counted(config, dtype=recipe.model.dtype, bf16=recipe.model.dtype == "bfloat16")
    prompt = _prompt(config, recipe.training.sequence_length, assumed)
    return serving_stage(plain(counted), speed, prompt=prompt, new=assumed.new, requests=assumed.requests)


def _prompt(config: Any, length: int, assumed: Assumed) -> int:
    longest = getattr(config, "max_position_embeddings", None)
    prompt = assumed.prompt if assumed.prompt is not None else length
    return prompt if longest is None else max(1, min(prompt, int(longest) - assumed.new))


def _prepared_stage(facts: _Facts, stages: Sequence[Stage]) -> Stage:
    """The prepared text on disk: 2 bytes per token up to 65,536 ids and 4 beyond, 24 bytes per document."""
    trained = max((int(stage.facts.get("tokens", 0)) for stage in stages), default=0)
    scored = max((int(stage.facts.get("text_tokens", 0)) for stage in stages), default=0)
    tokens = facts.data_tokens if facts.data_tokens is not None else trained or scored
    if facts.data_tokens is None:
        facts.said.append(
            f"The text is not prepared and its size is not given (--data-tokens): taken as the {tokens:,} tokens that "
            f"are {'trained on' if trained else 'scored'}, each read once."
        )
    vocabulary = Vocabulary(facts.vocab_size or 1 << 17, 0, "")
    documents = facts.documents if facts.documents is not None else math.ceil(tokens / DOCUMENT_TOKENS)
    return Stage(
        "data",
        f"{tokens:,} tokens of {facts.domains:,} domains, prepared",
        disk={"tokens": float(tokens * vocabulary.dtype.itemsize), "documents": float(documents * DOCUMENT.itemsize)},
        limit="disk",
        facts={"tokens": tokens, "domains": facts.domains, "vocab_size": facts.vocab_size},
    )


# -- what is known ---------------------------------------------------------------------------------------------------


def _facts(project: Recipe, assumed: Assumed) -> _Facts:
    """Domains, vocabulary and size of the text: from the prepared data, else from the recipe, else assumed."""
    data, folder = project.data, project.prepared_folder
    if (folder / MANIFEST).exists():
        prepared = PreparedData.load(folder)
        found = _Facts(
            len(prepared.domains),
            prepared.tokenizer.vocab_size,
            sum(len(domain.train) for domain in prepared.domains),
            sum(domain.documents for domain in prepared.domains),
            [f"Domains, vocabulary and size of the text are those of the prepared data in {folder}."],
            tuple(0 if domain.heldout is None else len(domain.heldout) for domain in prepared.domains),
            0 if prepared.target_heldout is None else len(prepared.target_heldout),
        )
    else:
        domains, said = _domains_of(data)
        if said and (named := _named_domains(project)) > domains:
            domains, said = named, [f"{named:,} domains, those that the recipe names."]
        found = _Facts(domains, _vocabulary_of(data), None, None, said)
    if assumed.domains is not None:
        found.domains, found.heldout = assumed.domains, None
        found.said = [line for line in found.said if "domains" not in line.lower()]
        found.said.append(f"{assumed.domains:,} domains, as asked (--domains).")
    if assumed.data_tokens is not None:
        found.data_tokens, found.documents = assumed.data_tokens, None
    return found


def _domains_of(data: DataConfig) -> tuple[int, list[str]]:
    own = int(data.domains.include_target)
    if data.domains.clusters is not None:
        return int(data.domains.clusters.n) + own, []
    labels: set[str] = set()
    unknown = False
    for number, corpus in enumerate(data.corpora):
        if corpus.label is not None:
            labels.add(corpus.label)
        elif corpus.builtin == "all":
            labels |= set(builtin_names())
        elif corpus.builtin is not None:
            labels |= set(corpus.builtin)
        else:
            labels.add(f"corpus {number}")
            unknown = unknown or bool(corpus.label_field or corpus.label_from or data.domains.by == "file")
    said = []
    if unknown:
        said.append(
            f"How many domains the text has is not known before it is read; taken as {len(labels)}, one per corpus "
            "or label of the recipe (--domains says otherwise)."
        )
    return len(labels) + own, said


def _named_domains(project: Recipe) -> int:
    """How many domains the sections of experts and gate name."""
    if not project.has_experts:
        return 0
    gating = project.gating
    return len({*(project.experts.domains or ()), *((gating and gating.domains) or ())})


def _vocabulary_of(data: DataConfig) -> int | None:
    if data.tokenizer.train is not None:
        return int(data.tokenizer.train.vocab_size)
    name = data.tokenizer.pretrained
    if name is None or not Path(name).is_dir():
        return None
    try:
        return load_pretrained(name, data.tokenizer.revision).vocab_size
    except ConfigError:
        return None


def _groups(recipe: Recipe, policy: Any, facts: _Facts) -> int:
    """What alignments are measured of: domains, or basis distributions."""
    basis = recipe.data.domains.basis
    if "basis" not in policy.needs or basis is None:
        return facts.domains
    return len(basis.sets) if basis.count is None else int(basis.count)


def _counted(recipe: Recipe, speed: Speed, facts: _Facts, config: PretrainedConfig | None) -> Counted:
    """The model of a recipe; its configuration is the recipe's unless one is given."""
    section, length = recipe.model, recipe.training.sequence_length
    if config is None:
        config = model_config(section, vocab_size=facts.vocab_size, sequence_length=length)
    bf16 = machine_for(recipe.training, speed).precision == "bf16"
    return Counted(config, section.dtype, bf16, section.gradient_checkpointing, section.lora)


def _processes(batch: int, devices: int, facts: _Facts) -> int:
    """Processes that share a batch equally: all devices, or the most that divide it."""
    used = max(number for number in range(1, devices + 1) if batch % number == 0)
    if used < devices:
        facts.said.append(
            f"A batch of {batch} sequences cannot be shared equally by {devices} devices: {used} are used; set "
            f"training.batch_sequences to a multiple of {devices}."
        )
    return used


def _assumptions(speed: Speed, stages: Sequence[Stage]) -> list[str]:
    device = speed.hardware.device
    if device.measured:
        lines = [
            "Kernels were timed on this machine one at a time, without running the model; whatever else runs on it "
            "meanwhile slows both the timing and the work.",
            "Memory counts Python and the libraries as they are loaded now.",
        ]
    else:
        lines = [
            f"Matrix products reach {speed.utilisation:.0%} of the peak of {device.name} (--mfu), recomputed ones "
            "included: about what is published for large dense models; small ones are held up by memory and launches, "
            "which are counted apart.",
            f"Compiled code moves half the bytes and launches a third of the kernels; a launch takes "
            f"{device.launch * 1e6:.0f} us.",
            f"A device sends {speed.hardware.exchange / 1e9:.0f} GB/s to the others, all at once, 80 % of the "
            "links' rate; in DDP the last micro-batch's backward pass hides traffic, in FSDP2 all computing does.",
            "Devices do not wait for text: it is tokenised beforehand and read ahead.",
        ]
    lines.append("6 % of a device's memory is left to fragmentation and libraries.")
    names = {stage.name for stage in stages}
    if names & {"experts", "pool"}:
        lines.append("An adapter is trained by one process; the devices make experts side by side.")
        lines.append(
            "A routed model holds every expert in memory; over several devices, layers lie one after the other."
        )
    if "scores" in names:
        lines.append("Every domain and expert has as many sequences as the recipe asks for.")
        lines.append("The time of fitting a gate is that of one x86 core (benchmarks/results/gate_fit.md).")
    if "gated serving" in names:
        lines.append(
            "A gated model's experts run one model after the other, adapters over one model together"
            + ("." if device.measured else "; what the gate does beside them is not counted.")
        )
        lines.append(
            "With fewer experts per token every request prefers any of them with the same chance, and all requests "
            "catch up together."
        )
    lines.append(
        "Not planned: reading and tokenising text, comparing routers, students of a gate, the last evaluation of every "
        "model, tasks, failures of machines."
    )
    if any(FSDP2 in str(stage.facts.get("layout", "")) for stage in stages):
        lines.append(
            "FSDP2 gathers one layer ahead; checkpoints are whole in the memory of the first process's machine."
        )
    return lines
