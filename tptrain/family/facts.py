"""What the rest of the package needs to know of a model's architecture, read from its Hugging Face config."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

Activation = Literal["silu", "gelu_pytorch_tanh"]
NormScale = Literal["after_cast", "before_cast", "one_plus"]
BlockNorms = Literal["before", "around", "after"]
QKNorm = Literal["none", "head", "all_heads"]


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

    window:      how many tokens, itself included, a token may look back on; None for all of them.
    rope:        the layer's own rotary embedding; None for the model's.
    has_experts: whether a mixture of experts stands in the place of the MLP.
    """

    window: int | None = None
    rope: RopeFacts | None = None
    has_experts: bool = False


@dataclass(frozen=True)
class ExpertFacts:
    """Mixtures of experts.

    num_experts_per_tok: how many experts each token is given to.
    intermediate_size:   of one expert's MLP.
    normalises_weights:  whether the weights of a token's experts sum to 1.
    router_loss_coef:    factor of the router's loss in the training loss; 0 for none.
    """

    num_experts: int
    num_experts_per_tok: int
    intermediate_size: int
    normalises_weights: bool
    router_loss_coef: float = 0.0


@dataclass(frozen=True)
class AttentionKind:
    """The numbers of one layer's attention.

    scale:    factor of the products of queries and keys.
    window:   how many tokens, itself included, a token may look back on; None for all of them.
    soft_cap: scaled products s become soft_cap * tanh(s / soft_cap); None for no cap.
    """

    scale: float
    window: int | None = None
    soft_cap: float | None = None


@dataclass(frozen=True)
class BlockNormNames:
    """The norms of a layer by their names in the files: of what enters and leaves attention and MLP."""

    attention_input: str | None
    attention_output: str | None
    mlp_input: str | None
    mlp_output: str | None

    def __iter__(self) -> Iterator[str]:
        names = (self.attention_input, self.attention_output, self.mlp_input, self.mlp_output)
        return (name for name in names if name is not None)


# Hugging Face names norms by their place, so one name stands for different things.
BLOCK_NORM_NAMES: dict[BlockNorms, BlockNormNames] = {
    "before": BlockNormNames("input_layernorm", None, "post_attention_layernorm", None),
    "around": BlockNormNames(
        "input_layernorm",
        "post_attention_layernorm",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
    ),
    "after": BlockNormNames(None, "post_attention_layernorm", None, "post_feedforward_layernorm"),
}


@dataclass(frozen=True)
class ModelFacts:
    """Architecture of one decoder-only model. Sizes are named as in Hugging Face.

    rope:          the rotary embedding of every layer that has none of its own.
    layer_period:  kinds of layers, repeated over the depth; the last repetition may be cut short.
    qkv_bias, attention_output_bias, mlp_bias: which products add a vector.
    activation:    of the MLP's gate.
    norm_scale:    how a norm's weight w scales: w times the normed values after they are cast back to the
                   input's format ("after_cast"), before that ("before_cast"), or 1 + w before it.
    block_norms:   what the norms of a layer norm: the input of attention and MLP ("before"), their output
                   ("after"), or both ("around").
    qk_norm:       norms of queries and keys: of every head by itself, or of all of them as one vector.
    query_scale:   factor of the products of queries and keys; None: head_dim ** -0.5.
    attention_soft_cap, logit_soft_cap: a value v becomes cap * tanh(v / cap); None for no cap.
    embedding_scale: factor of the embedded tokens, rounded to the format they are in.
    experts:       of the layers that have them; None for a model without.
    """

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
    layer_period: tuple[LayerKind, ...] = (LayerKind(),)
    qkv_bias: bool = False
    attention_output_bias: bool = False
    mlp_bias: bool = False
    activation: Activation = "silu"
    norm_scale: NormScale = "after_cast"
    block_norms: BlockNorms = "before"
    qk_norm: QKNorm = "none"
    query_scale: float | None = None
    attention_soft_cap: float | None = None
    logit_soft_cap: float | None = None
    embedding_scale: float = 1.0
    experts: ExpertFacts | None = None

    @property
    def layer_kinds(self) -> tuple[LayerKind, ...]:
        """The kind of every layer, from the bottom."""
        return tuple(
            self.layer_period[layer % len(self.layer_period)] for layer in range(self.num_hidden_layers)
        )

    @property
    def ropes(self) -> tuple[RopeFacts, ...]:
        """The different rotary embeddings of the layers."""
        return tuple(dict.fromkeys(self.rope_of(kind) for kind in self.layer_kinds))

    @property
    def windows(self) -> frozenset[int | None]:
        """The different windows of the layers."""
        return frozenset(kind.window for kind in self.layer_kinds)

    @property
    def block_norm_names(self) -> BlockNormNames:
        return BLOCK_NORM_NAMES[self.block_norms]

    def rope_of(self, kind: LayerKind) -> RopeFacts:
        return kind.rope or self.rope

    def attention_of(self, kind: LayerKind) -> AttentionKind:
        scale = self.head_dim**-0.5 if self.query_scale is None else self.query_scale
        return AttentionKind(scale, kind.window, self.attention_soft_cap)

    def dim_units(self) -> dict[str, tuple[str, int]]:
        """dim -> (Hugging Face name, count) of the smallest pieces that a mesh axis may split it into.

        Attention projections are split by whole heads, so `heads` counts heads, not rows.
        """
        units = {
            "embed": ("hidden_size", self.hidden_size),
            "heads": ("num_attention_heads", self.num_attention_heads),
            "kv_heads": ("num_key_value_heads", self.num_key_value_heads),
        }
        if not all(kind.has_experts for kind in self.layer_kinds):
            units["mlp"] = ("intermediate_size", self.intermediate_size)
        if self.experts is not None:
            units["experts"] = ("num_experts", self.experts.num_experts)
            units["expert_mlp"] = ("the experts' intermediate size", self.experts.intermediate_size)
            units["expert_embed"] = units["embed"]
        return units
