"""Every bad input of the data package gives one problem with all five parts."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.data.bad_inputs import BAD_INPUTS, BadInput
from tptrain.errors import ProblemsError


@pytest.mark.parametrize("bad", BAD_INPUTS, ids=lambda bad: bad.name)
def test_bad_input_has_five_parts(bad: BadInput, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ProblemsError) as caught:
        bad.trigger(tmp_path)
    (problem,) = caught.value.problems
    assert problem.setting == bad.setting
    assert str(problem.value).endswith(bad.value)
    assert bad.rule in problem.rule
    assert bad.other in problem.other
    assert problem.other
    assert bad.fix in problem.fix


def test_problems_of_held_out_records_are_named_after_their_section(tmp_path: Path) -> None:
    from tptrain.data.sources import load_records

    with pytest.raises(ProblemsError) as caught:
        load_records(str(tmp_path / "test.jsonl"), None, "test", None, "eval.path")
    assert caught.value.problems[0].setting == "eval.path"
    with pytest.raises(ProblemsError) as caught:
        load_records("builtin:word_problems", None, "tset", None, "eval.path")
    assert caught.value.problems[0].setting == "eval.split"


def test_names_are_unique() -> None:
    assert len({bad.name for bad in BAD_INPUTS}) == len(BAD_INPUTS)
