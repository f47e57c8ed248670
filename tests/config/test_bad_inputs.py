"""Every bad input of the table gives its one problem, with all five parts, and its advice works."""

from __future__ import annotations

from pathlib import Path

import pytest
from bad_input_form import BadInput
from bad_inputs import BAD_INPUTS
from samples import small_recipe

from tptrain.config.overrides import apply_overrides
from tptrain.config.plan import Plan
from tptrain.config.planning import plan_recipe
from tptrain.config.recipe_file import load_recipe
from tptrain.errors import ProblemsError


def _plan(bad: BadInput, overrides: tuple[str, ...], tmp: Path) -> Plan:
    environ = {"HF_HOME": str(tmp / "hub"), **bad.environ}
    args = [override.replace("{tmp}", str(tmp)) for override in overrides]
    if bad.script is not None:
        script = tmp / "recipe.py"
        script.write_text(bad.script)
        return plan_recipe(apply_overrides(load_recipe(script), args), environ)
    return plan_recipe(apply_overrides(small_recipe(), args), environ)


@pytest.fixture(params=BAD_INPUTS, ids=lambda bad: bad.name.replace(" ", "_"))
def bad(request: pytest.FixtureRequest, tmp_path: Path) -> BadInput:
    given: BadInput = request.param
    for name, text in given.files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return given


def test_all_five_parts(bad: BadInput, tmp_path: Path) -> None:
    with pytest.raises(ProblemsError) as caught:
        _plan(bad, bad.overrides, tmp_path)
    problems = caught.value.problems
    assert len(problems) == bad.problems, caught.value
    matching = [p for p in problems if p.setting == bad.setting and bad.rule in p.rule]
    assert matching, caught.value
    problem = matching[0]
    assert str(problem.value) == str(bad.value).replace("{tmp}", str(tmp_path))
    assert bad.other.replace("{tmp}", str(tmp_path)) in problem.other
    assert bad.fix.replace("{tmp}", str(tmp_path)) in problem.fix


def test_advice_passes(bad: BadInput, tmp_path: Path) -> None:
    if bad.mended is not None:
        plan = _plan(bad, bad.mended, tmp_path)
        assert plan.num_devices >= 1


def test_names_are_unique() -> None:
    assert len({bad.name for bad in BAD_INPUTS}) == len(BAD_INPUTS) >= 60
