"""What clients send is checked in time and space that do not grow with how wrong it is."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from weftlm.serving.schemas import Bounds, request_models

BOUNDS = Bounds(
    names=("tiny",), max_token_id=9, max_prompt_tokens=1_000, max_prompt_characters=100, max_new_tokens=4,
    max_prompts=100, max_choices=2, max_answers=4, max_messages=100, max_top_logprobs=2, timeout_seconds=10.0,
)  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        (0, {"prompt": [{}] * 1_000}),
        (0, {"prompt": [[{}] * 1_000] * 100}),
        (0, {"prompt": [[]] * 100}),
        (1, {"messages": [{}] * 100}),
        (1, {"messages": [{"role": "user", "content": [{}] * 100}] * 100}),
    ],
)
def test_a_list_of_many_faults_is_reported_by_its_first(kind: int, fields: dict[str, Any]) -> None:
    model = request_models(BOUNDS)[kind]
    with pytest.raises(ValidationError) as caught:
        model.model_validate({"model": "tiny", **fields})
    assert 1 <= caught.value.error_count() <= 8
