"""The parameter table and the facts equal what transformers says of the published Llama models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import LlamaConfig, LlamaForCausalLM

from tptrain.errors import ProblemsError
from tptrain.family import RopeFacts, facts_from_config, parameter_table, stored_rows

_SCALING_31 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def _published(
    vocab: int, sizes: tuple[int, ...], positions: int, theta: float, **more: Any
) -> dict[str, Any]:
    """A config.json as published; sizes: hidden, intermediate, layers, heads, kv heads."""
    hidden, intermediate, layers, heads, kv_heads = sizes
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": positions,
        "rope_theta": theta,
        "rope_scaling": None,
        "tie_word_embeddings": False,
        "attention_bias": False,
        **more,
    }


# Name -> (config.json in the spelling of transformers 4, parameters in all).
PUBLISHED: dict[str, tuple[dict[str, Any], int]] = {
    "Llama-2-7b": (_published(32000, (4096, 11008, 32, 32, 32), 4096, 10000.0), 6_738_415_616),
    "Llama-2-70b": (_published(32000, (8192, 28672, 80, 64, 8), 4096, 10000.0), 68_976_648_192),
    "Llama-3-8B": (_published(128256, (4096, 14336, 32, 32, 8), 8192, 500000.0), 8_030_261_248),
    "Llama-3-70B": (_published(128256, (8192, 28672, 80, 64, 8), 8192, 500000.0), 70_553_706_496),
    "Llama-3.1-8B": (
        _published(
            128256, (4096, 14336, 32, 32, 8), 131072, 500000.0, rope_scaling=_SCALING_31, mlp_bias=False
        ),
        8_030_261_248,
    ),
    "Llama-3.2-1B": (
        _published(
            *(128256, (2048, 8192, 16, 32, 8), 131072, 500000.0),
            rope_scaling={**_SCALING_31, "factor": 32.0},
            tie_word_embeddings=True,
            head_dim=64,
        ),
        1_235_814_400,
    ),
    "Llama-3.2-3B": (
        _published(
            *(128256, (3072, 8192, 28, 24, 8), 131072, 500000.0),
            rope_scaling={**_SCALING_31, "factor": 32.0},
            tie_word_embeddings=True,
            head_dim=128,
        ),
        3_212_749_824,
    ),
}

_SMALL = _published(103, (48, 80, 3, 6, 2), 64, 10000.0, head_dim=10)


def _saved_by_transformers(model: LlamaForCausalLM) -> dict[str, tuple[int, ...]]:
    """Name -> shape of what save_pretrained writes of a model: its state dict, a tied tensor once."""
    tied = set(model.all_tied_weights_keys)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name not in tied}


def _ours(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    return {row.name: row.size for row in stored_rows(parameter_table(facts_from_config(config)))}


@pytest.mark.parametrize("name", PUBLISHED)
def test_table_of_a_published_model(name: str) -> None:
    config, count = PUBLISHED[name]
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**config))
    ours = _ours(config)
    assert ours == _saved_by_transformers(model)
    assert sum(row.num_elements for row in stored_rows(parameter_table(facts_from_config(config)))) == count


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": True},
        {"attention_bias": True},
        {"mlp_bias": True},
        {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    ],
    ids=["plain", "tied", "attention_bias", "mlp_bias", "all"],
)
def test_table_equals_the_file_written(changes: dict[str, Any], tmp_path: Path) -> None:
    """The names and shapes in the safetensors file itself, which also checks how tied tensors are saved."""
    config = {**_SMALL, **changes}
    model = LlamaForCausalLM(LlamaConfig(**config))
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        written = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    assert _ours(config) == written == _saved_by_transformers(model)
    assert facts_from_config(json.loads((tmp_path / "config.json").read_text())) == facts_from_config(config)


def test_tied_row_points_at_the_row_that_stores_it() -> None:
    table = parameter_table(facts_from_config({**_SMALL, "tie_word_embeddings": True}))
    tied = [row for row in table if row.tied_to]
    assert [(row.name, row.tied_to) for row in tied] == [("lm_head.weight", "model.embed_tokens.weight")]
    assert tied[0] not in stored_rows(table)


def test_decay_goes_by_dims() -> None:
    table = parameter_table(facts_from_config({**_SMALL, "attention_bias": True}))
    for row in table:
        assert row.decay == (len(row.dims) == 2), row.name
        assert len(row.dims) == len(row.size)
        assert (row.init == "ones") == ("norm" in row.name), row.name


@pytest.mark.parametrize("name", PUBLISHED)
def test_both_spellings_give_the_same_facts(name: str) -> None:
    """transformers 5 writes rope_parameters where 4 wrote rope_theta and rope_scaling."""
    config, _ = PUBLISHED[name]
    version_5 = LlamaConfig(**config).to_dict()
    assert "rope_parameters" in version_5
    assert not version_5.get("rope_scaling")
    facts = facts_from_config(config)
    assert facts_from_config(version_5) == facts
    assert facts.rope.theta == config["rope_theta"]
    both = {**config, "rope_parameters": version_5["rope_parameters"]}
    assert facts_from_config(both) == facts


def test_llama3_rope_is_read_in_full() -> None:
    facts = facts_from_config(PUBLISHED["Llama-3.2-1B"][0])
    assert facts.rope == RopeFacts("llama3", 500000.0, 32.0, 1.0, 4.0, 8192)
    old_key = {"type": "linear", "factor": 2.0}
    assert facts_from_config({**_SMALL, "rope_scaling": old_key}).rope == RopeFacts("linear", 10000.0, 2.0)


def test_spellings_that_disagree_are_refused() -> None:
    config = {**_SMALL, "rope_parameters": {"rope_type": "default", "rope_theta": 5.0}}
    with pytest.raises(ProblemsError) as caught:
        facts_from_config(config)
    assert [p.setting for p in caught.value.problems] == ["model.config.rope_theta"]


def test_defaults_are_those_of_transformers() -> None:
    """Fields that a config.json leaves out mean the same here as in transformers."""
    needed = ("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    short = {name: _SMALL[name] for name in (*needed, "num_attention_heads")}
    assert facts_from_config(short) == facts_from_config(LlamaConfig(**short).to_dict())
