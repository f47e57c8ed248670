"""How long a run takes to its first step, and what a step costs beside plain PyTorch.

    python tools/bench/first_steps.py                     about 3 minutes on 2 cores
    python tools/bench/first_steps.py --steps 60 --pairs 5

Trains one small Llama from random weights in float32 on embedded word problems: on the XLA backend (A) and on
plain torch eager (B), as A B A B ..., each run in a process of its own on the same cores. Both have the same
first weights and batches, so their losses are compared as well. The last line is a JSON object:

train_step_compiles      programs compiled from the train step's compile to the end of the run; the most of any run
seconds_to_first_step    start of the process to the first step's numbers, with imports, data and compile (median)
seconds_to_first_step_torch_eager: the same for B
first_trace_ms           host time to trace the step, once (median)
trace_ms_per_step        the same, spread over the steps of the run
compile_seconds          what XLA takes to compile the step (median)
step_ms, step_ms_torch_eager: median step of a run (median over runs)
step_over_torch_eager    step A / step B, of each pair; the median. Below 1: XLA is faster
tracing_share_of_step    host time to put the batch and start the compiled step, without the devices' own work,
                         over the step's time (median)
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tptrain.config import Recipe

# Steps left out of a run's median: buffers and caches are still cold.
WARMUP_STEPS = 3
BACKENDS = ("xla", "torch")
_VERSIONED = ("tptrain", "torch", "torch_xla", "jax", "jaxlib")

SMALL_LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "rope_theta": 10000.0,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
}


class BenchError(Exception):
    """A run of the benchmark failed, or its numbers mean nothing."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the pairs and print. Returns 0, or 1 when a run failed."""
    args = parse(argv)
    if args.child:
        print(json.dumps(run(args.child, args.steps, args.rows, args.started)))
        return 0
    print_machine(args)
    try:
        pairs = [run_pair(index, args) for index in range(1, args.pairs + 1)]
    except BenchError as error:
        print(f"first_steps: {error}", file=sys.stderr)
        return 1
    print(json.dumps(summary(pairs)))
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=40, help="steps of each run; default: 40")
    parser.add_argument("--pairs", type=int, default=3, help="how many A B pairs; default: 3")
    parser.add_argument("--rows", type=int, default=32, help="rows of 128 tokens per step; default: 32")
    parser.add_argument("--threads", type=int, default=len(cores()), help="cores for both; default: all")
    parser.add_argument("--child", choices=BACKENDS, help=argparse.SUPPRESS)
    parser.add_argument("--started", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.steps <= WARMUP_STEPS or args.pairs < 1 or args.rows < 1:
        parser.error(f"--steps must be above {WARMUP_STEPS}, --pairs and --rows above 0")
    if not 1 <= args.threads <= len(cores()):
        parser.error(f"--threads must be between 1 and {len(cores())}, the cores this process may use")
    return args


def cores() -> list[int]:
    """The cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def print_machine(args: argparse.Namespace) -> None:
    versions = ", ".join(f"{name} {version(name)}" for name in _VERSIONED)
    print(f"Machine: {os.cpu_count()} CPUs ({processor()}), {args.threads} used; no accelerator.")
    print(f"Versions: Python {platform.python_version()}, {versions}.")
    tokens = args.rows * 128
    print(f"Runs: {args.pairs} pairs of {args.steps} steps, {tokens:,} tokens a step, float32.", flush=True)


def processor() -> str:
    """The processor's name where the system tells it, else its kind."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def run_pair(index: int, args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """One run on each backend, one after the other."""
    pair = {backend: run_child(backend, args) for backend in BACKENDS}
    xla, eager = pair["xla"], pair["torch"]
    apart = max(abs(a - b) / abs(b) for a, b in zip(xla["losses"], eager["losses"], strict=True))
    print(
        f"Pair {index}: first step after {xla['seconds_to_first_step']:.1f} s on XLA, "
        f"{eager['seconds_to_first_step']:.1f} s on torch eager; step {1e3 * step_seconds(xla):.1f} ms and "
        f"{1e3 * step_seconds(eager):.1f} ms; cores busy {xla['cores_busy']:.2f} and "
        f"{eager['cores_busy']:.2f}; losses at most {apart:.1e} apart.",
        flush=True,
    )
    if not apart <= 1e-2:
        raise BenchError(f"the two backends do not train the same model: losses are {apart:.1e} apart")
    return pair


def run_child(backend: str, args: argparse.Namespace) -> dict[str, Any]:
    """One run in a fresh process; its numbers."""
    given = {"steps": args.steps, "rows": args.rows, "child": backend, "started": time.time()}
    command = [sys.executable, __file__, *(f"--{name}={value!s}" for name, value in given.items())]
    done = subprocess.run(
        command,
        env=child_environment(os.environ, args.threads),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=confine(args.threads),  # noqa: PLW1509
    )
    if done.returncode:
        raise BenchError(f"the run with backend={backend} failed:\n{done.stderr.strip()}")
    numbers: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return numbers
