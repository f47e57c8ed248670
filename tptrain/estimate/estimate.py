"""The estimate of a plan: every part of it together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tptrain.config.plan import Plan
from tptrain.estimate.collectives import Collective, collectives
from tptrain.estimate.hosts import HostNeeds, host_needs
from tptrain.estimate.memory import FITTED, MARGIN, Fitted, Memory, Verdict, memory, verdict
from tptrain.estimate.network import AxisLinks, axis_links
from tptrain.estimate.roofline import Roofline, roofline
from tptrain.estimate.sanity import sanity_notices
from tptrain.estimate.workload import Workload, workload_of


@dataclass(frozen=True)
class Estimate:
    """What a plan needs and how fast it could be.

    hbm_bytes: what a chip lets one program use; None for virtual CPU devices. margin: of `verdict`.
    roofline:  None where the chip has no published numbers.
    notices:   sentences about what looks slow.
    """

    work: Workload
    memory: Memory
    hbm_bytes: int | None
    margin: float
    verdict: Verdict
    hosts: HostNeeds
    links: Mapping[str, AxisLinks]
    collectives: tuple[Collective, ...]
    roofline: Roofline | None
    notices: tuple[str, ...]


def estimate(plan: Plan, fitted: Fitted = FITTED) -> Estimate:
    """The estimate of a plan, by arithmetic alone: milliseconds, no framework, no device."""
    work, topology = workload_of(plan), plan.topology
    needed, links = memory(work, fitted), axis_links(topology, plan.mesh)
    moved = collectives(work, plan.mesh)
    fastest = roofline(work, topology, links, moved)
    return Estimate(
        work=work,
        memory=needed,
        hbm_bytes=topology.chip.hbm_bytes,
        margin=MARGIN,
        verdict=verdict(needed.total_bytes, topology.chip.hbm_bytes),
        hosts=host_needs(plan, work),
        links=links,
        collectives=moved,
        roofline=fastest,
        notices=tuple(sanity_notices(plan, work, links, fastest)),
    )
