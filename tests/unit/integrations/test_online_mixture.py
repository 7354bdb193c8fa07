"""What is no token source, policy or option of an `OnlineMixture` is refused with its place."""

from __future__ import annotations

from pathlib import Path

import datasets
import numpy as np
import pytest
import torch

from weftlm.errors import ConfigError, DataError
from weftlm.integrations.online_mixture import OnlineMixture

GOOD = np.arange(200) % 7


def rows(*values):
    return datasets.Dataset.from_dict({"input_ids": list(values)})


SOURCES = {
    "ragged": [[1, 2], [3]],
    "rows": [[1, 2], [3, 4]],
    "floats": [1.0, 2.5] * 50,
    "text": "hello",
    "bytes": b"hello",
    "nothing": None,
    "a hole": [1, None] * 50,
    "number": 3,
    "negative": [-1] * 100,
    "too large": [2**70] * 100,
    "unsigned": np.full(100, 2**63, dtype=np.uint64),
    "truth": [True] * 100,
    "generator": (number for number in range(100)),
    "path": Path("x"),
    "batch": torch.zeros(4, 50, dtype=torch.long),
    "float tensor": torch.zeros(100),
    "bfloat16 tensor": torch.zeros(100, dtype=torch.bfloat16),
    "tensor with a gradient": torch.zeros(100, requires_grad=True),
    "tensor elsewhere": torch.zeros(100, dtype=torch.long, device="meta"),
    "text of a dataset": rows("ab"),
    "numbers of a dataset": rows(1, 2, 3),
    "floats of a dataset": rows([1.5] * 100),
    "nested lists of a dataset": rows([[1, 2]], [[3]]),
    "a row missing": rows([1] * 100, None),
    "a token missing": rows([1, None] * 50),
    "splits of a dataset": datasets.DatasetDict({"train": rows([1] * 100)}),
    "no input_ids": datasets.Dataset.from_dict({"text": ["a"]}),
}
OPTIONS = {
    "sources": ([[GOOD]], [None], [3], [{}], [{1: GOOD}]),
    "policy": ([None], [["dga"]], [3], ["nope"], [{"policy": "uniform", "nope": 1}]),
    "sequence_length": (["8"], [0], [-1], [8.0], [True], [None]),
    "seed": ([-1], ["x"], [None]),
    "exhaustion": (["x"], [None]),
    "max_epochs": ([-1], ["x"], [float("nan")]),
    "alignment": ([3], [{"nope": 1}], [{"probe": "batch"}]),
    "nonsense": ([1],),
    "reference": ([3],),
}


@pytest.mark.parametrize("kind", SOURCES)
@pytest.mark.parametrize("role", ["domain", "target"])
def test_what_is_no_row_of_token_ids_is_refused_by_name(kind, role):
    if (kind, role) == ("nothing", "target"):
        return  # there is none
    sources = {"a": GOOD, "b": SOURCES[kind] if role == "domain" else GOOD}
    target = SOURCES[kind] if role == "target" else None
    with pytest.raises(DataError, match="domain 'b'" if role == "domain" else "target"):
        OnlineMixture.of(sources, "uniform", target=target, sequence_length=8)


@pytest.mark.parametrize(("option", "number"), [(name, n) for name, all_ in OPTIONS.items() for n in range(len(all_))])
def test_what_is_no_value_of_an_option_is_refused_by_name(option, number):
    (value,) = OPTIONS[option][number]
    asked = {"sources": {"a": GOOD, "b": GOOD}, "policy": "uniform", "sequence_length": 8, option: value}
    with pytest.raises(ConfigError, match=option):
        OnlineMixture.of(asked.pop("sources"), **asked)


@pytest.mark.parametrize(
    "tokens", [GOOD, GOOD.tolist(), torch.from_numpy(GOOD), rows(GOOD[:90], GOOD[90:]), GOOD.astype("u1")]
)
def test_every_form_of_the_same_tokens_gives_the_same_source(tokens):
    mixture = OnlineMixture.of({"a": tokens}, "uniform", sequence_length=8)
    assert (
        mixture.task.sources[0].fingerprint
        == OnlineMixture.of({"a": GOOD}, sequence_length=8, policy="uniform").task.sources[0].fingerprint
    )
