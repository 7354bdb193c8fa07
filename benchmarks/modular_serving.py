"""Tokens per second of a gated model of eight adapter experts, beside one expert alone.

A Llama-type base with random weights, LoRA experts of rank 8 on all linears of attention and MLP with small random
weights, a `prefix` gate with small random weights. Prompts of random tokens, greedy generation of a fixed number of new
tokens by `generate` of transformers throughout.

| contestant       | what it is                                                                                    |
|------------------|-----------------------------------------------------------------------------------------------|
| one expert       | the base with one adapter merged into its weights, a plain model: everything is over this     |
| dense student    | another plain model of an expert's size, as distillation makes it                             |
| PEFT             | the base with one adapter beside its weights, active for all sequences                        |
| all experts      | ModularLM, every expert on every token                                                        |
| top-2, top-1     | ModularLM, the gate's two or one preferred experts on each token, all others catch up every   |
|                  | `refresh_every` = 32 tokens                                                                   |
| top-1, never     | the same with `refresh_every` = None: the others catch up when they are called                |

What a sparse model costs depends on the text, so the gate is told what text it is: a large number is added to the score
of one expert, half of it to the next one's, the second choice. The gate's own computation runs in any case.

    stays      sequence b of a batch keeps to expert b, and b + 1
    changes    it goes on to the next expert every 16 tokens, sequences of a batch at different times
    as it is   nothing is added: the random gate decides

In each round every contestant generates once from the same prompts, in turns, with one expert first and last; a ratio
is a contestant's time over the mean of the round's two of one expert. Figures are the median over rounds, then over
seeds. `time per token`: from the first new token to the last, over the tokens between. `token between catch-ups`: the
median of the times between two tokens, which leaves out those at which all experts catch up. `first token`: the prompt,
which every expert reads. `whole`: the call. `passes per token`: how often an expert read a token, over the new tokens
after the first of all sequences; 1 for one expert. Of them those in `forwards` calls of the base per token.

    python benchmarks/modular_serving.py --threads 1  # regenerates benchmarks/results/modular_serving.{json,md}
"""

from __future__ import annotations

import argparse
import copy
import itertools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib import metadata
from typing import Any, ClassVar

import _common
import peft
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from weftlm.experts.expert import BaseReference, LoRAExpert, LoRAFactors
from weftlm.gating.experts import ExpertPool, Member
from weftlm.gating.gate import State
from weftlm.gating.modular_lm import ModularLM
from weftlm.gating.prefix_gate import PrefixGate

RANK, EXPERTS, VOCABULARY = 8, 8, 8192
PROMPT, NEW = 64, 64
STRETCH = 16
"""Tokens after which text that changes goes on to the next expert."""
SURE = 100.0
"""Added to the score of the expert whose text it is, and half of it to that of the next."""
ONE, STUDENT, PEFT, ALL, TOP2, TOP1, NEVER = (
    "one expert", "dense student", "PEFT", "all experts", "top-2", "top-1", "top-1, never",
)  # fmt: skip
SETTINGS: dict[str, dict[str, int | None]] = {
    ALL: {"top_m": None}, TOP2: {"top_m": 2}, TOP1: {"top_m": 1}, NEVER: {"top_m": 1, "refresh_every": None},
}  # fmt: skip
STAYS, CHANGES, AS_IT_IS = "stays", "changes", "as it is"
GOAL = 1.3


# -- text that keeps to an expert, or does not ------------------------------------------------------------------------


