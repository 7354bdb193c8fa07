"""How fast this machine is: the operations a plan counted, timed one at a time, and what each costs beside its kernel.

    seconds(work) = sum over kernels k of  n_k t_k  +  (operations) c

t_k is measured with operands of the counted shapes, as many copies of them as the work keeps in use, so that a kernel
finds its operands where it would find them in the run. c is what an operation costs in Python and in PyTorch's own
book-keeping: it is measured once, on a fixed small model that is no model of the plan, as the part of its time that its
kernels leave unexplained. No model of the plan is run.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from weft.corpora.source import ArraySource
from weft.mixture.loader import MixtureLoader
from weft.mixture.sampler import MixtureSampler
from weft.models.hf import token_losses
from weft.pipeline.planning.trace import Kernel, Shape, Work, record, shapes_only
from weft.training.config import TrainingConfig
from weft.training.loop import adamw
from weft.training.meter import DomainMeter

Kind = Literal["forward", "step", "optimizer"]
"""Without gradient; forward with gradient and backward; optimizer."""
Clock = Callable[[], float]

KERNEL_SECONDS = 0.01
"""Spent on one kernel."""
LARGEST_FLOPS, LARGEST_BYTES = 4e9, 1 << 28
"""A larger kernel is timed with fewer rows, and its time taken in proportion."""
COPIES = 12
"""Sets of operands a kernel is timed on in turn, at most."""

_OTHER = "other operations"


@dataclass
class Calibration:
    """This machine's speed, measured as it is asked for and kept.

    Args:
        clock: seconds; processor time is better where other work shares the machine and there is one thread.

    Attributes:
        kernels: seconds of every kernel timed so far, by key and copies of operands.
        overheads: c by kind of work.
        loops: seconds of a training step beside the model, by batch, length, micro-batches and domains.
        token: seconds of `generate` per token beside the model's pass; None: not measured yet.
        failed: kernels that could not be run alone; they are taken by their bytes.
    """

    clock: Clock = time.perf_counter
    kernels: dict[tuple[str, int], float] = field(default_factory=dict)
    overheads: dict[Kind, float] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    loops: dict[tuple[int, ...], float] = field(default_factory=dict)
    token: float | None = None
    _bytes_per_second: float | None = None

    def kernel_seconds(self, key: str, kernel: Kernel, in_use: float) -> float:
        """t_k of one kernel of a work that has so many bytes in use."""
        copies = max(1, min(COPIES, round(in_use / max(1.0, kernel.bytes))))
        copies = 1 << (copies.bit_length() - 1)
        if (key, copies) not in self.kernels:
            self.kernels[key, copies] = self._time(key, kernel, copies)
        return self.kernels[key, copies]

    def seconds(self, work: Work, kind: Kind) -> dict[str, float]:
        """Time of a work by what it goes into: matrix products, other operations, overhead."""
        found = {"matrix products": 0.0, _OTHER: 0.0}
        for key, count in work.kernels.items():
            kernel = work.examples[key]
            part = "matrix products" if kernel.flops else _OTHER
            found[part] += count * self.kernel_seconds(key, kernel, work.peak)
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
            source = ArraySource(np.zeros(32 * (length + 1), dtype=np.int64))
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
            self.loops[key] = statistics.median(times)
        return self.loops[key]

    def token_seconds(self) -> float:
        """What `generate` costs per token beside the model's pass, measured on the fixed small model."""
        if self.token is None:
            with torch.random.fork_rng(devices=[]):
                model = LlamaForCausalLM(_reference_config()).eval()
            prompt = torch.ones(1, 8, dtype=torch.int64)
            generating, passes = [], []
            for _ in range(5):
                generating.append(self._spent(lambda: _generate(model, prompt, 24)) / 24)
                passes.append(self._spent(lambda: _pass_by_pass(model, prompt, 24)) / 24)
            self.token = max(0.0, statistics.median(generating[1:]) - statistics.median(passes[1:]))
        return self.token

    def _spent(self, work: Callable[[], Any]) -> float:
        start = self.clock()
        work()
        return self.clock() - start

    # -- kernels ------------------------------------------------------------------------------------------------

    def _time(self, key: str, kernel: Kernel, copies: int) -> float:
        part = min(1.0, LARGEST_FLOPS / max(1.0, kernel.flops), LARGEST_BYTES / max(1.0, kernel.bytes))
        if part < 1.0:
            smaller = _with_fewer_rows(kernel, part)
            if smaller is None:
                return kernel.bytes / self.bytes_per_second()
            kernel, part = smaller
            copies = 1
        try:
            with torch.no_grad():
                return self._run(kernel, copies) / part
        except (RuntimeError, IndexError, TypeError, ValueError) as error:
            self.failed[key] = str(error)
            return kernel.bytes / part / self.bytes_per_second()

    def _run(self, kernel: Kernel, copies: int) -> float:
        operands = [_operands(kernel) for _ in range(copies)]
        function = kernel.function
        for args, kwargs in operands[:2]:
            function(*args, **kwargs)
        start = self.clock()
        args, kwargs = operands[-1]
        function(*args, **kwargs)
        once = max(self.clock() - start, 1e-7)
        repeats = max(1, min(200, int(KERNEL_SECONDS / 5 / once)))
        found = []
        place = 0
        for _ in range(5 if once < KERNEL_SECONDS else 2):
            start = self.clock()
            for _ in range(repeats):
                args, kwargs = operands[place]
                place = (place + 1) % copies
                function(*args, **kwargs)
            found.append((self.clock() - start) / repeats)
        return statistics.median(found)

    def bytes_per_second(self) -> float:
        """Of a plain copy in memory, read and written."""
        if self._bytes_per_second is None:
            source = torch.zeros(1 << 23)
            shape = Shape(tuple(source.shape), (1,), source.dtype)
            copy = Kernel(torch.ops.aten.clone.default, (shape,), {}, 0.0, 2.0 * shape.bytes)
            self._bytes_per_second = copy.bytes / self._run(copy, 2)
        return self._bytes_per_second

    # -- what an operation costs beside its kernel ----------------------------------------------------------------

    def _measure_overheads(self) -> None:
        """By the fixed small model: its time, less that of its kernels, over its operations."""
        tokens = torch.zeros(2, 9, dtype=torch.int64)
        config = _reference_config()
        with torch.random.fork_rng(devices=[]):
            for kind, work, seconds in self._reference(config, tokens):
                alone = sum(
                    count * self.kernel_seconds(key, work.examples[key], 0.0) for key, count in work.kernels.items()
                )
                self.overheads[kind] = max(0.0, seconds - alone) / max(1.0, work.operations)

    def _reference(self, config: LlamaConfig, tokens: Tensor) -> list[tuple[Kind, Work, float]]:
        with shapes_only():
            model = LlamaForCausalLM(config)
            shadows = _parts(model, tokens)
            works = {kind: [record(part) for _ in range(2)][-1] for kind, part in shadows.items()}
        real = _parts(LlamaForCausalLM(config), tokens)
        times: dict[Kind, list[float]] = {kind: [] for kind in real}
        for _ in range(12):
            for kind, part in real.items():
                start = self.clock()
                part()
                times[kind].append(self.clock() - start)
        return [(kind, works[kind], statistics.median(times[kind][2:])) for kind in real]


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


def _operands(kernel: Kernel) -> tuple[Any, Any]:
    """Arguments of the shapes a kernel was counted with; whole numbers are 0, which every index may be."""

    def make(leaf: Any) -> Any:
        if not isinstance(leaf, Shape):
            return leaf
        tensor = torch.empty_strided(leaf.size, leaf.stride, dtype=leaf.dtype)
        if leaf.dtype.is_floating_point:
            return tensor.fill_(0.5)
        return tensor.zero_()

    result: tuple[Any, Any] = tree_map(make, (kernel.args, kernel.kwargs))
    return result


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
