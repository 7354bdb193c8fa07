"""Which domain's gradient points where the target's does? Gradient alignment inside a plain PyTorch loop."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from weftlm.models.hf import sequence_losses
from weftlm.training.alignment import ShadowProbe, gradient_direction, group_alignment

torch.manual_seed(0)
config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
model = LlamaForCausalLM(config)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)


def draw(domain: int, rows: int) -> torch.Tensor:  # made-up domains: each counts up through tokens of its own
    return 20 * domain + (torch.randint(0, 20, (rows, 1)) + torch.arange(33)) % 20


for step in range(1, 31):
    domains_B, tokens = torch.arange(3).repeat_interleave(4), torch.cat([draw(domain, 4) for domain in range(3)])
    direction = gradient_direction(model, sequence_losses, draw(2, 4))  # the target resembles domain 2
    with ShadowProbe(model, direction) as probe:
        probe.begin(len(tokens))
        losses_B = sequence_losses(model, tokens)
        losses_B.mean().backward()
        alignment = group_alignment(probe.dots(torch.full((12,), 1 / 12)), domains_B, 3, direction)
    optimizer.step()
    optimizer.zero_grad()
    if step % 10 == 0:
        print(f"step {step}: loss {losses_B.mean():.2f} nats per token, alignment {alignment.dots_G.numpy().round(4)}")
