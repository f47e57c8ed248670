"""The Llama family: Llama 2, 3, 3.1 and 3.2, tied and untied.

Source: `LlamaConfig` and `LlamaForCausalLM` in transformers; the tests compare this table with what
`save_pretrained` writes.
"""

from __future__ import annotations

from tptrain.family.facts import ModelFacts
from tptrain.family.hf_config import ConfigReader
from tptrain.family.table import ParamRow, bias, matrix, norm_scale


def read_facts(reader: ConfigReader) -> ModelFacts:
    """Facts from a `LlamaConfig` as a dict; what this decoder would compute wrongly is a problem."""
    reader.must_be("hidden_act", ("silu",))
    reader.must_be("attention_dropout", (0, 0.0))
    reader.must_be("pretraining_tp", (1,))
    hidden = reader.size("hidden_size")
    heads = reader.size("num_attention_heads")
    kv_heads = reader.size("num_key_value_heads", heads)
    sizes_known = not reader.is_bad("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim")
    if sizes_known and heads % kv_heads:
        rule, other = "must be a multiple of num_key_value_heads", f"num_key_value_heads={kv_heads}"
        reader.report("num_attention_heads", heads, rule, other, f"{-(-heads // kv_heads) * kv_heads}")
    if sizes_known and reader.config.get("head_dim") is None and hidden % heads:
        rule, other = "must be a multiple of num_attention_heads", f"num_attention_heads={heads}"
        reader.report("hidden_size", hidden, rule, other, f"{-(-hidden // heads) * heads}, or give head_dim")
    head_dim = (
        reader.size("head_dim") if reader.config.get("head_dim") is not None else max(hidden // heads, 1)
    )
    if not reader.is_bad("hidden_size", "num_attention_heads", "head_dim") and head_dim % 2:
        reader.report("head_dim", head_dim, "must be even for RoPE", "pairs of 2", str(head_dim + 1))
    return ModelFacts(
        family="llama",
        vocab_size=reader.size("vocab_size"),
        hidden_size=hidden,
        intermediate_size=reader.size("intermediate_size"),
        num_hidden_layers=reader.size("num_hidden_layers"),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        rms_norm_eps=reader.number("rms_norm_eps", 1e-6),
        rope=reader.rope(),
        tie_word_embeddings=reader.flag("tie_word_embeddings", False),
        max_position_embeddings=reader.size("max_position_embeddings", 2048),
        initializer_range=reader.number("initializer_range", 0.02),
        attention_bias=reader.flag("attention_bias", False),
        mlp_bias=reader.flag("mlp_bias", False),
    )


def layer_rows(facts: ModelFacts, prefix: str) -> list[ParamRow]:
    """The rows of one decoder layer, `prefix` being `model.layers.7.`."""
    d, f = facts.hidden_size, facts.intermediate_size
    q, kv = facts.num_attention_heads * facts.head_dim, facts.num_key_value_heads * facts.head_dim
    projections = [
        ("self_attn.q_proj", ("heads", "embed"), (q, d), facts.attention_bias),
        ("self_attn.k_proj", ("kv_heads", "embed"), (kv, d), facts.attention_bias),
        ("self_attn.v_proj", ("kv_heads", "embed"), (kv, d), facts.attention_bias),
        ("self_attn.o_proj", ("embed", "heads"), (d, q), facts.attention_bias),
        ("mlp.gate_proj", ("mlp", "embed"), (f, d), facts.mlp_bias),
        ("mlp.up_proj", ("mlp", "embed"), (f, d), facts.mlp_bias),
        ("mlp.down_proj", ("embed", "mlp"), (d, f), facts.mlp_bias),
    ]
    rows = []
    for name, dims, size, has_bias in projections:
        rows.append(matrix(f"{prefix}{name}.weight", dims, size))
        if has_bias:
            rows.append(bias(f"{prefix}{name}.bias", dims[0], size[0]))
    rows.append(norm_scale(f"{prefix}input_layernorm.weight", d))
    rows.append(norm_scale(f"{prefix}post_attention_layernorm.weight", d))
    return rows


def table(facts: ModelFacts) -> tuple[ParamRow, ...]:
    """All rows, in the order of the model's forward pass."""
    vocab, d = facts.vocab_size, facts.hidden_size
    rows = [matrix("model.embed_tokens.weight", ("vocab", "embed"), (vocab, d))]
    for layer in range(facts.num_hidden_layers):
        rows += layer_rows(facts, f"model.layers.{layer}.")
    rows.append(norm_scale("model.norm.weight", d))
    tied_to = "model.embed_tokens.weight" if facts.tie_word_embeddings else None
    head = ParamRow("lm_head.weight", ("vocab", "embed"), (vocab, d), (vocab, d), tied_to=tied_to)
    return (*rows, head)
