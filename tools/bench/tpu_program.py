"""One train step of Llama-3-8B, compiled for a TPU slice that is not there, beside MaxText's.

    python tools/bench/tpu_program.py --row 0 --libtpu path/to/libtpu-0.0.52
    python tools/bench/tpu_program.py --topology v6e-16 --seq 8192 --rows 1 --remat full
    python tools/bench/tpu_program.py --row 3 --flags=auto
    python tools/bench/tpu_program.py --model 30b-a3b --flags=auto --set mesh.expert=4

One program per call, a minute or two on 2 cores. The rows are MaxText's (snapshot 2026-08): Llama-3-8B,
float32 masters and AdamW moments, bfloat16 compute, flash attention, scan, fsdp over all chips, jax 0.10.2,
libtpu 0.0.52; to be compared, name a libtpu of that version. Both sides are read in the same way: the
compiler's own estimated cycles of all that ENTRY executes, loops times trips, and attention kernels at half
of the chip's peak; communication is in neither. The last line is a JSON object:

peak_gib, temporaries_gib, arguments_gib, aliased_gib   of a chip
estimated_seconds, kernel_seconds, score_seconds        cycles / clock; kernels at half of peak; their sum
exposed_seconds     communication that nothing hides, at link speed; not in the score
matmul_efficiency   time that matrix products need at peak / estimated time of what holds them
model_tflop         of all chips, recomputation included
collectives         kind, mesh axes and network, type, times, GiB sent by a chip
over_maxtext        ratios of peak, temporaries, estimated seconds and score to the row; below 1: less
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tptrain.config.plan import Plan
    from tptrain.dryrun.compiling import CompileRequest
    from tptrain.program.compiled import CompiledProgram

GIB = 2**30
ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Row:
    """A program of MaxText's. rows: per chip. flags: of the TPU compiler, beside its defaults."""

    topology: str
    seq: int
    rows: int
    remat: str
    temporaries_gib: float
    peak_gib: float
    estimated_seconds: float
    score_seconds: float
    flags: str = "default"


_NO_COLLECTIVE_MATMUL = "--xla_jf_spmd_threshold_for_windowed_einsum_mib=1000000"
_V6E_FLAGS = f"{_NO_COLLECTIVE_MATMUL} --xla_tpu_scoped_vmem_limit_kib=98304"

