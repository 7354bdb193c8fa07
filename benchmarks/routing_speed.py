"""What routing every token among N experts costs beside the base model's forward pass, against what else there is.

Llama-type models with random weights, LoRA adapters of rank 16 on all linears of attention and MLP, random gates, two
experts per token. Random gates prefer nobody, so that tokens spread over nearly all experts, whose factors must then be
read: meant as the hard case. They spread evenly before attention and less so before the MLP, where a random model's
tokens resemble each other; how even it is stands below each table. "Skewed" shortens most gates on top of that.

    prefill    one sequence of 512 tokens
    decode 1   the next token of one sequence, behind a KV cache of 512 tokens
    decode 32  the same for 32 sequences at once

In each round every contestant runs once on the same tokens, in turns, with the base model first and last; a figure is
the median over rounds of (its time) / (mean of the round's two base runs), then the median over seeds. Only the last
position's logits are asked for, as in generation, so that the head does not hide the modules.

| contestant         | what it is                                                                                 |
|--------------------|--------------------------------------------------------------------------------------------|
| weftlm               | RoutedModel, router `phatgoose`, k = 2: every token and module chooses                     |
| PEFT Arrow         | an ArrowConfig router of PEFT, top_k = 2, over the same adapters: every token and module   |
| PEFT adapter_names | PEFT's batches of several adapters: one adapter for a whole sequence, named by the caller. |
|                    | It does not route and cannot give tokens of a sequence different experts                   |
| dense pool         | all experts' factors as two matrices, [u A'] masked by the weights, then B'                |

PEFT Arrow builds a tensor of tokens x experts x output width; where it would need more than the memory allowed, that is
recorded and it is not run. Neither of PEFT's is run with more adapters than `--peft-up-to`, because the time PEFT takes
to add them grows with the square of their number. Memory: processes of their own that build a contestant and run it
once.
"""

from __future__ import annotations

import argparse
import copy
import re
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import _common
import peft
import torch
from peft.tuners.lora.config import ArrowConfig
from torch import Tensor, nn
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from weftlm.experts.expert import BaseReference, Expert, Gate, LoRAExpert, LoRAFactors
from weftlm.routing.pool import INSTALLED
from weftlm.routing.routed_model import RoutedModel

RANK, K, VOCABULARY, CONTEXT = 16, 2, 8192, 512
WORKLOADS = {"prefill": (1, CONTEXT), "decode 1": (1, 1), "decode 32": (32, 1)}
"""Sequences and new tokens of each."""
FEW = "weftlm, 8 experts"
BASE, ARROW, NAMES, DENSE = "base", "PEFT Arrow", "PEFT adapter_names", "dense pool"
EXTRA_MEMORY = 8 << 30
PREFILL_GOAL, GROWTH_GOAL, ARROW_GOAL = 1.6, 1.25, 10.0


# -- models and experts -----------------------------------------------------------------------------------------------


def build_base(hidden: int, layers: int, seed: int, device: torch.device) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=hidden, intermediate_size=round(hidden * 8 / 3 / 16) * 16,
        num_hidden_layers=layers, num_attention_heads=hidden // 64, num_key_value_heads=hidden // 64,
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


