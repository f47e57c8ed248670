"""Tokens that a run adds: the model grows by their rows, and what it exports is one model with its tokenizer.

The oracle is transformers: a checkpoint resized there, with the same mean in its new rows.
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.small_run import write_pretrained
from tests.train.steps import assert_same_state, journal_values
from tptrain.ckpt.reading import StepReader
from tptrain.config import (
    DataSection,
    ExportSection,
    LoraSection,
    ModelSection,
    OptimSection,
    SaveSection,
    ScheduleSection,
)
from tptrain.config.planning import plan_recipe
from tptrain.data.tokenizer import load_tokenizer
from tptrain.errors import ProblemsError
from tptrain.estimate.changes import plan_with
from tptrain.estimate.memory import memory
from tptrain.estimate.workload import workload_of
from tptrain.family import read_config
from tptrain.train.run import train

ADDED = ("<|tool|>", "<|im_end|>")  # one of which chatml brings as well
HELD, GROWN = 391, 394
FLOAT32 = ExportSection(dtype="float32")
STILL = OptimSection(learning_rate=0.0)
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is 48/2?"},
    {"role": "assistant", "content": "24"},
]


@pytest.fixture
def chat_data(records):
    return DataSection(
        path=str(records), preset="gsm8k", as_chat=True, seq_len=192, batch_rows=4, max_records=38
    )


def model(pretrained: Path, **changes) -> ModelSection:
    settings = {"add_tokens": ADDED, "chat_template": "chatml", **changes}
    return ModelSection(pretrained=str(pretrained), **settings)


def resized(folder: Path):
    """transformers' own, with the mean of the rows that were there in the new ones."""
    made = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    weights = {id(w): w for w in (made.get_input_embeddings().weight, made.get_output_embeddings().weight)}
    means = [w.detach().mean(dim=0) for w in weights.values()]
    made.resize_token_embeddings(GROWN, mean_resizing=False)
    with torch.no_grad():
        for layer, mean in zip(
            (made.get_input_embeddings(), made.get_output_embeddings()), means, strict=False
        ):
            layer.weight[HELD:] = mean
    return made.eval()


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_an_untrained_run_is_the_checkpoint_resized(tied, recipe, chat_data, tmp_path):
    pretrained = write_pretrained(tmp_path / "base", tie_word_embeddings=tied)
    made = recipe(model=model(pretrained), data=chat_data, optim=STILL, export=FLOAT32)
    plan = plan_recipe(made)
    assert (plan.facts.vocab_size, plan.hf_config["vocab_size"], plan.new_rows) == (GROWN, GROWN, 3)
    assert any(f"from {HELD} to {GROWN} rows" in notice for notice in plan.notices)
    exported = train(plan).export_dir
    ours, theirs = AutoModelForCausalLM.from_pretrained(exported).eval(), resized(pretrained)
    tokenizer = AutoTokenizer.from_pretrained(exported)
    assert len(tokenizer) == ours.config.vocab_size == GROWN
    assert (ours.lm_head.weight is ours.model.embed_tokens.weight) == tied
    ids = torch.tensor([[5, 391, 17, 220, 393, 388, 392, 64]])
    with torch.no_grad():
        mine, other = ours(ids).logits, theirs(ids).logits
    assert other.std() > 0.1
    assert (mine - other).abs().max() <= 1e-6 * other.abs().max()
    head = ours.get_output_embeddings().weight.detach()
    held = AutoModelForCausalLM.from_pretrained(pretrained).get_output_embeddings().weight.detach()
    assert torch.equal(head[:HELD], held)
    assert torch.equal(head[HELD:], held.double().mean(dim=0).float().expand(3, -1))


