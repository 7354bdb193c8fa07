"""A language model on an online mixture in a plain PyTorch loop: sampler, policy, alignment, AdamW, evaluation."""

import argparse
import textwrap
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from weftlm.corpora.source import ArraySource
from weftlm.mixture.loader import MixtureLoader, sequence_counts
from weftlm.mixture.policy import MixtureSetting, Report, build_policy
from weftlm.mixture.sampler import MixtureSampler
from weftlm.training.alignment import ShadowProbe, gradient_direction, group_alignment

LENGTH, BATCH, WIDTH, HEADS, STEPS = 64, 16, 48, 4, 120


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x_BTC: Tensor) -> Tensor:
        q, k, v = (
            part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in self.qkv(self.norm_1(x_BTC)).chunk(3, -1)
        )
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(-2)
        x_BTC = x_BTC + self.out(attended)
        return x_BTC + self.mlp(self.norm_2(x_BTC))


class GPT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(256, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.Sequential(Block(), Block())
        self.head = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 256))

    def forward(self, tokens_BT: Tensor) -> Tensor:
        where = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)
        return self.head(self.blocks(self.tokens(tokens_BT) + self.positions(where)))


def losses(model: nn.Module, tokens_BT1: Tensor) -> Tensor:  # nats per token of every sequence
    logits_BTV = model(tokens_BT1[:, :-1])
    return F.cross_entropy(logits_BTV.transpose(1, 2), tokens_BT1[:, 1:], reduction="none").mean(1)


def tokens_of(text: bytes) -> np.ndarray:  # bytes are the tokens here
    return np.frombuffer(text, dtype=np.uint8).astype(np.int64)


sources = {
    "code": ArraySource(tokens_of(Path(argparse.__file__).read_bytes())),
    "squares": ArraySource(tokens_of(" ".join(str(n * n) for n in range(9999)).encode())),
    "noise": ArraySource(np.random.default_rng(0).integers(32, 127, 60_000)),
}
goal = torch.from_numpy(tokens_of(Path(textwrap.__file__).read_bytes())).unfold(0, LENGTH + 1, LENGTH)
held, goal = goal[:64], goal[64:]  # the target: some of it steers, some is only evaluated on

torch.manual_seed(0)
model = GPT()
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1)
read = list(sources.values())
sampler = MixtureSampler(sequence_counts(read, LENGTH), BATCH, seed=0, names=list(sources))
loader = MixtureLoader(read, sampler, LENGTH)
policy = build_policy({"policy": "dga", "update_every_steps": 10})
state = policy.init(MixtureSetting(tuple(sources), torch.tensor([len(source) for source in read]).double()))
trained_D = torch.zeros(len(sources), dtype=torch.float64)

for step in range(1, STEPS + 1):
    updating = step % policy.config.update_every_steps == 0
    batch = loader.next(min_per_domain=1 if updating else 0)  # stratified, so that every domain is measured
    domains_B = torch.from_numpy(batch.domains_B)
    weights_B = torch.from_numpy(batch.loss_weights_B).float() / BATCH
    trained_D += LENGTH * domains_B.bincount(minlength=len(sources))
    if updating:  # the same backward pass also gives every sequence's derivative along the target's gradient
        direction = gradient_direction(model, losses, goal[torch.randint(len(goal), (16,))])
        with ShadowProbe(model, direction) as probe:
            probe.begin(BATCH)
            (weights_B * losses(model, batch.tokens_BT1)).sum().backward()
            alignment = group_alignment(probe.dots(weights_B), domains_B, len(sources), direction)
    else:
        (weights_B * losses(model, batch.tokens_BT1)).sum().backward()
    norm = float(nn.utils.clip_grad_norm_(model.parameters(), 1.0))
    optimizer.step()
    optimizer.zero_grad()
    if updating:
        state = policy.update(state, Report(step, trained_D, alignment=replace(alignment, batch_norm=norm)))
        sampler.set_weights(step, policy.weights(state).numpy())  # in force from the very next batch
        trained_D = torch.zeros_like(trained_D)
    if step % 40 == 0:
        with torch.no_grad():
            loss = float(losses(model, held).mean())
        mixture = {name: round(weight, 2) for name, weight in zip(sources, policy.weights(state).tolist(), strict=True)}
        dots = {name: round(dot, 3) for name, dot in zip(sources, alignment.dots_G.tolist(), strict=True)}
        print(f"step {step}: {loss:.3f} nats per byte of the target, mixture {mixture}, because of alignments {dots}")
