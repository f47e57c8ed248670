"""Held-out loss in whole runs: its numbers, the best checkpoint, the early stop, what an export requires."""

import io
import math
import shutil

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.train.steps import assert_same_state, journal_values, published
from tptrain.ckpt.reading import StepReader
from tptrain.ckpt.steps import find_step, with_metrics
from tptrain.cli import run_recipe
from tptrain.config import (
    DataSection,
    EvalSection,
    ExportSection,
    GuardsSection,
    LogSection,
    LoraSection,
    SaveSection,
    ScheduleSection,
)
from tptrain.config.planning import plan_recipe
from tptrain.data.dataset import tokenize_records
from tptrain.data.sources import open_records
from tptrain.data.split import split_records
from tptrain.errors import ProblemsError
from tptrain.eval.held_out import HeldOutScore
from tptrain.train import scoring
from tptrain.train.exporting import RequirementError
from tptrain.train.journal import read_events, read_journal
from tptrain.train.run import train

NO_EXPORT = ExportSection(enabled=False)


@pytest.fixture
def run(recipe):
    """Trains with changes; returns the result and what the console shows."""

    def go(**changes):
        console = Console(file=io.StringIO(), width=400)
        result = train(plan_recipe(recipe(**{"export": NO_EXPORT, **changes})), console)
        return result, console.file.getvalue()

    return go


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "run"


@pytest.fixture
def made_up(monkeypatch):
    """Have the held-out losses of steps be these; everything else is the run's own."""

    def make(losses):
        at = [0]
        score = scoring.Scoring.__call__

        def scored(self, state, step, when):
            at[0] = step
            return score(self, state, step, when)

        monkeypatch.setattr(scoring.Scoring, "__call__", scored)
        monkeypatch.setattr(
            scoring.HeldOut, "__call__", lambda self, params: HeldOutScore(losses[at[0]], 0.5, 10)
        )

    return make


def held_out(records, every_steps=0, **more):
    return EvalSection(loss_path=str(records), loss_records=21, every_steps=every_steps, **more)


def evaluations(folder):
    events = [e for e in read_events(folder / "journal.jsonl") if e.phase == "eval" and e.event == "end"]
    return [(e.step, dict(e.metrics)) for e in events]


def transformers_scores(export, rows):
    """Loss over all counted tokens, and their accuracy, row by row without padding."""
    model, loss, right, counted = AutoModelForCausalLM.from_pretrained(export), 0.0, 0, 0
    for index in range(len(rows)):
        ids, mask = (torch.from_numpy(array.copy()).long() for array in rows.row(index))
        labels = torch.where(mask > 0, ids, -100)[None]
        with torch.no_grad():
            outputs = model(input_ids=ids[None], labels=labels)
        count = int((labels[:, 1:] != -100).sum())
        loss += outputs.loss.item() * count
        likeliest = outputs.logits[0, :-1].argmax(-1)
        right += int((likeliest == labels[0, 1:]).sum())
        counted += count
    return loss / counted, right / counted


@pytest.mark.parametrize("batch_rows", [4, 7])
def test_the_held_out_loss_is_transformers_loss_of_the_export(run, recipe, records, folder, batch_rows):
    data = DataSection(
        path=str(records), preset="gsm8k", seq_len=128, batch_rows=batch_rows, max_records=200, validation=0.2
    )
    result, out = run(
        data=data, export=ExportSection(dtype="float32"), schedule=ScheduleSection(max_steps=12)
    )
    tokenizer = AutoTokenizer.from_pretrained(result.export_dir)
    training, held = map(list, split_records(open_records(str(records), None, "train", 200), data))
    rows, _ = tokenize_records(held, tokenizer, data)
    assert len(training) + len(rows) == 200 and len(rows) % batch_rows
    loss, accuracy = transformers_scores(result.export_dir, rows)
    assert result.after.metrics["held_out_loss"] == pytest.approx(loss, rel=1e-5)
    assert result.after.metrics["token_accuracy"] == pytest.approx(accuracy, abs=1e-12) and accuracy > 0.1
    assert result.before.metrics["held_out_loss"] > 1.2 * loss, "twelve steps have taught it something"
    assert evaluations(folder) == [(0, result.before.metrics), (12, result.after.metrics)]
    assert with_metrics(folder / "checkpoints")[-1].metrics == {
        **result.after.metrics,
        "loss": read_journal(folder / "journal.jsonl")[-1].loss,
    }
    assert f"Held out: {len(rows)} records: {len(rows)} kept" in out
    assert f"Held-out loss after training: {loss:.4f}" in out
    assert "held-out loss" in out and "before training" in out


