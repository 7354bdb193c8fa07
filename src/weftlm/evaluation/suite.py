"""Evaluate a model on every domain's held-out text and on the target's, beside each other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from weftlm.corpora.examples import examples_of
from weftlm.corpora.source import Source
from weftlm.errors import ConfigError, DataError, NumericsError
from weftlm.evaluation.choices import ChoiceResult
from weftlm.evaluation.config import EvaluationConfig
from weftlm.evaluation.examples import evaluate_examples
from weftlm.evaluation.perplexity import evaluate_source
from weftlm.evaluation.result import (
    Difference,
    MeanResult,
    SetResult,
    mean_result,
    paired_difference,
)
from weftlm.models.hf import SequenceLosses
from weftlm.models.language_model import LanguageModel

TARGET = "target"
"""The name of the target's held-out set in every result."""


@dataclass(frozen=True)
class SuiteResult:
    """One evaluation over all sets.

    Attributes:
        sets: result by set name; the target's is under `"target"`.
        generic: mean over the domains, the target left out; None when only the target was evaluated.
        tasks: ranked answers by task, where any were asked.
        sequence_length: tokens of the windows that were scored.
    """

    sets: dict[str, SetResult]
    generic: MeanResult | None
    tasks: dict[str, ChoiceResult] = field(default_factory=dict)
    sequence_length: int | None = None

    @property
    def domains(self) -> dict[str, SetResult]:
        """The domains' results: every set but the target."""
        return {name: result for name, result in self.sets.items() if name != TARGET}

    def to_json(self) -> dict[str, Any]:
        """`{"sequence_length": T, "sets": {name: numbers}, "generic": numbers}`, as metrics and results hold it.

        With tasks also `{"tasks": {name: numbers}}`, without what was right question by question.
        """
        value: dict[str, Any] = {} if self.sequence_length is None else {"sequence_length": self.sequence_length}
        value |= {"sets": {name: result.to_json() for name, result in self.sets.items()}}
        if self.generic is not None:
            value["generic"] = self.generic.to_json()
        if self.tasks:
            value["tasks"] = {
                name: {key: number for key, number in result.to_json().items() if key != "correct"}
                for name, result in self.tasks.items()
            }
        return value


@dataclass(frozen=True)
class SuiteDifference:
    """One model minus another over the same sets; negative where the first is better.

    Attributes:
        sets: paired difference by set name.
        generic: mean over the domains: what a gain on the target cost elsewhere; None without domains.
    """

    sets: dict[str, Difference]
    generic: MeanResult | None


def evaluate_suite(
    model: nn.Module | LanguageModel,
    domains: Mapping[str, Source],
    target: Source | None = None,
    *,
    sequence_length: int,
    config: EvaluationConfig | None = None,
    device: torch.device | str = "cpu",
    losses: SequenceLosses | None = None,
    per_window: bool = False,
    distributed: bool = False,
) -> SuiteResult:
    """Evaluate a model on the domains' held-out sets and on the target's; see `evaluate_source`.

    A set of examples is scored on its targets (`evaluate_examples`), unless `losses` says how the model is scored.

    Args:
        domains: held-out source by domain.
        target: the target's held-out source.
        config: how much to score; the defaults when None.
    Raises:
        ConfigError: a domain is called "target", or there is nothing to evaluate.
        DataError, NumericsError: as `evaluate_source`, naming the set.
    """
    if TARGET in domains:
        raise ConfigError(f"a domain is called {TARGET!r}, which names the target's own set; rename the domain")
    sources = dict(domains) if target is None else {TARGET: target, **domains}
    if not sources:
        raise ConfigError("there is nothing to evaluate: no domain and no target has held-out text")
    config = EvaluationConfig() if config is None else config
    how: dict[str, Any] = {
        "sequence_length": sequence_length, "batch_size": config.batch_size, "max_tokens": config.max_tokens_per_set,
        "device": device, "per_window": per_window, "distributed": distributed,
    }  # fmt: skip
    sets = {}
    for name, source in sources.items():
        try:
            examples = examples_of(source) if losses is None else None
            if examples is not None:
                sets[name] = evaluate_examples(model, examples, **how)
            else:
                sets[name] = evaluate_source(model, source, losses=losses, **how)
        except (DataError, NumericsError) as error:
            raise type(error)(f"evaluating {name!r}: {error}") from error
    mean = mean_result({name: sets[name] for name in domains}) if domains else None
    return SuiteResult(sets, mean, sequence_length=sequence_length)


def suite_difference(first: SuiteResult, second: SuiteResult) -> SuiteDifference:
    """Compare two evaluations set by set, window by window.

    Raises:
        DataError: the two hold different sets or windows, or were not evaluated with per_window=True.
    """
    if first.sets.keys() != second.sets.keys():
        raise DataError(
            f"the two evaluations hold different sets: {', '.join(sorted(first.sets.keys() ^ second.sets.keys()))} "
            "in only one of them"
        )
    sets = {name: paired_difference(first.sets[name], second.sets[name]) for name in first.sets}
    generic = {name: difference for name, difference in sets.items() if name != TARGET}
    return SuiteDifference(sets, mean_result(generic) if generic else None)
