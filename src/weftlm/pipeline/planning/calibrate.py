"""How fast this machine is: the operations a plan counted, timed one at a time, and what each costs beside its kernel.

    seconds(work) = sum over kernels k of  n_k t_k  +  (operations) c

t_k is measured with operands of the counted shapes, kernels in turn. c is what an operation costs in Python and in
PyTorch's own book-keeping: it is measured once, on a fixed small model that is no model of the plan, as the part of its
time that its kernels leave unexplained. No model of the plan is run.
"""

from __future__ import annotations

import functools
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from weftlm.corpora.source import ArraySource
from weftlm.gating.experts import ExpertPool, Member
from weftlm.gating.modular_lm import ModularLM
from weftlm.gating.prefix_gate import PrefixGate
from weftlm.mixture.loader import MixtureLoader
from weftlm.mixture.sampler import MixtureSampler
from weftlm.models.hf import token_losses
from weftlm.pipeline.planning.counts import Counted
from weftlm.pipeline.planning.hardware import resident_bytes
from weftlm.pipeline.planning.trace import Kernel, Shape, Work, record, shapes_only
from weftlm.training.alignment import ShadowProbe
from weftlm.training.config import TrainingConfig
from weftlm.training.loop import adamw
from weftlm.training.meter import DomainMeter

Kind = Literal["forward", "step", "optimizer", "decode"]
"""Without gradient; forward with gradient and backward; optimizer; one token behind a cache."""
Clock = Callable[[], float]

LARGEST_FLOPS, LARGEST_BYTES = 4e9, 1 << 28
"""A larger kernel is timed with fewer rows, and its time taken in proportion."""
TOGETHER_BYTES, SECONDS_TOGETHER = 1 << 30, 1.5
"""Operands of the kernels that are timed in turn, and about how long their rounds take."""
LEAST_ROUNDS, MOST_ROUNDS = 4, 25
REFERENCE, TOKENS, TURNS = (2, 9), 24, 6
"""Token ids of a batch of the fixed small model, how many it generates, and how often it is timed."""

_OTHER = "other operations"


