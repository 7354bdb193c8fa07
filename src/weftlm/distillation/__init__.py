"""A gate over frozen experts in, a student that can be served out: a causal gate, a sparse one, or one small model.

Takes gates and samples of the experts, scored per token; gives students, and how far from the gated model they are.
Read `structural.py` first, then `sparse.py` and `dense.py`.
"""

from typing import TYPE_CHECKING

from weftlm.lazy import lazy_names

if TYPE_CHECKING:
    from weftlm.distillation.config import DenseConfig, DistilConfig
    from weftlm.distillation.dense import DenseProgress, DenseResult, WeightedText, distil_dense
    from weftlm.distillation.sparse import SparseRow, distil_sparse, log_served, sparse_table
    from weftlm.distillation.structural import (
        DistilProgress,
        DistilResult,
        DistilState,
        Weighted,
        distil_structural,
        student_kl,
        weigh,
    )
else:
    __getattr__ = lazy_names(
        __name__,
        {
            "config": ["DenseConfig", "DistilConfig"],
            "dense": ["DenseProgress", "DenseResult", "WeightedText", "distil_dense"],
            "sparse": ["SparseRow", "distil_sparse", "log_served", "sparse_table"],
            "structural": [
                "DistilProgress",
                "DistilResult",
                "DistilState",
                "Weighted",
                "distil_structural",
                "student_kl",
                "weigh",
            ],
        },
    )

__all__ = [
    "DenseConfig",
    "DenseProgress",
    "DenseResult",
    "DistilConfig",
    "DistilProgress",
    "DistilResult",
    "DistilState",
    "SparseRow",
    "Weighted",
    "WeightedText",
    "distil_dense",
    "distil_sparse",
    "distil_structural",
    "log_served",
    "sparse_table",
    "student_kl",
    "weigh",
]
