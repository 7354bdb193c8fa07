"""The policy, the router and the gate of the how-to pages do what the pages say, and obey the conformance suites."""

import inspect
import math
import re
from collections.abc import Callable, Iterator
from types import FunctionType, ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from support.experts import llama, make_pool

from weftlm.gating import FitConfig, ScoredSequences, certify, fit_robust_gate
from weftlm.gating.gate import Features, init_gate
from weftlm.mixture.policy import MixtureSetting, Report, build_policy
from weftlm.routing.routed_model import RoutedModel


@pytest.fixture
def page_code(root):
    """`page_code("own-gate")`: the first Python block of a how-to page, and the name of the file it goes to."""

    def find(page: str) -> tuple[str, str]:
        text = (root / f"docs/howto/{page}.md").read_text(encoding="utf-8")
        path = re.search(r"save this as `(weftlm_methods/\w+\.py)`:", text, re.MULTILINE)[1]
        return re.search(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)[1], path

    return find


def laws_over(suite: ModuleType, argument: str, is_mine: Callable[[Any], bool]) -> Iterator[FunctionType]:
    """The tests of a suite that are run for the method of which `is_mine` holds."""
    for name, function in vars(suite).items():
        for mark in getattr(function, "pytestmark", []) if name.startswith("test_") else []:
            if mark.name == "parametrize" and mark.args[0] == argument:
                values = [getattr(case, "values", (case,))[0] for case in mark.args[1]]
                if any(is_mine(value) for value in values):
                    yield function


@pytest.mark.parametrize("page", ["own-policy", "own-router", "own-stage"])
def test_the_sample_package_holds_the_code_of_the_pages(page_code, root, page):
    code, path = page_code(page)
    assert (root / "examples/plugin" / path).read_text(encoding="utf-8") == code


def test_the_policy_does_what_its_page_says(page_code, execute):
    execute(page_code("own-policy")[0])
    policy = build_policy({"policy": "progress_share", "floor": 0.1})
    ones = torch.ones(2, dtype=torch.float64)
    state = policy.init(MixtureSetting(("a", "b"), tokens_D=ones))
    state = policy.update(state, Report(1, tokens_D=ones, losses_D=torch.tensor([3.0, 3.0])))
    assert policy.weights(state).tolist() == [0.5, 0.5]
    state = policy.update(state, Report(2, tokens_D=ones, losses_D=torch.tensor([2.0, 3.5])))
    assert policy.weights(state).tolist() == pytest.approx([0.95, 0.05])


def test_the_router_chooses_by_the_direction_its_page_names(page_code, execute):
    execute(page_code("own-router")[0])
    pool = make_pool(llama(), 4)
    routed = RoutedModel(llama(), pool, {"router": "reading-direction", "k": 1})
    target = next(target for target in routed.targets if len(target.experts) == 4)
    vectors_EI = torch.stack([torch.linalg.svd(expert.lora.modules[target.name].A_RI).Vh[0] for expert in pool])
    for place in range(4):
        along_BTI = -3.0 * vectors_EI[place].view(1, 1, -1)
        chosen = routed.router.route(target, along_BTI, call=None)
        assert chosen.experts_BTK.tolist() == [[[place]]], "the one that reads this direction most, whatever its sign"
        assert chosen.weights_BTK.tolist() == [[[1.0]]]


def test_the_router_obeys_the_laws_of_routers(page_code, execute, load_script):
    execute(page_code("own-router")[0])
    suite = load_script("tests/laws/test_routers.py")
    laws = list(laws_over(suite, "section", lambda section: section["router"] == "reading-direction"))
    assert len(laws) > 10, "the suite did not find the new router"
    for law in laws:
        ways = ({"mixed": False}, {"mixed": True}) if "mixed" in inspect.signature(law).parameters else ({},)
        for way in ways:
            law(section={"router": "reading-direction"}, **way)


def test_the_gate_obeys_the_laws_of_gates(page_code, execute, load_script, tmp_path_factory):
    execute(page_code("own-gate")[0])
    suite = load_script("tests/laws/test_gating.py")
    laws = list(laws_over(suite, "name", lambda name: name == "hedged"))
    assert len(laws) > 1, "the suite did not find the new gate"
    for law in laws:
        given = (
            {"tmp_path_factory": tmp_path_factory} if "tmp_path_factory" in inspect.signature(law).parameters else {}
        )
        law(name="hedged", **given)


def test_the_gate_keeps_the_share_its_page_speaks_of(page_code, execute):
    execute(page_code("own-gate")[0])
    features = Features(sequence_BF=torch.randn(6, 2, dtype=torch.float64), names=("a", "b"))
    gate = init_gate("hedged", 3, features)
    weight_EF = 1e3 * torch.randn(3, 2, dtype=torch.float64)
    sure = gate.replaced({"weight_EF": weight_EF, "share": torch.tensor([0.0], dtype=torch.float64)})
    least = sure.log_weights(features).amin()
    assert float(least) == pytest.approx(math.log(0.5 / 3)), "c = sigmoid(0) leaves every expert half of a third"


def test_the_gate_is_fitted_and_certified(page_code, execute):
    execute(page_code("own-gate")[0])
    random = np.random.default_rng(0)
    tokens = np.full(60, 32)

    def draw() -> list[ScoredSequences]:
        """Two domains, each with an expert that is better on its sequences."""
        scores = [np.where(np.arange(2) == k, -60.0, -75.0) + random.normal(0, 4, (60, 2)) for k in range(2)]
        return [ScoredSequences.of(one, tokens_N=tokens, name=name) for one, name in zip(scores, "ab", strict=True)]

    fitted = fit_robust_gate(draw(), draw(), gate="hedged", config=FitConfig(steps=60, best_response_steps=5))
    found = certify(fitted, draw(), draw())
    # Domains that do not overlap: no single model is below log 2 on the worse one, and an even mixture is there.
    assert found.worst.value == pytest.approx(math.log(2), abs=0.06)
    assert found.z.value == pytest.approx(1.0, abs=0.06)
