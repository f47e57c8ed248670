"""A compiled program for people: memory, the estimate of a step, collectives, large buffers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from tptrain.program.analysis import CollectiveUse, ProgramCost
from tptrain.program.buffers import Buffer
from tptrain.program.compiled import CompiledProgram, Memory
from tptrain.report.plan_page import bytes_text

_SHOWN_BUFFERS = 8


def program_lines(program: CompiledProgram, hbm_bytes: int | None) -> list[str]:
    """The outcome as lines of plain text.

    hbm_bytes: what the chip lets one program use, for the comparison; None where it is not known.
    """
    lines = [_head(program)]
    if program.message:
        lines.append(f"  {program.message}")
    if program.memory is not None:
        lines.append(f"  {_memory_line(program.memory, hbm_bytes)}")
    if program.cost is not None:
        lines += [f"  {line}" for line in _cost_lines(program.cost)]
        lines += [f"  {line}" for line in collective_table(program.cost.collectives)]
    if program.largest_buffers:
        lines += [f"  {line}" for line in _buffer_lines(program.largest_buffers)]
    notices = [*program.notices, *(program.cost.notices if program.cost else ())]
    return [*lines, *(f"  Notice: {notice}." for notice in notices)]


def _head(program: CompiledProgram) -> str:
    mesh = " x ".join(f"{axis}={size}" for axis, size in program.axis_sizes.items() if size > 1)
    flags = " ".join(f"{name}={value}" for name, value in program.flags.items()) or "default flags"
    how = "read from the cache" if program.cached else f"{program.compile_seconds:.0f} s"
    outcome = program.outcome.replace("_", " ")
    place = f"{program.topology} ({mesh or 'one device'})"
    return f"Compile for {place}, libtpu {program.libtpu}, {flags}: {outcome}, {how}"


def _memory_line(memory: Memory, hbm_bytes: int | None) -> str:
    part = f" of {bytes_text(hbm_bytes)} ({100 * memory.peak_bytes / hbm_bytes:.1f} %)" if hbm_bytes else ""
    host = f", {bytes_text(memory.host_bytes)} in the host's memory" if memory.host_bytes else ""
    return (
        f"HBM per chip: {bytes_text(memory.peak_bytes)}{part}: arguments {bytes_text(memory.argument_bytes)},"
        f" temporaries {bytes_text(memory.temporary_bytes)}, outputs {bytes_text(memory.output_bytes)} of"
        f" which {bytes_text(memory.aliased_bytes)} reuse arguments; code"
        f" {bytes_text(memory.generated_code_bytes)}{host}."
    )


def _cost_lines(cost: ProgramCost) -> Iterator[str]:
    efficiency = (
        "" if cost.matmul_efficiency is None else f", matrix units {100 * cost.matmul_efficiency:.0f} %"
    )
    yield (
        f"Step: about {cost.score_seconds:.4g} s, an estimate for ranking programs of one libtpu and one set"
        f" of flags: {cost.estimated_seconds:.4g} s from {cost.estimated_cycles:,} cycles{efficiency},"
        f" {cost.kernel_seconds:.4g} s of Pallas kernels at half of peak, {cost.exposed_seconds:.4g} s"
        f" of waiting for communication ({cost.communication_seconds:.4g} s in all)."
    )
    kernels = ", ".join(f"{kernel.name} {kernel.executions} times" for kernel in cost.kernels)
    yield (
        f"FLOPs: {cost.total_flops:.4g} a step on all chips, recomputation included; per chip"
        f" {cost.matmul_flops:.4g} in matrix products and {cost.kernel_flops:.4g} in kernels"
        f"{f' ({kernels})' if kernels else ''}."
    )


def collective_table(collectives: Sequence[CollectiveUse]) -> list[str]:
    """One line for each kind, network, axis and type: what a chip sends in a step, and its time."""
    if not collectives:
        return ["Collectives: none."]
    head = ("collective", "over", "chips", "type", "times", "sent by a chip", "at link speed", "waited for")
    body = [_collective_cells(use) for use in collectives]
    widths = [max(len(row[i]) for row in (head, *body)) for i in range(len(head))]
    return [_padded(row, widths) for row in (head, *body)]


def _collective_cells(use: CollectiveUse) -> tuple[str, ...]:
    over = f"{' x '.join(use.axes) or 'no axis'} ({use.network})"
    times = (_milliseconds(use.seconds), _milliseconds(use.exposed_seconds))
    sent = bytes_text(use.num_bytes)
    return (use.kind, over, str(use.group_size), use.dtype, f"{use.executions:,}", sent, *times)


def _milliseconds(seconds: float | None) -> str:
    return "unknown" if seconds is None else f"{1000 * seconds:.3f} ms"


def _buffer_lines(buffers: Sequence[Buffer]) -> Iterator[str]:
    yield "Largest buffers in HBM of a chip:"
    for buffer in buffers[:_SHOWN_BUFFERS]:
        yield f"  {bytes_text(buffer.num_bytes):>10}  {buffer.kind:<9}  {buffer.shape}  {buffer.name}"


def _padded(row: Sequence[str], widths: Sequence[int]) -> str:
    """Names to the left, numbers to the right."""
    left = [cell.ljust(width) for cell, width in zip(row[:2], widths[:2], strict=True)]
    right = [cell.rjust(width) for cell, width in zip(row[2:], widths[2:], strict=True)]
    return "  ".join([*left, *right])
