"""`weftlm train`: train on an online mixture."""

from __future__ import annotations

from weftlm.cli.dry_run import show_plan
from weftlm.cli.options import DryRunOption, JsonOption, RecipeArgument, SetOption, print_json, sets_table


def run(
    recipe: RecipeArgument, set_: SetOption = None, dry_run: DryRunOption = False, json: JsonOption = False
) -> None:
    """Train a language model on an online mixture.

    Prepares the corpora where that is not done yet. Run again after an interruption, it continues from the last
    checkpoint; run again after the end, it prints the result.
    """
    from weftlm.pipeline.checks import load_checked
    from weftlm.pipeline.recipe import require_training

    resolved = load_checked(recipe, set_ or [], needs=require_training, ask=not dry_run)
    if dry_run:
        show_plan(resolved, json)
        return
    from weftlm.pipeline.train import is_main_process, run_training

    result = run_training(resolved)
    if not is_main_process():
        return
    if json:
        print_json(result)
    else:
        sets_table(f"{resolved.run}: {result['policy']}, {result['train_tokens']:,} tokens", result)
