"""config.json in both spellings and generation_config.json with every stop token."""

from __future__ import annotations

import dataclasses
import importlib.metadata
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import LlamaConfig

from tests.weights.small_llama import LLAMA3_ROPE, small_config
from tptrain.family import facts_from_config
from tptrain.weights import complete_config
from tptrain.weights.hf_json import generation_config, with_token_ids

BASE: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 131,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
}
SCALING = {name: value for name, value in LLAMA3_ROPE.items() if name != "rope_theta"}
TOKENIZER = SimpleNamespace(bos_token_id=0, eos_token_id=1, pad_token_id=2)


@pytest.mark.parametrize(
    ("given", "theta", "scaling"),
    [
        ({}, 10000.0, None),
        ({"rope_theta": 5e5, "rope_scaling": None}, 5e5, None),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, 5e5, None),
        ({"rope_theta": 50000, "rope_scaling": SCALING}, 50000.0, SCALING),
        ({"rope_parameters": LLAMA3_ROPE}, 50000.0, SCALING),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, 1e4, {"rope_type": "linear", "factor": 2.0}),
    ],
)
def test_both_spellings_of_rope(given: dict[str, Any], theta: float, scaling: dict[str, Any] | None) -> None:
    done = complete_config({**BASE, **given}, "bfloat16")
    assert (done["rope_theta"], done["rope_scaling"]) == (theta, scaling)
    assert done["rope_parameters"] == {"rope_theta": theta, **(scaling or {"rope_type": "default"})}
    assert isinstance(done["rope_theta"], float)
    assert isinstance((scaling or {"factor": 1.0})["factor"], float)
    assert facts_from_config(done) == facts_from_config({**BASE, **given})


def test_transformers_reads_what_it_wrote() -> None:
    for rope in (None, LLAMA3_ROPE):
        given = small_config(True, rope)
        read = LlamaConfig(**complete_config(given.to_dict(), "float32"))
        assert {**read.to_dict(), "dtype": None, "architectures": None} == {**given.to_dict(), "dtype": None}


def test_a_config_of_few_fields_is_written_out() -> None:
    done = complete_config(BASE, "float32")
    assert done["architectures"] == ["LlamaForCausalLM"]
    assert (done["num_key_value_heads"], done["head_dim"], done["hidden_act"]) == (6, 8, "silu")
    assert (done["dtype"], done["torch_dtype"], done["tie_word_embeddings"]) == ("float32", "float32", False)
    assert done["transformers_version"] == importlib.metadata.version("transformers")


def test_every_written_fact_is_a_field_of_the_hugging_face_config() -> None:
    written = set(complete_config(BASE, "float32")) - set(BASE)
    own = {"torch_dtype", "rope_theta", "rope_scaling", "transformers_version", "architectures", "dtype"}
    assert written - own <= {field.name for field in dataclasses.fields(LlamaConfig)}


def test_unknown_fields_are_kept() -> None:
    given = {**BASE, "use_cache": False, "my_note": {"a": [1]}, "transformers_version": "4.40.0"}
    done = complete_config(given, "float32")
    assert (done["use_cache"], done["my_note"], done["transformers_version"]) == (False, {"a": [1]}, "4.40.0")


@pytest.mark.parametrize(
    ("source", "own_ids", "stops", "expected"),
    [
        # the source's stop tokens first, then the tokenizer's EOS, then what the recipe adds; each once
        ({"eos_token_id": [7, 8]}, {}, (9, 8), [7, 8, 1, 9]),
        ({"eos_token_id": 1}, {}, (), [1]),
        # without a generation_config.json, the checkpoint's config.json speaks
        ({}, {"eos_token_id": [7, 1]}, (), [7, 1]),
        ({"eos_token_id": 7}, {"eos_token_id": 8}, (), [7, 1]),
        ({}, {"eos_token_id": None}, (), [1]),
    ],
)
def test_stop_tokens_are_merged(
    source: dict[str, Any], own_ids: dict[str, Any], stops: tuple[int, ...], expected: list[int]
) -> None:
    assert generation_config(source, own_ids, TOKENIZER, stops)["eos_token_id"] == expected


def test_sampling_fields_and_the_sources_ids_are_kept() -> None:
    source = {"temperature": 0.6, "do_sample": True, "bos_token_id": 5, "_from_model_config": True}
    assert generation_config(source, {}, TOKENIZER) == {
        "temperature": 0.6,
        "do_sample": True,
        "bos_token_id": 5,
        "pad_token_id": 2,
        "eos_token_id": [1],
    }


def test_a_model_without_tokenizer_keeps_the_ids_of_its_config() -> None:
    assert generation_config({}, {"eos_token_id": 4}, None) == {"eos_token_id": [4]}
    assert generation_config({}, {}, None) == {}


def test_id_zero_is_an_id() -> None:
    zero = SimpleNamespace(bos_token_id=None, eos_token_id=0, pad_token_id=0)
    assert generation_config({}, {}, zero) == {"pad_token_id": 0, "eos_token_id": [0]}


def test_config_and_generation_config_name_the_same_tokens() -> None:
    assert with_token_ids({"a": 1, "bos_token_id": 9}, {"eos_token_id": [4], "temperature": 0.5}) == {
        "a": 1,
        "bos_token_id": None,
        "eos_token_id": 4,
        "pad_token_id": None,
    }
    assert with_token_ids({}, {"eos_token_id": [4, 5]})["eos_token_id"] == [4, 5]
