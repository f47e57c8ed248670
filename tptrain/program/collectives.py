"""Collectives of a module: what each chip sends, over which axis and network, and beside which compute.

Bytes are what one chip sends. With b the bytes of its operand and n chips in a group, rings send
    all-gather b (n-1); reduce-scatter and all-to-all b (n-1)/n; all-reduce 2 b (n-1)/n; collective-permute b
(Thakur, Rabenseifner, Gropp 2005), over links that MeshPlaces.ici_links counts. The time of an all-to-all is
that of its busiest link: b n/8 over a ring's link, b n/4 over a line's.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from tptrain.program.device_groups import Group, MeshPlaces, parse_groups
from tptrain.program.hlo_text import Array, Computation, Instruction, Module
from tptrain.program.walk import fused_instructions

Network = Literal["ICI", "DCN", "PCIe"]

KINDS = (
    *("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all"),
    *("collective-permute", "collective-broadcast"),
)
_MEGASCALE = "_xla_megascale_transfer_type"


@dataclass(frozen=True)
class Transfer:
    """One collective of a computation, or a copy between the memories of a chip and its host.

    start, end: positions of the instructions that begin and finish it; equal where the chip waits for it.
    num_bytes:  what one chip sends in one execution.
    seconds:    that at the speed of its links; None for a network whose speed has no source.
    route:      which links it uses: equal for transfers that share them.
    """

    kind: str
    network: Network
    axes: tuple[str, ...]
    group_size: int
    dtype: str
    num_bytes: float
    seconds: float | None
    start: int
    end: int
    op_name: str
    route: str = ""


def transfers(module: Module, computation: Computation, mesh: MeshPlaces) -> list[Transfer]:
    """The collectives that `computation` executes itself, also those inside its fusions."""
    found = []
    for span in _spans(module, computation):
        if span.collective.opcode in ("send", "recv"):
            found.append(_slices_transfer(span, mesh))
        else:
            found.append(_ici_transfer(span, mesh, module.num_partitions))
    return found


@dataclass
class _Span:
    """A collective and the positions from its start to its end."""

    key: str
    home: Computation
    collective: Instruction
    start: int
    end: int
    scattered: bool = False


def _spans(module: Module, computation: Computation) -> list[_Span]:
    """Collectives in the order of their starts.

    Three ways of running beside compute: `X-start` and `X-done`; `async-start` and `async-done` of a
    computation; and libtpu's fusions, of which the first holds an AsyncCollectiveStart, the last an
    AsyncCollectiveDone, those between compute meanwhile, and all repeat the collective.
    """
    spans: list[_Span] = []
    running: dict[str, _Span] = {}
    for position, instruction in enumerate(computation.instructions):
        finished = awaited(computation, instruction)
        if finished in running:
            running.pop(finished).end = position
            continue
        for span, marker in _begun(module, computation, instruction, position):
            if marker == "goes on" and span.key in running:
                running[span.key].end = position
                continue
            spans.append(span)
            if marker != "at once":
                running[span.key] = span
    return spans


def awaited(computation: Computation, instruction: Instruction) -> str:
    """The name of the instruction whose end this one waits for; empty for any that waits for none."""
    if not instruction.opcode.endswith("-done") or not instruction.operands:
        return ""
    started = computation.operand(instruction, 0)
    while started.opcode == "async-update":
        started = computation.operand(started, 0)
    return started.name


def _begun(
    module: Module, computation: Computation, instruction: Instruction, position: int
) -> Iterator[tuple[_Span, Literal["at once", "runs", "goes on"]]]:
    """Collectives of an instruction: each is over with it, runs on, or may have begun before."""
    opcode = instruction.opcode
    if opcode in KINDS:
        yield _Span(instruction.name, computation, instruction, position, position), "at once"
    elif opcode.removesuffix("-start") in KINDS or _receives(instruction):
        yield _Span(instruction.name, computation, instruction, position, position), "runs"
    elif opcode == "async-start":
        callee = module.computations[instruction.called[0]]
        for inner in callee.instructions:
            if inner.opcode in KINDS:
                yield _Span(instruction.name, callee, inner, position, position), "runs"
    elif opcode == "fusion":
        yield from _begun_in_fusion(module, computation, instruction, position)


def _receives(instruction: Instruction) -> bool:
    """Whether it receives from other slices; the send of the pair stands beside it."""
    return instruction.opcode == "recv" and _MEGASCALE in instruction.attributes


def _begun_in_fusion(
    module: Module, computation: Computation, fusion: Instruction, position: int
) -> Iterator[tuple[_Span, Literal["at once", "runs", "goes on"]]]:
    fused = list(fused_instructions(module, computation, fusion))
    targets = {inner.custom_call_target for _, inner in fused if inner.opcode == "custom-call"}
    continues = "async_collective_fusion_config" in " ".join(
        inner.attributes for _, inner in fused if inner.opcode in KINDS
    )
    for home, inner in fused:
        if inner.opcode not in KINDS:
            continue
        key = f"channel {inner.attribute('channel_id')}"
        # An all-reduce of which a fusion keeps a slice is run as a reduce-scatter.
        scattered = inner.opcode == "all-reduce" and any(
            one.opcode == "dynamic-slice" and one.array.dtype == inner.arrays[0].dtype
            for one in home.instructions
        )
        span = _Span(key, home, inner, position, position, scattered)
        if "AsyncCollectiveStart" in targets:
            yield span, "runs"
        elif continues:
            yield span, "goes on"
        else:
            yield span, "at once"


def _ici_transfer(span: _Span, mesh: MeshPlaces, num_partitions: int) -> Transfer:
    inner = span.collective
    kind = "reduce-scatter" if span.scattered else inner.opcode.removesuffix("-start")
    groups = mesh.places(_groups(inner, num_partitions), num_partitions)
    operands = [array for name in inner.operands for array in span.home.by_name[name].arrays]
    size = len(groups[0])
    sent = _bytes_sent(kind, sum(array.num_bytes for array in operands), size)
    return Transfer(
        kind=kind,
        network="ICI",
        axes=_axes_of_all(mesh, groups),
        group_size=size,
        dtype=_main_dtype(operands),
        num_bytes=sent,
        seconds=_ici_seconds(kind, sent, groups, mesh),
        start=span.start,
        end=span.end,
        op_name=inner.op_name,
        # Permutes in the two directions of a ring use links of their own.
        route=inner.attribute("source_target_pairs") or " ".join(_axes_of_all(mesh, groups)),
    )


def _slices_transfer(span: _Span, mesh: MeshPlaces) -> Transfer:
    """A transfer between slices, which libtpu hands to the hosts: the pair of a send and a recv."""
    inner = span.collective
    named = re.search(rf'{_MEGASCALE}="(\w+)"', inner.attributes)
    kind = named[1].lower().replace("_", "-") if named else "send"
    slices = mesh.topology.num_slices
    received = inner.arrays[0]
    operand_bytes = received.num_bytes / slices if kind == "all-gather" else received.num_bytes
    sent = _bytes_sent(kind, operand_bytes, slices)
    speed = mesh.topology.chip.dcn_bytes_per_second
    return Transfer(
        kind=kind,
        network="DCN",
        axes=mesh.slice_axes,
        group_size=slices,
        dtype=received.dtype,
        num_bytes=sent,
        seconds=sent / speed if speed else None,
        start=span.start,
        end=span.end,
        op_name=inner.op_name,
        route="DCN",
    )


def _groups(instruction: Instruction, num_partitions: int) -> tuple[Group, ...]:
    pairs = instruction.attribute("source_target_pairs")
    if pairs is None:
        return parse_groups(instruction.attribute("replica_groups") or "{}", num_partitions)
    moved = [pair for pair in parse_groups(pairs, num_partitions) if pair[0] != pair[1]]
    return tuple(moved) or ((0,),)


def _axes_of_all(mesh: MeshPlaces, groups: Sequence[Group]) -> tuple[str, ...]:
    """Axes along which any of the groups extends, in the mesh's order."""
    used = {axis for group in groups for axis in mesh.axes_of(group)}
    return tuple(axis for axis in mesh.axis_sizes if axis in used)


def _bytes_sent(kind: str, operand_bytes: float, size: int) -> float:
    if size == 1:
        return 0.0
    share = (size - 1) / size
    if kind == "all-gather":
        return operand_bytes * (size - 1)
    if kind == "all-reduce":
        return 2 * operand_bytes * share
    if kind in ("collective-permute", "collective-broadcast"):
        return float(operand_bytes)
    return operand_bytes * share


def _ici_seconds(kind: str, sent: float, groups: Sequence[Group], mesh: MeshPlaces) -> float | None:
    link = mesh.topology.chip.ici_link_bytes_per_second
    if link is None:
        return None
    if kind in ("collective-permute", "collective-broadcast"):
        return sent / link
    links = mesh.ici_links(groups)
    if kind in ("all-to-all", "ragged-all-to-all"):
        size = len(groups[0])
        # From b (n-1)/n sent to b n/4 on the middle link of a line, half of it on each of a ring's two.
        return sent * size * size / (4 * max(1, size - 1)) / (links * link)
    return sent / (links * link)


def _main_dtype(arrays: Sequence[Array]) -> str:
    return max(arrays, key=lambda array: array.num_bytes).dtype if arrays else ""