def test_of_adapters_it_is_that_of_the_merged_export(run, records, folder):
    """Also after a restart, which reads the model's weights and the adapters from where they lie."""
    some = {
        "lora": LoraSection(rank=4),
        "eval": held_out(records),
        "guards": GuardsSection(non_finite="skip", spike_factor=9, window=3),
    }
    run(**some)
    shutil.rmtree(folder / "checkpoints" / "4")
    result, _ = run(resume="auto", export=ExportSection(dtype="float32"), **some)
    tokenizer = AutoTokenizer.from_pretrained(result.export_dir)
    data = DataSection(path=str(records), preset="gsm8k", seq_len=112)
    rows, _ = tokenize_records(open_records(str(records), None, "train", 21), tokenizer, data)
    loss, accuracy = transformers_scores(result.export_dir, rows)
    assert result.after.metrics["held_out_loss"] == pytest.approx(loss, rel=1e-5)
    assert result.after.metrics["token_accuracy"] == pytest.approx(accuracy, abs=1e-12)
    assert result.before.metrics["held_out_loss"] > 1.0001 * loss


def test_records_set_apart_are_not_trained_on_and_may_be_asked(run, recipe, records, folder):
    data = DataSection(
        path=str(records), preset="gsm8k", seq_len=112, batch_rows=4, max_records=60, validation=0.3
    )
    section = EvalSection(problems=5, max_new_tokens=4, batch_rows=5)
    result, _ = run(data=data, eval=section, schedule=ScheduleSection(epochs=1))
    training, held = map(list, split_records(open_records(str(records), None, "train", 60), data))
    asked = [answer.problem.question for answer in result.after.exact.answers]
    assert asked == [record["question"] for record in held[:5]]
    assert read_journal(folder / "journal.jsonl")[-1].cursor == len(training)
    assert set(result.after.metrics) == {"exact_match", "held_out_loss", "token_accuracy"}


def test_scoring_changes_nothing_of_the_training(run, records, folder, tmp_path):
    run()
    run(output_dir=str(tmp_path / "scored"), eval=held_out(records, 1))
    assert journal_values(tmp_path / "scored") == journal_values(folder)
    assert [step for step, _ in evaluations(tmp_path / "scored")] == [0, 1, 2, 3, 4]


def test_held_out_records_that_cannot_be_used_are_named_as_such(run, tmp_path, folder):
    (tmp_path / "long.jsonl").write_text('{"question": "' + "How many? " * 200 + '", "answer": "1"}\n')
    with pytest.raises(ProblemsError, match=r"eval\.loss_path=.*long\.jsonl: must leave a record"):
        run(eval=EvalSection(loss_path=str(tmp_path / "long.jsonl")))
    with pytest.raises(ProblemsError, match=r"eval\.loss_path=.*none\.jsonl: must exist"):
        run(eval=EvalSection(loss_path=str(tmp_path / "none.jsonl")))
    assert not folder.exists()


# The best checkpoint.

LOSSES = {0: 3.0, 2: 2.0, 4: 2.5, 6: 2.4, 8: 2.2, 10: 1.0}


