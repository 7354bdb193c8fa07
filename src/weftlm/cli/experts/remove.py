"""`weftlm experts remove`: experts out of a library."""

from __future__ import annotations

from typing import Annotated

import typer

from weftlm.cli import complete
from weftlm.cli.options import JsonOption, LibraryArgument, print_json, say


def run(
    library: LibraryArgument,
    names: Annotated[
        list[str], typer.Argument(metavar="NAME", autocompletion=complete.experts, help="The experts to take out.")
    ],
    json: JsonOption = False,
) -> None:
    """Take experts out of a library and delete their files; the others are not touched.

    Routed models keep copies of their experts and are not changed.
    """
    from weftlm.pipeline.expert_library import remove_experts

    left = remove_experts(library, names)
    if json:
        print_json({"removed": names, "experts": left})
    else:
        say(f"removed {', '.join(names)}; {len(left)} experts stay")
