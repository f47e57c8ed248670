"""Training on a mesh gives the curve of an independent trainer."""

import pytest

from tests.curves import journal_losses, reference_losses
from tests.small_run import small_recipe
from tptrain.config import MeshSection
from tptrain.config.planning import plan_recipe
from tptrain.train.run import train

STEPS = 20


@pytest.fixture(scope="module")
def reference(pretrained, records, tmp_path_factory):
    plan = plan_recipe(small_recipe(pretrained, records, tmp_path_factory.mktemp("none"), topology="cpu-8"))
    return reference_losses(plan, STEPS, STEPS)


@pytest.mark.parametrize(("fsdp", "tensor"), [(8, 1), (4, 2)])
def test_first_20_losses_equal_those_of_transformers(pretrained, records, reference, tmp_path, fsdp, tensor):
    mesh = MeshSection(fsdp=fsdp, tensor=tensor)
    plan = plan_recipe(small_recipe(pretrained, records, tmp_path / "run", mesh, topology="cpu-8"))
    train(plan)
    losses = journal_losses(tmp_path / "run")
    assert losses == pytest.approx(reference, rel=1e-4)
    assert losses[-1] < 0.8 * losses[0], "a curve that does not fall compares nothing"
