"""Whole runs on the plain-PyTorch backend: what they write, go on from, and refuse."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tptrain.ckpt.reading import StepReader
from tptrain.ckpt.steps import find_step
from tptrain.config import (
    DataSection,
    EvalSection,
    ExportSection,
    ModelSection,
    OptimSection,
    SaveSection,
    ScheduleSection,
)
from tptrain.config.planning import plan_recipe
from tptrain.errors import ProblemsError
from tptrain.export import export_step
from tptrain.family import stored_rows
from tptrain.train.guards import NonFiniteError
from tptrain.train.journal import read_journal
from tptrain.train.run import train


def test_a_run_leaves_journal_checkpoints_assets_and_export(recipe, tmp_path):
    result = train(plan_recipe(recipe()))
    journal = read_journal(tmp_path / "run" / "journal.jsonl")
    assert [record.step for record in journal] == [1, 2, 3, 4]
    assert all(record.counted_tokens > 0 and record.grad_norm > 0 for record in journal)
    assert [record.cursor for record in journal] == [4, 8, 12, 16]
    assert sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir()) == ["2", "4"]
    assert result.export_dir == tmp_path / "run" / "export"
    run = StepReader(result.checkpoint).run
    assert (run["step"], run["cursor"]) == (4, 16)
    assert run["seeds"] == {"init": 0, "data": 0}
    assert run["versions"]["torch"] == torch.__version__.split("+")[0]


def test_every_step_changes_every_parameter(recipe):
    result = train(plan_recipe(recipe()))
    early, late = StepReader(result.checkpoint.parent / "2"), StepReader(result.checkpoint)
    for row in stored_rows(plan_recipe(recipe(output_dir="elsewhere")).table):
        assert not torch.equal(early.read(row), late.read(row)), row.name


def test_weights_of_a_step_start_another_run(recipe, tmp_path):
    first = train(plan_recipe(recipe()))
    model = ModelSection(pretrained=str(first.checkpoint))
    zero = OptimSection(learning_rate=0.0)
    second = train(plan_recipe(recipe(model=model, optim=zero, output_dir=str(tmp_path / "second"))))
    old, new = StepReader(first.checkpoint), StepReader(second.checkpoint)
    for row in stored_rows(plan_recipe(recipe(output_dir="elsewhere")).table):
        assert torch.equal(old.read(row), new.read(row)), row.name


def test_converting_a_step_gives_the_runs_own_export(recipe, tmp_path):
    result = train(plan_recipe(recipe()))
    out = export_step(find_step(result.output_dir, "checkpoint"), tmp_path / "converted", dtype="bfloat16")
    for file in result.export_dir.iterdir():
        assert (out / file.name).read_bytes() == file.read_bytes(), file.name


def test_tied_run_exports_one_embedding_that_transformers_ties(records, tmp_path, recipe):
    from tests.small_run import write_pretrained

    tied = write_pretrained(tmp_path / "tied", tie_word_embeddings=True)
    result = train(plan_recipe(recipe(model=ModelSection(pretrained=str(tied)))))
    assert "lm_head.weight" not in load_file(result.export_dir / "model.safetensors")
    model = AutoModelForCausalLM.from_pretrained(result.export_dir)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_epochs_use_every_record_once_and_fill_the_last_step(recipe, tmp_path):
    data = recipe().data
    train(plan_recipe(recipe(schedule=ScheduleSection(epochs=1), save=SaveSection(every_steps=0), data=data)))
    journal = read_journal(tmp_path / "run" / "journal.jsonl")
    whole = sum(record.real_tokens for record in journal)
    assert journal[-1].padded_tokens > journal[0].padded_tokens
    two = tmp_path / "two"
    seldom = SaveSection(every_steps=0)
    train(plan_recipe(recipe(schedule=ScheduleSection(epochs=2), save=seldom, output_dir=str(two))))
    assert sum(record.real_tokens for record in read_journal(two / "journal.jsonl")) == 2 * whole


def test_non_finite_loss_stops_before_the_update_and_names_the_step(recipe, tmp_path):
    wild = OptimSection(learning_rate=1e30, clip_norm=0)
    with pytest.raises(NonFiniteError, match=r"step \d+: .* update was not applied.*optim\.learning_rate="):
        train(
            plan_recipe(
                recipe(optim=wild, save=SaveSection(every_steps=1), schedule=ScheduleSection(max_steps=9))
            )
        )
    journal = read_journal(tmp_path / "run" / "journal.jsonl")
    assert journal, "the finite steps are in the journal"
    assert all(math.isfinite(record.loss) for record in journal)
    saved = find_step(tmp_path / "run", "checkpoint")
    assert int(saved.name) == journal[-1].step
    assert not (tmp_path / "run" / "export").exists()


def test_answers_before_and_after_are_scored(recipe, records):
    section = EvalSection(problems=5, path=str(records), max_new_tokens=8, batch_rows=2)
    result = train(plan_recipe(recipe(eval=section)))
    assert len(result.before.exact.answers) == len(result.after.exact.answers) == 5
    assert result.before.exact.answers[0].problem.prompt.startswith("Question: ")


PROMPTS = ("Question: Ann has 48 coins. Ben gives Ann 24 more.\nAnswer:", "48+24", "Answer: 7", "Ann has")

REFUSED = {
    "export exists": (
        lambda tmp, recipe: ((tmp / "out").mkdir(), recipe(export=ExportSection(path=str(tmp / "out"))))[1],
        ("export.path", "out", "must not exist", "it exists", "another path, or remove it first"),
    ),
    "output holds a run": (
        lambda tmp, recipe: (
            (tmp / "run").mkdir(),
            (tmp / "run" / "journal.jsonl").write_text(""),
            recipe(),
        )[2],
        ("output_dir", "run", "new or empty folder", "holds a run, no checkpoint", "resume=auto"),
    ),
    "step that is not there": (
        lambda tmp, recipe: recipe(resume="7"),
        ("resume", "7", "must be a step that was saved", "none", "auto"),
    ),
    "no data": (
        lambda tmp, recipe: recipe(
            data=DataSection(path=str(tmp / "nothing.jsonl"), seq_len=112, batch_rows=4)
        ),
        ("data.path", "nothing.jsonl", "must exist", "holds no nothing.jsonl", "local JSONL"),
    ),
    "wrong column": (
        lambda tmp, recipe: recipe(
            data=recipe().data.__class__(
                path=recipe().data.path, preset="gsm8k", seq_len=112, batch_rows=4, prompt_column="qestion"
            )
        ),
        ("data.prompt_column", "qestion", "must be a column", "question", "question"),
    ),
    "another model's weights": (
        lambda tmp, recipe: recipe(
            model=ModelSection(
                pretrained=recipe().model.pretrained,
                config=json.loads((Path(recipe().model.pretrained) / "config.json").read_text())
                | {"intermediate_size": 128},
            )
        ),
        (
            "model.config.intermediate_size",
            "128",
            "must equal the checkpoint's",
            "=112",
            "model.config=pretrained",
        ),
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_anything_is_written(case, recipe, tmp_path):
    make, expected = REFUSED[case]
    asked = make(tmp_path, recipe)
    before = sorted(str(p) for p in tmp_path.rglob("*"))
    with pytest.raises(ProblemsError) as refused:
        train(plan_recipe(asked))
    (problem,) = refused.value.problems
    parts = (problem.setting, str(problem.value), problem.rule, problem.other, problem.fix)
    for part, fragment in zip(parts, expected, strict=True):
        assert fragment, f"{case} leaves a part unchecked"
        assert fragment in part
    assert sorted(str(p) for p in tmp_path.rglob("*")) == before


def test_no_space_is_refused_before_training(recipe, tmp_path, monkeypatch):
    full = shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    with pytest.raises(ProblemsError) as refused:
        train(plan_recipe(recipe()))
    found = {problem.setting: problem for problem in refused.value.problems}
    assert set(found) == {"output_dir", "export.path"}
    assert "free: 1e-06 GB" in found["output_dir"].other
    assert "free: 1e-06 GB" in found["export.path"].other
    assert not (tmp_path / "run").exists()


def test_reading_steps_one_late_changes_nothing_but_times(recipe, tmp_path, monkeypatch):
    from tptrain.train import run

    def one_late(plan):
        backend = make_backend(plan)
        backend.works_beside_host = True
        return backend

    make_backend = run.make_backend
    train(plan_recipe(recipe()))
    monkeypatch.setattr(run, "make_backend", one_late)
    train(plan_recipe(recipe(output_dir=str(tmp_path / "late"))))
    at_once, late = (read_journal(tmp_path / name / "journal.jsonl") for name in ("run", "late"))
    assert [(r.step, r.loss, r.grad_norm) for r in at_once] == [(r.step, r.loss, r.grad_norm) for r in late]


def test_tensorboard_gets_every_step(recipe, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from tptrain.config import LogSection

    train(plan_recipe(recipe(log=LogSection(progress=True, tensorboard=True))))
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload().Scalars("train/loss")
    journal = read_journal(tmp_path / "run" / "journal.jsonl")
    assert [(e.step, e.value) for e in events] == [(r.step, pytest.approx(r.loss)) for r in journal]


def test_generate_answers_as_transformers_does_from_run_step_and_export(recipe):
    from transformers import AutoTokenizer

    from tptrain.generate.command import answer

    result = train(plan_recipe(recipe(export=ExportSection(dtype="float32"))))
    model = AutoModelForCausalLM.from_pretrained(result.export_dir)
    tokenizer = AutoTokenizer.from_pretrained(result.export_dir)
    wanted = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        whole = model.generate(ids, max_new_tokens=7, do_sample=False)[0, ids.shape[1] :]
        wanted.append(tokenizer.decode(whole, skip_special_tokens=True).strip())
    assert any(wanted), "empty answers compare nothing"
    for folder in (result.output_dir, result.checkpoint, result.export_dir):
        options = ["backend=torch", "topology=cpu-1"]
        assert [answer(folder, prompt, 7, options, raw=True) for prompt in PROMPTS] == wanted
    asked = [answer(result.output_dir, question, 7, options) for question in PROMPTS]
    formed = [answer(result.export_dir, f"Question: {q}\nAnswer:", 7, options) for q in PROMPTS]
    assert asked == formed != wanted


def test_a_warm_up_longer_than_the_records_allow_is_refused(recipe, tmp_path):
    asked = recipe(schedule=ScheduleSection(epochs=1, warmup_steps=40))
    with pytest.raises(ProblemsError, match=r"schedule\.warmup_steps=40: .*\(10 steps with these records"):
        train(plan_recipe(asked))
    assert not (tmp_path / "run").exists()


def test_output_dir_that_is_a_file_is_refused(recipe, tmp_path):
    (tmp_path / "taken").write_text("mine")
    with pytest.raises(ProblemsError, match=r"output_dir=.*taken: must be a folder"):
        train(plan_recipe(recipe(output_dir=str(tmp_path / "taken"))))
    assert (tmp_path / "taken").read_text() == "mine"


def test_several_hosts_are_refused(recipe):
    with pytest.raises(ProblemsError, match=r"topology=v5p-32: .*several hosts is not yet supported"):
        train(
            plan_recipe(recipe(backend="xla", topology="v5p-32", data=DataSection(batch_rows=16, seq_len=64)))
        )


def test_problems_too_long_to_answer_are_left_out(recipe, tmp_path, capsys):
    long = tmp_path / "held_out.jsonl"
    texts = ["How many?", "How many coins? " * 60]
    long.write_text("".join(json.dumps({"question": t, "answer": "#### 1"}) + "\n" for t in texts))
    section = EvalSection(problems=2, path=str(long), max_new_tokens=8, batch_rows=2)
    result = train(plan_recipe(recipe(eval=section)))
    assert [answer.problem.question for answer in result.after.exact.answers] == ["How many?"]
    assert "1 problems left out" in capsys.readouterr().out
