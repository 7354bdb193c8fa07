"""The OpenAPI document is complete and true: schemathesis finds no answer and no accepted body beside it."""

from __future__ import annotations

from collections import Counter

import schemathesis
from schemathesis.engine import events, from_schema
from support.fake_engine import FakeEngine, words

from weftlm.pipeline.any_model import OpenModel
from weftlm.serving.app import build_app
from weftlm.serving.serve_config import ServeConfig

ROUTES = {
    "/healthz", "/metrics", "/v1/models", "/v1/models/{model}", "/v1/completions", "/v1/chat/completions",
    "/api/models", "/api/inspect",
}  # fmt: skip


def test_the_server_does_what_its_document_says(opened: OpenModel) -> None:
    config = ServeConfig(max_prompt_tokens=200, max_new_tokens=4, max_answers=16)
    engines = {"tiny": FakeEngine(opened, words(opened))}
    app = build_app(engines, config)
    schema = schemathesis.openapi.from_asgi("/openapi.json", app)
    schema.config.phases.update(phases=["fuzzing"])  # every field by itself, as "coverage" has it, takes a minute
    schema.config.generation.max_examples = 6
    schema.config.generation.deterministic = True
    # A valid body may name a model that is not served, or be too long for it, which no schema says.
    schema.config.checks.positive_data_acceptance.enabled = False
    schema.config.checks.negative_data_rejection.expected_statuses = ["400", "404", "413"]
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
    assert checked["not_a_server_error"] > 20
    assert min(checked[name] for name in ("negative_data_rejection", "response_schema_conformance")) > 5
    assert statuses[200] > 2
    assert statuses[400] > 5
    assert not any(status >= 500 for status in statuses)
    assert set(app.openapi()["paths"]) == ROUTES
