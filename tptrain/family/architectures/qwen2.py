"""Qwen2 and Qwen2.5: Llama's layers with biases on queries, keys and values."""

from __future__ import annotations

from tptrain.family.decoder import Defaults, decoder_table, read_decoder, upper_layers_slide
from tptrain.family.facts import ModelFacts
from tptrain.family.hf_config import ConfigReader
from tptrain.family.registry import Family

_DEFAULTS = Defaults(num_key_value_heads=32, max_position_embeddings=32768)


def read_facts(reader: ConfigReader) -> ModelFacts:
    reader.must_be("hidden_act", ("silu",), write=True)
    reader.must_be("attention_dropout", (0, 0.0))
    period = upper_layers_slide(reader)
    return read_decoder(reader, "qwen2", reader.rope(), _DEFAULTS, layer_period=period, qkv_bias=True)


FAMILY = Family("qwen2", "Qwen2ForCausalLM", read_facts, decoder_table)
