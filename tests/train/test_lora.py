"""Whole runs with adapters: what is saved, resuming over the base, both exports, a base that has changed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.small_run import write_pretrained
from tests.train.steps import assert_same_state, journal_values
from tools import convert_ckpt
from tptrain.ckpt.reading import read_run, read_tree
from tptrain.config import ExportSection, LoraSection, ModelSection, SaveSection, ScheduleSection
from tptrain.config.planning import plan_recipe
from tptrain.errors import ProblemsError
from tptrain.generate.command import answer
from tptrain.train.run import train

LORA = LoraSection(rank=3, alpha=7.0, targets=("heads", "kv_heads", "up_proj"))
MODULES = ["k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
FLOAT32 = ExportSection(dtype="float32")
PROMPTS = torch.tensor([[5, 300, 17, 9, 250, 33, 121, 64], [1, 2, 3, 4, 5, 6, 7, 8]])


@pytest.fixture
def run(recipe, tmp_path):
    """Trains the recipe with adapters and changes; returns the plan."""

    def go(**changes: Any):
        settings = {"lora": LORA, "export": FLOAT32, "output_dir": str(tmp_path / "run"), **changes}
        plan = plan_recipe(recipe(**settings))
        train(plan)
        return plan

    return go


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=PROMPTS).logits


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")


def frozen_base(folder: Path) -> Any:
    """The model that the adapters were trained on: its weights are held in bfloat16."""
    model = load(folder)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(torch.bfloat16))
    return model


def with_peft(model: Any, folder: Path) -> Any:
    from peft import PeftModel

    return PeftModel.from_pretrained(model, str(folder))


def gap(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def converted(*words: object) -> int:
    return convert_ckpt.main([str(word) for word in words])


def test_a_step_holds_adapters_and_both_exports_are_the_trained_model(run, pretrained, tmp_path):
    plan = run()
    step, merged = tmp_path / "run" / "checkpoints" / "4", tmp_path / "run" / "export"
    names = {row.name for row in plan.table if row.is_adapter}
    assert len(names) == 2 * 5 * 3
    for item in ("params", "mu", "nu"):
        assert set(read_tree(step / item)) == names
    size = sum(path.stat().st_size for path in step.rglob("*") if path.is_file())
    assert size < 0.5 * (pretrained / "model.safetensors").stat().st_size

    words = ("--lora", "adapter", "--dtype=float32")
    assert converted(tmp_path / "run", tmp_path / "adapter", *words) == 0
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["target_modules"] == MODULES
    assert (config["r"], config["lora_alpha"]) == (3, 7.0)
    assert config["base_model_name_or_path"] == str(pretrained)
    assert (tmp_path / "adapter" / "tokenizer.json").exists()
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert set(saved) == {f"base_model.model.{name}" for name in names}

    with_adapter = with_peft(frozen_base(pretrained), tmp_path / "adapter")
    adapted, whole, base = logits(with_adapter), logits(load(merged)), logits(frozen_base(pretrained))
    assert gap(whole, adapted) <= 1e-5
    assert gap(base, adapted) > 0.01, "adapters that do nothing would always be equal"
    # Matrices that no adapter touches are those of the base, rounded once.
    start, out = load_file(pretrained / "model.safetensors"), load_file(merged / "model.safetensors")
    for name, tensor in start.items():
        adapts = any(f".{module}." in name for module in MODULES)
        assert torch.equal(out[name], tensor.to(torch.bfloat16).float()) != adapts, name


def test_what_a_run_writes_is_what_conversion_writes(run, pretrained, tmp_path):
    run(export=ExportSection(dtype="float32", lora="adapter"))
    folder = tmp_path / "run"
    written = {path.name for path in (folder / "export").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} <= written
    assert not written & {"config.json", "model.safetensors"}
    assert converted(folder, tmp_path / "merged", "--dtype=float32", "--verify") == 0
    with_adapter = with_peft(frozen_base(pretrained), folder / "export")
    assert gap(logits(load(tmp_path / "merged")), logits(with_adapter)) <= 1e-5
    words = ("--lora=adapter", "--dtype=float32", "--overwrite")
    assert converted(folder, folder / "export", *words) == 0
    question = "What is 3 + 4?"
    assert answer(folder, question, 8) == answer(tmp_path / "merged", f"Question: {question}\nAnswer:", 8)


@pytest.mark.parametrize("base", ["pretrained", "random"])
def test_resumed_is_uninterrupted_bit_for_bit(run, base, tmp_path):
    settings: dict[str, Any] = {
        "save": SaveSection(every_steps=3, keep_last=3),
        "schedule": ScheduleSection(max_steps=7),
    }
    if base == "random":
        config = json.loads((write_pretrained(tmp_path / "model") / "config.json").read_text())
        asked = {name: value for name, value in config.items() if name not in ("architectures", "dtype")}
        fields = ("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
        fields += ("num_attention_heads", "num_key_value_heads", "max_position_embeddings")
        config = {name: asked[name] for name in fields} | {"initializer_range": 0.1}
        settings["model"] = ModelSection(config=config, tokenizer=str(tmp_path / "model"))
    plan = run(**settings)
    folder, again = tmp_path / "run", tmp_path / "again"
    shutil.copytree(folder, again)
    shutil.rmtree(again / "export")
    for step in (6, 7):
        shutil.rmtree(again / "checkpoints" / str(step))
    run(output_dir=str(again), resume="auto", **settings)
    assert journal_values(again) == journal_values(folder)
    for step in ("6", "7"):
        assert_same_state(plan, folder / "checkpoints" / step, again / "checkpoints" / step)
    one, other = (load_file(path / "export" / "model.safetensors") for path in (folder, again))
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def changed_copy(pretrained: Path, folder: Path) -> Path:
    """The model with one of its tensors trained on."""
    shutil.copytree(pretrained, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"] *= 1.001
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_a_moved_base_will_do_and_another_one_is_refused(run, pretrained, tmp_path, capsys):
    base = shutil.copytree(pretrained, tmp_path / "base")
    run(model=ModelSection(pretrained=str(base)), export=ExportSection(enabled=False))
    assert read_run(tmp_path / "run" / "checkpoints" / "4")["base"]["pretrained"] == str(base)
    moved = base.rename(tmp_path / "moved")
    going_on: dict[str, Any] = {"resume": "auto", "export": ExportSection(enabled=False)}
    longer = ScheduleSection(max_steps=5)
    other = changed_copy(pretrained, tmp_path / "other")
    with pytest.raises(ProblemsError) as error:
        run(model=ModelSection(pretrained=str(other)), schedule=longer, **going_on)
    (problem,) = error.value.problems
    assert problem.setting == "model.pretrained"
    assert problem.rule == "must be the model that the adapters were trained on"
    assert "model.safetensors" in problem.other
    run(model=ModelSection(pretrained=str(moved)), schedule=longer, **going_on)

    step = tmp_path / "run" / "checkpoints" / "4"
    assert converted(step, tmp_path / "out") == 2
    assert f"--base={base}" in capsys.readouterr().err
    assert converted(step, tmp_path / "out", "--base", other) == 2
    assert "must be the model that the adapters were trained on" in capsys.readouterr().err
    assert converted(step, tmp_path / "out", "--base", moved) == 0


def test_a_step_of_adapters_is_no_pretrained_model(run, tmp_path):
    run(export=ExportSection(enabled=False))
    step = tmp_path / "run" / "checkpoints" / "4"
    with pytest.raises(ProblemsError) as error:
        run(model=ModelSection(pretrained=str(step)), lora=LoraSection(), output_dir=str(tmp_path / "new"))
    (problem,) = error.value.problems
    assert problem.rule == "must hold a whole model"


def test_a_step_is_a_base_like_a_folder(run, pretrained, tmp_path):
    """Adapters over a converted model: the same losses, and merged into the same model."""
    run()
    assert converted(pretrained, tmp_path / "converted") == 0
    step = tmp_path / "converted" / "checkpoints" / "0"
    run(model=ModelSection(pretrained=str(step)), output_dir=str(tmp_path / "other"))
    assert journal_values(tmp_path / "run") == journal_values(tmp_path / "other")
    one, other = (load_file(tmp_path / name / "export" / "model.safetensors") for name in ("run", "other"))
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@pytest.mark.parametrize(
    ("source", "options", "told"),
    [
        ("whole", ["--lora=adapter"], ["--lora=adapter: is for a step of adapters"]),
        (
            "folder",
            ["--lora=adapter", "--base=x"],
            ["--lora=adapter: belongs to the other direc", "--base=x: "],
        ),
        ("adapters", ["--lora=adapter", "--verify"], ["--verify=all: needs a whole model"]),
        ("adapters", ["--lora=adaptor"], ["'adapter' (did you mean it?)"]),
    ],
)
def test_options_that_mean_nothing_are_refused(run, source, options, told, pretrained, tmp_path, capsys):
    if source != "folder":
        run(lora=LORA if source == "adapters" else LoraSection(), export=ExportSection(enabled=False))
    assert converted(pretrained if source == "folder" else tmp_path / "run", tmp_path / "out", *options) == 2
    message = capsys.readouterr().err
    assert all(part in message for part in told), message
    assert not (tmp_path / "out").exists()
