"""The web application: routes, limits, keys, figures and errors around the engines."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager

from fastapi import APIRouter, FastAPI
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import Response

from weftlm import __version__
from weftlm.errors import ConfigError
from weftlm.serving.answers import GRACE_SECONDS
from weftlm.serving.api_errors import add_handlers
from weftlm.serving.limits import Hosts, Intake, Keys
from weftlm.serving.metrics import Counting, Metrics
from weftlm.serving.openapi import Document
from weftlm.serving.replies import Health
from weftlm.serving.request import Generator
from weftlm.serving.routes import ERRORS, openai_router, serve_model
from weftlm.serving.schemas import Bounds, Forms
from weftlm.serving.serve_config import ServeConfig
from weftlm.serving.workers import Workers


def build_app(engines: Mapping[str, Generator], config: ServeConfig, *, pages: Sequence[APIRouter] = ()) -> FastAPI:
    """The application that serves engines by their names.

    It starts and stops no engine: whoever made them does. Set `app.state.stopping` before they are closed, so that
    late requests hear that the server stops.

    Args:
        engines: name -> engine, at least one.
        config: limits and keys.
        pages: more routes, `/` and those under `/api/`.
    Raises:
        ConfigError: there is no engine, or a name cannot stand in an address.
    """
    if not engines:
        raise ConfigError("there is no model to serve; name at least one")
    for name in engines:
        if not name or "/" in name or not name.isprintable() or len(name) > 200:
            raise ConfigError(
                f"a model's name is {name!r}; it must be printable, without '/', of at most 200 characters"
            )
    metrics = Metrics(engines)
    served = {name: serve_model(name, engine, metrics.clock(name)) for name, engine in engines.items()}
    forms = Forms(bounds_of(engines, config))
    workers = Workers()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        workers.close()

    app = FastAPI(title="weftlm", version=__version__, docs_url=None, redoc_url=None, lifespan=lifespan)
    app.state.stopping = False
    app.state.workers = workers
    add_handlers(app)
    app.include_router(openai_router(served, forms, workers))

    @app.get("/healthz", responses={500: ERRORS[500]})
    async def healthz() -> Health:
        """Whether the server runs."""
        return Health()

    @app.get(
        "/metrics",
        response_class=Response,
        responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}, 500: ERRORS[500]},
    )
    async def metrics_() -> Response:
        """Figures for Prometheus."""
        return Response(metrics.text(), headers={"Content-Type": CONTENT_TYPE_LATEST})

    for page in pages:
        app.include_router(page)
    keys = [key.get_secret_value() for key in config.api_keys]
    completions, chats = zip(*forms.models, strict=True)
    bodies = {"/v1/completions": completions, "/v1/chat/completions": chats}
    app.openapi = Document(app, bodies, keyed=bool(keys), named=config.hosts is not None)  # type: ignore[method-assign]
    app.add_middleware(
        Intake,
        max_body_bytes=config.max_body_bytes,
        intake_seconds=config.intake_seconds,
        answer_seconds=config.timeout_seconds + GRACE_SECONDS + 1.0,
    )
    app.add_middleware(Keys, keys=keys)
    app.add_middleware(Hosts, names=config.hosts)
    app.add_middleware(Counting, metrics=metrics)
    return app


def bounds_of(engines: Mapping[str, Generator], config: ServeConfig) -> list[Bounds]:
    """What the settings and each model allow together, by groups of models that allow the same."""
    groups: dict[tuple[int, int | None], list[str]] = {}
    for name, engine in engines.items():
        opened = engine.opened
        groups.setdefault((opened.tokenizer.vocab_size, opened.max_length), []).append(name)
    return [
        Bounds(
            names=tuple(names),
            max_token_id=vocabulary - 1,
            max_prompt_tokens=_least(config.max_prompt_tokens, context),
            max_prompt_characters=config.max_prompt_characters,
            max_new_tokens=_least(config.max_new_tokens, context),
            max_prompts=min(config.max_prompts, config.max_answers),
            max_choices=min(config.max_choices, config.max_answers),
            max_answers=config.max_answers,
            max_messages=config.max_messages,
            max_top_logprobs=config.max_top_logprobs,
            timeout_seconds=config.timeout_seconds,
        )
        for (vocabulary, context), names in groups.items()
    ]


def _least(limit: int, context: int | None) -> int:
    """A limit of tokens; one token of a context at least is for the other side."""
    return limit if context is None else max(1, min(limit, context - 1))
