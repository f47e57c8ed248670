"""A model on disk as one side of a comparison: named arrays and their values in a stream, and its facts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tptrain.ckpt.reading import StepReader, readable
from tptrain.config.state_parts import PARAMS
from tptrain.convert.inspecting import Array, item_names, step_arrays, tensor_array
from tptrain.convert.sources import Found
from tptrain.errors import refuse
from tptrain.family import ParamRow, facts_from_config, parameter_table
from tptrain.family.table import DTYPE_BYTES
from tptrain.hf_files import CONFIG_FILE, GENERATION_FILE
from tptrain.weights import complete_config
from tptrain.weights.hf_json import generation_config, read_json, with_token_ids
from tptrain.weights.safetensors_files import open_checkpoint
from tptrain.weights.safetensors_in import Stored, rows_in_files

_BLOCK_BYTES = 4 * 2**20
# Dtypes are compared tensor by tensor; what a config says of them need not be so.
_NOT_COMPARED = ("dtype", "torch_dtype")

Blocks = Callable[[], Iterator[torch.Tensor]]


@dataclass(frozen=True)
class Side:
    """One of two models. Weights are named as in Hugging Face, arrays of other items of a step `item/name`.

    blocks: name -> gives the row blocks of that array. config: spelled as an export would write it.
    run:    the facts of a step's run, without its config; None for a folder.
    """

    arrays: Mapping[str, Array]
    blocks: Mapping[str, Blocks]
    config: Mapping[str, Any]
    run: Mapping[str, Any] | None = None


def open_side(found: Found, setting: str, unverified: bool = False) -> Side:
    """Open a model for comparing. Raises ProblemsError as converting it would."""
    if found.is_step:
        return _step_side(found.folder, setting, unverified)
    return _folder_side(found.folder, setting)


def _step_side(folder: Path, setting: str, unverified: bool) -> Side:
    arrays: dict[str, Array] = {}
    blocks: dict[str, Blocks] = {}
    run: dict[str, Any] = {}
    for item in item_names(folder):
        reader = StepReader(folder, setting, unverified, item)
        run = dict(reader.run)
        prefix = "" if item == PARAMS else f"{item}/"
        with readable(folder, setting):
            found = step_arrays(folder / item)
        arrays |= {f"{prefix}{name}": array for name, array in found.items()}
        blocks |= {f"{prefix}{name}": _step_blocks(reader, name, array) for name, array in found.items()}
    _require_floats(arrays, folder, setting)
    assets = folder.absolute().parent.parent / "assets"
    return Side(arrays, blocks, _config(run.pop("hf_config", {}), assets, setting), run)


def _step_blocks(reader: StepReader, name: str, array: Array) -> Blocks:
    row = ParamRow(name, (), array.shape, array.shape)
    return lambda: reader.read_blocks(row)


def _folder_side(folder: Path, setting: str) -> Side:
    config = _config(read_json(folder / CONFIG_FILE, setting), folder, setting)
    files = open_checkpoint(folder, setting)
    table = parameter_table(facts_from_config(config))
    known = {name for row in table for name in row.file_sizes}
    tensors: dict[str, Stored] = rows_in_files(table, files)
    tensors |= {name: tensor for name, tensor in files.items() if name not in known}
    tensors = dict(sorted(tensors.items()))
    arrays = {name: tensor_array(tensor) for name, tensor in tensors.items()}
    _require_floats(arrays, folder, setting)
    return Side(arrays, {name: _folder_blocks(tensor) for name, tensor in tensors.items()}, config)


def _folder_blocks(tensor: Stored) -> Blocks:
    return lambda: tensor.read_blocks(_BLOCK_BYTES)


def _require_floats(arrays: Mapping[str, Array], folder: Path, setting: str) -> None:
    others = [f"{name} {array.dtype}" for name, array in arrays.items() if array.dtype not in DTYPE_BYTES]
    if others:
        rule, fix = "must hold floating-point arrays", "weights that are not quantized"
        raise refuse(setting, folder, rule, f"{len(others)} are not, such as {others[0]}", fix)


def _config(config: Mapping[str, Any], folder: Path, setting: str) -> dict[str, Any]:
    """A config with the token ids of the generation_config.json in `folder`, as an export would have it."""
    path = folder / GENERATION_FILE
    generation = generation_config(read_json(path, setting) if path.exists() else {}, config, None)
    done = with_token_ids(complete_config(config, ""), generation)
    return {name: value for name, value in done.items() if value is not None and name not in _NOT_COMPARED}
