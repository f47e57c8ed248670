"""Whole runs and their checkpoints: what is saved when, what is kept, and what a full disk does."""

import io
import resource
import shutil
from contextlib import contextmanager

import pytest
import torch
from rich.console import Console

from tests.train.steps import journal_steps, journal_values, published
from tptrain.ckpt.checkpointer import SaveError
from tptrain.ckpt.steps import find_step, with_metrics
from tptrain.config import EvalSection, ExportSection, SaveSection, ScheduleSection
from tptrain.config.planning import plan_recipe
from tptrain.errors import ProblemsError
from tptrain.train.folder import RunFolder, folder_problems
from tptrain.train.journal import read_events, read_journal
from tptrain.train.loop import Progress
from tptrain.train.run import train
from tptrain.train.saving import Saver

NO_EXPORT = ExportSection(enabled=False)


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "run"


def evaluation(records, every_steps):
    return EvalSection(problems=5, path=str(records), max_new_tokens=6, batch_rows=5, every_steps=every_steps)


def test_steps_are_kept_by_number_and_by_score(recipe, records, folder):
    save = SaveSection(every_steps=1, keep_last=1, keep_every=4, keep_best=1)
    schedule = ScheduleSection(max_steps=7)
    result = train(
        plan_recipe(recipe(save=save, schedule=schedule, eval=evaluation(records, 3), export=NO_EXPORT))
    )
    # Scores are 0 of 5 throughout, so that the newest scored step is the best: the last one.
    assert published(folder) == [4, 7]
    assert [s.metrics for s in with_metrics(folder / "checkpoints")] == [
        {},
        {"exact_match": 0.0, "loss": read_journal(folder / "journal.jsonl")[-1].loss},
    ]
    assert result.after.metrics == {"exact_match": 0.0}
    assert find_step(folder, "checkpoint", "best").name == "7"


def test_the_best_step_stays_when_later_ones_are_worse(recipe, records, folder, monkeypatch):
    """The scores of steps 2, 4 and 6 are made up; everything else is the run's own."""
    from tptrain.train import scoring

    rates = iter([0.0, 0.6, 0.2, 0.4])

    class Score(scoring.Score):
        @property
        def rate(self):
            return self.made_up

    def score(self, params):
        made = Score(answers(self, params).answers)
        object.__setattr__(made, "made_up", next(rates))
        return made

    answers = scoring.ExactMatch.__call__
    monkeypatch.setattr(scoring.ExactMatch, "__call__", score)
    save = SaveSection(every_steps=2, keep_last=1, keep_best=1)
    schedule = ScheduleSection(max_steps=6)
    train(plan_recipe(recipe(save=save, schedule=schedule, eval=evaluation(records, 2), export=NO_EXPORT)))
    assert published(folder) == [2, 6]
    assert find_step(folder, "checkpoint", "best").name == "2"


def test_evaluation_during_training_changes_nothing_of_it(recipe, records, folder, tmp_path, capsys):
    train(plan_recipe(recipe(export=NO_EXPORT)))
    scored = tmp_path / "scored"
    train(plan_recipe(recipe(export=NO_EXPORT, output_dir=str(scored), eval=evaluation(records, 1))))
    assert journal_values(scored) == journal_values(folder)
    evals = [e for e in read_events(scored / "journal.jsonl") if e.phase == "eval"]
    assert [(e.event, e.step) for e in evals] == [(e, step) for step in range(5) for e in ("begin", "end")]
    assert [dict(e.metrics) for e in evals[1::2]] == 5 * [{"exact_match": 0.0}]
    out = capsys.readouterr().out
    for when in ("before training", "after step 3", "after training"):
        assert f"Held-out problems answered right {when}: 0 of 5" in out


def test_a_resumed_run_is_not_scored_before_training_but_after_it(recipe, records, folder, capsys):
    section = evaluation(records, 0)
    train(plan_recipe(recipe(export=NO_EXPORT)))
    capsys.readouterr()
    result = train(plan_recipe(recipe(export=NO_EXPORT, resume="auto", eval=section)))
    assert result.before is None and len(result.after.exact.answers) == 5
    evals = [(e.event, e.step) for e in read_events(folder / "journal.jsonl") if e.phase == "eval"]
    assert evals == [("begin", 4), ("end", 4)], "no step is left to train, but the model is scored"


def test_saves_by_time(recipe, folder):
    often = SaveSection(every_steps=0, every_seconds=1e-6, keep_last=9)
    train(plan_recipe(recipe(save=often, export=NO_EXPORT)))
    assert published(folder) == [1, 2, 3, 4]


