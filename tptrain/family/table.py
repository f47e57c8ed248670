"""The parameter table: one row per tensor of a model, named and laid out as in its safetensors files.

Everything that touches parameters reads this table: initialisation, sharding, bytes per chip, import and
export, the checkpoint's tree. Rows are plain data, so a table for a 70B model costs nothing to build.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

# The closed vocabulary of parameter dims. A rule table must speak about each one it meets.
PARAM_DIMS = (
    *("vocab", "embed", "heads", "kv_heads", "mlp", "norm", "layers"),
    *("router", "experts", "expert_mlp", "expert_embed"),
    "rank",
)

Init = Literal["normal", "ones", "zeros", "kaiming_uniform"]

DTYPE_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class ParamRow:
    """One parameter tensor.

    name:          the tensor's name in Hugging Face safetensors files; what differs is told by `in_files`.
    dims:          a name from PARAM_DIMS for each dimension, in the file's layout (`[out, in]`).
    size:          elements per dimension on disk.
    padded_size:   elements per dimension in memory; larger than `size` only where `vocab` is padded.
    init:          how a model that starts from random weights fills it; kaiming_uniform: evenly between plus
                   and minus the root of 1 / (size of the last dim).
    decay:         whether weight decay applies (matrices yes; norms and biases no).
    trainable:     whether the optimizer updates it.
    storage_dtype: dtype of the master copy in memory and in checkpoints.
    tied_to:       name of the row that stores the data of this one; None for a row with its own data.
    saved:         whether a checkpoint holds it: all but the weights below adapters, which are read again
                   where they came from.
    in_files:      names of the tensors in files where these are not the row itself: another name for it, or
                   one for each slice along its first dim, which are experts.
    """

    name: str
    dims: tuple[str, ...]
    size: tuple[int, ...]
    padded_size: tuple[int, ...]
    init: Init = "normal"
    decay: bool = True
    trainable: bool = True
    storage_dtype: str = "float32"
    tied_to: str | None = None
    saved: bool = True
    in_files: tuple[str, ...] = ()

    @property
    def is_adapter(self) -> bool:
        """Whether it belongs to an adapter, and not to the model that is adapted."""
        return "rank" in self.dims

    @property
    def is_in_slices(self) -> bool:
        """Whether files hold each slice along the first dim as a tensor of its own."""
        return self.dims[:1] == ("experts",)

    @property
    def file_sizes(self) -> dict[str, tuple[int, ...]]:
        """Name in files -> elements per dimension, in the order of the slices."""
        size = self.size[1:] if self.is_in_slices else self.size
        return dict.fromkeys(self.in_files or (self.name,), size)

    @property
    def num_elements(self) -> int:
        return math.prod(self.size)

    @property
    def padded_bytes(self) -> int:
        return math.prod(self.padded_size) * DTYPE_BYTES[self.storage_dtype]


def matrix(name: str, dims: tuple[str, ...], size: tuple[int, ...]) -> ParamRow:
    """A weight matrix: random normal at the start, with weight decay."""
    return ParamRow(name, dims, size, size)


def norm_scale(name: str, size: int, init: Init = "ones") -> ParamRow:
    """The scale of a norm: no weight decay."""
    return ParamRow(name, ("norm",), (size,), (size,), init=init, decay=False)


def bias(name: str, dim: str, size: int) -> ParamRow:
    """A bias vector: zeros at the start, no weight decay."""
    return ParamRow(name, (dim,), (size,), (size,), init="zeros", decay=False)


def stored_rows(table: Iterable[ParamRow]) -> tuple[ParamRow, ...]:
    """The rows with data of their own: all but the tied ones."""
    return tuple(row for row in table if row.tied_to is None)