@dataclass
class Pool:
    """Random experts: one tensor per module, of which every contestant takes what it needs."""

    A: dict[str, Tensor]  # E R I
    B: dict[str, Tensor]  # E O R
    gates: dict[str, Tensor]  # E I

    @classmethod
    def draw(cls, model: nn.Module, experts: int, seed: int, *, skewed: bool = False) -> Pool:
        random = torch.Generator().manual_seed(seed)
        # Standardisation keeps a gate's direction; its length survives only as far as the variance falls below epsilon,
        # which is what makes later experts lose here.
        length = torch.arange(1, experts + 1, dtype=torch.float32)[:, None] ** (-0.3 if skewed else 0.0)
        shrink = 1e-5**0.5 * length / (1.0 - (0.999 * length) ** 2).sqrt() if skewed else length
        A, B, gates = {}, {}, {}
        for name, module in linears(model).items():
            A[name] = torch.randn(experts, RANK, module.in_features, generator=random) * 0.01
            B[name] = torch.randn(experts, module.out_features, RANK, generator=random) * 0.01
            gates[name] = torch.randn(experts, module.in_features, generator=random) * shrink
        return cls(A, B, gates)

    def experts(self, count: int) -> list[Expert]:
        base = BaseReference("random")
        return [
            Expert(
                LoRAExpert(
                    f"expert-{place}", base,
                    {name: LoRAFactors(self.A[name][place], self.B[name][place], 1 / RANK) for name in self.A}, {},
                ),
                Gate({name: gates[place] for name, gates in self.gates.items()}),
            )
            for place in range(count)
        ]  # fmt: skip


def build_weftlm(model: LlamaForCausalLM, pool: Pool, count: int) -> RoutedModel:
    return RoutedModel(twin(model), pool.experts(count), {"router": "phatgoose", "k": K})


def build_peft(model: LlamaForCausalLM, pool: Pool, count: int) -> peft.PeftModel:
    """PEFT's model over the same adapters, Arrow's router active, as `create_arrow_model` makes it from files.

    Forward passes given `adapter_names` use those and no router.
    """
    targets = sorted({name.rpartition(".")[2] for name in pool.A})
    names = [f"task_{place}" for place in range(count)]

    def config(**more: Any) -> peft.LoraConfig:
        return peft.LoraConfig(r=RANK, lora_alpha=1, target_modules=targets, init_lora_weights=False, **more)

    adapted = peft.PeftModel(twin(model), config(), adapter_name=names[0], low_cpu_mem_usage=True)
    for name in names[1:]:
        adapted.add_adapter(name, config(), low_cpu_mem_usage=True)
    for name, A in pool.A.items():
        layer = adapted.base_model.model.get_submodule(name)
        for place, adapter in enumerate(names):
            for factors, source in ((layer.lora_A, A), (layer.lora_B, pool.B[name])):
                weight = source[place].to(layer.weight)  # a view of the pool where nothing need be moved
                factors[adapter].weight = nn.Parameter(weight, requires_grad=False)
    router = ArrowConfig(top_k=min(K, count))
    router.task_adapter_names = names
    router.gks_adapter_names = []
    adapted.add_adapter("arrow_router", config(arrow_config=router))
    adapted.set_adapter("arrow_router")
    return adapted.eval()


class DensePool(nn.Module):
    """All experts on every token, those not chosen with weight 0: two large products and no bookkeeping."""

    def __init__(self, base: nn.Linear, A_ERI: Tensor, B_EOR: Tensor, gates_EI: Tensor) -> None:
        super().__init__()
        self.base = base
        like = base.weight
        experts, _, width = A_ERI.shape
        self.A_XI = A_ERI.reshape(experts * RANK, width).to(like)
        self.B_XO = (B_EOR.transpose(1, 2) / RANK).reshape(experts * RANK, -1).to(like)
        centred_EI = gates_EI - gates_EI.mean(dim=-1, keepdim=True)
        self.v_EI = (centred_EI / (gates_EI.var(dim=-1, correction=0, keepdim=True) + 1e-5).sqrt()).to(like.device)

    def forward(self, u_BTI: Tensor) -> Tensor:
        read_BTI = u_BTI.float()
        products_BTE = read_BTI @ self.v_EI.T
        best_BTK, place_BTK = products_BTE.topk(min(K, self.v_EI.shape[0]), dim=-1)
        rstd_BT1 = torch.native_layer_norm(read_BTI, [read_BTI.shape[-1]], None, None, 1e-5)[2]
        chosen_BTK = torch.softmax(best_BTK * rstd_BT1 * read_BTI.shape[-1] ** -0.5, dim=-1)
        weights_BTE = torch.zeros_like(products_BTE).scatter_(-1, place_BTK, chosen_BTK)
        h_BTER = (u_BTI @ self.A_XI.T).unflatten(-1, (-1, RANK)) * weights_BTE[..., None].to(u_BTI.dtype)
        return self.base(u_BTI) + h_BTER.flatten(-2) @ self.B_XO


