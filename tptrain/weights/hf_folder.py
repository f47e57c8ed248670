"""Writing a Hugging Face model folder: config, tokenizer and safetensors, streamed and published whole."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tptrain.errors import Problem, refuse
from tptrain.family.table import DTYPE_BYTES, ParamRow, stored_rows
from tptrain.hf_files import (
    CONFIG_FILE,
    GENERATION_FILE,
    INDEX_FILE,
    SINGLE_FILE,
    copy_tokenizer,
    require_tokenizer,
    tokenizer_files,
)
from tptrain.untrusted import read_json
from tptrain.weights.hf_json import complete_config, generation_config, to_json, with_token_ids, write_json
from tptrain.weights.row_stream import ReadBlocks, cast_row, for_each_row
from tptrain.weights.safetensors_out import FilePlan, SafetensorsWriter, differences
from tptrain.weights.staging import staged_folder, target_problems, writing


@dataclass(frozen=True)
class Shard:
    """One safetensors file and the rows of the table that it holds."""

    file: str
    rows: tuple[ParamRow, ...]

    def plan(self, dtype: str) -> FilePlan:
        sizes = {name: size for row in self.rows for name, size in row.file_sizes.items()}
        return FilePlan(self.file, getattr(torch, dtype), sizes)


def export_bytes(table: Sequence[ParamRow], dtype: str, assets: Path | None = None) -> int:
    """How much room an export takes: the weights in `dtype` and the copied tokenizer files."""
    copied = sum((assets / name).stat().st_size for name in tokenizer_files(assets)) if assets else 0
    return sum(_row_bytes(row, dtype) for row in stored_rows(table)) + copied


def check_export_target(
    path: str | Path,
    setting: str = "export.path",
    needed_bytes: int = 0,
    free_bytes: int | None = None,
    overwrite: bool = False,
) -> list[Problem]:
    """Why an export could not be written to `path`: it exists, no permission, no room. Empty if it could.

    needed_bytes: from `export_bytes`. free_bytes: room on the disk; None to ask the disk.
    overwrite: whether a model folder that is there may be replaced.
    """
    return target_problems(Path(path).expanduser(), setting, needed_bytes, free_bytes, overwrite)


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
    read_blocks: ReadBlocks,
    assets: Path | None = None,
    dtype: str = "bfloat16",
    max_shard_bytes: int = 5_000_000_000,
    setting: str = "export.path",
    overwrite: bool = False,
    progress: Callable[[int], None] | None = None,
    dtype_setting: str = "export.dtype",
) -> Path:
    """Write the model folder `out` that transformers and vLLM load; returns its path.

    read_blocks: gives a stored row as blocks: CPU tensors of any float dtype, consecutive along dim 0,
        together exactly `row.size`. It is called once per row, in a few threads that begin with the rows in
        table order (`for_each_row`); memory grows by a block and some MB for each.
    assets: a folder made by `collect_assets`: its tokenizer files are copied byte for byte, and its
        generation_config.json is taken over; None for a model without a tokenizer.
    setting, dtype_setting: where the user chose `out` and `dtype`, for messages.
    overwrite: replace a model folder at `out`, which stays until the new one is written and checked.
    progress: called with the bytes of weights written since its last call.

    Everything is written beside `out`, flushed to the disk, read back and compared, and renamed at the end:
    `out` is complete or absent, and `staged_folder` says what a kill leaves. Raises ProblemsError if `out`
    exists (without `overwrite`), cannot be written or lacks room, if `assets` has no tokenizer, or if a value
    does not fit into `dtype`; whatever `read_blocks` raises passes through.
    """
    if assets is not None:
        require_tokenizer(assets, "assets")
    json_files = _json_files(hf_config, assets, dtype)
    shards = plan_shards(table, dtype, max_shard_bytes)
    if len(shards) > 1:
        json_files[INDEX_FILE] = _index(shards, dtype)
    return write_folder(
        out, shards, json_files, read_blocks, assets, dtype, setting, overwrite, progress, dtype_setting
    )


def write_folder(
    out: str | Path,
    shards: Sequence[Shard],
    json_files: Mapping[str, dict[str, Any]],
    read_blocks: ReadBlocks,
    assets: Path | None,
    dtype: str,
    setting: str,
    overwrite: bool,
    progress: Callable[[int], None] | None,
    dtype_setting: str,
) -> Path:
    """Write and publish a folder of these files and the tokenizer in `assets`, as `export_folder` says."""
    out = Path(out).expanduser()
    if assets is not None:
        require_tokenizer(assets, "assets")
    rows = [row for shard in shards for row in shard.rows]
    digests: dict[str, str] = {}

    def verify(folder: Path) -> None:
        different = _differences(folder, shards, dtype, digests, json_files)
        if different:
            rule, fix = "must read back as it was written", "another disk"
            raise refuse(setting, out, rule, f"different: {', '.join(different)}", fix)

    with staged_folder(out, setting, export_bytes(rows, dtype, assets), overwrite, verify) as folder:
        with writing(out, setting):
            for name, content in json_files.items():
                write_json(folder / name, content)
            if assets is not None:
                copy_tokenizer(assets, folder)
        to = getattr(torch, dtype)
        pieces = partial(cast_row, read_blocks=read_blocks, dtype=to, setting=dtype_setting)
        guard = partial(writing, out, setting)
        for shard in shards:
            digests |= _write_shard(folder, shard, dtype, pieces, guard, progress)
    return out


def _row_bytes(row: ParamRow, dtype: str) -> int:
    return row.num_elements * DTYPE_BYTES[dtype]


def _json_files(hf_config: Mapping[str, Any], assets: Path | None, dtype: str) -> dict[str, dict[str, Any]]:
    """config.json, and generation_config.json to go with it: the assets' own, or the ids in the config."""
    path = assets / GENERATION_FILE if assets else None
    given = path is not None and path.exists()
    generation = read_json(path, "assets") if path and given else generation_config({}, hf_config, None)
    config = with_token_ids(complete_config(hf_config, dtype), generation)
    return {CONFIG_FILE: config, GENERATION_FILE: generation}


