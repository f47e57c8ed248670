"""Where a run starts: new weights at step 0, or the newest good checkpoint and what has changed since."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tptrain.backends.base import Backend, Tensors, TensorSource
from tptrain.ckpt.checkpointer import Checkpointer
from tptrain.ckpt.restoring import restore_part
from tptrain.ckpt.steps import read_run, set_aside
from tptrain.config.evaluation_checks import meeting_problems
from tptrain.config.plan import Plan
from tptrain.config.state_parts import PARAMS
from tptrain.data.batches import RunLength, run_length
from tptrain.errors import Problem, raise_if_any
from tptrain.jaxside.random_init import RandomSource
from tptrain.train.best_so_far import BestSoFar
from tptrain.train.continuation import Continuation, continuation, continuation_problems
from tptrain.train.exporting import before_problems
from tptrain.train.folder import RunFolder, step_asked_for
from tptrain.train.guards import GUARDS, Guards
from tptrain.train.inputs import Prepared
from tptrain.train.journal import Journal
from tptrain.train.loop import Progress
from tptrain.train.state import begun_state, fresh_state, join_parts, joined_weights, not_halted

NEW_RUN = Continuation(step=0, cursor=0, lines=())


@dataclass(frozen=True)
class Start:
    """The first state of a process.

    lines: what a run that goes on does otherwise than the saved one.
    best, guards: as they stand after the steps that are done.
    """

    state: Tensors
    progress: Progress
    length: RunLength
    lines: tuple[str, ...]
    best: BestSoFar
    guards: Guards

    @property
    def last_step(self) -> int:
        """The last step of the run, as far as is known; that of the start if its scores have ended it."""
        return self.progress.step if self.best.ends_the_run else self.length.total_steps


def fresh_start(plan: Plan, backend: Backend, prepared: Prepared, source: TensorSource | Path) -> Start:
    """Step 0, with weights from `source`: a step of another run, files, or a random generator."""
    if isinstance(source, RandomSource):
        state = fresh_state(backend, source)
    else:
        adapters = RandomSource(plan.recipe.seed, plan.facts.initializer_range)
        placed = backend.place(adapters, PARAMS, lambda buffer: buffer.is_adapter)
        state = begun_state(backend, joined_weights(backend, model_weights(plan, backend, source), placed))
    length = length_from(plan, prepared, NEW_RUN)
    return Start(state, Progress(0, 0), length, (), BestSoFar(plan), Guards(plan))


def model_weights(plan: Plan, backend: Backend, source: TensorSource | Path) -> Tensors:
    """The weights of the model from `source`, as for `fresh_start`, on the devices; without adapters."""
    if isinstance(source, Path):
        return restore_part(plan, backend, source, PARAMS, "model.pretrained", plan.recipe.unverified)
    if not isinstance(source, RandomSource):
        return backend.place(source, PARAMS, lambda buffer: not buffer.is_adapter)
    made = backend.create((PARAMS,), source)[PARAMS]
    return {name: tensor for name, tensor in made.items() if not backend.layout.buffers[name].is_adapter}


def resumed_start(
    plan: Plan,
    backend: Backend,
    checkpointer: Checkpointer,
    prepared: Prepared,
    journal: Journal,
    folder: RunFolder,
    say: Callable[[str], None],
    source: TensorSource | Path | None,
) -> Start:
    """The step that the recipe names, or the newest good one. Newer ones are set aside.

    source: of the weights that the step does not hold, those below adapters; None where it holds all.
    The journal is opened when it is clear that the run may go on, and cut when it is clear from where.
    """

    def accept(run: Mapping[str, Any]) -> None:
        raise_if_any(continuation_problems(plan, run, prepared.base))
        going_on = continuation(plan, run, prepared.data_digest)
        raise_if_any(length_problems(plan, prepared, going_on))
        raise_if_any(before_problems(plan, BestSoFar(plan, run).before))
        journal.open()

    journal.event("begin", "restore", 0)
    parts = tuple(plan.parts)
    restored = checkpointer.restore(step_asked_for(plan), parts, accept, plan.recipe.unverified)
    going_on = continuation(plan, restored.run, prepared.data_digest)
    journal.event("end", "restore", going_on.step)
    _set_newer_aside(plan, folder, going_on.step, say)
    journal.cut(going_on.step)
    saved = restored.parts
    if source is not None:
        base = model_weights(plan, backend, source)
        saved = {**saved, PARAMS: joined_weights(backend, base, saved[PARAMS])}
    state = join_parts(saved, not_halted(backend))
    progress = Progress(going_on.step, going_on.cursor)
    length, run = length_from(plan, prepared, going_on), restored.run
    best, guards = BestSoFar(plan, run), Guards(plan, run.get(GUARDS))
    return Start(state, progress, length, going_on.lines, best, guards)


def finished_step(plan: Plan, folder: RunFolder, prepared: Prepared) -> int | None:
    """The last step of a run that has nothing left to do: all steps are saved, or its scores have ended it,
    and the export is written.

    What a run that was killed at its very end finds when its command is given again. None for any other run.
    """
    steps = folder.steps()
    exported = plan.export_dir is not None and Path(plan.export_dir).is_dir()
    if plan.recipe.resume != "auto" or not steps or not exported:
        return None
    try:
        run = read_run(folder.step(steps[-1]))
        going_on = continuation(plan, run, prepared.data_digest)
        refused = continuation_problems(plan, run, prepared.base)
    except (OSError, ValueError, KeyError):  # a damaged step, of which restoring it will tell
        return None
    total = length_from(plan, prepared, going_on).total_steps
    is_last = going_on.step == total or BestSoFar(plan, run).ends_the_run
    return going_on.step if is_last and not refused and not going_on.lines else None


def _set_newer_aside(plan: Plan, folder: RunFolder, step: int, say: Callable[[str], None]) -> None:
    """Steps after the one that the run goes on from would mix with those that it will save."""
    for newer in reversed(folder.steps(plan.recipe.unverified)):
        if newer > step:
            kept = set_aside(folder.checkpoints, newer, "superseded")
            say(f"Step {newer} is set aside as {kept.name}.")


def length_from(plan: Plan, prepared: Prepared, start: Continuation) -> RunLength:
    """How long the run is, going on from `start`."""
    recipe = plan.recipe
    samples = prepared.batches.num_samples
    return run_length(samples, recipe.schedule, recipe.data.batch_rows, start.step, start.cursor)


def length_problems(plan: Plan, prepared: Prepared, start: Continuation) -> list[Problem]:
    """What only the records can tell: a run shorter than its warm-up, or than its finished part."""
    recipe, schedule = plan.recipe, plan.recipe.schedule
    length = length_from(plan, prepared, start)
    problems = meeting_problems(recipe, length.total_steps) if schedule.max_steps is None else []
    if schedule.warmup_steps >= length.total_steps:
        rule, fix = "must be less than the steps of the run", f"{max(length.total_steps // 10, 0)}"
        other = f"{length.total_steps} steps with these records"
        problems.append(Problem("schedule.warmup_steps", schedule.warmup_steps, rule, other, fix))
    rule = "must reach beyond the step that the run goes on from"
    if schedule.max_steps is not None and start.step > schedule.max_steps:
        other = f"step {start.step} is saved, the run would end at {schedule.max_steps}"
        fix = f"more, for at least {start.step} steps"
        problems.append(Problem("schedule.max_steps", schedule.max_steps, rule, other, fix))
    if length.total_samples is not None and start.cursor > length.total_samples:
        other = f"step {start.step} is saved after {start.cursor:,} samples, the run would end at"
        other, fix = f"{other} {length.total_samples:,}", "more epochs"
        problems.append(Problem("schedule.epochs", schedule.epochs, rule, other, fix))
    return problems
