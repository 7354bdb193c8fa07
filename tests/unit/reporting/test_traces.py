"""Trace pages: packed weights, shares, characteristic tokens, escaping, independence of the network.

What trace.js draws of them is tested in a browser, in test_browser.py and in tests/e2e/test_inspector_page.py.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from weftlm.errors import ConfigError, DataError, NumericsError
from weftlm.reporting import traces
from weftlm.reporting.traces import (
    DIGITS,
    LabelledTrace,
    layer_labels,
    percent,
    quantise,
    trace_data,
    typical_tokens,
    write_trace_page,
)
from weftlm.routing.trace import Trace

VOID = {"meta", "br", "line", "path"}
HOSTILE = ["<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "</script><b>", "a & b", "${title} $script"]


def make_trace(
    tokens: Sequence[str],
    experts: Sequence[str] = ("prose", "code", "maths"),
    layers: int = 2,
    k: int = 2,
    seed: int = 0,
) -> LabelledTrace:
    sites = tuple(f"model.layers.{layer}.{part}" for layer in range(layers) for part in ("q_proj", "down_proj"))
    draw = torch.Generator().manual_seed(seed)
    scores_STE = torch.randn(len(sites), len(tokens), len(experts), generator=draw)
    top, chosen = scores_STE.topk(k, dim=-1)
    weights_STE = torch.zeros_like(scores_STE).scatter(-1, chosen, top.softmax(-1))
    return ("a trace", Trace(tuple(range(len(tokens))), tuple(experts), sites, weights_STE), tokens)


def with_weights(weights_TE: Sequence[Sequence[float]], tokens: Sequence[str], experts: Sequence[str]) -> LabelledTrace:
    weights_STE = torch.tensor(weights_TE)[None]
    return ("a trace", Trace(tuple(range(len(tokens))), tuple(experts), ("model.layers.0.up",), weights_STE), tokens)


def unpacked(text: str, held: dict[str, Any]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """What the page's script makes of packed weights."""
    weights_TE = np.zeros((len(held["tokens"]), len(held["experts"])))
    place = 0

    def take(digits: int) -> int:
        nonlocal place
        value = 0
        for _ in range(digits):
            value, place = 64 * value + DIGITS.index(text[place]), place + 1
        return value

    for row_E in weights_TE:
        digits = 1 if len(held["experts"]) < 64 else 2
        for _ in range(take(digits)):
            expert = take(digits)
            row_E[expert] = take(2) / 1000
    assert place == len(text)
    return weights_TE