class ToldGate(PrefixGate):
    """The prefix gate, with a large number added to the score of the expert whose text it is."""

    stretch: ClassVar[int]

    def begin(self, batch: int) -> State:
        row_B = torch.arange(batch, device=self.tensors["bias_E"].device)
        return {**super().begin(batch), "row_B": row_B}

    def current(self, state: State) -> Tensor:
        row_B = state["row_B"]
        # Sequences change at different times.
        count_B = state["count_B"].long() + row_B * self.stretch // max(1, len(row_B))
        told_B = (row_B + count_B // self.stretch) % self.experts
        logw_BE = super().current(state)
        told_BE = torch.zeros_like(logw_BE).scatter_(1, told_B[:, None], SURE)
        told_BE.scatter_(1, (told_B[:, None] + 1) % self.experts, SURE / 2)
        return torch.log_softmax(logw_BE + told_BE, dim=-1)

    def advance(self, state: State, logp_BE: Tensor, mask_B: Tensor | None = None) -> State:
        return {**super().advance(state, logp_BE, mask_B), "row_B": state["row_B"]}


class StaysGate(ToldGate):
    stretch = 1 << 40


class ChangesGate(ToldGate):
    stretch = STRETCH


KINDS: dict[str, type[PrefixGate]] = {STAYS: StaysGate, CHANGES: ChangesGate, AS_IT_IS: PrefixGate}


def random_gate(kind: type[PrefixGate], seed: int) -> PrefixGate:
    """A gate a small way from Bayes' posterior."""
    start = kind.of(torch.full((EXPERTS,), 1.0 / EXPERTS, dtype=torch.float64), seed=seed)
    random = torch.Generator().manual_seed(seed)
    moved = {
        name: start.tensors[name] + 0.1 * torch.randn(start.tensors[name].shape, generator=random, dtype=torch.float64)
        for name in start.learned
    }
    return start.replaced(moved)


# -- models -----------------------------------------------------------------------------------------------------------


def build_base(hidden: int, layers: int, seed: int, device: torch.device) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=hidden, intermediate_size=round(hidden * 8 / 3 / 16) * 16,
        num_hidden_layers=layers, num_attention_heads=hidden // 64, num_key_value_heads=hidden // 64,
        pad_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    return model.to(device, torch.bfloat16 if device.type == "cuda" else torch.float32)


def twin(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """Another model over the same weights."""
    return copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not name.endswith("lm_head")
    }


def random_experts(model: nn.Module, seed: int) -> list[LoRAExpert]:
    """Adapters whose products B A are a small part of the weights they are added to."""
    random = torch.Generator().manual_seed(seed)
    base = BaseReference("random")

    def factors(module: nn.Linear) -> LoRAFactors:
        A_RI = torch.randn(RANK, module.in_features, generator=random) * module.in_features**-0.5
        B_OR = torch.randn(module.out_features, RANK, generator=random) * 0.02
        return LoRAFactors(A_RI, B_OR, 1.0)

    return [
        LoRAExpert(f"expert-{place}", base, {name: factors(module) for name, module in linears(model).items()}, {})
        for place in range(EXPERTS)
    ]


def merged(model: LlamaForCausalLM, expert: LoRAExpert) -> LlamaForCausalLM:
    """A plain model with the expert in its weights."""
    plain = copy.deepcopy(model)
    for name, module in linears(plain).items():
        change_OI = expert.modules[name].scale * expert.modules[name].B_OR @ expert.modules[name].A_RI
        module.weight.add_(change_OI.to(module.weight))
    return plain


def with_peft(model: LlamaForCausalLM, expert: LoRAExpert) -> PreTrainedModel:
    """The base with the expert beside its weights."""
    targets = sorted({name.rpartition(".")[2] for name in expert.modules})
    adapted = peft.get_peft_model(twin(model), peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=targets))
    for name, factors in expert.modules.items():
        layer = adapted.base_model.model.get_submodule(name)
        layer.lora_A["default"].weight.data.copy_(factors.A_RI)
        layer.lora_B["default"].weight.data.copy_(factors.scale * factors.B_OR)
    return adapted.eval().requires_grad_(False).to(model.device)


# -- running and timing -----------------------------------------------------------------------------------------------


class Stopwatch(BaseStreamer):
    """Notes when tokens come; `generate` puts the prompt first, and reads tokens back from the device."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: to the first new token, of each token after it, of the whole."""

    first: float
    each: tuple[float, ...]
    whole: float

    @property
    def token(self) -> float:
        return sum(self.each) / len(self.each)

    @property
    def usual(self) -> float:
        return statistics.median(self.each)


