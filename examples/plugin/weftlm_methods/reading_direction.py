"""Routing by the direction each adapter reads most."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor

from weftlm.experts.expert import Expert
from weftlm.routing.config import PrototypeConfig, RouterConfig, routers
from weftlm.routing.prototypes import PrototypeRouter
from weftlm.routing.router import TargetModule


class ReadingDirectionConfig(PrototypeConfig):
    """Configuration of `reading-direction`."""

    router: Literal["reading-direction"] = "reading-direction"


@routers.register(
    "reading-direction",
    does="takes the k experts whose adapter reads the direction of the input most",
    costs="a singular value decomposition per adapter, once",
)
class ReadingDirectionRouter(PrototypeRouter):
    """The k adapters that read the direction of the input most.

    s_z = |u . v_z|,  v_z the leading right singular vector of A_z
    """

    Config: ClassVar[type[RouterConfig]] = ReadingDirectionConfig

    def prototypes(self, experts: Sequence[Expert], target: TargetModule) -> Tensor:
        factors = [expert.lora.modules[target.name].A_RI.float() for expert in experts]
        return torch.stack([torch.linalg.svd(A_RI, full_matrices=False).Vh[0] for A_RI in factors])

    def adjust(self, products_BTE: Tensor) -> Tensor:
        return products_BTE.abs()
