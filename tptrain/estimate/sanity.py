"""Sentences about a mesh, a network and a batch that do not go well together. None of them is an error."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from itertools import combinations

from tptrain.config.plan import Plan
from tptrain.estimate.network import AxisLinks
from tptrain.estimate.roofline import Roofline
from tptrain.estimate.text import seconds_text
from tptrain.estimate.workload import Workload
from tptrain.mesh import AXES
from tptrain.topology import Topology


def sanity_notices(
    plan: Plan, work: Workload, links: Mapping[str, AxisLinks], fastest: Roofline | None
) -> Iterator[str]:
    """What looks slow, with the numbers and what would change it."""
    topology = plan.topology
    if topology.chip.torus_dims:
        yield from _misfit_axes(plan, links)
    if fastest is None:
        return
    compute = fastest.compute_seconds
    rows = plan.micro_rows // plan.batch_shards
    if topology.num_slices > 1 and topology.chip.dcn_bytes_per_second is None:
        yield (
            f"{topology.chip.name} has no published speed between slices: what goes over DCN is counted in"
            " bytes, not in time."
        )
    if fastest.dcn_seconds > compute:
        yield (
            f"Between slices a step moves data for {seconds_text(fastest.dcn_seconds)} and computes for"
            f" {seconds_text(compute)}: DCN is the limit. {_dcn_way_out(plan, rows, fastest)}"
        )
    if fastest.host_seconds is not None and fastest.host_seconds > compute:
        yield (
            f"To the host's memory and back a step moves data for {seconds_text(fastest.host_seconds)} and"
            f" computes for {seconds_text(compute)}: the host link is the limit. remat.policy=full or"
            " attention does without it."
        )
    if fastest.ici_seconds > compute:
        yield (
            f"Within a slice a step moves data for {seconds_text(fastest.ici_seconds)} along mesh."
            f"{fastest.busiest_axis} and computes for {seconds_text(compute)}: chips wait for each other."
            f" {_ici_way_out(work, rows, fastest)}"
        )


def _misfit_axes(plan: Plan, links: Mapping[str, AxisLinks]) -> Iterator[str]:
    """Axes that are no product of whole sides: their chips are lines within rings."""
    for axis, found in links.items():
        if not all(part.is_whole for part in found.parts):
            size = plan.mesh.ici[AXES.index(axis)]
            sizes = ", ".join(map(str, _products(plan.topology)))
            yield (
                f"mesh.{axis}={size} does not take whole sides of the slice ({plan.topology.shape_text}): its"
                f" chips are lines, no rings, and its collectives slower. Products of sides: {sizes}."
            )


def _products(topology: Topology) -> list[int]:
    """Sizes that an axis may have to take whole sides of the slice."""
    sides = [side for side in topology.shape if side > 1]
    chosen = (some for count in range(1, len(sides) + 1) for some in combinations(sides, count))
    return sorted({math.prod(some) for some in chosen})


def _dcn_way_out(plan: Plan, rows: int, fastest: Roofline) -> str:
    if plan.mesh.dcn[AXES.index("fsdp")] > 1:
        return "mesh.dcn_fsdp=1 mesh.dcn_data=-1 sends gradients alone, once a micro-batch."
    return _more_rows(rows, fastest.dcn_seconds / fastest.compute_seconds)


def _ici_way_out(work: Workload, rows: int, fastest: Roofline) -> str:
    """Weights and gradients are the same whatever the batch; activations grow with it."""
    if fastest.busiest_axis in (work.rules.acts["act_batch"] or ()):
        return _more_rows(rows, fastest.ici_seconds / fastest.compute_seconds)
    return f"A smaller mesh.{fastest.busiest_axis} moves less."


def _more_rows(rows: int, ratio: float) -> str:
    return (
        f"With {rows} {'row' if rows == 1 else 'rows'} at a time on a chip the batch is small;"
        f" from {math.ceil(rows * ratio)} on, computing takes longer."
    )
