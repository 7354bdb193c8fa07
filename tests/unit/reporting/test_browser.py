"""Every page a project makes, in a real browser: three widths, light and dark, with hostile names."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from playwright.sync_api import Browser, sync_playwright
from playwright.sync_api import Page as BrowserPage
from support.gates import certificate, fit, rows
from support.hostile import NAMES

from weftlm.reporting.gating import GatingFacts
from weftlm.reporting.page import render_page, write_page
from weftlm.reporting.report import report_page
from weftlm.reporting.score_table import model_table
from weftlm.reporting.traces import LabelledTrace, RoutingFacts, trace_page
from weftlm.routing.trace import Trace

CHROMIUM = Path("/usr/bin/chromium")
DOMAINS = [*NAMES[4:7], *NAMES[9:11], *NAMES[14:20], NAMES[-1]]
pytestmark = pytest.mark.skipif(not CHROMIUM.exists(), reason=f"there is no browser at {CHROMIUM}")

FAULTS = """() => {
  const faults = [], width = innerWidth;
  const shown = (e) => e.checkVisibility({ contentVisibilityAuto: true });
  const note = (what, e) => faults.push(what + ": " + e.tagName + "." + (e.className.baseVal ?? e.className) + " "
    + e.textContent.trim().slice(0, 40));
  if (document.documentElement.scrollWidth > width) faults.push("the page is wider than the screen");
  const scrolls = (e) => { for (let a = e.parentElement; a; a = a.parentElement)
    if (getComputedStyle(a).overflowX !== "visible") return true; return false; };
  const probe = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const known = new Map();
  const rgba = (colour) => known.get(colour) ?? known.set(colour, measured(colour)).get(colour);
  const measured = (colour) => { probe.clearRect(0, 0, 1, 1); probe.fillStyle = colour; probe.fillRect(0, 0, 1, 1);
    const [r, g, b, a] = probe.getImageData(0, 0, 1, 1).data; return [r, g, b, a / 255]; };
  const under = (e) => { const layers = [];
    for (let a = e; a; a = a.parentElement) layers.push(rgba(getComputedStyle(a).backgroundColor));
    return layers.reverse().reduce((below, [r, g, b, alpha]) =>
      [r, g, b].map((one, i) => alpha * one + (1 - alpha) * below[i]), [255, 255, 255]); };
  const luminance = (c) => { const [r, g, b] = c.map((v) => v / 255)
      .map((v) => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
    return .2126 * r + .7152 * g + .0722 * b; };
  const contrast = (a, b) => { const [high, low] = [luminance(a), luminance(b)].sort((x, y) => y - x);
    return (high + .05) / (low + .05); };
  for (const e of document.querySelectorAll("body *")) {
    if (!shown(e)) continue;
    const area = e.getBoundingClientRect();
    if (area.width && (area.right > width + 1 || area.left < -1) && !scrolls(e)) note("outside the screen", e);
    const words = [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim());
    if (!words || e.closest("script, .unseen")) continue;
    const svg = e instanceof SVGElement, style = getComputedStyle(e), ground = svg ? e.closest("figure") : e;
    const ratio = contrast(rgba(svg ? style.fill : style.color).slice(0, 3), under(ground));
    if (ratio < 4.5) note("contrast " + ratio.toFixed(2), e);
  }
  for (const svg of document.querySelectorAll("figure svg")) {
    if (!shown(svg)) continue;
    const frame = svg.getBoundingClientRect();
    for (const mark of svg.querySelectorAll("text, path, use, line, rect")) {
      if (mark.closest("defs, clipPath, [clip-path]")) continue;
      const area = mark.getBoundingClientRect(), by = 2;
      if (area.left < frame.left - by || area.right > frame.right + by || area.top < frame.top - by
        || area.bottom > frame.bottom + by) note("outside its chart", mark);
    }
  }
  for (const tip of document.querySelectorAll(".tip")) {
    if (!shown(tip)) continue;
    const area = tip.getBoundingClientRect();
    for (const box of document.querySelectorAll(".tokens, figure svg, table")) {
      const other = box.getBoundingClientRect();
      if (area.left < other.right - 1 && area.right > other.left + 1 && area.top < other.bottom - 1
        && area.bottom > other.top + 1) note("covered by the detail", box);
    }
  }
  return [...new Set(faults)].slice(0, 12);
}"""


def traced() -> LabelledTrace:
    experts, tokens = tuple(DOMAINS), [f"{name} " for name in NAMES * 3]
    draw = torch.Generator().manual_seed(0)
    targets = tuple(f"model.layers.{layer}.{part}" for layer in range(3) for part in ("up", "down"))
    weights = torch.rand(len(targets), len(tokens), len(experts), generator=draw).pow(6)
    weights = weights / weights.sum(-1, keepdim=True)
    return NAMES[0], Trace(tuple(range(len(tokens))), experts, targets, weights), tokens


def gate() -> GatingFacts:
    values = {name: 0.01 * place for place, name in enumerate(DOMAINS)}
    models = rows(dict.fromkeys(("uniform", "robust", "student"), values))
    models["student"]["model"] = "runs/a b/student"
    return GatingFacts.of(certificate(values), fit(DOMAINS, 30), [{"rows": models}])


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"])
        yield browser
        browser.close()


def pages(folder: Path, make_run: Callable[..., Path]) -> dict[str, str]:
    runs = [make_run(folder / policy, policy, DOMAINS) for policy in ("uniform", "[bold]")]
    names = ["target", *DOMAINS[:4]]
    sets = {key: {"bits_per_byte": 2.0 + place, "bits_per_byte_se": 0.02} for place, key in enumerate(names)}
    models: dict[str, dict[str, Any]] = {
        f"model: {name}": {"role": "router", "path": f"runs/{name}", "sets": sets} for name in DOMAINS
    }
    models["base"] = {"role": "base", "sets": sets}
    table = model_table(models, "model", 64)
    routing = RoutingFacts(table, traces=[traced()])
    prepared: dict[str, Any] = {"sets": {name: {"documents": 3, "train_tokens": 4000} for name in DOMAINS}}
    project = report_page(runs, NAMES[14], prepared=prepared, routing=routing, gating=gate(), models=table)
    alone = report_page([], NAMES[15], gating=gate())
    pages = {"project": project, "gate": alone, "trace": trace_page([traced()], NAMES[8])}
    return {name: render_page(page) for name, page in pages.items()}


def test_no_page_is_cut_covered_unreadable_or_wider_than_the_screen(
    browser: Browser, tmp_path: Path, make_run: Callable[..., Path]
) -> None:
    found: list[str] = []
    page = browser.new_page(color_scheme="light")
    page.on("pageerror", lambda error: found.append(f"error: {error}"))
    page.on("console", lambda said: found.append(f"{said.type}: {said.text}"))
    page.on("dialog", lambda dialog: found.append(f"dialog: {dialog.message}"))
    for name, text in pages(tmp_path, make_run).items():
        path = tmp_path / f"{name}.html"
        path.write_text(text, encoding="utf-8")
        page.goto(path.as_uri())
        page.evaluate("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
        for width, scheme in ((390, "light"), (800, "dark"), (1280, "light")):
            page.emulate_media(color_scheme=scheme)
            page.set_viewport_size({"width": width, "height": 900})
            if page.locator(".tokens .t").count():
                page.locator(".tokens .t").nth(3).hover()
            found += [f"{name} {scheme} {width}: {fault}" for fault in page.evaluate(FAULTS)]
    page.close()
    assert found == []


def trace_of(weights_TE: list[list[float]], experts: list[str]) -> LabelledTrace:
    tokens = [f"w{place} " for place in range(len(weights_TE))]
    trace = Trace(tuple(range(len(tokens))), tuple(experts), ("model.layers.0.up",), torch.tensor(weights_TE)[None])
    return "a trace", trace, tokens


@pytest.fixture
def opened(browser: Browser, tmp_path: Path) -> Iterator[Callable[..., BrowserPage]]:
    """Open a page about traces; what it logs fails the test."""
    page, wrong = browser.new_page(), list[str]()
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda said: wrong.append(said.text))

    def open_page(*given: LabelledTrace) -> BrowserPage:
        path = write_page(trace_page(given, "A trace"), tmp_path / "trace.html")
        page.goto(path.as_uri())
        return page

    yield open_page
    page.close()
    assert wrong == []


def classes(page: BrowserPage, inside: str = "") -> list[str]:
    found: list[str] = page.locator(f"{inside} .tokens .t").evaluate_all("spans => spans.map(one => one.classList[1])")
    return found


def test_tokens_take_the_colour_of_their_leading_expert(opened: Callable[..., BrowserPage]) -> None:
    page = opened(trace_of([[0.9, 0.1], [0.5, 0.5], [0.0, 0.0], [0.4, 0.6]], ["one", "two"]))
    assert classes(page) == ["x0", "xt", "xb", "x1"], "a tie and the base alone have no expert's colour"
    legend = " ".join(page.locator(".legend li").all_inner_texts()).split()
    assert legend == "one 45% two 30% several alike base alone 25%".split()
    page.locator(".legend button").nth(1).click()
    assert classes(page) == ["x1", "x1", "none", "x1"], "the weight of one expert"
    page.locator(".tokens .t").nth(3).click()
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("Home")
    assert page.locator(".tip .bars li").all_inner_texts()[0].split() == ["one", "0.900"]
    assert page.locator(".usage tbody tr").first.inner_text().split()[-1] == "45%"


def test_an_expert_has_one_colour_on_a_page_while_colours_suffice(opened: Callable[..., BrowserPage]) -> None:
    few = opened(trace_of([[0.9, 0.1]], ["a", "b"]), trace_of([[0.9, 0.1, 0.0]], ["b", "c", "d"]))
    assert classes(few, "#trace-0") + classes(few, "#trace-1") == ["x0", "x1"]
    many = [trace_of([[0.2, *[0.1] * 8]], [f"{pool}{i}" for i in range(9)]) for pool in "pqp"]
    assert [classes(opened(*many), f"#trace-{place}") for place in range(3)] == [["x0"]] * 3
    page = opened(trace_of([[0.01 * (i + 1) for i in range(13)]], [f"e{i}" for i in range(13)]))
    assert "2 others" in page.locator(".legend").inner_text(), "eleven named, the smallest gathered"


def test_the_check_sees_faults(browser: Browser) -> None:
    page = browser.new_page(viewport={"width": 390, "height": 900})
    page.set_content(
        "<!DOCTYPE html><p style='color: #999'>pale</p>"
        "<div style='position: absolute; left: 380px; width: 60px'>far</div>"
        "<figure><svg viewBox='0 0 10 10' width='100'><text x='9' y='5'>long text</text></svg></figure>"
        "<table><tr><td>under</td></tr></table><div class='tip' style='position: absolute; top: 0'>over</div>"
    )
    faults = " ".join(page.evaluate(FAULTS))
    page.close()
    for one in ("contrast 2.85", "outside the screen: DIV. far", "outside its chart: text", "wider than the screen"):
        assert one in faults
