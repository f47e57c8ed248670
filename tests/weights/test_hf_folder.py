"""Exported folders: transformers loads them bit for bit, in the dtype and the shards that were asked for."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.weights.exporting import export, reader
from tests.weights.small_llama import (
    LLAMA3_ROPE,
    read_config,
    same_bits,
    saved_model,
    saved_table,
    saved_tensors,
    small_tokenizer,
)
from tptrain.family import ParamRow, stored_rows
from tptrain.weights import check_export_target, collect_assets, export_bytes
from tptrain.weights.hf_folder import plan_shards

LINEAR_ROPE = {"rope_type": "linear", "factor": 2.0, "rope_theta": 9e3}


@pytest.mark.parametrize(
    ("tied", "rope", "dtype", "max_shard_bytes"),
    [
        (False, None, "float32", 10**9),
        (False, LLAMA3_ROPE, "float32", 20_000),
        (False, LLAMA3_ROPE, "bfloat16", 20_000),
        (False, LINEAR_ROPE, "bfloat16", 10**9),
        (True, None, "bfloat16", 20_000),
        (True, LLAMA3_ROPE, "float32", 10**9),
        (True, LINEAR_ROPE, "float32", 20_000),
    ],
)
def test_round_trip_through_transformers(
    tmp_path: Path, tied: bool, rope: dict[str, Any] | None, dtype: str, max_shard_bytes: int
) -> None:
    saved_model(tmp_path / "in", tied, rope, dtype)
    # Loaded, not the saved object: casting a model to bfloat16 also rounds its rotary frequencies.
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "in", dtype="auto")
    out = export(tmp_path / "in", tmp_path / "out", dtype=dtype, max_shard_bytes=max_shard_bytes)
    load: Any = AutoModelForCausalLM.from_pretrained
    loaded, report = load(out, dtype="auto", output_loading_info=True)
    assert not any(report.values()), report
    expected = model.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    assert all(same_bits(tensor, expected[name]) for name, tensor in loaded.state_dict().items())
    ids = torch.arange(2 * 40).reshape(2, 40) * 13 % 131
    with torch.no_grad():
        logits = model(ids).logits
        assert logits.float().std() >= 1
        assert torch.equal(loaded(ids).logits, logits)
    assert without_origin(loaded.config) == without_origin(model.config)


def without_origin(config: Any) -> dict[str, Any]:
    fields: dict[str, Any] = config.to_dict()
    return {name: value for name, value in fields.items() if name != "_name_or_path"}


def test_export_casts_to_its_dtype(tmp_path: Path) -> None:
    saved_model(tmp_path / "in")
    out = export(tmp_path / "in", tmp_path / "out", dtype="bfloat16")
    before, after = saved_tensors(tmp_path / "in"), saved_tensors(out)
    assert all(same_bits(after[name], tensor.bfloat16()) for name, tensor in before.items())
    assert read_config(out)["dtype"] == read_config(out)["torch_dtype"] == "bfloat16"


@pytest.mark.parametrize("max_shard_bytes", [10**9, 20_000])
def test_an_export_of_an_export_is_the_same(tmp_path: Path, max_shard_bytes: int) -> None:
    saved_model(tmp_path / "in", tied=True, rope=LLAMA3_ROPE)
    one = export(tmp_path / "in", tmp_path / "one", max_shard_bytes=max_shard_bytes)
    two = export(one, tmp_path / "two", max_shard_bytes=max_shard_bytes)
    files = sorted(path.name for path in one.iterdir())
    assert files == sorted(path.name for path in two.iterdir())
    assert all((one / name).read_bytes() == (two / name).read_bytes() for name in files)


def test_index_and_files_agree(tmp_path: Path) -> None:
    saved_model(tmp_path / "in")
    table = saved_table(tmp_path / "in")
    out = export(tmp_path / "in", tmp_path / "out", max_shard_bytes=20_000)
    assert not (out / "model.safetensors").exists()
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == export_bytes(table, "bfloat16")
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in saved_tensors(out).values())
    files = sorted(path.name for path in out.glob("*.safetensors"))
    assert files == [f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)]
    assert set(index["weight_map"]) == {row.name for row in stored_rows(table)}
    for file in files:
        with safe_open(out / file, framework="pt") as handle:
            assert handle.metadata() == {"format": "pt"}
            assert {index["weight_map"][name] for name in handle.keys()} == {file}  # noqa: SIM118


def test_shards_are_packed_in_order_and_within_the_limit(tmp_path: Path) -> None:
    saved_model(tmp_path)
    table = saved_table(tmp_path)
    shards = plan_shards(table, "float32", 30_000)
    assert [row for shard in shards for row in shard.rows] == list(stored_rows(table))
    sizes = [[row.num_elements * 4 for row in shard.rows] for shard in shards]
    assert all(sum(size) <= 30_000 for size in sizes)
    assert all(sum(size) + after[0] > 30_000 for size, after in itertools.pairwise(sizes))
    assert all(len(shard.rows) == 1 for shard in plan_shards(table, "float32", 100))


def test_progress_adds_up_to_the_weights(tmp_path: Path) -> None:
    saved_model(tmp_path / "in")
    written: list[int] = []
    export(tmp_path / "in", tmp_path / "out", progress=written.append, max_shard_bytes=20_000)
    assert len(written) > 30 and min(written) > 0
    assert sum(written) == export_bytes(saved_table(tmp_path / "in"), "bfloat16")


def test_views_of_one_buffer_can_be_exported(tmp_path: Path) -> None:
    """A backend may hand out slices of stacked layers, transposed or not."""
    saved_model(tmp_path / "in")
    read = reader(tmp_path / "in")

    def views(row: ParamRow) -> torch.Tensor:
        stacked = torch.stack([read(row), read(row)], dim=-1)
        return stacked[..., 1].requires_grad_()

    out = export(tmp_path / "in", tmp_path / "out", views, dtype="float32")
    before, after = saved_tensors(tmp_path / "in"), saved_tensors(out)
    assert all(same_bits(after[name], tensor) for name, tensor in before.items())


def test_parents_are_made_and_permissions_are_the_users(tmp_path: Path) -> None:
    saved_model(tmp_path / "in")
    out = export(tmp_path / "in", tmp_path / "a" / "b" / "out")
    (tmp_path / "plain").mkdir()
    assert out.stat().st_mode == (tmp_path / "plain").stat().st_mode
    modes = {path.stat().st_mode & 0o777 for path in out.iterdir()}
    assert len(modes) == 1, "a server that may read the config may read the weights"


def test_room_is_compared_with_what_the_export_needs(tmp_path: Path) -> None:
    saved_model(tmp_path / "in")
    needed = export_bytes(saved_table(tmp_path / "in"), "bfloat16")
    assert check_export_target(tmp_path / "out", needed_bytes=needed, free_bytes=needed) == []
    assert check_export_target(str(tmp_path / "x" / "out"), needed_bytes=needed) == []
    assert len(check_export_target(tmp_path / "out", needed_bytes=needed, free_bytes=needed - 1)) == 1


def test_tokenizer_and_stop_tokens_travel(tmp_path: Path) -> None:
    saved_model(tmp_path / "in")
    assets = collect_assets(tmp_path / "assets", read_config(tmp_path / "in"), small_tokenizer())
    out = export(tmp_path / "in", tmp_path / "out", assets=assets)
    loaded = AutoTokenizer.from_pretrained(out)
    text = "hello world, 3 + 4 = 7<turn_end>"
    assert loaded(text)["input_ids"] == small_tokenizer()(text)["input_ids"]
    assert loaded.chat_template == small_tokenizer().chat_template
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert (out / name).read_bytes() == (assets / name).read_bytes()
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.generation_config.eos_token_id == [1]
    assert model.config.eos_token_id == 1
