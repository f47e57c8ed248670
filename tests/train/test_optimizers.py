"""Whole runs with each optimizer: resumed is uninterrupted, what may change, what is saved and exported."""

import shutil

import pytest
import torch
from safetensors.torch import load_file

from tests.train.steps import assert_same_state, journal_values
from tptrain.ckpt.reading import StepReader, StepSource, read_tree
from tptrain.config import ExportSection, ModelSection, OptimSection, SaveSection, ScheduleSection
from tptrain.config.planning import plan_recipe
from tptrain.errors import ProblemsError
from tptrain.family import stored_rows
from tptrain.train.run import train

TRAINABLE = ("model.layers.*.self_attn.*", "lm_head.weight")
OPTIMS = {
    "adafactor": OptimSection(name="adafactor", learning_rate=2e-3, weight_decay=0.1, momentum=0.9),
    "bfloat16 moments": OptimSection(learning_rate=2e-3, moments_dtype="bfloat16"),
    "adamw": OptimSection(learning_rate=2e-3, weight_decay=0.1),
}
NO_EXPORT = ExportSection(enabled=False)


@pytest.fixture
def run(recipe):
    """Trains the recipe with changes; returns the plan."""

    def go(**changes):
        plan = plan_recipe(recipe(**{"export": NO_EXPORT, **changes}))
        train(plan)
        return plan

    return go


@pytest.mark.parametrize(
    ("optim", "trainable"),
    [("adafactor", ("*",)), ("bfloat16 moments", ("*",)), ("adafactor", TRAINABLE), ("adamw", TRAINABLE)],
)
def test_resumed_is_uninterrupted_bit_for_bit(run, optim, trainable, pretrained, tmp_path):
    settings = {
        "optim": OPTIMS[optim],
        "model": ModelSection(pretrained=str(pretrained), trainable=trainable),
        "save": SaveSection(every_steps=3, keep_last=3),
        "schedule": ScheduleSection(max_steps=7),
    }
    plan = run(**settings)
    folder, again = tmp_path / "run", tmp_path / "again"
    shutil.copytree(folder, again)
    for step in (6, 7):
        shutil.rmtree(again / "checkpoints" / str(step))
    run(output_dir=str(again), resume="auto", **settings)
    assert journal_values(again) == journal_values(folder)
    for step in ("6", "7"):
        assert_same_state(plan, folder / "checkpoints" / step, again / "checkpoints" / step)


def test_moments_are_cast_when_a_run_goes_on_with_others(run, recipe, tmp_path, capsys):
    """float32 -> bfloat16 rounds to nearest, and bfloat16 -> float32 changes nothing; a line says so."""
    run(optim=OPTIMS["adamw"])
    folder = tmp_path / "run"
    last = folder / "checkpoints" / "4"
    kept = tmp_path / "kept"
    shutil.copytree(last, kept)
    narrow = OptimSection(learning_rate=0.0, moments_dtype="bfloat16", beta1=0.5, beta2=0.5)
    plan = run(optim=narrow, resume="auto", schedule=ScheduleSection(max_steps=5))
    assert "Changed: optim.moments_dtype: float32 -> bfloat16." in capsys.readouterr().out
    tree = read_tree(folder / "checkpoints" / "5" / "mu")
    assert {str(array.dtype) for array in tree.values()} == {"bfloat16"}
    for row in plan.parts["mu"].rows:
        whole = tuple(slice(0, n) for n in row.size)
        out = torch.empty(row.size, dtype=torch.bfloat16)
        StepSource(kept / "mu").read_into(row, whole, out)
        assert torch.equal(out, StepSource(kept / "mu").read(row, whole).to(torch.bfloat16)), row.name
    run(optim=OPTIMS["adamw"], resume="auto", schedule=ScheduleSection(max_steps=6))
    assert "Changed: optim.moments_dtype: bfloat16 -> float32." in capsys.readouterr().out
    tree = read_tree(folder / "checkpoints" / "6" / "nu")
    assert {str(array.dtype) for array in tree.values()} == {"float32"}


@pytest.mark.parametrize(
    ("change", "setting", "saved"),
    [
        ({"optim": OptimSection(name="adafactor", momentum=0.5)}, "optim.name", "adamw"),
        ({"model": TRAINABLE}, "model.trainable", "*"),
    ],
)
def test_another_state_is_refused_and_its_weights_alone_are_not(
    run, change, setting, saved, pretrained, tmp_path
):
    run(optim=OPTIMS["adamw"])
    if "model" in change:
        change = {"model": ModelSection(pretrained=str(pretrained), trainable=change["model"])}
    with pytest.raises(ProblemsError) as error:
        run(resume="auto", **change)
    problem = next(p for p in error.value.problems if p.setting == setting)
    assert problem.other == f"saved with {saved}"
    step = tmp_path / "run" / "checkpoints" / "4"
    trainable = change["model"].trainable if "model" in change else ("*",)
    model = ModelSection(pretrained=str(step), trainable=trainable)
    plan = run(**{**change, "model": model}, output_dir=str(tmp_path / "other"))
    assert set(plan.parts) == {"params", "mu", "nu"} | ({"nu_row", "nu_col"} if "optim" in change else set())


def test_frozen_weights_are_saved_and_exported_as_they_are(run, pretrained, tmp_path):
    """In bfloat16, without moments; the export in bfloat16 holds the pretrained weights rounded once."""
    model = ModelSection(pretrained=str(pretrained), trainable=TRAINABLE)
    plan = run(model=model, export=ExportSection(dtype="bfloat16"))
    step = tmp_path / "run" / "checkpoints" / "4"
    trained = {row.name for row in stored_rows(plan.table) if row.trainable}
    assert len(trained) == 3 * 4 + 1
    assert set(read_tree(step / "mu")) == set(read_tree(step / "nu")) == trained
    start, exported = load_file(pretrained / "model.safetensors"), {}
    for file in (tmp_path / "run" / "export").glob("*.safetensors"):
        exported |= load_file(file)
    reader = StepReader(step)
    for row in stored_rows(plan.table):
        saved, rounded = reader.read(row), start[row.name].to(torch.bfloat16)
        assert saved.dtype == (torch.float32 if row.name in trained else torch.bfloat16)
        assert torch.equal(exported[row.name], saved.to(torch.bfloat16))
        assert torch.equal(exported[row.name], rounded) == (row.name not in trained), row.name
