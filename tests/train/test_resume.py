"""Runs that go on: bit-equal to uninterrupted ones, with other settings, from older and damaged steps."""

import json
import shutil
from dataclasses import replace

import pytest

from tests.small_run import write_pretrained, write_records
from tests.train.steps import assert_same_state, damage, journal_steps, journal_values, published
from tptrain.ckpt.digests import MANIFEST
from tptrain.ckpt.reading import StepReader
from tptrain.config import (
    ExportSection,
    ModelSection,
    OptimSection,
    PrecisionSection,
    SaveSection,
    ScheduleSection,
)
from tptrain.config.planning import plan_recipe
from tptrain.errors import ProblemsError
from tptrain.train.journal import read_events, read_journal
from tptrain.train.run import train

NO_EXPORT = ExportSection(enabled=False)
SAMPLES = 38  # records that the recipe trains on


@pytest.fixture
def run(recipe, tmp_path):
    """Trains the recipe with changes, in RUN by default; returns the result."""

    def go(**changes):
        return train(plan_recipe(recipe(**{"export": NO_EXPORT, **changes})))

    return go


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "run"


def forget(folder, step):
    """Make it as if the run had ended before this step was saved."""
    shutil.rmtree(folder / "checkpoints" / str(step))


def test_resumed_is_uninterrupted_bit_for_bit(run, recipe, folder, tmp_path):
    settings = {"save": SaveSection(every_steps=3, keep_last=3), "schedule": ScheduleSection(max_steps=7)}
    run(**settings)
    again = tmp_path / "again"
    shutil.copytree(folder, again)
    for step in (6, 7):
        forget(again, step)
    run(output_dir=str(again), resume="auto", **settings)
    assert journal_values(again) == journal_values(folder)
    assert len({line["rows_digest"] for line in journal_values(again)}) == 7
    plan = plan_recipe(recipe(output_dir="elsewhere"))
    for step in (6, 7):
        assert_same_state(plan, folder / "checkpoints" / str(step), again / "checkpoints" / str(step))
        assert StepReader(again / "checkpoints" / str(step)).run["cursor"] == 4 * step


def test_events_of_lost_steps_are_cut_and_those_of_the_new_process_stay(run, folder):
    run()
    forget(folder, 4)
    run(resume="auto")
    events = read_events(folder / "journal.jsonl")
    starts = [i for i, e in enumerate(events) if (e.event, e.phase) == ("begin", "start")]
    assert len(starts) == 2
    assert {e.step for e in events[: starts[1]]} == {0, 1, 2}
    phases = [(e.event, e.phase, e.step) for e in events[starts[1] :]]
    restoring = [
        ("begin", "start", 0), ("begin", "restore", 0), ("end", "restore", 2), ("end", "start", 2),
        ("begin", "compile", 3), ("end", "compile", 3), ("begin", "save", 4), ("end", "save", 4),
        ("begin", "write", 4), ("end", "write", 4), ("begin", "commit", 4), ("end", "commit", 4),
    ]  # fmt: skip
    assert phases == restoring
    assert [e.time for e in events] == sorted(e.time for e in events)


