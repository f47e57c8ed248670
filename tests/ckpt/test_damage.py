"""Every damage to a step is found, named, and costs no more than that step."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.ckpt.conftest import Run
from tools.bench.damages import DAMAGES, WEIGHTS, flip
from tptrain.ckpt.digests import MANIFEST
from tptrain.ckpt.reading import StepReader
from tptrain.ckpt.restoring import restore_part
from tptrain.ckpt.steps import PARAMS, saved_steps
from tptrain.errors import ProblemsError
from tptrain.family import stored_rows


def test_an_intact_run_restores_its_newest_step(copied: Callable[[], Run]) -> None:
    run = copied()
    run.assert_is_step(run.restore(), 20)
    run.assert_is_step(run.restore(10), 10)
    assert run.lines == []


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_step_is_set_aside_and_the_one_before_is_used(name: str, copied: Callable[[], Run]) -> None:
    run = copied()
    file = DAMAGES[name](run.folder / "20")
    run.assert_is_step(run.restore(), 10)
    assert file in run.lines[0] and "20.damaged-1" in run.lines[0], run.lines
    assert "step 10" in run.lines[1] and "10 steps are lost" in run.lines[1]
    assert saved_steps(run.folder) == [10]
    assert (run.folder / "20.damaged-1" / PARAMS).is_dir(), "nothing of it is lost"


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_step_that_was_asked_for_is_refused_by_name(name: str, copied: Callable[[], Run]) -> None:
    """Asked for by its number, it is neither replaced by another one nor renamed."""
    run = copied()
    file = DAMAGES[name](run.folder / "20")
    for unverified in (False, True):
        with pytest.raises(ProblemsError) as error:
            run.restore(20, unverified)
        assert file in str(error.value) and "resume=" in str(error.value)
    assert saved_steps(run.folder) == [10, 20]


def test_a_step_without_a_manifest_is_passed_over_unless_told(copied: Callable[[], Run]) -> None:
    run = copied()
    (run.folder / "20" / MANIFEST).unlink()
    run.assert_is_step(run.restore(), 10)
    assert MANIFEST in run.lines[0] and "--unverified" in run.lines[0]
    run.assert_is_step(run.restore(unverified=True), 20)
    with pytest.raises(ProblemsError, match=r"steps in .*: 10"):
        run.restore(20)
    run.assert_is_step(run.restore(20, unverified=True), 20)


def test_two_damaged_steps_leave_nothing_to_go_on_from(copied: Callable[[], Run]) -> None:
    run = copied()
    for step in ("10", "20"):
        flip(WEIGHTS, 0.3, 5)(run.folder / step)
    with pytest.raises(ProblemsError, match="must find a step that is intact"):
        run.restore()
    names = {path.name for path in run.folder.iterdir()}
    assert names == {"10.damaged-1", "20.damaged-1"}


def test_a_second_damaged_step_of_that_number_has_a_name_of_its_own(copied: Callable[[], Run]) -> None:
    run = copied()
    flip(WEIGHTS, 0.3, 5)(run.folder / "20")
    run.restore()
    run.save(20)
    run.assert_is_step(run.restore(), 20)
    flip(WEIGHTS, 0.3, 5)(run.folder / "20")
    run.restore()
    assert (run.folder / "20.damaged-2").is_dir()


def test_readers_of_weights_refuse_what_they_would_read(copied: Callable[[], Run]) -> None:
    """An export and `model.pretrained` read the weights alone: a damaged moment is not their concern."""
    run = copied()
    rows = {row.name: row for row in stored_rows(run.plan.table)}
    damaged = rows["model.layers.1.mlp.up_proj.weight"]
    flip("nu/lm_head.weight/0.0", 0.5, 1)(run.folder / "20")
    restore_part(run.plan, run.backend, run.folder / "20", PARAMS, "model.pretrained")
    reader = StepReader(run.folder / "20")
    reader.read(damaged)
    flip(WEIGHTS, 0.5, 1)(run.folder / "20")
    with pytest.raises(ProblemsError, match=rf"model.pretrained=.*{WEIGHTS}"):
        restore_part(run.plan, run.backend, run.folder / "20", PARAMS, "model.pretrained")
    with pytest.raises(ProblemsError, match=WEIGHTS):
        reader.read(damaged)
    with pytest.raises(ProblemsError, match=WEIGHTS):
        list(reader.read_blocks(damaged))
    reader.read(rows["model.norm.weight"])
