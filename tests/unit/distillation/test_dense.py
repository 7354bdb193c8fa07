"""Dense students: what they learn from weighted samples, teachers and real text; resumption; refusals."""

import math

import numpy as np
import pytest
import torch
from support.distillation import Language

from weftlm.distillation.config import DenseConfig
from weftlm.distillation.dense import WeightedText, distil_dense
from weftlm.distillation.structural import model_kl, weigh
from weftlm.errors import CheckpointError, ConfigError, DataError, NumericsError
from weftlm.gating.linear import ConstantGate
from weftlm.models.config import ModelConfig
from weftlm.training.config import TrainingConfig

BOS = 3
MODEL = ModelConfig(
    architecture="llama",
    config={"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
            "num_key_value_heads": 2},
)  # fmt: skip


@pytest.fixture(scope="module")
def language():
    return Language(0, length=4)


def ids(language):
    """Every text after a start token: X x (T + 1)."""
    texts = np.array(language.texts)
    return np.concatenate([np.full((len(texts), 1), BOS), texts], axis=1)


def config(steps, **changes):
    training = {"sequence_length": 4, "batch_sequences": 32, "steps": steps, "lr": 1e-2, "warmup_steps": 5,
                "weight_decay": 0.0, "device": "cpu", "threads": torch.get_num_threads()}  # fmt: skip
    outer = {name: changes.pop(name) for name in list(changes) if name in DenseConfig.model_fields}
    return DenseConfig(training=TrainingConfig(**{**training, **changes}), **outer)


def samples(language, gate):
    """The enumerated experts as weighted token ids."""
    weighted = weigh(gate, language.enumerated())
    return WeightedText.sampled(weighted, [ids(language)] * language.experts)


class Exact:
    """The next-token distribution of a distribution over texts, by summing up; what a perfect teacher answers."""

    def __init__(self, language, pi_X):
        self.texts, self.pi_X = language.texts, pi_X

    def __call__(self, tokens_BT):
        logp = torch.full((*tokens_BT.shape, 4), -math.inf, dtype=torch.float64)
        for b, row in enumerate(tokens_BT.tolist()):
            for t in range(len(row)):
                prefix = tuple(row[1 : t + 1])
                mass = np.zeros(4)
                for text, p in zip(self.texts, self.pi_X, strict=True):
                    if text[:t] == prefix:
                        mass[text[t]] += p
                logp[b, t] = torch.from_numpy(mass / mass.sum()).log()
        return logp


def test_it_learns_the_gated_models_distribution(language):
    gate = ConstantGate.of([0.6, 0.1, 0.3])
    text = samples(language, gate)
    # One layer cannot tell from bigrams who wrote the prefix; two can.
    deeper = MODEL.model_copy(update={"config": {**MODEL.config, "num_hidden_layers": 2}})
    how = config(300, evaluate_every_steps=50, batch_sequences=64, lr=5e-3)
    found = distil_dense(deeper, text, how, vocab_size=4, held_out=text)
    assert found.kl is not None
    assert found.history[0].kl > 0.5
    assert found.error == 0.0
    assert found.kl < 0.05
    assert found.kl == min(line.kl for line in found.history)
    assert not found.model.training
    assert found.parameters == sum(p.numel() for p in found.model.parameters())
    with torch.no_grad():
        logits = found.model(input_ids=torch.from_numpy(ids(language))[:, :-1]).logits
    logp = torch.log_softmax(logits, dim=-1).gather(2, torch.tensor(language.texts)[..., None])[..., 0].sum(dim=1)
    pi = language.model(gate)
    exact = float((pi * (np.log(pi) - logp.double().numpy())).sum())
    assert found.kl == pytest.approx(exact, abs=1e-5)
    assert found.ce == pytest.approx(-float(pi @ logp.double().numpy()) / 4, abs=1e-5)


def test_the_weights_of_the_best_measurement_are_kept(language):
    text = samples(language, ConstantGate.of([0.6, 0.1, 0.3]))
    other = WeightedText.of(np.array([[BOS, 0, 1, 2, 2]]))
    found = distil_dense(MODEL, other, config(24, evaluate_every_steps=1), vocab_size=4, held_out=text)
    best = min(found.history, key=lambda line: line.ce)
    assert found.history[-1].ce > best.ce + 0.05  # training ended worse
    assert (found.step, found.ce) == (best.step, best.ce)
    with torch.no_grad():
        logp = found.model(input_ids=text.tokens_NT1[:, :-1]).logits.log_softmax(-1)
    logs_N = logp.gather(2, text.tokens_NT1[:, 1:, None])[..., 0].sum(dim=1).double()
    assert -float(text.weights_N @ logs_N) / 4 == pytest.approx(best.ce, abs=1e-5)


