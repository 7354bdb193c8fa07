"""The gate of the how-to page obeys the conformance suite, and the sample package holds the code of the other pages.

tests/e2e/test_plugin.py installs that package and runs its methods and their laws.
"""

import inspect
import re

import numpy as np
import pytest

from weftlm.gating import FitConfig, ScoredSequences, certify, fit_robust_gate


@pytest.fixture
def page_code(root):
    """`page_code("own-gate")`: the first Python block of a how-to page, and the name of the file it goes to."""

    def find(page: str) -> tuple[str, str]:
        text = (root / f"docs/howto/{page}.md").read_text(encoding="utf-8")
        path = re.search(r"save this as `(weftlm_methods/\w+\.py)`:", text, re.MULTILINE)[1]
        return re.search(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)[1], path

    return find


@pytest.mark.parametrize("page", ["own-policy", "own-router", "own-stage"])
def test_the_sample_package_holds_the_code_of_the_pages(page_code, root, page):
    code, path = page_code(page)
    assert (root / "examples/plugin" / path).read_text(encoding="utf-8") == code


def test_the_gate_obeys_the_laws_of_gates_and_is_fitted_and_certified(
    page_code, execute, load_script, tmp_path_factory
):
    execute(page_code("own-gate")[0])
    suite, ran = load_script("tests/laws/test_gating.py"), 0
    for name, law in vars(suite).items():
        marks = [mark.args for mark in getattr(law, "pytestmark", []) if mark.name == "parametrize"]
        if name.startswith("test_") and any(names == "name" and "hedged" in cases for names, cases in marks):
            fixtures = {"tmp_path_factory": tmp_path_factory}
            law(name="hedged", **{key: fixtures[key] for key in fixtures if key in inspect.signature(law).parameters})
            ran += 1
    assert ran > 1, "the suite did not find the new gate"

    random = np.random.default_rng(0)

    def draw() -> list[ScoredSequences]:
        """Two domains, each with an expert that is better on its sequences."""
        scores = [np.where(np.arange(2) == k, -60.0, -75.0) + random.normal(0, 4, (60, 2)) for k in range(2)]
        tokens = np.full(60, 32)
        return [ScoredSequences.of(one, tokens_N=tokens, name=name) for one, name in zip(scores, "ab", strict=True)]

    fitted = fit_robust_gate(draw(), draw(), gate="hedged", config=FitConfig(steps=60, best_response_steps=5))
    found = certify(fitted, draw(), draw())
    # Domains that do not overlap: no single model is below log 2 on the worse one, and an even mixture is there.
    assert found.worst.value == pytest.approx(np.log(2), abs=0.06)
    assert found.z.value == pytest.approx(1.0, abs=0.06)
