"""A traced step for people and for programs."""

from __future__ import annotations

from typing import Any

from tptrain.config.plan import Plan
from tptrain.dryrun.tracing import Traced
from tptrain.estimate.text import bytes_text
from tptrain.report.plan_page import spec_text


def trace_lines(plan: Plan, traced: Traced) -> list[str]:
    """The trace tier as lines of plain text."""
    step = traced.step
    numbers = sum(name is None for name in step.parameters)
    steady = "a second trace gives the same program" if traced.is_steady else "A SECOND TRACE DIFFERS"
    kept = "every state tensor leaves the step as it came in"
    if traced.changed_specs:
        kept = f"ANOTHER SHARDING AFTER THE STEP: {', '.join(traced.changed_specs)}"
    return [
        f"Trace for {plan.num_devices} devices: {traced.instructions:,} instructions,"
        f" {bytes_text(traced.module_bytes)}, in {traced.trace_seconds:.1f} s and"
        f" {bytes_text(traced.peak_host_bytes)} of host memory; {steady}.",
        f"  Arguments: {len(step.donated)} of state, written in place; {len(step.specs) - len(step.donated)}"
        f" inputs; {numbers} numbers of the model's formulas.",
        f"  Sharding, read back from XLA: {kept}.",
    ]


def trace_json(traced: Traced) -> dict[str, Any]:
    step = traced.step
    return {
        "instructions": traced.instructions,
        "module_bytes": traced.module_bytes,
        "trace_seconds": traced.trace_seconds,
        "peak_host_bytes": traced.peak_host_bytes,
        "is_steady": traced.is_steady,
        "changed_specs": list(traced.changed_specs),
        "parameters": [
            {"name": name, "spec": spec_text(step.specs[name]), "donated": name in step.donated}
            for name in step.parameters
            if name is not None
        ],
    }