def test_the_export_renders_what_was_trained_on_and_stops_at_the_turns_end(
    recipe, pretrained, chat_data, tmp_path
):
    section = model(pretrained)
    exported = train(plan_recipe(recipe(model=section, data=chat_data))).export_dir
    ours, theirs = load_tokenizer(section), AutoTokenizer.from_pretrained(exported)
    written = theirs.apply_chat_template(CHAT, tokenize=False)
    assert written == (
        "<|bos|><|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhat is 48/2?<|im_end|>\n"
        "<|im_start|>assistant\n24<|im_end|>\n"
    )
    for waits in (False, True):
        mine, other = (t.apply_chat_template(CHAT, add_generation_prompt=waits) for t in (ours, theirs))
        assert dict(mine) == dict(other)
    ids = theirs.get_vocab()
    # The recipe's tokens come first, in their order; then those of the template.
    assert [ids[token] for token in (*ADDED, "<|im_start|>")] == [391, 392, 393]
    generation = json.loads((exported / "generation_config.json").read_text())
    # The checkpoint's own (2, as its config has it), the tokenizer's, and the turn's.
    assert generation["eos_token_id"] == [2, theirs.eos_token_id, ids["<|im_end|>"]]
    assert theirs.decode(theirs(written, add_special_tokens=False).input_ids, skip_special_tokens=True) == (
        "system\nBe brief.\nuser\nWhat is 48/2?\nassistant\n24\n"
    )
    # Only what had to change has changed.
    before, after = (json.loads((at / "tokenizer.json").read_text()) for at in (pretrained, exported))
    assert after.pop("added_tokens")[:3] == before.pop("added_tokens")
    assert before == after


def test_new_rows_are_trained(recipe, pretrained, chat_data):
    result = train(plan_recipe(recipe(model=model(pretrained), data=chat_data)))
    plan = plan_recipe(recipe(model=model(pretrained), output_dir="other"))
    rows = {row.name: row for row in plan.table}
    embedding = StepReader(result.checkpoint).read(rows["model.embed_tokens.weight"])
    begun, unused = embedding[393], embedding[391]  # <|im_start|>, and <|tool|>, which no record has
    assert embedding.shape[0] == GROWN
    assert not torch.equal(begun, unused)


def test_a_run_that_goes_on_is_the_uninterrupted_one(recipe, pretrained, chat_data, tmp_path):
    """Also without the checkpoint, whose config and tokenizer the run has kept."""
    base = tmp_path / "base"
    shutil.copytree(pretrained, base)
    made = recipe(
        model=model(base),
        data=chat_data,
        save=SaveSection(every_steps=2, keep_last=3),
        schedule=ScheduleSection(max_steps=5),
        export=ExportSection(enabled=False),
    )
    folder, again = tmp_path / "run", tmp_path / "again"
    train(plan_recipe(made))
    shutil.copytree(folder, again)
    shutil.rmtree(again / "checkpoints" / "5")
    files = {path.name: path.read_bytes() for path in (again / "assets").iterdir()}
    goes_on = replace(made, output_dir=str(again), resume="auto")
    train(plan_recipe(goes_on))
    assert {path.name: path.read_bytes() for path in (again / "assets").iterdir()} == files
    assert journal_values(again) == journal_values(folder)
    steps = [at / "checkpoints" / "5" for at in (folder, again)]
    assert_same_state(plan_recipe(replace(made, output_dir="elsewhere")), *steps)
    base.rename(tmp_path / "away")
    plan = plan_recipe(goes_on)
    assert (plan.facts.vocab_size, plan.new_rows) == (GROWN, 0)


def test_other_tokens_are_refused_when_a_run_goes_on(recipe, pretrained, chat_data):
    train(plan_recipe(recipe(model=model(pretrained), data=chat_data)))
    changed = model(pretrained, chat_template="turns", add_tokens=(*ADDED, "<|im_start|>"))
    no_export = ExportSection(enabled=False)
    other = recipe(model=changed, data=chat_data, resume="auto", export=no_export)
    with pytest.raises(ProblemsError) as refused:
        train(plan_recipe(other))
    settings = {problem.setting for problem in refused.value.problems}
    assert settings == {"model.add_tokens", "model.chat_template"}


