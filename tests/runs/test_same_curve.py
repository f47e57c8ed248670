"""Training on a mesh gives the curve of an independent trainer."""

import pytest

from tests.curves import journal_losses, reference_losses
from tests.small_run import small_recipe
from tptrain.backends.xla.capture import compile_count
from tptrain.config import LossSection, MeshSection, OptimSection, PrecisionSection, RematSection
from tptrain.config.planning import plan_recipe
from tptrain.train.journal import read_journal
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


def test_bfloat16_accumulation_and_remat_stay_near_the_float32_curve(
    pretrained, records, reference, tmp_path
):
    """The 8B recipe's settings together: bfloat16 compute, full remat, micro-batches, a loss in chunks."""
    plan = plan_recipe(
        small_recipe(
            pretrained,
            records,
            tmp_path / "run",
            MeshSection(fsdp=4, tensor=2),
            topology="cpu-8",
            precision=PrecisionSection(compute="bfloat16"),
            remat=RematSection(policy="full"),
            loss=LossSection(chunk_tokens=24),
            optim=OptimSection(learning_rate=2e-3, weight_decay=0.1, accumulation=2),
        )
    )
    train(plan)
    losses = journal_losses(tmp_path / "run")
    assert losses == pytest.approx(reference, rel=0.03)
    assert losses != pytest.approx(reference, rel=1e-5), "bfloat16 must show"
    assert read_journal(tmp_path / "run" / "journal.jsonl")[-1].compiles == compile_count()


def test_accumulation_and_chunks_in_float32_are_the_same_curve(pretrained, records, reference, tmp_path):
    optim = OptimSection(learning_rate=2e-3, weight_decay=0.1, accumulation=2)
    mesh = MeshSection(fsdp=4, tensor=2)
    sections = {"optim": optim, "loss": LossSection(chunk_tokens=32)}
    train(
        plan_recipe(small_recipe(pretrained, records, tmp_path / "run", mesh, topology="cpu-8", **sections))
    )
    assert journal_losses(tmp_path / "run") == pytest.approx(reference, rel=1e-4)
