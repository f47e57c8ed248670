"""Every family there and back: transformers' folder, a checkpoint, and the folder of its export."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests import families, small
from tests.convert.models import assert_same_bits, run_tool, tensors_in
from tptrain.ckpt.reading import StepReader
from tptrain.family import facts_from_config, parameter_table
from tptrain.weights import SafetensorsSource
from tptrain.weights.safetensors_in import rows_in_files


@pytest.mark.parametrize("name", families.CONFIGS)
def test_weights_come_back_bit_for_bit(name: str, tmp_path: Path) -> None:
    """In files of another size, which experts of a matrix are spread over; the tool compares every tensor."""
    model = families.model_of(name)
    model.save_pretrained(tmp_path / "hf", max_shard_size="200KB")
    assert run_tool(tmp_path / "hf", tmp_path / "run") == 0
    step = tmp_path / "run" / "checkpoints" / "0"
    weights = small.weights_of(model)
    reader = StepReader(step, "step")
    for row in parameter_table(facts_from_config(families.CONFIGS[name])):
        if row.tied_to is None:
            assert torch.equal(reader.read(row), weights[row.name]), row.name
    words = ["--dtype", "float32", "--max-shard-gb", "3e-4", "--verify"]
    assert run_tool(step, tmp_path / "out", *words) == 0
    assert_same_bits(tensors_in(tmp_path / "out"), tensors_in(tmp_path / "hf"))
    assert run_tool("diff", tmp_path / "out", tmp_path / "hf") == 0
    assert run_tool("diff", step, tmp_path / "out") == 0
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager")
    rows = small.padded_rows()
    assert torch.equal(families.reference_logits(exported, rows), families.reference_logits(model, rows))


def test_a_slice_of_experts_is_read_alone(tmp_path: Path) -> None:
    model = families.model_of("mixtral")
    model.save_pretrained(tmp_path)
    table = parameter_table(facts_from_config(families.CONFIGS["mixtral"]))
    source = SafetensorsSource(tmp_path, table)
    row = next(row for row in table if row.name.endswith("0.mlp.experts.down_proj.weight"))
    expected = small.weights_of(model)[row.name]
    for index in ((slice(1, 3), slice(5, 40), slice(0, 7)), (slice(2, 2), slice(0, 4), slice(0, 0))):
        assert torch.equal(source.read(row, index), expected[index])
    for most in (1, 3 * expected[0].nbytes, expected.nbytes):
        blocks = list(source.read_blocks(row, most))
        assert torch.equal(torch.cat(blocks), expected)
        assert max(len(block) for block in blocks) == max(most // expected[0].nbytes, 1)


def test_a_missing_expert_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from safetensors.torch import load_file, save_file

    families.model_of("mixtral").save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    gone = "model.layers.1.block_sparse_moe.experts.3.w3.weight"
    del tensors[gone]
    tensors["model.layers.1.block_sparse_moe.experts.2.w1.weight"] = torch.zeros(3, 5)
    save_file(tensors, path, metadata={"format": "pt"})
    assert run_tool(tmp_path, tmp_path / "run") == 2
    told = capsys.readouterr().err
    assert f"missing of {len(tensors) + 1}: {gone}" in told
    assert "experts.2.w1.weight [3, 5] in the file, [88, 136] in the model" in told


def test_rows_of_a_table_without_their_files_are_left_out() -> None:
    table = parameter_table(facts_from_config(families.CONFIGS["mixtral"]))
    assert rows_in_files(table, {}) == {}
