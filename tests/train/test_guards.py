"""Steps whose numbers are wrong: skipped or the end of the run, counted, and the same after a restart."""

import io
import json
import math
import shutil
from collections import Counter
from dataclasses import replace
from statistics import median

import pytest
from rich.console import Console

from tests.spoiled import enormous, not_a_number, spoil
from tests.train.steps import assert_same_state, journal_values, published
from tptrain.ckpt.reading import StepReader
from tptrain.ckpt.steps import with_metrics
from tptrain.config import ExportSection, GuardsSection, OptimSection, SaveSection, ScheduleSection
from tptrain.config.planning import plan_recipe
from tptrain.train.guards import GUARDS, GuardError, Guards, NonFiniteError, SpikeError
from tptrain.train.journal import read_events, read_journal
from tptrain.train.run import train

NO_EXPORT = ExportSection(enabled=False)
SKIPS = GuardsSection(non_finite="skip", spike_factor=4, window=3)
FINITE = {"finite": 1.0, "spike": 0.0, "loss": 2.0}


@pytest.fixture
def run(recipe):
    """Trains twelve steps with a checkpoint after each third, with changes; returns what it prints."""

    def go(**changes):
        console = Console(file=io.StringIO(), width=400)
        settings = {
            "export": NO_EXPORT,
            "guards": SKIPS,
            "save": SaveSection(every_steps=3, keep_last=9),
            "schedule": ScheduleSection(max_steps=12),
        }
        train(plan_recipe(recipe(**{**settings, **changes})), console)
        return console.file.getvalue()

    return go


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "run"


@pytest.fixture
def guards(recipe):
    def make(saved=None, **settings):
        return Guards(plan_recipe(recipe(guards=GuardsSection(**settings))), saved)

    return make


def norms_after(guards, norms, first=1):
    for step, norm in enumerate(norms, start=first):
        guards.judge(step, {**FINITE, "finite": float(math.isfinite(norm)), "grad_norm": norm})
    return guards


def reasons(folder):
    return {r.step: r.skipped for r in read_journal(folder / "journal.jsonl") if r.skipped}


def stops(folder):
    return [(e.step, e.reason) for e in read_events(folder / "journal.jsonl") if e.phase == "stop"]


# The limit, by hand.


def test_the_limit_knows_norms_up_to_the_step_before_the_last(guards):
    known = norms_after(guards(spike_factor=2, window=3), [5.0, 1.0, 3.0, 8.0])
    assert [known.norm_limit(step) for step in (3, 4, 5, 6)] == [math.inf, math.inf, 6.0, 6.0]
    assert norms_after(known, [2.0], 5).norm_limit(6) == 6.0, "that of step 5 does not count yet"
    assert known.norm_limit(7) == 2 * 3.0, "the median of 3, 8 and 2"
    late = norms_after(guards(spike_factor=2, window=3), [5.0, 1.0, 3.0, 8.0])
    assert late.norm_limit(6) == 6.0, "read one step late: the norm of step 5 is not there yet"


def test_only_finite_norms_are_compared_with(guards):
    known = norms_after(
        guards(spike_factor=3, window=3, non_finite="skip"), [1.0, math.nan, 2.0, math.inf, 4.0, 9.0]
    )
    assert known.norm_limit(6) == math.inf and known.norm_limit(7) == 6.0


def test_without_a_factor_and_of_zeros_nothing_is_a_spike(guards):
    assert norms_after(guards(window=3), [1.0] * 9).norm_limit(10) == math.inf
    assert norms_after(guards(window=3, spike_factor=2), [0.0] * 9).norm_limit(10) == math.inf


def test_what_is_saved_goes_on_alike(guards):
    norms = [float(n * n % 7 + 1) for n in range(1, 30)]
    for cut in (1, 2, 3, 4, 17):
        settings = {"spike_factor": 2.5, "window": 4}
        whole = norms_after(guards(**settings), norms[:cut])
        again = guards(json.loads(json.dumps(whole.saved())), **settings)
        for step in range(cut + 1, 29):
            assert again.norm_limit(step) == whole.norm_limit(step)
            for each in (whole, again):
                each.judge(step, {**FINITE, "grad_norm": norms[step - 1]})
        assert again.saved() == whole.saved()


