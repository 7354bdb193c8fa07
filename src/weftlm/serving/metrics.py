"""Figures for Prometheus: requests, times, and the load of the engines."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from weftlm.serving.engine import Engine, RequestState

SECONDS = (0.001, 0.005, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60, 120, 300)
LOAD = (
    (GaugeMetricFamily, "weftlm_running_requests", "Answers being generated.", "running"),
    (GaugeMetricFamily, "weftlm_waiting_requests", "Answers in the queue.", "waiting"),
    (CounterMetricFamily, "weftlm_generated_tokens", "Tokens generated.", "generated_tokens"),
    (CounterMetricFamily, "weftlm_prompt_tokens", "Tokens of prompts read.", "prompt_tokens"),
)
"""Kind, name and description of the figures of an engine, and its attribute that holds them."""


class Metrics(Collector):
    """The figures of one server, in a registry of its own.

    Attributes:
        registry: Everything `/metrics` shows.
        requests: HTTP requests by method, route and status.
        open: HTTP requests being answered.
        seconds: Histogram of the time of a request, by route.
        first: Histogram of the time to the first token, by model.
        per_token: Histogram of the mean gap between an answer's tokens, by model.
    """

    def __init__(self, engines: Mapping[str, Engine]) -> None:
        self.engines = engines
        own = self.registry = CollectorRegistry()

        def histogram(name: str, text: str, label: str) -> Histogram:
            return Histogram(name, text, [label], buckets=SECONDS, registry=own)

        labels = ["method", "route", "status"]
        self.requests = Counter("weftlm_http_requests", "Requests by route and status.", labels, registry=own)
        self.open = Gauge("weftlm_http_requests_open", "Requests being answered.", registry=own)
        text = "From a request's head to the end of its response."
        self.seconds = histogram("weftlm_http_request_seconds", text, "route")
        text = "From a request to the first token of an answer."
        self.first = histogram("weftlm_time_to_first_token_seconds", text, "model")
        text = "Mean gap between the tokens of an answer of two tokens and more."
        self.per_token = histogram("weftlm_time_per_token_seconds", text, "model")
        own.register(self)

    def observe(self, model: str, request: RequestState) -> None:
        """The times of an answer that has ended."""
        submitted, first, last = request.times
        if request.tokens:
            self.first.labels(model).observe(first - submitted)
        if len(request.tokens) > 1:
            self.per_token.labels(model).observe((last - first) / (len(request.tokens) - 1))

    def collect(self) -> Iterator[Metric]:
        """The load of the engines, read when asked."""
        for family, name, text, attribute in LOAD:
            figures = family(name, text, labels=["model"])
            for model, engine in self.engines.items():
                figures.add_metric([model], getattr(engine, attribute))
            yield figures
        ended = CounterMetricFamily("weftlm_finished_requests", "Answers ended.", labels=["model", "reason"])
        for model, engine in self.engines.items():
            for reason, count in engine.finished.items():
                ended.add_metric([model, reason], count)
        yield ended