class Page(HTMLParser):
    """Elements, the traced text, scripts, whether every tag closes."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.traced = ""
        self.scripts: list[str] = []
        self.text = ""
        self._open: list[tuple[str, str]] = []
        self.feed(text)
        self.close()
        assert self._open == [], self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        kind = dict(attrs).get("class") or ""
        self.elements.append((tag, dict(attrs)))
        if tag in VOID:
            return
        if tag == "script":
            self.scripts.append("")
        self._open.append((tag, kind))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop()[0] == tag, (tag, self.getpos())

    def handle_data(self, data: str) -> None:
        inside = [kind for _, kind in self._open]
        if self._open and self._open[-1][0] == "script":
            self.scripts[-1] += data
        elif "tokens" in inside:
            self.traced += data
        elif self._open and self._open[-1][0] != "style":
            self.text += data

    @property
    def data(self) -> list[dict[str, Any]]:
        kinds = [attributes.get("type") for tag, attributes in self.elements if tag == "script"]
        return [json.loads(s) for s, kind in zip(self.scripts, kinds, strict=True) if kind == "application/json"]


def page_of(given: Sequence[LabelledTrace], tmp_path: Path, title: str = "A page") -> Page:
    return Page(write_trace_page(given, tmp_path / "trace.html", title).read_text(encoding="utf-8"))


WORDS = ["The", " old", " wall", "\n", "def", " f", "(", "x", "):", "\n", "    ", "return", " x", "\t", " wall"]


# ------------------------------------------------------------------------------------------------------------- content


def test_the_text_is_kept_and_the_experts_are_listed_with_their_shares(tmp_path: Path) -> None:
    label, trace, texts = make_trace(WORDS)
    text = write_trace_page([(label, trace, texts)], tmp_path / "t.html", "T").read_text(encoding="utf-8")
    assert Page(text).traced == "".join(WORDS)
    rows = re.findall(r'data-expert="\d+"></span>(.*?)</th><td class="number"><data value="(.*?)">', text)
    expected = trace.usage_SE.mean(dim=0).tolist()
    assert {name: float(share) for name, share in rows} == pytest.approx(
        dict(zip(trace.experts, expected, strict=True)), abs=1e-6
    )
    assert write_trace_page([(label, trace, texts)], tmp_path / "u.html", "T").read_text(encoding="utf-8") == text


def test_the_scripts_weights_are_the_traces(tmp_path: Path) -> None:
    label, trace, texts = make_trace(WORDS, k=3)
    (held,) = page_of([(label, trace, texts)], tmp_path).data
    assert held["tokens"] == WORDS
    assert [layer["label"] for layer in held["layers"]] == ["layer 0", "layer 1"]
    assert [module["entropy"] for module in held["modules"]] == pytest.approx(trace.entropy_S.tolist())
    assert [(part["name"], part["layer"]) for part in held["parts"]] == [
        ("q_proj", 0), ("down_proj", 0), ("q_proj", 1), ("down_proj", 1),
    ]  # fmt: skip
    for part, weights_TE in zip(held["parts"], trace.weights_STE.numpy(), strict=True):
        np.testing.assert_allclose(unpacked(held["rows"][part["row"]], held), weights_TE, atol=0.00051)
    np.testing.assert_allclose(unpacked(held["mean"], held), trace.token_weights_TE.numpy(), atol=0.00051)


def test_more_than_63_experts_are_packed_with_two_digits(tmp_path: Path) -> None:
    experts = [f"e{i}" for i in range(70)]
    given = make_trace(["a", "b", "c"], experts, k=66)
    (held,) = page_of([given], tmp_path).data
    np.testing.assert_allclose(unpacked(held["rows"][0], held), given[1].weights_STE[0].numpy(), atol=0.00051)


def test_a_router_of_whole_sequences_costs_one_row(tmp_path: Path) -> None:
    weights_STE = torch.tensor([0.75, 0.25]).expand(6, 4, 2)
    sites = tuple(f"layers.{i}.up" for i in range(6))
    (held,) = page_of([("one", Trace((0, 1, 2, 3), ("a", "b"), sites, weights_STE), list("wxyz"))], tmp_path).data
    assert len(held["parts"]) == 6
    assert len(held["rows"]) == 1


def test_typical_tokens_have_the_largest_excess() -> None:
    tokens = ["the", "def", "the", "def", "x"]
    prose, code = np.array([[0.9, 0.1], [0.2, 0.8], [0.8, 0.2], [0.0, 1.0], [0.5, 0.5]]).T
    found = typical_tokens(tokens, prose)
    assert [(one.text, one.count) for one in found] == [("the", 2), ("x", 1)]
    assert found[0].weight == pytest.approx(0.85)
    assert [one.text for one in typical_tokens(tokens, code)] == ["def"]


def test_the_base_alone_everywhere_is_a_page_too(tmp_path: Path) -> None:
    page = page_of([with_weights([[0.0, 0.0]], ["a"], ["one", "two"])], tmp_path)
    assert "the base alone" in page.text


# ------------------------------------------------------------------------------------------------------- text and marks


def test_percent_never_shows_something_as_nothing() -> None:
    assert [percent(share) for share in (0.4142, 0.0321, 0.0001, 0.0, 1.0)] == ["41%", "3.2%", "<0.1%", "0.0%", "100%"]


def test_names_and_tokens_are_text_whatever_they_hold(tmp_path: Path) -> None:
    _, trace, texts = make_trace([*HOSTILE, "\x00", "\ud800", "名前 🧵"], [*HOSTILE[:4], "\udfff"])
    sites = tuple(f"model.layers.{i}.{HOSTILE[0]}" for i in range(4))
    trace = Trace(trace.tokens, trace.experts, sites, trace.weights_STE)
    page = page_of([(HOSTILE[0], trace, texts)], tmp_path, title=HOSTILE[2])
    assert [tag for tag, _ in page.elements].count("script") == 3
    assert not {tag for tag, _ in page.elements} & {"img", "b"}
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    assert page.traced == "".join([*HOSTILE, "\ufffd", "\ufffd", "名前 🧵"])
    assert page.data[0]["tokens"][:5] == HOSTILE
    assert HOSTILE[0] in page.text


# ------------------------------------------------------------------------------------------------- the page as a whole


def test_the_page_needs_nothing_from_elsewhere(tmp_path: Path) -> None:
    path = write_trace_page([make_trace(WORDS)], tmp_path / "t.html", "T")
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert set(re.findall(r"https?:[^\s\"']*", text)) == {"http://www.w3.org/2000/svg"}, "the name of the format alone"
    assert not re.search(r"@import|url\(|\bfetch\(|XMLHttpRequest|innerHTML|eval\(", text)
    assert not {tag for tag, _ in page.elements} & {"link", "img", "iframe", "object", "embed", "base"}
    assert not any("src" in attributes or "href" in attributes for _, attributes in page.elements)
    policy = next(str(a["content"]) for tag, a in page.elements if tag == "meta" and "http-equiv" in a)
    own = (page.scripts[0], page.scripts[-1])
    hashes = " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(one.encode()).digest()).decode()}'" for one in own)
    assert policy == f"default-src 'none'; style-src 'unsafe-inline'; script-src {hashes}"
    assert [entry.name for entry in tmp_path.iterdir()] == ["t.html"]


def test_several_traces_have_links_and_ids_of_their_own(tmp_path: Path) -> None:
    page = page_of([make_trace(WORDS), make_trace(["x", "y"], seed=1)], tmp_path)
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    links = [str(attributes["href"]) for tag, attributes in page.elements if tag == "a"]
    assert len(links) == 2
    assert {link[1:] for link in links} <= set(ids)
    assert len(page.data) == 2


def test_headers_have_a_scope_and_tables_a_caption(tmp_path: Path) -> None:
    page = page_of([make_trace(WORDS)], tmp_path)
    assert all(attributes.get("scope") for tag, attributes in page.elements if tag == "th")
    assert sum(tag == "table" for tag, _ in page.elements) == sum(tag == "caption" for tag, _ in page.elements)


def test_a_long_trace_of_many_modules_stays_small(tmp_path: Path) -> None:
    given = make_trace([f" word{i % 300}" for i in range(1000)], [f"e{i}" for i in range(20)], layers=7)
    path = write_trace_page([given], tmp_path / "t.html", "T")
    assert path.stat().st_size < 600_000


def test_beyond_the_budget_modules_become_layers_and_layers_the_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    _, trace, texts = make_trace(WORDS, k=3)
    weights_STE = trace.weights_STE.numpy()
    monkeypatch.setattr(traces, "ENTRIES", int(np.count_nonzero(quantise(weights_STE))) - 1)
    held = trace_data(trace, texts, weights_STE)
    assert held["kind"] == "layers"
    assert [part["name"] for part in held["parts"]] == ["layer 0", "layer 1"]
    np.testing.assert_allclose(unpacked(held["rows"][1], held), weights_STE[2:].mean(axis=0), atol=0.00051)
    monkeypatch.setattr(traces, "ENTRIES", 1)
    held = trace_data(trace, texts, weights_STE)
    assert (held["kind"], held["parts"], held["rows"]) == ("none", [], [])


def test_layers_of_two_stacks_keep_their_names() -> None:
    layers = ("encoder.layer.0", "decoder.layer.0", "head")
    assert layer_labels(layers) == {name: name for name in layers}


def test_mistakes_are_said(tmp_path: Path) -> None:
    label, trace, texts = make_trace(["a", "b"])
    with pytest.raises(ConfigError, match="at least one trace"):
        write_trace_page([], tmp_path / "t.html", "T")
    with pytest.raises(ConfigError, match="2 tokens but 1 token texts"):
        write_trace_page([(label, trace, texts[:1])], tmp_path / "t.html", "T")
    empty = Trace((), ("a",), ("m",), torch.zeros(1, 0, 1))
    with pytest.raises(ConfigError, match="0 tokens"):
        write_trace_page([(label, empty, [])], tmp_path / "t.html", "T")
    odd = Trace((0, 1), trace.experts, trace.sites, trace.weights_STE[:, :1])
    with pytest.raises(ConfigError, match="weights of shape"):
        write_trace_page([(label, odd, texts)], tmp_path / "t.html", "T")
    for wrong in (math.nan, -0.5, 2.0):
        with pytest.raises(NumericsError, match="outside"):
            write_trace_page([with_weights([[wrong]], ["a"], ["e"])], tmp_path / "t.html", "T")
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match="cannot be written"):
        write_trace_page([(label, trace, texts)], tmp_path / "file" / "t.html", "T")
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]
