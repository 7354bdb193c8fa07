"""The low-rank branch of a linear module: the one place where y += s B A u is computed.

    y[x] = W u[x] + g[x] s_e B_e A_e u[x]            e the adapter of x; g = 1 where nothing gates it

A `LowRank` holds the adapters of one module, stacked: adapters of smaller rank are padded with zeros, one that does not
adapt the module is zero altogether, and s is folded into B. Adapted experts and gate training use one adapter for all
of a batch, pools of whole models one per sequence (`Rows`), routing several per token (`weftlm.routing.pool`).

    branch = LowRank([expert.modules[name]], *placement(linear))
    y = branch.add(linear(u), u)                                                # all of u through adapter 0
    y = branch.add(linear(u), u, Rows(blocks=(0, 2)))                           # first half through 0, second through 2
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor, nn

from weftlm.experts.expert import LoRAFactors

_COMPUTE = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""Dtypes a weight can be multiplied in; any other holds a quantised weight."""


@dataclass(frozen=True, eq=False)
class Rows:
    """Which adapter each sequence of a batch runs through.

    Attributes:
        one: the same one for all sequences.
        blocks: or block after block of equal size, through these.
        each: or sequence by sequence; one place per sequence, int64.
    """

    one: int | None = None
    blocks: tuple[int, ...] | None = None
    each: Tensor | None = None

    @classmethod
    def of(cls, places_X: Tensor) -> Rows:
        """The cheapest form of one place per sequence."""
        places = places_X.tolist()
        distinct = list(dict.fromkeys(places))
        if len(distinct) == 1:
            return cls(one=distinct[0])
        size = len(places) // len(distinct)
        if places == [place for place in distinct for _ in range(size)]:
            return cls(blocks=tuple(distinct))
        return cls(each=places_X)


FIRST = Rows(one=0)


class LowRank(nn.Module):
    """The adapters of one linear module.

    Args:
        factors: per adapter; None for one that does not adapt this module.
        dtype, device: of the stacked factors, see `placement`.
        multiple: rank is padded to a multiple of it.

    Attributes:
        A_ERI: input factors, not saved with a model.
        B_ERO: output factors times the scale, rank before output.
    """

    A_ERI: Tensor
    B_ERO: Tensor

    def __init__(
        self,
        factors: Sequence[LoRAFactors | None],
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        *,
        multiple: int = 1,
    ) -> None:
        super().__init__()
        present = [each for each in factors if each is not None]
        rank = -(-max(each.rank for each in present) // multiple) * multiple
        A_ERI = torch.zeros(len(factors), rank, present[0].A_RI.shape[1], dtype=dtype, device=device)
        B_ERO = torch.zeros(len(factors), rank, present[0].B_OR.shape[0], dtype=dtype, device=device)
        for place, each in enumerate(factors):
            if each is not None:
                A_ERI[place, : each.rank] = each.A_RI.to(A_ERI)
                B_ERO[place, : each.rank] = (each.scale * each.B_OR.double().T).to(B_ERO)
        self.register_buffer("A_ERI", A_ERI, persistent=False)
        self.register_buffer("B_ERO", B_ERO, persistent=False)
        self._views: tuple[Tensor, dict[int, tuple[Tensor, Tensor]]] = A_ERI, {}

    def add(
        self, y: Tensor, u: Tensor, rows: Rows = FIRST, gate_X: Tensor | None = None, *, in_place: bool = False
    ) -> Tensor:
        """A module's output with the branch added.

        A scalar gate commutes with A, so that it is applied to R numbers per token instead of I.

        Args:
            y: the module's output, O last.
            u: its input, I last; the leading axes are those of y, sequences first.
            rows: adapters of the sequences.
            gate_X: g, one number per token, where one adapter serves all sequences; None for 1.
            in_place: y is not needed afterwards and may be overwritten.
        Returns:
            in y's dtype.
        """
        u = u.to(self.A_ERI.dtype)
        if rows.one is not None:
            A_IR, B_RO = self._of(rows.one)
            h_NR = u.reshape(-1, len(A_IR)) @ A_IR
            if gate_X is not None:
                h_NR = h_NR * gate_X.reshape(-1, 1).to(h_NR.dtype)
            same = y.dtype == h_NR.dtype == B_RO.dtype
            if same and in_place and y.is_contiguous() and not torch.is_grad_enabled():
                y.view(-1, B_RO.shape[1]).addmm_(h_NR, B_RO)
                return y
            y_NO = y.reshape(-1, y.shape[-1])
            sum_XO = torch.addmm(y_NO, h_NR, B_RO) if same else y_NO + h_NR @ B_RO
        else:
            A_MRI, B_MRO = self._chosen(rows)
            h_MNR = torch.bmm(u.reshape(len(A_MRI), -1, u.shape[-1]), A_MRI.transpose(1, 2))
            y_MNO = y.reshape(len(A_MRI), -1, y.shape[-1])
            same = y.dtype == h_MNR.dtype == B_MRO.dtype
            sum_XO = torch.baddbmm(y_MNO, h_MNR, B_MRO) if same else y_MNO + torch.bmm(h_MNR, B_MRO)
        return sum_XO.view(y.shape).to(y.dtype)

    def _of(self, place: int) -> tuple[Tensor, Tensor]:
        """One adapter's factors, cut out once: token by token, that would be a good part of the branch's time."""
        buffers = self.__dict__["_buffers"]
        A_ERI, B_ERO = buffers["A_ERI"], buffers["B_ERO"]
        if self._views[0] is not A_ERI:
            self._views = A_ERI, {}
        views = self._views[1]
        if place not in views:
            views[place] = A_ERI[place].T, B_ERO[place]
        return views[place]

    def _chosen(self, rows: Rows) -> tuple[Tensor, Tensor]:
        if rows.blocks is None:
            assert rows.each is not None
            return self.A_ERI[rows.each], self.B_ERO[rows.each]
        first, last = rows.blocks[0], rows.blocks[-1]
        if rows.blocks == tuple(range(first, last + 1)):
            return self.A_ERI[first : last + 1], self.B_ERO[first : last + 1]
        places = torch.tensor(rows.blocks, device=self.A_ERI.device)
        return self.A_ERI[places], self.B_ERO[places]


def placement(module: nn.Module, default: torch.dtype = torch.float32) -> tuple[torch.dtype, torch.device]:
    """Dtype and device of a linear module's adapters: those it computes in.

    The dtype is its weight's; a quantised module names its own (`compute_dtype`), or `default` is used.
    """
    weight = next(chain(module.parameters(), module.buffers()))
    if weight.dtype in _COMPUTE:
        return weight.dtype, weight.device
    return getattr(module, "compute_dtype", None) or default, weight.device


def gate_values(u_XI: Tensor, v_I: Tensor) -> Tensor:
    """g = sigmoid(v . u) for every token, in float32 or wider whatever the precision around it.

    Args:
        u_XI: module input.
        v_I: gate vector.
    Returns:
        g_X.
    """
    wide = torch.promote_types(u_XI.dtype, torch.float32)
    with torch.autocast(u_XI.device.type, enabled=False):
        return torch.sigmoid(u_XI.to(wide) @ v_I.to(wide))
