"""How long a run takes to its first step, and what a step costs beside plain PyTorch.

    python tools/bench/first_steps.py                     about 3 minutes on 2 cores
    python tools/bench/first_steps.py --steps 60 --pairs 5

Trains one small Llama from random weights in float32 on embedded word problems: on the XLA backend (A) and on
plain torch eager (B), as A B A B ..., each run in a process of its own on the same cores. Both have the same
first weights and batches, so their losses are compared as well. Each step is waited for before the next one
is put, so that its time is its own. Run it on a machine that does nothing else: the two backends do not
suffer alike from sharing cores. The last line is a JSON object; each number is the median over the runs:

train_step_compiles      programs compiled from the train step on to the end of a run (of any run, the most)
seconds_to_first_step    start of the process to the first step's numbers: imports, data, trace, compile, step
seconds_to_first_step_torch_eager: the same for B
first_trace_ms           host time to trace the step, once a run
trace_ms_per_step        the same, spread over the steps of the run
compile_seconds          what XLA takes to compile the step
step_ms, step_ms_torch_eager: the median step of a run, with its batch and all else that the loop does
step_over_torch_eager    step_ms of A over that of B, in each pair; below 1: XLA is faster
tracing_share_of_step    host time to put the batch and to start the compiled step, over the step's time
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
# A run that got less of its cores than this had to share them, and its step says little.
QUIET_SHARE = 0.75
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
        print(json.dumps(run(args.child, args.steps, args.rows, args.threads, args.started)))
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
    print(machine_text(args.threads))
    tokens = args.rows * 128
    print(f"Runs: {args.pairs} x A B, {args.steps} steps of {tokens:,} tokens, float32.", flush=True)


def machine_text(threads: int) -> str:
    """Two lines: the machine, with the cores that a benchmark uses of it, and the versions."""
    versions = ", ".join(f"{name} {version(name)}" for name in _VERSIONED)
    cpus, load = f"{os.cpu_count()} CPUs ({processor()})", os.getloadavg()[0]
    return (
        f"Machine: {cpus}, {threads} used; load {load:.1f} before the start; no accelerator.\n"
        f"Versions: Python {platform.python_version()}, {versions}."
    )


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
    if min(run["cores_busy"] for run in pair.values()) < QUIET_SHARE * args.threads:
        print("  Its runs did not get their cores to themselves: take its ratio for nothing.", flush=True)
    if not apart <= 1e-2:
        raise BenchError(f"the two backends do not train the same model: losses are {apart:.1e} apart")
    return pair


def run_child(backend: str, args: argparse.Namespace) -> dict[str, Any]:
    """One run in a fresh process; its numbers."""
    given = {"steps": args.steps, "rows": args.rows, "threads": args.threads, "child": backend}
    command = [sys.executable, __file__, *(f"--{name}={value}" for name, value in given.items())]
    done = subprocess.run([*command, f"--started={time.time()}"], capture_output=True, text=True)
    if done.returncode:
        raise BenchError(f"the run with backend={backend} failed:\n{done.stderr.strip()}")
    numbers: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return numbers


def summary(pairs: Sequence[Mapping[str, Mapping[str, Any]]]) -> dict[str, float]:
    """The numbers of the last line, from all pairs."""
    xla, eager = [pair["xla"] for pair in pairs], [pair["torch"] for pair in pairs]
    trace = median(run["trace_seconds"] for run in xla)
    numbers = {
        "train_step_compiles": max(run["train_step_compiles"] for run in xla),
        "seconds_to_first_step": median(run["seconds_to_first_step"] for run in xla),
        "seconds_to_first_step_torch_eager": median(run["seconds_to_first_step"] for run in eager),
        "first_trace_ms": 1e3 * trace,
        "trace_ms_per_step": 1e3 * trace / len(xla[0]["losses"]),
        "compile_seconds": median(run["compile_seconds"] for run in xla),
        "step_ms": 1e3 * median(map(step_seconds, xla)),
        "step_ms_torch_eager": 1e3 * median(map(step_seconds, eager)),
        "step_over_torch_eager": median(
            step_seconds(a) / step_seconds(b) for a, b in zip(xla, eager, strict=True)
        ),
        "tracing_share_of_step": median(median(warm(r["host_seconds"])) / step_seconds(r) for r in xla),
    }
    return {name: v if isinstance(v, int) else float(f"{v:.4g}") for name, v in numbers.items()}


def step_seconds(run: Mapping[str, Any]) -> float:
    """The median step of a run, once it is warm."""
    return float(median(warm(run["step_seconds"])))


def warm(values: Sequence[float]) -> Sequence[float]:
    return values[WARMUP_STEPS:]


# What follows runs in a child.


def run(backend: str, steps: int, rows: int, threads: int, started: float) -> dict[str, Any]:
    """Train as `tptrain train` does, without saves and export, and return what was measured.

    started: time.time() just before this process was started.
    """
    confine(threads)
    import torch
    from rich.console import Console

    from tptrain.backends.make import make_backend
    from tptrain.config.planning import plan_recipe
    from tptrain.jaxside.random_init import RandomSource
    from tptrain.train.folder import RunFolder
    from tptrain.train.journal import StepRecord
    from tptrain.train.loop import Loop, Progress
    from tptrain.train.run import prepare
    from tptrain.train.state import fresh_state

    torch.set_num_threads(threads)
    plan = plan_recipe(recipe(backend, steps, rows))
    prepared = prepare(plan, RunFolder(Path(plan.output_dir)), Console(quiet=True))
    timed = TimedBackend(make_backend(plan))
    state = fresh_state(timed, RandomSource(plan.recipe.seed, plan.facts.initializer_range))
    records: list[StepRecord] = []
    loop = Loop(plan, timed, prepared.batches, steps, [records.append], lambda state, progress: None)
    began, cpu_began = time.perf_counter(), time.process_time()
    loop.run(state, Progress(0, 0))
    busy = (time.process_time() - cpu_began) / (time.perf_counter() - began)
    return {
        "seconds_to_first_step": timed.first_done_at - started,
        "train_step_compiles": timed.compile_count() - timed.compiles_before,
        "trace_seconds": records[0].trace_seconds,
        "compile_seconds": records[0].compile_seconds,
        "step_seconds": timed.step_seconds,
        "host_seconds": timed.host_seconds,
        "losses": [record.loss for record in records],
        "cores_busy": busy,
    }


def confine(threads: int) -> None:
    """Keep this process on `threads` cores; call it before a framework counts them."""
    os.environ["OMP_NUM_THREADS"] = str(threads)
    os.environ["CPU_NUM_DEVICES"] = "1"
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cores()[:threads])


def recipe(backend: str, steps: int, rows: int) -> Recipe:
    """The run: float32, since a CPU has no fast bfloat16 and the backends are to be compared."""
    from tptrain.config import (
        DataSection,
        ModelSection,
        OptimSection,
        PrecisionSection,
        Recipe,
        ScheduleSection,
    )
    from tptrain.config.overrides import apply_overrides

    made = Recipe(
        name="first_steps",
        topology="cpu-1",
        output_dir="first_steps-writes-nothing",
        model=ModelSection(config=SMALL_LLAMA, tokenizer="train"),
        data=DataSection(path="builtin:word_problems", preset="gsm8k", seq_len=128, batch_rows=rows),
        optim=OptimSection(learning_rate=1e-3),
        schedule=ScheduleSection(max_steps=steps, warmup_steps=WARMUP_STEPS),
        precision=PrecisionSection(compute="float32"),
    )
    return apply_overrides(made, [f"backend={backend}", "export.enabled=false"])


class TimedBackend:
    """A backend that times each step; all it does not time goes to the backend itself.

    step_seconds:  per step, from the end of the one before to its own; of the first, from its start.
    host_seconds:  per step, putting the batch and the scalars, and starting the compiled step.
    first_done_at: time.time() when the first step's numbers were there.
    """

    def __init__(self, backend: Any):
        self._backend = backend
        self.step_seconds: list[float] = []
        self.host_seconds: list[float] = []
        self.first_done_at = math.nan
        self.compiles_before = 0
        self._put_seconds = self._done_at = 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def put_batch(self, batch: Any) -> Any:
        began = time.perf_counter()
        put = self._backend.put_batch(batch)
        self._put_seconds = time.perf_counter() - began
        return put

    def put_scalars(self, values: Any) -> Any:
        began = time.perf_counter()
        put = self._backend.put_scalars(values)
        self._put_seconds += time.perf_counter() - began
        return put

    def compile_step(self, *arguments: Any) -> TimedStep:
        self.compiles_before = self._backend.compile_count()
        return TimedStep(self, self._backend.compile_step(*arguments))

    def step_started(self, began: float, outputs: Any) -> None:
        """Wait for a step that was started at `began`, and note its times."""
        self.host_seconds.append(self._put_seconds + time.perf_counter() - began)
        self._backend.fetch_scalars(outputs)
        done_at = time.perf_counter()
        if not self.step_seconds:
            self.first_done_at, self._done_at = time.time(), began
        self.step_seconds.append(done_at - self._done_at)
        self._done_at = done_at


class TimedStep:
    """A compiled step that tells its backend when it was started."""

    def __init__(self, backend: TimedBackend, step: Any):
        self._backend, self._step = backend, step
        self.trace_seconds, self.compile_seconds = step.trace_seconds, step.compile_seconds

    def __call__(self, state: Any, inputs: Any) -> Any:
        began = time.perf_counter()
        state, outputs = self._step(state, inputs)
        self._backend.step_started(began, outputs)
        return state, outputs


if __name__ == "__main__":
    sys.exit(main())
