"""Trace pages: packed weights, shares, escaping, independence of the network.

What trace.js draws of them is tested in a browser, in test_browser.py and in tests/e2e/test_inspector_page.py.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from support.blocks import Html

from weftlm.errors import ConfigError, NumericsError
from weftlm.reporting import traces
from weftlm.reporting.page import render_page
from weftlm.reporting.traces import LabelledTrace, quantise, trace_data, trace_page
from weftlm.routing.trace import Trace

HOSTILE = ["<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "</script><b>", "a & b", "${title} $script"]
WORDS = ["The", " old", " wall", "\n", "def", " f", "(", "x", "):", "\n", "    ", "return", " x", "\t", " wall"]


def make_trace(
    tokens: Sequence[str], experts: Sequence[str] = ("prose", "code", "maths"), layers: int = 2, k: int = 2
) -> LabelledTrace:
    targets = tuple(f"model.layers.{layer}.{part}" for layer in range(layers) for part in ("q_proj", "down_proj"))
    scores_STE = torch.randn(len(targets), len(tokens), len(experts), generator=torch.Generator().manual_seed(0))
    top, chosen = scores_STE.topk(k, dim=-1)
    weights_STE = torch.zeros_like(scores_STE).scatter(-1, chosen, top.softmax(-1))
    return ("a trace", Trace(tuple(range(len(tokens))), tuple(experts), targets, weights_STE), tokens)


def unpacked(packed: list[int], held: dict[str, Any]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """What the page's script makes of packed weights."""
    weights_TE = np.zeros((len(held["tokens"]), len(held["experts"])))
    entries = iter(packed)
    for row_E in weights_TE:
        for _ in range(next(entries)):
            expert = next(entries)
            row_E[expert] = next(entries) / 1000
    assert next(entries, None) is None
    return weights_TE


def page_of(given: Sequence[LabelledTrace], title: str = "A page") -> Html:
    return Html(render_page(trace_page(given, title)))


def held_by(page: Html) -> list[dict[str, Any]]:
    kinds = [attributes.get("type") for tag, attributes in page.elements if tag == "script"]
    return [json.loads(s) for s, kind in zip(page.scripts, kinds, strict=True) if kind == "application/json"]


def test_the_scripts_text_and_weights_are_the_traces() -> None:
    label, trace, texts = make_trace(WORDS)
    page = page_of([(label, trace, texts)])
    (held,) = held_by(page)
    assert page.traced == "".join(WORDS)
    assert held["tokens"] == WORDS
    assert [layer["label"] for layer in held["layers"]] == ["layer 0", "layer 1"]
    assert [module["entropy"] for module in held["modules"]] == pytest.approx(trace.entropy_S.tolist())
    parts = [(part["name"], part["layer"]) for part in held["parts"]]
    assert parts == [("q_proj", 0), ("down_proj", 0), ("q_proj", 1), ("down_proj", 1)]
    for part, weights_TE in zip(held["parts"], trace.weights_STE.numpy(), strict=True):
        np.testing.assert_allclose(unpacked(held["rows"][part["row"]], held), weights_TE, atol=0.00051)
    np.testing.assert_allclose(unpacked(held["mean"], held), trace.token_weights_TE.numpy(), atol=0.00051)


def test_a_router_of_whole_sequences_costs_one_row_and_the_base_alone_has_a_page() -> None:
    layers = ("encoder.layer.0", "decoder.layer.0", "head")
    targets = ("encoder.layer.0.up", "decoder.layer.0.up", "head")
    weights_STE = torch.tensor([0.75, 0.25]).expand(3, 4, 2)
    page = page_of([("one", Trace((0, 1, 2, 3), ("a", "b"), targets, weights_STE), "wxyz")])
    (held,) = held_by(page)
    assert (len(held["parts"]), len(held["rows"])) == (3, 1)
    assert [layer["label"] for layer in held["layers"]] == list(layers), "layers of two stacks keep their names"
    assert "one: a 75% of the weight" in page.text
    alone = Trace((0,), ("a", "b"), ("m",), torch.zeros(1, 1, 2))
    assert "the base alone" in page_of([("one", alone, ["x"])]).text


def test_names_and_tokens_are_text_whatever_they_hold() -> None:
    _, trace, texts = make_trace([*HOSTILE, "\x00", "\ud800", "名前 🧵"], [*HOSTILE[:4], "\udfff"])
    targets = tuple(f"model.layers.{i}.{HOSTILE[0]}" for i in range(4))
    page = page_of([(HOSTILE[0], Trace(trace.tokens, trace.experts, targets, trace.weights_STE), texts)], HOSTILE[2])
    assert page.count("script") == 3
    assert not {tag for tag, _ in page.elements} & {"img", "b"}
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    assert page.traced == "".join([*HOSTILE, "\ufffd", "\ufffd", "名前 🧵"])
    assert held_by(page)[0]["tokens"][:5] == HOSTILE


def test_the_page_needs_nothing_from_elsewhere_and_several_traces_have_ids_of_their_own() -> None:
    text = render_page(trace_page([make_trace(WORDS)], "T"))
    page = Html(text)
    assert set(re.findall(r"https?:[^\s\"']*", text)) == {"http://www.w3.org/2000/svg"}, "the name of the format alone"
    assert not re.search(r"@import|url\(|\bfetch\(|XMLHttpRequest|innerHTML|eval\(", text)
    assert not {tag for tag, _ in page.elements} & {"link", "img", "iframe", "object", "embed", "base"}
    assert not any("src" in attributes or "href" in attributes for _, attributes in page.elements)
    policy = next(str(a["content"]) for tag, a in page.elements if tag == "meta" and "http-equiv" in a)
    own = (page.scripts[0], page.scripts[-1])
    hashes = " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(one.encode()).digest()).decode()}'" for one in own)
    assert policy == f"default-src 'none'; style-src 'unsafe-inline'; script-src {hashes}"
    page = page_of([make_trace(WORDS), make_trace(["x", "y"])])
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    links = [str(attributes["href"]) for tag, attributes in page.elements if tag == "a"]
    assert len(links) == len(held_by(page)) == 2
    assert {link[1:] for link in links} <= set(ids)


def test_a_long_trace_stays_small_and_beyond_the_budget_modules_become_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    given = make_trace([f" word{i % 300}" for i in range(1000)], [f"e{i}" for i in range(20)], layers=7)
    assert len(render_page(trace_page([given], "T"))) < 600_000
    _, trace, texts = make_trace(WORDS, k=3)
    weights_STE = trace.weights_STE.numpy()
    monkeypatch.setattr(traces, "ENTRIES", int(np.count_nonzero(quantise(weights_STE))) - 1)
    held = trace_data(trace, texts, weights_STE)
    assert held["kind"] == "layers"
    assert [part["name"] for part in held["parts"]] == ["layer 0", "layer 1"]
    np.testing.assert_allclose(unpacked(held["rows"][1], held), weights_STE[2:].mean(axis=0), atol=0.00051)


def test_mistakes_are_said() -> None:
    label, trace, texts = make_trace(["a", "b"])
    with pytest.raises(ConfigError, match="at least one trace"):
        trace_page([], "T")
    with pytest.raises(ConfigError, match="2 tokens and 3 experts, and 1 token texts came"):
        trace_page([(label, trace, texts[:1])], "T")
    for wrong in (math.nan, -0.5, 2.0):
        with pytest.raises(NumericsError, match="outside"):
            trace_page([(label, Trace((0,), ("e",), ("m",), torch.tensor([[[wrong]]])), ["a"])], "T")
