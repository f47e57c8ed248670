"""The estimate of a plan for people (blocks of the plan's page) and for programs (`estimate_json`)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from tptrain.config.plan import Plan
from tptrain.estimate import Estimate
from tptrain.estimate.activations import offloaded_bytes
from tptrain.estimate.collectives import Collective
from tptrain.estimate.hosts import HostNeeds
from tptrain.estimate.network import AxisLinks
from tptrain.estimate.roofline import Roofline, seconds_of
from tptrain.estimate.text import bytes_text, seconds_text


def estimate_blocks(plan: Plan, found: Estimate) -> list[str]:
    """Memory, hosts and disk, traffic and time, a block of lines each."""
    blocks = [_memory_lines(plan, found), _host_lines(plan, found), _traffic_lines(plan, found)]
    if found.roofline is not None:
        blocks.append(_time_lines(found, found.roofline))
    return ["\n".join([head, *(f"  {line}" for line in lines)]) for head, *lines in blocks]


def verdict_sentence(plan: Plan, found: Estimate) -> str:
    """Whether the step fits a chip, with both numbers and the margin."""
    total, chip = bytes_text(found.memory.total_bytes), plan.topology.chip.name
    if found.hbm_bytes is None:
        return (
            f"By the estimate a step needs {total} on each device; {chip} devices have no limit of their own."
        )
    margin, usable = f"{found.margin:.0%}", bytes_text(found.hbm_bytes)
    words = {
        "fits": f"it fits, with {margin} to spare",
        "tight": f"tight: less than {margin} to spare, and the estimate may be off by as much",
        "does not fit": "it does not fit",
    }
    return (
        f"By the estimate a step needs {total} of the {usable} that libtpu lets a program use"
        f" on a {chip} chip: {words[found.verdict]}."
    )


def _memory_lines(plan: Plan, found: Estimate) -> list[str]:
    needed, work = found.memory, found.work
    core = "scores in memory" if work.attention == "plain" else "scores never in memory"
    rows = [(name, bytes_text(size)) for name, size in needed.arguments.items()]
    rows += [(name, bytes_text(size)) for name, size in needed.peak.parts.items() if size]
    if needed.factor != 1:
        rows.append((f"temporaries x {needed.factor:g}", bytes_text(needed.temporary_bytes)))
    rows.append(("total", bytes_text(needed.total_bytes)))
    return [
        "Memory of a chip, estimated",
        verdict_sentence(plan, found),
        f"Largest in: {needed.peak.name}; remat {work.remat}, attention {work.attention} ({core}).",
        *_columns(rows),
    ]


def _host_lines(plan: Plan, found: Estimate) -> list[str]:
    hosts, count = found.hosts, plan.topology.num_hosts
    load, save = bytes_text(hosts.load_bytes), bytes_text(hosts.save_bytes)
    step, steps = hosts.checkpoint_bytes, hosts.checkpoints
    hosts_text = "the host" if count == 1 else f"each of {count} hosts"
    lines = [
        f"Memory of {hosts_text} beside the process itself, and disk",
        f"Loading: {load}. Saving: {save} at most, and nearly all of it between saves.",
        f"Checkpoint: {bytes_text(step)} on disk; up to {steps} at a time: {bytes_text(steps * step)}.",
    ]
    if hosts.offload_bytes:
        lines.insert(1, _offload_line(hosts))
    if hosts.export_bytes is not None and hosts.exported_bytes is not None:
        size, memory = bytes_text(hosts.exported_bytes), bytes_text(hosts.export_bytes)
        lines.append(f"Export: {size} on disk, streamed through {memory} of memory.")
    if plan.topology.chip.platform == "cpu":
        devices = bytes_text(plan.num_devices * found.memory.total_bytes)
        lines.append(f"The virtual devices are in the host's memory, too: {devices}.")
    return lines


def _offload_line(hosts: HostNeeds) -> str:
    size = bytes_text(hosts.offload_bytes)
    of = "" if hosts.memory_bytes is None else f" of the {bytes_text(hosts.memory_bytes)} that it has"
    return f"Activations that wait for the backward pass: {size}{of}."


def _traffic_lines(plan: Plan, found: Estimate) -> list[str]:
    head = "Traffic of a step, expected: what one chip receives"
    if not found.collectives:
        return [head, "none."]
    cells = [_traffic_cells(plan, found, each) for each in found.collectives]
    links = [_links_text(axis, each) for axis, each in found.links.items() if each.bytes_per_second]
    formula = (
        "Received: of n devices' result (n - 1) / n; an all-reduce twice that. Time: bytes over the links'"
    )
    return [head, *_columns(cells), *links, f"{formula} speed (source: tptrain/topology.py)."]


def _traffic_cells(plan: Plan, found: Estimate, each: Collective) -> tuple[str, ...]:
    seconds = seconds_of(each, found.links, plan.topology)
    time = "" if seconds is None else seconds_text(seconds)
    over = f"{each.axis} ({each.network})"
    return (each.kind, over, each.what, f"{each.count:,} x", bytes_text(each.received_bytes), time)


def _links_text(axis: str, links: AxisLinks) -> str:
    assert links.bytes_per_second is not None
    parts = " x ".join(f"{p.chips} of {p.side}" if p.chips < p.side else str(p.side) for p in links.parts)
    speed = f"{links.bytes_per_second / 1e9:.0f} GB/s"
    return f"mesh.{axis} lies on sides {parts} of the slice: {speed} into a chip."


def _host_link_line(found: Estimate, seconds: float | None) -> str:
    size = bytes_text(offloaded_bytes(found.work) * found.work.micro_batches)
    time = "unknown, the link has no published number" if seconds is None else seconds_text(seconds)
    return f"Host link: {size} to the host's memory, then as much back: {time} (source: tptrain/topology.py)."


def _time_lines(found: Estimate, line: Roofline) -> list[str]:
    model, again = line.flops.model / 1e12, line.flops.recomputed / 1e12
    host = [_host_link_line(found, line.host_seconds)] if found.work.offloaded else []
    return [
        "Time of a step, a roofline: no step is faster, real ones are slower",
        f"Arithmetic: {model:,.1f} TFLOP (6 x parameters in matrix products x tokens + causal attention) and"
        f" {again:,.1f} computed again, at the peak of bfloat16: {seconds_text(line.compute_seconds)}.",
        f"Update: state and gradients through HBM: {seconds_text(line.update_seconds)}. ICI:"
        f" {seconds_text(line.ici_seconds)}. DCN: {seconds_text(line.dcn_seconds)}.",
        *host,
        f"Step: {seconds_text(line.fastest_seconds)} if all of that overlaps but the update,"
        f" {seconds_text(line.slowest_seconds)} if nothing does.",
        f"At best {line.tokens_per_second_per_chip:,.0f} tokens/s a chip and MFU {line.mfu:.0%}, not counting"
        " what is computed again.",
    ]


def _columns(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Cells under each other; the last columns, numbers, to the right."""
    widths = [max(len(cells[i]) for cells in rows) for i in range(len(rows[0]))]
    words = max(len(rows[0]) - 3, 1)
    return [
        "  ".join(
            cell.ljust(width) if i < words else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ).rstrip()
        for cells in rows
    ]


def estimate_json(plan: Plan, found: Estimate) -> dict[str, Any]:
    """The estimate as JSON data. Bytes are of one chip, one host, or all files, as their names say."""
    needed = found.memory
    return {
        "chip": {
            "verdict": found.verdict,
            "margin": found.margin,
            "usable_hbm_bytes": found.hbm_bytes,
            "total_bytes": needed.total_bytes,
            "argument_bytes": needed.argument_bytes,
            "temporary_bytes": needed.temporary_bytes,
            "arguments": dict(needed.arguments),
            "peak": needed.peak.name,
            "fitted_factor": needed.factor,
            "phases": {phase.name: dict(phase.parts) for phase in needed.phases},
            "remat": found.work.remat,
            "attention": found.work.attention,
            "loss_chunk_tokens": found.work.loss_chunk_tokens,
        },
        "host": dataclasses.asdict(found.hosts),
        "links": {axis: dataclasses.asdict(links) for axis, links in found.links.items()},
        "collectives": [
            {**dataclasses.asdict(each), "seconds": seconds_of(each, found.links, plan.topology)}
            for each in found.collectives
        ],
        "roofline": None if found.roofline is None else dataclasses.asdict(found.roofline),
    }
