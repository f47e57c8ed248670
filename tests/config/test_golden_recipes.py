"""Every recipe plans on the slices it names, fits there, and comes to what its golden file says."""

from __future__ import annotations

import re
from collections.abc import Mapping

import pytest
from golden_recipes import GOLDEN, NAMES, RECIPES, golden_text, plan_of, topologies
from published import PUBLISHED

from tptrain.config.recipe_file import load_recipe
from tptrain.estimate import estimate
from tptrain.family import facts_from_config, families, parameter_table, stored_rows

# Recipe -> the published model with its config.json.
MODELS = {
    "gemma2_9b_alpaca": "Gemma-2-9b",
    "gemma3_1b_gsm8k": "Gemma-3-1b",
    "mistral_7b_chat": "Mistral-7B-v0.3",
    "mixtral_8x7b_chat": "Mixtral-8x7B",
    "olmo2_7b_gsm8k": "OLMo-2-7B",
    "qwen2_5_7b_alpaca": "Qwen2.5-7B",
    "qwen3_30b_a3b_alpaca": "Qwen3-30B-A3B",
    "qwen3_8b_chat": "Qwen3-8B",
}
LLAMAS = {"llama3_2_1b_gsm8k": 1_235_814_400, "llama3_8b_gsm8k": 8_030_261_248}

CASES = [(name, topology) for name in NAMES for topology in topologies(name)]


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_comes_to_its_golden_file(name: str) -> None:
    """After a change that is meant, `python tests/config/golden_recipes.py` writes the files anew."""
    assert golden_text(name) == (GOLDEN / f"{name}.json").read_text()


@pytest.mark.parametrize(("name", "topology"), CASES)
def test_it_fits(name: str, topology: str) -> None:
    assert estimate(plan_of(name, topology)).verdict == "fits"


@pytest.mark.parametrize("name", NAMES)
def test_a_file_is_short_enough_to_be_read(name: str) -> None:
    assert len(golden_text(name).splitlines()) <= 150


@pytest.mark.parametrize("name", NAMES)
def test_the_docstring_names_the_slices(name: str) -> None:
    docstring = (RECIPES / f"{name}.py").read_text().split('"""')[1]
    planned = re.search(r"^Planned for (.*?)\. ?", docstring, re.MULTILINE)
    assert set(re.findall(r"topology=(\S+)", docstring)) <= set(topologies(name))
    assert planned is not None
    assert tuple(re.split(", | and ", planned[1])) == topologies(name)


@pytest.mark.parametrize("name", NAMES)
def test_the_model_is_the_published_one(name: str) -> None:
    config = load_recipe(RECIPES / f"{name}.py").model.config
    assert isinstance(config, Mapping)
    facts = facts_from_config(dict(config))
    if name in MODELS:
        published, count = PUBLISHED[MODELS[name]]
        assert facts == facts_from_config(published)
        assert config.items() <= published.items()
    else:
        count = LLAMAS[name]
    assert sum(row.num_elements for row in stored_rows(parameter_table(facts))) == count


def test_every_file_has_a_recipe_and_every_family_one() -> None:
    assert {path.stem for path in GOLDEN.glob("*.json")} == set(NAMES)
    assert {plan_of(name, topology).facts.family for name, topology in CASES} == set(families())
