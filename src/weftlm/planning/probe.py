"""This machine's speed: three real passes of a plan's own model, random weights, made-up tokens, the real trainer.

    seconds of a pass = seconds of the pass that was timed  x  its FLOPs / FLOPs of the timed one

A pass of more than `LARGEST_FLOPS` is timed with fewer sequences, and with two layers where one sequence is too much.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import psutil
import torch
from torch import nn

from weftlm.corpora.examples import ExampleSource
from weftlm.corpora.source import ArraySource, Source
from weftlm.experts.examples import domain_trainer
from weftlm.planning.counts import SHALLOW, Counted, checkpoint
from weftlm.training.config import TrainingConfig
from weftlm.training.runtime import choose_runtime

LARGEST_FLOPS = 4e10
"""FLOPs of the largest pass that is timed as it is: a second or less on two cores."""
LARGEST_PARAMETERS = 2e8
"""Parameters of the largest model that is timed with all its layers."""
PASSES, TOKENS = 3, 8


@dataclass
class Probe:
    """Passes timed on this machine, each once.

    Attributes:
        clock: seconds; processor time is better where other work shares the machine and there is one thread.
        resident: bytes that Python and the libraries hold before anything is timed.
    """

    clock: Callable[[], float] = time.perf_counter
    resident: float = field(default_factory=lambda: float(psutil.Process().memory_info().rss))
    _timed: dict[Any, float] = field(default_factory=dict)

    def training_step(self, counted: Counted, training: TrainingConfig) -> float:
        """Seconds of an optimizer step of the trainer on the whole batch: batch, passes, clipping, update."""
        length, micro = training.sequence_length, training.micro_batch(1)
        small, micro = _affordable(counted, "step", micro, length)
        batch = min(training.batch_sequences, micro * max(1, int(LARGEST_FLOPS / small.step(micro, length).flops)))
        batch -= batch % micro
        share = counted.step(1, length).flops * training.batch_sequences / (small.step(1, length).flops * batch)
        key = ("trainer", _key(small), batch, micro, length)
        if key not in self._timed:
            sizes = {"batch_sequences": batch, "micro_batch_sequences": micro, "steps": PASSES + 1, "tokens": None}
            config = training.model_copy(update={**sizes, "device": "cpu", "warmup_steps": 0})
            runtime = choose_runtime(config, parameters=small.sizes.parameters)
            source = _source(small, length, batch)
            trainer = domain_trainer(_real(small), "probe", source, config, runtime=runtime, folder=None, seed=0)
            trainer.module.train()
            self._timed[key] = self._mean(trainer.train_step)
        return self._timed[key] * share

    def seconds(self, counted: Counted, kind: str, batch: int, length: int) -> float:
        """Seconds of a `step` (forward and backward), a `forward` pass, or a `decode` of one token per sequence."""
        context = TOKENS // 2 if kind == "decode" else length
        small, rows = _affordable(counted, kind, batch, context)
        key = (kind, _key(small), rows, context)
        if key not in self._timed:
            model = _real(small).train(kind == "step")
            if kind == "decode":
                prompt = torch.zeros(rows, 1, dtype=torch.int64)
                how = {"attention_mask": torch.ones_like(prompt), "do_sample": False, "eos_token_id": None}
                generate: Any = model.generate
                run = functools.partial(generate, prompt, max_new_tokens=TOKENS, pad_token_id=0, **how)
                self._timed[key] = self._mean(run) / TOKENS
            elif kind == "step":
                self._timed[key] = self._mean(lambda: small.losses(model, rows, context).mean().backward())
            else:
                with torch.no_grad():
                    self._timed[key] = self._mean(lambda: small.losses(model, rows, context))
        full, timed = getattr(counted, kind)(batch, length), getattr(small, kind)(rows, context)
        return self._timed[key] * float(full.flops / timed.flops)

    def _mean(self, run: Callable[[], Any]) -> float:
        """Mean seconds of three runs after a first; a plan adds up, and so do means."""
        run()
        start = self.clock()
        for _ in range(PASSES):
            run()
        return (self.clock() - start) / PASSES


def _affordable(counted: Counted, kind: str, batch: int, length: int) -> tuple[Counted, int]:
    """The model, or two layers of it, and how many sequences of a pass can be timed."""
    if counted.sizes.parameters > LARGEST_PARAMETERS or getattr(counted, kind)(1, length).flops > LARGEST_FLOPS:
        counted = counted.shallow(SHALLOW[-1])
    return counted, min(batch, max(1, int(LARGEST_FLOPS / getattr(counted, kind)(1, length).flops)))


def _real(counted: Counted) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        model = counted.build()
    if counted.checkpointing:
        checkpoint(model)
    return model


def _source(counted: Counted, length: int, batch: int) -> Source:
    """Made-up text, or examples for an encoder-decoder, of one token."""
    if not counted.config.is_encoder_decoder:
        return ArraySource(np.zeros((PASSES + 1) * batch * length + 1, dtype=np.int64))
    example = np.zeros(length, dtype=np.int64), np.zeros(counted.predicted(length), dtype=np.int64)
    return ExampleSource([example] * batch, 0)


def _key(counted: Counted) -> tuple[Any, ...]:
    adapter = None if counted.adapter is None else counted.adapter.model_dump_json()
    return counted.config.to_json_string(), counted.dtype, counted.bf16, counted.checkpointing, adapter
