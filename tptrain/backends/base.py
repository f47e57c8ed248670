"""What training asks of a backend, and how a backend stores the rows of the parameter table.

Outside a backend a tensor of the state is addressed by its name in the parameter table. Inside, a backend
keeps buffers: the XLA backend stacks the same matrix of all layers into one buffer for its scan over
layers, the torch backend keeps every row by itself. `Layout` is the invertible map between the two.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch

from tptrain.config.plan import Plan
from tptrain.config.state_parts import PARAMS
from tptrain.family import LayerRuns, ParamRow, layer_of, stored_rows
from tptrain.jaxside.random_init import RandomSource
from tptrain.mesh import Spec
from tptrain.models.decoder import Decoder
from tptrain.models.linear import add_adapters
from tptrain.models.loss import LossChunks

TORCH_DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Buffer:
    """One tensor of a backend: a single row, or the same row of several layers stacked in front.

    rows:    the rows it stores, in order of their index in the buffer.
    stacked: whether the buffer has a leading layer dim (also when that dim is 1).
    spec:    one entry per dim of the buffer; the layer dim is never split.
    """

    name: str
    rows: tuple[ParamRow, ...]
    stacked: bool
    spec: Spec

    @property
    def shape(self) -> tuple[int, ...]:
        row_shape = self.rows[0].padded_size
        return (len(self.rows), *row_shape) if self.stacked else row_shape

    @property
    def row_spec(self) -> Spec:
        return self.spec[1:] if self.stacked else self.spec

    @property
    def decay(self) -> bool:
        return self.rows[0].decay

    @property
    def trainable(self) -> bool:
        return self.rows[0].trainable

    @property
    def saved(self) -> bool:
        return self.rows[0].saved

    @property
    def is_adapter(self) -> bool:
        return self.rows[0].is_adapter

    @property
    def dtype(self) -> torch.dtype:
        return TORCH_DTYPES[self.rows[0].storage_dtype]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def every_buffer(buffer: Buffer) -> bool:
    return True


class Layout:
    """Row name -> (buffer, index), and back. `buffers` is in the order of the model's forward pass."""

    def __init__(self, buffers: Sequence[Buffer]):
        self.buffers = {buffer.name: buffer for buffer in buffers}
        self.index = {row.name: (buffer.name, i) for buffer in buffers for i, row in enumerate(buffer.rows)}

    @staticmethod
    def plain(table: Sequence[ParamRow], specs: Mapping[str, Spec]) -> Layout:
        """One buffer per stored row, under the row's own name."""
        return Layout([Buffer(row.name, (row,), False, specs[row.name]) for row in stored_rows(table)])

    @staticmethod
    def stacked(table: Sequence[ParamRow], specs: Mapping[str, Spec], runs: LayerRuns) -> Layout:
        """Layers stacked for a scan over each run: the first period of a run is at index 0.

        runs: of the weights, also where the table is that of another part of the state.
        """
        groups: dict[str, list[ParamRow]] = {}
        for row in stored_rows(table):
            groups.setdefault(runs.stack_of(row.name) or row.name, []).append(row)
        buffers = []
        for name, rows in groups.items():
            in_layers = layer_of(rows[0].name) is not None
            spec = specs[rows[0].name]
            buffers.append(Buffer(name, tuple(rows), in_layers, ((), *spec) if in_layers else spec))
        return Layout(buffers)


def meta_decoder(plan: Plan) -> Decoder:
    """The plan's model without weights, before a backend's own passes."""
    lora, chunks = plan.recipe.lora, LossChunks(plan.loss_chunk_tokens, plan.batch_shards)
    with torch.device("meta"):
        decoder = Decoder(plan.facts, plan.padded_vocab, chunks)
        if lora.rank:
            add_adapters(decoder, plan.table, lora.rank, lora.scale)
    return decoder


@dataclass(frozen=True)
class HostShards:
    """One row of the table in host memory, as the pieces that this process's devices hold.

    Read them with `tptrain.backends.shards.host_shards`.

    shape:  the row's padded size.
    spec:   how the mesh splits it.
    shards: mesh position (row-major over AXES) -> CPU tensor, for every device of this process.
    """

    shape: tuple[int, ...]
    spec: Spec
    shards: Mapping[int, torch.Tensor]


class TensorSource(Protocol):
    """Where weights come from: safetensors files, a checkpoint, or a random generator."""

    def read(self, row: ParamRow, index: tuple[slice, ...]) -> torch.Tensor:
        """The slice `index` (within `row.size`, unpadded) of a row, as a CPU tensor of any float dtype."""
        ...


@runtime_checkable
class InPlaceSource(TensorSource, Protocol):
    """A source that can write where the values are to lie, which saves a copy."""

    def read_into(self, row: ParamRow, index: tuple[slice, ...], out: torch.Tensor) -> None:
        """Fill `out` with the slice `index` of a row, in the dtype of `out`."""
        ...


