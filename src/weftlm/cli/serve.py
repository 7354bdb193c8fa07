"""`weftlm serve`, `export`: models behind OpenAI's API, and in formats that need no weftlm."""

from __future__ import annotations

import gc
import json as json_
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from typer import Argument, Option, Typer

from weftlm.cli import options
from weftlm.cli.command import command
from weftlm.cli.folders import takes
from weftlm.cli.output import say
from weftlm.config import validate
from weftlm.errors import ConfigError, install_hint, reason
from weftlm.serving import serve_config
from weftlm.serving.serve_config import KEYS_VARIABLE, ServeConfig

if TYPE_CHECKING:
    from weftlm.serving.engine import Engine

app = Typer()
SERVE = ServeConfig()


@app.command()
def serve(
    models: Annotated[
        list[str],
        Argument(metavar="MODEL...", help="Run folders, models, or names on the hub.", callback=takes("model")),
    ],
    name: Annotated[list[str] | None, Option(help="Name of a model, in order. Default: the folder's.")] = None,
    host: Annotated[str, Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, Option(min=0, max=65_535, help="Port to listen on; 0 for a free one.")] = 8000,
    device: Annotated[str, Option(help="Device: auto (the GPU where there is one), cpu, cuda, cuda:1.")] = "auto",
    dtype: Annotated[
        str, Option(help="Data type of a plain model's parameters: float32, bfloat16, float16.")
    ] = "float32",
    base: options.Base = None,
    revision: options.Revision = None,
    tokenizer: options.Tokenizer = None,
    slots: Annotated[int, Option(help="Batch slots per model.")] = SERVE.slots,
    max_waiting: Annotated[
        int, Option(help="Maximum queued answers per model; beyond that the server answers 429.")
    ] = SERVE.max_waiting,
    timeout_seconds: Annotated[
        float, Option(help="Request timeout in seconds, including time in the queue.")
    ] = SERVE.timeout_seconds,
    intake_seconds: Annotated[
        float, Option(help="Time limit for a request to arrive, in seconds.")
    ] = SERVE.intake_seconds,
    max_connections: Annotated[int, Option(help="Maximum number of open connections.")] = SERVE.max_connections,
    max_body_bytes: Annotated[int, Option(help="Maximum request body size in bytes.")] = SERVE.max_body_bytes,
    max_prompt_tokens: Annotated[int, Option(help="Maximum length of a prompt in tokens.")] = SERVE.max_prompt_tokens,
    max_new_tokens: Annotated[int, Option(help="Maximum length of an answer in tokens.")] = SERVE.max_new_tokens,
    max_answers: Annotated[
        int, Option(help="Maximum number of answers of a request: its prompts times n.")
    ] = SERVE.max_answers,
    allow_host: Annotated[list[str] | None, Option(help="Additional host name of the server, as a proxy's.")] = None,
    allow_anonymous: Annotated[
        bool, Option("--allow-anonymous", help="Listen beyond this machine without API keys.")
    ] = False,
    json: Annotated[bool, Option("--json", help="Print one line of JSON on stdout when ready.")] = False,
) -> None:
    """Serve models over OpenAI's API, with a page that shows routing.

    Unless --host says otherwise only this machine reaches the server. Without keys it answers as localhost, by address,
    under this machine's name, or under a name of --allow-host, and no other. WEFTLM_API_KEYS holds the keys that open
    the server, with commas between. SIGINT and SIGTERM stop it; running answers are ended with what there is.
    """
    keys = serve_config.keys_from_environment()
    own = serve_config.ip_of(host)
    if not keys and not allow_anonymous and not (own and own.is_loopback):
        raise ConfigError(
            f"--host {host} is reached from other machines and no API key is set; set {KEYS_VARIABLE}, or give "
            "--allow-anonymous"
        )
    config = validate(
        ServeConfig,
        {
            "slots": slots,
            "max_waiting": max_waiting,
            "timeout_seconds": timeout_seconds,
            "intake_seconds": intake_seconds,
            "max_connections": max_connections,
            "max_body_bytes": max_body_bytes,
            "max_prompt_tokens": max_prompt_tokens,
            "max_new_tokens": max_new_tokens,
            "max_answers": max_answers,
            "hosts": hosts_of(host, allow_host or [], open_to_all=bool(keys)),
            "api_keys": keys,
        },
        "",
    )
    names = names_of_models(models, name or [])
    for given, value in (("--base", base), ("--revision", revision), ("--tokenizer", tokenizer)):
        if value is not None and len(models) > 1:
            raise ConfigError(f"{given} is of one model and {len(models)} came; serve that one alone")
    try:
        from weftlm.pipeline.any_model import open_model
        from weftlm.serving.app import build_app
        from weftlm.serving.engine import Engine
        from weftlm.serving.server import Server, address_of, listen
    except ModuleNotFoundError as missing:
        raise ConfigError(
            f"weftlm serve needs a package that is not installed ({reason(missing)}); {install_hint('serve')}"
        ) from missing
    with ExitStack() as stack:
        listener = stack.enter_context(listen(host, port))
        opened = {
            served: open_model(path, base=base, revision=revision, tokenizer=tokenizer, dtype=dtype, device=device)
            for served, path in zip(names, models, strict=True)
        }
        engines: dict[str, Engine] = {}
        for served, model in opened.items():
            engines[served] = Engine(model, slots=slots, max_waiting=max_waiting, timeout_seconds=timeout_seconds)
            stack.callback(engines[served].close)
        built, address = build_app(engines, config), address_of(listener)

        def ready() -> None:
            say(f"serving {', '.join(names)} at {address}", err=True)
            if json:
                say(json_.dumps({"address": address, "models": names}))

        gc.collect()
        gc.freeze()  # a search of all that was imported and loaded takes half a second, in which nobody is answered
        gc.collect()  # the collector waits for growth by a quarter of what this finds: little, so it comes early
        Server(built, engines, config, ready).run(sockets=[listener])


