"""Dense students: what they learn from weighted samples, teachers and real text; resumption; refusals."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from support.distillation import Language

from weftlm.distillation.config import DenseConfig
from weftlm.distillation.dense import WeightedText, distil_dense
from weftlm.distillation.structural import weigh
from weftlm.errors import CheckpointError, ConfigError, DataError, NumericsError
from weftlm.gating.linear import ConstantGate
from weftlm.models.config import ModelConfig
from weftlm.training.config import TrainingConfig

BOS, GATE, LANGUAGE = 3, ConstantGate.of([0.6, 0.1, 0.3]), Language(0, length=4)
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2}
MODEL, DEEPER = (ModelConfig(architecture="llama", config={**SIZES, "num_hidden_layers": n}) for n in (1, 2))
TEXTS = torch.tensor(LANGUAGE.texts)
IDS = torch.cat([torch.full((len(TEXTS), 1), BOS), TEXTS], dim=1)  # every text after a start token: X x (T + 1)
WEIGHTED = weigh(GATE, [replace(one, tokens_NT1=IDS) for one in LANGUAGE.enumerated()])
TEXT = WeightedText.sampled(WEIGHTED)


def config(steps, **changes):
    training = {"sequence_length": 4, "batch_sequences": 32, "steps": steps, "lr": 1e-2, "warmup_steps": 5,
                "weight_decay": 0.0, "device": "cpu", "threads": torch.get_num_threads()}  # fmt: skip
    outer = {name: changes.pop(name) for name in list(changes) if name in DenseConfig.model_fields}
    return DenseConfig(training=TrainingConfig(**{**training, **changes}), **outer)


def distil(how, model=MODEL, text=TEXT, **more):
    return distil_dense(model, text, how, **{"vocab_size": 4, **more})


@torch.no_grad()
def log_probs(model):
    """log s of the letters of every text, X x T."""
    return model(input_ids=IDS[:, :-1]).logits.log_softmax(-1).gather(2, TEXTS[..., None])[..., 0].double().numpy()


def exact(tokens_BT):
    """The gated model's next-token distribution by summing up; what a perfect teacher answers."""
    pi_X, logp = LANGUAGE.model(GATE), torch.full((*tokens_BT.shape, 4), -math.inf, dtype=torch.float64)
    for b, row in enumerate(tokens_BT.tolist()):
        for t in range(len(row)):
            mass = np.zeros(4)
            for text, p in zip(LANGUAGE.texts, pi_X, strict=True):
                mass[text[t]] += p * (text[:t] == tuple(row[1 : t + 1]))
            logp[b, t] = torch.from_numpy(mass / mass.sum()).log()
    return logp


def test_it_learns_the_gated_models_distribution():
    # One layer cannot tell from bigrams who wrote the prefix; two can.
    found = distil(config(250, evaluate_every_steps=50, batch_sequences=64, lr=5e-3), DEEPER, held_out=TEXT)
    assert found.history[0].kl > 0.5
    assert found.best.error == 0.0
    assert found.best.kl == min(line.kl for line in found.history) < 0.06
    assert not found.model.training
    pi, logp = LANGUAGE.model(GATE), log_probs(found.model).sum(axis=1)
    assert found.best.kl == pytest.approx(float((pi * (np.log(pi) - logp)).sum()), abs=1e-5)
    assert found.best.ce == pytest.approx(-float(pi @ logp) / 4, abs=1e-5)


def test_the_weights_of_the_best_measurement_are_kept():
    other = WeightedText.of(np.array([[BOS, 0, 1, 2, 2]]))
    found = distil(config(16, evaluate_every_steps=1), text=other, held_out=TEXT)
    best = min(found.history, key=lambda line: line.ce)
    assert found.history[-1].ce > best.ce + 0.02  # training ended worse
    assert found.best == best
    assert -float(LANGUAGE.model(GATE) @ log_probs(found.model).sum(axis=1)) / 4 == pytest.approx(best.ce, abs=1e-5)


def test_a_teachers_tokens_teach_faster_than_samples():
    few = {"batch_sequences": 4, "evaluate_every_steps": 0}
    plain = distil(config(40, **few), held_out=TEXT)
    taught = distil(config(40, token_kl=1.0, **few), held_out=TEXT, teacher=exact)
    assert taught.best.kl < plain.best.kl
    assert taught.history[-1].loss >= -1e-6


def test_real_text_is_a_part_of_every_batch():
    real = WeightedText.of(np.array([[BOS, 0, 0, 0, 0]]))
    found = distil(config(50, real_fraction=0.75, evaluate_every_steps=0), real=real)
    assert np.exp(log_probs(found.model)[0]).min() > 0.6  # the first text is all 0
    assert found.best.kl is None


def test_stopped_and_continued_is_as_never_stopped(tmp_path):
    how = config(12, save_every_steps=4, evaluate_every_steps=3, micro_batch_sequences=12)
    whole = distil(how, held_out=TEXT)

    def stop(line):
        if line.step == 9:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        distil(how, held_out=TEXT, folder=tmp_path, on_progress=stop)
    again = distil(how, held_out=TEXT, folder=tmp_path)
    assert again.history == whole.history
    for name, parameter in whole.model.named_parameters():
        assert torch.equal(parameter, again.model.get_parameter(name))
    assert distil(how, held_out=TEXT, folder=tmp_path).best == whole.best
    with pytest.raises(CheckpointError, match=r"another recipe or other data .*seed: 0 before, 1 now"):
        distil(how, held_out=TEXT, folder=tmp_path, seed=1)


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: distil(config(5, sequence_length=8)), ConfigError, "text has 4 .*sequence_length is 8"),
        (lambda: distil(config(5), vocab_size=3), ConfigError, "ids from 0 to 3"),
        (lambda: distil(config(5, token_kl=0.5)), ConfigError, "no teacher came"),
        (lambda: distil(config(5), real=TEXT), ConfigError, "real text came; give both"),
        (lambda: distil(config(5, batch_sequences=1, real_fraction=0.5), real=TEXT), ConfigError, "must be 2 at least"),
        (lambda: distil(config(5, token_kl=0.5), teacher=lambda t: torch.zeros(*t.shape, 7)), ConfigError, "answered"),
        (lambda: distil(config(5), held_out=WeightedText.of(np.zeros((2, 9)))), ConfigError, "held_out has 8 tokens"),
        (lambda: WeightedText.of(np.zeros((2, 4)), weights_N=[1.0]), ConfigError, "weights_N has shape"),
        (lambda: WeightedText.of(np.zeros((0, 3))), DataError, "1 x 2 at least"),
        (lambda: WeightedText.of(np.zeros((2, 3)), weights_N=[0.0, 0.0]), NumericsError, "weights_N sum"),
        (lambda: WeightedText.sampled(weigh(GATE, LANGUAGE.enumerated())), ConfigError, "tokens_NT1"),
    ],
)
def test_what_is_refused(make, error, match):
    with pytest.raises(error, match=match):
        make()
