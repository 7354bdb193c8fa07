"""The inspector's page in a real browser: clicked, typed into, walked by keys, photographed."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright
from support.served import write_model
from support.web import Web, serving

from weftlm.pipeline.any_model import OpenModel, open_model
from weftlm.serving.engine import Engine
from weftlm.serving.serve_config import ServeConfig

CHROMIUM = Path("/usr/bin/chromium")
KEY = "a key for tests"
PATIENCE = 20_000
"""Milliseconds a busy machine may take."""
TEXT = "the river runs over\n  old stones <b>and</b> <img src=x onerror=\"document.title='broken'\"> waits é日"

pytestmark = pytest.mark.skipif(not CHROMIUM.exists(), reason=f"there is no browser at {CHROMIUM}")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, OpenModel]:
    folder = tmp_path_factory.mktemp("models")
    return {kind: open_model(write_model(folder / kind, kind)) for kind in ("routed", "gated", "plain")}


@pytest.fixture(scope="module")
def served(models: dict[str, OpenModel]) -> Iterator[Web]:
    with inspected(models) as web:
        yield web


@pytest.fixture(scope="module")
def locked(models: dict[str, OpenModel]) -> Iterator[Web]:
    with inspected({"plain": models["plain"]}, api_keys=(KEY,)) as web:
        yield web


def inspected(models: dict[str, OpenModel], **settings: Any) -> AbstractContextManager[Web]:
    return serving({name: Engine(opened, slots=1) for name, opened in models.items()}, ServeConfig(**settings))


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    expect.set_options(timeout=PATIENCE)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Browser, served: Web) -> Iterator[Page]:
    """A fresh page; whatever it logs or loads from elsewhere fails the test."""
    context = browser.new_context(viewport={"width": 1280, "height": 900}, color_scheme="light")
    page = context.new_page()
    page.set_default_timeout(PATIENCE)
    wrong: list[str] = []
    page.on("pageerror", lambda error: wrong.append(f"error: {error}"))
    page.on("console", lambda said: "Failed to load" in said.text or wrong.append(f"{said.type}: {said.text}"))
    page.on("response", lambda got: got.status == 404 and wrong.append(f"there is no {got.url}"))
    page.on("request", lambda asked: asked.url.startswith(served.address) or wrong.append(f"asked for {asked.url}"))
    page.goto(served.address)
    page.locator("#model option").first.wait_for(state="attached")
    yield page
    context.close()
    assert wrong == []


def look(page: Page, text: str = TEXT) -> None:
    page.fill("#text", text)
    page.keyboard.press("Control+Enter")
    expect(page.locator("#status")).to_have_text(re.compile(r"tokens in [\d.]+ s"))


def settled(page: Page) -> None:
    expect(page.locator("body:not([aria-busy])")).to_have_count(1)


def state_of(page: Page) -> dict[str, str]:
    pairs = page.evaluate("[...new URLSearchParams(location.hash.slice(1))]")
    return dict(pairs)


def test_a_typed_text_is_coloured_by_its_experts_and_walked_by_keys(page: Page, models: dict[str, OpenModel]) -> None:
    look(page)
    assert page.locator(".tokens").evaluate("box => box.textContent") == TEXT
    assert page.locator(".tokens img, .tokens b, #detail img, #detail b b").count() == 0
    assert page.title() == "weftlm inspector"
    assert page.locator('.tokens [data-m="↵"]').count() == 1
    classes = page.locator(".tokens .t").evaluate_all("spans => spans.map(span => span.className)")
    assert all(re.match(r"t (x\d+|xt|xb)\b", one) for one in classes)
    legend = page.locator("#legend button").all_inner_texts()
    assert sorted(line.split()[0] for line in legend) == sorted(models["routed"].experts)
    expect(page.locator("#course path").first).to_be_visible()
    expect(page.locator("#usage tbody tr").first).to_contain_text("layer 0")
    expect(page.locator("#totals")).to_contain_text("Bits per byte")
    # keys walk from token to token
    page.locator(".tokens .t").nth(2).click()
    page.keyboard.press("ArrowRight")
    focused = "[...document.querySelectorAll('.tokens .t')].indexOf(document.activeElement)"
    assert page.evaluate(focused) == 3
    expect(page.locator("#detail")).to_contain_text("token 3, id")
    expect(page.locator("#detail")).to_contain_text("nats of surprise")
    assert page.locator("#detail .bars").nth(1).locator("li").count() == 5
    page.keyboard.press("ArrowDown")
    assert page.evaluate(focused) > 3
    page.keyboard.press("End")
    expect(page.locator("#detail")).to_contain_text("After the text, most likely")
    page.keyboard.press("Home")
    expect(page.locator("#detail")).to_contain_text("The first token is context")
    assert page.locator('.tokens [aria-selected="true"]').count() == 1
    page.locator(".tokens .t").nth(5).hover()
    expect(page.locator("#detail")).to_contain_text("token 5, id")
    page.locator("#text").hover()
    expect(page.locator("#detail")).to_contain_text("token 0, id")
    ids = models["routed"].tokenizer.encode_batch([TEXT])[0]
    assert page.locator(".tokens .t").count() == len(ids)


def test_everything_is_reached_by_tab_with_a_visible_focus(page: Page) -> None:
    look(page)
    page.locator("body").click(position={"x": 2, "y": 2})
    page.evaluate("document.activeElement.blur()")
    seen = []
    for _ in range(30):
        page.keyboard.press("Tab")
        name, outlined = page.evaluate(
            "() => { const at = document.activeElement, look = getComputedStyle(at);"
            " return [at.id || at.className, look.outlineStyle !== 'none' || look.boxShadow !== 'none']; }"
        )
        seen.append(name)
        assert outlined or name == "", name
    assert {"model", "beside", "text", "look", "generate", "view", "without", "leave", "theme"} <= set(seen)
    assert any(name.startswith("t ") for name in seen)
    labelled = page.locator("select, input, textarea").evaluate_all(
        "fields => fields.every(field => field.labels.length > 0)"
    )
    assert labelled
    assert page.locator("svg[role=img]:not([aria-label])").count() == 0
    # the link past the head keeps what is looked at
    before = page.url
    page.focus(".skip")
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "text"
    settled(page)
    assert page.url == before
    expect(page.locator("#text")).to_have_value(TEXT)
    expect(page.locator(".tokens")).to_be_visible()


def test_views_and_experts_switched_off_recolour_the_text(page: Page, models: dict[str, OpenModel]) -> None:
    look(page)
    colours = ".tokens .t", "spans => spans.map(span => span.className + span.style.getPropertyValue('--a')).join()"
    seen = {page.locator(colours[0]).evaluate_all(colours[1])}
    module = page.locator("#view option[value^='module:']").last.get_attribute("value")
    assert module is not None
    for view in ("layer:model.layers.1", module, "surprise"):
        page.select_option("#view", view)
        settled(page)
        expect(page.locator("#view")).to_have_value(view)
        assert state_of(page)["view"] == view
        seen.add(page.locator(colours[0]).evaluate_all(colours[1]))
    assert len(seen) == 4
    expect(page.locator("#legend")).to_contain_text("Negative log-probability")
    page.select_option("#view", "all")
    first = page.locator("#legend button").first
    first.click()
    expect(first).to_have_attribute("aria-pressed", "true")
    assert page.locator("#legend button").first.evaluate("button => button === document.activeElement")
    # an expert is switched off
    name = models["routed"].experts[1]
    page.select_option("#without", name)
    expect(page.locator("#totals")).to_contain_text(f"Without {name}")
    expect(page.locator("#view")).to_have_value("change")
    assert page.locator(".tokens .xworse, .tokens .xbetter").count() > 3
    page.locator(".tokens .t").nth(4).click()
    expect(page.locator("#detail")).to_contain_text(f"Most likely here without {name}")
    expect(page.locator("#detail")).to_contain_text("With all experts")
    page.go_back()
    expect(page.locator("#totals")).not_to_contain_text("Without")
    page.click("#leave")
    rows = page.locator("#costs tbody tr")
    expect(rows).to_have_count(3)
    page.get_by_role("button", name=f"Switch off {name}").click()
    expect(page.locator("#without")).to_have_value(name)
    expect(page.locator("#totals")).to_contain_text(f"Without {name}")


def test_a_gates_weights_are_drawn_along_the_text(page: Page) -> None:
    page.select_option("#model", "gated")
    look(page)
    expect(page.locator("#about")).to_contain_text("2 experts under the gate")
    expect(page.locator("#view")).to_have_value("gate")
    expect(page.get_by_role("img", name="Weights of the gate")).to_be_visible()
    assert page.locator("#course figure").first.locator("path").count() == 2
    page.locator("#course svg").first.click(position={"x": 300, "y": 20})
    assert page.evaluate("document.activeElement.classList.contains('t')")
    page.select_option("#without", "base")
    expect(page.locator("#detail")).to_contain_text("1.000")


def test_two_models_are_shown_side_by_side_and_on_400_pixels(page: Page) -> None:
    page.select_option("#beside", "gated")
    look(page)
    panes = page.locator(".tokens")
    expect(panes).to_have_count(3)
    for place in range(3):
        assert panes.nth(place).evaluate("box => box.textContent") == TEXT
    left, right = panes.nth(0).bounding_box(), panes.nth(1).bounding_box()
    assert left is not None
    assert right is not None
    assert abs(left["y"] - right["y"]) < 2
    assert left["x"] + left["width"] <= right["x"]
    expect(page.locator("#totals .difference")).to_be_visible()
    panes.nth(0).locator(".t").nth(3).click()
    assert panes.nth(2).locator(".at").count() == 1
    expect(page.locator("#detail")).to_contain_text(re.compile("predicts? it (better|alike)"))
    expect(page.locator("#detail .column")).to_have_count(2)
    page.set_viewport_size({"width": 400, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") <= 400


def test_a_view_is_shared_by_its_address(page: Page, served: Web, models: dict[str, OpenModel]) -> None:
    name = models["routed"].experts[0]
    look(page)
    page.select_option("#without", name)
    expect(page.locator("#view")).to_have_value("change")
    page.locator(".tokens .t").nth(6).click()
    address = page.url
    assert state_of(page) == {"model": "routed", "text": TEXT, "view": "change", "without": name, "at": "6"}
    page.goto("about:blank")
    page.goto(address)
    expect(page.locator("#without")).to_have_value(name)
    expect(page.locator("#text")).to_have_value(TEXT)
    expect(page.locator("#detail")).to_contain_text("token 6, id")


def test_a_text_is_generated_and_looked_at(page: Page) -> None:
    page.fill("#text", "the river")
    page.fill("#count", "8")
    page.fill("#seed", "3")
    page.click("#generate")
    expect(page.locator("#status")).to_have_text(re.compile("tokens in"))
    text = page.locator("#text").input_value()
    assert text.startswith("the river")
    assert len(text) > len("the river")
    shown = page.locator(".tokens").evaluate("box => box.textContent")
    assert shown == re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "\ufffd", text)
    assert page.locator(".t.made").count() == 1
    page.fill("#text", "the river")
    page.click("#generate")
    expect(page.locator("#text")).to_have_value(text)


def test_errors_are_said_in_words(page: Page) -> None:
    page.route("**/api/inspect", lambda route: route.abort())
    page.fill("#text", "x")
    page.click("#look")
    expect(page.get_by_role("alert")).to_have_text("The server does not answer. Is weftlm serve still running?")
    page.unroute("**/api/inspect")
    busy = {"error": {"message": "9 requests wait already; try again in 4 s", "type": "", "param": None, "code": ""}}
    page.route("**/api/inspect", lambda route: route.fulfill(status=429, json=busy, headers={"Retry-After": "4"}))
    page.click("#look")
    expect(page.get_by_role("alert")).to_have_text("9 requests wait already; try again in 4 s.")
    page.unroute("**/api/inspect")
    page.fill("#text", "")
    page.click("#look")
    expect(page.get_by_role("alert")).to_contain_text("The text is empty; type one, or generate one.")
    assert page.locator("#text").get_attribute("aria-invalid") == "true"
    look(page, "the river")
    expect(page.get_by_role("alert")).to_be_hidden()


def test_a_key_is_asked_for_only_when_the_server_wants_one(page: Page, browser: Browser, locked: Web) -> None:
    expect(page.locator("#unlock")).to_be_hidden()
    context = browser.new_context()
    other = context.new_page()
    other.goto(locked.address)
    expect(other.locator("#unlock")).to_be_visible()
    other.fill("#key", "wrong")
    other.keyboard.press("Enter")
    expect(other.get_by_role("alert")).to_contain_text("No valid API key came")
    other.fill("#key", KEY)
    other.keyboard.press("Enter")
    expect(other.locator("#model")).to_have_value("plain")
    expect(other.locator("#unlock")).to_be_hidden()
    look(other, "the river")
    assert json.loads(other.evaluate("JSON.stringify(sessionStorage)")) == {"weftlm-key": KEY}
    assert KEY not in other.url
    context.close()


def test_it_is_dark_or_light_as_wished(page: Page, browser: Browser, served: Web) -> None:
    ground = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(ground)
    page.click("#theme")
    dark = page.evaluate(ground)
    assert light == "rgb(255, 255, 255)"
    assert max(int(part) for part in re.findall(r"\d+", dark)) < 60
    page.reload()
    assert page.evaluate(ground) == dark
    context = browser.new_context(color_scheme="dark")
    other = context.new_page()
    other.goto(served.address)
    assert other.evaluate(ground) == dark
    context.close()
