"""The table of methods names every registered method, and no other."""

import dataclasses
import shutil

import pytest


@pytest.fixture
def table(load_script, root, tmp_path, monkeypatch):
    module = load_script("docs/methods_table.py")
    shutil.copy(root / "docs" / "methods.md", tmp_path)
    monkeypatch.setattr(module, "FOLDER", tmp_path)
    monkeypatch.setattr("sys.argv", ["methods_table.py", "--check"])
    return module


def test_the_page_is_current_and_has_a_row_for_every_method(table, root):
    assert table.main() == 0
    page = (root / "docs/methods.md").read_text(encoding="utf-8")
    for kind, registry in table.REGISTRIES.items():
        part = page.split(f"<!-- {kind}: begin")[1].split(f"<!-- {kind}: end")[0]
        rows = [line.split(" | ") for line in part.splitlines() if line.startswith("| `")]
        assert [row[0].strip("| `") for row in rows] == list(registry)
        assert all((root / "src/weftlm" / row[-1].strip("| `")).exists() for row in rows)


def test_needs_are_those_the_classes_declare(table):
    assert table.needs_of("policies", "uniform") == "nothing"
    assert table.needs_of("policies", "doremi") == "the domains' training losses; a reference model"
    assert table.needs_of("routers", "phatgoose") == "its gate"
    assert table.needs_of("routers", "blend") == "its gate; its statistics; a decoder-only model"
    assert table.needs_of("gates", "linear") == "features of whole sequences"


def test_changed_words_make_the_page_stale_and_writing_mends_it(table, capsys, monkeypatch):
    entry = table.REGISTRIES["gates"].entry("linear")
    changed = {"linear": dataclasses.replace(entry, does="something else")}
    monkeypatch.setattr(table.REGISTRIES["gates"], "_entries", table.REGISTRIES["gates"]._entries | changed)
    assert table.main() == 1
    assert "stale: docs/methods.md" in capsys.readouterr().err
    monkeypatch.setattr("sys.argv", ["methods_table.py"])
    assert table.main() == 0
    assert "| something else |" in (table.FOLDER / "methods.md").read_text(encoding="utf-8")
    monkeypatch.setattr("sys.argv", ["methods_table.py", "--check"])
    assert table.main() == 0
