"""From the mesh section to a mesh: filled axes, and everything that must divide."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from tptrain.config.schema import MeshSection, Recipe
from tptrain.errors import Problem, unknown_name
from tptrain.family import ModelFacts, ParamRow
from tptrain.mesh import AXES, STYLES, MeshShape, RuleTable, fill_axes, table_problems
from tptrain.mesh.axes import DCN_AXES
from tptrain.mesh.rules import split_count
from tptrain.topology import Topology

# Axes that exist in the mesh but have nothing behind them yet.
_UNSUPPORTED = {"context": "context parallelism"}


@dataclass(frozen=True)
class ChosenMesh:
    """The mesh that a section asks for; `complete` is False when its axes could not be filled.

    shape: with every open axis 1 where the mesh is not complete, so that what it does say can be checked.
    """

    shape: MeshShape
    complete: bool
    problems: tuple[Problem, ...]


def choose_mesh(section: MeshSection, topology: Topology) -> ChosenMesh:
    """Fill the open axes: ICI sizes multiply to a slice's devices, DCN sizes to the number of slices."""
    asked = {axis: getattr(section, axis) for axis in AXES}
    asked_dcn = {axis: getattr(section, f"dcn_{axis}") for axis in DCN_AXES}
    total_name = f"devices per slice of {topology.name}"
    ici, problems = fill_axes(asked, topology.devices_per_slice, "mesh.{}", total_name)
    dcn, dcn_problems = fill_axes(asked_dcn, topology.num_slices, "mesh.dcn_{}", f"slices of {topology.name}")
    complete = not problems and not dcn_problems
    supported = ", ".join(axis for axis in AXES if axis not in _UNSUPPORTED)
    for axis, what in _UNSUPPORTED.items():
        if ici[axis] > 1:
            rule, other = f"must be 1: {what} is not yet supported", f"supported axes: {supported}"
            problems.append(Problem(f"mesh.{axis}", _said(asked[axis], ici[axis]), rule, other, "1"))
    shape = MeshShape(
        ici=tuple(max(ici[axis], 1) for axis in AXES),
        dcn=tuple(max(dcn.get(axis, 1), 1) for axis in AXES),
    )
    return ChosenMesh(shape, complete, (*problems, *dcn_problems))


def _said(asked: int, filled: int) -> str:
    """An axis size as the user gave it, and what became of a -1."""
    return str(asked) if asked == filled else f"{asked} (filled: {filled})"


def choose_rules(section: MeshSection) -> tuple[RuleTable | None, list[Problem]]:
    if section.rules in STYLES:
        return STYLES[section.rules], []
    return None, [unknown_name("mesh.rules", section.rules, "rule table", STYLES)]


@dataclass(frozen=True)
class ShardingCase:
    """What the divisibility of parameters depends on. devices: those of one slice."""

    section: MeshSection
    facts: ModelFacts
    rules: RuleTable
    mesh: MeshShape
    devices: int


def sharding_problems(case: ShardingCase, table: Sequence[ParamRow]) -> list[Problem]:
    """Rules against table and mesh, and every dim whose units its axes do not divide."""
    sizes = case.mesh.axis_sizes
    found = table_problems(table, case.rules, sizes)
    problems = [p for p in found if p.setting.removeprefix("mesh.") not in _UNSUPPORTED]
    if sizes["expert"] > 1 and case.facts.experts is None:
        # What else the axis does not divide follows from it.
        return [*problems, _no_experts(case)]
    for dim, (name, count) in case.facts.dim_units().items():
        axes = [axis for axis in case.rules.params[dim] or () if sizes[axis] > 1]
        if axes and count % split_count(axes, sizes):
            axis = max(axes, key=lambda a: sizes[a])
            problems.append(_indivisible(case, axis, f"must divide {name}", f"{name}={count}"))
    return problems


def _no_experts(case: ShardingCase) -> Problem:
    asked = _said(case.section.expert, case.mesh.axis_sizes["expert"])
    other = f"model.config.model_type={case.facts.family}"
    return Problem("mesh.expert", asked, "must be 1: the model has no experts to split", other, "1")


