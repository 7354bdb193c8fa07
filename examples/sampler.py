"""A mixture that changes while training, and resumes exactly, in a plain PyTorch loop."""

import argparse

import numpy as np
import torch

from weftlm.corpora.source import ArraySource
from weftlm.mixture.loader import MixtureLoader, sequence_counts
from weftlm.mixture.sampler import MixtureSampler

with open(argparse.__file__, "rb") as file:
    texts = {"code": file.read(), "squares": " ".join(str(n * n) for n in range(9999)).encode()}
sources = [ArraySource(np.frombuffer(text, dtype=np.uint8)) for text in texts.values()]
sampler = MixtureSampler(sequence_counts(sources, 64), batch_size=16, seed=0, names=list(texts), weights_D=[0.9, 0.1])
loader = MixtureLoader(sources, sampler, sequence_length=64)
sampler.set_weights(100, [0.2, 0.8])  # from exactly step 100 on
model = torch.nn.Sequential(torch.nn.Embedding(256, 32), torch.nn.Linear(32, 256))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
for _ in range(200):
    batch = loader.next()
    loss = torch.nn.functional.cross_entropy(model(batch.tokens_BT1[:, :-1]).transpose(1, 2), batch.tokens_BT1[:, 1:])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
print(f"loss {loss.item():.2f} nats per token, epochs of {sampler.names}: {sampler.epochs_D().round(2).tolist()}")
state = sampler.state_dict()  # plain JSON values; the number of processes may differ when it is loaded
after = [loader.next().draw.sequences_B.tolist() for _ in range(3)]
sampler.load_state_dict(state)
print("resumes exactly:", after == [loader.next().draw.sequences_B.tolist() for _ in range(3)])
