"""One run, from a plan to an exported model: everything is put together here, nothing is computed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rich.console import Console

from tptrain.backends.base import Backend, Tensors
from tptrain.backends.make import make_backend, prepare_process
from tptrain.ckpt.checkpointer import Checkpointer
from tptrain.config.checkpoint_config import config_is_on_the_hub_only
from tptrain.config.plan import Plan
from tptrain.config.planning import plan_recipe
from tptrain.config.schema import Recipe
from tptrain.errors import Problem, TptrainError, raise_if_any
from tptrain.eval.exact_match import ExactMatch, Score
from tptrain.export import LoraForm, export_step
from tptrain.train.after_step import AfterStep
from tptrain.train.folder import RunFolder, export_problems, folder_problems, resumes
from tptrain.train.inputs import Prepared, prepare, weight_source, write_assets
from tptrain.train.journal import Journal
from tptrain.train.loop import Loop
from tptrain.train.observers import LogLines, Observer, ProgressBar, TensorBoard
from tptrain.train.preemption import Preemption
from tptrain.train.saving import Saver, keep_policies, run_item, save_policy
from tptrain.train.scoring import Scoring
from tptrain.train.start import NEW_RUN, Start, finished_step, fresh_start, length_problems, resumed_start
from tptrain.train.summary import print_start, print_summary
from tptrain.weights import CONFIG_FILES, local_folder


@dataclass(frozen=True)
class RunResult:
    """What a run leaves: its folder, its newest checkpoint, the export, and the scores around training.

    before: None for a run that went on from a checkpoint, too.
    """

    output_dir: Path
    checkpoint: Path
    export_dir: Path | None
    before: Score | None
    after: Score | None


@dataclass(frozen=True)
class _Run:
    """What all parts of a run share."""

    plan: Plan
    folder: RunFolder
    console: Console
    journal: Journal
    preemption: Preemption

    def say(self, line: str) -> None:
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)


def train(plan: Plan, console: Console | None = None, preemption: Preemption | None = None) -> RunResult:
    """Run a plan: train, save, export, and score if asked to.

    preemption: the watch for SIGTERM, where the caller has begun it; None: begun here.

    Raises ProblemsError before anything is written when the inputs or the output folder do not allow the run,
    Preempted when SIGTERM ended it and its state is saved, SaveError when its last step could not be saved.
    """
    console = console or Console(highlight=False, markup=False)
    raise_if_any(host_problems(plan))
    prepare_process(plan)
    folder = RunFolder(Path(plan.output_dir).expanduser())
    raise_if_any(folder_problems(plan, folder))
    watch = nullcontext(preemption) if preemption is not None else Preemption()
    with watch as preemption, closing(Journal(folder.root, held=True)) as journal:
        run = _Run(plan, folder, console, journal, preemption)
        preemption.tell(run.say, journal)
        return _train(run)


def train_recipe(
    recipe: Recipe, console: Console | None = None, preemption: Preemption | None = None
) -> RunResult:
    """Plan a recipe and run it. A config that only the hub has is fetched first, so that it is compared."""
    pretrained = recipe.model.pretrained
    if pretrained is not None and config_is_on_the_hub_only(recipe):
        local_folder(pretrained, "model.pretrained", CONFIG_FILES)
    return train(plan_recipe(recipe), console, preemption)


def host_problems(plan: Plan) -> list[Problem]:
    """Several hosts: each would have to write its own shards, and one of them the files of the run."""
    hosts = plan.topology.num_hosts
    if hosts == 1:
        return []
    rule = "must be a slice of one host: training on several hosts is not yet supported"
    return [Problem("topology", plan.topology.name, rule, f"{hosts} hosts", "v6e-8, v5e-8, v5p-8 or cpu-8")]


def _train(run: _Run) -> RunResult:
    plan, folder = run.plan, run.folder
    run.journal.event("begin", "start", 0)
    prepared = prepare(plan, folder, run.console)
    goes_on = resumes(plan, folder)
    finished = finished_step(plan, folder, prepared)
    if finished is not None:
        assert plan.export_dir is not None
        run.say(f"The run is finished: step {finished} is saved and exported.")
        return RunResult(folder.root, folder.step(finished), Path(plan.export_dir), None, None)
    raise_if_any(export_problems(plan) if goes_on else length_problems(plan, prepared, NEW_RUN))
    backend = make_backend(plan)
    scoring = _scoring(run, backend, prepared)
    source = None if goes_on and prepared.base is None else weight_source(plan)
    if not goes_on:
        _begin_folder(run, prepared)
    with closing(_checkpointer(run, backend)) as checkpointer:
        if goes_on:
            start = resumed_start(plan, backend, checkpointer, prepared, run.journal, folder, run.say, source)
        else:
            assert source is not None, "a new run has weights from somewhere"
            start = fresh_start(plan, backend, prepared, source)
        run.preemption.start_from(start.progress.step)
        run.journal.event("end", "start", start.progress.step)
        print_start(run.console, plan, start, run.preemption.watching)
        before = scoring(start.state, 0, "before training") if scoring and not goes_on else None
        state, after = _loop(run, backend, checkpointer, prepared, scoring, start)
    run.preemption.saved()
    total = start.length.total_steps
    if scoring is not None and after is None:
        after = scoring(state, total, "after training")
    exported = _export(run, total)
    run.preemption.done()
    result = RunResult(folder.root, folder.step(total), exported, before, after)
    print_summary(run.console, plan, folder.root, result.checkpoint, exported, before, after)
    return result


def _scoring(run: _Run, backend: Backend, prepared: Prepared) -> Scoring | None:
    if not run.plan.recipe.eval.problems:
        return None
    scorer = ExactMatch(run.plan, backend, prepared.tokenizer, prepared.stop_ids)
    if scorer.skipped:
        run.say(f"Evaluation: {scorer.skipped} problems left out (no text, or too long to answer).")
    return Scoring(scorer, run.console, run.journal)


def _begin_folder(run: _Run, prepared: Prepared) -> None:
    """Write what a new run has before its first step."""
    unverified = run.folder.steps(unverified=True)
    if unverified:
        steps = ", ".join(map(str, unverified))
        run.say(f"Note: without a digest manifest, so not gone on from: step {steps} (--unverified would).")
    run.folder.root.mkdir(parents=True, exist_ok=True)
    write_assets(run.plan, run.folder, prepared.tokenizer, prepared.stop_ids)
    run.journal.open()
    run.journal.cut(0)


def _checkpointer(run: _Run, backend: Backend) -> Checkpointer:
    keep, folder = keep_policies(run.plan), run.folder.checkpoints
    return Checkpointer(run.plan, backend, folder, keep, run.say, run.journal.event)


def _loop(
    run: _Run,
    backend: Backend,
    checkpointer: Checkpointer,
    prepared: Prepared,
    scoring: Scoring | None,
    start: Start,
) -> tuple[Tensors, Score | None]:
    """Train with everything that goes on around a step; the last state, and its score if it was scored."""
    plan, total = run.plan, start.length.total_steps
    saver = Saver(checkpointer, run_item(plan, prepared.data_digest, prepared.base), run.say)
    every = plan.recipe.eval.every_steps
    after_step = AfterStep(total, save_policy(plan), saver, scoring, every, run.preemption)
    with _watchers(run, total, start.progress.step) as watchers:
        observers: list[Observer] = [run.journal, after_step.see, *watchers]
        batches, due = prepared.batches, after_step.due
        loop = Loop(plan, backend, batches, total, observers, after_step, due, partial(_compiling, run))
        state = loop.run(start.state, start.progress)
    return state, after_step.last_score


@contextmanager
def _watchers(run: _Run, total: int, done: int) -> Iterator[list[Observer]]:
    """The progress bar and TensorBoard, as far as they are asked for."""
    log, console = run.plan.recipe.log, run.console
    with ExitStack() as opened:
        watchers: list[Observer] = []
        if log.tensorboard:
            watchers.append(opened.enter_context(closing(TensorBoard(run.folder.root, done))))
        if log.progress:
            bar = ProgressBar(console, total, done) if console.is_terminal else LogLines(console, total)
            watchers.append(opened.enter_context(closing(bar)))
        yield watchers


@contextmanager
def _compiling(run: _Run, step: int) -> Iterator[None]:
    """Around the compilation of the step: what this process does after it could be lost."""
    with run.journal.phase("compile", step):
        yield
    run.preemption.begin(step)


def _export(run: _Run, step: int) -> Path | None:
    plan, section = run.plan, run.plan.recipe.export
    if plan.export_dir is None:
        return None
    folder, out = run.folder.step(step), Path(plan.export_dir)
    form = LoraForm(section.lora) if plan.recipe.lora.rank else LoraForm()
    try:
        with run.journal.phase("export", step):
            return export_step(folder, out, None, section.dtype, section.max_shard_gb, lora_form=form)
    except TptrainError:
        run.say(f"The run is saved; export it with: python tools/convert_ckpt.py {folder} FOLDER")
        raise
