"""Overrides: typed values, none, model fields, immutability; all problems at once."""

from __future__ import annotations

import dataclasses

import pytest
from samples import SMALL_LLAMA, small_recipe

from tptrain.config import ModelSection, Recipe
from tptrain.config.overrides import apply_overrides, spelled_out
from tptrain.config.settings import Setting, settings, shown, value_of
from tptrain.errors import ProblemsError


@pytest.mark.parametrize(
    ("arg", "value"),
    [
        ("mesh.tensor=4", 4),
        ("mesh.fsdp=-1", -1),
        ("optim.learning_rate=1e-3", 1e-3),
        ("optim.learning_rate=1", 1.0),
        ("schedule.epochs=2.5", 2.5),
        ("schedule.max_steps=none", None),
        ("schedule.max_steps=NULL", None),
        ("data.max_records=12", 12),
        ("export.enabled=false", False),
        ("export.enabled=no", False),
        ("log.progress=True", True),
        ("remat.policy=none", "none"),
        ("data.path=a=b.jsonl", "a=b.jsonl"),
        ("data.subset=none", None),
        ("resume=120", "120"),
        ("name=7", "7"),
        ("model.config=some/config.json", "some/config.json"),
        ("model.trainable=model.norm.weight", ("model.norm.weight",)),
        ("model.trainable=model.layers.*.mlp.*, lm_head.weight", ("model.layers.*.mlp.*", "lm_head.weight")),
    ],
)
def test_values_are_typed_by_the_schema(arg: str, value: object) -> None:
    setting = settings()[arg.partition("=")[0]]
    found = value_of(apply_overrides(small_recipe(), [arg]), setting)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("arg", "field", "value"),
    [
        ("model.config.num_hidden_layers=5", "num_hidden_layers", 5),
        ("model.config.rope_theta=5e5", "rope_theta", 500000.0),
        ("model.config.tie_word_embeddings=true", "tie_word_embeddings", True),
        ("model.config.tie_word_embeddings=False", "tie_word_embeddings", False),
        ("model.config.hidden_act=silu", "hidden_act", "silu"),
        ("model.config.rope_scaling=none", "rope_scaling", None),
        ('model.config.rope_scaling={"factor": 2}', "rope_scaling", {"factor": 2}),
    ],
)
def test_model_fields_are_json_or_text(arg: str, field: str, value: object) -> None:
    config = apply_overrides(small_recipe(), [arg]).model.config
    assert isinstance(config, dict)
    assert config == {**SMALL_LLAMA, field: value}


def test_a_field_of_a_field() -> None:
    scaled = {**SMALL_LLAMA, "rope_parameters": {"rope_type": "linear", "factor": 2.0}}
    recipe = small_recipe(model=ModelSection(config=scaled, tokenizer="train"))
    config = apply_overrides(recipe, ["model.config.rope_parameters.factor=8"]).model.config
    assert config == {**SMALL_LLAMA, "rope_parameters": {"rope_type": "linear", "factor": 8}}
    assert scaled["rope_parameters"] == {"rope_type": "linear", "factor": 2.0}


def test_the_recipe_given_stays_as_it_is() -> None:
    recipe, twin = small_recipe(), small_recipe()
    changed = apply_overrides(recipe, ["model.config.vocab_size=4096", "mesh.tensor=2", "name=other"])
    assert recipe == twin
    assert (changed.name, changed.mesh.tensor) == ("other", 2)
    assert changed == dataclasses.replace(
        twin,
        name="other",
        mesh=dataclasses.replace(twin.mesh, tensor=2),
        model=dataclasses.replace(twin.model, config={**SMALL_LLAMA, "vocab_size": 4096}),
    )


def test_no_overrides_change_nothing() -> None:
    assert apply_overrides(small_recipe(), []) == small_recipe()


def test_what_help_shows_can_be_typed() -> None:
    """Every `setting=value` line of --help, typed as an override, gives the recipe back."""
    recipe = small_recipe()
    args = [f"{path}={shown(value_of(recipe, setting))}" for path, setting in settings().items()]
    typed = [arg for arg in args if not arg.startswith("model.config=")]
    assert len(typed) == len(settings()) - 1
    assert apply_overrides(recipe, typed) == recipe


def test_all_problems_at_once() -> None:
    bad = [
        "mesh.tensr=2",
        "data.seq_len=x",
        "optim.eps=0",
        "oops",
        "remat.policy=all",
        "name=",
        "seed=1",
        "seed=2",
    ]
    with pytest.raises(ProblemsError) as caught:
        apply_overrides(small_recipe(), bad)
    found = {problem.setting for problem in caught.value.problems}
    assert found == {"mesh.tensr", "data.seq_len", "optim.eps", "argument", "remat.policy", "name", "seed"}
    assert str(caught.value).startswith("7 problems:")


_LONG_ENOUGH = [setting for setting in settings().values() if len(setting.leaf) >= 4]


@pytest.mark.parametrize("setting", _LONG_ENOUGH, ids=lambda setting: setting.path)
def test_one_letter_missing_is_guessed(setting: Setting) -> None:
    key = setting.path[:-2] + setting.path[-1]
    with pytest.raises(ProblemsError) as caught:
        apply_overrides(Recipe(name="a"), [f"{key}=1"])
    assert caught.value.problems[0].fix.startswith(f"{setting.path} (did you mean")


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["--resume", "auto"], ["resume=auto"]),
        (["--resume=never"], ["resume=never"]),
        (["--resume", "120", "--unverified"], ["resume=120", "unverified=true"]),
        (["a.py", "--resume", "auto", "mesh.tensor=2"], ["a.py", "resume=auto", "mesh.tensor=2"]),
        (["--resumed", "--unverified=true"], ["--resumed", "--unverified=true"]),
        ([], []),
    ],
)
def test_options_are_settings(args: list[str], expected: list[str]) -> None:
    assert spelled_out(args) == expected


@pytest.mark.parametrize("args", [["--resume"], ["--resume", "--unverified"], ["--resume", "mesh.tensor=2"]])
def test_resume_needs_a_value(args: list[str]) -> None:
    with pytest.raises(ProblemsError, match=r"--resume=: needs a value \(.*; use --resume auto"):
        spelled_out(args)