def test_the_lowest_loss_is_kept_found_and_exported(run, records, folder, made_up, tmp_path):
    made_up(LOSSES)
    result, out = run(
        eval=held_out(records, 2),
        save=SaveSection(every_steps=2, keep_last=1, keep_best=1),
        schedule=ScheduleSection(max_steps=8),
        export=ExportSection(step="best"),
    )
    assert published(folder) == [2, 8]
    assert find_step(folder, "checkpoint", "best").name == "2"
    assert "Exporting step 2, the best one by held_out_loss." in out
    from tptrain.export import export_step

    by_hand = export_step(folder / "checkpoints" / "2", tmp_path / "by_hand")
    exported, last = result.export_dir / "model.safetensors", tmp_path / "last"
    assert exported.read_bytes() == (by_hand / "model.safetensors").read_bytes()
    export_step(folder / "checkpoints" / "8", last)
    assert exported.read_bytes() != (last / "model.safetensors").read_bytes()


def test_best_metric_says_what_best_means(run, records, folder, made_up):
    made_up(LOSSES)
    save = SaveSection(every_steps=2, keep_last=1, keep_best=1, best_metric="token_accuracy")
    run(eval=held_out(records, 2), save=save, schedule=ScheduleSection(max_steps=6))
    assert find_step(folder, "checkpoint", "best").name == "6", "accuracies are equal: the newest"
    assert StepReader(folder / "checkpoints" / "6").run["best_metric"] == "token_accuracy"


def test_a_score_that_is_not_finite_is_none(run, records, folder, made_up):
    made_up({0: 3.0, 2: 2.0, 4: math.nan})
    run(eval=held_out(records, 2), save=SaveSection(every_steps=2, keep_last=1, keep_best=1))
    assert published(folder) == [2, 4]
    assert "held_out_loss" not in with_metrics(folder / "checkpoints")[-1].metrics
    assert find_step(folder, "checkpoint", "best").name == "2"
    assert math.isnan(evaluations(folder)[-1][1]["held_out_loss"])


# The early stop.


def stopping(records, patience, steps=20):
    return {
        "eval": held_out(records, 2, patience=patience),
        "save": SaveSection(every_steps=4, keep_last=9),
        "schedule": ScheduleSection(max_steps=steps),
    }


LATER = {**LOSSES, 12: 1.5, 14: 1.4, 16: 1.3, 18: 1.2, 20: 0.5}


@pytest.mark.parametrize(("patience", "stopped"), [(1, 4), (3, 8), (4, 18)])
def test_it_stops_after_so_many_evaluations_without_a_better_one(
    run, records, folder, made_up, patience, stopped
):
    made_up(LATER)
    result, out = run(export=ExportSection(), **stopping(records, patience))
    assert [r.step for r in read_journal(folder / "journal.jsonl")] == list(range(1, stopped + 1))
    assert published(folder)[-1] == stopped and result.checkpoint.name == str(stopped)
    assert (result.export_dir / "model.safetensors").is_file()
    (stop,) = [e for e in read_events(folder / "journal.jsonl") if e.phase == "stop"]
    assert (stop.step, stop.reason) == (stopped, "patience")
    best = {4: (2, 2.0), 8: (2, 2.0), 18: (10, 1.0)}[stopped]
    assert f"Stopped early after step {stopped}: held_out_loss got no better in {patience} evaluations" in out
    assert f"the best was {best[1]:.4g} at step {best[0]}" in out


def test_no_better_than_before_training_counts(run, records, folder, made_up):
    made_up({0: 1.0, 2: 2.0, 4: 1.5, 6: 1.2})
    run(**stopping(records, 3))
    assert published(folder)[-1] == 6


def test_without_patience_it_does_not_stop(run, records, folder, made_up):
    made_up({step: 2.0 + step for step in range(0, 9, 2)})
    run(**stopping(records, 0, 8))
    assert published(folder)[-1] == 8
    assert [e for e in read_events(folder / "journal.jsonl") if e.phase == "stop"] == []


@pytest.mark.parametrize("kept", [4, 8, 12])
def test_a_resumed_run_stops_at_the_same_step(run, recipe, records, folder, made_up, tmp_path, kept):
    """The evaluations that count lie on both sides of the step that it goes on from."""
    made_up(LATER)
    run(**stopping(records, 4))
    again = tmp_path / "again"
    shutil.copytree(folder, again)
    for step in published(again):
        if step > kept:
            shutil.rmtree(again / "checkpoints" / str(step))
    result, _ = run(output_dir=str(again), resume="auto", **stopping(records, 4))
    assert result.checkpoint.name == "18" and journal_values(again) == journal_values(folder)
    assert evaluations(again) == evaluations(folder)
    plan = plan_recipe(recipe(output_dir="elsewhere"))
    assert_same_state(plan, folder / "checkpoints" / "18", again / "checkpoints" / "18")
    one, other = (StepReader(each / "checkpoints" / "18").run["evaluation"] for each in (folder, again))
    assert one == other


