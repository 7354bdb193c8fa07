"""Experts, scores and evaluations over Ray's workers are those of one process, also where a worker dies midway."""

from __future__ import annotations

import gc
import json
import logging
import os
import secrets
import select
import shutil
import signal
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from support.command_line import Call
from support.tiny_expert import llama
from support.tiny_project import WORDS, recipe_value, write_corpora

from weftlm import __version__
from weftlm.errors import ConfigError, DataError, WeftError
from weftlm.experts.library import ExpertLibrary
from weftlm.fan_out import Task, _on_worker, fan_out
from weftlm.gating import scores
from weftlm.gating.scores import ScoreCache
from weftlm.integrations.ray_executor import RayExecutor, ray_executor
from weftlm.pipeline import experts
from weftlm.pipeline.experts import train_experts
from weftlm.pipeline.gating import score_experts
from weftlm.pipeline.prepare import prepare
from weftlm.pipeline.recipe import Recipe, load_recipe
from weftlm.pipeline.routes import evaluate_routes

ray = pytest.importorskip("ray", reason="the extra 'ray' is not installed")

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.slow,
]

RECIPE = "recipe.yaml"


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """Ray on this machine alone, with two workers."""
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import tests
    folder = tempfile.mkdtemp(prefix="r")  # sockets lie in it, whose paths must be short
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false",
        }.items():  # fmt: skip
            patch.setenv(name, value)
        if sys.dont_write_bytecode:  # a dozen processes that compile the same each time would take minutes
            patch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)
            patch.setenv("PYTHONPYCACHEPREFIX", f"{folder}/bytecode")
        patch.delenv("RAY_AUTH_MODE", raising=False)  # Ray sets it, and it is taken back with the others
        try:
            ray.init(
                num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR,
                object_store_memory=100 << 20, _temp_dir=folder, _node_ip_address="127.0.0.1",
            )  # fmt: skip
            yield
        finally:
            ray.shutdown()
            with warnings.catch_warnings():  # Ray does not wait for what it has ended
                warnings.filterwarnings("ignore", "subprocess .* is still running", ResourceWarning)
                gc.collect()
            shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, cluster: None) -> Iterator[dict[str, Any]]:
    """A project carried out by this process, in whose folder the tests are: its experts, scores and evaluation."""
    folder = tmp_path_factory.mktemp("project")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write_corpora(folder / "corpora")
        training = {
            "sequence_length": 16, "batch_sequences": 3, "steps": 6, "save_every_steps": 2, "log_every_steps": 1,
            "device": "cpu",
        }  # fmt: skip
        value: dict[str, Any] = {
            "run": "one",
            "prepared": "prepared",
            "data": recipe_value()["data"],
            "experts": {
                "base": "base",
                "lora": {"rank": 2},
                "training": training,
                "gate": {"steps": 2},
                "statistics_examples": 4,
                "embedder": "tokens-64",
            },
            "evaluation": {"max_tokens_per_set": 320},
            "gating": {"scores": {"length": 8, "sequences": 12, "samples": 6, "batch_size": 4, "shard_sequences": 5}},
        }
        (folder / RECIPE).write_text(json.dumps(value))
        data = prepare(Recipe.model_validate(value).data, folder / "prepared", progress=False)
        llama(vocab_size=data.tokenizer.vocab_size).save_pretrained(folder / "base")
        data.tokenizer.save(folder / "base")
        recipe = load_recipe(RECIPE)
        yield {
            "recipe": recipe,
            "experts": train_experts(recipe, progress=False),
            "scores": score_experts(recipe, progress=False),
            "evaluation": evaluate_routes(recipe, progress=False),
        }
    torch.set_num_threads(threads)


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    return Call(capsys)


# -- units that are done midway when their worker dies --------------------------------------------------------------


def die_once(marker: Path) -> None:
    """Kill this process, unless another one has been killed here before."""
    try:
        marker.open("x").close()
    except FileExistsError:
        return
    os.kill(os.getpid(), signal.SIGKILL)


def dying_after(work: Callable[..., Any], marker: Path) -> Callable[..., Any]:
    """`work`, whose worker dies once when all is done and nobody knows."""

    def run(*arguments: Any) -> Any:
        answer = work(*arguments)
        die_once(marker)
        return answer

    return run


