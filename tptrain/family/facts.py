"""What the rest of the package needs to know of a model's architecture, read from its Hugging Face config."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RopeFacts:
    """Rotary position embedding.

    kind:  "default", "linear" or "llama3" (Hugging Face `rope_type`).
    theta: the base of the frequencies.
    factor, low_freq_factor, high_freq_factor, original_max_position_embeddings: as in Hugging Face's
    `rope_scaling`; `factor` is used by "linear" and "llama3", the others by "llama3" alone.
    """

    kind: str
    theta: float
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 0


@dataclass(frozen=True)
class LayerKind:
    """What may differ from one decoder layer to the next.

    window: how many tokens, itself included, a token may look back on; None for all of them.
    """

    window: int | None = None


@dataclass(frozen=True)
class ModelFacts:
    """Architecture of one decoder-only model. Field names are Hugging Face's where it has one."""

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope: RopeFacts
    tie_word_embeddings: bool
    max_position_embeddings: int
    initializer_range: float
    attention_bias: bool
    mlp_bias: bool
    # One period of layer kinds, repeated over the depth: Llama has one kind, Gemma alternates.
    layer_period: tuple[LayerKind, ...] = (LayerKind(),)

    def dim_units(self) -> dict[str, tuple[str, int]]:
        """dim -> (Hugging Face name, count) of the smallest pieces that a mesh axis may split it into.

        Attention projections are split by whole heads, so `heads` counts heads, not rows.
        """
        return {
            "embed": ("hidden_size", self.hidden_size),
            "heads": ("num_attention_heads", self.num_attention_heads),
            "kv_heads": ("num_key_value_heads", self.num_key_value_heads),
            "mlp": ("intermediate_size", self.intermediate_size),
        }
