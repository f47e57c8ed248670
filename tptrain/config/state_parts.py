"""What a run keeps between two steps, as plain data: the weights, and what the optimizer holds beside them.

Each part of the state has a table of its own, derived from the parameter table. Whoever allocates, splits,
counts, saves or restores the state reads these tables; only `tptrain.train.optimizers` knows the arithmetic.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from tptrain.config.schema import OptimSection
from tptrain.family import ParamRow, stored_rows
from tptrain.mesh import Spec

PARAMS = "params"

# What a row of a part looks like, from the row of the weight and its spec; None where the part has none.
_Derived = tuple[ParamRow, Spec] | None
_Derive = Callable[[ParamRow, Spec], _Derived]


@dataclass(frozen=True)
class StatePart:
    """One part of the state; an item of a checkpoint has the same name and rows.

    rows:  one for each tensor, under the name of the weight it belongs to, with the part's own shape and
           dtype. specs: row name -> spec.
    """

    name: str
    rows: tuple[ParamRow, ...]
    specs: Mapping[str, Spec]


def state_parts(
    table: Sequence[ParamRow], specs: Mapping[str, Spec], optim: OptimSection
) -> dict[str, StatePart]:
    """The parts of a run's state by name, `params` first. Frozen weights are in `params` alone.

    A part that would be empty, such as the factored moments of a model without matrices, is left out.
    """
    rows = stored_rows(table)
    parts = [StatePart(PARAMS, rows, {row.name: specs[row.name] for row in rows})]
    trained = [row for row in rows if row.trainable]
    parts += [_part(name, trained, specs, derive) for name, derive in _beside(optim).items()]
    return {part.name: part for part in parts if part.rows}


def is_factored(row: ParamRow) -> bool:
    """Whether Adafactor keeps a row and a column in place of the weight's second moments."""
    return len(row.size) >= 2


def _part(name: str, trained: Iterable[ParamRow], specs: Mapping[str, Spec], derive: _Derive) -> StatePart:
    derived = [found for row in trained if (found := derive(row, specs[row.name])) is not None]
    return StatePart(name, tuple(row for row, _ in derived), {row.name: spec for row, spec in derived})


def _beside(optim: OptimSection) -> dict[str, _Derive]:
    """Part name -> its rows, for what the optimizer keeps beside the weights."""

    def moment(row: ParamRow, spec: Spec) -> _Derived:
        dtype = row.storage_dtype if optim.moments_dtype == "float32" else optim.moments_dtype
        return dataclasses.replace(row, storage_dtype=dtype), spec

    def whole(row: ParamRow, spec: Spec) -> _Derived:
        return None if is_factored(row) else (row, spec)

    def per_row(row: ParamRow, spec: Spec) -> _Derived:
        return _with_dims(row, spec, range(len(row.size) - 1)) if is_factored(row) else None

    def per_column(row: ParamRow, spec: Spec) -> _Derived:
        last = len(row.size) - 1
        return _with_dims(row, spec, [*range(last - 1), last]) if is_factored(row) else None

    if optim.name == "adamw":
        return {"mu": moment, "nu": moment}
    momentum = {"mu": moment} if optim.momentum else {}
    return {**momentum, "nu": whole, "nu_row": per_row, "nu_col": per_column}


def _with_dims(row: ParamRow, spec: Spec, kept: Iterable[int]) -> tuple[ParamRow, Spec]:
    """A row with some of its dims; each stays split as it is."""
    kept = tuple(kept)
    dims, size = tuple(row.dims[i] for i in kept), tuple(row.size[i] for i in kept)
    padded = tuple(row.padded_size[i] for i in kept)
    return dataclasses.replace(row, dims=dims, size=size, padded_size=padded), tuple(spec[i] for i in kept)
