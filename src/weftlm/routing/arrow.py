"""Arrow: an adapter's own singular vector says which inputs it was made for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from weftlm.experts.expert import Expert, LoRAFactors
from weftlm.routing.config import ArrowConfig, RouterConfig, routers
from weftlm.routing.prototypes import PrototypeRouter
from weftlm.routing.router import TargetModule


@routers.register(
    "arrow",
    does="takes the k experts whose adapter's main input direction is nearest, per token and module",
    costs="as `phatgoose`",
    paper="arXiv:2405.11157",
)
class ArrowRouter(PrototypeRouter):
    """Per token and per module, the k adapters whose first right singular vector is most parallel to the input.

        v_z = first right singular vector of B_z A_z       s_z = |u . v_z|       p = softmax over the k highest s_z

    A singular vector has no sign, hence the absolute value. Needs neither gates nor statistics.

    Paper: Ostapenko et al., arXiv:2405.11157; the scores are those of PEFT's implementation (no cosine).
    """

    Config: ClassVar[type[RouterConfig]] = ArrowConfig

    def prototypes(self, experts: Sequence[Expert], target: TargetModule) -> Tensor:
        return torch.stack([first_singular_vector(expert.lora.modules[target.name]) for expert in experts])

    def adjust(self, products_BTE: Tensor) -> Tensor:
        return products_BTE.abs()


def first_singular_vector(adapter: LoRAFactors) -> Tensor:
    """First right singular vector of B A, I, float32; zeros for an adapter that does nothing.

    With A^T = Q R (thin QR), the right singular vectors of B A are Q times those of B R^T, an O x R matrix; and of
    those only the eigenvectors of the R x R matrix R B^T B R^T are needed. In float64, and the sign makes the largest
    entry positive, so that the result does not depend on a random start or on the machine.
    """
    A_RI, B_OR = adapter.A_RI.double(), adapter.B_OR.double()
    Q_IR, triangle_RR = torch.linalg.qr(A_RI.T)
    _, vectors_RR = torch.linalg.eigh(triangle_RR @ (B_OR.T @ B_OR) @ triangle_RR.T)
    if not bool(B_OR.any()) or not bool(A_RI.any()):
        return torch.zeros(A_RI.shape[1])
    v_I = Q_IR @ vectors_RR[:, -1]
    signed_I: Tensor = v_I * v_I[v_I.abs().argmax()].sign()
    return signed_I.float()
