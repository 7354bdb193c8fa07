"""The scripts that write documents from code and records."""

import json
from pathlib import Path
from typing import Literal

import pytest
from pydantic import Field, PositiveInt

from weftlm.config import Section


class Inner(Section):
    """What is inside.

    Attributes:
        depth: how deep, told
            over two lines.
    """

    depth: PositiveInt = 3


class Outer(Section):
    """What is outside.

    More about it.
    """

    kind: Literal["a", "b"] = Field("a", description="one | two")
    inner: Inner = Field(default_factory=Inner, description="the inside")
    many: list[Inner] = Field(description="several")


@pytest.fixture
def reference(load_script):
    return load_script("docs/generate_reference.py")


@pytest.fixture
def tables(load_script, tmp_path, monkeypatch):
    module = load_script("docs/benchmark_table.py")
    (tmp_path / "docs").mkdir()
    (tmp_path / "results").mkdir()
    for name in ("README.md", "docs/benchmarks.md"):
        (tmp_path / name).write_text(f"before\n\n{module.BEGIN}\n{module.END}\n\nafter\n")
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(module, "RESULTS", tmp_path / "results")
    monkeypatch.setattr("sys.argv", ["benchmark_table.py"])
    return module


def test_sections_become_tables_of_their_keys_and_a_key_without_description_is_an_error(reference):
    assert reference.section_body(Outer, "outer") == [
        "What is outside.",
        "",
        "| key | type | default | meaning |",
        "| --- | --- | --- | --- |",
        "| `kind` | `a`, `b` | `a` | one \\| two |",
        "| `inner` | section |  | the inside |",
        "| `many` | list of section | required | several |",
    ]

    assert reference.section_body(Inner, "inner", introduce=False)[-1] == (
        "| `depth` | integer > 0 | `3` | how deep, told over two lines |"
    )
    assert [place for place, _ in reference.sections(Outer, "")] == ["", "inner", "many[]"]

    class Silent(Section):
        """Says nothing of its key."""

        key: int = 1

    with pytest.raises(reference.UndocumentedError, match="silent: key"):
        reference.section_body(Silent, "silent")


def spread(median: float) -> dict[str, float]:
    return {"median": median, "low": median - 0.1, "high": median + 0.1, "n": 3}


COMPARISON = {
    "parameters": 450_000,
    "settings": {
        "64 clusters, 5 target documents": {"uniform": {"margin": spread(0.3)}, "importance": {"margin": spread(-0.2)}}
    },
}


def record(folder: Path, theme: str, value: object) -> None:
    (folder / f"results/{theme}.json").write_text(json.dumps(value))
    (folder / f"results/{theme}.md").write_text("# Title\n\n## Details\n\ntext\n")


def test_headline_figures_become_rows_and_pages_follow(tables, tmp_path):
    record(tmp_path, "dga_few_examples", COMPARISON)
    record(tmp_path, "dga_few_examples.dev", COMPARISON)
    record(tmp_path, "novel_thing", {})
    assert tables.main() == 0
    readme = (tmp_path / "README.md").read_text()
    margins = "uniform +0.300 (+0.200 .. +0.400); importance -0.200 (-0.300 .. -0.100)"
    links = "[script](benchmarks/dga_few_examples.py), [page](docs/benchmarks/dga_few_examples.md)"
    assert f"5 target documents, 0.5M parameters | {margins} | all above 0 | {links} |" in readme
    links = "[script](benchmarks/novel_thing.py), [page](docs/benchmarks/novel_thing.md)"
    assert f"| novel thing | see its page |  | {links} |" in readme
    assert ".dev" not in readme
    index = (tmp_path / "docs/benchmarks.md").read_text()
    assert "| [novel_thing](benchmarks/novel_thing.md) |" in index
    assert index.startswith("before\n")
    assert index.endswith("after\n")
    page = (tmp_path / "docs/benchmarks/dga_few_examples.md").read_text()
    assert page.startswith("# Title\n")
    assert page.endswith("## Details\n\ntext\n")
    assert margins in page