REFUSED = {
    "other weights": (
        lambda tmp, made: made(model=ModelSection(pretrained=str(write_pretrained(tmp / "other")))),
        ("model.pretrained", "other", "saved with", "pretrained"),
    ),
    "another size": (
        lambda tmp, made: made(
            model=ModelSection(pretrained=str(write_pretrained(tmp / "wide", intermediate_size=128)))
        ),
        ("model.config.intermediate_size", "128", "saved with 112", "112"),
    ),
    "the seed": (lambda tmp, made: made(seed=3), ("seed", "3", "saved with 0", "0")),
    "the formats": (
        lambda tmp, made: made(precision=PrecisionSection(compute="bfloat16")),
        ("precision.compute", "bfloat16", "saved with float32", "float32"),
    ),
    "a run that is over": (
        lambda tmp, made: made(schedule=ScheduleSection(max_steps=3)),
        ("schedule.max_steps", "3", "step 4 is saved, the run would end at 3", "at least 4 steps"),
    ),
    "a step that is not there": (lambda tmp, made: made(resume="3"), ("resume", "3", "2, 4", "auto")),
    "resume=never": (
        lambda tmp, made: made(resume="never"),
        ("output_dir", "run", "it holds a run, newest step 4", "resume=auto"),
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_and_nothing_is_changed(case, run, recipe, folder, tmp_path):
    run()
    make, expected = REFUSED[case]
    asked = make(tmp_path, lambda **changes: recipe(**{"resume": "auto", "export": NO_EXPORT, **changes}))
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(ProblemsError) as refused:
        train(plan_recipe(asked))
    found = {problem.setting: problem for problem in refused.value.problems}
    problem = found[expected[0]]
    assert expected[1] in str(problem.value) and expected[2] in problem.other and expected[3] in problem.fix
    assert problem.rule
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_what_may_change_is_told_line_by_line(run, recipe, folder, capsys):
    run()
    data = replace(recipe().data, batch_rows=6)
    optim = OptimSection(learning_rate=1e-3, weight_decay=0.1, accumulation=2)
    longer = ScheduleSection(max_steps=6, warmup_steps=3)
    capsys.readouterr()
    run(resume="auto", data=data, optim=optim, schedule=longer, save=SaveSection(every_steps=5))
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Changed: ")]
    assert told == [
        "Changed: data.batch_rows: 4 -> 6.",
        "Changed: optim.learning_rate: 0.002 -> 0.001.",
        "Changed: optim.accumulation: 1 -> 2.",
        "Changed: schedule.max_steps: 4 -> 6.",
        "Changed: schedule.warmup_steps: 0 -> 3.",
    ]
    assert [r.cursor for r in read_journal(folder / "journal.jsonl")] == [4, 8, 12, 16, 22, 28]
    assert published(folder) == [5, 6]


def real_tokens(folder):
    return sum(record.real_tokens for record in read_journal(folder / "journal.jsonl"))


@pytest.mark.parametrize("batch_rows", [5, 4, 30])
def test_epochs_are_used_up_exactly_whatever_the_batches(run, recipe, folder, tmp_path, batch_rows):
    """16 samples in batches of 4, the other 22 in other batches: each record counts once."""
    whole = ScheduleSection(epochs=1)
    run(output_dir=str(tmp_path / "whole"), schedule=whole, save=SaveSection(every_steps=0))
    run()
    data = replace(recipe().data, batch_rows=batch_rows)
    result = run(resume="auto", schedule=whole, data=data)
    records = read_journal(folder / "journal.jsonl")
    assert records[-1].cursor == SAMPLES
    assert len(records) == 4 + -(-22 // batch_rows)
    assert real_tokens(folder) == real_tokens(tmp_path / "whole")
    assert StepReader(result.checkpoint).run["cursor"] == SAMPLES


def test_a_finished_run_goes_on_with_the_sample_after_its_last(run, folder):
    """The last step of an epoch is filled up with empty rows, which are no samples."""
    run(schedule=ScheduleSection(epochs=1), save=SaveSection(every_steps=0))
    once = real_tokens(folder)
    run(schedule=ScheduleSection(epochs=2), resume="auto", save=SaveSection(every_steps=0))
    assert real_tokens(folder) == 2 * once
    assert read_journal(folder / "journal.jsonl")[-1].cursor == 2 * SAMPLES


def test_fewer_epochs_than_were_trained_are_refused(run):
    run(schedule=ScheduleSection(epochs=2), save=SaveSection(every_steps=0))
    with pytest.raises(ProblemsError, match=r"schedule\.epochs=1\.0: .*after 76 samples.*end at 38"):
        run(schedule=ScheduleSection(epochs=1), resume="auto", save=SaveSection(every_steps=0))


def test_a_moved_file_is_the_same_data(run, recipe, records, folder, tmp_path, capsys):
    moved = tmp_path / "moved.jsonl"
    lines = records.read_text().splitlines()
    # The records that are not used do not matter, nor does a column that nothing reads.
    moved.write_text("\n".join(json.dumps({**json.loads(line), "id": 7}) for line in lines[:50]))
    run()
    run(resume="auto", data=replace(recipe().data, path=str(moved)), schedule=ScheduleSection(max_steps=6))
    assert "(the same records)" in capsys.readouterr().out
    assert [r.cursor for r in read_journal(folder / "journal.jsonl")] == [4, 8, 12, 16, 20, 24]


@pytest.mark.parametrize("change", ["other records in the file", "fewer records", "another seed"])
def test_other_samples_are_taken_from_the_beginning(run, recipe, folder, tmp_path, capsys, change):
    data = replace(recipe().data, path=str(write_records(tmp_path / "mine.jsonl", 60)))
    run(data=data)
    if change == "other records in the file":
        lines = (tmp_path / "mine.jsonl").read_text().splitlines()
        (tmp_path / "mine.jsonl").write_text("\n".join(reversed(lines)))
    data = {
        "other records in the file": data,
        "fewer records": replace(data, max_records=21),
        "another seed": replace(data, seed=5),
    }[change]
    capsys.readouterr()
    run(resume="auto", data=data, schedule=ScheduleSection(max_steps=6))
    (told,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Changed: data: ")]
    assert "taking them from the beginning" in told
    assert ("the order of the records differs" in told) == (change == "another seed")
    records = read_journal(folder / "journal.jsonl")
    assert [r.cursor for r in records] == [4, 8, 12, 16, 4, 8]
    run(output_dir=str(tmp_path / "fresh"), data=data, schedule=ScheduleSection(max_steps=2))
    fresh = read_journal(tmp_path / "fresh" / "journal.jsonl")
    assert [r.rows_digest for r in records[4:]] == [r.rows_digest for r in fresh]


def test_an_older_step_sets_the_newer_ones_aside(run, recipe, folder, tmp_path, capsys):
    settings = {"save": SaveSection(every_steps=2, keep_last=4), "schedule": ScheduleSection(max_steps=8)}
    run(**settings)
    shutil.copytree(folder, tmp_path / "straight")
    capsys.readouterr()
    run(resume="2", **settings)
    out = capsys.readouterr().out
    for step in (4, 6, 8):
        assert f"Step {step} is set aside as {step}.superseded-1." in out
        assert (folder / "checkpoints" / f"{step}.superseded-1" / MANIFEST).is_file()
    assert "Going on after step 2 with sample 8." in out
    assert published(folder) == [2, 4, 6, 8]
    assert journal_values(folder) == journal_values(tmp_path / "straight")
    plan = plan_recipe(recipe(output_dir="elsewhere"))
    assert_same_state(plan, folder / "checkpoints" / "8", tmp_path / "straight" / "checkpoints" / "8")


def test_a_damaged_step_costs_its_steps_and_no_more(run, recipe, folder, tmp_path, capsys):
    settings = {"save": SaveSection(every_steps=2, keep_last=4), "schedule": ScheduleSection(max_steps=5)}
    run(**settings)
    shutil.copytree(folder, tmp_path / "straight")
    bad = [damage(folder / "checkpoints" / str(step)) for step in (4, 5)]
    capsys.readouterr()
    run(resume="auto", **settings)
    out = capsys.readouterr().out
    assert f"Step 5 is damaged: {bad[1]}" in out and f"Step 4 is damaged: {bad[0]}" in out
    assert "Length: 5 steps, 3 of them from here on, 12 rows." in out
    assert "Going on after step 2 with sample 8." in out
    assert {p.name for p in (folder / "checkpoints").iterdir()} == {
        "2",
        "4",
        "4.damaged-1",
        "5",
        "5.damaged-1",
    }
    assert journal_values(folder) == journal_values(tmp_path / "straight")


def test_a_step_without_manifest_needs_unverified(run, folder, capsys):
    run()
    (folder / "checkpoints" / "4" / MANIFEST).unlink()
    with pytest.raises(
        ProblemsError, match=r"resume=4: must be a step with a digest manifest .*--unverified"
    ):
        run(resume="4")
    longer = {"schedule": ScheduleSection(max_steps=6)}
    run(resume="4", unverified=True, **longer)
    assert "Going on after step 4 with sample 16." in capsys.readouterr().out
    assert journal_steps(folder) == [1, 2, 3, 4, 5, 6]


def test_a_run_whose_only_step_was_not_published_starts_anew(run, folder, tmp_path, capsys):
    run(save=SaveSection(every_steps=0))
    shutil.copytree(folder, tmp_path / "straight")
    (folder / "checkpoints" / "4" / MANIFEST).unlink()
    run(save=SaveSection(every_steps=0), resume="auto")
    out = capsys.readouterr().out
    assert "without a digest manifest, so not gone on from: step 4" in out
    assert "Going on" not in out
    assert (folder / "checkpoints" / "4.unpublished-1").is_dir()
    assert journal_values(folder) == journal_values(tmp_path / "straight")


def test_the_pretrained_weights_may_be_gone(run, recipe, pretrained, folder, tmp_path):
    mine = tmp_path / "model"
    shutil.copytree(pretrained, mine)
    model = ModelSection(pretrained=str(mine))
    run(model=model)
    shutil.copytree(folder, tmp_path / "straight")
    forget(folder, 4)
    shutil.rmtree(mine)
    run(model=model, resume="auto")
    assert journal_values(folder) == journal_values(tmp_path / "straight")
    plan = plan_recipe(recipe(output_dir="elsewhere"))
    assert_same_state(plan, folder / "checkpoints" / "4", tmp_path / "straight" / "checkpoints" / "4")
    with pytest.raises(ProblemsError, match=r"model\.pretrained=.*must exist"):
        run(model=model, output_dir=str(tmp_path / "new"))


def test_without_its_assets_a_run_does_not_go_on(run, folder):
    run()
    shutil.rmtree(folder / "assets")
    with pytest.raises(ProblemsError, match=r"output_dir=.*run: must hold the assets of the run"):
        run(resume="auto")


def test_a_trained_tokenizer_is_read_back(run, recipe, pretrained, folder, tmp_path, capsys):
    """Other records would train another tokenizer, and the weights know only the run's own."""
    config = json.loads((pretrained / "config.json").read_text())
    model = ModelSection(config={**config, "vocab_size": 700}, tokenizer="train")
    run(model=model)
    kept = (folder / "assets" / "tokenizer.json").read_bytes()
    data = replace(recipe().data, path=str(write_records(tmp_path / "more.jsonl", 200)), max_records=200)
    run(model=model, data=data, resume="auto", schedule=ScheduleSection(max_steps=5))
    assert (folder / "assets" / "tokenizer.json").read_bytes() == kept
    run(model=model, data=data, output_dir=str(tmp_path / "new"))
    assert (tmp_path / "new" / "assets" / "tokenizer.json").read_bytes() != kept


def test_going_on_from_the_newest_step_by_its_number(run, folder):
    run()
    run(resume="4", schedule=ScheduleSection(max_steps=6))
    assert journal_steps(folder) == [1, 2, 3, 4, 5, 6]


def test_assets_of_a_run_that_saved_nothing_are_made_anew(run, folder):
    stale = folder / "assets"
    stale.mkdir(parents=True)
    (stale / "config.json").write_text("{}")
    run(resume="auto")
    assert json.loads((stale / "config.json").read_text())["model_type"] == "llama"


def test_a_journal_cut_short_by_a_kill_is_mended(run, folder):
    run()
    forget(folder, 4)
    path = folder / "journal.jsonl"
    path.write_bytes(path.read_bytes()[:-30])
    run(resume="auto")
    assert journal_steps(folder) == [1, 2, 3, 4]
    assert read_events(path)[-1].phase == "commit"