def test_a_long_run_keeps_a_window_of_norms(guards):
    known = norms_after(guards(spike_factor=2, window=5), [1.0] * 100)
    assert [step for step, _ in known.saved()["norms"]] == [95, 96, 97, 98, 99, 100]


# Whole runs.


def test_without_guards_nothing_is_skipped(run, folder):
    run()
    assert reasons(folder) == {}
    run(output_dir=str(folder.parent / "off"), guards=GuardsSection())
    assert journal_values(folder.parent / "off") == journal_values(folder)


def test_skipped_steps_use_their_records_up_and_change_nothing(run, recipe, folder, monkeypatch):
    spoil(monkeypatch, {5: not_a_number, 9: enormous})
    out = run(save=SaveSection(every_steps=1, keep_last=12))
    assert reasons(folder) == {5: "non_finite", 9: "spike"}
    records = read_journal(folder / "journal.jsonl")
    assert [r.cursor for r in records] == [4 * step for step in range(1, 13)]
    assert math.isnan(records[4].loss) and records[8].grad_norm > 4 * median(
        r.grad_norm for r in records[4:7]
    )
    raw = [json.loads(line) for line in (folder / "journal.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in raw if line.get("step") == 5 and "loss" in line] == [None]
    plan = plan_recipe(recipe(output_dir="elsewhere"))
    for step in (5, 9):
        before, after = (folder / "checkpoints" / str(n) for n in (step - 1, step))
        assert_same_state(plan, before, after)
        assert StepReader(after).run["cursor"] == 4 * step
    with pytest.raises(AssertionError):
        assert_same_state(plan, folder / "checkpoints" / "9", folder / "checkpoints" / "10")
    assert StepReader(folder / "checkpoints" / "12").run[GUARDS]["skipped"] == {"non_finite": 1, "spike": 1}
    assert "Step 5 is skipped (non_finite): loss nan" in out and "Step 9 is skipped (spike)" in out
    assert "Skipped:    2 steps (1 non_finite, 1 spike)" in out


def test_the_steps_around_a_skipped_one_are_those_of_its_absence(run, folder, monkeypatch):
    """Until it the runs are equal; what follows starts from other weights, on the same rows."""
    spoil(monkeypatch, {5: not_a_number})
    run()
    skipping = read_journal(folder / "journal.jsonl")
    monkeypatch.undo()
    straight = folder.parent / "straight"
    run(output_dir=str(straight))
    other = read_journal(straight / "journal.jsonl")
    assert [r.loss for r in skipping[:4]] == [r.loss for r in other[:4]]
    assert skipping[5].loss != other[5].loss and skipping[5].rows_digest == other[5].rows_digest


@pytest.mark.parametrize("late", [False, True], ids=["read at once", "read one step late"])
def test_resumed_is_uninterrupted_and_both_ways_of_reading_are_one(
    run, recipe, folder, tmp_path, monkeypatch, late
):
    """Spoiled steps before and after the checkpoint of step 6, whose window of norms reaches across it."""
    spoil(monkeypatch, {5: enormous, 7: enormous, 8: not_a_number, 11: enormous})
    run()
    assert reasons(folder) == {5: "spike", 7: "spike", 8: "non_finite", 11: "spike"}
    if late:
        from tptrain.train import run as module

        made = module.make_backend

        def one_late(plan):
            backend = made(plan)
            backend.works_beside_host = True
            return backend

        monkeypatch.setattr(module, "make_backend", one_late)
        run(output_dir=str(tmp_path / "late"))
        assert journal_values(tmp_path / "late") == journal_values(folder)
    again = tmp_path / "again"
    shutil.copytree(folder, again)
    for step in (9, 12):
        shutil.rmtree(again / "checkpoints" / str(step))
    run(output_dir=str(again), resume="auto")
    assert journal_values(again) == journal_values(folder)
    plan = plan_recipe(recipe(output_dir="elsewhere"))
    for step in (9, 12):
        one, other = (each / "checkpoints" / str(step) for each in (folder, again))
        assert_same_state(plan, one, other)
        assert StepReader(one).run[GUARDS] == StepReader(other).run[GUARDS]


@pytest.mark.parametrize(
    ("spoiled", "section", "error", "words"),
    [
        (
            not_a_number,
            GuardsSection(),
            NonFiniteError,
            "step 7: the loss is nan, so its update was not applied",
        ),
        (
            enormous,
            replace(SKIPS, spike="stop"),
            SpikeError,
            r"step 7: the gradient norm is .*, above guards\.spike_factor=4 times .*, the median of 3 norms",
        ),
    ],
)
def test_a_guard_that_stops_leaves_the_last_checkpoint_and_no_export(
    run, folder, monkeypatch, spoiled, section, error, words
):
    spoil(monkeypatch, {7: spoiled})
    with pytest.raises(error, match=words):
        run(guards=section, export=ExportSection())
    assert published(folder) == [3, 6]
    assert [r.step for r in read_journal(folder / "journal.jsonl")] == list(range(1, 7))
    assert stops(folder) == [(7, error.reason)]
    assert not (folder / "export").exists()


@pytest.mark.parametrize(
    ("steps", "section", "stopped", "words"),
    [
        ((4, 5, 6, 8), replace(SKIPS, max_in_a_row=2), 6, "3 steps were skipped one after the other"),
        ((4, 6, 8, 10), replace(SKIPS, max_in_a_row=1, max_skipped=3), 10, "4 steps were skipped in all"),
    ],
)
def test_too_many_skipped_steps_stop_the_run(run, folder, monkeypatch, steps, section, stopped, words):
    spoil(monkeypatch, dict.fromkeys(steps, not_a_number))
    text = f"step {stopped}: {words}.*guards.max_.*last checkpoint is untouched"
    with pytest.raises(GuardError, match=text):
        run(guards=section)
    assert [r.step for r in read_journal(folder / "journal.jsonl")] == list(range(1, stopped + 1))
    assert max(published(folder)) < stopped
    assert stops(folder) == [(stopped, "too_many_skipped")]


def test_the_counts_go_on_with_the_run(run, folder, monkeypatch):
    """Three steps in a row, of which a restart lies between the second and the third."""
    spoil(monkeypatch, dict.fromkeys((5, 6, 7), not_a_number))
    some = {"guards": replace(SKIPS, max_in_a_row=2)}
    run(schedule=ScheduleSection(max_steps=6), **some)
    with pytest.raises(GuardError, match="step 7: 3 steps were skipped one after the other"):
        run(resume="auto", **some)


def test_weights_that_blow_up_stop_the_run_also_where_steps_are_skipped(run, folder):
    """After an update of 1e30 every loss is NaN: skipping cannot mend that, so it must not go on for ever."""
    with pytest.raises(GuardError, match="6 steps were skipped one after the other"):
        run(optim=OptimSection(learning_rate=1e30, clip_norm=0))
    counts = Counter(reasons(folder).values())
    assert counts["non_finite"] == 6


def test_a_checkpoint_of_a_skipped_step_has_the_loss_of_the_one_before(run, folder, records, monkeypatch):
    from tptrain.config import EvalSection

    section = EvalSection(loss_path=str(records), loss_records=9, every_steps=3)
    spoil(monkeypatch, {6: not_a_number})
    run(eval=section, schedule=ScheduleSection(max_steps=6))
    losses = [r.loss for r in read_journal(folder / "journal.jsonl")]
    assert with_metrics(folder / "checkpoints")[-1].metrics["loss"] == losses[4]
