"""Every bad input gives one problem with all five parts, and leaves nothing half-written."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors import SafetensorError, safe_open

from tests.weights.bad_checkpoints import BAD_CHECKPOINTS
from tests.weights.bad_files import BAD_FILES
from tests.weights.bad_headers import BAD_HEADERS, BadHeader
from tests.weights.bad_input import BadInput
from tests.weights.bad_inputs import BAD_INPUTS
from tptrain.errors import ProblemsError

ALL = [*BAD_INPUTS, *BAD_CHECKPOINTS, *BAD_FILES, *(header.bad_input() for header in BAD_HEADERS)]


@pytest.mark.parametrize("bad", ALL, ids=lambda bad: bad.name)
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
    assert len({bad.name for bad in ALL}) == len(ALL)


@pytest.mark.parametrize("header", BAD_HEADERS, ids=lambda header: header.name)
def test_what_the_library_checks_by_itself_is_known(header: BadHeader, tmp_path: Path) -> None:
    """So that a check is ours where the library has none, and is found missing if the library drops one."""
    path = tmp_path / "model.safetensors"
    path.write_bytes(header.content)
    try:
        safe_open(path, framework="pt")
    except SafetensorError:
        assert not header.library_takes
    else:
        assert header.library_takes
