"""An online mixture under Lightning Fabric, which places, casts and distributes; one process here, any number alike."""

import argparse
import textwrap
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from lightning_fabric import Fabric
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from weftlm.corpora.source import ArraySource
from weftlm.mixture.loader import MixtureLoader, sequence_counts
from weftlm.mixture.policy import MixtureSetting, Report, build_policy
from weftlm.mixture.sampler import MixtureSampler
from weftlm.models.hf import sequence_losses
from weftlm.training.alignment import Probe, estimators, gradient_direction

LENGTH, BATCH = 64, 16
fabric = Fabric(accelerator="cpu", devices=1)
fabric.launch()
torch.manual_seed(0)
sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
net = LlamaForCausalLM(LlamaConfig(vocab_size=256, **sizes))
model, optimizer = fabric.setup(net, torch.optim.AdamW(net.parameters(), lr=1e-2))

code, similar = (np.frombuffer(Path(module.__file__).read_bytes(), dtype=np.uint8) for module in (argparse, textwrap))
squares = np.frombuffer(" ".join(str(n * n) for n in range(9999)).encode(), dtype=np.uint8)
texts = {"code": code, "squares": squares, "noise": np.random.default_rng(0).integers(32, 127, 60_000)}
sources, goal = [ArraySource(text) for text in texts.values()], ArraySource(similar)
sampler = MixtureSampler(sequence_counts(sources, LENGTH), BATCH, seed=0, names=list(texts))
loader = MixtureLoader(sources, sampler, LENGTH, rank=fabric.global_rank, world=fabric.world_size)
targets = MixtureLoader([goal], MixtureSampler(sequence_counts([goal], LENGTH), BATCH, seed=1), LENGTH)
policy = build_policy({"policy": "dga", "update_every_steps": 10})
state = policy.init(MixtureSetting(tuple(texts), torch.tensor([len(source) for source in sources]).double()))
trained_D = torch.zeros(len(texts), dtype=torch.float64)


def share(rows: torch.Tensor) -> torch.Tensor:  # each process measures a part; sums are reduced over all of them
    return fabric.to_device(rows[fabric.global_rank :: fabric.world_size])


for step in range(1, 61):
    batch = loader.next()  # this process's part of the batch
    tokens = fabric.to_device(batch.tokens_BT1)
    logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
    loss = F.cross_entropy(logits.transpose(1, 2), tokens[:, 1:])
    fabric.backward(loss)
    norm = float(fabric.clip_gradients(model, optimizer, max_norm=1.0))
    optimizer.step()
    optimizer.zero_grad()
    trained_D += LENGTH * torch.from_numpy(np.bincount(batch.draw.domains_B, minlength=len(texts)))
    if step % policy.config.update_every_steps:
        continue
    with fabric.autocast():  # probes run on the bare module; they touch neither gradients nor the optimizer
        drawn = targets.sampler.probe(step, None, 16)
        direction = gradient_direction(net, sequence_losses, share(targets.probe_tokens(drawn)))
        drawn = sampler.probe(step, None, 8)
        tokens, groups = share(loader.probe_tokens(drawn)), share(torch.from_numpy(drawn.groups_N))
        alignment = estimators["shadow"]().measure(Probe(net, sequence_losses, tokens, groups, len(texts), direction))
    state = policy.update(state, Report(step, trained_D, alignment=replace(alignment, batch_norm=norm)))
    sampler.set_weights(step, policy.weights(state).numpy())
    trained_D = torch.zeros_like(trained_D)
    if step % 20 == 0:
        mixture = {name: round(weight, 2) for name, weight in zip(texts, policy.weights(state).tolist(), strict=True)}
        dots = {name: round(dot, 3) for name, dot in zip(texts, alignment.dots_G.tolist(), strict=True)}
        fabric.print(f"step {step}: loss {loss.item():.2f}, mixture {mixture}, because of alignments {dots}")
