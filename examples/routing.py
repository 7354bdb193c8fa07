"""Experts and routing in your own code: two LoRA experts, a gate for each, and every token routed between them."""

import tempfile
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from weftlm.corpora.source import ArraySource
from weftlm.experts.config import ExpertTraining
from weftlm.experts.expert import BaseReference
from weftlm.experts.library import ExpertLibrary
from weftlm.experts.train import train_expert
from weftlm.routing.routed_model import RoutedModel

torch.manual_seed(0)
sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
base = LlamaForCausalLM(LlamaConfig(vocab_size=64, num_key_value_heads=4, **sizes))
counting = {"up": torch.arange(20_000) % 32, "down": 32 + (-torch.arange(20_000)) % 32}  # your domains, as token ids
config = ExpertTraining.model_validate(
    {
        "lora": {"rank": 4, "alpha": 4},
        "training": {"steps": 60, "batch_sequences": 8, "sequence_length": 32, "lr": 1e-2},
        "gate": {"steps": 20},
        "validate_every_steps": 0,
        "statistics_examples": 50,
    }
)
with tempfile.TemporaryDirectory() as folder:
    library = ExpertLibrary.open(Path(folder) / "library", BaseReference("my-base"))
    for name, tokens in counting.items():  # each contributor trains alone, on data nobody else sees
        source = ArraySource(tokens.numpy(), text_bytes=len(tokens))
        library.add(train_expert(base, library.base, source, config, name=name, folder=Path(folder) / name, seed=0))
    routed = RoutedModel(base, library.load_all()[0], {"router": "phatgoose", "k": 1})
    text = torch.cat([counting["up"][:16], counting["down"][:16]])[None]  # the domain changes midway
    trace = routed.trace(text)[0]
    for part, weights_TE in (("up", trace.token_weights_TE[:16]), ("down", trace.token_weights_TE[16:])):
        shares = {name: round(float(share), 2) for name, share in zip(trace.experts, weights_TE.mean(0), strict=True)}
        print(f"text counting {part}: {shares}")
