"""Read a run folder for a report: whatever is there, finished, still running or partly broken.

Reading never fails on a file's contents: what is missing or broken becomes a sentence in `Run.problems`, for the page.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import yaml
from numpy.typing import NDArray

from weftlm.errors import DataError, reason
from weftlm.evaluation.result import WindowScores, load_windows
from weftlm.evaluation.suite import TARGET
from weftlm.files import check_listed, parse_json, read_object
from weftlm.reporting.score import Score

WINDOWS_FILE = "windows.safetensors"
"""Window losses of the final evaluation (`evaluation.result.save_windows`), for paired comparisons; optional."""
GENERIC = "mean over domains"
"""Name of the mean over domains among an evaluation's scores."""

Record = Mapping[str, Any]
T = TypeVar("T")


@dataclass(frozen=True)
class Evaluation:
    """Bits per byte at one moment: the target's, each domain's, and the mean over domains (`GENERIC`)."""

    step: float = math.nan
    tokens: float = math.nan
    scores: Mapping[str, Score] = field(default_factory=dict)


@dataclass(frozen=True)
class Run:
    """One training run, as far as its folder tells.

    Attributes:
        path: Its folder.
        label: Short name, unique in a report.
        result: Contents of `result.json`; empty for a run that is not finished.
        evaluations: Every evaluation of `metrics.jsonl` by step, last the final one.
        train: The `train` records by step.
        mixture: The `mixture` records by step.
        recipe: Resolved recipe as data.
        recipe_text: The same as it was written.
        facts: Contents of `run.json`.
        windows: Window losses of the final evaluation, by set.
        problems: What is missing or broken, one sentence each.
    """

    path: Path
    label: str
    result: Record
    evaluations: Sequence[Evaluation]
    train: Sequence[Record]
    mixture: Sequence[Record]
    recipe: Record
    recipe_text: str
    facts: Record
    windows: Mapping[str, WindowScores]
    problems: Sequence[str]

    @property
    def finished(self) -> bool:
        """Whether a readable `result.json` is there."""
        return bool(self.result)

    @property
    def policy(self) -> str:
        """The mixture policy's name; empty when unknown."""
        policy = self.result.get("policy") or mapping(self.recipe.get("mixture")).get("policy")
        return policy if isinstance(policy, str) else ""

    @property
    def final(self) -> Evaluation:
        """The final evaluation, or the latest so far."""
        return self.evaluations[-1] if self.evaluations else Evaluation()

    def score(self, name: str) -> Score:
        """The latest score of the target, a domain, or `GENERIC`; NaN where there is none."""
        return self.final.scores.get(name, Score())

    @property
    def scored_domains(self) -> list[str]:
        """The domains of the latest evaluation."""
        return [name for name in self.final.scores if name not in (TARGET, GENERIC)]

    def latest(self, key: str) -> dict[str, float]:
        """Numbers by domain at the end of the run: `weights` or `epochs`."""
        return numbers(self.result.get(key)) or numbers(self.mixture[-1].get(key) if self.mixture else None)

    def largest(self, key: str, name: str) -> float:
        """The largest of a number of `result.json` and of the last records, where it is called `name`."""
        last = (*self.train[-1:], *self.mixture[-1:], vars(self.final))
        found = [number(self.result.get(key)), *(number(one.get(name)) for one in last)]
        return max(filter(math.isfinite, found), default=math.nan)

    @property
    def steps(self) -> float:
        """Optimizer steps taken."""
        return self.largest("steps", "step")

    @property
    def train_tokens(self) -> float:
        """Tokens trained on."""
        return self.largest("train_tokens", "tokens")

    @property
    def domains(self) -> list[str]:
        """Every domain the folder mentions, in the order it first does."""
        first = mapping(self.mixture[0].get("weights")) if self.mixture else {}
        return list(dict.fromkeys([*self.latest("weights"), *first, *self.scored_domains, *self.latest("epochs")]))

    def series(self, kind: str, key: str, domain: str | None = None) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Training tokens and a value of the `train` or `mixture` records, maybe of one domain; NaN where unknown."""
        records = [one for one in (self.train if kind == "train" else self.mixture) if number(one.get("tokens")) >= 0]
        found = [one.get(key) if domain is None else mapping(one.get(key)).get(domain) for one in records]
        values_N = np.array([number(value) for value in found], dtype=np.float64)
        tokens_N = np.array([number(one.get("tokens")) for one in records], dtype=np.float64)
        return tokens_N, np.where(np.isfinite(values_N), values_N, math.nan)


def number(value: Any) -> float:
    """A JSON number as a float; NaN for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return math.nan
    try:
        return float(value)
    except OverflowError:
        return math.nan


