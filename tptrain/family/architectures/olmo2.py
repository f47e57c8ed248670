"""OLMo 2: norms of what leaves a block instead of what enters it, and of all queries and keys of a token."""

from __future__ import annotations

from tptrain.family.decoder import Defaults, decoder_table, read_decoder
from tptrain.family.facts import ModelFacts
from tptrain.family.hf_config import ConfigReader
from tptrain.family.registry import Family

_DEFAULTS = Defaults(rms_norm_eps=1e-5)


def read_facts(reader: ConfigReader) -> ModelFacts:
    reader.must_be("hidden_act", ("silu",), write=True)
    reader.must_be("attention_dropout", (0, 0.0))
    attention_bias = reader.flag("attention_bias", False)
    return read_decoder(
        reader,
        "olmo2",
        reader.rope(),
        _DEFAULTS,
        qkv_bias=attention_bias,
        attention_output_bias=attention_bias,
        norm_scale="before_cast",
        block_norms="after",
        qk_norm="all_heads",
    )


FAMILY = Family("olmo2", "Olmo2ForCausalLM", read_facts, decoder_table)
