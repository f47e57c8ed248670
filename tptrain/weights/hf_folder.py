"""Writing a Hugging Face model folder: config, tokenizer and safetensors, streamed and published whole."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from tptrain.errors import Problem, raise_if_any, refuse
from tptrain.family.table import DTYPE_BYTES, ParamRow, stored_rows
from tptrain.weights.hf_files import (
    CONFIG_FILE,
    GENERATION_FILE,
    INDEX_FILE,
    SINGLE_FILE,
    copy_tokenizer,
    require_tokenizer,
    tokenizer_files,
)
from tptrain.weights.hf_json import complete_config, generation_config, read_json, with_token_ids, write_json
from tptrain.weights.staging import staged_folder, target_problems, writing

# As the header of a safetensors file spells them.
_FILE_DTYPES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}

RowReader = Callable[[ParamRow], torch.Tensor]


@dataclass(frozen=True)
class Shard:
    """One safetensors file and the rows of the table that it holds."""

    file: str
    rows: tuple[ParamRow, ...]


def export_bytes(table: Sequence[ParamRow], dtype: str, assets: Path | None = None) -> int:
    """How much room an export takes: the weights in `dtype` and the copied tokenizer files."""
    copied = sum((assets / name).stat().st_size for name in tokenizer_files(assets)) if assets else 0
    return sum(_row_bytes(row, dtype) for row in stored_rows(table)) + copied


def check_export_target(
    path: str | Path, setting: str = "export.path", needed_bytes: int = 0, free_bytes: int | None = None
) -> list[Problem]:
    """Why an export could not be written to `path`: it exists, no permission, no room. Empty if it could.

    needed_bytes: from `export_bytes`. free_bytes: room on the disk; None to ask the disk.
    """
    return target_problems(Path(path).expanduser(), setting, needed_bytes, free_bytes)


def plan_shards(table: Sequence[ParamRow], dtype: str, max_shard_bytes: int) -> tuple[Shard, ...]:
    """Rows packed into files in table order, each file as full as `max_shard_bytes` allows.

    A row larger than that has a file of its own. Files are named as transformers names them.
    """
    groups: list[list[ParamRow]] = []
    room = 0
    for row in stored_rows(table):
        size = _row_bytes(row, dtype)
        if not groups or size > room:
            groups.append([])
            room = max_shard_bytes
        groups[-1].append(row)
        room -= size
    if len(groups) == 1:
        return (Shard(SINGLE_FILE, tuple(groups[0])),)
    count = len(groups)
    names = (f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1))
    return tuple(Shard(name, tuple(rows)) for name, rows in zip(names, groups, strict=True))


def export_folder(
    out: str | Path,
    table: Sequence[ParamRow],
    hf_config: Mapping[str, Any],
    read: RowReader,
    assets: Path | None = None,
    dtype: str = "bfloat16",
    max_shard_bytes: int = 5_000_000_000,
    setting: str = "export.path",
) -> Path:
    """Write the model folder `out` that transformers and vLLM load; returns its path.

    read:   gives one stored row as a whole, unpadded CPU tensor (`row.size`) of any float dtype. It is called
            once per row, in table order; at most one file's tensors are held at a time.
    assets: a folder made by `collect_assets`: its tokenizer files are copied byte for byte, and its
            generation_config.json is taken over; None for a model without a tokenizer.
    setting: where the user chose `out`, for messages.

    Everything is written beside `out`, read back and checked, and renamed at the end, so `out` is complete or
    absent. Raises ProblemsError if `out` exists, cannot be written or lacks room, if `assets` has no
    tokenizer, or if a value does not fit into `dtype`; whatever `read` raises passes through.
    """
    out = Path(out).expanduser()
    if assets is not None:
        require_tokenizer(assets, "assets")
    raise_if_any(check_export_target(out, setting, export_bytes(table, dtype, assets)))
    config, generation = _json_files(hf_config, assets, dtype)
    shards = plan_shards(table, dtype, max_shard_bytes)
    with staged_folder(out, setting) as partial:
        with writing(out, setting):
            write_json(partial / CONFIG_FILE, config)
            write_json(partial / GENERATION_FILE, generation)
            if assets is not None:
                copy_tokenizer(assets, partial)
        for shard in shards:
            _write_shard(partial, shard, read, dtype, out, setting)
        if len(shards) > 1:
            with writing(out, setting):
                write_json(partial / INDEX_FILE, _index(shards, dtype))
        with writing(out, setting):
            _verify(partial, shards, dtype, out, setting)
    return out


def _row_bytes(row: ParamRow, dtype: str) -> int:
    return row.num_elements * DTYPE_BYTES[dtype]


def _json_files(
    hf_config: Mapping[str, Any], assets: Path | None, dtype: str
) -> tuple[dict[str, Any], dict[str, Any]]:
    """config.json, and generation_config.json to go with it: the assets' own, or the ids in the config."""
    path = assets / GENERATION_FILE if assets else None
    given = path is not None and path.exists()
    generation = read_json(path, "assets") if path and given else generation_config({}, hf_config, None)
    return with_token_ids(complete_config(hf_config, dtype), generation), generation


