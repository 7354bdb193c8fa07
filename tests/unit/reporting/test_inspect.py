"""Trace pages: colours, packed weights, totals, escaping, independence of the network and of the script."""

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
from weftlm.reporting.inspect import write_trace_page
from weftlm.reporting.trace_parts import course_paths, percent, token_html
from weftlm.reporting.traces import (
    COLOURS,
    DIGITS,
    OTHER,
    LabelledTrace,
    Palette,
    TraceFacts,
    leaders,
    quantise,
    smoothed,
    strip_window,
    trace_data,
    typical_tokens,
)
from weftlm.routing.trace import MEAN, Trace

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
        for _ in range(take(held["digits"])):
            expert = take(held["digits"])
            row_E[expert] = take(2) / held["scale"]
    assert place == len(text)
    return weights_TE


class Page(HTMLParser):
    """Elements, the text of each token, scripts, tables, whether every tag closes."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.tokens: list[tuple[str, str]] = []
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
        if kind.startswith("t ") and self._open[-1][1] == "tokens":
            self.tokens.append((kind.removeprefix("t "), ""))
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
            self.tokens[-1] = (self.tokens[-1][0], self.tokens[-1][1] + data)
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


def test_tokens_keep_the_text_and_take_the_leading_experts_colour(tmp_path: Path) -> None:
    given = make_trace(WORDS)
    page = page_of([given], tmp_path)
    assert [text for _, text in page.tokens] == WORDS
    leading = given[1].token_weights_TE.argmax(dim=1).tolist()
    assert [kind for kind, _ in page.tokens] == [f"x{expert}" for expert in leading]


def test_the_scripts_weights_are_the_traces(tmp_path: Path) -> None:
    label, trace, texts = make_trace(WORDS, k=3)
    (held,) = page_of([(label, trace, texts)], tmp_path).data
    assert held["tokens"] == WORDS
    assert held["layers"] == ["layer 0", "layer 1"]
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
    assert held["digits"] == 2
    np.testing.assert_allclose(unpacked(held["rows"][0], held), given[1].weights_STE[0].numpy(), atol=0.00051)


def test_a_router_of_whole_sequences_costs_one_row(tmp_path: Path) -> None:
    weights_STE = torch.tensor([0.75, 0.25]).expand(6, 4, 2)
    sites = tuple(f"layers.{i}.up" for i in range(6))
    (held,) = page_of([("one", Trace((0, 1, 2, 3), ("a", "b"), sites, weights_STE), list("wxyz"))], tmp_path).data
    assert len(held["parts"]) == 6
    assert len(held["rows"]) == 1


def test_the_legend_and_the_bars_add_up(tmp_path: Path) -> None:
    label, trace, texts = make_trace(WORDS)
    text = write_trace_page([(label, trace, texts)], tmp_path / "t.html", "T").read_text(encoding="utf-8")
    legend = text[text.index('<ul class="legend"') : text.index("</ul>")]
    shares = {
        name: float(value)
        for name, value in re.findall(
            r'<span class="name">(.*?)</span> <span class="share"><data value="(.*?)"', legend
        )
    }
    expected = trace.usage_SE.mean(dim=0).tolist()
    assert shares == pytest.approx(dict(zip(trace.experts, expected, strict=True)), abs=1e-6)
    assert sum(shares.values()) == pytest.approx(1.0)
    bars = re.findall(r'<span class="bar".*?</td>', text)
    assert len(bars) == 2
    for bar in bars:
        assert sum(float(width) for width in re.findall(r"width:([\d.]+)%", bar)) == pytest.approx(100, abs=0.1)


def test_entropies_stand_beside_their_maximum(tmp_path: Path) -> None:
    label, trace, texts = make_trace(WORDS)
    text = write_trace_page([(label, trace, texts)], tmp_path / "t.html", "T").read_text(encoding="utf-8")
    assert "ln 3 = 1.10 nats" in text
    shown = [float(value) for value in re.findall(r'<th scope="row" class="text">model.*?<data value="(.*?)"', text)]
    assert shown == pytest.approx(trace.entropy_S.tolist())
    heights = [float(value) for value in re.findall(r'style="height:([\d.]+)%"', text)]
    assert heights == pytest.approx([100 * entropy / math.log(3) for entropy in trace.entropy_S.tolist()], abs=0.06)


def test_one_expert_has_no_entropy_to_show(tmp_path: Path) -> None:
    page = page_of([with_weights([[1.0], [1.0]], ["a", "b"], ["only"])], tmp_path)
    assert "there is nothing to choose" in page.text
    assert [kind for kind, _ in page.tokens] == ["x0", "x0"]


def test_ties_and_the_base_alone_lead_nowhere(tmp_path: Path) -> None:
    page = page_of([with_weights([[0.5, 0.5], [0.0, 0.0], [0.4, 0.6]], list("abc"), ["one", "two"])], tmp_path)
    assert [kind for kind, _ in page.tokens] == ["xt", "xb", "x1"]
    assert "several alike" in page.text
    assert "base alone 33%" in page.text
    assert leaders(np.array([[5, 5], [0, 0], [4, 6]])).tolist() == [-1, -2, 1]


def test_the_base_alone_everywhere_is_a_page_too(tmp_path: Path) -> None:
    page = page_of([with_weights([[0.0, 0.0]], ["a"], ["one", "two"])], tmp_path)
    assert "the base worked alone" in page.text


def test_typical_tokens_have_the_largest_excess() -> None:
    tokens = ["the", "def", "the", "def", "x"]
    weights = [[0.9, 0.1], [0.2, 0.8], [0.8, 0.2], [0.0, 1.0], [0.5, 0.5]]
    found = typical_tokens(TraceFacts.of(with_weights(weights, tokens, ["prose", "code"])))
    assert [(one.text, one.count) for one in found["prose"]] == [("the", 2), ("x", 1)]
    assert found["prose"][0].weight == pytest.approx(0.85)
    assert [one.text for one in found["code"]] == ["def"]


# ------------------------------------------------------------------------------------------------------------- colours


def test_twelve_experts_have_a_colour_each_and_the_mean_a_grey() -> None:
    experts = [*(f"e{i}" for i in range(12)), MEAN]
    palette = Palette.of([TraceFacts.of(make_trace(["a", "b"], experts))])
    assert [palette.classes[name] for name in experts] == [*(f"x{i}" for i in range(12)), "xm"]
    assert len(set(COLOURS)) == 12


def test_of_more_experts_the_smallest_are_gathered(tmp_path: Path) -> None:
    experts = [f"e{i}" for i in range(20)]
    given = make_trace(WORDS, experts, layers=3)
    palette = Palette.of([TraceFacts.of(given)])
    shares = given[1].usage_SE.mean(dim=0).tolist()
    gathered = {name for name, group in palette.classes.items() if group == OTHER}
    assert len(gathered) == 9
    least = max(share for name, share in zip(experts, shares, strict=True) if name in gathered)
    assert all(share >= least for name, share in zip(experts, shares, strict=True) if name not in gathered)
    page = page_of([given], tmp_path)
    assert "9 others" in page.text
    assert set(page.data[0]["experts"]) == set(experts)


def test_colours_are_common_to_a_page_while_they_suffice() -> None:
    few = [TraceFacts.of(make_trace(["a"], names)) for names in (["a", "b"], ["b", "c", "d"])]
    first, second = Palette.each(few)
    assert first.classes["b"] == second.classes["b"] == "x1"
    many = [TraceFacts.of(make_trace(["a"], [f"{pool}{i}" for i in range(9)])) for pool in "pqp"]
    own = Palette.each(many)
    assert own[0] == own[2] != own[1]
    assert OTHER not in {*own[0].classes.values(), *own[1].classes.values()}


# -------------------------------------------------------------------------------------------------------------- course


def test_a_course_is_a_centred_mean_and_its_stack_reaches_the_top() -> None:
    values_TG = np.array([[1.0, 0.0]] * 4 + [[0.0, 1.0]] * 4)
    smooth_TG = smoothed(values_TG, 3)
    assert smooth_TG[:, 0].tolist() == pytest.approx([1, 1, 1, 2 / 3, 1 / 3, 0, 0, 0])
    lower, upper = course_paths(values_TG, 3)
    assert lower.startswith("M0 0L0.5 0")
    top = upper.split("L")[: len(values_TG) + 2]
    assert all(point.endswith(" 0") for point in top)
    assert [strip_window(count) for count in (3, 20, 120, 2000)] == [1, 3, 5, 31]


def test_a_long_course_has_a_bounded_number_of_points() -> None:
    (path,) = course_paths(np.full((5000, 1), 1.0), 31)
    assert path.count("L") < 2 * 620


# ------------------------------------------------------------------------------------------------------- text and marks


def test_white_space_is_marked_and_kept() -> None:
    def plain(text: str) -> str:
        return re.sub(r"<[^>]*>", "", token_html(text))

    assert token_html(" wall") == " wall"
    assert 'data-m="·"' in token_html(" ")
    assert 'data-m="····"' in token_html("    x")
    assert token_html("\n").endswith("\n")
    assert "↵" in token_html("\n")
    assert "→" in token_html("\t")
    assert "∅" in token_html("")
    assert [plain(text) for text in ("a  b\n\tc", " ", "\n\n")] == ["a  b\n\tc", " ", "\n\n"]
    assert plain("a\r\nb") == "a\nb"
    assert plain("\x00\ud800\u202e") == "\ufffd" * 3


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
    assert [text for _, text in page.tokens] == [*HOSTILE, "\ufffd", "\ufffd", "名前 🧵"]
    assert page.data[0]["tokens"][:5] == HOSTILE
    assert HOSTILE[0] in page.text


# ------------------------------------------------------------------------------------------------- the page as a whole


def test_the_page_needs_nothing_from_elsewhere(tmp_path: Path) -> None:
    path = write_trace_page([make_trace(WORDS)], tmp_path / "t.html", "T")
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert not re.search(r"https?:|@import|url\(|\bfetch\(|XMLHttpRequest|innerHTML|eval\(", text)
    assert not {tag for tag, _ in page.elements} & {"link", "img", "iframe", "object", "embed", "base"}
    assert not any("src" in attributes or "href" in attributes for _, attributes in page.elements)
    policy = next(str(a["content"]) for tag, a in page.elements if tag == "meta" and "http-equiv" in a)
    own = (page.scripts[0], page.scripts[-1])
    hashes = " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(one.encode()).digest()).decode()}'" for one in own)
    assert policy == f"default-src 'none'; style-src 'unsafe-inline'; script-src {hashes}"
    assert [entry.name for entry in tmp_path.iterdir()] == ["t.html"]


def test_the_page_says_the_same_twice_and_without_its_script(tmp_path: Path) -> None:
    given = make_trace(WORDS)
    text = write_trace_page([given], tmp_path / "t.html", "T").read_text(encoding="utf-8")
    assert write_trace_page([given], tmp_path / "u.html", "T").read_text(encoding="utf-8") == text
    assert '<div class="trace-controls" hidden>' in text
    first = re.search(r'title="0: ([^"]*)"', text)
    assert first is not None
    top = given[1].token_weights_TE[0].max().item()
    assert f"{top:.2f}" in first[1]


def test_several_traces_have_links_and_ids_of_their_own(tmp_path: Path) -> None:
    page = page_of([make_trace(WORDS), make_trace(["x", "y"], seed=1)], tmp_path)
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    links = [str(attributes["href"]) for tag, attributes in page.elements if tag == "a"]
    assert len(links) == 2
    assert {link[1:] for link in links} <= set(ids)
    assert len(page.data) == 2


def test_charts_speak_and_headers_have_a_scope(tmp_path: Path) -> None:
    page = page_of([make_trace(WORDS)], tmp_path)
    assert all(len(str(a["aria-label"])) > 20 for _, a in page.elements if a.get("role") == "img")
    assert all(attributes.get("scope") for tag, attributes in page.elements if tag == "th")
    assert sum(tag == "table" for tag, _ in page.elements) == sum(tag == "caption" for tag, _ in page.elements)


def test_a_long_trace_of_many_modules_stays_small(tmp_path: Path) -> None:
    given = make_trace([f" word{i % 300}" for i in range(1000)], [f"e{i}" for i in range(20)], layers=7)
    path = write_trace_page([given], tmp_path / "t.html", "T")
    assert path.stat().st_size < 600_000


def test_beyond_the_budget_modules_become_layers_and_layers_the_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    given = make_trace(WORDS, k=3)
    facts = TraceFacts.of(given)
    palette = Palette.of([facts])
    full = int(np.count_nonzero(quantise(facts.weights_STE)))
    monkeypatch.setattr(traces, "ENTRIES", full - 1)
    held = trace_data(facts, palette)
    assert held["kind"] == "layers"
    assert [part["name"] for part in held["parts"]] == ["layer 0", "layer 1"]
    expected = given[1].weights_STE[2:].mean(dim=0).numpy()
    np.testing.assert_allclose(unpacked(held["rows"][1], held), expected, atol=0.00051)
    monkeypatch.setattr(traces, "ENTRIES", 1)
    held = trace_data(facts, palette)
    assert (held["kind"], held["parts"], held["rows"]) == ("none", [], [])


def test_layers_of_two_stacks_keep_their_names() -> None:
    sites = ("encoder.layer.0.q", "decoder.layer.0.q", "head")
    trace = Trace((0,), ("a", "b"), sites, torch.full((3, 1, 2), 0.5))
    facts = TraceFacts.of(("t", trace, ["x"]))
    assert list(facts.layer_names.values()) == ["encoder.layer.0", "decoder.layer.0", "head"]
    assert [facts.site_name(row) for row in range(3)] == ["q", "q", "head"]


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
