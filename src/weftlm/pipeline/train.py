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
from weftlm.models.factory import build_model, check_adapter, count_parameters
from weftlm.pipeline.names import RESULT
from weftlm.pipeline.prepare import prepare
from weftlm.pipeline.prepared import PreparedData
from weftlm.pipeline.recipe import Recipe, check
from weftlm.pipeline.run_folder import alone
from weftlm.training.loop import Task, Trainer, TrainingResult
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
    model, _, training = recipe.trained
    process = PartialState(
        timeout=timedelta(hours=HOURS_TO_WAIT_FOR_PREPARATION),
        cpu=choose_device(training.device).type == "cpu",
    )
    check(recipe)
    check_adapter(model)
    recipe.run.mkdir(parents=True, exist_ok=True)
    with alone(recipe.run) if process.is_main_process else nullcontext():
        with process.main_process_first():
            data = prepare(recipe.data, recipe.prepared_folder, progress=process.is_main_process)
        artifact = training_artifact(recipe, data.fingerprint)
        if artifact.record.exists() or any((recipe.run / "checkpoints").glob("step-*")):
            refuse_other(artifact, "a run", "choose another run folder or remove it")
        finished = artifact.reuse() if (recipe.run / "model").is_dir() else None
        process.wait_for_everyone()
        if finished is not None:
            log.info("%s is finished; this is its result", recipe.run)
            return finished
        if data.target_heldout is None and all(domain.heldout is None for domain in data.domains):
            raise ConfigError("nothing is held out to evaluate on; raise data.split.fraction, or give data.heldout")
        return _train(recipe, data, artifact, process)


def _train(recipe: Recipe, data: PreparedData, artifact: Artifact, process: PartialState) -> dict[str, Any]:
    section, mixture, training = recipe.trained
    policy = build_policy(mixture.model_dump())
    reference = _reference(recipe, policy.config, data) if "reference_losses" in policy.needs else None
    model = build_model(
        section, vocab_size=data.tokenizer.vocab_size, sequence_length=training.sequence_length,
        eos_id=data.tokenizer.eos_id, seed=recipe.seed,
    )  # fmt: skip
    runtime = choose_runtime(training, parameters=count_parameters(model), processes=process.num_processes)
    if process.is_main_process:
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
        trackers=_trackers(recipe) if process.is_main_process else (),
        may_shard=True,
    )
    trained = trainer.run()
    place, writes = recipe.run / "model", process.is_main_process
    with whole_folder(place, "model", replace=True) if writes else nullcontext(place) as making:
        trainer.save_model(making)
        if writes:
            data.tokenizer.save(making)
    if trainer.evaluated_step != trained.step:
        start = time.perf_counter()
        evaluate(trainer.module)
        trained.seconds["eval"] += time.perf_counter() - start
    if reference is not None:
        trained.seconds["reference"] = _reference_seconds(recipe, policy.config)
    result = _result(recipe, trained, latest[0], trainer.module, trainer.mixture.choice)
    if process.is_main_process:
        save_windows(recipe.run / "windows.safetensors", latest[0].sets)
        result = artifact.finish(result, ["windows.safetensors", "metrics.jsonl"], nan=True)
    process.wait_for_everyone()
    return result


def is_main_process() -> bool:
    """Whether this process is the one that prints and writes."""
    return bool(PartialState().is_main_process)


def training_task(data: PreparedData, policy: Any, reference: nn.Module | None = None) -> Task:
    """Prepared data and a policy as the training loop takes them."""
    return Task(
        domains=tuple(domain.name for domain in data.domains),
        sources=tuple(domain.train for domain in data.domains),
        policy=policy,
        setting=MixtureSetting(
            domains=tuple(domain.name for domain in data.domains),
            tokens_D=torch.tensor([len(domain.train) for domain in data.domains], dtype=torch.float64),
            target_histogram_D=data.target_histogram_D,
            basis_ND=data.basis_ND,
        ),
        target=data.target_train,
        reference=reference,
    )


def evaluate_run(run: Path, recipe: Recipe, config: EvaluationConfig) -> SuiteResult:
    """Evaluate a finished run's model again, on more or other tokens.

    Raises:
        ConfigError: the run has no model yet.
    """
    if not (run / "model").is_dir():
        raise ConfigError(f"{run} has no trained model yet; finish it with weftlm train")
    data = PreparedData.load(recipe.prepared_folder)
    section, _, training = recipe.trained
    runtime = choose_runtime(training, parameters=0)
    require_same_data(run, data)
    model = load_trained(run / "model", dtype=section.dtype).to(runtime.device)
    return _evaluate(model, data, recipe, runtime, config)


def _evaluate(
    model: nn.Module, data: PreparedData, recipe: Recipe, runtime: Runtime, config: EvaluationConfig
) -> SuiteResult:
    _, _, training = recipe.trained
    return evaluate_suite(
        model,
        {domain.name: domain.heldout for domain in data.domains if domain.heldout is not None},
        data.target_heldout,
        sequence_length=training.sequence_length,
        config=config,
        device=runtime.device,
        distributed=PartialState().num_processes > 1,
    )


def _reference(recipe: Recipe, policy: Any, data: PreparedData) -> nn.Module:
    """DoReMi's reference: the model of the run it names, or one trained first on a plain mixture."""
    folder = _reference_folder(recipe, policy)
    if policy.reference is None:
        plain = recipe.model_copy(
            update={
                "run": folder,
                "prepared": recipe.prepared_folder,
                "mixture": policy_config({"policy": policy.reference_policy}),
            }
        )
        run_training(plain)
    if not (folder / "model").is_dir():
        raise ConfigError(f"mixture.reference {folder} holds no trained model; give a finished run folder, or null")
    require_same_data(folder, data)
    return load_trained(folder / "model", dtype=recipe.trained[0].dtype)


def _reference_folder(recipe: Recipe, policy: Any) -> Path:
    return Path(policy.reference) if policy.reference is not None else recipe.run / "reference"


def _reference_seconds(recipe: Recipe, policy: Any) -> float:
    """What training the reference took, a cost of the policy that needs it."""
    spent = read_result(_reference_folder(recipe, policy))["seconds"]
    return float(spent["train"] + spent["alignment"])


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


def _result(
    recipe: Recipe, trained: TrainingResult, final: SuiteResult, model: nn.Module, choice: Any
) -> dict[str, Any]:
    return {
        "policy": recipe.trained[1].policy,
        "steps": trained.step,
        "train_tokens": trained.tokens,
        "seconds": trained.seconds,
        "parameters": count_parameters(model),
        "trainable_parameters": count_parameters(model, trainable=True),
        "weights": trained.weights,
        "epochs": trained.epochs,
        "stopped_early": trained.stopped_early,
        "estimator": None
        if choice is None
        else {"name": choice.estimator, "probe": choice.probe, "reason": choice.reason},
        **final.to_json(),
    }


def training_artifact(recipe: Recipe, data_fingerprint: str) -> Artifact:
    """A run's result, decided by its data and the recipe's sections of a training."""
    return Artifact(recipe.run / RESULT, {"data": data_fingerprint, **recipe.deciding()}, _CURE)


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


def _trackers(recipe: Recipe) -> tuple[Any, ...]:
    return tuple(open_tracker(tracker, recipe.run, recipe.resolved()) for tracker in recipe.trackers)