def test_the_readme_has_the_chosen_rows_and_the_page_all_of_them(tables, tmp_path):
    overhead = {"shadow on the batch": {"64": {"100": spread(0.01), "1": spread(0.4)}}}
    sizes = {
        size: {"parameters": size, "overhead": overhead, "error": {"float32": {"shadow on the batch": spread(1.0)}}}
        for size in (400_000, 1_300_000)
    }
    record(tmp_path, "alignment_cost", {"sizes": sizes})
    assert tables.main() == 0
    readme, page = ((tmp_path / name).read_text() for name in ("README.md", "docs/benchmarks/alignment_cost.md"))
    rows = [f"T_r = {every}, {size}M parameters" for every in (1, 100) for size in (0.4, 1.3)]
    assert [row in readme for row in rows] == [False, False, False, True]
    assert all(row in page for row in rows)


def test_every_recorded_benchmark_has_the_figures_its_rows_name(load_script):
    module = load_script("docs/benchmark_table.py")
    rows = [row for theme, value in module.records().items() for row in module.headlines(theme, value)]
    assert all(row.figure and row.measured for row in rows)
    assert 8 <= sum(row.chosen for row in rows) <= 12


def test_a_changed_record_makes_the_table_stale_and_writing_mends_it(tables, tmp_path, monkeypatch, capsys):
    assert tables.main() == 0
    monkeypatch.setattr("sys.argv", ["benchmark_table.py", "--check"])
    assert tables.main() == 0
    record(tmp_path, "a", {})
    assert tables.main() == 1
    assert "README.md" in capsys.readouterr().err
    monkeypatch.setattr("sys.argv", ["benchmark_table.py"])
    assert tables.main() == 0
    monkeypatch.setattr("sys.argv", ["benchmark_table.py", "--check"])
    assert tables.main() == 0


@pytest.mark.parametrize(
    ("section", "name", "row", "problem"),
    [
        (None, "", {}, None),
        ("mixture", "importance", None, "mixture lacks importance"),
        ("mixture", "dga", {"generic": {"bits_per_byte": float("nan")}}, "mixture.dga.mean is nan"),
        ("mixture", "dga", {"sets": {}}, "mixture.dga has 1 sets"),
        ("routing", "arrow", None, "routing lacks arrow"),
        ("routing", "base", {"generic": {"bits_per_byte": 20.0}}, "routing.base.mean is 20.0 bits per byte"),
        ("robust", "fixed share", None, "robust lacks fixed share"),
        ("robust", "bayes", {"worst": -9.0}, "robust.bayes is -9.0"),
        ("certificate", "z", {"value": 0.0}, "Z is 0.0"),
        ("certificate", "capacity", {"value": -0.1}, "the capacity is -0.1"),
        ("page", "", "<html><script src='https://example.org/x.js'></script></html>", "report.html loads"),
        ("page", "", "<html>", "report.html is cut off"),
    ],
)
def test_what_is_wrong_with_a_demonstration_is_found(load_script, tmp_path, section, name, row, problem):
    bits = {"bits_per_byte": 2.0}
    measured = {"generic": bits, "sets": dict.fromkeys("abcdef", bits)}
    routers = "base merged retrieval average-activation arrow phatgoose prefix blend oracle".split()
    gates = ("monolith", "uniform", "bayes", "fixed share", "robust", "student")
    summary = {
        "mixture": {each: dict(measured) for each in ("uniform", "importance", "dga")},
        "routing": {each: dict(measured) for each in routers},
        "robust": {each: {"worst": 0.1} for each in gates},
        "certificate": {"capacity": {"value": 0.02}, "z": {"value": 1.01}},
    }
    page = "<html><img src='data:,'></html>"
    if section == "page":
        page = row
    elif row is None:
        del summary[section][name]
    elif section is not None:
        summary[section][name] |= row
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    (tmp_path / "report.html").write_text(page)
    found = load_script(".ci/check_demo.py").problems(tmp_path)
    assert found == [] if problem is None else any(line.startswith(problem) for line in found)
