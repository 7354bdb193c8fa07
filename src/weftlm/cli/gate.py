"""`weftlm score` and `weftlm gate`: one gate over frozen experts, best against the worst mixture of domains."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any

from typer import Option, Typer

from weftlm.cli import options
from weftlm.cli.command import Recipe, recipe_command
from weftlm.cli.output import print_rows, say, text, windows
from weftlm.pipeline.names import CERTIFICATE

scores = Typer()
app = Typer(help="Fit, certify and distil one robust gate over the experts.", no_args_is_help=True)


@recipe_command(scores, "experts")
def score(
    recipe: Recipe,
    overwrite: Annotated[
        bool, Option("--overwrite", help="Discard scores of other experts, text or settings.")
    ] = False,
    ray: options.Ray = False,
    gpus: options.Gpus = 0.0,
) -> Iterator[Any]:
    """Score held-out text and samples under every expert, once.

    The text is the domains' held-out text, the samples are every expert's own. The scores go to `scores` in the run
    folder; gates are fitted on them without running an expert again. Run again after an interruption, the command
    resumes. Under torchrun the ranks share the work.
    """
    from weftlm.pipeline.scoring import score_experts

    with options.executor_for(recipe, ray, gpus) as executor:
        result = score_experts(recipe, overwrite=overwrite, executor=executor)
    yield result
    domains = result["domains"]
    texts = {**domains, **{f"samples of {name}": facts for name, facts in result["samples"].items()}}
    title, length = str(result["folder"]), windows(result["length"])
    print_rows(title + length, texts, {"sequences": "sequences", "tokens": "tokens"}, first="text")
    columns = {expert: ("nats_per_token", expert) for expert in result["experts"]}
    print_rows(f"nats per token, by expert{length}", domains, columns, first="domain", at_once=4)


@recipe_command(app, "experts")
def fit(recipe: Recipe) -> Iterator[Any]:
    """Fit the gate that is best against the worst mixture of domains.

    It is fitted on the scores of weftlm score; no expert is run, so that it takes minutes on a CPU whatever the
    experts' size. The result goes to `gate` in the run folder. Run again after an interruption, the command resumes;
    with other settings it fits again.
    """
    from weftlm.pipeline.gating import fit_gate

    result = fit_gate(recipe)
    yield result
    title = f"{recipe.gate_folder}: {result['gate']['gate']}{windows(result.get('length'))}"
    columns = {"sequences": "sequences", f"nats/{result['unit']}": "value", "lambda": "lam"}
    print_rows(title, result["domains"], columns, first="domain")
    say(f"worst case: {text(result['worst'])} nats/{result['unit']}; worst domain: {result['worst_domain']}")
    stopped = "; the fit stopped there" if result["stopped_early"] else ""
    say(f"gap after {result['steps']:,} steps: {text(result['gap'])} ({result['gap_kind']}){stopped}")
    say(f"Z: {text(result['z'])}")
    say("measured on the sequences of the fit; weftlm gate certify measures on held-out ones")


@recipe_command(app, "experts")
def distil(
    recipe: Recipe,
    direct: Annotated[
        bool, Option("--direct", help="Train a causal gate on the minimax objective itself; no gate is distilled.")
    ] = False,
) -> Iterator[Any]:
    """Distil causal models that can be served: full, sparse, dense.

    They go over all experts, over the best few per token, and into one dense model. Each gets a folder of its own in
    `students` in the run folder, which from_pretrained loads and generate drives. Run again after an interruption, the
    command resumes.
    """
    from weftlm.pipeline.gating import distil_gate

    result = distil_gate(recipe, direct=direct)
    yield result
    offsets = result["offsets"] if isinstance(result["offsets"], str) else "values"
    title = f"held-out sequences: nats/{result['unit']}, offsets {offsets}{windows(result.get('length'))}"
    columns = {"worst domain": "worst_domain", "worst": "worst", "mean": "mean", "KL to the gate, nats/sequence": "kl"}
    print_rows(title, result["rows"], columns, first="model")
    for name, row in result["rows"].items():
        if "model" in row:
            say(f"{name}: {row['model']}")


@recipe_command(app, "experts")
def certify(recipe: Recipe) -> Iterator[Any]:
    """Certify the fitted gate on held-out sequences.

    Gives the worst case, the duality gap, Z, and the capacity no model can be below; every figure is labelled as a
    bound, an estimate or exact. The certificate is also written to gate/certificate.json in the run folder, and
    weftlm report shows it.
    """
    from weftlm.pipeline.gating import certify_gate

    found = certify_gate(recipe).to_json()
    yield found
    length = windows(found["length"])
    names = ("worst", "lower", "gap", "capacity", "z")
    figures = {name: found[name] for name in names if found[name] is not None}
    title = f"{recipe.gate_folder / CERTIFICATE}: nats/{found['unit']}, offsets {found['offsets']}{length}"
    columns = {"value": "value", "95 % from": "low", "to": "high"}
    print_rows(title, figures, {**columns, "is": "label"}, first="figure")
    print_rows(
        f"held-out sequences{length}",
        {row["name"]: row for row in found["domains"]},
        {"sequences": "sequences", "cross-entropy": "cross_entropy", "minus offset": "value", "lambda": "lam"}
        | columns,
        first="domain",
    )
    say(f"worst domain: {found['worst_domain']}")
    for name, figure in figures.items():
        say(f"{name}: {figure['label']}; {figure['how']}")
