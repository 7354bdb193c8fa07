"""`weftlm route build`: base, experts and router as one model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from weftlm.cli import complete
from weftlm.cli.options import JsonOption, LibraryArgument, names_of, print_json, say
from weftlm.config import apply_overrides
from weftlm.errors import ConfigError


def run(
    library: LibraryArgument,
    to: Annotated[Path, typer.Option(metavar="FOLDER", help="Where the routed model goes; a new folder.")],
    router: Annotated[str, typer.Option(help="How experts are chosen.", autocompletion=complete.routers)] = "phatgoose",
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="router.a=value", help="Set a key of the router; repeatable.", show_default=False
        ),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(help="Folder or hub name of the base. Default: the library's own.", show_default=False),
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Hub revision of --base.", show_default=False)] = None,
    experts: Annotated[
        str | None,
        typer.Option(
            metavar="A,B,...",
            help="Experts to route among. Default: all.",
            show_default=False,
            autocompletion=complete.experts,
        ),
    ] = None,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"], typer.Option(help="What the base is held in.")
    ] = "float32",
    copy_base: Annotated[
        bool, typer.Option("--copy-base", help="Write the base's weights too: the folder then stands on its own.")
    ] = False,
    json: JsonOption = False,
) -> None:
    """Write a routed model: router, experts and tokenizer in one folder, with a reference to the base or a copy.

    weftlm.routing.routed_model.RoutedModel.from_pretrained loads it: a Hugging Face model with forward and generate.
    """
    from weftlm.routing.config import router_config

    value = apply_overrides({"router": {"router": router}}, set_ or [])
    if set(value) != {"router"}:
        raise ConfigError(f"--set {', '.join(sorted(set(value) - {'router'}))}: a router's keys are set as router.k=1")
    section = router_config(value["router"])
    from weftlm.pipeline.routes import build_route

    facts = build_route(
        library,
        section,
        to,
        base=base,
        revision=revision,
        experts=None if experts is None else names_of(experts),
        dtype=dtype,
        copy_base=copy_base,
    )
    if json:
        print_json(facts)
        return
    options = ", ".join(f"{key} {value}" for key, value in facts["router"].items() if key != "router")
    say(f"{facts['output']}: {facts['router']['router']} ({options}) over {facts['base']}")
    say(f"{len(facts['experts'])} experts on {facts['modules']} modules: {', '.join(facts['experts'])}")
    for name, reason in facts["left_out"].items():
        say(f"left out {name}: {reason}")
