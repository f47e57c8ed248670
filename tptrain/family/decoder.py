"""What the families share: the sizes every config.json gives, and the table that follows from the facts.

A family reads its own fields on top and states its features as facts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from tptrain.family.facts import LayerKind, ModelFacts, RopeFacts
from tptrain.family.hf_config import FULL, SLIDING, ConfigReader
from tptrain.family.table import Init, ParamRow, bias, matrix, norm_scale


@dataclass(frozen=True)
class Defaults:
    """What the config class of a family fills in where its config.json says nothing.

    num_key_value_heads: None for as many as heads. head_dim: None for hidden_size / num_attention_heads.
    """

    num_key_value_heads: int | None = None
    head_dim: int | None = None
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = False


def read_decoder(
    reader: ConfigReader,
    family: str,
    rope: RopeFacts,
    defaults: Defaults = Defaults(),
    **features: Any,
) -> ModelFacts:
    """Facts from a config with these features; sizes that do not go together are problems."""
    hidden = reader.size("hidden_size")
    heads = reader.size("num_attention_heads")
    kv_heads = reader.size("num_key_value_heads", defaults.num_key_value_heads or heads)
    sizes_known = not reader.is_bad("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim")
    if sizes_known and heads % kv_heads:
        rule, other = "must be a multiple of num_key_value_heads", f"num_key_value_heads={kv_heads}"
        reader.report("num_attention_heads", heads, rule, other, f"{-(-heads // kv_heads) * kv_heads}")
    return ModelFacts(
        family=family,
        vocab_size=reader.size("vocab_size"),
        hidden_size=hidden,
        intermediate_size=reader.size("intermediate_size"),
        num_hidden_layers=reader.size("num_hidden_layers"),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=_head_dim(reader, hidden, heads, defaults.head_dim),
        rms_norm_eps=reader.number("rms_norm_eps", defaults.rms_norm_eps),
        rope=rope,
        tie_word_embeddings=reader.flag("tie_word_embeddings", defaults.tie_word_embeddings),
        max_position_embeddings=reader.size("max_position_embeddings", defaults.max_position_embeddings),
        initializer_range=reader.number("initializer_range", 0.02),
        **features,
    )


def _head_dim(reader: ConfigReader, hidden: int, heads: int, default: int | None) -> int:
    given = reader.gives("head_dim") or default is not None
    sizes_known = not reader.is_bad("hidden_size", "num_attention_heads", "num_key_value_heads")
    if not given and sizes_known and hidden % heads:
        rule, other = "must be a multiple of num_attention_heads", f"num_attention_heads={heads}"
        reader.report("hidden_size", hidden, rule, other, f"{-(-hidden // heads) * heads}, or give head_dim")
    head_dim = reader.size("head_dim", default) if given else max(hidden // heads, 1)
    reader.fields["head_dim"] = head_dim
    if not reader.is_bad("hidden_size", "num_attention_heads", "head_dim") and head_dim % 2:
        reader.report("head_dim", head_dim, "must be even for RoPE", "pairs of 2", str(head_dim + 1))
    return head_dim


def upper_layers_slide(reader: ConfigReader) -> tuple[LayerKind, ...]:
    """Qwen's kinds of layers: with `use_sliding_window`, those from `max_window_layers` on have a window."""
    count = reader.size("num_hidden_layers")
    slides = reader.flag("use_sliding_window", False)
    given = reader.optional_size("sliding_window", 4096)
    window = given if slides else None
    first = reader.whole_number("max_window_layers", 28)
    above = FULL if window is None else SLIDING
    types = reader.layer_types([FULL if layer < first else above for layer in range(count)])
    if not slides:
        # As in transformers, where no window means that all layers are full.
        return (LayerKind(),)
    return shortest_period([LayerKind(window if kind == SLIDING else None) for kind in types])


def shortest_period(kinds: Sequence[LayerKind]) -> tuple[LayerKind, ...]:
    """The fewest kinds that give those of all layers when they are repeated."""
    count = next(
        p for p in range(1, len(kinds) + 1) if all(kinds[i] == kinds[i - p] for i in range(p, len(kinds)))
    )
    return tuple(kinds[:count])


@dataclass(frozen=True)
class ExpertNames:
    """What files call the parts of a mixture of experts, below `model.layers.7.`."""

    router: str = "mlp.gate.weight"
    experts: str = "mlp.experts"
    gate_proj: str = "gate_proj"
    up_proj: str = "up_proj"
    down_proj: str = "down_proj"


