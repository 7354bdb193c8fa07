"""Experts, scores and evaluations over Ray's workers are those of one process, also where a worker dies midway."""

from __future__ import annotations

import gc
import json
import logging
import os
import re
import secrets
import select
import shutil
import signal
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.command_line import Call
from support.mixtures import lines_of
from support.tiny_expert import llama
from support.tiny_project import recipe_value, write_corpora

from weftlm import __version__
from weftlm.errors import ConfigError, DataError, WeftError
from weftlm.experts.files import encode
from weftlm.experts.library import ExpertLibrary
from weftlm.fan_out import _on_worker, fan_out
from weftlm.integrations.ray_executor import RayExecutor, ray_executor
from weftlm.pipeline import experts
from weftlm.pipeline.experts import train_experts
from weftlm.pipeline.prepare import prepare
from weftlm.pipeline.recipe import Recipe, load_recipe
from weftlm.pipeline.routes import evaluate_routes
from weftlm.pipeline.scoring import score_experts

ray = pytest.importorskip("ray", reason="the extra 'ray' is not installed")

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

RECIPE, NAMES = "recipe.yaml", ["cooking", "sailing"]
TWO = {name: (name,) for name in ("first", "second")}


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


@pytest.fixture
def alone(tmp_path: Path, cluster: None, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A project carried out by this process, in the test's folder: its experts, scores and evaluation."""
    monkeypatch.chdir(tmp_path)
    write_corpora(tmp_path / "corpora")
    training = {
        "sequence_length": 16, "batch_sequences": 3, "steps": 4, "save_every_steps": 2, "log_every_steps": 1,
        "device": "cpu", "threads": torch.get_num_threads(),
    }  # fmt: skip
    value: dict[str, Any] = {
        "run": "one",
        "prepared": "prepared",
        "data": recipe_value()["data"],
        "experts": {
            "base": "base", "domains": NAMES, "lora": {"rank": 2}, "training": training, "gate": {"steps": 2},
            "statistics_examples": 4, "embedder": "tokens-64",
        },
        "evaluation": {"max_tokens_per_set": 160},
        "gating": {
            "domains": NAMES,
            "scores": {"length": 8, "sequences": 6, "samples": 4, "batch_size": 4, "shard_sequences": 3},
        },
    }  # fmt: skip
    Path(RECIPE).write_text(json.dumps(value))
    data = prepare(Recipe.model_validate(value).data, "prepared", progress=False)
    llama(vocab_size=data.tokenizer.vocab_size).save_pretrained("base")
    data.tokenizer.save("base")
    recipe = load_recipe(RECIPE)
    return {
        "experts": train_experts(recipe, progress=False),
        "scores": score_experts(recipe, progress=False),
        "evaluation": evaluate_routes(recipe, progress=False),
    }


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    return Call(capsys)


def die_once(marker: Path) -> None:
    """Kill this process, unless another one has been killed here before."""
    try:
        marker.open("x").close()
    except FileExistsError:
        return
    os.kill(os.getpid(), signal.SIGKILL)


def dying_in_training(work: Callable[..., Any], marker: Path) -> Callable[..., Any]:
    """`work`, whose worker dies once after it has saved a checkpoint."""

    def run(*arguments: Any) -> Any:
        from weftlm.training import loop

        save = loop.save_checkpoint

        def save_and_die(*given: Any, **options: Any) -> Any:
            answer = save(*given, **options)
            die_once(marker)
            return answer

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(loop, "save_checkpoint", save_and_die)
            return work(*arguments)

    return run


def test_the_results_are_those_of_one_process_and_killed_workers_are_replaced(
    alone: dict[str, Any], call: Call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(experts, "_make_far", dying_in_training(experts._make_far, tmp_path / "killed"))

    made = call("experts", "train", RECIPE, "--set", "run=two", "--ray", "--json")
    assert (tmp_path / "killed").exists()
    assert "train 2/2 experts" in call.err
    assert {name: facts["status"] for name, facts in made["experts"].items()} == dict.fromkeys(NAMES, "made")
    one, two = ExpertLibrary.open(Path("one/experts")), ExpertLibrary.open(Path("two/experts"))
    for name in NAMES:
        expected, found = one.load(name), two.load(name)
        for file in ("adapter_model.safetensors", "statistics.safetensors"):
            assert encode(found)[file] == encode(expected)[file], (name, file)
        assert all(torch.equal(found.gate.vectors[module], vector) for module, vector in expected.gate.vectors.items())
        logged = [line for line in lines_of(next(Path("two/training", name).glob("*/adapter"))) if "loss" in line]
        assert [line["step"] for line in logged if line["kind"] == "train"] == [1, 2, 3, 4]
    assert made["experts"]["cooking"]["losses"] == alone["experts"]["experts"]["cooking"]["losses"]

    found = call("score", RECIPE, "--set", "run=three", "--set", "experts.library=one/experts", "--ray", "--json")
    assert re.search(r"score (\d+)/\1 sequences", call.err)
    assert found == {**alone["scores"], "folder": "three/scores"}
    for path in Path("one/scores").iterdir():
        assert (Path("three/scores") / path.name).read_bytes() == path.read_bytes(), path.name

    assert call("route", "eval", RECIPE, "--ray", "--json") == alone["evaluation"]


def fail(name: str, folder: Path) -> str:
    with (folder / name).open("a") as file:
        file.write("tried\n")
    if name == "second":
        raise DataError("there is no text")
    return name


def die(name: str) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def hang(name: str, folder: Path) -> str:
    if name == "second":
        (folder / "pid").write_text(str(os.getpid()))
        os.mkfifo(folder / "started")
        signal.pause()
    while not (folder / "started").exists():
        os.sched_yield()
    return name


def say(name: str) -> str:
    return f"{name} {os.environ['CUDA_VISIBLE_DEVICES']}in {os.getcwd()}"


def test_tasks_that_fail_die_or_are_interrupted_end_all_of_them(cluster: None, tmp_path: Path) -> None:
    tasks = {name: (name, tmp_path) for name in TWO}
    answers: list[str] = []
    with ray_executor() as executor:
        fan_out(executor, TWO, say, lambda _, answer: answers.append(answer), shared=[tmp_path], show=False)
    assert sorted(answers) == [f"first in {Path.cwd()}", f"second in {Path.cwd()}"]
    with pytest.raises(DataError, match=r"^there is no text$"), ray_executor() as executor:
        fan_out(executor, tasks, fail, print, show=False)
    assert (tmp_path / "second").read_text() == "tried\n"
    died = pytest.raises(WeftError, match=r"(first|second): its worker died \(WorkerCrashedError")
    with died, RayExecutor(retries=0) as executor:  # whose end does not hide why
        fan_out(executor, TWO, die, print, show=False)

    def interrupt(title: str, answer: str) -> None:
        raise KeyboardInterrupt

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


def test_a_worker_of_another_version_or_without_the_folders_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"far is not there on .*; put the working folder, the run folder"):
        _on_worker(__version__, Path.cwd(), [tmp_path / "far"], say, ("first",))
    with pytest.raises(ConfigError, match=r"has weftlm .* and the command weftlm 0"):
        _on_worker("0", Path.cwd(), [], say, ("first",))


def test_a_cluster_that_cannot_be_used_is_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    started: list[str] = []

    def init(address: str, **options: Any) -> None:
        started.append(address)
        if address == "auto":
            raise ConnectionError("no cluster")

    def connect(**options: Any) -> None:
        with ray_executor(**options):
            pass

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": {"CPU": 2.0}}])
    monkeypatch.setattr(ray, "shutdown", lambda: started.append("shut down"))
    with pytest.raises(ConfigError, match="each task asks for 1 CPUs and 1 GPUs, which this machine does not have"):
        connect(gpus=1)
    assert started == ["auto", "local", "shut down"]
    with monkeypatch.context() as connected:
        connected.setattr(ray, "is_initialized", lambda: True)
        connect(cpus=2)
        assert not caplog.messages
        connect(cpus=3)
        assert caplog.messages == [
            "each task asks for 3 CPUs and 0 GPUs, which no machine of the cluster has: waiting for another to join"
        ]
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with pytest.raises(ConfigError, match=r"no Ray cluster lets this process in at RAY_ADDRESS '127\.0\.0\.1:1'"):
        connect()
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="from a single process"):
        connect()
