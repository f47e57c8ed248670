"""Memory that a host needs to load, train, save and export a model, and the room that files take on disk.

What the running process itself takes, a few GB of libraries, comes on top.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

from tptrain.config.kept_steps import most_kept
from tptrain.config.plan import Plan
from tptrain.errors import Problem
from tptrain.estimate.activations import offloaded_bytes
from tptrain.estimate.text import bytes_text
from tptrain.estimate.workload import Workload, workload_of
from tptrain.family import ParamRow, stored_rows
from tptrain.family.table import DTYPE_BYTES
from tptrain.mesh.rules import split_count

# A save's peak over the state it copies, measured: 1.14 to 1.21, median 1.18, with 1.5 GB of state.
_SAVE_FACTOR = 1.2
# What an export holds at a time, whatever the model's size: the block of whole rows that is being cast (128
# MiB at most, if no row is larger) and the pieces on their way to the disk; measured growth 0.10 to 0.14 GB.
_EXPORT_BYTES = 150_000_000


@dataclass(frozen=True)
class HostNeeds:
    """Bytes of a host's memory while it loads, trains, saves and exports, and of files.

    memory:     what its machine type has; None for virtual devices, which run on any host.
    offload:    activations that wait for the backward pass.
    load:       two buffers' pieces: one on its way to the chips, the next one being read.
    save:       the host's share of the state, copied, and what is in flight beside it.
    export:     of the host that writes the model folder; None without an export.
    checkpoint: on disk, all hosts together, of one step; up to `checkpoints` of them exist at a time.
    exported:   the model folder's weights on disk; None without an export.
    """

    memory_bytes: int | None
    offload_bytes: int
    load_bytes: int
    save_bytes: int
    export_bytes: int | None
    checkpoint_bytes: int
    checkpoints: int
    exported_bytes: int | None


def host_needs(plan: Plan, work: Workload | None = None) -> HostNeeds:
    """What a plan asks of each of its hosts and of the disk."""
    work = work or workload_of(plan)
    kept = [row for row in (*work.table, *(each.row for each in work.optimizer)) if row.saved]
    state = sum(row.num_elements * DTYPE_BYTES[row.storage_dtype] for row in kept)
    export = plan.recipe.export
    exported = sum(row.num_elements for row in stored_rows(plan.exported)) * DTYPE_BYTES[export.dtype]
    devices, share = plan.topology.devices_per_host, plan.topology.chip.host_memory_bytes
    return HostNeeds(
        memory_bytes=None if share is None else devices * share,
        offload_bytes=devices * offloaded_bytes(work),
        load_bytes=_load_bytes(work, devices),
        save_bytes=round(_SAVE_FACTOR * state / plan.topology.num_hosts),
        export_bytes=_EXPORT_BYTES if export.enabled else None,
        checkpoint_bytes=state,
        checkpoints=most_kept(plan) + 1,
        exported_bytes=exported if export.enabled else None,
    )


def host_memory_problems(plan: Plan, needs: HostNeeds) -> list[Problem]:
    """The problem of activations that a host cannot hold beside its copy of the state."""
    needed = needs.offload_bytes + needs.save_bytes
    if not needs.offload_bytes or needs.memory_bytes is None or needed <= needs.memory_bytes:
        return []
    rule = "needs more memory than a host has"
    offloaded, saved = bytes_text(needs.offload_bytes), bytes_text(needs.save_bytes)
    other = (
        f"{offloaded} of activations and {saved} for saves, of the {bytes_text(needs.memory_bytes)} of a"
        f" {plan.topology.chip.name} host with {plan.topology.devices_per_host} chips"
    )
    fix = "remat.policy=full, a larger optim.accumulation, or more chips"
    return [Problem("remat.policy", plan.recipe.remat.policy, rule, other, fix)]


def _load_bytes(work: Workload, devices_per_host: int) -> int:
    """The largest two neighbours of the buffers that a backend fills one after the other."""
    pieces = [_host_bytes(rows, work, devices_per_host) for rows in _buffers(work)]
    return max((a + b for a, b in pairwise(pieces)), default=sum(pieces))


def _buffers(work: Workload) -> Iterable[list[ParamRow]]:
    """Rows as they lie in buffers: one by itself, or those of a run at one place of the period."""
    groups: dict[str, list[ParamRow]] = {}
    for row in work.table:
        groups.setdefault(work.runs.stack_of(row.name) or row.name, []).append(row)
    return groups.values()


def _host_bytes(rows: list[ParamRow], work: Workload, devices_per_host: int) -> int:
    """A buffer's pieces on one host; devices that hold the same piece share it."""
    pieces = split_count(work.split_axes(rows[0]), work.axis_sizes)
    on_host = min(devices_per_host, pieces)
    local = sum(work.local_elements(row) * DTYPE_BYTES[row.storage_dtype] for row in rows)
    return on_host * local
