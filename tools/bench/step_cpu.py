"""A train step of ours beside a hand-written JAX one, on 8 virtual CPU devices.

    python tools/bench/step_cpu.py                        about 3 minutes on 2 cores
    python tools/bench/step_cpu.py --rounds 10 --width 384

One small Llama in float32 (mesh 4x2, layers in a scan, AdamW) takes the same steps from the same weights as
tptrain's captured step (A), as a `jax.jit` step with a donated state (B, tools/bench/jax_step.py), and in
plain torch eager on one device (C). In one process they take turns, A B C A B C ...; each step is waited for,
with its inputs at hand before it. Run it on a machine that does nothing else. The last line is a JSON object;
ratios are medians over the rounds:

step_over_jax                time of A over that of B; below 1: ours is faster
cpu_over_jax                 the same in processor time, which other work on the machine moves less
step_over_torch_eager        time of A, on 8 virtual devices, over that of C on one
step_ms, step_ms_jax, step_ms_torch_eager: the medians
trace_ms_per_step_24_layers  host time of a step of a model with 24 layers: from the call of the captured step
                             to its return
first_trace_ms_24_layers     what tracing that step took, once
train_step_compiles          programs that XLA compiled for a train step (of both models, the most)
losses_apart                 largest relative difference of the three losses in any step
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

# Rounds left out: buffers and caches are still cold.
WARMUP_ROUNDS = 2
DEEP_LAYERS, DEEP_STEPS = 24, 30
TOKENS = 128
LARGEST_GAP = 1e-3

# Side -> the step that it took (tools.bench.step_cpu_sides.Taken).
Round = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print. Returns 0, or 1 when the sides do not train the same model."""
    from tools.bench.first_steps import cores, machine_text

    args = parse(argv)
    print(machine_text(len(cores())), flush=True)
    numbers = summary(*rounds(args), deep_steps())
    if not numbers["losses_apart"] <= LARGEST_GAP:
        print(f"step_cpu: the sides do not train the same model: {numbers}", file=sys.stderr)
        return 1
    print(json.dumps({name: v if isinstance(v, int) else float(f"{v:.4g}") for name, v in numbers.items()}))
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=15, help="rounds that count; default: 15")
    parser.add_argument("--layers", type=int, default=4, help="layers of the model; default: 4")
    parser.add_argument("--width", type=int, default=256, help="its hidden size; default: 256")
    parser.add_argument("--rows", type=int, default=16, help="rows of 128 tokens per step; default: 16")
    return parser.parse_args(argv)


def rounds(args: argparse.Namespace) -> tuple[list[Round], int]:
    """Per round: the step that each side took; and how many programs our side compiled."""
    from tools.bench.step_cpu_sides import JaxSide, eager_side, our_side

    sizes = (args.layers, args.width, args.rows, TOKENS)
    ours = our_side(*sizes)
    sides: dict[str, Any] = {"ours": ours, "jax": JaxSide(ours), "eager": eager_side(*sizes)}
    found = []
    for index in range(WARMUP_ROUNDS + args.rounds):
        found.append({name: side.step() for name, side in sides.items()})
        if index >= WARMUP_ROUNDS:
            row = "  ".join(f"{name} {1e3 * taken.seconds:.1f} ms" for name, taken in found[-1].items())
            print(f"Round {index - WARMUP_ROUNDS + 1}: {row}; loss {found[-1]['ours'].loss:.4f}", flush=True)
    return found, ours.compiles


def deep_steps() -> Any:
    """A side of many small layers that has taken its steps."""
    from tools.bench.step_cpu_sides import our_side

    deep = our_side(DEEP_LAYERS, 64, 8, 64)
    for _ in range(DEEP_STEPS):
        deep.step()
    return deep


def summary(found: Sequence[Round], compiles: int, deep: Any) -> dict[str, Any]:
    """The numbers of the last line."""
    warm = found[WARMUP_ROUNDS:]

    def over(side: str) -> float:
        return median(row["ours"].seconds / row[side].seconds for row in warm)

    def milliseconds(side: str) -> float:
        return 1e3 * median(row[side].seconds for row in warm)

    losses = [[taken.loss for taken in row.values()] for row in found]
    return {
        "step_over_jax": over("jax"),
        "cpu_over_jax": median(row["ours"].cpu_seconds / row["jax"].cpu_seconds for row in warm),
        "step_over_torch_eager": over("eager"),
        "step_ms": milliseconds("ours"),
        "step_ms_jax": milliseconds("jax"),
        "step_ms_torch_eager": milliseconds("eager"),
        "trace_ms_per_step_24_layers": 1e3 * median(deep.host_seconds[WARMUP_ROUNDS:]),
        "first_trace_ms_24_layers": 1e3 * deep.trace_seconds,
        "train_step_compiles": max(compiles, deep.compiles),
        "losses_apart": max((max(row) - min(row)) / min(row) for row in losses),
    }


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))
    sys.exit(main())