def build_dense(model: LlamaForCausalLM, pool: Pool, count: int) -> PreTrainedModel:
    dense = twin(model)
    for name, module in linears(dense).items():
        parent, _, child = name.rpartition(".")
        replaced = DensePool(module, pool.A[name][:count], pool.B[name][:count], pool.gates[name][:count])
        setattr(dense.get_submodule(parent), child, replaced)
    return dense


def arrow_bytes(model: LlamaForCausalLM, tokens: int, experts: int) -> int:
    """What one module of PEFT Arrow holds at once: y and y * scale, each tokens x experts x width, and the stacks."""
    size = next(model.parameters()).element_size()
    return max(
        2 * tokens * experts * module.out_features * size
        + experts * RANK * (module.in_features + module.out_features + tokens) * size
        for module in linears(model).values()
    )


# -- workloads --------------------------------------------------------------------------------------------------------


class Workload:
    """Tokens, and a cache for those that continue a text."""

    def __init__(self, name: str, model: LlamaForCausalLM, seed: int) -> None:
        self.batch, self.tokens = WORKLOADS[name]
        random = torch.Generator().manual_seed(seed)
        shape = (self.batch, self.tokens)
        self.ids = torch.randint(VOCABULARY, shape, generator=random).to(model.device)
        self.continues = self.tokens == 1
        self.cache = DynamicCache(config=model.config)
        if self.continues:
            config = model.config
            shape = (self.batch, config.num_key_value_heads, CONTEXT, config.head_dim)
            for layer in range(config.num_hidden_layers):
                keys, values = torch.randn(2, *shape, generator=random).to(model.device, model.dtype)
                self.cache.update(keys, values, layer)

    def run(self, model: Callable[..., Any], **more: Any) -> Tensor:
        """The last position's logits of one forward pass; the cache is cut back to what it was."""
        if self.continues:
            out = model(input_ids=self.ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1, **more)
            self.cache.crop(-1)
        else:
            out = model(input_ids=self.ids, use_cache=False, logits_to_keep=1, **more)
        logits: Tensor = out.logits
        return logits


