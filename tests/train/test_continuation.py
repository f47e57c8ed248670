"""What a changed setting means: the table has an answer for every setting there is."""

import shutil
from dataclasses import replace

import pytest

from tptrain.config.overrides import apply_overrides
from tptrain.config.planning import plan_recipe
from tptrain.config.settings import settings
from tptrain.train.continuation import MEANINGS, Change, continuation, continuation_problems, meaning
from tptrain.train.saving import run_item

DIGEST = "0123"
REFUSED = {
    *("model.add_tokens", "model.chat_template", "model.tokenizer", "model.trainable"),
    *("optim.name", "optim.momentum"),
    *("lora.rank", "lora.alpha", "lora.targets"),
    *("precision.compute", "precision.master", "seed"),
}


@pytest.fixture
def plan(recipe):
    """A plan on 8 devices with changes written as overrides."""

    def make(*overrides):
        asked = replace(recipe(), topology="cpu-8", backend="xla", data=replace(recipe().data, batch_rows=16))
        return plan_recipe(apply_overrides(asked, overrides))

    return make


@pytest.fixture
def saved(plan):
    """The `run` item of step 3 of that plan."""
    return {**run_item(plan(), DIGEST), "step": 3, "cursor": 48}


def test_what_is_refused_is_what_is_meant_to_be():
    assert {setting for setting in settings() if meaning(setting) is Change.REFUSED} == REFUSED


def test_another_pretrained_model_is_refused_without_adapters(plan, saved, tmp_path):
    """With adapters it is compared with the saved one: see tests/train/test_lora.py."""
    moved = shutil.copytree(plan().recipe.model.pretrained, tmp_path / "moved")
    (problem,) = continuation_problems(plan(f"model.pretrained={moved}"), saved)
    assert (problem.setting, problem.rule) == ("model.pretrained", "must stay as it was when a run goes on")


def test_every_line_of_the_table_is_a_setting_or_a_section():
    for name, _ in MEANINGS:
        assert any(s == name or (name.endswith(".") and s.startswith(name)) for s in settings()), name


def test_a_name_that_only_begins_like_one_of_the_table_is_refused():
    assert meaning("backends") is meaning("names") is meaning("model.configuration") is Change.REFUSED


def test_nothing_changed(plan, saved):
    assert continuation_problems(plan(), saved) == []
    assert continuation(plan(), saved, DIGEST).lines == ()


@pytest.mark.parametrize(
    ("overrides", "lines"),
    [
        (["optim.beta2=0.99"], ["optim.beta2: 0.95 -> 0.99"]),
        (["schedule.kind=linear"], ["schedule.kind: cosine -> linear"]),
        (["remat.policy=full"], ["remat.policy: none -> full"]),
        (
            ["mesh.fsdp=4", "mesh.tensor=2"],
            ["mesh.fsdp: -1 -> 4", "mesh.tensor: 1 -> 2", "mesh: fsdp=8 -> fsdp=4 x tensor=2"],
        ),
        (
            ["backend=torch", "topology=cpu-1"],
            ["topology: cpu-8 -> cpu-1", "backend: xla -> torch", "mesh: fsdp=8 -> one device"],
        ),
        (
            [
                *(
                    "eval.problems=3",
                    "eval.path=e.jsonl",
                    "eval.max_new_tokens=9",
                    "export.enabled=false",
                    "save.keep_last=7",
                ),
                *("log.progress=true", "output_dir=there", "name=other", "resume=auto", "unverified=true"),
            ],
            [],
        ),
    ],
)
def test_lines(plan, saved, overrides, lines):
    changed = plan(*overrides)
    assert continuation_problems(changed, saved) == []
    going_on = continuation(changed, saved, DIGEST)
    assert going_on.lines == tuple(lines)
    assert (going_on.step, going_on.cursor) == (3, 48)


def test_a_smaller_slice_under_the_same_name_is_told(plan, saved):
    """topology=auto says nothing of how many devices there are."""
    saved = {**saved, "mesh": {**saved["mesh"], "fsdp": 4}}
    assert continuation(plan(), saved, DIGEST).lines == ("mesh: fsdp=4 -> fsdp=8",)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("digest", [DIGEST, "other"])
def test_the_cursor_stays_for_the_same_samples_in_the_same_order(plan, saved, seed, digest):
    going_on = continuation(plan(f"data.seed={seed}"), saved, digest)
    same = seed == 0 and digest == DIGEST
    assert going_on.cursor == (48 if same else 0)
    assert len(going_on.lines) == (0 if same else 1)


def test_a_setting_that_the_saved_run_did_not_know_has_not_changed(plan, saved):
    saved["recipe"] = {name: value for name, value in saved["recipe"].items() if name != "precision.compute"}
    assert continuation_problems(plan("precision.compute=bfloat16"), saved) == []


def test_without_a_digest_the_settings_of_the_data_decide(plan, saved):
    del saved["data_digest"]
    assert continuation(plan(), saved, DIGEST).cursor == 48
    assert continuation(plan("data.max_records=20"), saved, DIGEST).cursor == 0
