"""The parameter tables of published models of all families hold what `save_pretrained` writes of them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from published import PUBLISHED
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.core_model_loading import revert_weight_conversion

from tptrain.family import facts_from_config, families, parameter_table, stored_rows


def saved_by_transformers(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name -> shape in the files of a model without weights; a tied tensor once."""
    made = AutoConfig.for_model(**copy.deepcopy(config))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(made)
    state = model.state_dict()
    for name in model.all_tied_weights_keys:
        state.pop(name, None)
    return {name: tuple(tensor.shape) for name, tensor in revert_weight_conversion(model, state).items()}


@pytest.mark.parametrize("name", PUBLISHED)
def test_names_shapes_and_count(name: str) -> None:
    config, count = PUBLISHED[name]
    rows = stored_rows(parameter_table(facts_from_config(config)))
    files = [(file, size) for row in rows for file, size in row.file_sizes.items()]
    assert dict(files) == saved_by_transformers(config)
    assert len(files) == len(dict(files)), "a name twice"
    assert sum(row.num_elements for row in rows) == count


@pytest.mark.parametrize("name", PUBLISHED)
def test_both_spellings_give_the_same_facts(name: str) -> None:
    """As published, and as transformers 5 writes it."""
    config, _ = PUBLISHED[name]
    written = AutoConfig.for_model(**copy.deepcopy(config)).to_dict()
    assert facts_from_config(written) == facts_from_config(config)


@pytest.mark.parametrize("model_type", families())
def test_defaults_are_those_of_transformers(model_type: str) -> None:
    """Fields that a config.json leaves out mean the same here as in transformers."""
    short = {"vocab_size": 103, "hidden_size": 128, "intermediate_size": 80, "num_hidden_layers": 8}
    config = {"model_type": model_type, **short, "num_attention_heads": 32}
    written = AutoConfig.for_model(**config).to_dict()
    assert facts_from_config(config) == facts_from_config(written)


def test_every_family_has_a_published_model() -> None:
    assert {config["model_type"] for config, _ in PUBLISHED.values()} | {"llama"} == set(families())