def _indivisible(case: ShardingCase, axis: str, rule: str, other: str) -> Problem:
    """The problem of an axis that does not divide; the sizes it names pass every rule of that axis."""
    asked, ici = getattr(case.section, axis), case.mesh.ici[AXES.index(axis)]
    # An axis over DCN counts once per slice as well.
    slices = case.mesh.axis_sizes[axis] // ici
    units = _common_units(case, axis)
    divides = [d for d in range(1, units + 1) if units % (d * slices) == 0 and _divides(case, axis, d)]
    fits = _fitting(case, axis, divides)
    fix = _listed(fits or divides or [1])
    if asked == -1 and fits:
        fix += " with mesh.data=-1"
    return Problem(f"mesh.{axis}", _said(asked, ici), rule, other, fix)


def _common_units(case: ShardingCase, axis: str) -> int:
    """The largest number of pieces that every dim split by `axis` allows."""
    units = case.facts.dim_units().items()
    return math.gcd(*(count for dim, (_, count) in units if axis in (case.rules.params[dim] or ())))


def _divides(case: ShardingCase, axis: str, size: int) -> bool:
    """Whether every dim that `axis` splits divides with this ICI size of it, beside the dim's other axes.

    An axis that takes what the others leave takes less or more then.
    """
    index = AXES.index(axis)
    asked = [getattr(case.section, name) for name in AXES]
    ici = [*case.mesh.ici[:index], size, *case.mesh.ici[index + 1 :]]
    filled = asked.index(-1) if -1 in asked else index
    if filled != index:
        ici[filled] = max(case.devices // math.prod(s for i, s in enumerate(ici) if i != filled), 1)
    sizes = MeshShape(tuple(ici), case.mesh.dcn).axis_sizes
    splits = [(count, case.rules.params[dim] or ()) for dim, (_, count) in case.facts.dim_units().items()]
    return all(count % split_count(axes, sizes) == 0 for count, axes in splits if axis in axes)


def _fitting(case: ShardingCase, axis: str, sizes: Iterable[int]) -> list[int]:
    """Those sizes with which the ICI axes can still multiply to the devices of a slice."""
    others = [getattr(case.section, a) for a in AXES if a != axis]
    fixed = math.prod(size for size in others if size > 0)
    if -1 in others or getattr(case.section, axis) == -1:
        return [d for d in sizes if case.devices % (d * fixed) == 0]
    return [d for d in sizes if d * fixed == case.devices]


def _listed(values: Sequence[int]) -> str:
    """1, 2, 4 or 8."""
    words = [str(value) for value in values]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


def batch_problems(recipe: Recipe, rules: RuleTable, mesh: MeshShape) -> list[Problem]:
    """Rows must split evenly into micro-batches, and each micro-batch over the axes of the batch."""
    rows, accumulation = recipe.data.batch_rows, recipe.optim.accumulation
    axes = rules.acts["act_batch"] or ()
    shards = split_count(axes, mesh.axis_sizes)
    fix = _nearest_multiples(rows, accumulation * shards)
    if rows % accumulation:
        rule, other = "must be a multiple of optim.accumulation", f"optim.accumulation={accumulation}"
        return [Problem("data.batch_rows", rows, rule, other, fix)]
    if (rows // accumulation) % shards:
        product = " x ".join(f"{axis}={mesh.axis_sizes[axis]}" for axis in axes)
        other = f"{product}, optim.accumulation={accumulation}, so {rows // accumulation} rows at a time"
        rule = "must give every device of the batch axes as many rows"
        return [Problem("data.batch_rows", rows, rule, other, fix)]
    return []


def _nearest_multiples(value: int, unit: int) -> str:
    """The multiples of `unit` just below and above: "16 or 24"."""
    below = value // unit * unit
    return _listed([below, below + unit] if below else [unit])


def padded_table(
    table: Sequence[ParamRow], rules: RuleTable, axis_sizes: Mapping[str, int], master: str
) -> tuple[ParamRow, ...]:
    """The table for this mesh: `vocab` padded to a multiple of its axes, stored in the master format."""
    pieces = split_count(rules.params["vocab"] or (), axis_sizes)

    def padded(dim: str, size: int) -> int:
        return -(-size // pieces) * pieces if dim == "vocab" else size

    return tuple(
        dataclasses.replace(
            row,
            padded_size=tuple(padded(dim, size) for dim, size in zip(row.dims, row.size, strict=True)),
            storage_dtype=master,
        )
        for row in table
    )
