"""`weftlm experts merge`: several adapters as one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from weftlm.cli import complete
from weftlm.cli.options import JsonOption, LibraryArgument, numbers, print_json, say


def run(
    library: LibraryArgument,
    names: Annotated[
        list[str], typer.Argument(metavar="NAME", autocompletion=complete.experts, help="The experts to merge.")
    ],
    into: Annotated[
        str | None,
        typer.Option("--as", metavar="NEW", help="Add the result to the library under this name.", show_default=False),
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(
            metavar="W,W,...",
            help="Weight of each expert, in order. Default: one over their number.",
            show_default=False,
        ),
    ] = None,
    rank: Annotated[
        int | None,
        typer.Option(help="Rank of the result. Default: the sum of ranks, which is exact.", show_default=False),
    ] = None,
    to: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Write the result as a PEFT folder, which PEFT loads.", show_default=False),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Merge experts into one adapter: the weighted sum of their updates, exact unless a rank is given.

    The result joins the library (--as), becomes a PEFT folder (--to), or both. It has no gate.
    """
    shares = None if weights is None else numbers(weights, "--weights")
    from weftlm.pipeline.expert_library import merge_in_library

    facts = merge_in_library(library, names, into=into, weights=shares, rank=rank, to=to)
    if json:
        print_json(facts)
        return
    parts = ", ".join(f"{weight:g} {name}" for name, weight in facts["weights"].items())
    places = " and ".join(place for place in (facts["library"], facts["folder"]) if place is not None)
    say(f"{facts['name']} = {parts}: rank {facts['rank']}, {facts['kept_norm']:.1%} of the norm; in {places}")
