"""Read a run folder for a report: whatever is there, finished, still running or partly broken.

Reading never fails on a file's contents: what is missing or broken becomes a sentence in `Run.problems`, for the page.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from weftlm.errors import DataError
from weftlm.evaluation.result import WindowScores, load_windows
from weftlm.evaluation.suite import TARGET
from weftlm.files import check_listed, parse_json, read_object

WINDOWS_FILE = "windows.safetensors"
"""Window losses of the final evaluation (`evaluation.result.save_windows`), for paired comparisons; optional."""

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Score:
    """A set's numbers as a run folder holds them; NaN where it holds none."""

    bits_per_byte: float = math.nan
    bits_per_byte_se: float = math.nan
    tokens: float = math.nan

    @staticmethod
    def read(value: Any) -> Score:
        """A score from one set's JSON; what is absent or no number is NaN."""
        return Score(*(number(mapping(value).get(one.name)) for one in fields(Score)))


@dataclass(frozen=True)
class Evaluation:
    """The scores of one moment: the target's, each domain's, and the mean over domains."""

    step: float
    tokens: float
    target: Score
    domains: dict[str, Score]
    generic: Score


@dataclass(frozen=True)
class Run:
    """One training run, as far as its folder tells.

    Attributes:
        path: the folder.
        label: short name, unique in a report.
        policy: the mixture policy's name; empty when unknown.
        finished: whether a readable `result.json` is there.
        final: the final evaluation, or the latest so far.
        evaluations: every evaluation of `metrics.jsonl`, by step.
        train: the `train` records by step.
        mixture: the `mixture` records by step.
        weights: the last mixture weights by domain.
        epochs: passes over each domain's training text.
        seconds: wall time by activity.
        steps: optimizer steps taken.
        train_tokens: tokens trained on.
        parameters: model parameters.
        recipe: the resolved recipe, as data and as it was written.
        facts: the contents of `run.json`.
        windows: window losses of the final evaluation, by set.
        problems: what is missing or broken, one sentence each.
    """

    path: Path
    label: str
    policy: str
    finished: bool
    final: Evaluation | None
    evaluations: tuple[Evaluation, ...]
    train: tuple[Record, ...]
    mixture: tuple[Record, ...]
    weights: dict[str, float]
    epochs: dict[str, float]
    seconds: dict[str, float]
    steps: float
    train_tokens: float
    parameters: float
    recipe: Record
    recipe_text: str
    facts: Record
    windows: dict[str, WindowScores]
    problems: tuple[str, ...]

    @property
    def domains(self) -> list[str]:
        """Every domain the folder mentions, in the order it first does."""
        names: dict[str, None] = dict.fromkeys(self.weights)
        if self.mixture:
            names |= dict.fromkeys(mapping(self.mixture[0].get("weights")))
        if self.final is not None:
            names |= dict.fromkeys(self.final.domains)
        return list(names | dict.fromkeys(self.epochs))

    def series(self, kind: str, key: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Training tokens and values of one number of the `train` or `mixture` records."""
        return _series(self.train if kind == "train" else self.mixture, lambda record: record.get(key))

    def domain_series(self, key: str, domain: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Training tokens and one domain's values of a by-domain field (`weights`, `alignment`, ...)."""
        return _series(self.mixture, lambda record: mapping(record.get(key)).get(domain))


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


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, keys joined by dots; lists and scalars are values."""
    if not isinstance(value, dict) or (not value and prefix):
        return {prefix: value} if prefix else {}
    result: dict[str, Any] = {}
    for key, inner in value.items():
        result |= flatten(inner, f"{prefix}.{key}" if prefix else str(key))
    return result


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
    summary: Record = {}
    finished = False
    if (path / "result.json").exists():
        summary = _read_json(path / "result.json", problems)
        finished = bool(summary)
    else:
        problems.append("The run has no result.json: it has not finished. Its latest numbers are shown.")
    listed = mapping(summary.get("files"))
    sound = {name: _is_sound(path, name, listed, problems) for name in ("metrics.jsonl", WINDOWS_FILE)}
    metrics = _read_metrics(path / "metrics.jsonl", problems) if sound["metrics.jsonl"] else []
    evaluations = tuple(_evaluation(record) for record in _latest(metrics, "eval"))
    train, mixture = tuple(_latest(metrics, "train")), tuple(_latest(metrics, "mixture"))
    facts = _read_json(path / "run.json", problems)
    recipe_text, recipe = _read_recipe(path / "recipe.yaml", problems)
    windows: dict[str, WindowScores] = {}
    if finished and sound[WINDOWS_FILE] and (path / WINDOWS_FILE).exists():
        try:
            windows = load_windows(path / WINDOWS_FILE)
        except DataError:
            problems.append(f"{WINDOWS_FILE} cannot be read: differences to other runs are not paired.")
    last: Record = mixture[-1] if mixture else {}
    latest = (*train[-1:], *mixture[-1:], *_latest(metrics, "eval")[-1:])
    step, tokens = (
        _first(number(summary.get(key)), max(_known(number(one.get(name)) for one in latest), default=math.nan))
        for key, name in (("steps", "step"), ("train_tokens", "tokens"))
    )
    final = _evaluation({"step": step, "tokens": tokens, **summary}) if mapping(summary.get("sets")) else None
    if finished and final is None:
        problems.append("result.json holds no evaluation; the latest of metrics.jsonl is shown.")
    policy = summary.get("policy") or mapping(recipe.get("mixture")).get("policy")
    return Run(
        path=path,
        label="",
        policy=policy if isinstance(policy, str) else "",
        finished=finished,
        final=final or (evaluations[-1] if evaluations else None),
        evaluations=evaluations,
        train=train,
        mixture=mixture,
        weights=_numbers(summary.get("weights")) or _numbers(last.get("weights")),
        epochs=_numbers(summary.get("epochs")) or _numbers(last.get("epochs")),
        seconds=_numbers(summary.get("seconds")),
        steps=step,
        train_tokens=tokens,
        parameters=number(summary.get("parameters")),
        recipe=recipe,
        recipe_text=recipe_text,
        facts=facts,
        windows=windows,
        problems=tuple(problems),
    )


def _first(*values: float) -> float:
    return next(iter(_known(values)), math.nan)


def _known(values: Iterable[float]) -> list[float]:
    return [value for value in values if math.isfinite(value)]


def _numbers(value: Any) -> dict[str, float]:
    return {str(key): number(inner) for key, inner in mapping(value).items()}


def _evaluation(record: Mapping[str, Any]) -> Evaluation:
    sets = {str(name): Score.read(value) for name, value in mapping(record.get("sets")).items()}
    domains = {name: score for name, score in sets.items() if name != TARGET}
    generic = Score.read(record.get("generic"))
    step, tokens = number(record.get("step")), number(record.get("tokens"))
    return Evaluation(step, tokens, sets.get(TARGET, Score()), domains, generic)


def _series(
    records: Sequence[Record], value: Callable[[Record], Any]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    points = [(number(record.get("tokens")), number(value(record))) for record in records]
    kept = [(x, y if math.isfinite(y) else math.nan) for x, y in points if math.isfinite(x)]
    x_N = np.array([x for x, _ in kept], dtype=np.float64)
    return x_N, np.array([y for _, y in kept], dtype=np.float64)


def _latest(records: Sequence[Record], kind: str) -> list[Record]:
    """One kind's records by step; of a step written twice (a run that was continued) the later counts."""
    by_step: dict[float, Record] = {}
    for record in records:
        step = number(record.get("step"))
        if record.get("kind") == kind and math.isfinite(step):
            by_step[step] = record
    return [by_step[step] for step in sorted(by_step)]


def _read_metrics(path: Path, problems: list[str]) -> list[Record]:
    try:
        lines = path.read_bytes().splitlines(keepends=True)
    except FileNotFoundError:
        problems.append("There is no metrics.jsonl: no curve can be drawn.")
        return []
    except OSError as error:
        problems.append(f"metrics.jsonl cannot be read ({error.strerror}): no curve can be drawn.")
        return []
    records: list[Record] = []
    broken: list[int] = []
    for position, line in enumerate(lines, 1):
        try:
            record = parse_json(line)
        except (ValueError, RecursionError):
            record = None
        if isinstance(record, dict):
            records.append(record)
        elif line.strip():
            broken.append(position)
    if broken and broken[-1] == len(lines) and not lines[-1].endswith(b"\n"):
        broken.pop()
        problems.append("The last line of metrics.jsonl is incomplete (the run is writing, or was cut off): left out.")
    if broken:
        shown = ", ".join(map(str, broken[:5])) + (", ..." if len(broken) > 5 else "")
        lines_are = "line is" if len(broken) == 1 else "lines are"
        problems.append(f"{len(broken)} {lines_are} not readable in metrics.jsonl ({shown}): left out.")
    return records


def _is_sound(path: Path, name: str, listed: Mapping[str, Any], problems: list[str]) -> bool:
    """Whether a file is as `result.json` lists it; what it does not list is read as it is."""
    if not {"bytes", "blake2b"} <= mapping(listed.get(name)).keys():
        return True
    try:
        check_listed(path, {name: listed[name]}, "it is left out")
    except DataError as error:
        problems.append(_sentence(error, path))
        return False
    return True


def _sentence(error: DataError, folder: Path) -> str:
    return str(error).replace(f"{folder}/", "") + "."


def _read_json(path: Path, problems: list[str]) -> Record:
    """A JSON object; empty, with the reason among the problems, where there is none or it was altered."""
    try:
        value = read_object(path, "it is left out")
    except DataError as error:
        problems.append(_sentence(error, path.parent))
        return {}
    if value is None:
        problems.append(f"There is no {path.name}.")
    return value or {}


def _read_recipe(path: Path, problems: list[str]) -> tuple[str, Record]:
    try:
        text = path.read_bytes().decode("utf-8", errors="replace")
    except FileNotFoundError:
        problems.append("There is no recipe.yaml.")
        return "", {}
    except OSError as error:
        problems.append(f"recipe.yaml cannot be read ({error.strerror}).")
        return "", {}
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError):
        value = None
    if not isinstance(value, dict):
        problems.append("recipe.yaml is not a valid recipe; its text is shown as it is.")
        return text, {}
    return text, value