def dying_in_training(work: Callable[..., Any], marker: Path) -> Callable[..., Any]:
    """`work`, whose worker dies once after it has saved a checkpoint."""

    def run(*arguments: Any) -> Any:
        from weftlm.training import loop

        save = loop.save_checkpoint

        def save_and_die(*arguments: Any, **options: Any) -> Path:
            path = save(*arguments, **options)
            die_once(marker)
            return path

        loop.save_checkpoint = save_and_die
        try:
            return work(*arguments)
        finally:
            loop.save_checkpoint = save

    return run


# -- the same as one process gives ----------------------------------------------------------------------------------


def metrics(run: Path, name: str) -> list[dict[str, Any]]:
    """What an expert's training logged, less what the clock says."""
    lines = [json.loads(line) for line in (run / "training" / name / "adapter/metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if "second" not in key} for line in lines]


def test_experts_are_the_same_and_a_killed_worker_is_replaced(
    alone: dict[str, Any], call: Call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    marker = tmp_path / "killed"
    monkeypatch.setattr(experts, "_make_far", dying_in_training(experts._make_far, marker))
    made = call("experts", "train", RECIPE, "--set", "run=two", "--ray", "--json")
    assert marker.exists()
    assert "train 3/3 experts" in call.err
    assert {name: facts["status"] for name, facts in made["experts"].items()} == dict.fromkeys(WORDS, "made")

    one, two = ExpertLibrary.open(Path("one/experts")), ExpertLibrary.open(Path("two/experts"))
    assert sorted(path.name for path in two.folder.iterdir()) == sorted(path.name for path in one.folder.iterdir())
    for name in WORDS:
        for file in ("adapter_model.safetensors", "adapter_config.json", "statistics.safetensors"):
            assert (two.path(name) / file).read_bytes() == (one.path(name) / file).read_bytes(), (name, file)
        expected, found = one.load(name).gate, two.load(name).gate
        assert expected is not None
        assert found is not None
        assert {**found.facts, "seconds": 0} == {**expected.facts, "seconds": 0}
        assert all(torch.equal(found.vectors[module], vector) for module, vector in expected.vectors.items())
        logged = metrics(Path("two"), name)
        assert logged == metrics(Path("one"), name)
        steps = [line["step"] for line in logged if line["kind"] == "train"]
        assert steps == sorted(set(steps))
        assert len(steps) == 6
    assert made["experts"]["cooking"]["losses"] == alone["experts"]["experts"]["cooking"]["losses"]

    again = call("experts", "train", RECIPE, "--set", "run=two", "--ray", "--json")
    assert {facts["status"] for facts in again["experts"].values()} == {"kept"}
    assert "give --ray" in call("experts", "train", RECIPE, "--gpus", "1", code=2)
    assert "one of the two" in call("experts", "train", RECIPE, "--ray", "--processes", "2", code=2)


def test_scores_are_the_same_and_nothing_is_counted_twice(
    alone: dict[str, Any], call: Call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    marker = tmp_path / "killed"
    monkeypatch.setattr(scores, "_far_shard", dying_after(scores._far_shard, marker))
    elsewhere = ["--set", "run=three", "--set", "experts.library=one/experts", "--ray", "--json"]
    found = call("score", RECIPE, *elsewhere)
    assert marker.exists()
    assert "score 54/54 sequences" in call.err
    assert found == {**alone["scores"], "folder": "three/scores"}
    one, three = Path("one/scores"), Path("three/scores")
    assert [path.name for path in sorted(three.iterdir())] == [path.name for path in sorted(one.iterdir())]
    for path in one.iterdir():
        assert (three / path.name).read_bytes() == path.read_bytes(), path.name
    cache = ScoreCache.open(three)
    assert sum(map(len, (*cache.domains.values(), *cache.samples.values()))) == 54
    assert call("score", RECIPE, *elsewhere) == found, "finished: only the experts' fingerprints are asked for"
    assert "score " not in call.err


def test_evaluation_is_the_same(alone: dict[str, Any], call: Call) -> None:
    found = call("route", "eval", RECIPE, "--ray", "--json")
    expected = alone["evaluation"]
    assert {"base", "random", "phatgoose", "oracle"} <= set(expected["rows"])
    assert found == expected
    assert not list(Path.cwd().rglob(".weftlm-shared-*"))


# -- units that cannot be done --------------------------------------------------------------------------------------


def two_units(
    work: Callable[..., Any], *arguments: Any, shared: Sequence[Path] = (), **options: Any
) -> list[tuple[Task, Any]]:
    """What comes of a good unit and one called 'second'."""
    found: list[tuple[Task, Any]] = []
    tasks = [Task(name, (name, *arguments)) for name in ("first", "second")]
    with ray_executor(**options) as executor:
        fan_out(executor, tasks, work, lambda task, answer: found.append((task, answer)), shared=shared, show=False)
    return found


def fail(name: str, folder: Path) -> str:
    with (folder / name).open("a") as file:
        file.write("tried\n")
    if name == "second":
        raise DataError("there is no text")
    return name


def test_an_error_a_user_can_mend_is_final(alone: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"^there is no text$"):
        two_units(fail, tmp_path)
    assert (tmp_path / "second").read_text() == "tried\n"


def die(name: str) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_unit_that_kills_every_worker_is_given_up(alone: dict[str, Any]) -> None:
    executor = RayExecutor(retries=0)
    with pytest.raises(WeftError, match=r"(first|second): its worker died \(WorkerCrashedError"):
        fan_out(executor, [Task(name, (name,)) for name in ("first", "second")], die, print, show=False)


def hang(name: str, folder: Path) -> str:
    if name == "second":
        (folder / "pid").write_text(str(os.getpid()))
        os.mkfifo(folder / "started")
        signal.pause()
    while not (folder / "started").exists():
        os.sched_yield()
    return name


def test_an_interruption_ends_what_is_under_way(alone: dict[str, Any], tmp_path: Path) -> None:
    def interrupt(task: Task, answer: str) -> None:
        raise KeyboardInterrupt

    tasks = [Task(name, (name, tmp_path)) for name in ("first", "second")]
    with pytest.raises(KeyboardInterrupt), ray_executor() as executor:
        fan_out(executor, tasks, hang, interrupt, show=False)
    try:
        worker = os.pidfd_open(int((tmp_path / "pid").read_text()))
    except ProcessLookupError:
        return
    with open(worker):
        ended = select.poll()
        ended.register(worker, select.POLLIN)
        assert ended.poll(30_000), "the worker of the second unit still works"


def say(name: str) -> str:
    return f"{name} {os.environ['CUDA_VISIBLE_DEVICES']}in {os.getcwd()}"


def test_workers_see_what_this_process_sees(alone: dict[str, Any], tmp_path: Path, monkeypatch: Any) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    (shared / "file").write_text("text")
    here = str(Path.cwd())
    assert sorted(answer for _, answer in two_units(say, shared=[shared])) == [f"first in {here}", f"second in {here}"]
    assert [path.name for path in shared.iterdir()] == ["file"]

    def read_only(path: Path) -> None:
        raise PermissionError(f"cannot write {path}")

    with monkeypatch.context() as patch:  # then the folder must be there
        patch.setattr(Path, "touch", read_only)
        assert len(two_units(say, shared=[shared])) == 2


@pytest.mark.parametrize(("place", "what"), [("", "is another folder than the command sees"), ("far", "is not there")])
def test_a_worker_that_sees_another_folder_is_refused(tmp_path: Path, place: str, what: str) -> None:
    token = tmp_path / place / ".weftlm-shared-1"
    with pytest.raises(ConfigError, match=f"{what}; put the working folder, the run folder"):
        _on_worker(__version__, Path.cwd(), [token], say, ("first",))
    with pytest.raises(ConfigError, match=r"has weftlm .* and the command weftlm 0"):
        _on_worker("0", Path.cwd(), [], say, ("first",))


def test_a_cluster_that_cannot_be_used_is_said(alone: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[str] = []

    def init(address: str, **options: Any) -> None:
        started.append(address)
        if address == "auto":
            raise ConnectionError("no cluster")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "shutdown", lambda: started.append("shut down"))
    with pytest.raises(ConfigError, match="asks for 1 GPUs and this machine has 0"):
        two_units(say, gpus=1)
    assert started == ["auto", "local", "shut down"]
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with pytest.raises(ConfigError, match=r"no Ray cluster lets this process in at RAY_ADDRESS '127\.0\.0\.1:1'"):
        two_units(say)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="from a single process"):
        two_units(say)