def _index(shards: Sequence[Shard], dtype: str) -> dict[str, Any]:
    rows = [(row, shard.file) for shard in shards for row in shard.rows]
    return {
        "metadata": {"total_size": sum(_row_bytes(row, dtype) for row, _ in rows)},
        "weight_map": {name: file for row, file in rows for name in row.file_sizes},
    }


def _write_shard(
    folder: Path,
    shard: Shard,
    dtype: str,
    pieces: Callable[[ParamRow], Generator[torch.Tensor]],
    guard: Callable[[], AbstractContextManager[None]],
    progress: Callable[[int], None] | None,
) -> dict[str, str]:
    """Write one file; returns the digests of its tensors. guard: around what writes, but not what reads."""
    with guard():
        writer = SafetensorsWriter(folder, shard.plan(dtype))
    telling = threading.Lock()
    written = dict.fromkeys((row.name for row in shard.rows), 0)

    def write(row: ParamRow, piece: torch.Tensor) -> None:
        num_bytes = 0
        with guard():
            for name, part in _by_file_tensor(row, piece, written[row.name]):
                num_bytes += writer.write(name, part)
        written[row.name] += piece.numel()
        if progress is not None:
            with telling:
                progress(num_bytes)

    with writer:
        for_each_row(shard.rows, pieces, write)
        with guard():
            return writer.finish()


def _by_file_tensor(row: ParamRow, piece: torch.Tensor, start: int) -> Generator[tuple[str, torch.Tensor]]:
    """A flat piece of a row, cut where it goes on in the next tensor of the files. start: in the row."""
    names = tuple(row.file_sizes)
    elements = row.num_elements // len(names)
    while piece.numel():
        index, at = divmod(start, elements)
        part = piece[: elements - at]
        yield names[index], part
        piece, start = piece[len(part) :], start + len(part)


def _differences(
    folder: Path,
    shards: Sequence[Shard],
    dtype: str,
    digests: Mapping[str, str],
    json_files: Mapping[str, dict[str, Any]],
) -> list[str]:
    """What reads back from a finished folder other than it was written, or should not be there."""
    weights = [each for shard in shards for each in differences(folder, shard.plan(dtype), digests)]
    stray = {path.name for path in folder.glob("*.safetensors")} - {shard.file for shard in shards}
    changed = [
        name for name, content in json_files.items() if (folder / name).read_bytes() != to_json(content)
    ]
    return [*weights, *sorted(stray), *changed]
