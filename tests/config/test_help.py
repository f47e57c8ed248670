"""--help: every setting, this recipe's values, one line of meaning each, readable at 100 columns."""

from __future__ import annotations

import dataclasses

import pytest
from samples import small_recipe

from tptrain.config import Recipe
from tptrain.config.help import render_help
from tptrain.config.settings import Setting, sections, settings, shown


@pytest.fixture(scope="module")
def page() -> str:
    return render_help(small_recipe(), "python recipes/small.py")


@pytest.mark.parametrize("setting", settings().values(), ids=lambda setting: setting.path)
def test_every_setting_is_explained(setting: Setting, page: str) -> None:
    assert f"\n  {setting.path}=" in page
    assert setting.meaning.endswith(".")
    assert setting.meaning in " ".join(page.split())
    assert setting.kind in " ".join(page.split())


def test_every_field_of_the_schema_is_a_setting() -> None:
    own = {field.name for field in dataclasses.fields(Recipe)}
    nested = {
        f"{section}.{field.name}"
        for section, kind in sections().items()
        for field in dataclasses.fields(kind)
    }
    assert set(settings()) == nested | (own - set(sections()))
    assert len(sections()) == 16


def test_values_are_those_of_the_recipe(page: str) -> None:
    for line in ("name=small", "data.seq_len=256", "schedule.max_steps=40", "model.pretrained=none"):
        assert f"\n  {line}" in page
    assert "vocab_size=1031" in page
    assert page.startswith("usage: python recipes/small.py [setting=value ...]\n")
    options = "--resume auto|never|STEP is resume=..., --unverified is unverified=true."
    assert options in " ".join(page.split())


def test_settings_lie_under_their_section(page: str) -> None:
    for section in sections():
        block = page.split(f"\n{section}: ")[1].split("\n\n")[0]
        listed = [
            line.strip().partition("=")[0] for line in block.split("\n") if line.startswith(f"  {section}.")
        ]
        assert listed == [path for path in settings() if path.startswith(f"{section}.")]


def test_lines_fit_100_columns(page: str) -> None:
    assert max(len(line) for line in page.splitlines()) <= 100
    assert "\x1b" not in page


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("mesh.fsdp", "whole number"),
        ("data.seq_len", "whole number, at least 2"),
        ("schedule.epochs", "number or none, above 0"),
        ("optim.beta1", "number, at least 0, below 1"),
        ("remat.policy", "one of none, dots, attention, full, offload_attention, offload"),
        ("export.enabled", "true or false"),
        ("model.config", "fields or text"),
        ("data.subset", "text or none"),
        ("model.trainable", "texts separated by commas"),
    ],
)
def test_types_in_words(path: str, kind: str) -> None:
    assert settings()[path].kind == kind


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "none"),
        (True, "true"),
        (2e-5, "2e-05"),
        (0.123456789, "0.123456789"),
        (5.0, "5"),
        (-1, "-1"),
        (("a.*", "b"), "a.*,b"),
    ],
)
def test_values_as_they_are_typed(value: object, text: str) -> None:
    assert shown(value) == text