def _write_shard(folder: Path, shard: Shard, read: RowReader, dtype: str, out: Path, setting: str) -> None:
    tensors = {row.name: _cast(row, read(row), dtype) for row in shard.rows}
    with writing(out, setting):
        save_file(tensors, str(folder / shard.file), metadata={"format": "pt"})
        # safetensors makes its files readable by their owner alone; a server may be someone else.
        shutil.copymode(folder / CONFIG_FILE, folder / shard.file)


def _cast(row: ParamRow, tensor: torch.Tensor, dtype: str) -> torch.Tensor:
    assert tensor.shape == row.size, f"{row.name}: read {list(tensor.shape)}, not {list(row.size)}"
    limit = torch.finfo(getattr(torch, dtype)).max
    if limit < torch.finfo(tensor.dtype).max:
        low, high = (bound.item() for bound in tensor.detach().aminmax())
        if limit < max(-low, high) < float("inf"):
            other = f"{row.name} has {max(-low, high):.6g}, the largest {dtype} is {limit:.6g}"
            fix = "'bfloat16' or 'float32'"
            raise refuse("export.dtype", dtype, "must be able to hold every weight", other, fix)
    cast = tensor.detach().to(getattr(torch, dtype)).contiguous()
    # save_file refuses tensors that share storage, as two views of one buffer do.
    return cast if cast.untyped_storage().nbytes() == cast.nbytes else cast.clone()


def _index(shards: Sequence[Shard], dtype: str) -> dict[str, Any]:
    rows = [(row, shard.file) for shard in shards for row in shard.rows]
    return {
        "metadata": {"total_size": sum(_row_bytes(row, dtype) for row, _ in rows)},
        "weight_map": {row.name: file for row, file in rows},
    }


def _verify(folder: Path, shards: Sequence[Shard], dtype: str, out: Path, setting: str) -> None:
    """Read back what was written: the files, the names, shapes and dtypes in them, and the index."""
    differences = [difference for shard in shards for difference in _shard_differences(folder, shard, dtype)]
    expected = {shard.file for shard in shards}
    files = {path.name for path in folder.glob("*.safetensors")}
    if files != expected:
        differences.append(f"files {sorted(files ^ expected)}")
    if len(shards) > 1 and read_json(folder / INDEX_FILE, setting) != _index(shards, dtype):
        differences.append(INDEX_FILE)
    if differences:
        rule, fix = "must read back as it was written", "another disk"
        raise refuse(setting, out, rule, f"different: {', '.join(differences)}", fix)


def _shard_differences(folder: Path, shard: Shard, dtype: str) -> list[str]:
    with safe_open(str(folder / shard.file), framework="pt") as handle:
        names = set(handle.keys())
        expected = {row.name for row in shard.rows}
        differences = [f"{name} in {shard.file}" for name in sorted(names ^ expected)]
        if handle.metadata() != {"format": "pt"}:
            differences.append(f"metadata of {shard.file}")
        for row in shard.rows:
            if row.name not in names:
                continue
            view = handle.get_slice(row.name)
            if (tuple(view.get_shape()), view.get_dtype()) != (row.size, _FILE_DTYPES[dtype]):
                differences.append(f"{row.name} in {shard.file}")
    return differences