def test_saves_by_time_are_counted_from_the_last_save(recipe, folder):
    seldom = SaveSection(every_steps=3, every_seconds=3600, keep_last=9)
    train(plan_recipe(recipe(save=seldom, export=NO_EXPORT)))
    assert published(folder) == [3, 4]


def test_room_is_counted_for_all_that_is_kept(recipe, folder, monkeypatch):
    state = 3 * 151_872 * 4
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**12, 0, 4 * state))

    def problems(**save):
        schedule = ScheduleSection(max_steps=40)
        asked = recipe(save=SaveSection(every_steps=2, **save), schedule=schedule, export=NO_EXPORT)
        return folder_problems(plan_recipe(asked), RunFolder(folder))

    (problem,) = problems(keep_last=2, keep_every=10)
    assert "room for 7 checkpoints" in problem.rule and "0.00729 GB" in problem.other
    assert problem.fix == "another disk, or save.keep_last=3 save.keep_every=0"
    assert problems(keep_last=3, keep_every=0) == []


def test_scores_that_are_never_saved_are_refused(recipe, records, folder):
    """38 records are 10 steps: what the recipe by itself cannot tell."""
    save = SaveSection(every_steps=4, keep_best=1)
    asked = recipe(schedule=ScheduleSection(epochs=1), save=save, eval=evaluation(records, 3))
    with pytest.raises(
        ProblemsError, match=r"eval\.every_steps=3: .*first step of both 12, last step 10\); use 4"
    ):
        train(plan_recipe(asked))
    assert not folder.exists()


class Watched:
    """A console's file, in memory, that calls `then` when a text has been written to it."""

    def __init__(self, text, then):
        self._text, self._then = text, then

    def write(self, text):
        if self._text in text:
            self._then()

    def flush(self):
        pass

    def isatty(self):
        return False


@contextmanager
def small_files(size):
    """Files of this process end at `size` bytes, as on a full disk; gives the function that makes room."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def make_room():
        resource.setrlimit(resource.RLIMIT_FSIZE, before)

    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield make_room
    finally:
        make_room()


FITS = 20_000  # more than the journal, less than a matrix of the model


def test_a_save_that_fails_is_told_and_the_next_one_succeeds(recipe, folder):
    with small_files(FITS) as make_room:
        console = Console(file=Watched("step 3 could not be saved", make_room), width=300)
        save = SaveSection(every_steps=3, keep_last=9)
        plan = plan_recipe(recipe(save=save, schedule=ScheduleSection(max_steps=9), export=NO_EXPORT))
        train(plan, console)
    assert published(folder)[-1] == 9 and 3 not in published(folder)
    assert journal_steps(folder) == list(range(1, 10))
    leftovers = [path.name for path in (folder / "checkpoints").iterdir() if not path.name.isdecimal()]
    assert leftovers == []


def test_a_last_save_that_fails_ends_the_run_and_the_step_before_stays(recipe, folder):
    train(plan_recipe(recipe(export=NO_EXPORT)))
    longer = {"schedule": ScheduleSection(max_steps=5), "resume": "auto", "export": NO_EXPORT}
    with small_files(FITS), pytest.raises(SaveError, match="step 4 is the newest one saved"):
        train(plan_recipe(recipe(**longer)), Console(file=io.StringIO()))
    assert published(folder) == [2, 4]
    train(plan_recipe(recipe(**longer)))
    assert published(folder) == [4, 5]


class FullCheckpointer:
    """Stands in for one whose saves do not even start as long as `full` is set."""

    def __init__(self):
        self.full, self.saved = True, []

    def save(self, step, parts, run, metrics):
        if self.full:
            raise SaveError(f"step {step} could not be saved")
        self.saved.append((step, run["cursor"], set(parts), metrics))

    def wait(self):
        pass


def test_a_save_that_does_not_start_is_told_at_once_and_raised_when_it_counts():
    checkpointer, told = FullCheckpointer(), []
    saver = Saver(checkpointer, {"seeds": {}}, told.append)
    state = {f"{part}/a": torch.ones(2) for part in ("params", "mu", "nu")}
    saver.save(state, Progress(3, 12), {})
    assert told == ["step 3 could not be saved"]
    with pytest.raises(SaveError):
        saver.wait()
    checkpointer.full = False
    saver.save(state, Progress(4, 16), {"loss": 2.0})
    saver.wait()
    assert checkpointer.saved == [(4, 16, {"params", "mu", "nu"}, {"loss": 2.0})]
