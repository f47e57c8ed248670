"""Copies between the memory of a chip and that of its host, over PCIe: of activations that XLA offloads.

libtpu starts them and waits for them later, like collectives, and estimates no cycles for them either.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from tptrain.program.collectives import Transfer, awaited
from tptrain.program.hlo_text import HOST_SPACE, Array, Computation, Instruction, Module
from tptrain.topology import Chip


def host_copies(module: Module, computation: Computation, chip: Chip) -> list[Transfer]:
    """The copies that `computation` starts, in the order of their starts."""
    found: list[Transfer] = []
    running: dict[str, int] = {}
    for position, instruction in enumerate(computation.instructions):
        finished = awaited(computation, instruction)
        if finished in running:
            at = running.pop(finished)
            found[at] = replace(found[at], end=position)
            continue
        for kind, array in _started(module, computation, instruction):
            running[instruction.name] = len(found)
            found.append(_transfer(kind, array, instruction, position, chip))
    return found


def _started(module: Module, computation: Computation, instruction: Instruction) -> list[tuple[str, Array]]:
    """Direction and array of the copy that an instruction starts; empty for any other instruction."""
    if instruction.opcode == "copy-start":
        target, source, *_ = instruction.arrays
        return _between(source, target, target)
    if instruction.opcode != "async-start":
        return []
    callee = module.computations[instruction.called[0]]
    if callee.root.opcode == "dynamic-update-slice":
        update = callee.operand(callee.root, 1).array
        return _between(update, callee.root.array, update)
    if callee.root.opcode == "dynamic-slice":
        return _between(callee.operand(callee.root, 0).array, callee.root.array, callee.root.array)
    return []


def _between(source: Array, target: Array, moved: Array) -> list[tuple[str, Array]]:
    spaces = [array.memory_space == HOST_SPACE for array in (source, target)]
    if spaces == [False, True]:
        return [("copy to host", moved)]
    return [("copy from host", moved)] if spaces == [True, False] else []


def _transfer(kind: str, moved: Array, instruction: Instruction, position: int, chip: Chip) -> Transfer:
    speed = chip.host_link_bytes_per_second
    return Transfer(
        kind=kind,
        network="PCIe",
        axes=("host",),
        group_size=1,
        dtype=moved.dtype,
        num_bytes=moved.num_bytes,
        seconds=moved.num_bytes / speed if speed else None,
        start=position,
        end=position,
        op_name=instruction.op_name,
        # The link carries as much in each direction at a time.
        route=f"PCIe, {kind}",
    )


def uses_host_memory(computations: Sequence[Computation]) -> bool:
    """Whether any of them has a value in the host's memory."""
    return any(
        array.memory_space == HOST_SPACE
        for computation in computations
        for instruction in computation.instructions
        for array in instruction.arrays
    )