# MaxText's policy `minimal` keeps the results of matrix products: `dots` here.
ROWS = (
    Row("v5p-32", 2048, 1, "full", 3.81, 9.41, 0.489, 0.515),
    Row("v5p-32", 2048, 2, "full", 4.94, 10.45, 0.897, 0.949),
    Row("v5p-32", 8192, 1, "full", 7.99, 13.51, 1.830, 2.252),
    Row("v5p-32", 8192, 2, "full", 14.10, 19.61, 3.498, 4.341),
    Row("v5p-32", 8192, 2, "full", 13.85, 19.36, 2.765, 3.608, _NO_COLLECTIVE_MATMUL),
    Row("v5p-32", 8192, 1, "dots", 26.99, 32.51, 1.703, 2.125),
    Row("v6e-16", 2048, 2, "full", 5.52, 11.11, 0.855, 0.881),
    Row("v6e-16", 8192, 1, "full", 8.22, 13.81, 1.660, 1.871),
    Row("v6e-16", 8192, 2, "full", 11.13, 16.67, 1.582, 2.003, _V6E_FLAGS),
    # Theirs has 21 GiB in the host's memory, ours 6; and more flags than these, which are not known.
    Row("v6e-16", 8192, 3, "offload", 22.00, 26.61, 2.429, 2.889, _V6E_FLAGS),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Trace, compile, print. Returns 0, or 1 when there is no program to compare."""
    args = parse(argv)
    row = ROWS[args.row] if args.row is not None else None
    found = measure(args, row)
    print(json.dumps(found))
    return 0 if found["outcome"] == "compiled" else 1


def parse(argv: Sequence[str] | None, about: str | None = __doc__) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--row", type=int, choices=range(len(ROWS)), help="a row of MaxText's, from 0")
    parser.add_argument("--model", default="8b", help="one of tools/bench/tpu_plans.py")
    parser.add_argument("--topology", default="v5p-32")
    parser.add_argument("--seq", type=int, default=2048, help="tokens of a row")
    parser.add_argument("--rows", type=int, default=1, help="rows per chip")
    parser.add_argument("--remat", default="full")
    parser.add_argument("--flags", help="of the TPU compiler; default: the row's")
    parser.add_argument("--libtpu", type=Path, help="another compiler than the installed one")
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="name=value", help="more settings of the recipe"
    )
    args = parser.parse_args(argv)
    if args.row is not None:
        row = ROWS[args.row]
        args.topology, args.seq, args.rows, args.remat = row.topology, row.seq, row.rows, row.remat
        args.flags = row.flags if args.flags is None else args.flags
    return args


def measure(args: argparse.Namespace, row: Row | None) -> dict[str, Any]:
    found = measured(compiled(our_request(plan_for(args), args.libtpu)))
    return {**shape_of(args), **found, "over_maxtext": ratios(found, row)}


def plan_for(args: argparse.Namespace) -> Plan:
    from tools.bench.tpu_plans import Case, plan_of

    flags = f"compiler.tpu_flags={args.flags or 'default'}"
    return plan_of(Case(args.model, args.topology, args.seq, args.rows, args.remat, (flags, *args.set)))


def shape_of(args: argparse.Namespace) -> dict[str, Any]:
    return {
        "model": args.model,
        "topology": args.topology,
        "seq": args.seq,
        "rows_per_chip": args.rows,
        "remat": args.remat,
        "flags": args.flags or "default",
    }


def our_request(plan: Plan, libtpu: Path | None) -> CompileRequest:
    """Our own step of a plan, traced."""
    from tptrain.dryrun.command import compile_request
    from tptrain.dryrun.tracing import trace_in_child

    return compile_request(plan, trace_in_child(plan), libtpu)


def compiled(request: CompileRequest) -> CompiledProgram:
    """The program of a request; it is printed."""
    from tptrain.dryrun.compiling import compile_program
    from tptrain.report.program_lines import program_lines

    program = compile_program(request)
    print("\n".join(program_lines(program, request.topology.chip.hbm_bytes)), flush=True)
    return program


def measured(program: CompiledProgram) -> dict[str, Any]:
    """A program in numbers; without them where it did not compile."""
    outcome = {"libtpu": program.libtpu, "outcome": program.outcome}
    if program.memory is None or program.cost is None:
        return outcome
    memory, cost = program.memory, program.cost
    score = cost.estimated_seconds + cost.kernel_seconds
    numbers = {
        "peak_gib": memory.peak_bytes / GIB,
        "temporaries_gib": memory.temporary_bytes / GIB,
        "arguments_gib": memory.argument_bytes / GIB,
        "aliased_gib": memory.aliased_bytes / GIB,
        "host_gib": memory.host_bytes / GIB,
        "estimated_seconds": cost.estimated_seconds,
        "kernel_seconds": cost.kernel_seconds,
        "score_seconds": score,
        "exposed_seconds": cost.exposed_seconds,
        "matmul_efficiency": cost.matmul_efficiency,
        "model_tflop": cost.total_flops / 1e12,
        "compile_seconds": program.compile_seconds,
    }
    found = {name: round(value, 4) if value is not None else None for name, value in numbers.items()}
    return {**outcome, **found, "collectives": collectives(cost)}


def collectives(cost: Any) -> list[dict[str, Any]]:
    return [
        {
            "kind": use.kind,
            "over": f"{'+'.join(use.axes)} ({use.network})",
            "type": use.dtype,
            "times": use.executions,
            "gib": round(use.num_bytes / GIB, 3),
        }
        for use in cost.collectives
    ]


def ratios(found: dict[str, Any], row: Row | None) -> dict[str, float] | None:
    """Ours over MaxText's; None where no row was named or nothing compiled."""
    if row is None or "peak_gib" not in found:
        return None
    names = ("peak_gib", "temporaries_gib", "estimated_seconds", "score_seconds")
    return {name: round(found[name] / getattr(row, name), 3) for name in names}


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main())
