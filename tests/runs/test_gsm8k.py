"""The main job on real data: GSM8K, 8 virtual devices, checkpoint, resume, export."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.curves import journal_losses
from tptrain.ckpt.reading import StepReader
from tptrain.config.overrides import apply_overrides
from tptrain.config.plan import Plan
from tptrain.config.planning import plan_recipe
from tptrain.config.recipe_file import load_recipe
from tptrain.family import stored_rows
from tptrain.train.run import RunResult, train

RECIPE = Path(__file__).parents[2] / "recipes" / "tiny_gsm8k.py"
SAVED_STEP = 80


def gsm8k_folder() -> Path:
    folder = os.environ.get("TPTRAIN_GSM8K")
    if folder and (Path(folder) / "train.jsonl").exists():
        return Path(folder)
    reason = "TPTRAIN_GSM8K names no folder with GSM8K's train.jsonl"
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


def gsm8k_plan(run: Path, *overrides: str) -> Plan:
    settings = [
        f"data.path={gsm8k_folder() / 'train.jsonl'}",
        "data.batch_rows=8",
        "topology=cpu-8",
        "mesh.fsdp=4",
        "mesh.tensor=2",
        "precision.compute=float32",
        f"save.every_steps={SAVED_STEP}",
        "log.progress=false",
        f"output_dir={run}",
        *overrides,
    ]
    return plan_recipe(apply_overrides(load_recipe(RECIPE), settings))


@pytest.fixture(scope="module")
def plan(tmp_path_factory) -> Plan:
    return gsm8k_plan(tmp_path_factory.mktemp("gsm8k") / "run")


@pytest.fixture(scope="module")
def result(plan) -> RunResult:
    return train(plan)


def test_100_steps_learn(result):
    losses = journal_losses(result.output_dir)
    assert len(losses) == 100
    assert np.mean(losses[90:]) <= 0.6 * np.mean(losses[:10])


def test_resumed_run_is_the_uninterrupted_one(result, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(result.output_dir, run)
    shutil.rmtree(run / "checkpoints" / "100")
    shutil.rmtree(run / "export")
    resumed = train(gsm8k_plan(run, "resume=auto"))
    assert journal_losses(run) == journal_losses(result.output_dir)
    straight, again = StepReader(result.checkpoint), StepReader(resumed.checkpoint)
    assert again.run["cursor"] == straight.run["cursor"] == 800
    for row in stored_rows(gsm8k_plan(run, "resume=auto", "export.path=elsewhere").table):
        assert torch.equal(again.read(row), straight.read(row)), row.name


def test_export_loads_in_transformers_with_the_weights_of_the_checkpoint(result, plan):
    model, loading = AutoModelForCausalLM.from_pretrained(
        result.export_dir, dtype=torch.bfloat16, output_loading_info=True
    )
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    exported = load_file(result.export_dir / "model.safetensors")
    reader = StepReader(result.checkpoint)
    parameters = dict(model.named_parameters())
    for row in stored_rows(plan.table):
        wanted = reader.read(row).to(torch.bfloat16)
        assert torch.equal(exported[row.name], wanted), row.name
        assert torch.equal(parameters[row.name], wanted), row.name


def test_exported_tokenizer_is_the_runs(result):
    assets, exported = (
        AutoTokenizer.from_pretrained(result.output_dir / "assets"),
        AutoTokenizer.from_pretrained(result.export_dir),
    )
    text = "Question: Natalia sold 48 clips.\nAnswer: 48/2 = 24"
    assert exported(text).input_ids == assets(text).input_ids
    assert exported.chat_template == assets.chat_template
    assert (
        exported.eos_token_id
        in AutoModelForCausalLM.from_pretrained(result.export_dir).generation_config.eos_token_id
    )