def hosts_of(host: str, allowed: list[str], *, open_to_all: bool) -> list[str] | None:
    """Names clients may reach the server under, this machine's own among them; None for any.

    Args:
        host: Address the server listens on.
        allowed: Names given by the user.
        open_to_all: Whether any name will do where none is given.
    Raises:
        ConfigError: what is allowed is no name.
    """
    for name in allowed:
        if not serve_config.host_name(name) or "/" in name or any(letter.isspace() for letter in name):
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


@command(app, plain=True)
def export(
    model: Annotated[
        str,
        Argument(
            metavar="MODEL", help="Run folder, model, expert library, or a model's hub name.", callback=takes("export")
        ),
    ],
    output: Annotated[Path, Option(metavar="FOLDER", help="Folder of the result, new.")],
    format: Annotated[
        Literal["hf", "peft", "gguf"], Option(help="Hugging Face checkpoint, PEFT adapters, or a GGUF file.")
    ] = "hf",
    router: Annotated[
        str | None,
        Option(
            metavar="SPEC",
            help="Router by which experts are folded: merged, single:expert=a, uniform. Default: the model's own.",
        ),
    ] = None,
    expert: Annotated[str | None, Option(metavar="NAME", help="Name of the one expert to export.")] = None,
    base: options.Base = None,
    revision: options.Revision = None,
    tokenizer: options.Tokenizer = None,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None,
        Option(help="Data type of the written weights. Default: the model's own."),
    ] = None,
    converter: Annotated[
        Path | None,
        Option(metavar="PATH", help="llama.cpp's convert_hf_to_gguf.py or its folder. Default: $LLAMA_CPP, then PATH."),
    ] = None,
    outtype: Annotated[str, Option(help="Type of the GGUF file's weights, as the converter takes it.")] = "auto",
) -> Iterator[Any]:
    """Export a model: Hugging Face checkpoint, PEFT adapters, GGUF.

    Adapters are merged into their base and experts with fixed weights folded in. A router or gate that chooses for
    every token is no checkpoint; the message says what can be exported instead.
    """
    from weftlm.pipeline.export import export_model

    yield export_model(
        model, output, format=format, router=router, expert=expert, base=base, revision=revision,
        tokenizer=tokenizer, dtype=dtype, converter=converter, outtype=outtype,
    )  # fmt: skip
