"""Weights from a safetensors checkpoint, checked against the parameter table and read by slices."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch

from tptrain.errors import Problem, raise_if_any
from tptrain.family.table import ParamRow, stored_rows
from tptrain.hf_files import WEIGHT_FILES, local_folder
from tptrain.weights.safetensors_files import open_checkpoint
from tptrain.weights.safetensors_header import FLOAT_DTYPES
from tptrain.weights.stored_tensor import SlicedTensor, StoredTensor

# Tables that older versions of transformers stored beside the parameters; they follow from the config.
_NOT_PARAMETERS = re.compile(r"(^|\.)(rotary_emb\.inv_freq|position_ids)$")


class SafetensorsSource:
    """A TensorSource over a local folder or a hub id; tensors stay on disk until a slice is asked for.

    The constructor opens every file and compares names, shapes and dtypes with the table. It raises one
    ProblemsError that lists all missing, extra and misshapen tensors by name; no weights are read before
    it passes, except to compare two tied tensors that are both in the files.

    folder_or_hub_id: as `local_folder` takes it. setting: where the user gave it, for messages.
    """

    def __init__(
        self, folder_or_hub_id: str | Path, table: Sequence[ParamRow], setting: str = "model.pretrained"
    ):
        folder = local_folder(folder_or_hub_id, setting, WEIGHT_FILES)
        tensors = open_checkpoint(folder, setting)
        self.folder = folder
        self._tensors = rows_in_files(table, tensors)
        raise_if_any(_problems(table, tensors, self._tensors, folder, setting))

    def read(self, row: ParamRow, index: tuple[slice, ...]) -> torch.Tensor:
        """The slice `index` of a row, in the dtype of the file, as a private CPU tensor."""
        assert row.tied_to is None, f"{row.name} is tied to {row.tied_to} and has no data of its own"
        return self._tensors[row.name].read(index)

    def read_blocks(self, row: ParamRow, max_bytes: int) -> Iterator[torch.Tensor]:
        """The whole row as private blocks of whole rows along dim 0: see `StoredTensor.read_blocks`."""
        assert row.tied_to is None, f"{row.name} is tied to {row.tied_to} and has no data of its own"
        return self._tensors[row.name].read_blocks(max_bytes)


Stored = StoredTensor | SlicedTensor


def rows_in_files(table: Sequence[ParamRow], tensors: Mapping[str, StoredTensor]) -> dict[str, Stored]:
    """Row name -> its data, for every row that the files hold whole. A tied pair may be under either name."""
    found: dict[str, Stored] = {}
    for row in stored_rows(table):
        parts = [tensors[name] for name in row.file_sizes if name in tensors]
        if len(parts) < len(row.file_sizes):
            continue
        found[row.name] = SlicedTensor(row.name, tuple(parts)) if row.is_in_slices else parts[0]
    for row in table:
        if row.tied_to is not None and row.name in tensors:
            found.setdefault(row.tied_to, tensors[row.name])
    return found


def _problems(
    table: Sequence[ParamRow],
    tensors: Mapping[str, StoredTensor],
    found: Mapping[str, Stored],
    folder: Path,
    setting: str,
) -> list[Problem]:
    """What is wrong with a checkpoint for this table: one problem per kind, each naming every tensor."""
    rows = stored_rows(table)
    sizes = {name: size for row in table for name, size in row.file_sizes.items()}
    files = {name: row for row in rows for name in row.file_sizes}
    missing = [name for name, row in files.items() if row.name not in found and name not in tensors]
    extra = [name for name in sorted(tensors) if name not in sizes and not _NOT_PARAMETERS.search(name)]
    used = [tensor for row in rows if row.name in found for tensor in _parts(found[row.name])]
    misshapen = [
        f"{each.name} {list(each.shape)} in the file, {list(sizes[each.name])} in the model"
        for each in used
        if each.shape != sizes[each.name]
    ]
    wrong_dtype = [f"{each.name} {each.dtype}" for each in used if each.dtype not in FLOAT_DTYPES]
    mixed = [
        f"{row.name} {', '.join(sorted(dtypes))}"
        for row in rows
        if row.name in found and len(dtypes := {each.dtype for each in _parts(found[row.name])}) > 1
    ]
    tied = [(row.name, row.tied_to) for row in table if row.tied_to is not None]
    untied = [
        f"{name} differs from {other}"
        for name, other in tied
        if name in tensors and other in tensors and not tensors[name].same_bits(tensors[other])
    ]
    config_or_weights = "a model.config that describes these weights, or weights that it describes"
    kinds = [
        (missing, "must hold every tensor of the model", f"missing of {len(files)}", config_or_weights),
        (extra, "must hold no tensor that the model lacks", "extra", config_or_weights),
        (misshapen, "must hold tensors of the model's sizes", "misshapen", config_or_weights),
        (
            wrong_dtype,
            "must hold floating-point tensors",
            f"not {', '.join(FLOAT_DTYPES)}",
            "weights that are not quantized",
        ),
        (mixed, "must hold all experts of a matrix in one dtype", "mixed", "weights of one dtype"),
        (
            untied,
            "must hold equal tensors where the model ties them",
            "unequal",
            "model.config.tie_word_embeddings=false, or weights that are tied",
        ),
    ]
    return [
        Problem(setting, folder, rule, f"{len(names)} {label}: {', '.join(names)}", fix)
        for names, rule, label, fix in kinds
        if names
    ]


def _parts(stored: Stored) -> tuple[StoredTensor, ...]:
    return stored.slices if isinstance(stored, SlicedTensor) else (stored,)
