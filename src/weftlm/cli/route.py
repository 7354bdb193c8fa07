"""`weftlm route`: choose among experts per token and per module, and compare the ways to choose."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from typer import Argument, Option, Typer

from weftlm.cli import complete, options
from weftlm.cli.command import Recipe, command, recipe_command
from weftlm.cli.folders import takes
from weftlm.cli.output import print_rows, say, windows
from weftlm.config import apply_overrides
from weftlm.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

app = Typer(help="Route among experts per token and module, and compare routers.", no_args_is_help=True)


@command(app, plain=True)
def build(
    library: options.Library,
    to: Annotated[Path, Option(metavar="FOLDER", help="Folder of the routed model, new.")],
    router: Annotated[str, Option(help="Name of the router.", autocompletion=complete.routers)] = "phatgoose",
    set_: Annotated[
        list[str] | None, Option("--set", metavar="router.a=value", help="Key of the router with a value; repeatable.")
    ] = None,
    base: options.Base = None,
    revision: options.Revision = None,
    experts: options.Experts = None,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"], Option(help="Data type of the base's parameters.")
    ] = "float32",
    copy_base: Annotated[
        bool, Option("--copy-base", help="Write the base's weights too, for a folder that needs no other.")
    ] = False,
) -> Iterator[Any]:
    """Write a routed model: base, experts and router in one folder.

    The base is written as a reference, or copied. weftlm.routing.routed_model.RoutedModel.from_pretrained loads the
    folder: a Hugging Face model with forward and generate.
    """
    from weftlm.routing.config import router_config

    value = apply_overrides({"router": {"router": router}}, set_ or [])
    if set(value) != {"router"}:
        raise ConfigError(f"--set {', '.join(sorted(set(value) - {'router'}))}: a router's keys are set as router.k=1")
    section = router_config(value["router"])
    from weftlm.pipeline.routes import build_route

    yield build_route(
        library,
        section,
        to,
        base=base,
        revision=revision,
        experts=options.names_of(experts),
        dtype=dtype,
        copy_base=copy_base,
    )


@command(app)
def trace(
    folder: Annotated[Path, Argument(metavar="FOLDER", help="Folder of the routed model.", callback=takes("routed"))],
    text: Annotated[str, Argument(metavar="TEXT", help="Text; - reads it from stdin.")],
    base: options.Base = None,
    top: Annotated[int, Option(help="Number of experts named per token.", min=1)] = 3,
    html: Annotated[Path | None, Option(metavar="PAGE.html", help="Path of a page with the same as a chart.")] = None,
) -> Iterator[Any]:
    """Show which experts handle each token of a text.

    A token's weights are means over the modules; the page (--html) shows every module.
    """
    from weftlm.pipeline.recipe import refuse_project_page

    if html is not None:
        refuse_project_page(html)
    from weftlm.pipeline.any_model import open_model
    from weftlm.pipeline.routes import trace_text
    from weftlm.reporting.page import write_page
    from weftlm.reporting.traces import trace_page

    opened = open_model(folder, base=base, encoder_decoder=True)
    found, tokens = trace_text(opened, sys.stdin.read() if text == "-" else text)
    if html is not None:
        write_page(trace_page([(f"{folder}", found, tokens)], "Expert weights by token"), html)
    yield {"token_texts": tokens, **found.to_json()}
    rows = {
        f"{place}": {"token": repr(token), "experts": _shares(weights_E, found.experts, top)}
        for place, (token, weights_E) in enumerate(zip(tokens, found.token_weights_TE, strict=True))
    }
    print_rows(f"{folder}: mean over {len(found.modules)} modules", rows, {"token": "token", "experts": "experts"})
    if html is not None:
        say(f"page: {html}")


def _shares(weights_E: Tensor, experts: tuple[str, ...], top: int) -> str:
    """The largest weights by name; `base alone` where there are none."""
    weights, places = weights_E.topk(min(top, len(experts)))
    found = zip(weights.tolist(), places.tolist(), strict=True)
    return ", ".join(f"{experts[place]} {weight:.2f}" for weight, place in found if weight) or "base alone"


@recipe_command(app, "experts", "eval")
def evaluate(
    recipe: Recipe,
    routers: Annotated[
        str | None,
        Option(
            metavar="A,B,...",
            autocompletion=complete.routers,
            help="Routers to compare, with options as phatgoose:k=1. Default: all the experts have the parts for.",
        ),
    ] = None,
    experts: options.Experts = None,
    max_tokens: options.MaxTokens = None,
    singles: Annotated[
        bool, Option("--singles/--no-singles", help="Score every expert alone, for best single and oracle.")
    ] = True,
    ray: options.Ray = False,
    gpus: options.Gpus = 0.0,
) -> Iterator[Any]:
    """Compare routers, single experts and the base on held-out text.

    All are scored in bits per byte on the same windows; a standard error is over windows. Best single expert and oracle
    (the best expert of each set) are chosen on the very text they are scored on: they are bounds, not methods.
    """
    from weftlm.routing.config import parse_router, router_config

    compared = options.names_of(routers)
    for each in compared or ():
        router_config(parse_router(each))
    from weftlm.pipeline.routes import evaluate_routes

    with options.executor_for(recipe, ray, gpus) as executor:
        found = evaluate_routes(
            recipe,
            compared,
            experts=options.names_of(experts),
            config=options.evaluation_of(recipe, max_tokens),
            singles=singles,
            executor=executor,
        )
    yield found
    rows, base = found["rows"], found["rows"]["base"]
    losses: dict[str, Any] = {
        "mean over domains": "generic.bits_per_byte",
        "minus base": "difference.generic.bits_per_byte",
    }
    losses = (losses if "generic" in base else {}) | {name: ("sets", name, "bits_per_byte") for name in base["sets"]}
    title = f"{recipe.library_folder}: bits per byte{windows(base['sequence_length'])}"
    print_rows(title, rows, losses, at_once=3)
    if tasks := base.get("tasks"):
        asked = {label: row for label, row in rows.items() if "tasks" in row}
        accuracies = {"mean over tasks": "mean_accuracy.accuracy"} | {
            name: ("tasks", name, "accuracy") for name in tasks
        }
        print_rows(f"{recipe.library_folder}: share of right answers", asked, accuracies, at_once=3)
    for note in found["notes"]:
        say(f"note: {note}")
    if found["best_single"] is not None:
        say(f"best single: {found['best_single']}")
        say("oracle: " + ", ".join(f"{expert} on {name}" for name, expert in found["oracle"].items()))
