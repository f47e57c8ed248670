"""Runs on several sources: tokens of each in the journal, held-out rows of each, the same rows resumed."""

import json
import shutil
from collections import Counter

import pytest

from tests.train.steps import assert_same_state, journal_values
from tptrain.config import (
    DataSection,
    ExportSection,
    ModelSection,
    SaveSection,
    ScheduleSection,
    SourceSection,
)
from tptrain.config.planning import plan_recipe
from tptrain.data.dataset import tokenize_records
from tptrain.data.sources import load_records
from tptrain.data.tokenizer import load_tokenizer
from tptrain.errors import ProblemsError
from tptrain.train.journal import read_journal, source_tokens
from tptrain.train.run import train


@pytest.fixture
def pairs(records, tmp_path):
    """Other records in another form."""
    path = tmp_path / "pairs.jsonl"
    made = load_records(str(records), None, "train", None)[100:130]
    lines = [json.dumps({"prompt": each["question"], "completion": f" {each['answer']}"}) for each in made]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def data(records, pairs):
    def make(mix="weights", **settings):
        sources = {
            "math": SourceSection(preset="gsm8k", max_records=38, weight=1),
            "pairs": SourceSection(path=str(pairs), weight=3),
        }
        given = {"path": str(records), "seq_len": 112, "batch_rows": 4, "mix": mix, "sources": sources}
        return DataSection(**{**given, **settings})

    return make


@pytest.fixture
def run(recipe):
    def go(**changes):
        return train(plan_recipe(recipe(**{"export": ExportSection(enabled=False), **changes})))

    return go


def test_resumed_is_uninterrupted_bit_for_bit(run, recipe, data, tmp_path, capsys):
    folder, again, wide = (tmp_path / name for name in ("run", "again", "wide"))
    settings = {"data": data(), "save": SaveSection(every_steps=3, keep_last=3)}
    run(schedule=ScheduleSection(max_steps=6), **settings)
    assert "Mix: math 25.00%, pairs 75.00% of the rows." in capsys.readouterr().out
    for copy in (again, wide):
        shutil.copytree(folder, copy)
        shutil.rmtree(copy / "checkpoints" / "6")
    run(output_dir=str(again), resume="auto", schedule=ScheduleSection(max_steps=6), **settings)
    assert journal_values(again) == journal_values(folder)
    plan = plan_recipe(recipe(output_dir="elsewhere"))
    assert_same_state(plan, folder / "checkpoints" / "6", again / "checkpoints" / "6")
    steps = read_journal(folder / "journal.jsonl")
    assert source_tokens(read_journal(again / "journal.jsonl")) == source_tokens(steps)
    told = capsys.readouterr().out
    for name, tokens in source_tokens(steps).items():
        assert f"{name} {tokens:,} tokens" in told, "the steps before are counted too"
    # The same twelve rows in one batch.
    one_batch = {**settings, "data": data(batch_rows=12), "schedule": ScheduleSection(max_steps=4)}
    run(output_dir=str(wide), resume="auto", **one_batch)
    last = read_journal(wide / "journal.jsonl")[-1]
    assert (last.step, last.cursor) == (4, 24)
    assert last.source_tokens == source_tokens(steps[3:])


def test_epochs_train_on_every_record_of_every_source(run, data, pretrained, records, pairs, tmp_path):
    run(data=data("concat"), schedule=ScheduleSection(epochs=1))
    steps = read_journal(tmp_path / "run" / "journal.jsonl")
    assert [sum(step.source_tokens.values()) for step in steps] == [step.real_tokens for step in steps]
    tokenizer, counted = load_tokenizer(ModelSection(pretrained=str(pretrained))), Counter()
    for name, path, preset, most in (
        ("math", records, "gsm8k", 38),
        ("pairs", pairs, "prompt_completion", 99),
    ):
        found = load_records(str(path), None, "train", most)
        counts = tokenize_records(found, tokenizer, DataSection(preset=preset, seq_len=112))[1]
        counted[name] = counts.tokens
    assert source_tokens(steps) == dict(counted)


def test_other_weights_begin_the_data_anew(run, data, capsys):
    settings = {"save": SaveSection(every_steps=2)}
    run(data=data(), schedule=ScheduleSection(max_steps=2), **settings)
    capsys.readouterr()
    other = data()
    heavier = {**other.sources, "math": SourceSection(preset="gsm8k", max_records=38, weight=2)}
    run(data=data(sources=heavier), resume="auto", schedule=ScheduleSection(max_steps=3), **settings)
    told = " ".join(capsys.readouterr().out.split())
    assert "data.sources" in told and "taking them from the beginning" in told


def test_held_out_rows_are_of_every_source(run, data, capsys):
    result = run(data=data(validation=0.2), schedule=ScheduleSection(max_steps=2))
    told = capsys.readouterr().out
    assert "Held out of math: " in told and "Held out of pairs: " in told
    assert set(result.after.metrics) == {"held_out_loss", "token_accuracy"}


def test_records_that_do_not_fit_their_source_are_told_by_its_settings(run, data):
    wrong = SourceSection(preset="gsm8k", prompt_column="prompt", max_records=38, weight=1)
    with pytest.raises(ProblemsError) as caught:
        run(data=data(sources={"math": wrong, "pairs": data().sources["pairs"]}))
    (problem,) = caught.value.problems
    assert problem.setting == "data.sources.math.prompt_column"
