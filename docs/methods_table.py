"""Fill the tables of docs/methods.md from the registries; `--check` fails where they are stale.

Methods of other packages are left out.
"""

from __future__ import annotations

import argparse
import inspect
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import weftlm
from weftlm.gating.config import gates
from weftlm.mixture.config import policies
from weftlm.registry import Registry
from weftlm.routing.config import routers

FOLDER = Path(__file__).parent
PACKAGE = Path(weftlm.__file__).parent
SIGNALS = {
    "losses": "the domains' training losses",
    "reference_losses": "a reference model",
    "target_alignment": "target examples; alignments with them",
    "generalist_alignment": "alignments with all domains",
    "target_histogram": "target examples; embeddings",
    "basis": "a basis of distributions",
}
OF_EXPERTS = {"gate": "its gate", "statistics": "its statistics"}
OF_SEQUENCES = {
    "sequence": "features of whole sequences",
    "points": "an enumerated support",
    "tokens": "tokens' scores",
}
REGISTRIES: Mapping[str, Registry[Any]] = {"policies": policies, "routers": routers, "gates": gates}


class MismatchError(Exception):
    """The page does not hold the places of the tables."""


def needs_of(kind: str, name: str) -> str:
    """What a method needs, in words, as its class says."""
    cls = REGISTRIES[kind][name]
    if kind == "policies":
        return words(SIGNALS, cls(cls.Config.example(("a", "b"))).needs)
    if kind == "routers":
        found = words(OF_EXPERTS, cls.needs)
        return found if cls.supports_encoder_decoder else f"{found}; a decoder-only model"
    return words(OF_SEQUENCES, cls.needs)


def words(table: Mapping[str, str], needs: Iterable[str]) -> str:
    """The needs in the table's order and words; `nothing` for none."""
    wanted = set(needs)
    return "; ".join(text for need, text in table.items() if need in wanted) or "nothing"


def file_of(cls: type) -> str:
    """Where a class is written, below src/weftlm."""
    return Path(inspect.getfile(cls)).resolve().relative_to(PACKAGE).as_posix()


def paper_of(paper: str | None) -> str:
    """A link where the paper is on arXiv; a dash where there is none."""
    if paper is None:
        return "-"
    identifier = paper.removeprefix("arXiv:")
    return f"[{identifier}](https://arxiv.org/abs/{identifier})" if identifier != paper else paper


def rows_of(kind: str) -> list[list[str]]:
    """A row per registered method of weftlm."""
    registry = REGISTRIES[kind]
    rows = []
    for entry in (registry.entry(name) for name in registry):
        if not entry.cls.__module__.startswith(f"{registry.package}."):
            continue
        seen = [("the text so far" if entry.cls.causal else "the whole text")] if kind == "gates" else []
        tail = [entry.costs, paper_of(entry.paper), f"`{file_of(entry.cls)}`"]
        rows.append([f"`{entry.name}`", entry.does, *seen, needs_of(kind, entry.name), *tail])
    return rows


def table_of(kind: str) -> str:
    """The Markdown table of a kind of method."""
    needs = {"policies": "needs", "routers": "needs of an expert", "gates": "needs"}[kind]
    header = ["name", "what it does", *(["reads"] if kind == "gates" else []), needs, "costs", "paper", "file"]
    lines = [header, ["---"] * len(header), *rows_of(kind)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def filled(page: str) -> str:
    """The page with every table between its markers replaced."""
    for kind in REGISTRIES:
        begin, end = f"<!-- {kind}: begin (docs/methods_table.py) -->", f"<!-- {kind}: end -->"
        if page.count(begin) != 1 or page.count(end) != 1:
            raise MismatchError(f"docs/methods.md must hold these once each: {begin} and {end}")
        head, rest = page.split(begin)
        page = f"{head}{begin}\n\n{table_of(kind)}\n\n{end}{rest.split(end)[1]}"
    return page


def main() -> int:
    """Write the page, or with `--check` compare it; 1 where it is stale or lacks a place."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail where the page is stale")
    check = parser.parse_args().check
    path = FOLDER / "methods.md"
    old = path.read_text(encoding="utf-8")
    try:
        new = filled(old)
    except MismatchError as error:
        print(error, file=sys.stderr)
        return 1
    if new != old:
        if check:
            print("stale: docs/methods.md; run `make fix`", file=sys.stderr)
            return 1
        path.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
