"""One recipe, one run folder: prepare, train, evaluate, save."""

from __future__ import annotations

import logging
import time
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import nn
from transformers.utils import logging as transformers_logging

from weftlm.artifact import Artifact, refuse_other
from weftlm.errors import ConfigError, DataError
from weftlm.evaluation.config import EvaluationConfig
from weftlm.evaluation.result import save_windows
from weftlm.evaluation.suite import SuiteResult, evaluate_suite
from weftlm.experts.lora import load_trained
from weftlm.files import check_listed, read_object, whole_folder, write_object, write_whole
from weftlm.mixture.config import policy_config
from weftlm.mixture.policy import MixtureSetting, build_policy
from weftlm.models.device import choose_device
from weftlm.models.factory import build_model, count_parameters
from weftlm.pipeline.names import RESULT
from weftlm.pipeline.prepare import prepare
from weftlm.pipeline.prepared import PreparedData
from weftlm.pipeline.recipe import Recipe
from weftlm.pipeline.run_folder import alone
from weftlm.pipeline.stages.train import check_mixture
from weftlm.training.loop import Task, Trainer
from weftlm.training.metrics import open_tracker
from weftlm.training.runtime import Runtime, choose_runtime, environment

log = logging.getLogger(__name__)

HOURS_TO_WAIT_FOR_PREPARATION = 24
_CURE = "restore it from a copy, or delete it and run the same command again, which takes up the last checkpoint"


def run_training(recipe: Recipe) -> dict[str, Any]:
    """Carry a recipe from text to a trained, evaluated and saved model; continues an interrupted run.

    Returns:
        result.json as a mapping: final evaluation, mixture, tokens and seconds.
    Raises:
        WeftError: for every cause a user can mend; what was complete before stays.
    """
    transformers_logging.disable_progress_bar()
    check_mixture(recipe)
    process = PartialState(
        timeout=timedelta(hours=HOURS_TO_WAIT_FOR_PREPARATION),
        cpu=choose_device(recipe.trained[2].device).type == "cpu",
    )
    recipe.run.mkdir(parents=True, exist_ok=True)
    with alone(recipe.run) if process.is_main_process else nullcontext():
        with process.main_process_first():
            data = prepare(recipe.data, recipe.prepared_folder, progress=process.is_main_process)
        artifact = Artifact(recipe.run / RESULT, {"data": data.fingerprint, **recipe.deciding()}, _CURE)
        if artifact.record.exists() or any((recipe.run / "checkpoints").glob("step-*")):
            refuse_other(artifact, "a run", "choose another run folder or remove it")
        finished = artifact.reuse() if (recipe.run / "model").is_dir() else None
        process.wait_for_everyone()
        if finished is not None:
            log.info("%s is finished; this is its result", recipe.run)
            return finished
        data.heldout()
        return _train(recipe, data, artifact, process)


def _train(recipe: Recipe, data: PreparedData, artifact: Artifact, process: PartialState) -> dict[str, Any]:
    section, mixture, training = recipe.trained
    policy = build_policy(mixture.model_dump())
    reference_run = None if "reference_losses" not in policy.needs else _reference_run(recipe, policy.config)
    reference = None if reference_run is None else _load(reference_run, recipe, data)
    model = build_model(
        section, vocab_size=data.tokenizer.vocab_size, sequence_length=training.sequence_length,
        eos_id=data.tokenizer.eos_id, seed=recipe.seed,
    )  # fmt: skip
    writes = process.is_main_process
    runtime = choose_runtime(training, parameters=count_parameters(model), processes=process.num_processes)
    if writes:
        write_whole(recipe.run / "recipe.yaml", recipe.to_yaml())
        artifact.begin()
        described = environment(recipe.seed, runtime, {"data": data.fingerprint, "run": artifact.id})
        write_object(recipe.run / "run.json", described)
    latest: list[SuiteResult] = []

    def evaluate(module: nn.Module) -> dict[str, Any]:
        latest[:] = [_evaluate(module, data, recipe, runtime, recipe.evaluation)]
        return latest[0].to_json()

    trainer = Trainer(
        model,
        training_task(data, policy, reference),
        training,
        alignment=recipe.alignment,
        runtime=runtime,
        folder=recipe.run,
        seed=recipe.seed,
        evaluate=evaluate,
        evaluate_every_steps=recipe.evaluation.every_steps or 0,
        identity=artifact.id,
        trackers=tuple(open_tracker(each, recipe.run, recipe.resolved()) for each in recipe.trackers if writes),
        may_shard=True,
    )
    trained = trainer.run()
    place = recipe.run / "model"
    with whole_folder(place, "model", replace=True) if writes else nullcontext(place) as making:
        trainer.save_model(making)
        if writes:
            data.tokenizer.save(making)
    if trainer.evaluated_step != trained.step:
        start = time.perf_counter()
        evaluate(trainer.module)
        trained.seconds["eval"] += time.perf_counter() - start
    if reference_run is not None:  # a cost of the policy that needs it
        spent = read_result(reference_run)["seconds"]
        trained.seconds["reference"] = float(spent["train"] + spent["alignment"])
    choice = trainer.mixture.choice
    result = {
        "policy": mixture.policy,
        "steps": trained.step,
        "train_tokens": trained.tokens,
        "seconds": trained.seconds,
        "parameters": count_parameters(trainer.module),
        "trainable_parameters": count_parameters(trainer.module, trainable=True),
        "weights": trained.weights,
        "epochs": trained.epochs,
        "stopped_early": trained.stopped_early,
        "estimator": choice and {"name": choice.estimator, "probe": choice.probe, "reason": choice.reason},
        **latest[0].to_json(),
    }
    if writes:
        save_windows(recipe.run / "windows.safetensors", latest[0].sets)
        result = artifact.finish(result, ["windows.safetensors", "metrics.jsonl"], nan=True)
    process.wait_for_everyone()
    return result


