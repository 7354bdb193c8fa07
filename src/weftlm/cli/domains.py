"""`weftlm domains`: what the domains are."""

from __future__ import annotations

from weftlm.cli.dry_run import show_plan
from weftlm.cli.options import DryRunOption, JsonOption, RecipeArgument, SetOption, print_json, print_table, say


def run(
    recipe: RecipeArgument, set_: SetOption = None, dry_run: DryRunOption = False, json: JsonOption = False
) -> None:
    """Show the domains: sizes, typical documents, nearest neighbours.

    Prepares the corpora where that is not done yet. `target` is the share of the target's documents nearest to a
    domain.
    """
    from weftlm.pipeline.recipe import load_recipe

    resolved = load_recipe(recipe, set_ or [])
    if dry_run:
        show_plan(resolved, json)
        return
    from weftlm.pipeline.prepare import prepare

    data = prepare(resolved.data, resolved.prepared_folder)
    facts = data.domain_facts()
    if json:
        print_json(facts)
        return
    shares = data.target_histogram_D.tolist() if data.target_histogram_D is not None else [None] * len(facts)
    rows = [
        [
            fact["name"],
            f"{fact['documents']:,}",
            f"{fact['train_tokens']:,}",
            "-" if share is None else f"{share:.1%}",
            ", ".join(f"{near['name']} {near['cosine']:.2f}" for near in fact["neighbours"][:3]),
        ]
        for fact, share in zip(facts, shares, strict=True)
    ]
    print_table(str(resolved.prepared_folder), ["domain", "documents", "tokens", "target", "nearest (cosine)"], rows)
    for fact in facts:
        say("")
        say(f"{fact['name']}")
        for document in fact["typical"]:
            say(f"  {document['origin']}: {document['excerpt']}")
