"""On a CUDA device: the shadow term against separate backward passes, in float32 and under bf16 autocast."""

from __future__ import annotations

import pytest
import torch

from weftlm.models.config import ModelConfig
from weftlm.models.factory import build_model
from weftlm.models.hf import sequence_losses
from weftlm.training.alignment import Probe, estimators, gradient_direction

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize(("bf16", "tolerance"), [(False, 1e-4), (True, 3e-2)])
def test_shadow_equals_separate_on_cuda(bf16: bool, tolerance: float) -> None:
    section = ModelConfig(architecture="llama", config={"hidden_size": 64, "intermediate_size": 128})
    model = build_model(section, vocab_size=256, sequence_length=32, eos_id=0, seed=0).cuda()
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 256, (6, 33), generator=generator).cuda()
    target = torch.randint(0, 256, (4, 33), generator=generator).cuda()
    with torch.autocast("cuda", dtype=torch.bfloat16, enabled=bf16):
        direction = gradient_direction(model, sequence_losses, target)
        probe = Probe(model, sequence_losses, tokens, torch.arange(6), 6, direction)
        exact, dots = (estimators[name]().measure(probe) for name in ("separate", "shadow"))
    assert exact.norms_G is not None
    scale = exact.norms_G * exact.direction_norm
    assert ((dots.dots_G - exact.dots_G).abs() / scale).max().item() < tolerance
