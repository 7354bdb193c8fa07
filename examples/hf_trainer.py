"""An online mixture inside `transformers.Trainer`: five lines, stopped half-way and resumed exactly."""

import argparse
import tempfile
import textwrap
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from weftlm.integrations.hf_trainer import MixtureCallback, OnlineMixture

code, similar = (np.frombuffer(Path(module.__file__).read_bytes(), dtype=np.uint8) for module in (argparse, textwrap))
squares = np.frombuffer(" ".join(str(n * n) for n in range(9999)).encode(), dtype=np.uint8)
sources = {"code": code, "squares": squares, "noise": np.random.default_rng(0).integers(32, 127, 60_000)}
sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


def train(folder: str, steps: int, resume: bool = False) -> Trainer:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=256, **sizes))
    args = TrainingArguments(
        folder, max_steps=steps, per_device_train_batch_size=8, learning_rate=1e-2, lr_scheduler_type="constant",
        save_steps=30, logging_steps=20, report_to="none", disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    mixture = OnlineMixture.of(sources, "dga", target=similar, sequence_length=64, update_every_steps=10)
    trainer = Trainer(model, args, train_dataset=mixture.dataset, callbacks=[MixtureCallback(mixture)])
    trainer.train(resume_from_checkpoint=resume)
    return trainer


with tempfile.TemporaryDirectory() as stopped, tempfile.TemporaryDirectory() as through:
    train(stopped, steps=30)
    resumed, whole = train(stopped, steps=60, resume=True), train(through, steps=60)
last = [entry for entry in whole.state.log_history if "mixture/alignment/code" in entry][-1]
for name in sources:
    weight, dot = last[f"mixture/{name}"], last[f"mixture/alignment/{name}"]
    print(f"{name}: weight {weight:.2f}, alignment with the gradient of the target {dot:.3f}")
pairs = zip(resumed.model.parameters(), whole.model.parameters(), strict=True)
print("resumes to the same bits:", all(torch.equal(one, two) for one, two in pairs))
