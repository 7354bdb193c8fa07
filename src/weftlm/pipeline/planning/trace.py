"""Counting work without doing it: a model runs on tensors that have shapes and no memory, and every operation is noted.

    work = record(lambda: loss(model, tokens).backward())

Nothing is allocated however large the model, and nothing is assumed of its architecture: parameters, operations, FLOPs,
bytes read and written, and the memory alive at each moment are those of the operations PyTorch would run.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count
from transformers import masking_utils


@dataclass(frozen=True)
class Shape:
    """A tensor argument of an operation, without its values."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """Of its elements; a broadcast axis counts once."""
        count = 1
        for size, stride in zip(self.size, self.stride, strict=True):
            count *= size if stride else 1
        return count * self.dtype.itemsize


@dataclass(frozen=True, eq=False)
class Kernel:
    """One operation with its arguments' shapes: what can be timed on its own.

    Attributes:
        function: the overload of PyTorch's operation.
        args, kwargs: its arguments, `Shape` in place of tensors.
        flops: multiplications and additions of matrix products and attention, 2 per multiply-add; 0 for all others.
        bytes: read and written.
    """

    function: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    flops: float
    bytes: float

    @property
    def name(self) -> str:
        """`aten.mm.default` and the like."""
        return str(self.function)


@dataclass(frozen=True)
class Work:
    """What a piece of a program does, in counts that do not depend on the machine.

    Attributes:
        flops: of matrix products and attention, 2 per multiply-add.
        bytes: read and written by all operations that move data.
        operations: all of them, views included: what costs time however small the tensors.
        kernels: operations that move data, by a key of name and shapes, with how often each runs.
        peak: bytes alive at the worst moment beyond those that were there before.
        kept: bytes alive at the end beyond those that were there before.
        examples: one `Kernel` for every key of `kernels`.
    """

    flops: float = 0.0
    bytes: float = 0.0
    operations: float = 0.0
    kernels: Mapping[str, float] = field(default_factory=dict)
    peak: float = 0.0
    kept: float = 0.0
    examples: Mapping[str, Kernel] = field(default_factory=dict, repr=False)

    @property
    def calls(self) -> float:
        """Operations that move data: kernels launched."""
        return sum(self.kernels.values())

    def __add__(self, other: Work) -> Work:
        """One after the other; the peak is the larger of the two."""
        keys = {**self.kernels, **other.kernels}
        return Work(
            self.flops + other.flops,
            self.bytes + other.bytes,
            self.operations + other.operations,
            {key: self.kernels.get(key, 0.0) + other.kernels.get(key, 0.0) for key in keys},
            max(self.peak, other.peak),
            self.kept + other.kept,
            {**self.examples, **other.examples},
        )

    def times(self, count: float) -> Work:
        """The same again and again; memory is as of once."""
        return Work(
            self.flops * count,
            self.bytes * count,
            self.operations * count,
            {key: value * count for key, value in self.kernels.items()},
            self.peak,
            self.kept,
            self.examples,
        )


def along(few: Work, more: Work, place: float) -> Work:
    """Work as a straight line: `few` at 0, `more` at 1, the answer at `place`.

    For counts that grow by the same amount with every layer.
    """

    def at(first: float, second: float) -> float:
        return max(0.0, first + place * (second - first))

    keys = {**few.kernels, **more.kernels}
    return Work(
        at(few.flops, more.flops),
        at(few.bytes, more.bytes),
        at(few.operations, more.operations),
        {key: at(few.kernels.get(key, 0.0), more.kernels.get(key, 0.0)) for key in keys},
        at(few.peak, more.peak),
        at(few.kept, more.kept),
        {**few.examples, **more.examples},
    )


@contextmanager
def shapes_only() -> Iterator[None]:
    """In this context tensors have shapes and take no memory; models are built and run on them.

    transformers looks at the values of position ids to see whether sequences are packed, and without values makes a
    mask that no run of weftlm makes: meanwhile it is told that none are.
    """
    known = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = lambda position_ids: None
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            yield
    finally:
        masking_utils.find_packed_sequence_indices = known


def record(run: Callable[[], Any]) -> Work:
    """Run something in `shapes_only` and note what it does."""
    recorder = _Recorder()
    with recorder:
        kept = run()
    work = recorder.work()
    del kept
    return work


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops = self.bytes = 0.0
        self.operations = 0
        self.kernels: dict[str, float] = {}
        self.examples: dict[str, Kernel] = {}
        self.alive = self.peak = 0
        self.known: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        if function.namespace == "prim":
            return result
        self.operations += 1
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        if not self._moves_data(function, inputs, outputs):
            return result
        self._remember(inputs, outputs)
        flops = _flops(function, args, kwargs, result)
        moved = float(sum(_shape(tensor).bytes for tensor in (*inputs, *outputs)))
        self.flops += flops
        self.bytes += moved
        described = tree_map(lambda leaf: _shape(leaf) if isinstance(leaf, Tensor) else leaf, (args, kwargs))
        key = f"{function} {described}"
        if key not in self.examples:
            self.examples[key] = Kernel(function, tuple(described[0]), dict(described[1]), flops, moved)
        self.kernels[key] = self.kernels.get(key, 0.0) + 1.0
        return result

    @staticmethod
    def _moves_data(function: Any, inputs: list[Tensor], outputs: list[Tensor]) -> bool:
        if function.is_view:
            return False
        if function._schema.is_mutable:
            return True
        there = {tensor.untyped_storage()._cdata for tensor in inputs}
        return not outputs or any(tensor.untyped_storage()._cdata not in there for tensor in outputs)

    def _remember(self, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        there = {tensor.untyped_storage()._cdata for tensor in inputs}
        for tensor in outputs:
            storage = tensor.untyped_storage()
            if storage in self.known or storage._cdata in there:
                continue
            self.known.add(storage)
            size = storage.nbytes()
            self.alive += size
            self.peak = max(self.peak, self.alive)
            weakref.finalize(storage, self._forget, size)

    def _forget(self, size: int) -> None:
        self.alive -= size

    def work(self) -> Work:
        return Work(
            self.flops,
            self.bytes,
            float(self.operations),
            dict(self.kernels),
            float(self.peak),
            float(self.alive),
            dict(self.examples),
        )


def _flops(function: Any, args: Any, kwargs: Any, result: Any) -> float:
    """2 per multiply-add; attention in full, also where it skips what is masked, as is the custom."""
    packet = function._overloadpacket
    if packet in flop_registry:
        return float(flop_registry[packet](*args, **kwargs, out_val=result))
    if packet is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu:
        return float(sdpa_flop_count(*(tensor.shape for tensor in args[:3])))
    if packet is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward:
        return float(sdpa_backward_flop_count(*(tensor.shape for tensor in args[:4])))
    return 0.0


def _shape(tensor: Tensor) -> Shape:
    return Shape(tuple(tensor.shape), tuple(tensor.stride()), tensor.dtype)
