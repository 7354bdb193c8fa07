"""This machine's speed: what does the work is run a few times on random weights and made-up tokens, and timed.

    seconds = seconds of what was timed  x  FLOPs of what is planned / FLOPs of what was timed

Training is timed by steps of the trainer, scoring by `score_shard`, generation by `generate`. What takes more than
`LARGEST_FLOPS` is timed with fewer sequences, and with two layers where one sequence is too much.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import psutil
import torch

from weftlm.corpora.examples import ExampleSource
from weftlm.corpora.source import ArraySource
from weftlm.experts.examples import domain_trainer
from weftlm.experts.expert import BaseReference, LoRAExpert, LoRAFactors
from weftlm.gating.bayes import FixedShareGate
from weftlm.gating.experts import ExpertPool, Member
from weftlm.gating.modular_lm import ModularLM
from weftlm.gating.scores import Unscored, score_shard
from weftlm.planning.counts import Counted
from weftlm.training.config import TrainingConfig
from weftlm.training.runtime import choose_runtime

LARGEST_FLOPS, LARGEST_PARAMETERS = 4e10, 2e8
"""FLOPs of the largest piece that is timed, a second on two cores, and of the largest model with all its layers."""
RUNS, SECONDS = 3, 0.5
"""A piece is timed for so many runs at least, and for so long, after a first one that is not timed."""
TOKENS, SHORT = 24, 32
"""Tokens that are generated, and the longest sequences by which that is timed."""
SOME = 4
"""Most adapters over one model that are run together."""


@dataclass
class Probe:
    """Pieces of work timed on this machine, each once.

    Attributes:
        clock: Clock in seconds; processor time is better where other work shares the machine and there is one thread.
        resident: Bytes that Python and the libraries hold before anything is timed.
    """

    clock: Callable[[], float] = time.perf_counter
    resident: float = field(default_factory=lambda: float(psutil.Process().memory_info().rss))
    _timed: dict[str, float] = field(default_factory=dict)

    def step(self, counted: Counted, training: TrainingConfig) -> float:
        """Seconds of a step of the trainer: draw, passes, clipping, update."""
        length, whole = training.sequence_length, training.batch_sequences
        small, rows, scale = _affordable(counted, "step", whole, length)
        micro = min(training.micro_batch(1), rows)
        rows -= rows % micro
        sizes = {"batch_sequences": rows, "micro_batch_sequences": micro, "steps": 1000, "tokens": None}
        endless = {"exhaustion": "repeat", "max_epochs": None}
        config = training.model_copy(update={**sizes, **endless, "device": "cpu"})

        def prepared() -> Callable[[], Any]:
            source: Any = ArraySource(_tokens(small, 4 * rows * length))
            if counted.config.is_encoder_decoder:
                example = _tokens(small, length), _tokens(small, counted.predicted(length))
                source = ExampleSource([example] * rows, 0)
            runtime = choose_runtime(config, parameters=small.parameters)
            trainer = domain_trainer(small.build(), "probe", source, config, runtime=runtime, folder=None, seed=0)
            trainer.module.train()
            return trainer.train_step

        return scale * whole / rows * self._seconds(("step", small, config), prepared)

    def score(self, counted: Counted, batch: int, length: int) -> float:
        """Seconds of scoring a sequence under all experts on a model."""
        some = replace(counted, experts=min(SOME, counted.experts))
        small, rows, scale = _affordable(some, "forward", batch, length)

        def prepared() -> Callable[[], Any]:
            tokens_NT1 = _tokens(small, rows * (length + 1)).reshape(rows, -1).astype(np.int32)
            text = Unscored("domain", "text", 0, tokens_NT1, np.arange(rows), seed=0)
            pool = _pool(small)
            return lambda: score_shard(pool, text, rows, small.bf16)

        found = self._seconds(("score", small, rows, length), prepared)
        return found * scale / rows * counted.experts / some.experts

    def generate(self, counted: Counted, batch: int, prompt: int, new: int = 1, *, gated: bool) -> float:
        """Seconds of `new` tokens behind each of some prompts, by a model, or a gate over the experts on it."""
        some = replace(counted, experts=min(SOME, counted.experts))
        small, rows, scale = _affordable(some, "forward", batch, prompt)

        def prepared() -> Callable[[], Any]:
            gate = FixedShareGate.of(np.full(some.experts, 1.0 / some.experts), 0.02)
            model: Any = ModularLM(_pool(small), gate) if gated else small.build().eval()
            model.generation_config.eos_token_id = None
            tokens = torch.from_numpy(_tokens(small, rows * prompt).reshape(rows, prompt))
            how = {"attention_mask": torch.ones_like(tokens), "do_sample": False, "pad_token_id": 0}
            return lambda: model.generate(tokens, max_new_tokens=new, **how)

        found = self._seconds(("generate", small, rows, prompt, new, gated), prepared)
        return found * scale * batch / rows * counted.experts / some.experts

    def token(self, counted: Counted, batch: int, prompt: int, *, gated: bool) -> float:
        """Seconds of a token of every sequence of a batch, behind its prompt."""
        short = min(prompt, SHORT)
        one, more = (self.generate(counted, batch, short, new, gated=gated) for new in (1, 1 + TOKENS))
        return max((more - one) / TOKENS, 0.5 * more / (1 + TOKENS))  # whatever the noise of the two

    def _seconds(self, piece: Any, prepared: Callable[[], Callable[[], Any]]) -> float:
        """Mean seconds of a run; means, since a plan is about sums."""
        key = repr(piece)
        if key not in self._timed:
            with torch.random.fork_rng(devices=[]):
                run = prepared()
                run()
                start, spent, runs = self.clock(), 0.0, 0
                while runs < RUNS or spent < SECONDS:
                    run()
                    spent, runs = self.clock() - start, runs + 1
                self._timed[key] = spent / runs
        return self._timed[key]


def _affordable(counted: Counted, kind: str, batch: int, length: int) -> tuple[Counted, int, float]:
    """The model or two layers of it, how many sequences of a batch can be timed, and FLOPs of all layers over those."""
    small, one = counted, getattr(counted, kind)(1, length).flops * counted.experts
    if counted.parameters > LARGEST_PARAMETERS or one > LARGEST_FLOPS:
        small = counted.shallow(2)
    part = getattr(small, kind)(1, length).flops * counted.experts
    return small, max(1, min(batch, int(LARGEST_FLOPS / part))), one / part


def _tokens(counted: Counted, count: int) -> Any:
    return np.random.default_rng(0).integers(int(counted.config.vocab_size), size=count)


def _pool(counted: Counted) -> ExpertPool:
    """The experts on a model, adapters or the model itself, with random weights."""
    if counted.adapter is None:
        return ExpertPool([Member("expert 0", counted.build())])
    base, rank = replace(counted, adapter=None).build(), counted.adapter.rank
    factors = {
        name: LoRAFactors(0.02 * torch.randn(rank, i), 0.02 * torch.randn(o, rank), 1.0)
        for name, (i, o) in counted.targets.items()
    }
    names = [f"expert {number}" for number in range(counted.experts)]
    return ExpertPool([Member(name, base, LoRAExpert(name, BaseReference("random"), factors, {})) for name in names])