def mapping(value: Any) -> Mapping[str, Any]:
    """A JSON object; empty for anything else."""
    return value if isinstance(value, dict) else {}


def numbers(value: Any) -> dict[str, float]:
    """A JSON object of numbers; NaN for any other value."""
    return {str(key): number(inner) for key, inner in mapping(value).items()}


def read_score(value: Any) -> Score:
    """Bits per byte from one set's JSON."""
    return Score(number(mapping(value).get("bits_per_byte")), number(mapping(value).get("bits_per_byte_se")))


def read_runs(paths: Sequence[str | Path]) -> list[Run]:
    """Read run folders and give each a label: its policy where that is unique, else its folder's name, else a number.

    Raises:
        DataError: a path is not a folder.
    """
    runs = [_read_run(Path(path)) for path in paths]
    policies = [run.policy for run in runs]
    folders = [run.path.resolve().name for run in runs]
    numbered = [f"{position} {folder}" for position, folder in enumerate(folders, 1)]
    labels = next(names for names in (policies, folders, numbered) if all(names) and len(set(names)) == len(names))
    return [replace(run, label=label) for run, label in zip(runs, labels, strict=True)]


def _read_run(path: Path) -> Run:
    if not path.is_dir():
        raise DataError(f"{path} is not a run folder; give the folders `weftlm train` wrote")
    problems: list[str] = []
    result: Record = {}

    def read(name: str, parse: Callable[[Path], T], empty: T) -> T:
        """What a file holds; `empty`, with the reason among the problems, where it is missing, altered or torn."""
        listed = mapping(mapping(result.get("files")).get(name))
        try:
            if {"bytes", "blake2b"} <= listed.keys():
                check_listed(path, {name: listed}, "it is left out")
            return parse(path / name)
        except DataError as error:
            problems.append(str(error).replace(f"{path}/", "") + ".")
        except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
            problems.append(f"{name} cannot be read ({reason(error)}); it is left out.")
        return empty

    if (path / "result.json").exists():
        result = read("result.json", _object, {})
    else:
        problems.append("The run has no result.json: it has not finished. Its latest numbers are shown.")
    records: list[Record] = read("metrics.jsonl", _lines, [])
    if broken := sum(not record for record in records):
        problems.append(f"{broken} of {len(records)} lines of metrics.jsonl cannot be read and are left out.")
    evaluations = [_evaluation(record) for record in _by_step(records, "eval")]
    if mapping(result.get("sets")):
        final = _evaluation({**result, "step": result.get("steps"), "tokens": result.get("train_tokens")})
        evaluations = [*(one for one in evaluations if not one.tokens >= final.tokens), final]
    elif result:
        problems.append("result.json holds no evaluation; the latest of metrics.jsonl is shown.")
    recipe_text = ""
    if (path / "recipe.yaml").is_file():
        recipe_text = (path / "recipe.yaml").read_bytes().decode("utf-8", errors="replace")
    kept: Mapping[str, WindowScores] = {}
    if result and (path / WINDOWS_FILE).exists():
        kept = read(WINDOWS_FILE, load_windows, kept)
    return Run(
        path=path,
        label="",
        result=result,
        evaluations=evaluations,
        train=_by_step(records, "train"),
        mixture=_by_step(records, "mixture"),
        recipe=read("recipe.yaml", _recipe, {}),
        recipe_text=recipe_text,
        facts=read("run.json", _object, {}),
        windows=kept,
        problems=problems,
    )


def _object(path: Path) -> Record:
    found = read_object(path, "it is left out")
    if found is None:
        raise DataError(f"There is no {path.name}")
    return found


def _recipe(path: Path) -> Record:
    found = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(found, dict):
        raise DataError(f"{path.name} is not a valid recipe")
    return found


def _lines(path: Path) -> list[Record]:
    """The lines of metrics.jsonl as objects; an empty one for a line that is none (the last of a running run)."""
    records: list[Record] = []
    for line in filter(bytes.strip, path.read_bytes().splitlines()):
        try:
            records.append(mapping(parse_json(line)))
        except (ValueError, RecursionError):
            records.append({})
    return records


def _evaluation(record: Record) -> Evaluation:
    scores = {str(name): read_score(value) for name, value in mapping(record.get("sets")).items()}
    scores[GENERIC] = read_score(record.get("generic"))
    return Evaluation(number(record.get("step")), number(record.get("tokens")), scores)


def _by_step(records: Sequence[Record], kind: str) -> list[Record]:
    """One kind's records by step; of a step written twice (a run that was continued) the later counts."""
    steps = {number(record.get("step")): record for record in records if record.get("kind") == kind}
    return [steps[step] for step in sorted(filter(math.isfinite, steps))]
