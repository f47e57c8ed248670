"""The training loop: hand the next batch to the devices, then look at the step before.

Reading a step's numbers waits for it to finish. The loop reads those of step n after it has started step
n + 1, so the devices always have work. Devices that share the host's cores have nothing to gain from that,
and their steps are read at once.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass

from tptrain.backends.base import Backend, CompiledStep, Tensors
from tptrain.config.plan import Plan
from tptrain.data.batches import Batch, Batches, prefetch
from tptrain.train.guards import Guards
from tptrain.train.journal import StepRecord
from tptrain.train.observers import Observer
from tptrain.train.schedule import step_scalars
from tptrain.train.state import split_frozen, state_specs
from tptrain.train.step import BATCH_NAMES, prepare_step


@dataclass(frozen=True)
class Progress:
    """Where a run stands: steps done, and the global index of the next sample."""

    step: int
    cursor: int


@dataclass(frozen=True)
class _Started:
    """A step that the devices are working on."""

    step: int
    cursor: int
    batch: Batch
    learning_rate: float
    outputs: Tensors
    trace_seconds: float
    compile_seconds: float
    input_seconds: float


class Loop:
    """One run's training, from wherever it stands to `total_steps`.

    after_step: called with the state and the progress after every step that is `due`, and after the last one;
                the run ends there when it returns True.
    compiling:  entered with the step around the compilation.
    guards:     those of the run, where it goes on; None for a new one's.
    """

    def __init__(
        self,
        plan: Plan,
        backend: Backend,
        batches: Batches,
        total_steps: int,
        observers: Sequence[Observer],
        after_step: Callable[[Tensors, Progress], bool | None],
        due: Callable[[int], bool] = lambda step: False,
        compiling: Callable[[int], AbstractContextManager[object]] = nullcontext,
        guards: Guards | None = None,
    ):
        self._plan, self._backend, self._batches, self._total = plan, backend, batches, total_steps
        self._observers, self._after_step, self._due = observers, after_step, due
        self._compiling, self._guards = compiling, guards or Guards(plan)
        self._function, self._constants = prepare_step(backend, plan)
        self._frozen: Tensors = {}
        self._compiled: CompiledStep | None = None
        self._finished_at = 0.0

    def run(self, state: Tensors, start: Progress) -> Tensors:
        """Train to the end and return the last state; the tensors of `state` are used up."""
        started: _Started | None = None
        state, self._frozen = split_frozen(state, self._backend.layout)
        self._finished_at = time.perf_counter()
        with closing(prefetch(self._batches, start.cursor, self._total - start.step)) as upcoming:
            for step in range(start.step + 1, self._total + 1):
                waited = time.perf_counter()
                cursor, batch = next(upcoming)
                input_seconds = time.perf_counter() - waited
                state, now = self._start(state, step, cursor, batch, input_seconds)
                self._finish(started)
                started = now
                if not self._backend.works_beside_host:
                    self._finish(started)
                    started = None
                if step == self._total or self._due(step):
                    self._finish(started)
                    started = None
                    progress = Progress(step, self._batches.after(cursor))
                    ends = self._after_step({**state, **self._frozen}, progress)
                    self._finished_at = time.perf_counter()
                    if ends:
                        break
        return {**state, **self._frozen}

    def _start(
        self, state: Tensors, step: int, cursor: int, batch: Batch, input_seconds: float
    ) -> tuple[Tensors, _Started]:
        recipe = self._plan.recipe
        limit = self._guards.norm_limit(step)
        scalars = step_scalars(step, self._total, recipe.schedule, recipe.optim, limit)
        arrays = {name: getattr(batch, name) for name in BATCH_NAMES}
        varying = {**self._backend.put_batch(arrays), **self._backend.put_scalars(scalars)}
        inputs = {**varying, **self._constants, **self._frozen}
        trace_seconds = compile_seconds = 0.0
        if self._compiled is None:
            specs = state_specs(self._backend)
            with self._compiling(step):
                self._compiled = self._backend.compile_step(self._function, state, inputs, specs)
            trace_seconds, compile_seconds = self._compiled.trace_seconds, self._compiled.compile_seconds
            self._finished_at = time.perf_counter()
        state, outputs = self._compiled(state, inputs)
        rate = scalars["learning_rate"]
        return state, _Started(
            step, cursor, batch, rate, outputs, trace_seconds, compile_seconds, input_seconds
        )

    def _finish(self, started: _Started | None) -> None:
        """Wait for a step, check it, and tell the observers; nothing if there is none."""
        if started is None:
            return
        outputs = self._backend.fetch_scalars(started.outputs)
        now = time.perf_counter()
        seconds, self._finished_at = now - self._finished_at, now
        skipped = self._guards.judge(started.step, outputs)
        batch = started.batch
        record = StepRecord(
            step=started.step,
            loss=outputs["loss"],
            counted_tokens=batch.counted_tokens,
            real_tokens=batch.real_tokens,
            padded_tokens=batch.padded_tokens,
            grad_norm=outputs["grad_norm"],
            learning_rate=started.learning_rate,
            step_seconds=seconds,
            trace_seconds=started.trace_seconds,
            compile_seconds=started.compile_seconds,
            input_seconds=started.input_seconds,
            compiles=self._backend.compile_count(),
            cursor=self._batches.after(started.cursor),
            rows_digest=batch.rows_digest,
            skipped=skipped,
            source_tokens=batch.source_tokens,
        )
        for observer in self._observers:
            observer(record)
        self._guards.raise_if_too_many(started.step)
