"""`weftlm export`: a model in a format that needs no weftlm."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from weftlm.cli.folders import takes
from weftlm.cli.options import JsonOption, print_json, say


def run(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="Run folder, routed or gated model, expert library, or any model's folder or hub name.",
            show_default=False,
            callback=takes("export"),
        ),
    ],
    output: Annotated[Path, typer.Option(metavar="FOLDER", help="Where it goes; a new folder.", show_default=False)],
    format: Annotated[
        Literal["hf", "peft", "gguf"],
        typer.Option(help="A Hugging Face checkpoint, the experts as PEFT adapters, or a GGUF file."),
    ] = "hf",
    router: Annotated[
        str | None,
        typer.Option(
            metavar="SPEC",
            help="Fold experts by this router: merged, single:expert=a, uniform. Default: the model's own.",
            show_default=False,
        ),
    ] = None,
    expert: Annotated[
        str | None, typer.Option(metavar="NAME", help="Export this expert alone.", show_default=False)
    ] = None,
    base: Annotated[str | None, typer.Option(help="Another place to load the base from.", show_default=False)] = None,
    revision: Annotated[str | None, typer.Option(help="Hub revision.", show_default=False)] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="Folder or hub name. Default: the model's own.", show_default=False)
    ] = None,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None,
        typer.Option(help="What weights are written in. Default: as the model is held.", show_default=False),
    ] = None,
    converter: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH",
            help="llama.cpp's convert_hf_to_gguf.py or its folder. Default: $LLAMA_CPP, then PATH.",
            show_default=False,
        ),
    ] = None,
    outtype: Annotated[str, typer.Option(help="Weights of the GGUF file, as the converter takes it.")] = "auto",
    json: JsonOption = False,
) -> None:
    """Write a model as a plain Hugging Face checkpoint, as PEFT adapters, or as a GGUF file.

    Adapters are merged into their base and experts with fixed weights folded in. A router or gate that chooses anew for
    every token is no checkpoint; the message says what can be exported instead.
    """
    from weftlm.pipeline.export import export_model

    facts = export_model(
        model,
        output,
        format=format,
        router=router,
        expert=expert,
        base=base,
        revision=revision,
        tokenizer=tokenizer,
        dtype=dtype,
        converter=converter,
        outtype=outtype,
    )
    if json:
        print_json(facts)
        return
    say(f"{facts['output']}: {', '.join(facts['files'])}")
    if format == "peft":
        say(f"{len(facts['experts'])} adapters over {facts['base']}; README.md says how to load them")
        return
    say(f"{facts['parameters']:,} parameters, {facts['dtype']}")
    if facts["experts"]:
        say("folded in: " + ", ".join(f"{weight:g} {name}" for name, weight in facts["experts"].items()))