def generate(model: Any, ids_BT: Tensor, new: int) -> Timing:
    watch = Stopwatch()
    start = time.perf_counter()
    out = model.generate(
        input_ids=ids_BT, attention_mask=torch.ones_like(ids_BT), do_sample=False, max_new_tokens=new,
        min_new_tokens=new, streamer=watch,
    )  # fmt: skip
    whole = time.perf_counter() - start
    assert out.shape == (len(ids_BT), ids_BT.shape[1] + new)
    times = watch.times[1:]
    each = tuple(after - before for before, after in itertools.pairwise(times))
    return Timing(times[0] - start, each, whole)


@dataclass
class Counter:
    """What runs through the backbones of a gated model: tokens that experts read, and forward passes."""

    tokens: int = 0
    forwards: int = 0
    prompt: bool = True
    undo: list[Callable[[], None]] = field(default_factory=list)

    @classmethod
    def on(cls, model: ModularLM) -> Counter:
        counter = cls()
        for backbone in model.pool.backbones:
            run = backbone.run

            def counted(rows: Any, ids_XT: Tensor, *, run: Any = run, **more: Any) -> Tensor:
                counter.tokens += ids_XT.numel()
                counter.forwards += 1
                return run(rows, ids_XT, **more)

            backbone.run = counted
            counter.undo.append(partial(backbone.__dict__.pop, "run"))
        return counter

    def off(self) -> None:
        for undo in self.undo:
            undo()


def passes(model: ModularLM, ids_BT: Tensor, new: int) -> dict[str, float]:
    """Tokens that experts read and forward passes, per new token after the first."""
    found = []
    for count in (1, new):
        counter = Counter.on(model)
        generate(model, ids_BT, count)
        counter.off()
        found.append((counter.tokens, counter.forwards))
    (tokens, forwards), (all_tokens, all_forwards) = found
    return {
        "passes_per_token": (all_tokens - tokens) / (len(ids_BT) * (new - 1)),
        "forwards_per_token": (all_forwards - forwards) / (new - 1),
    }


