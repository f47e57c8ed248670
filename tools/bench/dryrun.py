"""How long the dry run's first two tiers take, and how far its arithmetic is from the TPU compiler.

    python tools/bench/dryrun.py                  8 programs, each a minute or two on 2 cores
    python tools/bench/dryrun.py --cases 2        the first two of them
    python tools/bench/dryrun.py --fit            the 12 programs that constants may be fitted on

The 8 programs are never looked at when constants of tptrain/estimate are fitted. Compiled by the installed
libtpu, or by --libtpu. A line for every program; the last line is a JSON object:

plan_seconds         the command `tptrain plan` of Llama-3-8B on v5p-32, interpreter included, median of 5
trace_seconds        Llama 405B for 256 chips: from the start of the tracing process to its end
trace_rss_gb         its peak memory, frameworks included
memory_error_max     largest |estimate / compiler - 1| of arguments and temporaries together
memory_error_median  the median of the same
temporaries_error_max, temporaries_above_arguments: of temporaries alone; in how many programs they are larger
wrong_fits           programs that the estimate said would fit and that did not compile
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).parents[2]
GIB = 2**30
_PLANS = 5


@dataclass(frozen=True)
class Measured:
    """A program by arithmetic and by the compiler, in bytes of a chip; None where it did not compile."""

    said_fits: bool
    arguments: int | None
    estimated_total: int
    total: int | None
    estimated_temporaries: int
    temporaries: int | None

    @property
    def error(self) -> float:
        assert self.total is not None
        return self.estimated_total / self.total - 1

    @property
    def temporaries_error(self) -> float:
        assert self.temporaries is not None
        return self.estimated_temporaries / self.temporaries - 1


def main(argv: Sequence[str] | None = None) -> int:
    from tools.bench.tpu_plans import Case

    args = parse(argv)
    fit, judged = cases(Case)
    chosen = (fit if args.fit else judged)[: args.cases]
    found = [measure(case, args.libtpu) for case in chosen]
    compiled = [one for one in found if one.total is not None]
    traced = trace_largest(Case)
    numbers: dict[str, Any] = {
        "plan_seconds": round(plan_seconds(), 3),
        **traced,
        "programs": len(found),
        "memory_error_max": round(max(abs(one.error) for one in compiled), 3),
        "memory_error_median": round(median(abs(one.error) for one in compiled), 3),
        "temporaries_error_max": round(max(abs(one.temporaries_error) for one in compiled), 3),
        "temporaries_above_arguments": sum((one.temporaries or 0) > (one.arguments or 0) for one in compiled),
        "wrong_fits": sum(one.said_fits and one.total is None for one in found),
    }
    print(json.dumps(numbers))
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", type=int, default=None, help="only the first so many")
    parser.add_argument("--fit", action="store_true", help="the programs for fitting")
    parser.add_argument("--libtpu", type=Path, help="another compiler than the installed one")
    return parser.parse_args(argv)


def cases(make: Any) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Programs for fitting, and programs for judging, which were chosen before any was fitted."""
    tensor = ("mesh.fsdp=8", "mesh.tensor=2")
    fit = (
        make("8b", "v5p-32", 2048, 1, "full"),
        make("8b", "v5p-32", 8192, 1, "full"),
        make("8b", "v5p-32", 8192, 2, "full"),
        make("8b", "v5p-32", 4096, 2, "attention"),
        make("8b", "v5p-32", 2048, 1, "dots"),
        make("8b", "v5p-32", 2048, 1, "none"),
        make("8b", "v5p-32", 2048, 4, "full", ("mesh.fsdp=4", "mesh.tensor=4")),
        make("8b", "v5p-32", 2048, 2, "full", ("optim.accumulation=2",)),
        make("8b", "v6e-16", 2048, 2, "full"),
        make("1b", "v5e-8", 2048, 2, "full"),
        make("1b", "v6e-8", 4096, 4, "dots"),
        make("3b", "v5p-16", 2048, 4, "full"),
    )
    judged = (
        make("8b", "v5p-32", 2048, 4, "full"),
        make("8b", "v6e-16", 4096, 2, "full"),
        make("1b", "v5e-8", 2048, 4, "full"),
        make("3b", "v6e-8", 2048, 4, "attention"),
        make("70b", "v5p-128", 4096, 1, "full"),
        make("8b", "v5p-32", 4096, 2, "full", tensor),
        make("8b", "v5p-32", 4096, 1, "dots"),
        make("1b", "v5p-8", 8192, 2, "attention"),
    )
    return fit, judged


def measure(case: Any, libtpu: Path | None) -> Measured:
    from tools.bench.tpu_plans import plan_of
    from tptrain.dryrun.command import compile_request
    from tptrain.dryrun.compiling import compile_program
    from tptrain.dryrun.tracing import trace_in_child
    from tptrain.estimate import estimate

    plan = plan_of(case)
    found = estimate(plan)
    program = compile_program(compile_request(plan, trace_in_child(plan), libtpu))
    memory = program.memory
    one = Measured(
        said_fits=found.verdict in ("fits", "tight"),
        arguments=memory.argument_bytes if memory else None,
        estimated_total=found.memory.total_bytes,
        total=memory.peak_bytes if memory else None,
        estimated_temporaries=found.memory.temporary_bytes,
        temporaries=memory.temporary_bytes if memory else None,
    )
    print(f"{case}: {shown(one, program.outcome)}, libtpu {program.libtpu}", flush=True)
    return one


def shown(one: Measured, outcome: str) -> str:
    if one.total is None or one.temporaries is None:
        return f"{outcome}; estimated {one.estimated_total / GIB:.2f} GiB, said it fits: {one.said_fits}"
    total = f"total {one.estimated_total / GIB:.2f} / {one.total / GIB:.2f} GiB ({one.error:+.1%})"
    temporaries = f"{one.estimated_temporaries / GIB:.2f} / {one.temporaries / GIB:.2f} GiB"
    return f"{total}, temporaries {temporaries} ({one.temporaries_error:+.1%})"


def trace_largest(make: Any) -> dict[str, float]:
    from tools.bench.tpu_plans import plan_of
    from tptrain.dryrun.tracing import trace_in_child

    plan = plan_of(make("405b", "v5p-512", 4096, 1, "full"))
    started = time.perf_counter()
    traced = trace_in_child(plan)
    seconds = time.perf_counter() - started
    return {"trace_seconds": round(seconds, 2), "trace_rss_gb": round(traced.peak_host_bytes / 1e9, 2)}


def plan_seconds() -> float:
    recipe = str(ROOT / "recipes/llama3_8b_gsm8k.py")
    command = [sys.executable, "-m", "tptrain", "plan", recipe, "topology=v5p-32", "data.path=train.jsonl"]
    seconds = []
    for _ in range(_PLANS):
        started = time.perf_counter()
        subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
        seconds.append(time.perf_counter() - started)
    return median(seconds)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main())
