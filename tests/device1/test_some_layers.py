"""Whole runs that train some layers: resumed is uninterrupted, frozen layers are exported as they came."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.small_run import small_recipe
from tests.train.steps import assert_same_state, journal_values
from tptrain.ckpt.reading import StepReader, read_tree
from tptrain.config import ExportSection, ModelSection, Plan, SaveSection, ScheduleSection
from tptrain.config.planning import plan_recipe
from tptrain.errors import ProblemsError
from tptrain.family import stored_rows
from tptrain.train.run import train

LAST, MIDDLE = ("model.layers.2.*", "lm_head.weight"), ("model.layers.1.self_attn.*",)


def trained_plan(pretrained: Path, records: Path, run: Path, trainable: tuple[str, ...], **changes) -> Plan:
    settings = {
        "topology": "cpu-1",
        "model": ModelSection(pretrained=str(pretrained), trainable=trainable),
        "save": SaveSection(every_steps=2, keep_last=3),
        "schedule": ScheduleSection(max_steps=5),
        "export": ExportSection(dtype="bfloat16"),
    }
    plan = plan_recipe(small_recipe(pretrained, records, run, **{**settings, **changes}))
    train(plan)
    return plan


def exported(run: Path) -> dict[str, torch.Tensor]:
    files = sorted((run / "export").glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


@pytest.mark.parametrize(("trainable", "count"), [(LAST, 9 + 1), (MIDDLE, 4)])
def test_resumed_is_uninterrupted_and_the_rest_stays(pretrained, records, tmp_path, trainable, count):
    run, again = tmp_path / "run", tmp_path / "again"
    plan = trained_plan(pretrained, records, run, trainable)
    trained = {row.name for row in stored_rows(plan.table) if row.trainable}
    assert len(trained) == count
    assert set(read_tree(run / "checkpoints" / "5" / "mu")) == trained
    start, out = load_file(pretrained / "model.safetensors"), exported(run)
    reader = StepReader(run / "checkpoints" / "5")
    for row in stored_rows(plan.table):
        saved = reader.read(row)
        assert torch.equal(out[row.name], saved.to(torch.bfloat16)), row.name
        if row.name in trained:
            assert not torch.equal(saved, start[row.name]), row.name
        else:
            assert torch.equal(saved, start[row.name].to(torch.bfloat16)), row.name

    shutil.copytree(run, again)
    shutil.rmtree(again / "checkpoints" / "5")
    shutil.rmtree(again / "export")
    trained_plan(pretrained, records, again, trainable, resume="auto")
    assert journal_values(again) == journal_values(run)
    assert_same_state(plan, run / "checkpoints" / "5", again / "checkpoints" / "5")


def test_the_weights_of_a_step_begin_a_run_that_cuts_the_layers_elsewhere(pretrained, records, tmp_path):
    """Steps hold rows, not stacks: another choice is no resumption, but its weights are read as they are."""
    run, other = tmp_path / "run", tmp_path / "other"
    plan = trained_plan(pretrained, records, run, LAST, export=ExportSection(enabled=False))
    with pytest.raises(ProblemsError, match="must stay as it was when a run goes on"):
        trained_plan(pretrained, records, run, MIDDLE, resume="auto")
    step = run / "checkpoints" / "5"
    trained_plan(step, records, other, MIDDLE, export=ExportSection(enabled=False))
    before, after = StepReader(step), StepReader(other / "checkpoints" / "5")
    for row in stored_rows(plan.table):
        moved = row.name.startswith("model.layers.1.self_attn.")
        same = torch.equal(after.read(row), before.read(row).to(torch.bfloat16))
        assert same != moved, row.name
