"""Tracing the train step of a plan without data: as many virtual devices as the slice has chips.

It is done in a process of its own, because a process has one number of devices for its whole life.
"""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter

from tptrain.backends.base import TracedStep
from tptrain.config import Recipe
from tptrain.config.plan import Plan
from tptrain.config.planning import plan_recipe
from tptrain.dryrun.child import child_environment, last_lines
from tptrain.errors import TptrainError

# Devices and compiler flags of the caller are not those of the child.
_STEERING = ("XLA_", "PJRT_", "CPU_NUM_DEVICES", "JAX_", "LIBTPU_", "TPU_")
_WAY_OUT = "try a host with more memory or less other work; --until plan does without tracing"
# Files of the child's folder.
_RECIPE, _MODULE, _FACTS = "recipe.json", "module.pb", "traced.json"
# Exit code of a child whose standard error is a message for people.
_REFUSED = 3


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
        # The recipe says all that the plan was made from, but for what this machine has attached.
        recipe = dataclasses.replace(plan.recipe, topology=plan.topology.name)
        (Path(folder) / _RECIPE).write_bytes(TypeAdapter(Recipe).dump_json(recipe))
        command = [sys.executable, "-m", "tptrain.dryrun.tracing", folder]
        try:
            environment = child_environment(os.environ, _STEERING)
            done = subprocess.run(
                command, env=environment, capture_output=True, text=True, timeout=timeout_seconds
            )
        except subprocess.TimeoutExpired as error:
            message = f"tracing was not done after {timeout_seconds:.0f} s and was stopped; {_WAY_OUT}"
            raise TraceError(message) from error
        if done.returncode:
            raise TraceError(_death(done.returncode, done.stderr))
        return _read(Path(folder))


def _death(code: int, stderr: str) -> str:
    if code == _REFUSED:
        return f"the step cannot be traced: {stderr.strip()}"
    if code == -9:
        return f"tracing was killed by the system (SIGKILL), probably for lack of host memory; {_WAY_OUT}"
    said = last_lines(stderr)
    return "\n  ".join([f"tracing ended with exit code {code}; its last lines:", *said])


def _write(folder: Path, traced: Traced) -> None:
    step = traced.step
    (folder / _MODULE).write_bytes(step.module)
    facts = {f.name: getattr(traced, f.name) for f in dataclasses.fields(Traced) if f.name != "step"}
    names = {"parameters": step.parameters, "outputs": step.outputs, "donated": sorted(step.donated)}
    about = {**names, "specs": step.specs, "trace_seconds": step.trace_seconds}
    (folder / _FACTS).write_text(json.dumps({"traced": facts, "step": about}))


def _read(folder: Path) -> Traced:
    data = json.loads((folder / _FACTS).read_text())
    facts, step = data["traced"], data["step"]
    return Traced(
        step=TracedStep(
            module=(folder / _MODULE).read_bytes(),
            parameters=tuple(step["parameters"]),
            outputs=tuple(step["outputs"]),
            donated=frozenset(step["donated"]),
            specs={name: tuple(tuple(axes) for axes in spec) for name, spec in step["specs"].items()},
            trace_seconds=step["trace_seconds"],
        ),
        **{**facts, "changed_specs": tuple(facts["changed_specs"])},
    )


def main(folder: Path) -> None:
    """What the child does: the recipe in `folder` traced, and the result beside it."""
    recipe = TypeAdapter(Recipe).validate_json((folder / _RECIPE).read_bytes())
    try:
        _write(folder, trace_step(plan_recipe(recipe)))
    except TptrainError as error:
        print(error, file=sys.stderr)
        sys.exit(_REFUSED)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
