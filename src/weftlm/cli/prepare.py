"""`weftlm prepare`: read, de-duplicate, split and tokenise."""

from __future__ import annotations

from typing import Annotated

import typer

from weftlm.cli.dry_run import show_plan
from weftlm.cli.options import DryRunOption, JsonOption, RecipeArgument, SetOption, print_json, print_table, say


def run(
    recipe: RecipeArgument,
    set_: SetOption = None,
    rebuild: Annotated[
        bool, typer.Option("--rebuild", help="Prepare again even where the inputs changed since.")
    ] = False,
    dry_run: DryRunOption = False,
    json: JsonOption = False,
) -> None:
    """Read, de-duplicate, split and tokenise a recipe's corpora.

    What is prepared already and unchanged is reused. Everything that was skipped or dropped is counted and shown.
    """
    from weftlm.pipeline.checks import load_checked

    resolved = load_checked(recipe, set_ or [], ask=not dry_run)
    if dry_run:
        show_plan(resolved, json)
        return
    from weftlm.pipeline.prepare import prepare
    from weftlm.pipeline.prepared import FATES

    data = prepare(resolved.data, resolved.prepared_folder, rebuild=rebuild)
    if json:
        print_json(data.summary())
        return
    found = data.summary()
    names = list(dict.fromkeys([*found["documents"], *found["sets"]]))
    lossy = any(facts["given_back"] < 1 or facts["unknown"] for facts in found["sets"].values() if "unknown" in facts)
    columns = ["set", *(fate.replace("_", " ") for fate in FATES), "train tokens", "held-out tokens"]
    columns += ["bytes given back", "unknown tokens"] if lossy else []
    rows = []
    for name in names:
        documents, facts = found["documents"].get(name, {}), found["sets"].get(name, {})
        counts = [*(documents.get(fate) for fate in FATES), facts.get("train_tokens"), facts.get("heldout_tokens")]
        row = [name, *("-" if count is None else f"{count:,}" for count in counts)]
        if lossy:
            shares = [facts.get("given_back"), facts.get("unknown")]
            row += ["-" if share is None else f"{share:.2%}" for share in shares]
        rows.append(row)
    print_table(str(resolved.prepared_folder), columns, rows)
    for warning in found["warnings"]:
        say(f"warning: {warning}")
