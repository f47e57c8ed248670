"""Mixtral: Mistral's layers with a mixture of experts in the place of every MLP."""

from __future__ import annotations

from tptrain.family.decoder import Defaults, ExpertNames, decoder_table, read_decoder
from tptrain.family.experts import read_experts
from tptrain.family.facts import LayerKind, ModelFacts
from tptrain.family.hf_config import ConfigReader
from tptrain.family.registry import Family
from tptrain.family.table import ParamRow

_DEFAULTS = Defaults(num_key_value_heads=8, rms_norm_eps=1e-5, max_position_embeddings=131072)
_NAMES = ExpertNames("block_sparse_moe.gate.weight", "block_sparse_moe.experts", "w1", "w3", "w2")


def read_facts(reader: ConfigReader) -> ModelFacts:
    reader.must_be("hidden_act", ("silu",), write=True)
    reader.must_be("attention_dropout", (0, 0.0))
    reader.must_be("router_jitter_noise", (0, 0.0))
    kind = LayerKind(reader.optional_size("sliding_window"), has_experts=True)
    experts = read_experts(
        reader,
        count=reader.size("num_local_experts", 8),
        chosen=2,
        intermediate_size=reader.size("intermediate_size"),
        normalises_weights=True,
    )
    rope = reader.rope(theta=1_000_000.0)
    return read_decoder(reader, "mixtral", rope, _DEFAULTS, layer_period=(kind,), experts=experts)


def table(facts: ModelFacts) -> tuple[ParamRow, ...]:
    return decoder_table(facts, _NAMES)


FAMILY = Family("mixtral", "MixtralForCausalLM", read_facts, table)
