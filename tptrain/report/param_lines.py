"""The parameter table for people: the rows of all layers that are alike become one line."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tptrain.family import ParamRow, stored_rows
from tptrain.mesh import Spec
from tptrain.mesh.rules import split_count

_LAYER = re.compile(r"\.layers\.(\d+)\.")


@dataclass(frozen=True)
class ParamLine:
    """One line: `rows` rows that differ in their layer alone. Counts and bytes are those of all of them.

    num_elements: without padding. device_bytes: of the master copy on one device, padding included.
    """

    name: str
    row: ParamRow
    spec: Spec
    rows: int
    num_elements: int
    device_bytes: int


def row_device_bytes(row: ParamRow, spec: Spec, axis_sizes: Mapping[str, int]) -> int:
    """Bytes of a row's master copy on one device."""
    pieces = split_count([axis for axes in spec for axis in axes], axis_sizes)
    assert row.padded_bytes % pieces == 0
    return row.padded_bytes // pieces


def param_lines(
    table: Sequence[ParamRow], specs: Mapping[str, Spec], axis_sizes: Mapping[str, int]
) -> list[ParamLine]:
    """The stored rows in the table's order, layers collapsed: `model.layers.{0..31}.mlp.up_proj.weight`."""
    groups: dict[object, list[ParamRow]] = {}
    for row in stored_rows(table):
        alike = dataclasses.replace(row, name=_LAYER.sub(".layers.{}.", row.name), in_files=())
        groups.setdefault((alike, specs[row.name]), []).append(row)
    return [_line(rows, specs[rows[0].name], axis_sizes) for rows in groups.values()]


def _line(rows: list[ParamRow], spec: Spec, axis_sizes: Mapping[str, int]) -> ParamLine:
    return ParamLine(
        name=_joint_name([row.name for row in rows]),
        row=rows[0],
        spec=spec,
        rows=len(rows),
        num_elements=sum(row.num_elements for row in rows),
        device_bytes=sum(row_device_bytes(row, spec, axis_sizes) for row in rows),
    )


def _joint_name(names: list[str]) -> str:
    found = _LAYER.search(names[0])
    if found is None or len(names) == 1:
        return names[0]
    layers = [int(match[1]) for name in names if (match := _LAYER.search(name))]
    contiguous = layers == list(range(layers[0], layers[-1] + 1))
    listed = f"{layers[0]}..{layers[-1]}" if contiguous else ",".join(map(str, layers))
    return f"{names[0][: found.start(1)]}{{{listed}}}{names[0][found.end(1) :]}"
