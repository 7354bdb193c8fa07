"""Figures for Prometheus: requests, times, and the load of the engines."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from weftlm.serving.engine import Engine, RequestState

SECONDS = (0.001, 0.005, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60, 120, 300)


class Metrics:
    """The figures of one server, in a registry of its own: everything `/metrics` shows."""

    def __init__(self, engines: Mapping[str, Engine]) -> None:
        self.registry = CollectorRegistry()

        def made(kind: Any, name: str, text: str, *labels: str, **options: Any) -> Any:
            return kind(f"weftlm_{name}", text, labels, registry=self.registry, **options)

        def seconds(name: str, text: str, label: str) -> Any:
            return made(Histogram, name, text, label, buckets=SECONDS)

        self.requests = made(Counter, "http_requests", "Requests by route and status.", "method", "route", "status")
        self.open = made(Gauge, "http_requests_open", "Requests being answered.")
        self.seconds = seconds("http_request_seconds", "From a request's head to the end of its response.", "route")
        self._first = seconds("time_to_first_token_seconds", "From a request to an answer's first token.", "model")
        self._gap = seconds("time_per_token_seconds", "Mean gap between the tokens of an answer.", "model")
        self._generated = made(Counter, "generated_tokens", "Tokens of ended answers.", "model")
        self._read = made(Counter, "prompt_tokens", "Tokens of prompts of ended answers.", "model")
        self._finished = made(Counter, "finished_requests", "Answers ended.", "model", "reason")
        running = made(Gauge, "running_requests", "Answers being generated.", "model")
        waiting = made(Gauge, "waiting_requests", "Answers in the queue.", "model")
        for model, engine in engines.items():
            running.labels(model).set_function(partial(getattr, engine, "running"))
            waiting.labels(model).set_function(partial(getattr, engine, "waiting"))

    def observe(self, model: str, request: RequestState) -> None:
        """Count an answer that has ended, or that was given up."""
        submitted, first, last = request.times
        if request.tokens:
            self._first.labels(model).observe(first - submitted)
        if len(request.tokens) > 1:
            self._gap.labels(model).observe((last - first) / (len(request.tokens) - 1))
        self._generated.labels(model).inc(len(request.tokens))
        self._read.labels(model).inc(request.read)
        self._finished.labels(model, request.finished.reason if request.finished else "cancelled").inc()
