"""Frozen experts' log-probabilities in, one gate over them out: best against the worst mixture of domains, certified.

Takes scores of sequences (text or not) under every expert; gives gates as values, bounds, and how far they are apart.
Read `gate.py` first, then `primal_dual.py`.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from weftlm.gating.capacity import CapacityResult, channel_capacity, sampled_capacity
    from weftlm.gating.certificate import Certificate, certify
    from weftlm.gating.config import FitConfig, gates
    from weftlm.gating.exact import ExactResult, best_constant_gate, exact_robust_gate, mixture_regrets
    from weftlm.gating.gate import CausalGate, Features, Gate, load_gate, save_gate
    from weftlm.gating.mixtures import Box
    from weftlm.gating.primal_dual import FitResult, FitState, Progress, fit_robust_gate
    from weftlm.gating.sequences import ScoredSequences, enumerated, sequence_features

_MODULES = ("config", "gate", "mixtures", "sequences", "capacity", "exact", "primal_dual", "certificate")

__all__ = [
    "Box", "CapacityResult", "CausalGate", "Certificate", "ExactResult", "Features", "FitConfig", "FitResult",
    "FitState", "Gate", "Progress", "ScoredSequences", "best_constant_gate", "certify", "channel_capacity",
    "enumerated", "exact_robust_gate", "fit_robust_gate", "gates", "load_gate", "mixture_regrets", "sampled_capacity",
    "save_gate", "sequence_features",
]  # fmt: skip


def __getattr__(name: str) -> object:
    """Import a name's module when it is first used, so that `weftlm.gating.config` stays light."""
    for module in _MODULES if name in __all__ else ():
        if (found := getattr(import_module(f"{__name__}.{module}"), name, None)) is not None:
            return found
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
