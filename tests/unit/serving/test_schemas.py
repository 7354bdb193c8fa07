"""What clients send is checked in time and space that do not grow with how wrong it is."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from weftlm.serving.schemas import ChatRequest, CompletionRequest


@pytest.mark.parametrize(
    ("model", "fields"),
    [
        (CompletionRequest, {"prompt": [{}] * 1_000}),
        (CompletionRequest, {"prompt": [[{}] * 1_000] * 100}),
        (CompletionRequest, {"prompt": [[]] * 100}),
        (CompletionRequest, {"prompt": "a", **{f"a{number}": 1 for number in range(1_000)}}),
        (CompletionRequest, {"prompt": "a", "metadata": {f"a{number}": 1 for number in range(1_000)}}),
        (ChatRequest, {"messages": [{}] * 100}),
        (ChatRequest, {"messages": [{"role": "user", "content": [{}] * 100}] * 100}),
        (ChatRequest, {"messages": [{"role": "user", "content": "a", **{f"a{n}": 1 for n in range(1_000)}}]}),
    ],
)
def test_a_body_of_many_faults_is_reported_by_its_first(model: Any, fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError) as caught:
        model.model_validate({"model": "tiny", **fields})
    assert 1 <= caught.value.error_count() <= 8
