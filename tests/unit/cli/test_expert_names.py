"""An expert goes by its name and by its domain's label, whichever command or setting names it."""

from __future__ import annotations

from dataclasses import replace

import pytest
from support.command_line import Call
from support.experts import llama, make_expert

from weftlm.corpora.labels import folder_name
from weftlm.experts.expert import BaseReference
from weftlm.experts.library import ExpertLibrary
from weftlm.gating.config import ExpertSource
from weftlm.pipeline.stages.gate import GatingConfig
from weftlm.routing.config import parse_router, router_config

LABEL, NAME = "c++", "c%2B%2B"
FORMS = [LABEL, NAME]


@pytest.fixture
def library(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = llama()
    model.save_pretrained("base")
    base = BaseReference(str(tmp_path / "base"))
    made = ExpertLibrary.open(tmp_path / "library", base)
    experts = [make_expert(model, name, seed=seed) for seed, name in enumerate((NAME, "law"))]
    made.add(*(replace(expert, lora=replace(expert.lora, base=base)) for expert in experts))
    return made


COMMANDS = {
    "show": ["experts", "show", "library", "{}"],
    "remove": ["experts", "remove", "library", "{}"],
    "export": ["export", "library", "--format", "peft", "--expert", "{}", "--output", "new"],
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("command", COMMANDS)
def test_commands_take_both_forms(command, form, library, capsys):
    call = Call(capsys)
    call(*(word.format(form) for word in COMMANDS[command]))
    assert (command == "remove") == (NAME not in library.names)
    assert "no expert 'c--'" in call(*(word.format("c--") for word in COMMANDS[command]), code=1)


@pytest.mark.parametrize("form", FORMS)
def test_settings_take_both_forms_and_are_the_same(form):
    assert GatingConfig.model_validate({"experts": [form]}).experts == [NAME]
    assert ExpertSource(name="x", library="l", expert=form).expert == NAME
    assert router_config({"router": "single", "expert": form}).expert == NAME
    assert router_config(parse_router(f"single:expert={form}")).expert == NAME
    assert router_config({"router": "merged", "weights": {form: 1.0}}).weights == {NAME: 1.0}


@pytest.mark.parametrize("form", FORMS)
def test_a_library_knows_both_forms(form, library):
    assert library.named(form) == folder_name(LABEL) == NAME
