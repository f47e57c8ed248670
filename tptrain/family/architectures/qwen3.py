"""Qwen3: Llama's layers with a norm of every query and key head."""

from __future__ import annotations

from tptrain.family.decoder import Defaults, decoder_table, read_decoder, upper_layers_slide
from tptrain.family.facts import ModelFacts
from tptrain.family.hf_config import ConfigReader
from tptrain.family.registry import Family

_DEFAULTS = Defaults(num_key_value_heads=32, head_dim=128, max_position_embeddings=32768)


def read_facts(reader: ConfigReader) -> ModelFacts:
    reader.must_be("hidden_act", ("silu",), write=True)
    reader.must_be("attention_dropout", (0, 0.0))
    attention_bias = reader.flag("attention_bias", False)
    return read_decoder(
        reader,
        "qwen3",
        reader.rope(),
        _DEFAULTS,
        layer_period=upper_layers_slide(reader),
        qkv_bias=attention_bias,
        attention_output_bias=attention_bias,
        qk_norm="head",
    )


FAMILY = Family("qwen3", "Qwen3ForCausalLM", read_facts, decoder_table)
