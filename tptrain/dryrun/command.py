"""`tptrain dryrun`: the plan, the traced step and the compiled program of a run, on one page.

tptrain dryrun RECIPE topology=v5p-32 [setting=value ...]
    --until plan|trace|compile    the last tier (default: compile, where the topology is a TPU slice)
    --libtpu PATH                 another TPU compiler: a libtpu.so, or the folder of an installed libtpu
    --cache DIR                   where compiled results are kept
    --json                        the same as one JSON object
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tptrain.config.options import split_options
from tptrain.config.plan import Plan
from tptrain.dryrun.compiling import CompileRequest, compile_program
from tptrain.dryrun.libtpu import libtpu_at
from tptrain.dryrun.trace_lines import trace_json, trace_lines
from tptrain.dryrun.tracing import Traced, trace_in_child
from tptrain.errors import Problem, raise_if_any, unknown_name
from tptrain.estimate import estimate, host_memory_problems, memory_problems
from tptrain.estimate.changes import first_change_that_fits, fitted_to_compiled, proposal
from tptrain.program.compiled import CompiledProgram
from tptrain.report.plan_page import plan_json, plan_page
from tptrain.report.program_lines import program_lines

TIERS = ("plan", "trace", "compile")
# A causal mask leaves about half of all pairs of query and key.
_CAUSAL_DENSITY = 0.5


@dataclass(frozen=True)
class DryRunOptions:
    """Options of the command; None for the defaults. until: the last tier. libtpu, cache: paths."""

    until: str | None = None
    libtpu: Path | None = None
    cache: Path | None = None
    as_json: bool = False


@dataclass(frozen=True)
class DryRun:
    """What the tiers found; None for a tier that did not run."""

    plan: Plan
    traced: Traced | None = None
    program: CompiledProgram | None = None


def read_options(args: Sequence[str]) -> tuple[DryRunOptions, list[str]]:
    """The options among the arguments, and all other arguments."""
    found = split_options(args, _EXAMPLE, ("--json",))
    until = found.values.get("--until")
    if until is not None and until not in TIERS:
        raise_if_any([unknown_name("--until", until, "tier", TIERS)])
    options = DryRunOptions(until, found.path("--libtpu"), found.path("--cache"), "--json" in found.flags)
    return options, found.rest


_EXAMPLE = {"--until": "trace", "--libtpu": "path/to/libtpu.so", "--cache": "path/to/folder"}


def dry_run(plan: Plan, options: DryRunOptions) -> list[Problem]:
    """Run the tiers, print the page (or the JSON object), and return what keeps the run from going well.

    Raises ProblemsError for a wrong path of libtpu, TraceError when the step cannot be traced.
    """
    last = options.until or ("compile" if plan.topology.chip.platform == "tpu" else "trace")
    raise_if_any(_option_problems(plan, options, last))
    if options.libtpu is not None:
        libtpu_at(options.libtpu)  # a wrong path is told before minutes have gone into the other tiers
    found = estimate(plan)
    if not options.as_json:
        print(plan_page(plan, found), flush=True)
    traced = program = None
    if last != "plan":
        raise_if_any(_backend_problems(plan))
        traced = trace_in_child(plan)
        _say(options, trace_lines(plan, traced))
    if traced is not None and last == "compile":
        program = compile_program(compile_request(plan, traced, options.libtpu), options.cache)
        _say(options, program_lines(program, plan.topology.chip.hbm_bytes))
    result = DryRun(plan, traced, program)
    if options.as_json:
        print(json.dumps(_as_json(result, plan_json(plan, found)), indent=1))
    # What the compiler has seen stands above what was estimated; of a host's memory it knows nothing.
    judged = program is not None and program.outcome in ("compiled", "out_of_memory")
    memory = [] if judged else memory_problems(plan, found)
    memory += host_memory_problems(plan, found.hosts)
    return [*memory, *trace_problems(traced), *_compile_problems(plan, program)]


def compile_request(plan: Plan, traced: Traced, libtpu: Path | None) -> CompileRequest:
    """What the compile tier is asked for: the traced step, on the devices in JAX's order."""
    from tptrain.jaxside.device_order import device_order

    step = traced.step
    return CompileRequest(
        hlo_proto=step.module,
        topology=plan.topology,
        axis_sizes=plan.mesh.axis_sizes,
        device_order=device_order(plan.topology, plan.mesh.ici, plan.mesh.dcn),
        xla_flags=plan.tpu_flags,
        libtpu=libtpu,
        attention_density=_CAUSAL_DENSITY,
        parameter_names=tuple(name or "a number" for name in step.parameters),
        donated=tuple(i for i, name in enumerate(step.parameters) if name in step.donated),
    )


def _say(options: DryRunOptions, lines: Sequence[str]) -> None:
    if not options.as_json:
        print("\n".join([*lines, ""]), flush=True)


def _as_json(result: DryRun, plan: dict[str, Any]) -> dict[str, Any]:
    return {
        "plan": plan,
        "trace": trace_json(result.traced) if result.traced else None,
        "program": json.loads(result.program.to_json()) if result.program else None,
    }


def _option_problems(plan: Plan, options: DryRunOptions, last: str) -> list[Problem]:
    """Options that this dry run would not obey."""
    topology = plan.topology
    if last == "compile" and topology.chip.platform != "tpu":
        rule, other = "needs a slice that the TPU compiler knows", f"topology={topology.name}"
        return [Problem("--until", "compile", rule, other, "topology=v5e-8 or another TPU slice")]
    given = {"--libtpu": options.libtpu, "--cache": options.cache}
    other, fix = f"the last tier is {last}", "a TPU topology and --until compile, or without it"
    return [
        Problem(name, value, "has no effect where nothing is compiled", other, fix)
        for name, value in given.items()
        if value is not None and last != "compile"
    ]


def _backend_problems(plan: Plan) -> list[Problem]:
    if plan.recipe.backend == "xla":
        return []
    rule = "has no step to trace: plain PyTorch runs operation by operation"
    return [Problem("backend", plan.recipe.backend, rule, "--until trace", "backend=xla, or --until plan")]


def trace_problems(traced: Traced | None) -> list[Problem]:
    """Faults of the step itself: it would compile twice, or move its state at every step."""
    problems = []
    if traced is not None and not traced.is_steady:
        rule, other = "must trace to the same program every time", "two traces differ"
        problems.append(Problem("step", "traced twice", rule, other, "a step that is a pure function"))
    if traced is not None and traced.changed_specs:
        rule, other = (
            "must leave the step as it came in, or it is moved at every step",
            "another sharding after",
        )
        names = ", ".join(traced.changed_specs[:3])
        problems.append(Problem("state", names, rule, other, "the sharding that the plan gives it"))
    return problems


def _compile_problems(plan: Plan, program: CompiledProgram | None) -> list[Problem]:
    if program is None or program.outcome == "compiled":
        return []
    rule = "must compile for the topology"
    if program.outcome == "out_of_memory":
        rule = "must fit the memory of a chip"
        assert program.shortage is not None
        fitted = fitted_to_compiled(estimate(plan), program.shortage.needed_bytes)
        fix = proposal(plan, first_change_that_fits(plan, fitted), fitted)
        return [Problem("topology", plan.topology.name, rule, program.message, fix)]
    fix = "see the message; --until trace does without the compiler"
    return [Problem("topology", plan.topology.name, rule, program.message, fix)]