# A pure function (state, inputs) -> (state, outputs); all four are flat dicts of tensors.
StepFunction = Callable[[Tensors, Tensors], tuple[Tensors, Tensors]]


# (numbers, index of a buffer) -> the same numbers, for this buffer alone: see `Backend.apart`.
Apart = Callable[[Tensors, int], Tensors]
# (earlier, later) -> the same values, in that order: see `Backend.in_order`.
InOrder = Callable[[list[torch.Tensor], Tensors], tuple[list[torch.Tensor], Tensors]]


class CompiledStep(Protocol):
    """A step function bound to a backend: compiled once on the first shapes it was made with.

    trace_seconds, compile_seconds: what that took; 0 where nothing is compiled.
    """

    trace_seconds: float
    compile_seconds: float

    def __call__(self, state: Tensors, inputs: Tensors) -> tuple[Tensors, Tensors]:
        """Run it. The buffers of `state` are donated: they must not be used afterwards."""
        ...


@dataclass(frozen=True)
class TracedStep:
    """The program of a train step, before the compiler has seen it.

    module:     a serialized HloModuleProto; partition p of it is mesh position p.
    parameters: names of its parameters in order; None for a number that the trace has lifted.
    outputs:    names of its results in order.
    donated:    names of the parameters that it may write its results into.
    specs:      name -> spec, of every named parameter.
    """

    module: bytes
    parameters: tuple[str | None, ...]
    outputs: tuple[str, ...]
    donated: frozenset[str]
    specs: Mapping[str, Spec]
    trace_seconds: float


class Backend(Protocol):
    """Devices, buffers and compiled functions behind one interface."""

    # Of the weights, and of every part of the state by its name (`Plan.parts`), the weights included. The
    # buffers of a part are named like the weights they belong to.
    layout: Layout
    layouts: dict[str, Layout]
    # Whether the devices compute while the host does other things (chips do, virtual CPU devices do not).
    works_beside_host: bool
    # Mesh positions (row-major over AXES) of this process's devices.
    local_positions: tuple[int, ...]

    def decoder(self) -> Decoder:
        """The model as this backend runs it; its parameters carry the names of the layout's buffers."""
        ...

    def place(
        self,
        source: TensorSource,
        part: str = PARAMS,
        wanted: Callable[[Buffer], bool] = every_buffer,
    ) -> Tensors:
        """Read the wanted buffers of a part of the state, each device's slice onto that device."""
        ...

    def create(self, parts: Iterable[str], source: RandomSource | None = None) -> dict[str, Tensors]:
        """Parts of the state that nothing is read for: new weights for PARAMS, zeros for all others.

        Each device makes its own pieces, where they stay; where programs are compiled, one makes them all.
        source: the seed and spread of the weights, where PARAMS is among the parts.
        """
        ...

    def put_batch(self, batch: Mapping[str, Any]) -> Tensors:
        """numpy arrays `[accumulation, rows, tokens]` -> device tensors, rows split over the mesh."""
        ...

    def put_scalars(self, values: Mapping[str, float]) -> Tensors:
        """Numbers -> device scalars of the master dtype, replicated."""
        ...

    def put_constant(self, tensor: torch.Tensor) -> torch.Tensor:
        """A host tensor -> a device tensor, replicated."""
        ...

    def make_caches(self, rows: int, length: int, dtype: torch.dtype) -> Tensors:
        """Empty key-value caches, named `key.<i>` and `value.<i>` in the order the decoder takes them."""
        ...

    def apart(self, numbers: Tensors, index: int) -> Tensors:
        """Scalars as values that belong to the buffer `index` alone.

        A compiler that sees one number spread over two buffers of one shape may spread it once, split it as
        one of the two is split, and move it over the network for the other.
        """
        ...

    def in_order(self, earlier: list[torch.Tensor], later: Tensors) -> tuple[list[torch.Tensor], Tensors]:
        """The same values; what is computed from `later` begins when `earlier` are there."""
        ...

    def compile_step(
        self, function: StepFunction, state: Tensors, inputs: Tensors, specs: Mapping[str, Spec]
    ) -> CompiledStep:
        """Capture `function` once on arguments of these shapes; every later call replays it.

        specs: state name -> spec of that tensor, before the step and after it.
        """
        ...

    def fetch_shards(self, tensors: Tensors) -> dict[str, dict[int, torch.Tensor]]:
        """Buffers -> their pieces on the host: name -> mesh position -> CPU tensor, for local positions.

        The values must be finished (`sync`). The pieces may share memory with the buffers.
        """
        ...

    def fetch_scalars(self, outputs: Tensors) -> dict[str, float]:
        """Scalars of a step as Python numbers; waits for that step."""
        ...

    def fetch_rows(self, tensor: torch.Tensor) -> np.ndarray:
        """A small result as a whole: [rows, ...] on the host."""
        ...

    def compile_count(self) -> int:
        """Programs compiled by this process so far; 0 where nothing is compiled."""
        ...

    def sync(self) -> None:
        """Wait until every device has finished."""
        ...
