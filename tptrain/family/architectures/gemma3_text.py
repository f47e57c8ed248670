"""Gemma 3 without images: five sliding layers for each full one, which has a rotary embedding of its own."""

from __future__ import annotations

from tptrain.family.decoder import Defaults, decoder_table, read_decoder, shortest_period
from tptrain.family.facts import LayerKind, ModelFacts
from tptrain.family.hf_config import FULL, SLIDING, ConfigReader
from tptrain.family.registry import Family

_DEFAULTS = Defaults(
    num_key_value_heads=4, head_dim=256, max_position_embeddings=131072, tie_word_embeddings=True
)


def read_facts(reader: ConfigReader) -> ModelFacts:
    reader.must_be("hidden_activation", ("gelu_pytorch_tanh",), write=True)
    reader.must_be("hidden_act", ("gelu_pytorch_tanh",))
    reader.must_be("attention_dropout", (0, 0.0))
    reader.must_be("attn_logit_softcapping", (None,))
    reader.must_be("use_bidirectional_attention", (None, False))
    layers = range(reader.size("num_hidden_layers"))
    pattern = reader.size("sliding_window_pattern", 6)
    types = reader.layer_types([SLIDING if (layer + 1) % pattern else FULL for layer in layers])
    rope, sliding_rope = reader.ropes_by_layer_type(full=1_000_000.0, sliding=10_000.0)
    sliding = LayerKind(reader.size("sliding_window", 4096), sliding_rope)
    attention_bias = reader.flag("attention_bias", False)
    return read_decoder(
        reader,
        "gemma3_text",
        rope,
        _DEFAULTS,
        layer_period=shortest_period([sliding if kind == SLIDING else LayerKind() for kind in types]),
        qkv_bias=attention_bias,
        attention_output_bias=attention_bias,
        activation="gelu_pytorch_tanh",
        norm_scale="one_plus",
        block_norms="around",
        qk_norm="head",
        query_scale=reader.number("query_pre_attn_scalar", 256) ** -0.5,
        logit_soft_cap=reader.optional_number("final_logit_softcapping"),
        embedding_scale=reader.size("hidden_size") ** 0.5,
    )


FAMILY = Family("gemma3_text", "Gemma3ForCausalLM", read_facts, decoder_table)
