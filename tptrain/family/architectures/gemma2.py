"""Gemma 2: sliding and full layers by turns, soft-capped scores and logits, norms around each block."""

from __future__ import annotations

from tptrain.family.decoder import Defaults, decoder_table, read_decoder, shortest_period
from tptrain.family.facts import LayerKind, ModelFacts
from tptrain.family.hf_config import FULL, SLIDING, ConfigReader
from tptrain.family.registry import Family

_DEFAULTS = Defaults(
    num_key_value_heads=4, head_dim=256, max_position_embeddings=8192, tie_word_embeddings=True
)


def read_facts(reader: ConfigReader) -> ModelFacts:
    reader.must_be("hidden_activation", ("gelu_pytorch_tanh",), write=True)
    reader.must_be("hidden_act", ("gelu_pytorch_tanh",))
    reader.must_be("attention_dropout", (0, 0.0))
    reader.must_be("use_bidirectional_attention", (None, False))
    layers = range(reader.size("num_hidden_layers"))
    window = reader.size("sliding_window", 4096)
    types = reader.layer_types([FULL if layer % 2 else SLIDING for layer in layers])
    attention_bias = reader.flag("attention_bias", False)
    return read_decoder(
        reader,
        "gemma2",
        reader.rope(),
        _DEFAULTS,
        layer_period=shortest_period([LayerKind(window if kind == SLIDING else None) for kind in types]),
        qkv_bias=attention_bias,
        attention_output_bias=attention_bias,
        activation="gelu_pytorch_tanh",
        norm_scale="one_plus",
        block_norms="around",
        query_scale=reader.number("query_pre_attn_scalar", 256) ** -0.5,
        attention_soft_cap=reader.optional_number("attn_logit_softcapping", 50.0),
        logit_soft_cap=reader.optional_number("final_logit_softcapping", 30.0),
        embedding_scale=reader.size("hidden_size") ** 0.5,
    )


FAMILY = Family("gemma2", "Gemma2ForCausalLM", read_facts, decoder_table)
