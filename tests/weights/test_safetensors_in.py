"""SafetensorsSource: slices equal what transformers saved; what does not fit the table is listed at once."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.weights.small_llama import rewrite, same_bits, saved_model, saved_table, saved_tensors
from tptrain.errors import ProblemsError
from tptrain.family import ParamRow, stored_rows
from tptrain.weights import SafetensorsSource

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


def anonymous_bytes() -> int:
    """Private memory of this process that is not backed by a file."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"RssAnon:\s+(\d+) kB", status)[1]) * 1024  # type: ignore[index]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_a_slice_of_a_large_tensor_does_not_load_the_rest(tmp_path: Path) -> None:
    size, mib = (64 * 1024, 256), 2**20  # 64 MiB
    save_file({"big": torch.ones(size)}, tmp_path / "model.safetensors")
    row = ParamRow("big", ("vocab", "embed"), size, size)
    source = SafetensorsSource(tmp_path, [row])
    before = anonymous_bytes()
    kept = [source.read(row, (slice(0, 1000), slice(0, 256))), source.read(row, (slice(None), slice(3, 5)))]
    assert anonymous_bytes() - before < 12 * mib
    kept.append(source.read(row, (slice(None), slice(None))))
    assert anonymous_bytes() - before > 60 * mib  # so the measure does see what is loaded


def test_a_hub_id_is_read_from_the_hubs_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache links every file out of its snapshot folder, which the check of the index must allow."""
    from huggingface_hub import constants

    saved_model(tmp_path / "plain", max_shard_size=SHARDED)
    repo = tmp_path / "hub" / "models--some--llama"
    snapshot, blobs = repo / "snapshots" / ("0" * 40), repo / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("0" * 40)
    for path in (tmp_path / "plain").iterdir():
        shutil.move(path, blobs / path.name)
        (snapshot / path.name).symlink_to(Path("../../blobs") / path.name)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert SafetensorsSource("some/llama", saved_table(snapshot)).folder == snapshot