def test_a_step_of_a_run_grows_as_its_export_does(recipe, pretrained, chat_data, tmp_path):
    first = train(plan_recipe(recipe(export=FLOAT32)))
    made = {}
    for name, source in {"step": first.checkpoint, "export": first.export_dir}.items():
        changes = {"model": model(source), "data": chat_data, "optim": STILL}
        made[name] = train(plan_recipe(recipe(output_dir=str(tmp_path / name), **changes))).checkpoint
    plan = plan_recipe(recipe(model=model(first.export_dir), output_dir="elsewhere"))
    assert_same_state(plan, made["step"], made["export"])


def test_spare_rows_are_used_and_nothing_is_resized(recipe, chat_data, tmp_path):
    """391 ids in a model of 400 rows."""
    pretrained = write_pretrained(tmp_path / "spare", vocab_size=400)
    plan = plan_recipe(recipe(model=model(pretrained), data=chat_data, lora=LoraSection(rank=2)))
    assert (plan.facts.vocab_size, plan.new_rows) == (400, 0)
    exported = train(plan).export_dir
    assert len(AutoTokenizer.from_pretrained(exported)) == GROWN
    assert AutoModelForCausalLM.from_pretrained(exported).config.vocab_size == 400


def test_a_trained_tokenizer_keeps_room_for_them(recipe, pretrained, chat_data):
    config = json.loads((pretrained / "config.json").read_text())
    made = ModelSection(
        config=str(pretrained / "config.json"), tokenizer="train", add_tokens=ADDED, chat_template="chatml"
    )
    exported = train(plan_recipe(recipe(model=made, data=chat_data))).export_dir
    tokenizer = AutoTokenizer.from_pretrained(exported)
    assert len(tokenizer) == config["vocab_size"] == HELD
    assert tokenizer.get_vocab()["<|im_start|>"] == HELD - 1
    assert tokenizer.apply_chat_template(CHAT[1:], tokenize=False).startswith("<|bos|><|im_start|>user\n")


def test_the_estimate_counts_the_new_rows(recipe, pretrained, chat_data):
    plans = [plan_recipe(recipe(model=model(pretrained, **changes), data=chat_data)) for changes in (
        {}, {"add_tokens": (), "chat_template": "own"},
    )]  # fmt: skip
    grown, held = (sum(row.num_elements for row in plan.table) for plan in plans)
    assert grown - held == 2 * 3 * 64
    more, less = (memory(workload_of(plan)).total_bytes for plan in plans)
    assert more - less >= 2 * 3 * 64 * 12


def test_advice_counts_them_too(recipe, pretrained, chat_data):
    config = json.loads((pretrained / "config.json").read_text())
    own = {"model_type": "llama", **read_config(config).fields}
    for changes in ({}, {"config": own}, {"config": str(pretrained / "config.json")}):
        plan = plan_recipe(recipe(model=model(pretrained, **changes), data=chat_data))
        changed = plan_with(plan, {"remat.policy": "full"})
        assert changed is not None
        assert (changed.facts.vocab_size, changed.new_rows) == (GROWN, 3)
        assert plan_with(plan, {"model.trainable": "model.layers.*"}) is None


def test_below_adapters_and_frozen_embeddings_growing_is_refused(recipe, pretrained, chat_data):
    for changes, setting, fix in [
        ({"lora": LoraSection(rank=2)}, "lora.rank", "0, or tokens that the checkpoint has rows for"),
        (
            {"model": model(pretrained, trainable=("lm_head.weight",))},
            "model.trainable",
            "lm_head.weight,model.embed_tokens.weight, or tokens",
        ),
    ]:
        with pytest.raises(ProblemsError) as refused:
            plan_recipe(recipe(**{"model": model(pretrained), "data": chat_data, **changes}))
        (problem,) = refused.value.problems
        assert problem.setting == setting and fix in problem.fix
        assert problem.other == "391 rows, 394 ids with the added tokens"
