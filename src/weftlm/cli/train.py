"""`weftlm prepare`, `domains`, `train`, `eval`: from text to a trained model and its losses."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any

from typer import Option, Typer

from weftlm.cli import options
from weftlm.cli.command import Recipe, recipe_command
from weftlm.cli.output import print_rows, say, sets_table

app = Typer()


@recipe_command(app, "data")
def prepare(
    recipe: Recipe,
    rebuild: Annotated[bool, Option("--rebuild", help="Replace prepared data whose inputs changed.")] = False,
) -> Iterator[Any]:
    """Read, de-duplicate, split and tokenise a recipe's corpora.

    Data that is prepared already and unchanged is reused. Everything that was skipped or dropped is counted and shown.
    """
    from weftlm.pipeline.prepare import prepare as prepare_data
    from weftlm.pipeline.prepared import FATES

    found = prepare_data(recipe.data, recipe.prepared_folder, rebuild=rebuild).summary()
    yield found
    documents, sets = found["documents"], found["sets"]
    rows = {name: {**documents.get(name, {}), **sets.get(name, {})} for name in {**documents, **sets}}
    counts = [*FATES, "train_tokens", "heldout_tokens"]
    if any(facts.get("given_back", 1) < 1 or facts.get("unknown") for facts in rows.values()):
        counts += ["given_back", "unknown"]
    print_rows(str(recipe.prepared_folder), rows, {key.replace("_", " "): key for key in counts}, first="set")
    for warning in found["warnings"]:
        say(f"warning: {warning}")


@recipe_command(app, "data")
def domains(recipe: Recipe) -> Iterator[Any]:
    """Show the domains: sizes, typical documents, nearest neighbours.

    The corpora are prepared first where that is not done yet. `target` is the share of the target's documents nearest
    to a domain.
    """
    from weftlm.pipeline.prepare import prepare as prepare_data

    data = prepare_data(recipe.data, recipe.prepared_folder)
    facts = data.domain_facts()
    yield facts
    shares = data.target_histogram_D.tolist() if data.target_histogram_D is not None else [None] * len(facts)
    rows = {
        fact["name"]: {
            **fact,
            "target": None if share is None else f"{share:.1%}",
            "nearest": ", ".join(f"{near['name']} {near['cosine']:.2f}" for near in fact["neighbours"][:3]),
        }
        for fact, share in zip(facts, shares, strict=True)
    }
    columns = {"documents": "documents", "tokens": "train_tokens", "target": "target", "nearest (cosine)": "nearest"}
    print_rows(str(recipe.prepared_folder), rows, columns, first="domain")
    for fact in facts:
        say("")
        say(fact["name"])
        for document in fact["typical"]:
            say(f"  {document['origin']}: {document['excerpt']}")


@recipe_command(app, "training")
def train(recipe: Recipe) -> Iterator[Any]:
    """Train a language model on an online mixture.

    The corpora are prepared first where that is not done yet. Run again after an interruption, the command resumes
    from the last checkpoint; run again after the end, it prints the result.
    """
    from weftlm.pipeline.train import run_training

    result = run_training(recipe)
    yield result
    sets_table(f"{recipe.run}: {result['policy']}, {result['train_tokens']:,} tokens", result)


@recipe_command(app, "training", "eval")
def evaluate(recipe: Recipe, max_tokens: options.MaxTokens = None) -> Iterator[Any]:
    """Measure a trained model on all held-out text.

    Held-out text is that of every domain and of the target. Losses are nats per token, perplexity and bits per byte,
    each with its standard error over windows of text.
    """
    from weftlm.pipeline.train import evaluate_run

    result = evaluate_run(recipe.run, recipe, options.evaluation_of(recipe, max_tokens)).to_json()
    yield result
    sets_table(str(recipe.run), result)
