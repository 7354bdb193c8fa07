"""The arguments and options that several commands share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Argument, Option

from weftlm.cli import complete
from weftlm.cli.folders import takes
from weftlm.errors import ConfigError

if TYPE_CHECKING:
    from concurrent.futures import Executor

    from weftlm.evaluation.config import EvaluationConfig
    from weftlm.pipeline.recipe import Recipe

RecipePath = Annotated[Path, Argument(metavar="RECIPE.yaml", help="Path of the recipe.", callback=takes("recipe"))]
Library = Annotated[Path, Argument(metavar="LIBRARY", help="Folder of the expert library.", callback=takes("library"))]
Set = Annotated[
    list[str] | None,
    Option(
        "--set",
        metavar="a.b=value",
        help="Key of the recipe with another value; repeatable.",
        autocompletion=complete.settings,
    ),
]
DryRun = Annotated[bool, Option("--dry-run", help="Print the resolved recipe and what would be done; do nothing.")]
Json = Annotated[bool, Option("--json", help="Print the result as JSON.")]
Quick = Annotated[
    bool, Option("--quick", help="All stages in about two minutes: sizes cut down, results in RUN-quick.")
]
Processes = Annotated[int, Option("--processes", min=1, help="Number of experts trained in parallel.")]
Ray = Annotated[bool, Option("--ray", help="Use the machines of a Ray cluster (extra 'ray'), which share a disk.")]
Gpus = Annotated[float, Option("--gpus", min=0, help="GPUs per Ray task; 0 for CPUs.")]
Experts = Annotated[
    str | None, Option("--experts", metavar="A,B,...", help="Names of the experts to route among. Default: all.")
]
MaxTokens = Annotated[
    int | None, Option("--max-tokens", help="Tokens scored per set; 0 scores everything. Default: the recipe's.")
]
Base = Annotated[str | None, Option("--base", help="Folder or hub name of the base. Default: the one that is named.")]
Revision = Annotated[str | None, Option("--revision", help="Hub revision: branch, tag or commit.")]
Tokenizer = Annotated[
    str | None, Option("--tokenizer", help="Folder or hub name of the tokenizer. Default: the model's own.")
]


@contextmanager
def executor_for(recipe: Recipe, ray: bool, gpus: float, processes: int = 1) -> Iterator[Executor | None]:
    """Where the tasks of a command run: on a Ray cluster, in several processes, or (None) in this one.

    Raises:
        ConfigError: Ray and several processes are asked for, GPUs without Ray, or Ray cannot be used.
    """
    if gpus and not ray:
        raise ConfigError(f"--gpus {gpus:g} is per Ray task; give --ray with it, or leave it out")
    if ray and processes > 1:
        raise ConfigError(f"--processes {processes} and --ray, which starts its own, exclude each other; give one")
    if ray:
        from weftlm.integrations.ray_executor import ray_executor

        with ray_executor(recipe.expert_settings.training.threads or 1, gpus) as executor:
            yield executor
    elif processes > 1:
        from weftlm import fan_out

        with fan_out.processes(processes) as pool:
            yield pool
    else:
        yield None


def names_of(text: str | None) -> list[str] | None:
    """The names in `a,b,c`; None where nothing was given."""
    return None if text is None else [name.strip() for name in text.split(",") if name.strip()]


def evaluation_of(recipe: Recipe, max_tokens: int | None) -> EvaluationConfig:
    """The recipe's `evaluation` section under `--max-tokens`."""
    if max_tokens is None:
        return recipe.evaluation
    return recipe.evaluation.model_copy(update={"max_tokens_per_set": max_tokens or None})
