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
from weftlm.evaluation.perplexity import evaluate_examples, evaluate_source
from weftlm.evaluation.result import MeanResult, SetResult, mean_result, paired_difference

TARGET = "target"
"""The name of the target's held-out set in every result."""


@dataclass(frozen=True)
class SuiteResult:
    """One evaluation over all sets.

    Attributes:
        sets: Result by set name; the target's is under `"target"`.
        generic: Mean over the domains, the target left out; None when only the target was evaluated.
        tasks: Ranked answers by task, where any were asked.
        sequence_length: Tokens of the windows that were scored.
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
            value["tasks"] = {name: result.to_json() for name, result in self.tasks.items()}
        return value


def evaluate_suite(
    model: nn.Module,
    domains: Mapping[str, Source],
    target: Source | None = None,
    *,
    sequence_length: int,
    config: EvaluationConfig | None = None,
    device: torch.device | str = "cpu",
    distributed: bool = False,
) -> SuiteResult:
    """Evaluate a model on the domains' held-out sets and on the target's; see `evaluate_source`.

    A set of examples is scored on its targets (`evaluate_examples`).

    Args:
        domains: Held-out source by domain.
        target: Held-out source of the target.
        config: How much to score; the defaults when None.
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
        "device": device, "distributed": distributed,
    }  # fmt: skip
    sets = {}
    for name, source in sources.items():
        try:
            examples = examples_of(source)
            if examples is not None:
                sets[name] = evaluate_examples(model, examples, **how)
            else:
                sets[name] = evaluate_source(model, source, **how)
        except (DataError, NumericsError) as error:
            raise type(error)(f"evaluating {name!r}: {error}") from error
    mean = mean_result({name: sets[name] for name in domains}) if domains else None
    return SuiteResult(sets, mean, sequence_length=sequence_length)


def suite_difference(first: SuiteResult, second: SuiteResult) -> dict[str, MeanResult]:
    """One model minus another, window by window, by set; negative where the first is better.

    With domains also `generic`, the mean over them: what a gain on the target cost elsewhere.

    Raises:
        DataError: the two hold different sets or windows.
    """
    if first.sets.keys() != second.sets.keys():
        names = ", ".join(sorted(first.sets.keys() ^ second.sets.keys()))
        raise DataError(f"the two evaluations hold different sets: {names} in only one of them")
    sets = {name: paired_difference(one.windows, second.sets[name].windows) for name, one in first.sets.items()}
    domains = {name: sets[name] for name in first.domains}
    return {**sets, "generic": mean_result(domains)} if domains else sets
