"""Qwen3-MoE: Qwen3's layers with a mixture of many small experts in the place of most or all MLPs."""

from __future__ import annotations

from tptrain.family.decoder import Defaults, decoder_table, read_decoder, shortest_period
from tptrain.family.experts import read_experts
from tptrain.family.facts import LayerKind, ModelFacts
from tptrain.family.hf_config import ConfigReader
from tptrain.family.registry import Family

_DEFAULTS = Defaults(num_key_value_heads=4, max_position_embeddings=32768)


def read_facts(reader: ConfigReader) -> ModelFacts:
    reader.must_be("hidden_act", ("silu",), write=True)
    reader.must_be("attention_dropout", (0, 0.0))
    attention_bias = reader.flag("attention_bias", False)
    given = reader.optional_size("sliding_window", 4096)
    window = given if reader.flag("use_sliding_window", False) else None
    kinds = [LayerKind(window, has_experts=has) for has in _have_experts(reader)]
    experts = read_experts(
        reader,
        # transformers 4 and 5 write it by different names.
        count=reader.size_by("num_experts", "num_local_experts", 128),
        chosen=8,
        intermediate_size=reader.size("moe_intermediate_size", 768),
        normalises_weights=reader.flag("norm_topk_prob", False),
    )
    return read_decoder(
        reader,
        "qwen3_moe",
        reader.rope(),
        _DEFAULTS,
        layer_period=shortest_period(kinds),
        qkv_bias=attention_bias,
        attention_output_bias=attention_bias,
        qk_norm="head",
        # A config may give every layer an MLP; its fields of experts then describe nothing.
        experts=experts if any(kind.has_experts for kind in kinds) else None,
    )


def _have_experts(reader: ConfigReader) -> list[bool]:
    """For every layer: those listed have an MLP, and of the others each `decoder_sparse_step`-th experts."""
    layers, step = range(reader.size("num_hidden_layers")), reader.size("decoder_sparse_step", 1)
    dense = reader.layer_numbers("mlp_only_layers", len(layers))
    return [layer not in dense and (layer + 1) % step == 0 for layer in layers]


FAMILY = Family("qwen3_moe", "Qwen3MoeForCausalLM", read_facts, decoder_table)
