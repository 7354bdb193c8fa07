"""Recipe sections are strict, and every message helps."""

from __future__ import annotations

import re

import pytest
from support.tiny_project import recipe_value

from weftlm.config import Section, apply_overrides, changed_keys, differences, validate
from weftlm.errors import ConfigError
from weftlm.pipeline.recipe import Recipe


class Inner(Section):
    learning_rate: float = 0.1
    names: tuple[str, ...] = ()


class Outer(Section):
    inner: Inner = Inner()
    steps: int


def test_every_problem_is_reported_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        validate(Outer, {"inner": {"learning_rate": "fast"}, "stepz": 3}, "training")
    message = str(caught.value)
    assert "training.steps: missing" in message
    assert "training.inner.learning_rate" in message
    assert "'fast'" in message
    assert "training.stepz: unknown key; did you mean 'steps'?" in message


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("inner.learning_rate=3e-4", ("inner", "learning_rate"), 3e-4),
        ("inner.names=[a, b]", ("inner", "names"), ["a", "b"]),
        ("inner.names.0=z", ("inner", "names", 0), "z"),
        ("new.section.key=null", ("new", "section", "key"), None),
        ("steps=7", ("steps",), 7),
        ("steps=nan", ("steps",), "nan"),
        ("steps==", ("steps",), "="),
        ("inner.learning_rate=1_000.5", ("inner", "learning_rate"), 1000.5),
    ],
)
def test_overrides_reach_any_depth(override: str, path: tuple[str | int, ...], value: object) -> None:
    original = {"steps": 1, "inner": {"names": ["x"]}}
    here: object = apply_overrides(original, [override])
    assert original == {"steps": 1, "inner": {"names": ["x"]}}
    for part in path:
        here = here[part]  # type: ignore[index]
    assert here == value


@pytest.mark.parametrize("override", ["steps", "=3", "a..b=1", "inner.names.5=z", "steps.deep=1", "steps={"])
def test_malformed_overrides_are_refused(override: str) -> None:
    with pytest.raises(ConfigError, match="--set"):
        apply_overrides({"steps": 1, "inner": {"names": ["x"]}}, [override])


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("learning_rate", "did you mean training.lr?"),
        ("lr", "did you mean training.lr?"),
        ("batch_size", "did you mean training.batch_sequences?"),
        ("epochs", "did you mean training.steps?"),
        ("dataset", "did you mean data.corpora?"),
        ("training.learning_rate", "did you mean 'lr'?"),
        ("training.per_device_train_batch_size", "did you mean 'batch_sequences'?"),
        ("training.max_steps", "did you mean 'steps'?"),
        ("training.num_train_epochs", "did you mean 'steps'?"),
        ("training.seq_len", "did you mean 'sequence_length'?"),
        ("training.seed", "did you mean seed?"),
        ("evaluation.batch_sequences", "did you mean 'batch_size'?"),
        ("model.model_name_or_path", "did you mean 'pretrained'?"),
        ("model.hidden_size", "did you mean 'config'?"),
        ("model.lora.lora_alpha", "did you mean 'alpha'?"),
        ("model.lora_dropout", "did you mean model.lora.dropout?"),
        ("experts.r", "did you mean experts.lora.rank?"),
        ("experts.learning_rate", "did you mean experts.training.lr?"),
        ("data.dataset", "did you mean 'corpora'?"),
        ("gating.fit.learning_rate", "did you mean 'lr'?"),
    ],
)
def test_keys_as_they_are_called_elsewhere_are_suggested_in_their_place(place: str, said: str) -> None:
    value = apply_overrides(recipe_value(), [f"{place}=1"])
    with pytest.raises(ConfigError) as caught:
        validate(Recipe, value, "")
    line = next(line for line in str(caught.value).splitlines() if line.startswith(f"{place}: "))
    assert said in line


LONG = "x" * 300


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ({"a": {"b": 1}}, {"a": {"b": 2}}, ["a.b: 1 before, 2 now"]),
        ({"a": 1}, {"b": None}, ["a: 1 before, absent now", "b: absent before, None now"]),
        ({"a": [1, 2]}, {"a": [1, 3]}, ["a.1: 2 before, 3 now"]),
        ({"a": 1}, {"a": True}, ["a: 1 before, True now"]),
        ({"a": LONG + "1" + LONG}, {"a": LONG + "2" + LONG}, None),
        ({"a": LONG}, {"a": LONG + "y"}, None),
        ({"a": [LONG]}, {"a": [LONG, 1]}, None),
        ({"a": [{"path": LONG + "/one"}]}, {"a": [{"path": LONG + "/two"}, {"path": LONG}]}, None),
    ],
)
def test_settings_that_differ_are_named_with_both_values_where_they_differ(old, new, told) -> None:
    found = changed_keys(old, new)
    if told is not None:
        assert found == told
        return
    (line,) = found
    before, now = re.fullmatch(r"a(?:\.0)?: (.*) before, (.*) now", line).groups()
    assert before != now
    assert max(len(before), len(now)) < 70


def test_many_differences_are_counted() -> None:
    old, new = ({f"k{number}": number + more for number in range(9)} for more in (0, 1))
    assert differences(old, new, most=2) == "k0: 0 before, 1 now; k1: 1 before, 2 now; 7 more"
    assert differences(old, old) == ""