def test_a_teachers_tokens_teach_faster_than_samples(language):
    gate = ConstantGate.of([0.6, 0.1, 0.3])
    text, teacher = samples(language, gate), Exact(language, language.model(gate))
    few = {"batch_sequences": 4, "evaluate_every_steps": 0}
    plain = distil_dense(MODEL, text, config(60, **few), vocab_size=4, held_out=text)
    taught = distil_dense(MODEL, text, config(60, token_kl=1.0, **few), vocab_size=4, held_out=text, teacher=teacher)
    assert taught.kl < plain.kl
    assert taught.history[-1].loss >= -1e-6


def test_the_error_of_samples_covers_the_truth(language):
    gate, tokens = ConstantGate.of([0.6, 0.1, 0.3]), ids(language)
    every = samples(language, gate)
    truth = distil_dense(MODEL, every, config(40, evaluate_every_steps=0), vocab_size=4, held_out=every)
    with torch.no_grad():
        logits = truth.model(input_ids=torch.from_numpy(tokens)[:, :-1]).logits
    logs_X = logits.log_softmax(-1).gather(2, torch.from_numpy(tokens)[:, 1:, None])[..., 0].sum(dim=1)
    for seed in range(5):
        draws = language.draws(500, seed)
        kl, error = model_kl(weigh(gate, draws), logs_X[torch.cat([one.features.points_B for one in draws])])
        assert 0.0 < error < 0.1
        assert abs(kl - truth.kl) < 4 * error


def test_real_text_is_a_part_of_every_batch(language):
    text = samples(language, ConstantGate.of([1 / 3] * 3))
    real = WeightedText.of(np.array([[BOS, 0, 0, 0, 0]]))
    both = config(60, real_fraction=0.75, evaluate_every_steps=0)
    found = distil_dense(MODEL, text, both, vocab_size=4, real=real)
    with torch.no_grad():
        logits = found.model(input_ids=real.tokens_NT1[:, :-1]).logits
    assert torch.log_softmax(logits, dim=-1)[0, :, 0].exp().min() > 0.6
    assert found.kl is None


def test_stopped_and_continued_is_as_never_stopped(tmp_path, language):
    text = samples(language, ConstantGate.of([0.6, 0.1, 0.3]))
    how = config(12, save_every_steps=4, evaluate_every_steps=3, micro_batch_sequences=12)
    whole = distil_dense(MODEL, text, how, vocab_size=4, held_out=text)

    class StoppedError(Exception):
        pass

    def stop(line):
        if line.step == 9:
            raise StoppedError

    with pytest.raises(StoppedError):
        distil_dense(MODEL, text, how, vocab_size=4, held_out=text, folder=tmp_path, on_progress=stop)
    again = distil_dense(MODEL, text, how, vocab_size=4, held_out=text, folder=tmp_path)
    assert again.history == whole.history
    for name, parameter in whole.model.named_parameters():
        assert torch.equal(parameter, again.model.get_parameter(name))
    finished = distil_dense(MODEL, text, how, vocab_size=4, held_out=text, folder=tmp_path)
    assert finished.kl == whole.kl
    with pytest.raises(CheckpointError, match=r"another recipe or other data .*seed: 0 before, 1 now"):
        distil_dense(MODEL, text, how, vocab_size=4, held_out=text, folder=tmp_path, seed=1)


def test_a_loss_that_is_no_number_ends_the_training(language):
    text = samples(language, ConstantGate.of([0.6, 0.1, 0.3]))
    broken = torch.full((1,), math.nan)
    with pytest.raises(NumericsError, match="nothing was applied"):
        distil_dense(
            MODEL, text, config(5, token_kl=0.5), vocab_size=4,
            teacher=lambda tokens: torch.zeros(*tokens.shape, 4) + broken,
        )  # fmt: skip


def test_refusals(language):
    text = samples(language, ConstantGate.of([0.6, 0.1, 0.3]))
    cases = [
        ({"config": config(5, sequence_length=8)}, "sequence_length is 8"),
        ({"vocab_size": 3}, "ids from 0 to 3"),
        ({"config": config(5, token_kl=0.5)}, "no teacher came"),
        ({"real": text}, "real text came; give both"),
        ({"config": config(5, token_kl=0.5), "teacher": lambda t: torch.zeros(*t.shape, 7)}, "teacher answered"),
        ({"held_out": WeightedText.of(np.zeros((2, 9)))}, "held_out has 8 tokens"),
    ]
    for changes, message in cases:
        with pytest.raises(ConfigError, match=message):
            distil_dense(MODEL, text, **{"config": config(5), "vocab_size": 4, **changes})
    with pytest.raises(ConfigError, match="weights_N has shape"):
        WeightedText.of(np.zeros((2, 4)), weights_N=[1.0])
    with pytest.raises(DataError, match="1 x 2 at least"):
        WeightedText.of(np.zeros((0, 3)))
    with pytest.raises(NumericsError, match="weights_N sum"):
        WeightedText.of(np.zeros((2, 3)), weights_N=[0.0, 0.0])
    with pytest.raises(ConfigError, match="by expert"):
        WeightedText.sampled(weigh(ConstantGate.of([0.6, 0.1, 0.3]), language.enumerated()), [ids(language)])
