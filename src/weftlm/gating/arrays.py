"""What the room takes in: arrays of probabilities or their logs, of numpy or torch, checked once at the door."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from weftlm.errors import ConfigError, DataError, NumericsError, reason

Floats = NDArray[np.float64]
"""What results hold: numpy, float64. Gates hold torch tensors."""

TOLERANCE = 1e-6
"""How far a row of probabilities may sum from 1 and still pass for rounding."""


def to_tensor(value: Any, name: str, axes: str) -> Tensor:
    """A tensor on the CPU from an array, a nested list or a tensor; float64 unless it came as float32.

    Args:
        value: Array, nested list or tensor.
        name: Name for messages.
        axes: One letter per axis, for messages: "NE".
    Raises:
        ConfigError: no numbers, half precision, or another number of axes.
        NumericsError: it holds a NaN.
    """
    if isinstance(value, Tensor):
        tensor = value.detach().to("cpu")
    else:
        try:
            array = np.asarray(value)
            tensor = torch.from_numpy(array if array.flags.writeable else array.copy())
        except (TypeError, ValueError) as error:
            raise ConfigError(f"{name} is no array of numbers: {reason(error)}") from error
    if tensor.dtype in (torch.float16, torch.bfloat16):
        raise ConfigError(
            f"{name} comes in {tensor.dtype}, which loses whole nats of a sequence's log-likelihood; sum in float32 or "
            "float64"
        )
    if tensor.dtype != torch.float32:
        tensor = tensor.to(torch.float64)
    if tensor.ndim != len(axes):
        raise ConfigError(f"{name} has shape {tuple(tensor.shape)}; it needs {len(axes)} axes: {' x '.join(axes)}")
    if tensor.numel() and bool(tensor.max().isnan()):  # a maximum needs no second array, and is NaN where an entry is
        where = tuple(int(i) for i in torch.isnan(tensor).nonzero()[0])
        raise NumericsError(f"{name} holds NaN (first at {where}); score those sequences again or leave them out")
    return tensor


def to_log_likelihoods(value: Any, name: str, axes: str) -> Tensor:
    """Log-likelihoods: any finite number (densities exceed 0) or -inf.

    Raises:
        ConfigError, NumericsError: as `to_tensor`; also for +inf.
    """
    tensor = to_tensor(value, name, axes)
    if tensor.numel() and bool(tensor.max().isposinf()):
        where = tuple(int(i) for i in torch.isposinf(tensor).nonzero()[0])
        raise NumericsError(f"{name} holds +inf (first at {where}); a log-likelihood is finite or -inf")
    return tensor


def log_distributions(value: Any, name: str, axes: str) -> Tensor:
    """Rows of probabilities, or of their natural logs, as logs in float64.

    The two are told apart by sign: logs of probabilities are never above 0, probabilities never below. What a row's sum
    differs from 1 by, within 1e-6, is taken for rounding and divided out.

    Raises:
        ConfigError: the wrong shape, no row or no column.
        NumericsError: NaN, numbers of both signs, or a row that does not sum to 1 within 1e-6.
    """
    tensor = to_tensor(value, name, axes).to(torch.float64)
    if 0 in tensor.shape:
        raise ConfigError(f"{name} has shape {tuple(tensor.shape)}; it needs a row and a column at least")
    if bool((tensor <= 0).all()):
        logs = tensor
    elif bool((tensor >= 0).all()):
        logs = tensor.log()
    else:
        raise NumericsError(f"{name} holds numbers of both signs; give probabilities (>= 0) or natural logs (<= 0)")
    totals = torch.logsumexp(logs, dim=-1)
    off = (totals.exp() - 1.0).abs()
    if not bool((off <= TOLERANCE).all()):
        row = int(off.argmax())
        raise NumericsError(
            f"row {row} of {name} sums to {float(totals[row].exp()):.6g} over {logs.shape[-1]} points; must be 1 ± "
            f"{TOLERANCE:g}: is a point missing, or is it not normalised?"
        )
    return logs - totals[:, None]


def log_support(P: Any, Q: Any) -> tuple[Tensor, Tensor]:
    """Logs of domains P (D x X) and experts Q (E x X) over one support, whose points are listed.

    Raises:
        ConfigError: they are over different supports.
        NumericsError: a row does not sum to 1.
    """
    logp_DX, logq_EX = log_distributions(P, "P", "DX"), log_distributions(Q, "Q", "EX")
    if logp_DX.shape[1] != logq_EX.shape[1]:
        raise ConfigError(
            f"P has {logp_DX.shape[1]} points and Q {logq_EX.shape[1]}; domains and experts need one support"
        )
    return logp_DX, logq_EX


def simplex_vector(value: Any, name: str, size: int) -> Floats:
    """A probability vector.

    Raises:
        ConfigError: the wrong size, a negative entry, or a sum off 1 by more than 1e-6.
        NumericsError: it holds a NaN.
    """
    vector: Floats = to_tensor(value, name, "D").to(torch.float64).numpy()
    if len(vector) != size:
        raise ConfigError(f"{name} has {len(vector)} entries; it needs {size}")
    if bool((vector < 0).any()) or abs(float(vector.sum()) - 1.0) > TOLERANCE:
        raise ConfigError(
            f"{name} is {np.round(vector, 6).tolist()} and sums to {float(vector.sum()):.6g}; entries must be >= 0 and "
            f"sum to 1 ± {TOLERANCE:g}"
        )
    normalised: Floats = vector / vector.sum()
    return normalised


def refuse_impossible(logq_NE: Tensor, where: str) -> None:
    """Refuse sequences that every expert gives probability 0.

    Raises:
        DataError: there is one.
    """
    dead_N = torch.isneginf(logq_NE).all(dim=1)
    if bool(dead_N.any()):
        raise DataError(
            f"{where}: {int(dead_N.sum())} of {len(dead_N)} sequences have probability 0 under every one of "
            f"{logq_NE.shape[1]} experts (first: number {int(dead_N.nonzero()[0])}), and no gate can give them any; "
            "leave them out or add an expert that knows them"
        )


def entropies(p_DX: Floats) -> Floats:
    """H(p_d), nats."""
    return cross_entropies(p_DX, p_DX)


def cross_entropies(p_DX: Floats, m: Floats) -> Floats:
    """- sum_x p_d(x) log m(x), nats; m is one distribution or one per domain."""
    logs = np.log(m, out=np.full_like(m, -np.inf), where=m > 0)
    terms: Floats = -np.where(p_DX > 0, p_DX * np.where(p_DX > 0, logs, 0.0), 0.0).sum(axis=1)
    return terms
