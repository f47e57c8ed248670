"""Every bad input gives one problem with all five parts, and leaves nothing half-written."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.weights.bad_inputs import BAD_INPUTS, BadInput
from tptrain.errors import ProblemsError


@pytest.mark.parametrize("bad", BAD_INPUTS, ids=lambda bad: bad.name)
def test_bad_input_has_five_parts(bad: BadInput, tmp_path: Path) -> None:
    with pytest.raises(ProblemsError) as caught:
        bad.trigger(tmp_path)
    assert len(caught.value.problems) == 1
    problem = caught.value.problems[0]
    assert problem.setting == bad.setting
    assert str(problem.value).endswith(bad.value)
    assert bad.rule in problem.rule
    assert bad.other in problem.other
    assert bad.fix in problem.fix
    assert not list(tmp_path.glob("*.partial-*"))


def test_names_are_unique() -> None:
    assert len({bad.name for bad in BAD_INPUTS}) == len(BAD_INPUTS)