def seconds(work: Callable[[], Any], times: int, device: torch.device) -> float:
    """Mean seconds of `times` runs."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(times):
        work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / times


def in_turns(
    contestants: Mapping[str, Callable[[], Any]], rounds: int, device: torch.device, *, turn: float, slow: float
) -> dict[str, Any]:
    """Ratios to the base by contestant, one per round; those slower than `slow` seconds take part in one round."""
    times = {}
    for name, work in contestants.items():
        once = seconds(work, 1, device)
        if once < slow:  # the first run was the warm-up
            once = seconds(work, 1, device)
        times[name] = (max(1, min(50, int(turn / once))), once)
    ratios: dict[str, list[float]] = {name: [] for name in contestants if name != BASE}
    bases = []
    for index in range(rounds):
        before = seconds(contestants[BASE], times[BASE][0], device)
        found = {
            name: seconds(work, times[name][0], device)
            for name, work in contestants.items()
            if name != BASE and (index == 0 or times[name][1] < slow)
        }
        base = (before + seconds(contestants[BASE], times[BASE][0], device)) / 2
        bases.append(base)
        for name, value in found.items():
            ratios[name].append(value / base)
    return {"ratios": ratios, "base_seconds": bases}


# -- one cell of the table --------------------------------------------------------------------------------------------


def measure(
    hidden: int, layers: int, count: int, workloads: Sequence[str], seed: int, arguments: argparse.Namespace,
    device: torch.device, *, skewed: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Every contestant with `count` experts on each workload, and weftlm with 8 beside it, for one seed."""
    model = build_base(hidden, layers, seed, device)
    pool = Pool.draw(model, max(count, 8), seed, skewed=skewed)
    ours, few = build_weftlm(model, pool, count), build_weftlm(model, pool, 8)
    stacked = pointers(ours)
    dense = build_dense(model, pool, count)
    check_alike(ours, dense, Workload("prefill", model, seed))
    adapted = build_peft(model, pool, count) if count <= arguments.peft_up_to else None
    found: dict[str, Any] = {"does_not_fit": {}, "workloads": {}}
    for name in workloads:
        workload = Workload(name, model, seed)
        adapters = [f"task_{row % count}" for row in range(workload.batch)]
        contestants: dict[str, Callable[[], Any]] = {
            BASE: partial(workload.run, model),
            "weftlm": partial(workload.run, ours),
            FEW: partial(workload.run, few),
            DENSE: partial(workload.run, dense),
        }
        needed = arrow_bytes(model, workload.batch * workload.tokens, count)
        if adapted is not None:
            contestants[NAMES] = partial(workload.run, adapted, adapter_names=adapters)
            if needed <= EXTRA_MEMORY:
                contestants[ARROW] = partial(workload.run, adapted)
        if needed > EXTRA_MEMORY:
            found["does_not_fit"][name] = needed
        with torch.inference_mode():
            taken = in_turns(contestants, arguments.rounds, device, turn=arguments.turn, slow=arguments.slow)
        found["workloads"][name] = taken
        middle = {other: _common.spread(values).median for other, values in taken["ratios"].items()}
        shown = ", ".join(f"{other} {value:.2f}" for other, value in middle.items())
        _common.say(f"hidden {hidden}, {count} experts{' skewed' if skewed else ''}, {name}, seed {seed}: {shown}")
    found["stacks_stay"] = pointers(ours) == stacked
    found["busiest_tenth"] = busiest_tenth(ours, Workload("prefill", model, seed), count)
    return found


def check_alike(ours: RoutedModel, dense: PreTrainedModel, workload: Workload) -> None:
    """The two contestants that compute the same thing give the same logits.

    Raises:
        SystemExit: they do not.
    """
    with torch.inference_mode():
        mine, theirs = workload.run(ours).float(), workload.run(dense).float()
    error = float((mine - theirs).abs().max() / theirs.abs().max())
    if error > (0.1 if ours.dtype == torch.bfloat16 else 1e-3):
        raise SystemExit(f"the dense pool and weftlm differ by {error:.2g} of the largest logit: one of them is wrong")


def pointers(model: RoutedModel) -> dict[str, tuple[int, int]]:
    """Where the stacked factors of every module lie in memory."""
    return {
        target.name: (buffers["A_ERI"].data_ptr(), buffers["B_ERO"].data_ptr())
        for target in model.targets
        for buffers in [dict(model.model.get_submodule(f"{target.name}.{INSTALLED}").named_buffers())]
    }


