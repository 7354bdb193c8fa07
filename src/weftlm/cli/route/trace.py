"""`weftlm route trace`: which experts work on each token of a text."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from weftlm.cli.folders import takes
from weftlm.cli.options import JsonOption, number, print_json, print_table, say

if TYPE_CHECKING:
    from torch import Tensor

    from weftlm.pipeline.routes import TracedText


def run(
    folder: Annotated[
        Path,
        typer.Argument(metavar="FOLDER", help="The routed model.", show_default=False, callback=takes("routed")),
    ],
    text: Annotated[str, typer.Argument(metavar="TEXT", help="The text; - reads it from stdin.", show_default=False)],
    base: Annotated[
        str | None,
        typer.Option(help="Another place to load the base from: folder or hub name.", show_default=False),
    ] = None,
    top: Annotated[int, typer.Option(help="Experts named per token and layer.", min=1)] = 3,
    html: Annotated[
        Path | None,
        typer.Option(metavar="PAGE.html", help="Also write a page to look at it.", show_default=False),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Show which experts work on each token of a text, and how much each layer uses them.

    A token's weights are means over the modules. The entropy of a layer's usage is 0 where one expert does all and the
    logarithm of their number where all work alike.
    """
    from weftlm.pipeline.recipe import refuse_project_page

    if html is not None:
        refuse_project_page(html)
    from weftlm.pipeline.routes import trace_text
    from weftlm.reporting.page import write_page
    from weftlm.reporting.traces import trace_page

    traced = trace_text(folder, sys.stdin.read() if text == "-" else text, base=base)
    if html is not None:
        write_page(trace_page([(f"{folder}", traced.trace, traced.tokens)], "Expert weights by token"), html)
    if json:
        print_json(traced.to_json())
        return
    _print(traced, folder, top)
    if html is not None:
        say(f"page: {html}")


def _print(traced: TracedText, folder: Path, top: int) -> None:
    trace = traced.trace
    rows = [
        [f"{place}", repr(token), _shares(weights_E, trace.experts, top)]
        for place, (token, weights_E) in enumerate(zip(traced.tokens, trace.token_weights_TE, strict=True))
    ]
    print_table(f"{folder}: mean over {len(trace.sites)} modules", ["", "token", "experts"], rows)
    layers = [
        [
            layer,
            f"{len(sites)}",
            number(float(trace.entropy_S[sites].mean()), 2),
            _shares(trace.usage_SE[sites].mean(dim=0), trace.experts, top),
        ]
        for layer, sites in trace.layers().items()
    ]
    most = math.log(len(trace.experts))
    print_table(f"usage by layer (largest entropy {most:.2f} nats)", ["layer", "modules", "entropy", "experts"], layers)


def _shares(weights_E: Tensor, experts: tuple[str, ...], top: int) -> str:
    """The largest weights by name; `base alone` where there are none."""
    weights, places = weights_E.topk(min(top, len(experts)))
    found = zip(weights.tolist(), places.tolist(), strict=True)
    shares = [f"{experts[place]} {weight:.2f}" for weight, place in found if weight]
    return ", ".join(shares) or "base alone"
