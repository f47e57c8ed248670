"""Tracing the train step of a plan without data: as many virtual devices as the slice has chips.

It is done in a process of its own, because a process has one number of devices for its whole life.
"""

from __future__ import annotations

import os
import pickle
import resource
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import tptrain
from tptrain.backends.base import TracedStep
from tptrain.config.plan import Plan
from tptrain.errors import TptrainError

_STDERR_LINES = 12


class TraceError(TptrainError):
    """The step of this plan cannot be traced, or the process that traced it ended; the message says how."""


@dataclass(frozen=True)
class Traced:
    """A traced step and what tracing took.

    instructions: of the module before optimizations. is_steady: whether a second trace gave the same module.
    changed_specs: state whose sharding is another after the step than before it, of which there must be none.
    peak_host_bytes: of the process, frameworks included.
    """

    step: TracedStep
    instructions: int
    is_steady: bool
    changed_specs: tuple[str, ...]
    trace_seconds: float
    peak_host_bytes: int

    @property
    def module_bytes(self) -> int:
        return len(self.step.module)


def trace_step(plan: Plan) -> Traced:
    """Trace the step of a plan in this process, whose devices become those of the plan; twice, to compare."""
    from tptrain.backends.make import make_placeholder_backend
    from tptrain.train.state import fresh_state, split_frozen, state_specs
    from tptrain.train.step import prepare_step, step_placeholders

    backend = make_placeholder_backend(plan)
    steps = []
    for _ in range(2):
        function, constants = prepare_step(backend, plan)
        state, frozen = split_frozen(fresh_state(backend, backend.no_source), backend.layout)
        inputs = {**step_placeholders(backend, plan), **constants, **frozen}
        steps.append(backend.trace_step(function, state, inputs, state_specs(backend)))
    first, second = steps
    return Traced(
        step=first,
        instructions=backend.count_instructions(first),
        is_steady=first.module == second.module,
        changed_specs=backend.changed_specs(first),
        trace_seconds=first.trace_seconds,
        peak_host_bytes=1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
    )


def trace_in_child(plan: Plan, timeout_seconds: float = 600.0) -> Traced:
    """The same in a process of its own. Raises TraceError when that process does not come to its end."""
    with tempfile.TemporaryDirectory(prefix="tptrain-trace-") as folder:
        asked, found = Path(folder) / "plan", Path(folder) / "traced"
        asked.write_bytes(pickle.dumps(plan))
        command = [sys.executable, "-m", "tptrain.dryrun.tracing", str(asked), str(found)]
        try:
            done = subprocess.run(
                command, env=_environment(os.environ), capture_output=True, text=True, timeout=timeout_seconds
            )
        except subprocess.TimeoutExpired as error:
            raise TraceError(f"tracing was not done after {timeout_seconds:.0f} s and was stopped") from error
        if done.returncode:
            raise TraceError(_death(done.returncode, done.stderr))
        traced: Traced = pickle.loads(found.read_bytes())
        return traced


def _environment(environ: Mapping[str, str]) -> dict[str, str]:
    """The child's environment: devices and compiler flags of the caller are not taken over."""
    steering = ("XLA_", "PJRT_", "CPU_NUM_DEVICES", "JAX_", "LIBTPU_", "TPU_")
    kept = {name: value for name, value in environ.items() if not name.startswith(steering)}
    root = str(Path(tptrain.__file__).parent.parent)
    path = os.pathsep.join(part for part in (root, kept.get("PYTHONPATH", "")) if part)
    return {**kept, "PYTHONPATH": path}


def _death(code: int, stderr: str) -> str:
    if code == -9:
        return "tracing was killed by the system (SIGKILL), probably for lack of host memory"
    lines = stderr.strip().splitlines()[-_STDERR_LINES:]
    return "\n  ".join([f"tracing ended with exit code {code}; its last lines:", *lines])


def main(asked: Path, found: Path) -> None:
    plan: Plan = pickle.loads(asked.read_bytes())
    found.write_bytes(pickle.dumps(trace_step(plan)))


if __name__ == "__main__":
    # Pickled classes must not be those of `__main__`.
    from tptrain.dryrun import tracing

    tracing.main(Path(sys.argv[1]), Path(sys.argv[2]))
