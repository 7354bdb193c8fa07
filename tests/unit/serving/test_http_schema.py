"""The OpenAPI document is complete and true: schemathesis finds no request that the server treats otherwise."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import schemathesis
from schemathesis.engine import events, from_schema
from support.fake_engine import FakeEngine, words
from support.served import POSITIONS, write_model

from weftlm.pipeline.any_model import open_model
from weftlm.serving.http import build_app
from weftlm.serving.inspector import inspector_router
from weftlm.serving.serve_config import ServeConfig

ROUTES = {
    "/healthz", "/metrics", "/v1/models", "/v1/models/{model}", "/v1/completions", "/v1/chat/completions",
    "/api/models", "/api/inspect", "/api/compare", "/api/leave-one-out", "/api/generate",
}  # fmt: skip


def test_the_server_does_what_its_document_says(tmp_path: Path) -> None:
    opened = open_model(write_model(tmp_path, "plain"))
    config = ServeConfig(
        max_prompt_characters=8, max_prompt_tokens=200, max_new_tokens=4, max_prompts=3, max_choices=3, max_messages=2
    )
    engines = {"tiny": FakeEngine(opened, words(opened))}
    # So few characters fit the model's context, whatever they are: each is four tokens at most.
    page = inspector_router({"tiny": opened}, engines, max_characters=POSITIONS // 4 - 1)
    app = build_app(engines, config, pages=[page])
    schema = schemathesis.openapi.from_asgi("/openapi.json", app)
    schema.config.generation.max_examples = 3
    schema.config.generation.deterministic = True
    checked: Counter[str] = Counter()
    statuses: Counter[int] = Counter()
    found = []
    for event in from_schema(schema).execute():
        assert not isinstance(event, events.NonFatalError | events.FatalError), event
        if not isinstance(event, events.ScenarioFinished):
            continue
        statuses.update(
            seen.response.status_code for seen in event.recorder.interactions.values() if seen.response is not None
        )
        for case, checks in event.recorder.checks.items():
            checked.update(check.name for check in checks)
            body = event.recorder.cases[case].value.body
            wrong = [check.failure_info.failure.message for check in checks if check.failure_info is not None]
            found += [f"{event.recorder.label}: {message} {body!r}" for message in wrong]
    assert found == []
    assert checked["not_a_server_error"] > 200
    assert min(checked[name] for name in ("positive_data_acceptance", "negative_data_rejection", "ignored_auth")) > 100
    assert statuses[200] > 50
    assert statuses[400] > 50
    assert not any(status >= 500 for status in statuses)
    assert set(app.openapi()["paths"]) == ROUTES
