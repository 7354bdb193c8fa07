"""`weftlm experts`: make experts, and keep a library of them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Option, Typer

from weftlm.cli import complete, options
from weftlm.cli.command import Recipe, command, recipe_command
from weftlm.cli.folders import takes
from weftlm.cli.output import print_rows, say, say_yaml

LOSSES = {
    "bits/byte before": "losses.before.bits_per_byte", "after": "losses.after.bits_per_byte",
    "nats/token after": "losses.after.nats_per_token", "windows": "losses.sequence_length",
}  # fmt: skip
"""Columns of an expert's held-out losses."""
app = Typer(help="Make experts, one per domain, and keep a library of them.", no_args_is_help=True)


@recipe_command(app, "experts")
def train(
    recipe: Recipe,
    processes: options.Processes = 1,
    ray: options.Ray = False,
    gpus: options.Gpus = 0.0,
    replace: Annotated[
        bool, Option("--replace", help="Discard experts and unfinished work of other settings, data or seed.")
    ] = False,
) -> Iterator[Any]:
    """Train an expert of every domain: adapter, gate, statistics.

    The recipe has an `experts` section: a recipe of weftlm train, whose model is then the base, or a small one with
    run, data and experts, where experts.base names the base. Each expert joins the library as soon as it is whole; run
    again, the command resumes. Under torchrun the experts are dealt out to the ranks, with --ray to machines.
    """
    from weftlm.pipeline.experts import train_experts

    with options.executor_for(recipe, ray, gpus, processes) as executor:
        result = train_experts(recipe, replace=replace, executor=executor)
    yield result
    columns = {**LOSSES, "best step": "adapter.kept_step", "steps": "adapter.steps"}
    title = f"{result['library']} over {result['base']}"
    print_rows(title, result["experts"], {"domain": "domain", "": "status", **columns}, first="expert")


@recipe_command(app, "experts", plain=True)
def gate(
    recipe: Recipe,
    expert: Annotated[str, Argument(metavar="EXPERT", help="Name of the expert in the library.")],
    domain: Annotated[
        str | None,
        Option(help="Domain whose text the expert is for. Default: the one it was made from, or of its name."),
    ] = None,
) -> Iterator[Any]:
    """Train one expert's gate again on its own domain alone.

    Its statistics are collected again too. The adapter stays as it is and no other expert is read. An imported adapter
    gets its gate in the same way. Settings are experts.gate, experts.statistics_examples and experts.embedder:
    --set experts.gate.steps=300. With 0 steps, or examples, an expert's gate, or statistics, are taken away.
    """
    from weftlm.pipeline.experts import gate_expert

    yield gate_expert(recipe, expert, domain=domain)


@command(app, "import", plain=True)
def import_(
    library: Annotated[Path, Argument(metavar="LIBRARY", help="Folder of the library.", callback=takes("new library"))],
    paths: Annotated[list[str], Argument(metavar="PATH", help="PEFT folders, or hub ids (owner/adapter).")],
    name: Annotated[
        str | None, Option(help="Name of the expert, for a single one. Default: the last part of its path.")
    ] = None,
    revision: options.Revision = None,
    base: options.Base = None,
    assume_base: Annotated[
        bool,
        Option("--assume-base", help="Take adapters that name another base, or none, as made for the library's base."),
    ] = False,
) -> Iterator[Any]:
    """Add PEFT LoRA adapters to a library, old or new.

    An adapter must name the library's base or a folder that holds the same model, and fit its modules and shapes.
    Only plain LoRA on linear modules, stored as safetensors, is taken; what would have to be approximated is refused.
    """
    from weftlm.pipeline.expert_library import import_experts

    added = import_experts(library, paths, name=name, revision=revision, base=base, assume_base=assume_base)
    yield [
        {
            "name": expert.name,
            "base": expert.lora.base.name,
            "modules": len(expert.lora.modules),
            "ranks": sorted({each.rank for each in expert.lora.modules.values()}),
        }
        for expert in added
    ]


@command(app, "list")
def list_(library: options.Library) -> Iterator[Any]:
    """List the experts of a library.

    Shows where each is from, gate, statistics, and held-out loss before and after, read from the experts' cards;
    weftlm experts show verifies an expert's files.
    """
    from weftlm.pipeline.expert_library import list_experts

    experts = list_experts(library)
    yield experts
    rows = {each["name"]: {"origin": "cannot be read", **each} for each in experts}
    columns = {"made from": "origin", "gate": "gate", "statistics": "statistics", **LOSSES}
    print_rows(str(library), rows, columns, first="expert")
    for each in experts:
        if "problem" in each:
            say(f"{each['name']}: {each['problem']}", err=True)


@command(app)
def show(
    library: options.Library,
    name: Annotated[
        str | None,
        Argument(
            metavar="NAME",
            help="Name of the expert; without it the library itself is shown.",
            autocompletion=complete.experts,
        ),
    ] = None,
) -> Iterator[Any]:
    """Show a library, or one expert in full.

    Of an expert modules, ranks, sizes of the updates, gate, statistics and card are shown. It is loaded, and every file
    checked against the library's digests.
    """
    from weftlm.pipeline.expert_library import show_expert

    facts = show_expert(library, name)
    yield facts
    modules = facts.pop("modules", {})
    if modules:
        columns = {key.replace("_", " "): key for key in ("rank", "scale", "update_norm")}
        print_rows(facts["folder"], modules, columns, first="module")
    say_yaml(facts)


@command(app, plain=True)
def remove(
    library: options.Library,
    names: Annotated[
        list[str], Argument(metavar="NAME", help="Names of the experts.", autocompletion=complete.experts)
    ],
) -> Iterator[Any]:
    """Remove experts from a library and delete their files.

    Routed models keep copies of their experts and are not changed.
    """
    from weftlm.experts.library import ExpertLibrary

    opened = ExpertLibrary.open(library)
    opened.remove(*dict.fromkeys(opened.named(name) for name in names))
    yield {"removed": names, "experts": opened.names}
