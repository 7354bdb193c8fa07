"""This machine's speed: what does the work is run a few times on random weights and made-up tokens, and timed.

    seconds = seconds of what was timed  x  FLOPs of what is planned / FLOPs of what was timed

Training is timed by steps of the trainer, reading a text by forward passes, writing one by `generate`. What takes more
than `LARGEST_FLOPS` is timed with fewer sequences, and with two layers where one sequence is too much.
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
from weftlm.models.hf import token_losses
from weftlm.planning.counts import Counted
from weftlm.training.config import TrainingConfig
from weftlm.training.runtime import choose_runtime

LARGEST_FLOPS, LARGEST_PARAMETERS = 4e10, 2e8
"""FLOPs of the largest piece that is timed, a second on two cores, and of the largest model with all its layers."""
RUNS, SECONDS = 3, 0.5
"""A piece is timed for so many runs at least, and for so long, after a first one that is not timed."""
TOKENS = 32
"""Tokens that are generated."""


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

    def forward(self, counted: Counted, batch: int, length: int) -> float:
        """Seconds of the losses of a batch, without gradients."""
        small, rows, scale = _affordable(counted, "forward", batch, length)

        def prepared() -> Callable[[], Any]:
            model, tokens_BT1 = small.build().eval(), _tokens(small, rows, length + 1)

            def run() -> None:
                with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=small.bf16):
                    token_losses(model, torch.from_numpy(tokens_BT1))

            return run

        return scale * batch / rows * self._seconds(("forward", small, rows, length), prepared)

    def token(self, counted: Counted, batch: int) -> float:
        """Seconds of a generated token of every sequence of a batch."""
        small, rows, scale = _affordable(counted, "forward", batch, TOKENS)

        def prepared() -> Callable[[], Any]:
            model, tokens_B1 = small.build().eval(), torch.from_numpy(_tokens(small, rows, 1))
            model.generation_config.eos_token_id = None
            how = {"attention_mask": torch.ones_like(tokens_B1), "do_sample": False, "pad_token_id": 0}
            return lambda: model.generate(tokens_B1, max_new_tokens=TOKENS, **how)

        return scale * batch / rows / TOKENS * self._seconds(("generate", small, rows), prepared)

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
    small, one = replace(counted, experts=1), getattr(counted, kind)(1, length).flops
    if counted.parameters > LARGEST_PARAMETERS or one > LARGEST_FLOPS:
        small = small.shallow(2)
    part = getattr(small, kind)(1, length).flops
    return small, max(1, min(batch, int(LARGEST_FLOPS / part))), one / part


def _tokens(counted: Counted, *shape: int) -> Any:
    return np.random.default_rng(0).integers(int(counted.config.vocab_size), size=shape)
