"""Several sources of records in a recipe: what is left out is as in `data`, and problems name the source."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path

import pytest
from samples import small_recipe

from tptrain.config import DataSection, SourceSection
from tptrain.config.help import render_help
from tptrain.config.mixing import problems_of_source, source_sections
from tptrain.config.overrides import apply_overrides
from tptrain.config.planning import plan_recipe
from tptrain.config.recipe_file import load_recipe
from tptrain.config.settings import source_settings
from tptrain.errors import Problem, ProblemsError
from tptrain.report.plan_page import plan_json, plan_page

TWO = (
    *("data.sources.web.path=web.jsonl", "data.sources.web.preset=chat", "data.sources.web.weight=2"),
    *("data.sources.code.path=code.jsonl", "data.sources.code.weight=0.5"),
)


def test_what_a_source_leaves_out_is_as_in_data() -> None:
    recipe = apply_overrides(small_recipe(), [*TWO, "data.mix=weights", "data.system_prompt=Be brief."])
    assert recipe.data.sources == {
        "web": SourceSection(path="web.jsonl", preset="chat", weight=2.0),
        "code": SourceSection(path="code.jsonl", weight=0.5),
    }
    alone = replace(recipe.data, sources={}, mix="concat")
    assert list(source_sections(recipe.data)) == ["code", "web"]
    assert source_sections(recipe.data) == {
        "web": replace(alone, path="web.jsonl", preset="chat"),
        "code": replace(alone, path="code.jsonl"),
    }


def test_every_setting_of_a_source_but_its_weight_is_one_of_data() -> None:
    own = {field.name for field in fields(SourceSection)}
    assert own - {field.name for field in fields(DataSection)} == {"weight"}


def test_one_source_is_the_section_itself() -> None:
    data = small_recipe().data
    assert source_sections(data) == {"": data}


def test_overrides_change_one_setting_and_leave_the_recipe_as_it_was() -> None:
    recipe = apply_overrides(small_recipe(), TWO)
    changed = apply_overrides(recipe, ["data.sources.web.weight=none", "data.sources.math.split=test"])
    assert changed.data.sources["web"] == SourceSection(path="web.jsonl", preset="chat")
    assert changed.data.sources["math"] == SourceSection(split="test")
    assert changed.data.sources["code"] == recipe.data.sources["code"]
    assert recipe.data.sources["web"].weight == 2.0 and "math" not in recipe.data.sources
    assert apply_overrides(recipe, ["data.sources=none"]).data.sources == {}


def test_sources_that_are_taken_away_and_given_anew() -> None:
    recipe = apply_overrides(small_recipe(), TWO)
    given = apply_overrides(recipe, ["data.sources=none", "data.sources.math.path=m.jsonl"])
    assert given.data.sources == {"math": SourceSection(path="m.jsonl")}


def test_the_plan_tells_of_every_source() -> None:
    plan = plan_recipe(apply_overrides(small_recipe(), [*TWO, "data.mix=weights"]))
    sentence = "Data: code from code.jsonl (gsm8k), web from web.jsonl (chat); rows by weight, seed 0."
    assert sentence in plan_page(plan)
    told = json.loads(json.dumps(plan_json(plan)))["recipe"]["data.sources"]
    assert told["web"] == {"path": "web.jsonl", "preset": "chat", "weight": 2.0}


def test_help_lists_the_settings_of_a_source_and_those_given() -> None:
    page = render_help(apply_overrides(small_recipe(), TWO), "python recipes/small.py")
    for setting in source_settings("NAME").values():
        assert f"\n  {setting.path}=none" in page
        assert setting.meaning.endswith(".") and setting.meaning in " ".join(page.split())
    assert 'web={"path": "web.jsonl", "preset": "chat", "weight": 2.0}' in " ".join(page.split())
    assert max(len(line) for line in page.splitlines()) <= 100


def test_settings_without_effect_are_told() -> None:
    notices = plan_recipe(apply_overrides(small_recipe(), [*TWO, "data.mix_temperature=3"])).notices
    for told in (
        "data.sources.web.weight=2 has no effect with data.mix=concat.",
        "data.mix_temperature=3 has no effect with data.mix=concat.",
        "data.path=train.jsonl has no effect with a path for each of data.sources.",
    ):
        assert told in notices
    assert not any("weight" in notice for notice in plan_recipe(small_recipe()).notices)


@pytest.mark.parametrize(
    ("given", "setting", "rule"),
    [
        ("SourceSection(weight=-1)", "data.sources.NAME.weight", "must be above 0"),
        ("SourceSection(pth='a')", "data.sources.NAME.pth", "is not a known setting"),
        ("'a.jsonl'", "data.sources.web", "must be a SourceSection"),
        ("{'weight': -1}", "data.sources.web.weight", "must be above 0"),
    ],
)
def test_a_recipe_script_that_gives_a_source_wrongly(
    given: str, setting: str, rule: str, tmp_path: Path
) -> None:
    script = tmp_path / "mine.py"
    script.write_text(
        "from tptrain.config import DataSection, Recipe, SourceSection\n"
        f"RECIPE = Recipe(name='a', data=DataSection(sources={{'web': {given}}}))\n"
    )
    with pytest.raises(ProblemsError) as caught:
        load_recipe(script)
    (problem,) = caught.value.problems
    assert problem.setting == setting and rule in problem.rule
    assert "mine.py:2" in problem.other and problem.fix


def test_problems_of_a_source_name_its_settings() -> None:
    of_records = Problem("data.prompt_column", "q", "must be a column", "columns: text", "data.preset=chat")
    whole = Problem("data.validation", 0.5, "must leave records", "3 records", "a smaller share")
    first, second = problems_of_source([of_records, whole], "web")
    assert (first.setting, first.fix) == ("data.sources.web.prompt_column", "data.sources.web.preset=chat")
    assert (second.setting, second.other) == ("data.validation", "3 records; source web")
    assert problems_of_source([of_records, whole], "") == [of_records, whole]