def test_a_run_that_has_stopped_trains_no_further_but_exports(run, records, folder, made_up):
    """As after a kill between the last save and the export."""
    made_up(LATER)
    run(**stopping(records, 1))
    export = {"export": ExportSection(), "resume": "auto"}
    result, out = run(**export, **stopping(records, 1))
    assert "No step is left: held_out_loss got no better" in out
    assert published(folder)[-1] == 4 and (result.export_dir / "model.safetensors").is_file()
    _, out = run(**export, **stopping(records, 1))
    assert "The run is finished: step 4 is saved and exported." in out
    shutil.rmtree(result.export_dir)
    run(resume="auto", **stopping(records, 3))
    assert published(folder)[-1] == 8, "with more patience it goes on"


# What an export requires.


def test_an_export_that_is_no_better_is_not_written(run, records, folder, made_up):
    made_up({0: 2.0, 4: 2.5})
    export = ExportSection(require=("held_out_loss<=before", "token_accuracy>=0.25"))
    with pytest.raises(RequirementError) as refused:
        run(eval=held_out(records), export=export)
    text = str(refused.value)
    assert "held_out_loss<=before, but held_out_loss is 2.5 at step 4 and was 2 before" in text
    assert "token_accuracy" not in text
    assert f"python tools/convert_ckpt.py {folder / 'checkpoints' / '4'} FOLDER" in text
    assert published(folder)[-1] == 4 and not (folder / "export").exists()
    assert [e for e in read_events(folder / "journal.jsonl") if e.phase == "export"] == []
    looser = ExportSection(require=("held_out_loss<=2.5",))
    result, _ = run(eval=held_out(records), export=looser, resume="auto")
    assert (result.export_dir / "model.safetensors").is_file()


def test_one_that_holds_is_written_by_the_score_of_the_exported_step(run, records, made_up):
    made_up(LOSSES)
    result, _ = run(
        eval=held_out(records, 2),
        save=SaveSection(every_steps=2, keep_best=1),
        export=ExportSection(step="best", require=("held_out_loss<2.2", "held_out_loss<before")),
    )
    assert (result.export_dir / "model.safetensors").is_file()


def test_the_score_before_training_is_kept_for_a_run_that_goes_on(run, records, folder, made_up):
    made_up({0: 2.4, 2: 2.3, 4: 2.45})
    run(eval=held_out(records, 2))
    shutil.rmtree(folder / "checkpoints" / "4")
    export = ExportSection(require=("held_out_loss<=before",))
    with pytest.raises(RequirementError, match=r"is 2\.45 at step 4 and was 2\.4 before"):
        run(eval=held_out(records, 2), export=export, resume="auto")


def test_a_run_that_was_not_scored_before_cannot_require_it(run, records, folder):
    run()
    shutil.rmtree(folder / "checkpoints" / "4")
    export = ExportSection(require=("held_out_loss<=before",))
    with pytest.raises(ProblemsError, match=r"export\.require=held_out_loss<=before: needs the score before"):
        run(eval=held_out(records), export=export, resume="auto")
    assert published(folder) == [2]


def test_the_command_exits_with_2(recipe, records, folder, made_up, capsys):
    made_up({0: 2.0, 4: 2.5})
    asked = recipe(
        eval=held_out(records),
        export=ExportSection(require=("held_out_loss<=before",)),
        log=LogSection(progress=False, tensorboard=False),
    )
    with pytest.raises(SystemExit) as ended:
        run_recipe(asked, [])
    assert ended.value.code == 2
    assert "tptrain: step 4 is saved and not exported" in capsys.readouterr().err
