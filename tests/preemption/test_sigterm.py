"""SIGTERM to the real command, wherever it is: nothing is lost, and the same command goes on."""

import os
import shutil
import time

import pytest

from tests.preemption.command import AT_ONCE_SECONDS, ROOT, begun, times
from tests.train.steps import assert_same_state, journal_values, published
from tptrain.ckpt.digests import read_manifest
from tptrain.config.overrides import apply_overrides
from tptrain.config.planning import plan_recipe
from tptrain.config.recipe_file import load_recipe

LONG_COMPILE_SECONDS = 20
# So many micro-batches are unrolled in the step that compiling it takes longer than that.
UNROLLED = {"optim__accumulation": 64, "data__batch_rows": 128}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("preemption")


@pytest.fixture(scope="module")
def uninterrupted(place, start):
    assert start(place / "straight").end().code == 0
    return place / "straight"


@pytest.fixture(scope="module")
def interrupted(place, start):
    """A run that SIGTERM has ended in one of its first steps."""
    command = start(place / "run").until(lambda c: len(c.steps()) >= 4)
    return place / "run", command.terminate().end()


@pytest.fixture(scope="module")
def cut_while_compiling(place, interrupted, start):
    """That run, gone on with, and ended while it had compiled for long."""
    run = place / "again"
    shutil.copytree(interrupted[0], run)
    (saved,) = published(run)
    before = (run / "journal.jsonl").read_text().count('"event"')
    command = start(run, "--resume", "auto", **UNROLLED).until(begun("compile", saved + 1, before))
    (began,) = [e.time for e in command.events()[before:] if e.phase == "compile"]
    command.until(lambda c: time.time() - began >= LONG_COMPILE_SECONDS)
    assert begun("compile", saved + 1, before)(command), "the step must compile for longer"
    return run, command.terminate().end()


def test_in_a_step_it_is_finished_and_saved(interrupted):
    run, ended = interrupted
    (saved,) = published(run)
    assert ended.code == 75
    assert journal_values(run)[-1]["step"] == saved < 40
    assert f"SIGTERM: finishing step {saved}, then saving; a second SIGTERM exits at once." in ended.output
    assert f"Step {saved} is saved. Exiting with 75: resume=auto goes on from there." in ended.output
    began, finished = times(run, "preempt", saved)
    assert began < times(run, "save", saved)[0] < times(run, "commit", saved)[1] <= finished


def test_while_compiling_it_exits_at_once_and_the_restored_step_is_the_newest(
    interrupted, cut_while_compiling
):
    run, ended = cut_while_compiling
    assert ended.code == 75
    assert ended.seconds < AT_ONCE_SECONDS
    assert published(run) == published(interrupted[0])
    assert journal_values(run) == journal_values(interrupted[0])
    assert "SIGTERM: nothing to save, no step has been done since the start; exiting with 75." in ended.output
    began, finished = times(run, "preempt", published(run)[-1])
    assert finished - began < AT_ONCE_SECONDS


def test_twice_preempted_is_uninterrupted_bit_for_bit(cut_while_compiling, uninterrupted, settings, start):
    run, _ = cut_while_compiling
    assert start(run, "--resume=auto").end().code == 0
    assert journal_values(run) == journal_values(uninterrupted)
    recipe = load_recipe(ROOT / "recipes" / "tiny_gsm8k.py")
    plan = plan_recipe(apply_overrides(recipe, [f"{name}={value}" for name, value in settings.items()]))
    assert_same_state(plan, run / "checkpoints" / "40", uninterrupted / "checkpoints" / "40")


def test_while_loading_it_exits_at_once_and_leaves_nothing(tmp_path, start):
    """The records are a pipe: the command waits for them as long as nobody writes."""
    pipe = tmp_path / "records.jsonl"
    os.mkfifo(pipe)
    writers = []

    def is_read(command):
        try:
            writers.append(os.open(pipe, os.O_WRONLY | os.O_NONBLOCK))
        except OSError:  # nobody reads yet
            return False
        return True

    ended = start(tmp_path / "run", data__path=pipe).until(is_read).terminate().end()
    os.close(writers[0])
    assert ended.code == 75
    assert ended.seconds < AT_ONCE_SECONDS
    assert "SIGTERM: nothing to save" in ended.output
    assert not (tmp_path / "run").exists()


EVALUATION = {
    "eval__problems": 200,
    "eval__path": "builtin:word_problems",
    "eval__every_steps": 2,
    "eval__max_new_tokens": 64,
    "eval__batch_rows": 20,
}


@pytest.fixture(scope="module")
def ended_in_evaluation(place, start):
    run = place / "scored"
    command = start(run, **EVALUATION).until(begun("eval", 2))
    return run, command.terminate().end()


def test_an_evaluation_is_finished_and_its_step_saved_with_the_score(ended_in_evaluation):
    run, ended = ended_in_evaluation
    assert ended.code == 75
    assert published(run) == [2]
    doing = "finishing the evaluation of step 2, then saving"
    assert f"SIGTERM: {doing}; a second SIGTERM exits at once." in ended.output
    assert times(run, "eval", 2)[0] < times(run, "preempt", 2)[0] < times(run, "eval", 2)[1]
    metrics = read_manifest(run / "checkpoints" / "2").metrics
    assert set(metrics) == {"exact_match", "loss"} and metrics["loss"] == journal_values(run)[1]["loss"]


def test_a_second_one_exits_at_once(ended_in_evaluation, start, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(ended_in_evaluation[0], run)
    before = (run / "journal.jsonl").read_text().count('"event"')
    command = start(run, "--resume", "auto", **EVALUATION).until(begun("eval", 4, before))
    command.terminate().until(begun("preempt", 4, before))
    ended = command.terminate().end()
    assert ended.code == 143
    assert ended.seconds < AT_ONCE_SECONDS
    assert published(run) == [2]
    assert begun("eval", 4, before)(command), "the evaluation was not waited for"


# The state is 3 x 123 MB, which is on its way to the disk for a while.
LARGE = {
    "model__config__vocab_size": 120_000,
    "data__batch_rows": 2,
    "data__seq_len": 64,
    "save__every_steps": 2,
    "save__keep_last": 9,
}


def test_a_save_under_way_is_finished_and_the_step_after_it_saved(tmp_path, start):
    run = tmp_path / "run"
    command = start(run, **LARGE).until(begun("write", 2))
    # The write is announced just before step 3 is begun, and a signal between the two would rightly end the
    # run at step 2. The write takes over a second.
    time.sleep(0.3)
    ended = command.terminate().end()
    assert ended.code == 75
    steps = published(run)
    assert len(steps) == 2 and steps[0] == 2 and steps[1] in (3, 4)
    assert times(run, "write", 2)[0] < times(run, "preempt", steps[1])[0] < times(run, "write", 2)[1]
    assert journal_values(run)[-1]["step"] == steps[1]
