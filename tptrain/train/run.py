"""One run, from a plan to an exported model: everything is put together here, nothing is computed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from tptrain.backends.base import Backend, Tensors
from tptrain.backends.make import make_backend, prepare_process
from tptrain.ckpt.checkpointer import Checkpointer
from tptrain.config.added_tokens import tokenizer_is_on_the_hub_only, tokenizer_source
from tptrain.config.checkpoint_config import config_is_on_the_hub_only
from tptrain.config.plan import Plan
from tptrain.config.planning import plan_recipe
from tptrain.config.schema import Recipe
from tptrain.config.state_parts import PARAMS
from tptrain.errors import Problem, TptrainError, raise_if_any
from tptrain.eval.exact_match import ExactMatch
from tptrain.eval.held_out import HeldOut, RowScorer
from tptrain.eval.isolation import isolation, leak_refusal
from tptrain.export import LoraForm, export_step
from tptrain.train.after_step import AfterStep
from tptrain.train.best_so_far import EVALUATION, BestSoFar
from tptrain.train.exporting import by_hand, check_required, chosen_step
from tptrain.train.folder import RunFolder, export_problems, folder_problems, resumes
from tptrain.train.guards import GUARDS, GuardError
from tptrain.train.inputs import Prepared, prepare, weight_source, write_assets
from tptrain.train.journal import Journal, read_journal, source_tokens
from tptrain.train.loop import Loop
from tptrain.train.observers import LogLines, Observer, ProgressBar, SkippedLines, TensorBoard
from tptrain.train.preemption import Preemption
from tptrain.train.saving import Saver, keep_policies, run_item, save_policy
from tptrain.train.scoring import Scores, Scoring
from tptrain.train.start import NEW_RUN, Start, finished_step, fresh_start, length_problems, resumed_start
from tptrain.train.state import part_of
from tptrain.train.summary import print_start, print_summary
from tptrain.weights import CONFIG_FILES, TOKENIZER_FILES, local_folder


@dataclass(frozen=True)
class RunResult:
    """What a run leaves: its folder, its newest checkpoint, the export, and the scores around training.

    before: of a run that went on from a checkpoint, without the answers; None where nothing was scored.
    """

    output_dir: Path
    checkpoint: Path
    export_dir: Path | None
    before: Scores | None
    after: Scores | None


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
    Preempted when SIGTERM ended it and its state is saved, SaveError when its last step could not be saved,
    GuardError when a guard stopped it, RequirementError when it is saved and not as export.require asks.
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
    """Plan a recipe and run it. What the plan reads and only the hub has is fetched first."""
    pretrained = recipe.model.pretrained
    if pretrained is not None and config_is_on_the_hub_only(recipe):
        local_folder(pretrained, "model.pretrained", CONFIG_FILES)
    setting, tokenizer = tokenizer_source(recipe.model)
    if tokenizer is not None and tokenizer_is_on_the_hub_only(recipe):
        local_folder(tokenizer, setting, TOKENIZER_FILES)
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
    scorer = RowScorer(plan, backend)
    scoring = _scoring(run, backend, prepared, scorer)
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
        _check_packing(run, scorer, prepared, start)
        before = _score_before(scoring, start)
        trained = _loop(run, backend, checkpointer, prepared, scoring, start)
    run.preemption.saved()
    last, after = trained.step, trained.scores
    if scoring is not None and after is None:
        after = scoring(trained.state, last, "after training")
    exported = _export(run, last, after, start.best)
    run.preemption.done()
    result = RunResult(folder.root, folder.step(last), exported, before, after)
    tokens = source_tokens(read_journal(run.journal.path))
    scores = (before, after)
    print_summary(run.console, plan, folder.root, result.checkpoint, exported, *scores, start.guards, tokens)
    return result


def _score_before(scoring: Scoring | None, start: Start) -> Scores | None:
    """The scores before training: made, or as a run that goes on was saved with."""
    best = start.best
    if start.progress.step:
        return Scores(best.before) if best.before else None
    if scoring is None:
        return None
    scores = scoring(start.state, 0, "before training")
    best.see(0, scores.metrics)
    return scores


def _check_packing(run: _Run, scorer: RowScorer, prepared: Prepared, start: Start) -> None:
    """Raise where records that share a row see each other on these devices, with these kernels."""
    plan = run.plan
    if plan.recipe.data.packing == "none" or not plan.recipe.data.check_packing:
        return
    batch = prepared.batches.batch_at(start.progress.cursor)
    found = isolation(scorer, part_of(start.state, PARAMS), batch, plan.facts.vocab_size)
    if found is None:
        return
    if found.leak(plan.facts.experts is not None):
        raise leak_refusal(plan, found)
    run.say(f"Packing: records do not see each other (checked in {found.rows} rows that hold several).")


def _scoring(run: _Run, backend: Backend, prepared: Prepared, scorer: RowScorer) -> Scoring | None:
    plan, exact, held_out = run.plan, None, None
    if plan.recipe.eval.problems:
        exact = ExactMatch(plan, backend, prepared.tokenizer, prepared.stop_ids, prepared.held_out_records)
        if exact.skipped:
            run.say(f"Evaluation: {exact.skipped} problems left out (no text, or too long to answer).")
    if prepared.held_out is not None:
        held_out = HeldOut(plan, scorer, prepared.held_out)
    return Scoring(exact, held_out, run.say, run.journal) if plan.metrics else None


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


@dataclass(frozen=True)
class _Trained:
    """The state after the last step, and its scores if it was scored."""

    state: Tensors
    step: int
    scores: Scores | None


def _loop(
    run: _Run,
    backend: Backend,
    checkpointer: Checkpointer,
    prepared: Prepared,
    scoring: Scoring | None,
    start: Start,
) -> _Trained:
    """Train with everything that goes on around a step."""
    plan, total, best, guards = run.plan, start.last_step, start.best, start.guards
    if total == start.progress.step < start.length.total_steps:
        run.say(f"No step is left: {best.reason()}.")

    def live() -> dict[str, Any]:
        return {EVALUATION: best.saved(), GUARDS: guards.saved()}

    saver = Saver(checkpointer, run_item(plan, prepared.data_digest, prepared.base), run.say, live)
    every = plan.recipe.eval.every_steps
    after_step = AfterStep(total, save_policy(plan), saver, scoring, every, run.preemption, best)
    with _watchers(run, total, start.progress.step) as watchers:
        observers: list[Observer] = [run.journal, after_step.see, *watchers]
        batches, due, compiling = prepared.batches, after_step.due, partial(_compiling, run)
        loop = Loop(plan, backend, batches, total, observers, after_step, due, compiling, guards)
        try:
            state = loop.run(start.state, start.progress)
        except GuardError as error:
            run.journal.stop(error.step, error.reason)
            raise
    if after_step.stopped_at is None:
        return _Trained(state, total, after_step.last_scores)
    run.journal.stop(after_step.stopped_at, "patience")
    run.say(f"Stopped early after step {after_step.stopped_at}: {best.reason()}.")
    return _Trained(state, after_step.stopped_at, after_step.last_scores)


@contextmanager
def _watchers(run: _Run, total: int, done: int) -> Iterator[list[Observer]]:
    """The progress bar and TensorBoard, as far as they are asked for, and what tells of skipped steps."""
    log, console = run.plan.recipe.log, run.console
    with ExitStack() as opened:
        watchers: list[Observer] = [SkippedLines(run.say)]
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


def _export(run: _Run, last: int, scores: Scores | None, best: BestSoFar) -> Path | None:
    """Export the step that the recipe chooses, if it is as required; None where nothing is exported."""
    plan, section = run.plan, run.plan.recipe.export
    if plan.export_dir is None:
        return None
    chosen = chosen_step(plan, run.folder, last, scores.metrics if scores else {})
    check_required(plan, run.folder, chosen, best.before)
    folder = run.folder.step(chosen.step)
    if chosen.step != last:
        run.say(f"Exporting step {chosen.step}, the best one by {plan.best_metric}.")
    form = LoraForm(section.lora) if plan.recipe.lora.rank else LoraForm()
    try:
        with run.journal.phase("export", chosen.step):
            out = Path(plan.export_dir)
            return export_step(folder, out, None, section.dtype, section.max_shard_gb, lora_form=form)
    except TptrainError:
        run.say(f"The run is saved; export it with: {by_hand(folder)}")
        raise
