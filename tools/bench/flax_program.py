"""One train step of Llama-3-8B in Flax, compiled for a TPU slice that is not there, beside tptrain's own.

    python tools/bench/flax_program.py --row 0 --libtpu path/to/libtpu-0.0.52
    python tools/bench/flax_program.py --topology v5p-8 --seq 512 --set model.config.num_hidden_layers=2

Two programs per call, a minute or two each on 2 cores; arguments and rows are those of
tools/bench/tpu_program.py. Both steps have the same model, mesh, shardings, remat policy, attention kernel,
chunks of the loss, formats, optimizer and inputs (tools/bench/flax_step.py says what a JAX trainer writes),
are compiled by the same libtpu with the same flags in the same way, and are read by the same code. The last
line is a JSON object:

peak_over_flax, score_over_flax     ours over Flax's; below 1: less. The score with exposed communication
score_without_communication_over_flax, estimated_over_flax, temporaries_over_flax
flops_over_flax                     model FLOPs, which must be equal within 1 %
flax_score_over_maxtext             Flax's score over that of MaxText's row, both without communication; above
                                    1.15 Flax is no yardstick
ours, flax                          the numbers of tpu_program.py
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tools.bench.tpu_program import Row
    from tptrain.config.plan import Plan
    from tptrain.dryrun.compiling import CompileRequest

Numbers = dict[str, Any]
ROOT = Path(__file__).parents[2]


def main(argv: Sequence[str] | None = None) -> int:
    """Trace, compile, print. Returns 0, or 1 when there are no two programs to compare."""
    from tools.bench.tpu_program import ROWS, compiled, measured, our_request, parse, plan_for, shape_of

    args = parse(argv, __doc__)
    plan = plan_for(args)
    request = our_request(plan, args.libtpu)
    print("tptrain:")
    ours = measured(compiled(request))
    print("\nFlax:")
    flax = measured(compiled(flax_request(plan, request)))
    row = ROWS[args.row] if args.row is not None else None
    print(json.dumps({**shape_of(args), **compared(ours, flax, row), "ours": ours, "flax": flax}))
    return 0 if ours["outcome"] == flax["outcome"] == "compiled" else 1


def flax_request(plan: Plan, ours: CompileRequest) -> CompileRequest:
    """The request for our own step with the Flax program in its place."""
    from tptrain.jaxside.process import setup_jax

    setup_jax(plan.num_devices)
    import jax

    from tools.bench.flax_step import FlaxStep
    from tptrain.jaxside.lowering import jitted_to_hlo
    from tptrain.jaxside.specs import jax_mesh

    # Shardings are stated as our own step states them.
    jax.config.update("jax_use_shardy_partitioner", False)
    step = FlaxStep(plan, jax_mesh(plan.mesh))
    state, inputs = step.shapes()
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path((state, inputs))]
    return replace(
        ours,
        # Donors are stated to the compiler, as for our own step.
        hlo_proto=jitted_to_hlo(step.jitted(donate=False), (state, inputs), "tpu"),
        parameter_names=tuple(jax.tree_util.keystr(path, simple=True, separator="/") for path in paths),
        donated=tuple(range(len(jax.tree.leaves(state)))),
    )


def compared(ours: Numbers, flax: Numbers, row: Row | None) -> dict[str, float | None]:
    """Ratios; None where a program is missing or no row was named."""
    from tools.bench.tpu_program import ratios

    def over_flax(*names: str) -> float | None:
        if not (ours["outcome"] == flax["outcome"] == "compiled"):
            return None
        mine, theirs = (sum(side[name] for name in names) for side in (ours, flax))
        return round(mine / theirs, 3)

    over_maxtext = ratios(flax, row)
    return {
        "peak_over_flax": over_flax("peak_gib"),
        "score_over_flax": over_flax("score_seconds", "exposed_seconds"),
        "score_without_communication_over_flax": over_flax("score_seconds"),
        "estimated_over_flax": over_flax("estimated_seconds"),
        "temporaries_over_flax": over_flax("temporaries_gib"),
        "flops_over_flax": over_flax("model_tflop"),
        "flax_score_over_maxtext": over_maxtext["score_seconds"] if over_maxtext else None,
    }


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main())
