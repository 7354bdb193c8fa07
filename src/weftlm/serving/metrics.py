"""Figures for Prometheus: requests, times, and the load of the engines."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from weftlm.serving.api_errors import CLIENT_LEFT
from weftlm.serving.request import Generator

METHODS = frozenset("GET HEAD POST PUT PATCH DELETE OPTIONS TRACE CONNECT".split())
REQUEST_SECONDS = (0.005, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60, 120, 300)
TOKEN_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2)


class Metrics(Collector):
    """The figures of one server, in a registry of its own.

    Attributes:
        registry: Everything `/metrics` shows.
        first: Histogram of the time to the first token, by model.
        per_token: Histogram of the mean gap between an answer's tokens, by model.
    """

    def __init__(self, engines: Mapping[str, Generator]) -> None:
        self.engines = engines
        own = self.registry = CollectorRegistry()
        self.requests = Counter(
            "weftlm_http_requests", "Requests by route and status.", ["method", "route", "status"], registry=own
        )
        self.seconds = Histogram(
            "weftlm_http_request_seconds", "From a request's head to the end of its response.", ["route"],
            buckets=REQUEST_SECONDS, registry=own,
        )  # fmt: skip
        self.open = Gauge("weftlm_http_requests_open", "Requests being answered.", registry=own)
        self.first = Histogram(
            "weftlm_time_to_first_token_seconds", "From a request to the first token of an answer.", ["model"],
            buckets=REQUEST_SECONDS, registry=own,
        )  # fmt: skip
        self.per_token = Histogram(
            "weftlm_time_per_token_seconds", "Mean gap between the tokens of an answer of two tokens and more.",
            ["model"], buckets=TOKEN_SECONDS, registry=own,
        )  # fmt: skip
        own.register(self)

    def collect(self) -> Iterator[Metric]:
        """The load of the engines, read when asked."""
        running = GaugeMetricFamily("weftlm_running_requests", "Answers being generated.", labels=["model"])
        waiting = GaugeMetricFamily("weftlm_waiting_requests", "Answers in the queue.", labels=["model"])
        generated = CounterMetricFamily("weftlm_generated_tokens", "Tokens generated.", labels=["model"])
        prompt = CounterMetricFamily("weftlm_prompt_tokens", "Tokens of prompts read.", labels=["model"])
        finished = CounterMetricFamily("weftlm_finished_requests", "Answers ended.", labels=["model", "reason"])
        for name, engine in self.engines.items():
            load = engine.load()
            running.add_metric([name], load.running)
            waiting.add_metric([name], load.waiting)
            generated.add_metric([name], load.generated_tokens)
            prompt.add_metric([name], load.prompt_tokens)
            for reason, count in load.finished.items():
                finished.add_metric([name, reason], count)
        yield from (running, waiting, generated, prompt, finished)


class Counting:
    """ASGI middleware that counts requests and times them; a route is its template, never what a client wrote."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app = app
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status = CLIENT_LEFT
        start = time.perf_counter()

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        self.metrics.open.inc()
        try:
            await self.app(scope, receive, counted)
        except Exception:
            status = 500
            raise
        finally:
            route = getattr(scope.get("route"), "path", "none")
            method = scope["method"] if scope["method"] in METHODS else "other"
            self.metrics.open.dec()
            self.metrics.requests.labels(method, route, str(status)).inc()
            self.metrics.seconds.labels(route).observe(time.perf_counter() - start)