def training_task(data: PreparedData, policy: Any, reference: nn.Module | None = None) -> Task:
    """Prepared data and a policy as the training loop takes them."""
    names = tuple(domain.name for domain in data.domains)
    tokens_D = torch.tensor([len(domain.train) for domain in data.domains], dtype=torch.float64)
    setting = MixtureSetting(
        names, tokens_D=tokens_D, target_histogram_D=data.target_histogram_D, basis_ND=data.basis_ND
    )
    sources = tuple(domain.train for domain in data.domains)
    return Task(names, sources, policy, setting, target=data.target_train, reference=reference)


def evaluate_run(run: Path, recipe: Recipe, config: EvaluationConfig) -> SuiteResult:
    """Evaluate a finished run's model again, on more or other tokens.

    Raises:
        ConfigError: the run has no model yet.
    """
    data = PreparedData.load(recipe.prepared_folder)
    runtime = choose_runtime(recipe.trained[2], parameters=0)
    return _evaluate(_load(run, recipe, data).to(runtime.device), data, recipe, runtime, config)


def _evaluate(
    model: nn.Module, data: PreparedData, recipe: Recipe, runtime: Runtime, config: EvaluationConfig
) -> SuiteResult:
    length, distributed = recipe.trained[2].sequence_length, PartialState().num_processes > 1
    return evaluate_suite(
        model, data.heldout(), data.target_heldout,
        sequence_length=length, config=config, device=runtime.device, distributed=distributed,
    )  # fmt: skip


def _reference_run(recipe: Recipe, policy: Any) -> Path:
    """The run of DoReMi's reference: the one it names, or one trained first on a plain mixture."""
    if policy.reference is not None:
        return Path(policy.reference)
    run, mixture = recipe.run / "reference", policy_config({"policy": policy.reference_policy})
    run_training(recipe.model_copy(update={"run": run, "prepared": recipe.prepared_folder, "mixture": mixture}))
    return run


def _load(run: Path, recipe: Recipe, data: PreparedData) -> nn.Module:
    """The model of a finished run on the same data."""
    if not (run / "model").is_dir():
        raise ConfigError(f"{run} has no trained model yet; finish it with weftlm train")
    require_same_data(run, data)
    return load_trained(run / "model", dtype=recipe.trained[0].dtype)


def require_same_data(run: Path, data: PreparedData) -> None:
    """Refuse a run of other data: token ids mean something only together with the tokenizer that made them.

    Raises:
        DataError: the run was trained on other prepared data, or does not tell.
    """
    described = read_object(run / "run.json", _CURE)
    found = "none" if described is None else described["fingerprints"]["data"]
    if found != data.fingerprint:
        raise DataError(
            f"{run} was trained on other prepared data (fingerprint {found}, here {data.fingerprint}); point "
            f"`prepared` at the data it was trained on"
        )


def read_result(run: Path) -> dict[str, Any]:
    """result.json of a finished run, compared with its checksum and with the files it lists.

    Raises:
        DataError: it is missing, torn or altered, or a file is.
    """
    found = read_object(run / RESULT, _CURE)
    if found is None:
        raise DataError(f"{run} has no {RESULT}: it has not finished; finish it with weftlm train")
    check_listed(run, found.pop("files", {}), _CURE)
    return found