def busiest_tenth(model: RoutedModel, workload: Workload, count: int) -> float:
    """Share of the assignments of a module that its busiest tenth of experts has; mean over modules."""
    shares: list[float] = []

    def record(target: Any, routing: Any) -> None:
        counts = torch.bincount(routing.experts_BTK.flatten(), minlength=count).sort(descending=True).values
        shares.append(float(counts[: max(1, count // 10)].sum() / counts.sum()))

    begin = model.switch.router.begin

    def begin_recorded(call: Any) -> None:
        call.record = record
        begin(call)

    model.switch.router.begin = begin_recorded  # type: ignore[method-assign]
    with torch.inference_mode():
        workload.run(model)
    model.switch.router.begin = begin  # type: ignore[method-assign]
    return sum(shares) / len(shares)


# -- memory -----------------------------------------------------------------------------------------------------------


def peak_bytes() -> int:
    """Peak resident memory of this process. Linux's ru_maxrss would count the parent's from before it was started."""
    status = Path("/proc/self/status")
    if status.exists():
        return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text()).group(1))  # type: ignore[union-attr]
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def run_for_memory(who: str, hidden: int, layers: int, count: int) -> None:
    """Build a contestant, note the peak, run one prefill, note it again."""
    device = torch.device("cpu")
    model = build_base(hidden, layers, 0, device)
    pool = Pool.draw(model, count, 0)
    makers: dict[str, Callable[[], Any]] = {
        BASE: lambda: model,
        "weftlm": lambda: build_weftlm(model, pool, count),
        DENSE: lambda: build_dense(model, pool, count),
        ARROW: lambda: build_peft(model, pool, count),
    }
    before = peak_bytes()
    contestant = makers[who]()
    loaded = peak_bytes()
    with torch.inference_mode():
        Workload("prefill", model, 0).run(contestant)
    print(before, loaded, peak_bytes())


def memory(hidden: int, layers: int, count: int) -> dict[str, Any]:
    model = build_base(hidden, layers, 0, torch.device("cpu"))
    factors = sum(4 * count * RANK * (one.in_features + one.out_features) for one in linears(model).values())
    found: dict[str, Any] = {"hidden": hidden, "layers": layers, "experts": count, "factors_bytes": factors, "who": {}}
    fits = arrow_bytes(model, CONTEXT, count) <= EXTRA_MEMORY
    for who in (BASE, "weftlm", DENSE, *((ARROW,) if fits else ())):
        command = [sys.executable, __file__, "--threads", "1", "--memory-of", who, str(hidden), str(layers), str(count)]
        loads, forwards = [], []
        for _ in range(3):
            text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            before, loaded, after = (int(value) for value in text.split())
            loads.append(loaded - before)
            forwards.append(after - loaded)
        found["who"][who] = {
            "at_load_bytes": _common.spread(loads).as_json(), "in_forward_bytes": _common.spread(forwards).as_json(),
        }  # fmt: skip
        _common.say(f"memory of {who}: {loads[0] / 2**20:.0f} MiB at load, {forwards[0] / 2**20:.0f} MiB in a forward")
    return found


# -- the whole --------------------------------------------------------------------------------------------------------


def arrow_and_weftlm(ratios: Mapping[str, Sequence[float]]) -> list[tuple[float, float]]:
    """Both over the base, in the rounds that Arrow took part in: the first, or all."""
    return list(zip(ratios[ARROW], ratios["weftlm"], strict=False))


def summary(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Over seeds, from the median over rounds of each."""
    workloads = {}
    for name in runs[0]["workloads"]:
        ratios = [run["workloads"][name]["ratios"] for run in runs]

        def over(
            value: Callable[[Mapping[str, Sequence[float]]], list[float]], among: Any = ratios
        ) -> dict[str, float]:
            return _common.spread([_common.spread(value(one)).median for one in among]).as_json()

        entry: dict[str, Any] = {
            "over_base": {who: over(lambda one, who=who: list(one[who])) for who in ratios[0]},
            "over_own_8": over(lambda one: [a / b for a, b in zip(one["weftlm"], one[FEW], strict=True)]),
            "base_seconds": _common.spread(
                [_common.spread(run["workloads"][name]["base_seconds"]).median for run in runs]
            ).as_json(),
        }
        if ARROW in ratios[0]:
            entry["arrow_over_weftlm"] = over(lambda one: [arrow / own for arrow, own in arrow_and_weftlm(one)])
            entry["arrow_extra_over_weftlm_extra"] = over(
                lambda one: [(arrow - 1) / max(own - 1, 1e-3) for arrow, own in arrow_and_weftlm(one)]
            )
        workloads[name] = entry
    return {
        "workloads": workloads,
        "does_not_fit": runs[0]["does_not_fit"],
        "stacks_stay": all(run["stacks_stay"] for run in runs),
        "busiest_tenth": _common.spread([run["busiest_tenth"] for run in runs]).as_json(),
    }


def goals(sizes: Mapping[str, Any], count: int) -> list[dict[str, Any]]:
    """Each goal with its figure and whether it is met, at `count` experts; by the median."""
    found: list[dict[str, Any]] = []

    def goal(what: str, spread: Mapping[str, float], limit: float, *, at_most: bool) -> None:
        met = spread["median"] <= limit if at_most else spread["median"] >= limit
        found.append(
            {"goal": what, "hidden": hidden, "measured": spread, "limit": limit, "at_most": at_most, "met": bool(met)}
        )

    for hidden, size in sizes.items():
        cell = size["experts"].get(str(count))
        if cell is None:
            continue
        prefill = cell["workloads"]["prefill"]
        goal(
            f"prefill with {count} experts over the base's", prefill["over_base"]["weftlm"], PREFILL_GOAL, at_most=True
        )
        goal(f"prefill with {count} experts over our own with 8", prefill["over_own_8"], GROWTH_GOAL, at_most=True)
        if "arrow_over_weftlm" in prefill:
            over, extra = prefill["arrow_over_weftlm"], prefill["arrow_extra_over_weftlm_extra"]
            goal(f"PEFT Arrow's prefill with {count} experts over ours", over, ARROW_GOAL, at_most=False)
            goal(f"the same of what is beyond the base's prefill, {count} experts", extra, ARROW_GOAL, at_most=False)
        found.append(
            {
                "goal": "no forward pass stacks factors again", "hidden": hidden, "measured": None, "limit": None,
                "at_most": None, "met": cell["stacks_stay"],
            }
        )  # fmt: skip
    return found


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    workloads = tuple(WORKLOADS)
    sizes: dict[str, Any] = {}
    for hidden in arguments.hidden:
        layers = 1 if hidden >= 2048 else 2
        cells = {}
        for count in arguments.experts:
            runs = [
                measure(hidden, layers, count, workloads, seed, arguments, device) for seed in range(arguments.seeds)
            ]
            cells[str(count)] = summary(runs)
        skewed = [
            measure(hidden, layers, max(arguments.experts_compared, 8), workloads, seed, arguments, device, skewed=True)
            for seed in range(arguments.seeds)
        ]
        parameters = sum(p.numel() for p in build_base(hidden, layers, 0, device).parameters())
        sizes[str(hidden)] = {
            "layers": layers, "parameters": parameters, "experts": cells, "skewed": summary(skewed),
            "skewed_experts": arguments.experts_compared,
        }  # fmt: skip
    return {
        "setting": {
            "rank": RANK, "k": K, "context": CONTEXT, "rounds": arguments.rounds, "seeds": arguments.seeds,
            "device": device.type, "dtype": "bfloat16" if device.type == "cuda" else "float32",
            "allowed_bytes": EXTRA_MEMORY, "peft_up_to": arguments.peft_up_to, "peft": metadata.version("peft"),
        },
        "experts_compared": arguments.experts_compared,
        "sizes": sizes,
        "memory": None if arguments.quick else memory(768, 2, arguments.experts_compared),
        "goals": goals(sizes, arguments.experts_compared),
    }  # fmt: skip


def to_markdown(record: Mapping[str, Any]) -> str:
    def show(spread: Mapping[str, float] | None, form: str = "{:.2f}", scale: float = 1.0) -> str:
        return "" if spread is None else _common.Spread(**spread).show(form, scale)  # type: ignore[arg-type]

    setting = record["setting"]
    lines = [
        "# Speed of routing", "", __doc__ or "",
        f"Ran on {setting['device']} in {setting['dtype']}"
        + ("." if setting["device"] == "cuda" else "; no CUDA device was present.")
        + f" {setting['rounds']} rounds, {setting['seeds']} seeds; PEFT {setting['peft']}.",
        "", "## Goals", "",
        _common.table(
            ["", "hidden size", "measured", "goal", "met"],
            [
                [
                    one["goal"], one["hidden"], show(one["measured"]),
                    "" if one["limit"] is None else f"{'≤' if one['at_most'] else '≥'} {one['limit']:g}",
                    "yes" if one["met"] else "no",
                ]
                for one in record["goals"]
            ],
        ),
    ]  # fmt: skip
    contestants = ["weftlm", DENSE, NAMES, ARROW]
    for hidden, size in record["sizes"].items():
        lines += [
            "",
            f"## Hidden size {hidden}: {size['layers']} layers, {size['parameters'] / 1e6:.0f}M parameters",
            "",
        ]
        lines += ["Times of the base model's forward, median (lowest .. highest):", ""]
        rows = []
        cells = [(count, cell) for count, cell in size["experts"].items()]
        cells.append((f"{size['skewed_experts']}, skewed", size["skewed"]))
        for workload in next(iter(size["experts"].values()))["workloads"]:
            for count, cell in cells:
                ratios = cell["workloads"][workload]["over_base"]
                shown = [show(ratios.get(who)) or "not run" for who in contestants]
                if workload in cell["does_not_fit"]:
                    shown[-1] = f"does not fit: {cell['does_not_fit'][workload] / 2**30:.1f} GiB"
                rows.append([workload, count, *shown, show(cell["workloads"][workload]["over_own_8"])])
        lines.append(_common.table(["workload", "experts", *contestants, "weftlm over its 8"], rows))
        even = size["experts"].get(str(record["experts_compared"]), next(reversed(size["experts"].values())))
        lines += [
            "",
            f"The busiest tenth of the experts has {show(even['busiest_tenth'], '{:.0f}', 100)} % of a module's "
            f"assignments, {show(size['skewed']['busiest_tenth'], '{:.0f}', 100)} % in the skewed case.",
        ]
    if record["memory"]:
        about = record["memory"]
        rows = [
            [who, show(one["at_load_bytes"], "{:.0f}", 2**-20), show(one["in_forward_bytes"], "{:.0f}", 2**-20)]
            for who, one in about["who"].items()
        ]
        lines += [
            "", f"## Memory: hidden size {about['hidden']}, {about['layers']} layers, {about['experts']} experts", "",
            f"The adapters' factors take {about['factors_bytes'] / 2**20:.0f} MiB; they were in memory before and stay "
            "there: PEFT works on them and stacks them in every forward pass, weftlm and the dense pool make a stacked "
            "copy when built. MiB beyond that:", "",
            _common.table(["", "when built", "more at the peak of a prefill"], rows),
        ]  # fmt: skip
    return "\n".join([*lines, "", _common.environment_lines(record)])


def main() -> None:
    flags = _common.parser((__doc__ or "").splitlines()[0])
    flags.add_argument("--hidden", type=int, nargs="+", default=[512, 768, 2048], help="hidden sizes")
    flags.add_argument("--experts", type=int, nargs="+", default=[1, 8, 36, 166, 512], help="numbers of experts")
    flags.add_argument("--experts-compared", type=int, default=166, help="number of experts that goals speak of")
    flags.add_argument(
        "--peft-up-to",
        type=int,
        default=166,
        help="more adapters than this PEFT is not given: adding one takes longer the more there are",
    )
    flags.add_argument("--rounds", type=int, default=7, help="rounds per seed")
    flags.add_argument("--turn", type=float, default=0.2, help="seconds of a contestant's turn, one forward at least")
    flags.add_argument(
        "--slow", type=float, default=3.0, help="forwards slower than this many seconds run in one round"
    )
    flags.add_argument("--memory-of", nargs=4, help=argparse.SUPPRESS)
    arguments = flags.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if arguments.memory_of:
        who, *numbers = arguments.memory_of
        run_for_memory(who, *(int(number) for number in numbers))
        return
    if arguments.quick:
        arguments.seeds, arguments.hidden, arguments.experts, arguments.experts_compared = 1, [128], [36], 36
        arguments.rounds, arguments.turn, arguments.slow = 3, 0.05, 1.0
    _common.finish("routing_speed", arguments, run(arguments), to_markdown)


if __name__ == "__main__":
    main()
