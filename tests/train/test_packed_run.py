"""Whole runs on packed rows: checked before, resumed bit for bit, every record once an epoch."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tptrain.config import ExportSection, SaveSection, ScheduleSection
from tptrain.config.planning import plan_recipe
from tptrain.errors import ProblemsError
from tptrain.models import attention
from tptrain.train.journal import read_journal
from tptrain.train.run import train


def packed(recipe, tmp_path, name, **top):
    made = recipe(output_dir=str(tmp_path / name), **top)
    return replace(made, data=replace(made.data, packing="best_fit", seq_len=256))


def steps_of(result):
    return read_journal(result.output_dir / "journal.jsonl")


def test_an_epoch_of_packed_rows_counts_what_an_epoch_of_single_ones_does(recipe, tmp_path, capsys):
    schedule = ScheduleSection(epochs=1)
    packed_steps = steps_of(train(plan_recipe(packed(recipe, tmp_path, "packed", schedule=schedule))))
    assert "Packing: records do not see each other (checked in " in capsys.readouterr().out
    single = steps_of(train(plan_recipe(recipe(output_dir=str(tmp_path / "single"), schedule=schedule))))
    assert "Packing" not in capsys.readouterr().out
    for name in ("counted_tokens", "real_tokens"):
        assert sum(getattr(step, name) for step in packed_steps) == sum(getattr(s, name) for s in single)
    assert len(packed_steps) < len(single) / 2


def test_a_resumed_run_is_the_uninterrupted_one(recipe, tmp_path):
    whole = train(plan_recipe(packed(recipe, tmp_path, "whole", schedule=ScheduleSection(max_steps=6))))
    sections = {"schedule": ScheduleSection(max_steps=6), "save": SaveSection(every_steps=3)}
    half = packed(recipe, tmp_path, "half", **sections, export=ExportSection(enabled=False))
    train(plan_recipe(half))
    resumed = train(plan_recipe(replace(half, resume="3")))
    assert [(s.loss, s.grad_norm, s.rows_digest) for s in steps_of(resumed)] == [
        (s.loss, s.grad_norm, s.rows_digest) for s in steps_of(whole)
    ]


def test_a_run_whose_records_see_each_other_does_not_begin(recipe, tmp_path, monkeypatch):
    mask = attention.causal_mask
    monkeypatch.setattr(attention, "causal_mask", lambda ids, window: mask((ids > 0).int(), window))
    with pytest.raises(ProblemsError, match="must keep the records of a row apart"):
        train(plan_recipe(packed(recipe, tmp_path, "leaking")))
    unchecked = packed(recipe, tmp_path, "unchecked")
    train(plan_recipe(replace(unchecked, data=replace(unchecked.data, check_packing=False))))
