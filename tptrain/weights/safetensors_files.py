"""Opening a safetensors checkpoint: from a folder to one handle per tensor, or a list of what is broken."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from tptrain.errors import Problem, raise_if_any, refuse
from tptrain.weights.hf_files import INDEX_FILE, SINGLE_FILE

_COMPARE_BYTES = 64 * 2**20


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of an open safetensors file; its data stays on disk until a slice is read.

    dtype: as the format spells it, such as "BF16".
    """

    name: str
    file: str
    dtype: str
    shape: tuple[int, ...]
    handle: Any

    def read(self, index: tuple[slice, ...]) -> torch.Tensor:
        """A private copy of one slice. Nothing outside the slice is read."""
        view = self.handle.get_slice(self.name)[index]
        # The view holds the whole mapped file; the copy does not, and is safe from later changes of the file.
        tensor: torch.Tensor = view.clone(memory_format=torch.contiguous_format)
        return tensor

    def same_bits(self, other: StoredTensor) -> bool:
        """Whether both hold the same bits in the same dtype and shape, compared a block at a time."""
        if (self.dtype, self.shape) != (other.dtype, other.shape):
            return False
        if not self.shape:
            return torch.equal(_bits(self.read(())), _bits(other.read(())))
        row_bytes = max(self.read((slice(0, 1),)).nbytes, 1)
        step = max(_COMPARE_BYTES // row_bytes, 1)
        blocks = [(slice(start, start + step),) for start in range(0, self.shape[0], step)]
        return all(torch.equal(_bits(self.read(block)), _bits(other.read(block))) for block in blocks)


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def open_checkpoint(folder: Path, setting: str) -> dict[str, StoredTensor]:
    """Tensor name -> handle, for all tensors of the checkpoint in `folder`, single-file or sharded.

    setting: what the user's path was given as, for messages.
    Raises ProblemsError that lists every broken file and every contradiction between index and files.
    """
    single, index = folder / SINGLE_FILE, folder / INDEX_FILE
    if not single.exists() and not index.exists():
        raise refuse(
            setting,
            folder,
            f"must hold {SINGLE_FILE} or {INDEX_FILE}",
            f"it holds: {_listing(folder)}",
            "a folder written by save_pretrained with safetensors",
        )
    if not index.exists():
        by_file, problems = _open_files(folder, [SINGLE_FILE], setting)
        raise_if_any(problems)
        return by_file[SINGLE_FILE]
    weight_map = _read_weight_map(index, setting)
    files = sorted(set(weight_map.values()))
    if single.exists() and files != [SINGLE_FILE]:
        raise refuse(
            setting,
            folder,
            f"must hold {SINGLE_FILE} or {INDEX_FILE}, not both",
            f"the index names {len(files)} other files; transformers would load {SINGLE_FILE} instead",
            "the folder without the one that is out of date",
        )
    by_file, problems = _open_files(folder, files, setting)
    raise_if_any(problems or _index_problems(weight_map, by_file, index, setting))
    return {name: tensor for tensors in by_file.values() for name, tensor in tensors.items()}


def _listing(folder: Path, most: int = 8) -> str:
    names = sorted(path.name for path in folder.iterdir())
    shown = ", ".join(names[:most]) or "nothing"
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


def _read_weight_map(index: Path, setting: str) -> dict[str, str]:
    """Tensor name -> file name, from an index; every file name is known to stay inside the folder."""

    def bad(rule: str, other: str) -> Exception:
        return refuse(setting, index, rule, other, "the index as save_pretrained wrote it, downloaded again")

    try:
        content = json.loads(index.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise bad("must be a JSON file", str(error)) from error
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise bad("must map tensor names to files", "it has no weight_map, or an empty one")
    wrong = [f"{name}: {file!r}" for name, file in weight_map.items() if not isinstance(file, str)]
    if wrong:
        raise bad("must map tensor names to file names", "; ".join(wrong))
    outside = sorted({file for file in weight_map.values() if _leaves_folder(file)})
    if outside:
        raise bad("must name files inside its own folder", ", ".join(outside))
    return weight_map


def _leaves_folder(file: str) -> bool:
    # By the name alone: in the hub's cache every file is itself a link out of its folder.
    path = PurePosixPath(file.replace("\\", "/"))
    return path.is_absolute() or ".." in path.parts or not path.parts


def _open_files(
    folder: Path, files: list[str], setting: str
) -> tuple[dict[str, dict[str, StoredTensor]], list[Problem]]:
    """File name -> tensor name -> handle, and a problem for each file that cannot be opened."""
    by_file, problems = {}, []
    for file in files:
        path = folder / file
        try:
            by_file[file] = _open_file(path, file)
        except FileNotFoundError:
            other, fix = f"{INDEX_FILE} names it", "the complete checkpoint, downloaded again"
            problems.append(Problem(setting, path, "must exist", other, fix))
        except (OSError, SafetensorError) as error:
            rule, fix = "must be a complete safetensors file", "an intact copy of it"
            problems.append(Problem(setting, path, rule, str(error), fix))
    return by_file, problems


def _open_file(path: Path, file: str) -> dict[str, StoredTensor]:
    if path.is_dir():
        raise IsADirectoryError("it is a folder")
    handle: Any = safe_open(str(path), framework="pt")
    tensors = {}
    for name in handle.keys():  # noqa: SIM118 - the handle itself is not iterable
        view = handle.get_slice(name)
        tensors[name] = StoredTensor(name, file, view.get_dtype(), tuple(view.get_shape()), handle)
    return tensors


def _index_problems(
    weight_map: Mapping[str, str],
    by_file: Mapping[str, Mapping[str, StoredTensor]],
    index: Path,
    setting: str,
) -> list[Problem]:
    """Tensors that are not where the index says, and tensors in the files that it does not name there."""
    absent = [f"{name} in {file}" for name, file in weight_map.items() if name not in by_file[file]]
    unnamed = [
        f"{name} in {file}"
        for file, tensors in by_file.items()
        for name in tensors
        if weight_map.get(name) != file
    ]
    fix = "the checkpoint as it was saved, downloaded again"
    problems = []
    if absent:
        rule, other = "must name tensors that its files hold", f"{len(absent)} absent: {', '.join(absent)}"
        problems.append(Problem(setting, index, rule, other, fix))
    if unnamed:
        rule, other = "must name every tensor of its files", f"{len(unnamed)} unnamed: {', '.join(unnamed)}"
        problems.append(Problem(setting, index, rule, other, fix))
    return problems
