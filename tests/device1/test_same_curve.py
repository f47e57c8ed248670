"""Training on one device gives the curve of an independent trainer, on either backend."""

import pytest

from tests.curves import journal_losses, reference_losses
from tests.small_run import small_recipe
from tptrain.config.planning import plan_recipe
from tptrain.train.journal import read_journal
from tptrain.train.run import train

STEPS = 20


@pytest.fixture(scope="module")
def reference(pretrained, records, tmp_path_factory):
    plan = plan_recipe(small_recipe(pretrained, records, tmp_path_factory.mktemp("none"), topology="cpu-1"))
    return reference_losses(plan, STEPS, STEPS)


@pytest.mark.parametrize("backend", ["xla", "torch"])
def test_first_20_losses_equal_those_of_transformers(pretrained, records, reference, tmp_path, backend):
    plan = plan_recipe(small_recipe(pretrained, records, tmp_path / "run", topology="cpu-1", backend=backend))
    train(plan)
    assert journal_losses(tmp_path / "run") == pytest.approx(reference, rel=1e-4)


def test_the_step_is_compiled_once(pretrained, records, tmp_path):
    train(plan_recipe(small_recipe(pretrained, records, tmp_path / "run", topology="cpu-1")))
    journal = read_journal(tmp_path / "run" / "journal.jsonl")
    assert len({record.compiles for record in journal}) == 1
    assert journal[0].compiles > 0
    assert journal[0].compile_seconds > 0
    assert [record.trace_seconds > 0 for record in journal] == [True] + [False] * (STEPS - 1)
