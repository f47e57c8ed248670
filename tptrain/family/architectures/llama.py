"""Llama 2, 3, 3.1 and 3.2 (`LlamaConfig` and `LlamaForCausalLM` in transformers)."""

from __future__ import annotations

from tptrain.family.decoder import decoder_table, read_decoder
from tptrain.family.facts import ModelFacts
from tptrain.family.hf_config import ConfigReader
from tptrain.family.registry import Family


def read_facts(reader: ConfigReader) -> ModelFacts:
    reader.must_be("hidden_act", ("silu",), write=True)
    reader.must_be("attention_dropout", (0, 0.0))
    reader.must_be("pretraining_tp", (1,))
    attention_bias = reader.flag("attention_bias", False)
    return read_decoder(
        reader,
        "llama",
        reader.rope(),
        qkv_bias=attention_bias,
        attention_output_bias=attention_bias,
        mlp_bias=reader.flag("mlp_bias", False),
    )


FAMILY = Family("llama", "LlamaForCausalLM", read_facts, decoder_table)