@dataclass
class Calibration:
    """This machine's speed, measured as it is asked for and kept.

    Args:
        clock: seconds; processor time is better where other work shares the machine and there is one thread.

    Attributes:
        kernels: seconds of every kernel timed so far, by its key in `Work.kernels`.
        overheads: c by kind of work.
        loops: seconds of a training step beside the model, by batch, length, micro-batches and domains.
        resident: bytes this process held before anything was timed: Python and the libraries.
        token: seconds of `generate` per token beside the model's pass; None: not measured yet.
        gate: seconds of a gated model beside its experts' passes, per token generated and per token of a prompt; None:
            not measured yet.
        probe: seconds of a shadow probe per module and micro-batch beside its operations; None: not measured yet.
        failed: kernels that could not be run alone; they are taken by their bytes.
    """

    clock: Clock = time.perf_counter
    kernels: dict[str, float] = field(default_factory=dict)
    overheads: dict[Kind, float] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    loops: dict[tuple[int, ...], float] = field(default_factory=dict)
    token: float | None = None
    gate: tuple[float, float] | None = None
    probe: float | None = None
    resident: float = field(default_factory=resident_bytes)
    _bytes_per_second: float | None = None

    def seconds(self, work: Work, kind: Kind) -> dict[str, float]:
        """Time of a work by what it goes into: matrix products, other operations, overhead."""
        self.measure(work.examples)
        found = {"matrix products": 0.0, _OTHER: 0.0}
        for key, count in work.kernels.items():
            part = "matrix products" if work.examples[key].flops else _OTHER
            found[part] += count * self.kernels[key]
        return {**found, "overhead": self.overhead(kind) * work.operations}

    def overhead(self, kind: Kind) -> float:
        """c, seconds per operation."""
        if kind not in self.overheads:
            self._measure_overheads()
        return self.overheads[kind]

    def loop_seconds(self, batch: int, length: int, micro_batches: int, domains: int = 8) -> float:
        """What a step of the training loop costs beside the model: drawing and reading the batch, metering losses.

        Measured with the loop's own loader and meter, on made-up tokens.
        """
        key = (batch, length, micro_batches, domains)
        if key not in self.loops:
            few = min(domains, 64)
            source = ArraySource(np.zeros(32 * length + 1, dtype=np.int64))
            sampler = MixtureSampler([32] * few, batch, 0)
            loader = MixtureLoader([source] * few, sampler, length)
            meter = DomainMeter(few, torch.device("cpu"))
            losses_BT = torch.zeros(-(-batch // micro_batches), length)
            domains_B = torch.zeros(len(losses_BT), dtype=torch.int64)
            times = []
            for _ in range(8):
                start = self.clock()
                loader.next()
                for _ in range(micro_batches):
                    meter.add(domains_B, losses_BT, None)
                times.append(self.clock() - start)
            loader.close()
            self.loops[key] = typical(times)
        return self.loops[key]

    def token_seconds(self) -> float:
        """What `generate` costs per token beside the model's pass, measured on the fixed small model."""
        if self.token is None:
            with torch.random.fork_rng(devices=[]):
                model = LlamaForCausalLM(_reference_config()).eval()
            prompt = torch.ones(1, 8, dtype=torch.int64)
            generating, passes = [], []
            for _ in range(5):
                generating.append(self._spent(lambda: _generate(model, prompt, TOKENS)) / TOKENS)
                passes.append(self._spent(lambda: _pass_by_pass(model, prompt, TOKENS)) / TOKENS)
            self.token = max(0.0, typical(generating) - typical(passes))
        return self.token

    def gate_seconds(self) -> tuple[float, float]:
        """What a gate costs beside its experts' passes, measured on the fixed small model.

        Returns:
            seconds per token that is generated, and per token of a prompt.
        """
        if self.gate is None:
            with torch.random.fork_rng(devices=[]):
                model = LlamaForCausalLM(_reference_config()).eval()
            pool = ExpertPool([Member(str(number), model) for number in range(2)])
            gated = ModularLM(pool, PrefixGate.of([0.5, 0.5]))
            short, long = torch.ones(1, 8, dtype=torch.int64), torch.ones(1, 8 * TOKENS, dtype=torch.int64)
            found: list[list[float]] = [[], [], [], []]
            for _ in range(5):
                for place, (served, prompt, tokens) in enumerate(
                    [(gated, short, TOKENS), (model, short, TOKENS), (gated, long, 1), (model, long, 1)]
                ):
                    rows = prompt.repeat(len(pool), 1) if served is model else prompt
                    found[place].append(self._spent(lambda s=served, r=rows, t=tokens: _generate(s, r, t)))  # type: ignore[misc]
            mixed, alone, read, read_alone = (typical(each) for each in found)
            token = max(0.0, mixed - alone) / TOKENS
            self.gate = token, max(0.0, read - read_alone - token) / long.shape[1]
        return self.gate

    def shadow_seconds(self) -> float:
        """What a shadow probe costs per module and micro-batch beside the operations that are counted of it."""
        if self.probe is None:
            with torch.random.fork_rng(devices=[]):
                model = LlamaForCausalLM(_reference_config())
            tokens = torch.zeros(*REFERENCE, dtype=torch.int64)
            direction = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
            plain, probed = [], []

            def step(probe: ShadowProbe | None) -> None:
                if probe is not None:
                    probe.begin(len(tokens))
                token_losses(model, tokens).mean().backward()
                if probe is not None:
                    probe.dots(torch.full((len(tokens),), 1.0 / len(tokens)))

            for _ in range(8):
                plain.append(self._spent(lambda: step(None)))
                with ShadowProbe(model, direction) as probe:
                    probed.append(self._spent(lambda probe=probe: step(probe)))  # type: ignore[misc]
            counted = Counted(model.config)
            known = sum(self.seconds(counted.shadow(REFERENCE[0], REFERENCE[1] - 1), "forward").values())
            extra = typical(probed) - typical(plain) - known
            self.probe = max(0.0, extra) / counted.sizes.modules
        return self.probe

    def _spent(self, work: Callable[[], Any]) -> float:
        start = self.clock()
        work()
        return self.clock() - start

    # -- kernels ------------------------------------------------------------------------------------------------

    def measure(self, kernels: Mapping[str, Kernel]) -> None:
        """Time those not timed yet: one call of each in turn, round after round; see `typical`.

        In turn, because a run does not call one kernel again and again either: it finds its operands, and the
        processor its instructions, where others have been at work.
        """
        ready: list[tuple[str, Kernel, float]] = []
        for key, kernel in kernels.items():
            if key in self.kernels:
                continue
            part = min(1.0, LARGEST_FLOPS / max(1.0, kernel.flops), LARGEST_BYTES / max(1.0, kernel.bytes))
            smaller = (kernel, 1.0) if part == 1.0 else _with_fewer_rows(kernel, part)
            if smaller is None:
                self.kernels[key] = kernel.bytes / self.bytes_per_second()
            else:
                ready.append((key, *smaller))
        while ready:
            some: list[tuple[str, Kernel, float]] = []
            while ready and (not some or sum(kernel.bytes for _, kernel, _ in [*some, ready[-1]]) < TOGETHER_BYTES):
                some.append(ready.pop())
            some.reverse()
            self._time(some)

    @torch.no_grad()
    def _time(self, kernels: Sequence[tuple[str, Kernel, float]]) -> None:
        calls: list[tuple[str, Callable[[], Any], float]] = []
        for key, kernel, part in kernels:
            call = _call(kernel)
            try:
                call()
            except (RuntimeError, IndexError, TypeError, ValueError) as error:
                self.failed[key] = str(error)
                self.kernels[key] = kernel.bytes / part / self.bytes_per_second()
            else:
                calls.append((key, call, part))
        times: list[list[float]] = [[] for _ in calls]
        started = self.clock()
        rounds = 0
        while rounds < LEAST_ROUNDS or (rounds < MOST_ROUNDS and self.clock() - started < SECONDS_TOGETHER):
            rounds += 1
            for (_, call, _), found in zip(calls, times, strict=True):
                start = self.clock()
                call()
                found.append(self.clock() - start)
        asking = self._asking()
        for (key, _, part), found in zip(calls, times, strict=True):
            self.kernels[key] = max(0.0, typical(found) - asking) / part

    def _asking(self) -> float:
        """Seconds that asking the clock takes."""
        start = self.clock()
        for _ in range(100):
            self.clock()
        return (self.clock() - start) / 101

    def bytes_per_second(self) -> float:
        """Of a plain copy in memory, read and written."""
        if self._bytes_per_second is None:
            source = torch.zeros(1 << 23)
            shape = Shape(tuple(source.shape), (1,), source.dtype)
            copy = Kernel(torch.ops.aten.clone.default, (shape,), {}, 0.0, 2.0 * shape.bytes)
            call = _call(copy)
            call()
            self._bytes_per_second = copy.bytes / typical([self._spent(call) for _ in range(5)])
        return self._bytes_per_second

    # -- what an operation costs beside its kernel ----------------------------------------------------------------

    def _measure_overheads(self) -> None:
        """By the fixed small model: its time, less that of its kernels, over its operations.

        Kernels and model are timed in turn, several times over, so that both meet the machine alike.
        """
        tokens, prompt = torch.zeros(*REFERENCE, dtype=torch.int64), torch.ones(1, 8, dtype=torch.int64)
        config = _reference_config()
        with shapes_only():
            shadows = _parts(LlamaForCausalLM(config), tokens)
            works = {kind: [record(part) for _ in range(2)][-1] for kind, part in shadows.items()}
        works["decode"] = Counted(config).decode(1, len(prompt[0]) + TOKENS // 2)
        with torch.random.fork_rng(devices=[]):
            model = LlamaForCausalLM(config)
        parts = dict(_parts(model, tokens))
        found: dict[Kind, list[float]] = {kind: [] for kind in works}
        for turn in range(TURNS):
            for kind, work in works.items():
                self.kernels = {key: value for key, value in self.kernels.items() if key not in work.examples}
                self.measure(work.examples)
                alone = sum(count * self.kernels[key] for key, count in work.kernels.items())
                if kind == "decode":
                    seconds = self._spent(lambda: _pass_by_pass(model, prompt, TOKENS)) / TOKENS
                else:
                    seconds = typical([self._spent(parts[kind]) for _ in range(8)])
                if turn:
                    found[kind].append(max(0.0, seconds - alone) / work.operations)
        self.overheads = {kind: statistics.median(values) for kind, values in found.items()}


def typical(seconds: Sequence[float]) -> float:
    """The mean without the first, which warms up, and the slowest tenth: plans add up, and means do."""
    rest = sorted(seconds[1:] if len(seconds) > 1 else seconds)
    kept = rest[: max(1, len(rest) - math.ceil(len(rest) / 10))]
    return sum(kept) / len(kept)


def _reference_config() -> LlamaConfig:
    """The fixed small model: all its kernels take next to no time."""
    return LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=4, num_attention_heads=2,
        num_key_value_heads=2, tie_word_embeddings=True, pad_token_id=0, eos_token_id=None, bos_token_id=None,
    )  # fmt: skip


def _generate(model: Any, prompt: Tensor, tokens: int) -> None:
    model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=tokens, do_sample=False)


@torch.no_grad()
def _pass_by_pass(model: Any, prompt: Tensor, tokens: int) -> None:
    cache = DynamicCache(config=model.config)
    model(input_ids=prompt, past_key_values=cache, use_cache=True, logits_to_keep=1)
    for _ in range(tokens - 1):
        model(input_ids=prompt[:, :1], past_key_values=cache, use_cache=True)


def _parts(model: nn.Module, tokens: Tensor) -> Mapping[Kind, Callable[[], Any]]:
    optimizer = adamw(dict(model.named_parameters()), TrainingConfig(steps=1))

    def forward() -> Tensor:
        with torch.no_grad():
            return token_losses(model, tokens)

    def step() -> None:
        token_losses(model, tokens).mean().backward()

    def optimize() -> None:
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return {"forward": forward, "step": step, "optimizer": optimize}


def _call(kernel: Kernel) -> Callable[[], Any]:
    """A kernel with operands of the shapes it was counted with; whole numbers are 0, which every index may be."""

    def make(leaf: Any) -> Any:
        if not isinstance(leaf, Shape):
            return leaf
        tensor = torch.empty_strided(leaf.size, leaf.stride, dtype=leaf.dtype)
        if leaf.dtype.is_floating_point:
            return tensor.fill_(0.5)
        return tensor.zero_()

    args, kwargs = tree_map(make, (kernel.args, kernel.kwargs))
    return functools.partial(kernel.function, *args, **kwargs)


def _with_fewer_rows(kernel: Kernel, part: float) -> tuple[Kernel, float] | None:
    """A matrix product with fewer rows, and what part of the work it is; None for other kernels."""
    shapes = [leaf for leaf in kernel.args if isinstance(leaf, Shape)]
    if kernel.name not in ("aten.mm.default", "aten.addmm.default") or len(shapes) < 2:
        return None
    left, right = shapes[-2:]
    (rows, inner), columns = left.size, right.size[1]
    share = max(part, 64 / max(rows, columns), 1e-9)
    if rows >= columns:
        rows = max(1, int(rows * share))
        left = Shape((rows, inner), _strides(left, rows, 0), left.dtype)
    else:
        columns = max(1, int(columns * share))
        right = Shape((inner, columns), _strides(right, columns, 1), right.dtype)
    flops = 2.0 * rows * inner * columns
    smaller = Kernel(torch.ops.aten.mm.default, (left, right), {}, flops, float(left.bytes + right.bytes))
    return smaller, flops / kernel.flops


def _strides(shape: Shape, size: int, axis: int) -> tuple[int, int]:
    """Strides of a matrix whose one axis got another size, in the same layout."""
    other = shape.size[1 - axis]
    contiguous = shape.stride[1] == 1
    if axis == 0:
        return (other, 1) if contiguous else (1, size)
    return (size, 1) if contiguous else (1, other)
