"""The page, read as a browser or a screen reader would."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.blocks import Html
from support.gates import certificate, fit, rows

from weftlm.errors import ConfigError, DataError
from weftlm.reporting.gating import GatingFacts
from weftlm.reporting.page import Page, render_page, write_page
from weftlm.reporting.report import report_page
from weftlm.reporting.score_table import model_table
from weftlm.reporting.traces import RoutingFacts
from weftlm.routing.trace import Trace


def page_of(runs: list[Path], **options: Any) -> Html:
    return Html(render_page(report_page(runs, **options)))


@pytest.fixture(scope="module")
def three(three_runs: list[Path]) -> tuple[Html, str]:
    text = render_page(report_page(three_runs))
    return Html(text), text


def results_of(runs: list[Path]) -> dict[str, dict[str, Any]]:
    return {folder.name: json.loads((folder / "result.json").read_text()) for folder in runs}


def row_of(page: Html, caption: str, name: str) -> list[tuple[str, list[float]]]:
    return next(cells for label, cells in page.rows(caption).items() if label.startswith(name))


def test_every_number_of_the_summary_is_the_runs(three_runs: list[Path], three: tuple[Html, str]) -> None:
    results = results_of(three_runs)
    base = results["uniform"]
    for name, result in results.items():
        cells = row_of(three[0], "Held-out bits per byte by run, in windows of 256 tokens", name)[:2]
        for (text, values), pick in zip(
            cells, (lambda one: one["sets"]["target"], lambda one: one["generic"]), strict=True
        ):
            score = pick(result)
            assert values[:2] == [score["bits_per_byte"], score["bits_per_byte_se"]]
            assert text.startswith(f"{values[0]:.3f}")
            if name != "uniform":
                difference = score["bits_per_byte"] - pick(base)["bits_per_byte"]
                assert values[2] == pytest.approx(difference, abs=1e-12)
                assert 0 < values[3] < 0.01
        tokens, steps, train, alignment, _ = row_of(three[0], "Cost", name)
        assert tokens == ("3.28M", [result["train_tokens"]])
        assert steps[1] == [800]
        assert train == ("1m 47s", [result["seconds"]["train"]])
        assert alignment[1] == [result["seconds"]["alignment"]]
    rows = three[0].rows("Held-out bits per byte by run")
    assert [name for name, cells in rows.items() if "(lowest)" in cells[0][0]] == ["dga"]


def test_the_tables_by_domain_hold_losses_and_weights(three_runs: list[Path], three: tuple[Html, str]) -> None:
    losses, weights = three[0].rows("The same values"), three[0].rows("Final mixture weight")
    for position, result in enumerate(results_of(three_runs).values()):
        for name, weight in result["weights"].items():
            expected = result["sets"][name]
            assert losses[name][position][1][:2] == [expected["bits_per_byte"], expected["bits_per_byte_se"]]
            assert weights[name][position] == (f"{weight:.1%}1.5 passes", [weight, 1.5])


def test_recipes_are_shown_and_compared(three: tuple[Html, str]) -> None:
    page, policies = three[0], ["uniform", "importance", "dga"]
    rows = page.rows("Where the settings and environments of the runs differ")
    assert [text for text, _ in rows["mixture.policy"]] == policies
    assert [text for text, _ in rows["mixture.eta"]] == ["–", "–", "5.0"]
    assert "training.lr" not in rows
    assert [text for text, _ in rows["fingerprints.run"]] == policies
    assert "batch_sequences: 16" in page.text
    shared = page.rows("Settings, versions and fingerprints of every run")
    assert shared["packages.torch"][0][0] == "2.13.0"
    assert shared["runtime.precision"][0][0] == "fp32 no fast bf16 here"


def test_a_project_page_opens_with_its_best_model_and_has_a_section_for_everything(
    tmp_path: Path, make_run: Callable[..., Path]
) -> None:
    sets = {name: {"documents": 3, "bytes": 5000, "train_tokens": n} for name, n in (("a", 1200), ("<b>", 3_400_000))}
    prepared = {"fingerprint": "f00d", "vocab_size": 4096, "sets": sets, "warnings": ["<b> is small"]}
    models = model_table(
        {
            name: {"role": role, "sets": {"a": {"bits_per_byte": value}}, "path": name}
            for name, role, value in (("base", "base", 2.0), ("routed", "router", 1.5))
        },
        "model",
        128,
    )
    trace = ("a text", Trace((7,), ("a", "b"), ("l.0.up",), torch.tensor([[[0.75, 0.25]]])), ["x"])
    gating = GatingFacts(certificate(), fit(), rows())
    facts = {"prepared": prepared, "models": models, "routing": RoutingFacts(models, 1.2, [trace]), "gating": gating}
    text = render_page(report_page([make_run(tmp_path / "run", "dga", ["a"])], **facts))
    assert text.index('<p class="headline">routed: 1.500') < text.index('class="answer"') < text.index("<nav")
    page = Html(text)
    assert "Mixtures alone: dga: 1.7" in page.text, "the mixtures' finding follows"
    assert page.rows("Prepared sets")["<b>"][2] == ("3.40M", [3_400_000.0])
    assert page.rows("Other facts of the prepared data")["vocab_size"][0][0] == "4096"
    assert "<b> is small" in page.text
    assert ".tokens {" in page.styles
    links = [str(attributes["href"])[1:] for tag, attributes in page.elements if tag == "a"]
    parts = "summary models mixture alignment training routing gating data recipe reading"
    assert links == parts.split()


def test_the_page_needs_nothing_from_elsewhere(three: tuple[Html, str]) -> None:
    page, text = three
    assert "://" not in text
    assert ".tokens {" not in page.styles
    assert "//" not in page.styles.replace("*/", "")
    assert "@import" not in page.styles
    assert "url(" not in page.styles
    assert page.count("script") == 1, "the theme's alone"
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"link", "img", "iframe", "object", "embed", "base", "foreignobject"}
    for tag, attributes in page.elements:
        assert not any(name.startswith("on") for name in attributes), (tag, attributes)
        assert "src" not in attributes
        assert str(attributes.get("href", "#")).startswith("#")


def test_anchors_fit_charts_speak_and_headers_have_a_scope(three: tuple[Html, str]) -> None:
    page = three[0]
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    links = {str(attributes["href"])[1:] for tag, attributes in page.elements if tag == "a"}
    assert len(links) == 6
    assert links | {str(a["aria-labelledby"]) for _, a in page.elements if "aria-labelledby" in a} <= set(ids)
    charts = [attributes for tag, attributes in page.elements if tag == "svg"]
    assert len(charts) == page.count("figcaption") == 3
    assert all(chart["role"] == "img" and len(str(chart["aria-label"])) > 30 for chart in charts)
    assert all(attributes.get("scope") for tag, attributes in page.elements if tag == "th")
    assert page.count("table") == page.count("caption") == len(page.tables)
    assert ("html", {"lang": "en"}) in page.elements


def test_the_same_runs_give_the_same_bytes(three_runs: list[Path], three: tuple[Html, str], tmp_path: Path) -> None:
    written = write_page(report_page([str(run) for run in three_runs]), tmp_path / "a" / "one.html")
    assert written.read_text(encoding="utf-8") == three[1]
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["one.html"]


HOSTILE = "<script>alert(1)</script>"
ODD = ['"><img src=x onerror=alert(1)>', "a & b", "$x_1$ {{}} ${title} $title", "名前 🧵", "']]>", "b\x00\nc"]


def test_names_are_text_whatever_they_hold(tmp_path: Path, make_run: Callable[..., Path]) -> None:
    names = [HOSTILE, *ODD]
    folder = make_run(tmp_path / HOSTILE.replace("/", "_"), "dga", names, stop=100)
    other = make_run(tmp_path / "$title", HOSTILE, names[:2], stop=100)
    recipe = other / "recipe.yaml"
    recipe.write_text(recipe.read_text() + "\n# <script>alert(2)</script>\n")
    page = page_of([folder, other], title=f"{HOSTILE} & $style")
    assert page.count("script") == 1, "the theme's alone"
    assert page.count("img") == 0
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    shown = (HOSTILE, f"{HOSTILE} & $style", "<script>alert(2)</script>", ODD[2], r"b\x00\nc")
    assert [one for one in shown if one not in page.text] == []


def test_a_running_run_beside_a_finished_one(tmp_path: Path, make_run: Callable[..., Path]) -> None:
    done, running = make_run(tmp_path / "u", "uniform", ["a"]), make_run(tmp_path / "d", "dga", ["a"], stop=430)
    metrics = running / "metrics.jsonl"
    metrics.write_bytes(metrics.read_bytes()[:-40])
    page = page_of([done, running])
    assert "not finished, step 4" in page.text
    assert "Not finished: dga; latest numbers shown." in page.text
    assert "lines of metrics.jsonl cannot be read and are left out" in page.text
    last = [json.loads(line) for line in metrics.read_text().splitlines()[:-1] if '"kind": "eval"' in line][-1]
    assert row_of(page, "Held-out", "dga")[0][1][0] == last["sets"]["target"]["bits_per_byte"]
    assert row_of(page, "Cost", "dga")[2][0] == "–"


def test_a_run_that_has_only_started_and_an_empty_folder_still_give_a_page(
    tmp_path: Path, make_run: Callable[..., Path]
) -> None:
    assert "bits per byte on the target" in page_of([make_run(tmp_path / "started", "dga", stop=0)]).text
    (tmp_path / "run").mkdir()
    page = page_of([tmp_path / "run"])
    assert "Nothing was measured on held-out text." in page.text
    assert "metrics.jsonl cannot be read" in page.text


def test_null_and_nan_are_dashes_and_gaps(tmp_path: Path, make_run: Callable[..., Path]) -> None:
    folder = make_run(tmp_path / "run", "dga", ["a", "b"])
    result = json.loads((folder / "result.json").read_text())
    result["sets"]["a"] |= {"bits_per_byte": None, "bits_per_byte_se": None}
    result["weights"]["a"], result["epochs"]["a"] = math.nan, math.inf
    (folder / "result.json").write_text(json.dumps(result))
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for line in lines[::3]:
        for key, value in line.items():
            if isinstance(value, float):
                line[key] = math.nan
            elif isinstance(value, dict):
                line[key] = dict.fromkeys(value, None)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = page_of([folder])
    assert row_of(page, "Held-out", "dga")[2] == ("–", [])
    assert page.rows("Final mixture weight")["a"] == [("–", [])]
    assert "nan" not in page.text.lower()


def test_many_domains_are_gathered_and_said(tmp_path: Path, make_run: Callable[..., Path]) -> None:
    names = [f"cluster-{i:02d}" for i in range(64)]
    text = render_page(report_page([make_run(tmp_path / "dga", "dga", names)]))
    page = Html(text)
    assert "the other 55 are added up" in page.text
    assert "All 64 one by one" in page.text
    assert set(names) <= set(page.rows("The same values"))
    assert len(text) < 600_000


def test_mistakes_are_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="at least one run folder"):
        report_page([])
    with pytest.raises(DataError, match="is not a run folder"):
        report_page([tmp_path / "none"])
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match="cannot be written"):
        write_page(Page("title", "kicker", "headline", []), tmp_path / "file" / "r.html")


def test_repeated_runs_are_shown_as_means_and_one_by_one(tmp_path: Path, make_run: Callable[..., Path]) -> None:
    folders = [
        make_run(tmp_path / f"{policy}-{seed}", policy, ["a", "b"], seed=seed, target_bits=level + 0.01 * seed)
        for policy, level in (("uniform", 1.9), ("dga", 1.8))
        for seed in range(2)
    ]
    page, results = page_of(folders), results_of(folders)
    means = "Held-out bits per byte by mixture, means over runs"
    for policy in ("uniform", "dga"):
        pair = [results[f"{policy}-{seed}"]["sets"]["target"]["bits_per_byte"] for seed in range(2)]
        assert row_of(page, means, policy)[0][1][:2] == pytest.approx([sum(pair) / 2, (pair[1] - pair[0]) / 2])
        assert any(label == f"{policy}2 runs" or label.startswith(policy) for label in page.rows(means))
    for name, result in results.items():
        cells = row_of(page, "Held-out bits per byte by run", name)
        assert cells[0][1][0] == result["sets"]["target"]["bits_per_byte"]
