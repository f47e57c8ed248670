"""SafetensorsSource: slices equal what transformers saved; what does not fit the table is listed at once."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.weights.small_llama import rewrite, same_bits, saved_model, saved_table, saved_tensors
from tptrain.errors import ProblemsError
from tptrain.family import ParamRow, stored_rows
from tptrain.weights import SafetensorsSource
from tptrain.weights.safetensors_files import open_checkpoint

SHARDED = "20KB"


def slices_of(row: ParamRow) -> list[tuple[slice, ...]]:
    """The whole row; its middle in every dim; and its last third in the last dim alone."""
    whole = tuple(slice(0, size) for size in row.size)
    middle = tuple(slice(size // 3, size - size // 4) for size in row.size)
    tail = (*whole[:-1], slice(2 * row.size[-1] // 3, row.size[-1]))
    return [whole, middle, tail, tuple(slice(None) for _ in row.size)]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("max_shard_size", ["1GB", SHARDED])
def test_slices_are_the_saved_bits(tmp_path: Path, tied: bool, dtype: str, max_shard_size: str) -> None:
    model = saved_model(tmp_path, tied, dtype=dtype, max_shard_size=max_shard_size)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (max_shard_size == SHARDED)
    expected = model.state_dict()
    source = SafetensorsSource(tmp_path, saved_table(tmp_path))
    for row in stored_rows(saved_table(tmp_path)):
        for index in slices_of(row):
            tensor = source.read(row, index)
            assert same_bits(tensor, expected[row.name][index]), (row.name, index)
            assert tensor.is_contiguous()
            assert tensor.untyped_storage().nbytes() == tensor.nbytes


def test_each_tensor_keeps_its_own_dtype(tmp_path: Path) -> None:
    saved_model(tmp_path)
    kinds = [torch.bfloat16, torch.float32, torch.float16]
    mixed = {name: t.to(kinds[i % 3]) for i, (name, t) in enumerate(saved_tensors(tmp_path).items())}
    rewrite(tmp_path, mixed)
    source = SafetensorsSource(tmp_path, saved_table(tmp_path))
    for row in stored_rows(saved_table(tmp_path)):
        assert same_bits(source.read(row, tuple(slice(None) for _ in row.size)), mixed[row.name])


def test_all_that_is_wrong_is_listed_at_once(tmp_path: Path) -> None:
    saved_model(tmp_path)
    missing = ["model.layers.1.mlp.up_proj.weight", "model.norm.weight"]
    extra = ["model.layers.0.self_attn.q_norm.weight", "model.layers.3.mlp.up_proj.weight"]
    changes = {
        **dict.fromkeys(missing),
        **{name: torch.ones(3) for name in extra},
        "lm_head.weight": torch.ones(132, 48),
        "model.layers.2.self_attn.o_proj.weight": torch.ones(60, 48),
        "model.layers.0.input_layernorm.weight": torch.ones(48, dtype=torch.int8),
    }
    rewrite(tmp_path, changes)
    with pytest.raises(ProblemsError) as caught:
        SafetensorsSource(tmp_path, saved_table(tmp_path), setting="model.pretrained")
    others = [problem.other for problem in caught.value.problems]
    assert len(others) == 4
    assert others[0].startswith("2 missing of 30: ") and all(name in others[0] for name in missing)
    assert others[1].startswith("2 extra: ") and all(name in others[1] for name in extra)
    assert "lm_head.weight [132, 48] in the file, [131, 48] in the model" in others[2]
    assert "model.layers.2.self_attn.o_proj.weight [60, 48] in the file, [48, 60] in the model" in others[2]
    assert "model.layers.0.input_layernorm.weight I8" in others[3]


def test_every_name_of_a_long_list_is_there(tmp_path: Path) -> None:
    saved_model(tmp_path)
    name, *others = saved_tensors(tmp_path)
    rewrite(tmp_path, dict.fromkeys(others))
    with pytest.raises(ProblemsError) as caught:
        SafetensorsSource(tmp_path, saved_table(tmp_path))
    listed = caught.value.problems[0].other
    assert all(re.search(rf" {re.escape(other)}(,|$)", listed) for other in others)
    assert name not in listed


def test_tied_head_in_the_file_is_ignored_when_equal(tmp_path: Path) -> None:
    saved_model(tmp_path, tied=True)
    table, embedding = saved_table(tmp_path), "model.embed_tokens.weight"
    weight = saved_tensors(tmp_path)[embedding]
    weight[3, 4] = float("nan")  # bits are compared: a NaN does not differ from itself
    rewrite(tmp_path, {embedding: weight, "lm_head.weight": weight.clone()})
    SafetensorsSource(tmp_path, table)
    rewrite(tmp_path, {"lm_head.weight": weight.nan_to_num() + 1e-3})
    with pytest.raises(ProblemsError, match=r"lm_head.weight differs from model.embed_tokens.weight"):
        SafetensorsSource(tmp_path, table)


def test_tied_weight_may_be_stored_under_either_name(tmp_path: Path) -> None:
    saved_model(tmp_path, tied=True)
    table = saved_table(tmp_path)
    weight = saved_tensors(tmp_path)["model.embed_tokens.weight"]
    rewrite(tmp_path, {"model.embed_tokens.weight": None, "lm_head.weight": weight})
    read = SafetensorsSource(tmp_path, table).read(table[0], (slice(5, 9), slice(0, 48)))
    assert same_bits(read, weight[5:9])


def test_a_tied_row_is_never_asked_for(tmp_path: Path) -> None:
    saved_model(tmp_path, tied=True)
    table = saved_table(tmp_path)
    with pytest.raises(AssertionError, match=r"is tied to model\.embed_tokens.weight"):
        SafetensorsSource(tmp_path, table).read(table[-1], (slice(0, 1), slice(0, 1)))


def test_rotary_tables_of_old_checkpoints_are_ignored(tmp_path: Path) -> None:
    saved_model(tmp_path)
    rewrite(tmp_path, {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(5)})
    SafetensorsSource(tmp_path, saved_table(tmp_path))


def test_an_index_of_the_single_file_is_no_contradiction(tmp_path: Path) -> None:
    saved_model(tmp_path)
    weight_map = dict.fromkeys(saved_tensors(tmp_path), "model.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    SafetensorsSource(tmp_path, saved_table(tmp_path))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
@pytest.mark.parametrize("max_bytes", [1, 999, 10**9])
def test_blocks_are_the_tensor_cut_between_rows(tmp_path: Path, dtype: str, max_bytes: int) -> None:
    saved_model(tmp_path, dtype=dtype)
    expected = saved_tensors(tmp_path)
    source = SafetensorsSource(tmp_path, saved_table(tmp_path))
    for row in stored_rows(saved_table(tmp_path)):
        blocks = list(source.read_blocks(row, max_bytes))
        assert same_bits(torch.cat(blocks), expected[row.name])
        row_bytes = expected[row.name][:1].nbytes
        assert all(block.nbytes <= max(max_bytes, row_bytes) for block in blocks)
        assert all(block.nbytes + row_bytes > max_bytes for block in blocks[:-1])
        assert all(block.untyped_storage().nbytes() == block.nbytes for block in blocks)


def test_blocks_of_tensors_without_rows(tmp_path: Path) -> None:
    tensors = {"scalar": torch.tensor(2.5), "empty": torch.ones(0, 5), "thin": torch.ones(4, 0)}
    save_file(tensors, tmp_path / "model.safetensors")
    for name, stored in open_checkpoint(tmp_path, "weights").items():
        blocks = list(stored.read_blocks(100))
        assert stored.num_bytes == tensors[name].nbytes
        assert same_bits(torch.cat(blocks) if tensors[name].ndim else blocks[0], tensors[name])


def test_a_file_that_is_cut_short_while_it_is_read_is_an_error(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1000, 10)}, tmp_path / "model.safetensors")
    blocks = open_checkpoint(tmp_path, "weights")["a"].read_blocks(4000)
    next(blocks)
    os.truncate(tmp_path / "model.safetensors", 20_000)
    with pytest.raises(OSError, match="it was changed while it was read"):
        list(blocks)


def test_a_whole_number_of_bytes_may_be_spelled_as_a_float(tmp_path: Path) -> None:
    """As some writers of an index do; without metadata there is nothing to compare."""
    saved_model(tmp_path, tied=True, max_shard_size=SHARDED)
    path = tmp_path / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    total = index["metadata"]["total_size"]
    assert total == sum(tensor.nbytes for tensor in saved_tensors(tmp_path).values())
    for metadata in ({"total_size": float(total)}, {}, None):
        path.write_text(json.dumps({**index, "metadata": metadata}))
        SafetensorsSource(tmp_path, saved_table(tmp_path))