def decoder_table(facts: ModelFacts, names: ExpertNames = ExpertNames()) -> tuple[ParamRow, ...]:
    """All rows, in the order of the model's forward pass. names: in files, where there are experts."""
    vocab, d = facts.vocab_size, facts.hidden_size
    rows = [matrix("model.embed_tokens.weight", ("vocab", "embed"), (vocab, d))]
    for layer, kind in enumerate(facts.layer_kinds):
        prefix = f"model.layers.{layer}."
        rows += _attention_rows(facts, prefix)
        rows += expert_rows(facts, prefix, names) if kind.has_experts else _mlp_rows(facts, prefix)
        rows += [_norm(facts, f"{prefix}{name}", d) for name in facts.block_norm_names]
    rows.append(_norm(facts, "model.norm", d))
    tied_to = "model.embed_tokens.weight" if facts.tie_word_embeddings else None
    head = ParamRow("lm_head.weight", ("vocab", "embed"), (vocab, d), (vocab, d), tied_to=tied_to)
    return (*rows, head)


def _attention_rows(facts: ModelFacts, prefix: str) -> list[ParamRow]:
    """The rows of a layer's attention, `prefix` being `model.layers.7.`."""
    d, h = facts.hidden_size, facts.head_dim
    q, kv = facts.num_attention_heads * h, facts.num_key_value_heads * h
    projections = [
        ("self_attn.q_proj", ("heads", "embed"), (q, d), facts.qkv_bias),
        ("self_attn.k_proj", ("kv_heads", "embed"), (kv, d), facts.qkv_bias),
        ("self_attn.v_proj", ("kv_heads", "embed"), (kv, d), facts.qkv_bias),
        ("self_attn.o_proj", ("embed", "heads"), (d, q), facts.attention_output_bias),
    ]
    rows = _projection_rows(projections, prefix)
    if facts.qk_norm != "none":
        for name, all_heads in (("q", q), ("k", kv)):
            norm_size = h if facts.qk_norm == "head" else all_heads
            rows.append(_norm(facts, f"{prefix}self_attn.{name}_norm", norm_size))
    return rows


def _mlp_rows(facts: ModelFacts, prefix: str) -> list[ParamRow]:
    d, f = facts.hidden_size, facts.intermediate_size
    projections = [
        ("mlp.gate_proj", ("mlp", "embed"), (f, d), facts.mlp_bias),
        ("mlp.up_proj", ("mlp", "embed"), (f, d), facts.mlp_bias),
        ("mlp.down_proj", ("embed", "mlp"), (d, f), facts.mlp_bias),
    ]
    return _projection_rows(projections, prefix)


def _projection_rows(
    projections: Sequence[tuple[str, tuple[str, str], tuple[int, int], bool]], prefix: str
) -> list[ParamRow]:
    """Matrices (name, dims, size), and a bias where there is one."""
    rows = []
    for name, dims, size, has_bias in projections:
        rows.append(matrix(f"{prefix}{name}.weight", dims, size))
        if has_bias:
            rows.append(bias(f"{prefix}{name}.bias", dims[0], size[0]))
    return rows


def expert_rows(facts: ModelFacts, prefix: str, names: ExpertNames) -> list[ParamRow]:
    """Router and experts of a layer: one row for each matrix of all experts."""
    assert facts.experts is not None, "a layer with experts is in a model that says how many"
    d, f, count = facts.hidden_size, facts.experts.intermediate_size, facts.experts.num_experts
    router = matrix(f"{prefix}mlp.gate.weight", ("router", "embed"), (count, d))
    rows = [replace(router, in_files=(f"{prefix}{names.router}",))]
    for ours, theirs, dims, size in (
        ("gate_proj", names.gate_proj, ("expert_mlp", "expert_embed"), (f, d)),
        ("up_proj", names.up_proj, ("expert_mlp", "expert_embed"), (f, d)),
        ("down_proj", names.down_proj, ("expert_embed", "expert_mlp"), (d, f)),
    ):
        row = matrix(f"{prefix}mlp.experts.{ours}.weight", ("experts", *dims), (count, *size))
        files = (f"{prefix}{names.experts}.{expert}.{theirs}.weight" for expert in range(count))
        rows.append(replace(row, in_files=tuple(files)))
    return rows


def _norm(facts: ModelFacts, name: str, size: int) -> ParamRow:
    init: Init = "zeros" if facts.norm_scale == "one_plus" else "ones"
    return norm_scale(f"{name}.weight", size, init)
