"""`weftlm experts show`: a library, or one expert in full."""

from __future__ import annotations

import json as json_
from typing import Annotated

import typer

from weftlm.cli import complete
from weftlm.cli.options import JsonOption, LibraryArgument, number, print_json, print_table, say, say_lines


def run(
    library: LibraryArgument,
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="NAME",
            autocompletion=complete.experts,
            help="The expert; without it the library itself.",
            show_default=False,
        ),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Show a library, or one expert in full: modules, ranks, sizes of the updates, gate, statistics, card.

    The expert is loaded and every file checked against the library's digests.
    """
    from weftlm.pipeline.expert_library import show_expert, show_library

    facts = show_library(library) if name is None else show_expert(library, name)
    if json:
        print_json(facts)
        return
    if name is None:
        base = facts["base"]
        say(f"{library}: {len(facts['experts'])} experts over {base['name']} (revision {base['revision']})")
        say(f"base fingerprint: {base['fingerprint'] or 'not known'}")
        say(f"fingerprint of the experts: {facts['fingerprint']}")
        say(f"experts: {', '.join(facts['experts']) or 'none'}")
        return
    rows = [
        [module, f"{each['rank']}", number(each["scale"]), number(each["update_norm"])]
        for module, each in facts["modules"].items()
    ]
    print_table(f"{facts['folder']}: {facts['parameters']:,} parameters", ["module", "rank", "scale", "norm"], rows)
    for part in ("gate", "statistics", "card"):
        say_lines(f"{part}: {'none' if facts[part] is None else json_.dumps(facts[part], indent=2)}")
