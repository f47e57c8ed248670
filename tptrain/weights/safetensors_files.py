"""Opening a safetensors checkpoint: from a folder to one handle per tensor, or a list of what is broken."""

from __future__ import annotations

import os
from pathlib import Path

from safetensors import SafetensorError

from tptrain.errors import Problem, raise_if_any, refuse
from tptrain.hf_files import INDEX_FILE, SINGLE_FILE
from tptrain.untrusted import link_problems, printable
from tptrain.weights.safetensors_header import open_file
from tptrain.weights.safetensors_index import index_problems, read_index
from tptrain.weights.stored_tensor import StoredTensor

# Formats that are pickles or hold one: loading such a file may run whatever its author put into it.
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle")


def open_checkpoint(folder: Path, setting: str) -> dict[str, StoredTensor]:
    """Tensor name -> handle, for all tensors of the checkpoint in `folder`, single-file or sharded.

    setting: what the user's path was given as, for messages.
    Nothing in the folder is trusted. Raises ProblemsError that lists every broken file, every link out of the
    folder and every contradiction between index and files.
    """
    single, index_path = folder / SINGLE_FILE, folder / INDEX_FILE
    if not os.path.lexists(single) and not os.path.lexists(index_path):
        raise _no_weights(folder, setting)
    if not os.path.lexists(index_path):
        by_file, problems = _open_files(folder, [SINGLE_FILE], setting)
        raise_if_any(problems)
        return by_file[SINGLE_FILE]
    index = read_index(index_path, setting)
    if os.path.lexists(single) and index.files != [SINGLE_FILE]:
        raise refuse(
            setting,
            folder,
            f"must hold {SINGLE_FILE} or {INDEX_FILE}, not both",
            f"the index names {len(index.files)} other files; transformers would load {SINGLE_FILE} instead",
            "the folder without the one that is out of date",
        )
    by_file, problems = _open_files(folder, index.files, setting)
    raise_if_any(problems or index_problems(index, by_file, setting))
    return {name: tensor for tensors in by_file.values() for name, tensor in tensors.items()}


def _no_weights(folder: Path, setting: str) -> Exception:
    pickles = sorted({path.name for pattern in _PICKLES for path in folder.glob(pattern)})
    other = f"it holds: {_listing([path.name for path in folder.iterdir()])}"
    fix = "a folder written by save_pretrained with safetensors"
    if pickles:
        other = f"it holds {_listing(pickles)}: pickle files, which can run code when they are loaded"
        fix = "a copy in safetensors: load and save_pretrained it where running its code does no harm"
    return refuse(setting, folder, f"must hold {SINGLE_FILE} or {INDEX_FILE}", other, fix)


def _listing(names: list[str], most: int = 8) -> str:
    shown = ", ".join(printable(name) for name in sorted(names)[:most]) or "nothing"
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


def _open_files(
    folder: Path, files: list[str], setting: str
) -> tuple[dict[str, dict[str, StoredTensor]], list[Problem]]:
    """File name -> tensor name -> handle, and a problem for each file that cannot be opened."""
    by_file, problems = {}, link_problems(folder, files, setting)
    if problems:
        return {}, problems
    for file in files:
        path = folder / file
        try:
            by_file[file] = _open(path, file)
        except FileNotFoundError:
            other = "it is a link to nothing" if path.is_symlink() else f"{INDEX_FILE} names it"
            fix = "the complete checkpoint, downloaded again"
            problems.append(Problem(setting, path, "must exist", other, fix))
        except (OSError, ValueError, SafetensorError) as error:
            rule, fix = "must be a complete safetensors file", "an intact copy of it"
            problems.append(Problem(setting, path, rule, str(error), fix))
    return by_file, problems


def _open(path: Path, file: str) -> dict[str, StoredTensor]:
    handle, extents = open_file(path)
    return {name: StoredTensor(name, file, path, extent, handle) for name, extent in extents.items()}