def measure(
    hidden: int, batch: int, texts: Mapping[str, Sequence[str]], seed: int, arguments: argparse.Namespace,
    device: torch.device,
) -> dict[str, Any]:  # fmt: skip
    """Every contestant on every text, for one seed: ratios by round, and passes per token."""
    base = build_base(hidden, arguments.layers, seed, device)
    experts = random_experts(base, seed)
    one = merged(base, experts[0])
    plain: dict[str, Any] = {
        STUDENT: build_base(hidden, arguments.layers, seed + 1000, device), PEFT: with_peft(base, experts[0]),
    }  # fmt: skip
    random = torch.Generator().manual_seed(seed)
    ids_BT = torch.randint(3, VOCABULARY, (batch, arguments.prompt), generator=random).to(device)
    pool = ExpertPool([Member(expert.name, twin_base, expert) for twin_base in [twin(base)] for expert in experts])
    check_alike(ModularLM(pool, random_gate(StaysGate, seed), top_m=1), one, plain[PEFT], ids_BT[:1])
    contestants: dict[str, Any] = dict(plain)
    counts = {}
    for text, names in texts.items():
        for name in names:
            model = ModularLM(pool, random_gate(KINDS[text], seed), **SETTINGS[name])
            contestants[f"{name} | {text}"] = model
            counts[f"{name} | {text}"] = passes(model, ids_BT, arguments.new)  # also the warm-up
    for model in (one, *plain.values()):
        generate(model, ids_BT, arguments.new)
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in contestants}
    seconds = []
    for _ in range(arguments.rounds if batch == 1 else max(1, arguments.rounds // 3)):
        before = generate(one, ids_BT, arguments.new)
        found = {name: generate(model, ids_BT, arguments.new) for name, model in contestants.items()}
        after = generate(one, ids_BT, arguments.new)
        parts = ("first", "token", "usual", "whole")
        mean = {part: (getattr(before, part) + getattr(after, part)) / 2 for part in parts}
        seconds.append(mean)
        for name, timing in found.items():
            rounds[name].append({part: getattr(timing, part) / mean[part] for part in parts})
    shown = ", ".join(
        f"{name} {statistics.median(each['token'] for each in ratios):.2f}" for name, ratios in rounds.items()
    )
    _common.say(f"hidden {hidden}, batch {batch}, seed {seed}: {shown}")
    return {
        "rounds": rounds, "one": seconds, "counts": counts, "parameters": sum(p.numel() for p in base.parameters()),
    }  # fmt: skip


def check_alike(sparse: ModularLM, one: PreTrainedModel, adapted: PreTrainedModel, ids_BT: Tensor) -> None:
    """The contestants that compute the same thing on the first sequence say the same of its next token.

    Raises:
        SystemExit: they do not.
    """
    with torch.inference_mode():
        mine_V = sparse(ids_BT, use_cache=True, logits_to_keep=1).logits[0, -1]
        for name, model in ((ONE, one), (PEFT, adapted)):
            theirs_V = torch.log_softmax(model(input_ids=ids_BT).logits[0, -1].float(), dim=-1)
            error = float((mine_V - theirs_V).abs().max() / theirs_V.abs().max())
            if error > (0.1 if one.dtype == torch.bfloat16 else 1e-3):
                raise SystemExit(f"the gated model differs from {name} by {error:.2g}: one of them is wrong")


# -- the whole --------------------------------------------------------------------------------------------------------


def summary(runs: Sequence[Mapping[str, Any]], batch: int) -> dict[str, Any]:
    """Over seeds, from the median over rounds of each."""

    def over(values: Sequence[Sequence[float]]) -> dict[str, float]:
        return _common.spread([statistics.median(one) for one in values]).as_json()

    contestants = {}
    for name in runs[0]["rounds"]:
        ratios = {
            part: over([[each[part] for each in run["rounds"][name]] for run in runs])
            for part in ("token", "usual", "first", "whole")
        }
        counted = {}
        if name in runs[0]["counts"]:
            counted = {
                key: _common.spread([run["counts"][name][key] for run in runs]).as_json()
                for key in ("passes_per_token", "forwards_per_token")
            }
        contestants[name] = {**ratios, **counted}
    return {
        "contestants": contestants,
        "one": {
            "tokens_per_second": over([[batch / each["token"] for each in run["one"]] for run in runs]),
            "first_seconds": over([[each["first"] for each in run["one"]] for run in runs]),
        },
        "parameters": runs[0]["parameters"],
    }


def goals(cells: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Top-1's time per token in every cell, on text that stays and text that changes; by the median."""
    found = []
    for cell, one in cells.items():
        for name, text in ((name, text) for text in (STAYS, CHANGES) for name in (TOP1, NEVER)):
            entry = one["contestants"].get(f"{name} | {text}")
            if entry is not None:
                met = entry["token"]["median"] <= GOAL
                found.append({"cell": cell, "who": name, "text": text, "measured": entry["token"], "met": met})
    return found


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sparse = [TOP2, TOP1, NEVER]
    cells: dict[str, Any] = {}
    for hidden in arguments.hidden:
        for batch in arguments.batch:
            if batch > 1 and hidden != arguments.hidden[0]:
                continue
            texts = {STAYS: [ALL, *sparse], CHANGES: sparse, AS_IT_IS: sparse}
            if batch > 1 or hidden != arguments.hidden[0]:
                texts = {STAYS: [ALL, *sparse], CHANGES: [TOP1, NEVER]}
            if arguments.quick:
                texts = {STAYS: [ALL, TOP1, NEVER], CHANGES: [TOP1]}
            runs = [measure(hidden, batch, texts, seed, arguments, device) for seed in range(arguments.seeds)]
            cells[f"hidden {hidden}, batch {batch}"] = summary(runs, batch)
    return {
        "setting": {
            "rank": RANK, "experts": EXPERTS, "layers": arguments.layers, "vocabulary": VOCABULARY,
            "prompt": arguments.prompt, "new": arguments.new, "rounds": arguments.rounds, "seeds": arguments.seeds,
            "stretch": STRETCH, "device": device.type, "dtype": "bfloat16" if device.type == "cuda" else "float32",
            "peft": metadata.version("peft"),
        },
        "goal": GOAL,
        "cells": cells,
        "goals": goals(cells),
    }  # fmt: skip


def to_markdown(record: Mapping[str, Any]) -> str:
    def show(spread: Mapping[str, float] | None, form: str = "{:.2f}", scale: float = 1.0) -> str:
        return "" if spread is None else _common.Spread(**spread).show(form, scale)  # type: ignore[arg-type]

    setting = record["setting"]
    lines = [
        "# Serving a gated model", "", __doc__ or "",
        f"{setting['experts']} experts of rank {setting['rank']}, {setting['layers']} layers, vocabulary "
        f"{setting['vocabulary']}, prompts of {setting['prompt']} tokens, {setting['new']} new ones; on "
        f"{setting['device']} in {setting['dtype']}; {setting['rounds']} rounds (a third of "
        f"them for batches), {setting['seeds']} seeds; PEFT "
        f"{setting['peft']}.",
        "", f"## Goal: top-1 takes at most {record['goal']:g} times one expert's time per token", "",
        _common.table(
            ["", "", "text", "time per token", "met"],
            [
                [one["cell"], one["who"], one["text"], show(one["measured"]), "yes" if one["met"] else "no"]
                for one in record["goals"]
            ],
        ),
    ]  # fmt: skip
    for cell, one in record["cells"].items():
        own = one["one"]
        lines += [
            "", f"## {cell[0].upper() + cell[1:]}: {one['parameters'] / 1e6:.0f}M parameters", "",
            f"One expert: {show(own['tokens_per_second'], '{:.0f}')} tokens a second after the first, which comes "
            f"after {show(own['first_seconds'], '{:.0f}', 1e3)} ms. Times are over its; median (lowest .. highest):",
            "",
        ]  # fmt: skip
        rows = []
        for name, entry in one["contestants"].items():
            who, _, text = name.partition(" | ")
            rate = {
                "median": own["tokens_per_second"]["median"] / entry["token"]["median"], "low": 0, "high": 0, "n": 1,
            }  # fmt: skip
            rows.append(
                [
                    who, text, show(entry["token"]), show(entry["usual"]), show(entry["first"]), show(entry["whole"]),
                    show(rate, "{:.0f}"), show(entry.get("passes_per_token")), show(entry.get("forwards_per_token")),
                ]
            )  # fmt: skip
        header = [
            "", "text", "time per token", "token between catch-ups", "first token", "whole", "tokens a second",
            "passes per token", "forwards per token",
        ]  # fmt: skip
        lines.append(_common.table(header, rows))
    return "\n".join([*lines, "", _common.environment_lines(record)])


def main() -> None:
    flags = _common.parser((__doc__ or "").splitlines()[0])
    flags.add_argument("--hidden", type=int, nargs="+", default=[512, 256, 768], help="hidden sizes")
    flags.add_argument(
        "--batch", type=int, nargs="+", default=[1, 8], help="sequences; more than one with the first hidden size only"
    )
    flags.add_argument("--layers", type=int, default=4, help="of the base")
    flags.add_argument("--prompt", type=int, default=PROMPT, help="tokens of a prompt")
    flags.add_argument("--new", type=int, default=NEW, help="tokens generated")
    flags.add_argument("--rounds", type=int, default=3, help="rounds per seed; a third of them for batches")
    arguments = flags.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if arguments.quick:
        arguments.seeds, arguments.hidden, arguments.batch = 1, [256], [1]
        arguments.prompt, arguments.new, arguments.rounds, arguments.layers = 16, 36, 1, 2
    _common.finish("modular_serving", arguments, run(arguments), to_markdown)


if __name__ == "__main__":
    main()
