"""Mistral 7B and its successors: Llama's layers, in the first version with a sliding window."""

from __future__ import annotations

from tptrain.family.decoder import Defaults, decoder_table, read_decoder
from tptrain.family.facts import LayerKind, ModelFacts
from tptrain.family.hf_config import ConfigReader
from tptrain.family.registry import Family

_DEFAULTS = Defaults(num_key_value_heads=8, max_position_embeddings=131072)


def read_facts(reader: ConfigReader) -> ModelFacts:
    reader.must_be("hidden_act", ("silu",), write=True)
    reader.must_be("attention_dropout", (0, 0.0))
    window = reader.optional_size("sliding_window", 4096)
    return read_decoder(reader, "mistral", reader.rope(), _DEFAULTS, layer_period=(LayerKind(window),))


FAMILY = Family("mistral", "MistralForCausalLM", read_facts, decoder_table)
