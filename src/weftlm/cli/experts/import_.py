"""`weftlm experts import`: adapters from anywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from weftlm.cli.folders import takes
from weftlm.cli.options import JsonOption, print_json, say


def run(
    library: Annotated[
        Path,
        typer.Argument(
            metavar="LIBRARY",
            help="Folder of the expert library.",
            show_default=False,
            callback=takes("new library"),
        ),
    ],
    paths: Annotated[list[str], typer.Argument(metavar="PATH", help="PEFT folders, or hub ids (owner/adapter).")],
    name: Annotated[
        str | None,
        typer.Option(
            help="Name of the expert, for a single one. Default: the last part of its path.", show_default=False
        ),
    ] = None,
    revision: Annotated[
        str | None, typer.Option(help="Hub branch, tag or commit of the adapters.", show_default=False)
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            help="Base model of a new library: folder or hub name. Default: the one the first adapter names.",
            show_default=False,
        ),
    ] = None,
    assume_base: Annotated[
        bool,
        typer.Option(
            "--assume-base", help="Take adapters that name another base, or none, as made for the library's base."
        ),
    ] = False,
    json: JsonOption = False,
) -> None:
    """Add PEFT LoRA adapters to a library, which is started where there is none.

    An adapter must name the library's base or a folder that holds the same model, and fit its modules and shapes.
    Only plain LoRA on linear modules, stored as safetensors, is taken; what would have to be approximated is refused.
    """
    from weftlm.pipeline.expert_library import import_experts

    added = import_experts(library, paths, name=name, revision=revision, base=base, assume_base=assume_base)
    facts = [
        {
            "name": expert.name,
            "base": expert.lora.base.name,
            "modules": len(expert.lora.modules),
            "ranks": sorted({each.rank for each in expert.lora.modules.values()}),
        }
        for expert in added
    ]
    if json:
        print_json(facts)
        return
    for each in facts:
        ranks = ", ".join(map(str, each["ranks"]))  # type: ignore[call-overload]
        say(f"{each['name']}: rank {ranks} on {each['modules']} modules of {each['base'] or 'an unnamed base'}")
