"""`weftlm experts list`: what a library holds."""

from __future__ import annotations

from typing import Any

from weftlm.cli.options import JsonOption, LibraryArgument, number, print_json, print_table


def run(library: LibraryArgument, json: JsonOption = False) -> None:
    """List the experts of a library: where each is from, gate, statistics, held-out loss before and after.

    Read from the experts' cards; weftlm experts show verifies an expert's files.
    """
    from weftlm.pipeline.expert_library import list_experts

    experts = list_experts(library)
    if json:
        print_json(experts)
        return
    print_table(
        str(library),
        ["expert", "made from", "gate", "statistics", "bits/byte before", "after", "windows"],
        [[expert["name"], *_row(expert)] for expert in experts],
    )


def _row(expert: dict[str, Any]) -> list[str]:
    if "problem" in expert:
        return [expert["problem"], "-", "-", "-", "-", "-"]
    losses = expert["losses"] or {}
    before, after = losses.get("before") or {}, losses.get("after") or {}
    return [
        expert["origin"],
        "yes" if expert["gate"] else "no",
        "yes" if expert["statistics"] else "no",
        number(before.get("bits_per_byte")),
        number(after.get("bits_per_byte")),
        str(losses.get("sequence_length", "-")),
    ]
