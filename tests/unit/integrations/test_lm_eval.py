"""The harness's model contract over every kind of model: the numbers are weftlm.evaluation's and a loop's by hand."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import CachingLM
from lm_eval.api.registry import get_model
from support import served
from support.tiny_project import WORDS, sentence

from weftlm.corpora.source import ArraySource
from weftlm.errors import ConfigError, DataError, NumericsError
from weftlm.evaluation.choices import ChoiceQuestion, choice_scores
from weftlm.evaluation.perplexity import evaluate_source
from weftlm.integrations.lm_eval import WeftLM

KINDS = served.KINDS
SUMS = 1e-6
"""Relative error of a sum over tokens: the harness adds in float32."""


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: served.write_model(tmp_path_factory.mktemp(kind), kind) for kind in KINDS}


@pytest.fixture(scope="module")
def models(places: dict[str, Path]) -> dict[str, WeftLM]:
    return {kind: WeftLM(path=str(place), batch_size=4, device="cpu") for kind, place in places.items()}


@pytest.fixture
def lm(request: pytest.FixtureRequest, models: dict[str, WeftLM]) -> Iterator[WeftLM]:
    """One of the models; what a test sets on it is put back."""
    found = models[request.param]
    before = dict(vars(found))
    yield found
    vars(found).clear()
    vars(found).update(before)


every_kind = pytest.mark.parametrize("lm", KINDS, indirect=True)
plain = pytest.mark.parametrize("lm", ["plain"], indirect=True)


def texts(count: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    return [sentence(rng, rng.choice(list(WORDS.values()))) for _ in range(count)]


def asked(kind: str, *arguments: tuple[Any, ...]) -> list[Instance]:
    return [Instance(kind, {}, each, number) for number, each in enumerate(arguments)]


def pairs() -> list[tuple[str, str]]:
    """Contexts and continuations of several lengths; the first two share all that is read, the last has no context."""
    found = [("mast sail", " a"), ("mast sail", " b")]
    found += [(text, f" {other}") for text, other in zip(texts(7), texts(7, seed=1), strict=True)]
    return [*found, ("", "sail mast")]


def by_hand(lm: WeftLM, context: list[int], judged: list[int], *, routed: bool = True) -> tuple[float, bool]:
    """One text at a time, float64, without padding."""
    ids = torch.tensor([[*context, *judged[:-1]]])
    extra = {}
    if lm.opened.kind == "routed" and routed:
        extra["routing_mask"] = torch.arange(ids.shape[1])[None] < len(context)
    with torch.no_grad():
        logp_TV = torch.log_softmax(lm.model(input_ids=ids, **extra).logits[0].double(), dim=-1)[-len(judged) :]
    return float(logp_TV.gather(-1, torch.tensor(judged)[:, None]).sum()), logp_TV.argmax(-1).tolist() == judged


@every_kind
def test_log_likelihoods_are_those_of_a_loop_and_whether_greedy_decoding_gives_them_too(lm: WeftLM) -> None:
    found = lm.loglikelihood(asked("loglikelihood", *pairs()), disable_tqdm=True)
    for (context, continuation), (logp, greedy) in zip(pairs(), found, strict=True):
        context_ids = lm.tok_encode(context) or [lm.eot_token_id]
        expected = by_hand(lm, context_ids, lm.tok_encode(continuation))
        assert logp == pytest.approx(expected[0], abs=1e-4)
        assert greedy == expected[1]
    ids = lm.tok_encode("mast sail")
    for _ in range(3):
        with torch.no_grad():
            ids.append(int(lm.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    (likeliest,) = lm._loglikelihood_tokens([(("", ""), ids[:-3], ids[-3:])], disable_tqdm=True)
    assert likeliest[1]


@every_kind
def test_neither_batch_size_nor_company_changes_a_number(lm: WeftLM) -> None:
    together = lm.loglikelihood(asked("loglikelihood", *pairs()), disable_tqdm=True)
    for size in (1, 3, 64):
        lm.batch_size_per_gpu = size
        found = lm.loglikelihood(asked("loglikelihood", *reversed(pairs())), disable_tqdm=True)[::-1]
        assert np.allclose([logp for logp, _ in found], [logp for logp, _ in together], atol=1e-5, rtol=SUMS)
        assert [greedy for _, greedy in found] == [greedy for _, greedy in together]


@every_kind
def test_ranked_answers_are_weftlm_s_own(lm: WeftLM) -> None:
    questions = [
        ChoiceQuestion(prompt, tuple(dict.fromkeys(others)), 0)
        for prompt, others in zip(texts(4), np.array(texts(12, seed=2)).reshape(4, 3).tolist(), strict=True)
    ]
    ours = choice_scores(
        lm.model, lm.opened.tokenizer, questions, batch_size=4, max_length=lm.max_length, separator=" "
    )
    requests = asked("loglikelihood", *((each.prompt, f" {choice}") for each in questions for choice in each.choices))
    found = [logp for logp, _ in lm.loglikelihood(requests, disable_tqdm=True)]
    assert np.allclose(found, [logp for each in ours for logp in each.log_probs], atol=1e-5, rtol=SUMS)


@every_kind
def test_long_contexts_lose_their_beginning_and_continuations_never(lm: WeftLM) -> None:
    lm._max_length = 12
    context, continuation = " ".join(texts(3)), " sail mast"
    ids, judged = lm.tok_encode(context), lm.tok_encode(continuation)
    assert len(ids) > 12
    (found,) = lm.loglikelihood(asked("loglikelihood", (context, continuation)), disable_tqdm=True)
    assert found[0] == pytest.approx(by_hand(lm, ids[-(13 - len(judged)) :], judged)[0], abs=1e-4)
    lm._max_length = 1
    with pytest.raises(DataError, match="never cut; max_length is 1"):
        lm.loglikelihood(asked("loglikelihood", (context, continuation)), disable_tqdm=True)
    with pytest.raises(DataError, match="no tokens"):
        lm.loglikelihood(asked("loglikelihood", (context, "")), disable_tqdm=True)


@every_kind
def test_rolling_log_likelihood_is_weftlm_s_cross_entropy(lm: WeftLM) -> None:
    lm._max_length = 16
    ids = lm.tok_encode(" ".join(texts(8)))
    documents = [lm.opened.tokenizer.decode(ids[:count]) for count in (32, 3, 16, 11, 1)] + [""]
    assert [len(lm.tok_encode(document)) for document in documents] == [32, 3, 16, 11, 1, 0]
    found = lm.loglikelihood_rolling(asked("loglikelihood_rolling", *((text,) for text in documents)), True)
    for text, logp in zip(documents, found, strict=True):
        ids = np.array([lm.eot_token_id, *lm.tok_encode(text)])
        expected = 0.0
        if text:
            ours = evaluate_source(lm.model, ArraySource(ids, text_bytes=len(text)), sequence_length=16, batch_size=3)
            expected = -ours.nats_per_token * (len(ids) - 1)
        assert logp == pytest.approx(expected, abs=1e-4)


@plain
def test_the_last_window_of_a_long_text_reads_all_it_can(lm: WeftLM) -> None:
    lm._max_length = 8
    ids = lm.tok_encode(" ".join(texts(4)))[:19]
    text = lm.opened.tokenizer.decode(ids)
    assert lm.tok_encode(text) == ids
    (found,) = lm.loglikelihood_rolling(asked("loglikelihood_rolling", (text,)), disable_tqdm=True)
    expected = by_hand(lm, [lm.eot_token_id], ids[:8])[0] + by_hand(lm, [ids[7]], ids[8:16])[0]
    assert found == pytest.approx(expected + by_hand(lm, ids[10:16], ids[16:])[0], abs=1e-4)


@plain
def test_items_are_scored_wherever_a_token_spans_the_boundary(lm: WeftLM) -> None:
    text = "mast sail mast"
    items = [(text[:cut], text[cut:end]) for cut in range(1, len(text)) for end in range(cut + 1, len(text) + 1)]
    items += [("   ", "mast"), ("mast", "  "), ("", "s")]
    joined = 0
    for (context, continuation), (logp, _) in zip(items, lm.loglikelihood(asked("", *items)), strict=True):
        whole, left = lm.tok_encode(context + continuation), lm.tok_encode(context.rstrip())
        judged = whole[len(left) :]  # the harness's own split
        if not judged:
            cut = next((at for at, (a, b) in enumerate(zip(left, whole, strict=False)) if a != b), len(whole) - 1)
            left, judged, joined = whole[:cut], whole[cut:], joined + 1
        assert logp == pytest.approx(by_hand(lm, left or [lm.prefix_token_id], judged)[0], abs=1e-4)
    assert joined > 3
    with pytest.raises(DataError, match="a continuation has no tokens"):
        lm.loglikelihood(asked("", ("mast", "")))


@every_kind
def test_text_is_generated_up_to_a_stop_string_as_generate_does(lm: WeftLM) -> None:
    contexts = ["mast", *texts(2)]
    free = lm.generate_until(asked("generate_until", *((text, {"max_gen_toks": 6}) for text in contexts)), True)
    ends = [lm.eot_token_id, lm.model.generation_config.eos_token_id]
    for text, found in zip(contexts, free, strict=True):
        ids = torch.tensor([lm.tok_encode(text)])
        (written,) = lm.model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False,
            eos_token_id=ends, pad_token_id=ends[0],
        )  # fmt: skip
        assert found == lm.tokenizer.decode(written[ids.shape[1] :], skip_special_tokens=True)
    stops = [found[len(found) // 2 : len(found) // 2 + 2] for found in free]
    settings = {"until": stops, "max_gen_toks": 6}
    stopped = lm.generate_until(asked("generate_until", *((text, settings) for text in contexts)), True)
    cut = [min(found.find(stop) % 1000 for stop in stops) for found in free]
    assert stopped == [found[:place] for found, place in zip(free, cut, strict=True)]
    assert any(len(found) > place for found, place in zip(free, cut, strict=True))


@plain
def test_batches_that_fit_in_memory_are_found(lm: WeftLM, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = lm.loglikelihood(asked("loglikelihood", *pairs()), disable_tqdm=True)
    whole, sizes = lm.model.forward, []

    def small(*args: Any, **kwargs: Any) -> Any:
        sizes.append(len(kwargs["input_ids"]))
        if sizes[-1] > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return whole(*args, **kwargs)

    monkeypatch.setattr(lm.model, "forward", small)
    lm.batch_size_per_gpu, lm.max_batch_size = "auto", 8
    found = lm.loglikelihood(asked("loglikelihood", *pairs()), True)
    assert np.allclose([each[0] for each in found], [each[0] for each in expected], atol=1e-5, rtol=SUMS)
    assert max(sizes[sizes.index(2) :]) == 2


def test_arguments_are_checked_and_the_model_is_described(
    places: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(places["routed"])
    lm = get_model("weftlm").create_from_arg_string(
        f"path={path},max_length=100", {"batch_size": "auto", "device": None}
    )
    assert (lm.max_length, lm.batch_size, lm.rank, lm.world_size) == (100, "auto", 0, 1)
    assert lm.device == lm.model.device
    info = lm.get_model_info()
    assert (info["weftlm_kind"], info["weftlm_experts"]) == ("routed", ["a", "b", "c"])
    assert lm.tokenizer_name == f"weftlm__{lm.opened.tokenizer.fingerprint}"
    for arguments, message in (
        ({}, "--model_args.path: missing"),
        ({"path": path, "bass": "x"}, "--model_args.bass: unknown key; did you mean 'base'"),
        ({"path": 2024}, "there is no folder 2024|'2024' is no folder"),
        ({"path": path, "max_length": 10_000}, "reads 256 tokens at most"),
        ({"path": path, "max_length": "abc"}, "max_length: must be a whole number.*'abc'"),
        ({"path": path, "batch_size": 0}, "batch_size: must be .*got 0"),
        ({"path": path, "batch_size": "auto:x"}, "batch_size: must be .*'auto:x'"),
    ):
        with pytest.raises(ConfigError, match=message):
            WeftLM(**arguments)
    assert WeftLM(path=path, batch_size="auto:4").batch_schedule == 4
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="several processes need batch_size=auto, or a number"):
        WeftLM(path=path, batch_size="auto:4")


@every_kind
def test_log_likelihoods_that_are_not_numbers_are_refused_and_not_cached(
    lm: WeftLM, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    cached, whole = CachingLM(lm, str(tmp_path / "cache.db")), lm._model_call
    monkeypatch.setattr(lm, "_model_call", lambda *args, **kwargs: whole(*args, **kwargs) * torch.nan)
    for kind, arguments in {"loglikelihood": ("mast", " sail"), "loglikelihood_rolling": ("mast",)}.items():
        with pytest.raises(NumericsError, match=r"the weights of .* hold NaN"):
            getattr(cached, kind)(asked(kind, arguments))
    assert len(cached.dbdict) == 0
    cached.dbdict.close()
