"""`weftlm serve`: models behind OpenAI's API, and a page to look into them."""

from __future__ import annotations

import json as json_
import socket
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from weftlm.cli.folders import takes
from weftlm.cli.options import say
from weftlm.config import validate
from weftlm.errors import ConfigError, install_hint, reason
from weftlm.serving.serve_config import (
    KEYS_VARIABLE,
    EngineConfig,
    ServeConfig,
    host_name,
    is_loopback,
    keys_from_environment,
)

if TYPE_CHECKING:
    from weftlm.pipeline.any_model import OpenModel
    from weftlm.serving.engine import Engine

SERVE, ENGINE = ServeConfig(), EngineConfig()


def run(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL...",
            help="Run folders, routed or gated models, or names on the hub.",
            show_default=False,
            callback=takes("model"),
        ),
    ],
    name: Annotated[
        list[str] | None,
        typer.Option(
            "--name",
            help="Name of a model, in order; the folder's by default.",
            show_default=False,
        ),
    ] = None,
    host: Annotated[str, typer.Option("--host", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65_535, help="Port to listen on; 0 for a free one.")] = 8000,
    device: Annotated[
        str, typer.Option("--device", help="Device: auto (the GPU where there is one), cpu, cuda, cuda:1.")
    ] = "auto",
    dtype: Annotated[
        str, typer.Option("--dtype", help="Data type of a plain model's parameters: float32, bfloat16, float16.")
    ] = "float32",
    base: Annotated[
        str | None, typer.Option("--base", help="Base of a routed model, if it has moved.", show_default=False)
    ] = None,
    revision: Annotated[
        str | None, typer.Option("--revision", help="Revision of a model on the hub.", show_default=False)
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option("--tokenizer", help="Tokenizer's folder or hub name, if the model has none.", show_default=False),
    ] = None,
    slots: Annotated[int, typer.Option("--slots", help="Batch slots per model.")] = ENGINE.slots,
    max_waiting: Annotated[
        int, typer.Option("--max-waiting", help="Maximum queued answers per model; beyond that the server answers 429.")
    ] = ENGINE.max_waiting,
    timeout_seconds: Annotated[
        float, typer.Option("--timeout-seconds", help="Request timeout in seconds, including time in the queue.")
    ] = SERVE.timeout_seconds,
    intake_seconds: Annotated[
        float, typer.Option("--intake-seconds", help="Time limit for a request to arrive, in seconds.")
    ] = SERVE.intake_seconds,
    max_connections: Annotated[
        int, typer.Option("--max-connections", help="Maximum number of open connections.")
    ] = SERVE.max_connections,
    max_body_bytes: Annotated[
        int, typer.Option("--max-body-bytes", help="Maximum body size in bytes.")
    ] = SERVE.max_body_bytes,
    max_prompt_tokens: Annotated[
        int, typer.Option("--max-prompt-tokens", help="Maximum tokens of a prompt.")
    ] = SERVE.max_prompt_tokens,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", help="Maximum tokens of an answer.")
    ] = SERVE.max_new_tokens,
    max_answers: Annotated[
        int, typer.Option("--max-answers", help="Maximum number of answers of a request: its prompts times n.")
    ] = SERVE.max_answers,
    allow_host: Annotated[
        list[str] | None,
        typer.Option("--allow-host", help="Additional host name of the server, such as a proxy's.", show_default=False),
    ] = None,
    allow_anonymous: Annotated[
        bool, typer.Option("--allow-anonymous", help="Listen beyond this machine without API keys.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one line of JSON on stdout when ready.")] = False,
) -> None:
    """Serve models over HTTP, as OpenAI's API does, with a page at / that shows their routing.

    Unless --host says otherwise only this machine reaches the server. Without keys it answers as localhost, by address,
    under this machine's name, or under a name of --allow-host, and no other. WEFTLM_API_KEYS holds the keys that open
    the server, with commas between. SIGINT and SIGTERM stop it; running answers are ended with what there is.
    """
    keys = keys_from_environment()
    if not keys and not allow_anonymous and not is_loopback(host):
        raise ConfigError(
            f"--host {host} is reached from other machines and no API key is set; set {KEYS_VARIABLE}, or give "
            "--allow-anonymous"
        )
    config = validate(
        ServeConfig,
        {
            "timeout_seconds": timeout_seconds,
            "intake_seconds": intake_seconds,
            "max_connections": max_connections,
            "max_body_bytes": max_body_bytes,
            "max_prompt_tokens": max_prompt_tokens,
            "max_new_tokens": max_new_tokens,
            "max_answers": min(max_answers, max(1, slots + max_waiting)),
            "hosts": hosts_of(host, allow_host or [], open_to_all=bool(keys)),
            "api_keys": keys,
        },
        "",
    )
    engine_config = validate(
        EngineConfig, {"slots": slots, "max_waiting": max_waiting, "timeout_seconds": timeout_seconds}, ""
    )
    names = names_of_models(models, name or [])
    for option, value in (("--base", base), ("--revision", revision), ("--tokenizer", tokenizer)):
        if value is not None and len(models) > 1:
            raise ConfigError(f"{option} is of one model and {len(models)} came; serve that one alone")
    try:
        from weftlm.pipeline.any_model import open_model
        from weftlm.serving.app import build_app
        from weftlm.serving.engine import Engine
        from weftlm.serving.inspector import inspector_router
        from weftlm.serving.server import Server, address_of, listen
    except ModuleNotFoundError as missing:
        raise ConfigError(
            f"weftlm serve needs a package that is not installed ({reason(missing)}); {install_hint('serve')}"
        ) from missing
    with ExitStack() as stack:
        listener = stack.enter_context(listen(host, port))
        opened: dict[str, OpenModel] = {}
        for served, path in zip(names, models, strict=True):
            opened[served] = open_model(
                path, base=base, revision=revision, tokenizer=tokenizer, dtype=dtype, device=device
            )
        engines: dict[str, Engine] = {}
        for served, model in opened.items():
            engines[served] = Engine(model, engine_config)
            stack.callback(engines[served].close)
        app = build_app(engines, config, pages=[inspector_router(opened)])
        address = address_of(listener)

        def ready() -> None:
            say(f"serving {', '.join(names)} at {address}", err=True)
            if json:
                say(json_.dumps({"address": address, "models": names}))

        Server(app, engines, config, ready).run(sockets=[listener])


def hosts_of(host: str, allowed: list[str], *, open_to_all: bool) -> list[str] | None:
    """Names clients may reach the server under, this machine's own among them; None for any.

    Args:
        host: the server listens on.
        allowed: by the user.
        open_to_all: whether any name will do where none is given.
    Raises:
        ConfigError: what is allowed is no name.
    """
    for name in allowed:
        if not host_name(name) or "/" in name or any(letter.isspace() for letter in name):
            raise ConfigError(
                f"--allow-host {name!r} is no host; give a name as in hub.example, without scheme or path"
            )
    return None if open_to_all and not allowed else [host, socket.gethostname(), *allowed]


def names_of_models(models: list[str], given: list[str]) -> list[str]:
    """Names clients use: those given, else the last part of each path.

    Raises:
        ConfigError: there are more or fewer names than models, or two are the same.
    """
    if given and len(given) != len(models):
        raise ConfigError(f"{len(models)} models and {len(given)} names; give --name once for each, or not at all")
    names = given or [Path(model).resolve().name if Path(model).exists() else Path(model).name for model in models]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(f"two models would be called {twice[0]!r}; give each a --name of its own")
    return names
