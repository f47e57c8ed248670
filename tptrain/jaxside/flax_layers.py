"""The layers of the Flax decoder: the mathematics of `tptrain.models` in JAX.

Every module takes its own parameters as a flat dict, named from itself downwards, and holds each under the
attribute path of the same name.

Shapes: B batch, T query tokens, S key tokens, D model, N heads, K kv heads, G = N / K, H head dim, F mlp,
V vocab.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tptrain.family import LayerKind, ModelFacts, RopeFacts

Params = Mapping[str, jax.Array]
# (activation, its name, the names of its dims) -> the same activation.
Mark = Callable[[jax.Array, str, tuple[str, ...]], jax.Array]
# (query [B, T, N, H], key [B, S, K, H], value, the layer's window) -> attended values [B, T, N, H].
AttentionCore = Callable[[jax.Array, jax.Array, jax.Array, int | None], jax.Array]
# (segment_ids [B, T], the windows of the model's layers) -> the core for those rows.
CoreFactory = Callable[[jax.Array, Iterable[int | None]], AttentionCore]

_STREAM = ("act_batch", "act_tokens", "act_embed")
_QUERY = ("act_batch", "act_tokens", "act_heads", "act_head_dim")
_KEY = ("act_batch", "act_tokens", "act_kv_heads", "act_head_dim")
_HIDDEN = ("act_batch", "act_tokens", "act_mlp")


@dataclass
class LayerContext:
    """What every layer reads and none changes.

    cos, sin:  [B, T, 1, H] of the rotary embedding.
    attention: how queries, keys and values become attended values; knows the segments of the rows.
    mark:      acts on the activations that matter, named as in `tptrain.models`.
    """

    cos: jax.Array
    sin: jax.Array
    attention: AttentionCore
    mark: Mark


class Linear(nnx.Module):
    """x [..., in] -> [..., out]; with a bias where the parameters have one."""

    def __init__(self, params: Params):
        self.weight = nnx.Param(params["weight"])
        self.bias = nnx.Param(params["bias"]) if "bias" in params else None

    def __call__(self, x: jax.Array) -> jax.Array:
        product = jnp.einsum("...i,oi->...o", x, self.weight[...])
        return product if self.bias is None else product + self.bias[...]


class Embedding(nnx.Module):
    """A row of [V, D] for every token, and the scores of all tokens where the head is tied to it."""

    def __init__(self, params: Params):
        self.weight = nnx.Param(params["weight"])

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Tokens [B, T] -> [B, T, D]; one outside the vocabulary gives NaN, never another token's row."""
        rows = self.weight[...].at[tokens]
        return rows.get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)

    def scores(self, x: jax.Array) -> jax.Array:
        return jnp.einsum("...d,vd->...v", x, self.weight[...])


class RMSNorm(nnx.Module):
    """Root-mean-square norm (arXiv:1910.07467); the mean in float32 or wider, the scale in x's format."""

    def __init__(self, params: Params, eps: float):
        self.weight = nnx.Param(params["weight"])
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = widened(x)
        scale = jax.lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + self.eps)
        return self.weight[...] * (wide * scale).astype(x.dtype)


class Attention(nnx.Module):
    """Self-attention with grouped queries and rotary embedding."""

    def __init__(self, facts: ModelFacts, kind: LayerKind, params: Params):
        self.q_proj = Linear(under(params, "q_proj"))
        self.k_proj = Linear(under(params, "k_proj"))
        self.v_proj = Linear(under(params, "v_proj"))
        self.o_proj = Linear(under(params, "o_proj"))
        self.head_dim, self.window = facts.head_dim, kind.window

    def __call__(self, x: jax.Array, context: LayerContext) -> jax.Array:
        """x [B, T, D] -> [B, T, D]."""
        query = rotate(self._to_heads(x, self.q_proj), context.cos, context.sin)
        key = rotate(self._to_heads(x, self.k_proj), context.cos, context.sin)
        value = self._to_heads(x, self.v_proj)
        query = context.mark(query, "query", _QUERY)
        key, value = context.mark(key, "key", _KEY), context.mark(value, "value", _KEY)
        return self._from_heads(context.attention(query, key, value, self.window), self.o_proj)

    # Products with heads as a dim of their own: a TPU's compiler lays the result of a flat product out once
    # more before attention can read it.

    def _to_heads(self, x: jax.Array, linear: Linear) -> jax.Array:
        """x [B, T, D] -> [B, T, heads, H]."""
        weight = linear.weight[...].reshape(-1, self.head_dim, x.shape[-1])
        heads = jnp.einsum("btd,nhd->btnh", x, weight)
        return heads if linear.bias is None else heads + linear.bias[...].reshape(-1, self.head_dim)

    def _from_heads(self, heads: jax.Array, linear: Linear) -> jax.Array:
        """heads [B, T, N, H] -> [B, T, D]."""
        weight = linear.weight[...].reshape(-1, *heads.shape[2:])
        x = jnp.einsum("btnh,dnh->btd", heads, weight)
        return x if linear.bias is None else x + linear.bias[...]


class MLP(nnx.Module):
    """Gated MLP: down(silu(gate(x)) * up(x)), as in arXiv:2002.05202."""

    def __init__(self, params: Params):
        self.gate_proj = Linear(under(params, "gate_proj"))
        self.up_proj = Linear(under(params, "up_proj"))
        self.down_proj = Linear(under(params, "down_proj"))

    def __call__(self, x: jax.Array, mark: Mark) -> jax.Array:
        gate, up = mark(self.gate_proj(x), "gate", _HIDDEN), mark(self.up_proj(x), "up", _HIDDEN)
        return self.down_proj(mark(jax.nn.silu(gate) * up, "mlp_hidden", _HIDDEN))


class Block(nnx.Module):
    """One decoder layer: attention and MLP, each on a normed input and added to the residual stream."""

    def __init__(self, facts: ModelFacts, kind: LayerKind, params: Params):
        eps = facts.rms_norm_eps
        self.self_attn = Attention(facts, kind, under(params, "self_attn"))
        self.mlp = MLP(under(params, "mlp"))
        self.input_layernorm = RMSNorm(under(params, "input_layernorm"), eps)
        self.post_attention_layernorm = RMSNorm(under(params, "post_attention_layernorm"), eps)

    def __call__(self, x: jax.Array, context: LayerContext) -> jax.Array:
        attention_input = context.mark(self.input_layernorm(x), "attention_input", _STREAM)
        x = context.mark(x + self.self_attn(attention_input, context), "after_attention", _STREAM)
        mlp_input = context.mark(self.post_attention_layernorm(x), "mlp_input", _STREAM)
        return context.mark(x + self.mlp(mlp_input, context.mark), "after_mlp", _STREAM)


class LayerList(nnx.List[Block]):
    """The layers, run one after the other."""

    def __call__(self, x: jax.Array, context: LayerContext) -> jax.Array:
        for layer in self:
            x = layer(x, context)
        return x


def unmarked(x: jax.Array, name: str, dims: tuple[str, ...]) -> jax.Array:
    """The mark that does nothing."""
    return x


class PlainAttention:
    """The mathematics as it is written, with all [T, S] scores in memory.

    masks: window -> bool [B, T, S], who may look at whom.
    """

    def __init__(self, segment_ids: jax.Array, windows: Iterable[int | None]):
        self.masks = {window: causal_mask(segment_ids, window) for window in windows}

    def __call__(self, query: jax.Array, key: jax.Array, value: jax.Array, window: int | None) -> jax.Array:
        # Heads share keys by grouping, so keys are never repeated in memory.
        grouped = query.reshape(*query.shape[:2], key.shape[2], -1, query.shape[-1])
        scores = jnp.einsum("btkgh,bskh->bkgts", grouped, key)
        weights = attention_weights(scores, self.masks[window], query.shape[-1] ** -0.5)
        return jnp.einsum("bkgts,bskh->btkgh", weights, value).reshape(query.shape)


class Body(nnx.Module):
    """Embedding, layers and final norm: what Hugging Face names `model`.

    layers: the blocks, as a module that runs them. attention, mark: see `LayerContext`.
    """

    def __init__(
        self,
        facts: ModelFacts,
        params: Params,
        layers: Callable[[jax.Array, LayerContext], jax.Array],
        attention: CoreFactory = PlainAttention,
        mark: Mark = unmarked,
    ):
        self.facts, self.attention, self.mark = facts, attention, mark
        self.embed_tokens = Embedding(under(params, "embed_tokens"))
        self.layers = layers
        self.norm = RMSNorm(under(params, "norm"), facts.rms_norm_eps)

    def __call__(self, tokens: jax.Array, positions: jax.Array, segment_ids: jax.Array) -> jax.Array:
        """Hidden states [B, T, D] after the final norm."""
        x = self.mark(self.embed_tokens(tokens), "embedded", _STREAM)
        frequencies = inverse_frequencies(self.facts.rope, self.facts.head_dim)
        cos, sin = rotation(positions, frequencies, x.dtype)
        attention = self.attention(segment_ids, {kind.window for kind in self.facts.layer_period})
        return self.norm(self.layers(x, LayerContext(cos, sin, attention, self.mark)))


def layer_list(facts: ModelFacts, params: Params) -> LayerList:
    """A block for every layer; params by names such as `0.mlp.up_proj.weight`."""
    period = facts.layer_period
    kinds = [period[i % len(period)] for i in range(facts.num_hidden_layers)]
    return LayerList(Block(facts, kind, under(params, str(i))) for i, kind in enumerate(kinds))


def causal_mask(segment_ids: jax.Array, window: int | None) -> jax.Array:
    """Who may look at whom: the same segment, not later, at most `window` tokens back, itself included.

    segment_ids [B, T] -> bool [B, T, S=T]; every row of the mask allows something.
    """
    steps = jnp.arange(segment_ids.shape[1])
    back = steps[:, None] - steps[None, :]
    near = back >= 0 if window is None else (back >= 0) & (back < window)
    return near[None] & (segment_ids[:, :, None] == segment_ids[:, None, :])


def attention_weights(scores: jax.Array, mask: jax.Array, scale: float) -> jax.Array:
    """Softmax over keys in float32 or wider: scores [B, K, G, T, S], mask [B, T, S] -> like scores."""
    wide = widened(scores * scale)
    blocked = jnp.finfo(wide.dtype).min
    return jax.nn.softmax(jnp.where(mask[:, None, None], wide, blocked), axis=-1).astype(scores.dtype)


def inverse_frequencies(rope: RopeFacts, head_dim: int) -> np.ndarray:
    """Rotation per position of each pair of channels, in radians. Returns [H / 2] float32.

    Computed on the host in float32, in the order of operations that transformers uses: with positions in
    the thousands, the last bits of a frequency are visible in the logits.
    """
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    frequencies = 1 / np.float32(rope.theta) ** exponents
    if rope.kind == "linear":
        return frequencies / np.float32(rope.factor)
    if rope.kind == "llama3":
        return _llama3_scaled(frequencies, rope)
    return frequencies


def _llama3_scaled(frequencies: np.ndarray, rope: RopeFacts) -> np.ndarray:
    """Llama 3.1's scaling: long waves divided by `factor`, short ones kept, a blend in between."""
    low, high = rope.low_freq_factor, rope.high_freq_factor
    waves_in_context = rope.original_max_position_embeddings / (2 * math.pi / frequencies)
    divided = frequencies / rope.factor
    blend = (waves_in_context - low) / (high - low)
    blended = (1 - blend) * divided + blend * frequencies
    chosen = np.where(
        waves_in_context < low, divided, np.where(waves_in_context > high, frequencies, blended)
    )
    return chosen.astype(np.float32)


def rotation(positions: jax.Array, frequencies: np.ndarray, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine of every angle: positions [B, T], frequencies [H / 2] -> two of [B, T, 1, H]."""
    wide = jnp.promote_types(dtype, jnp.float32)
    angles = jnp.asarray(positions, wide)[:, :, None] * frequencies.astype(wide)
    both = jnp.concatenate([angles, angles], axis=-1)[:, :, None, :]
    return jnp.cos(both).astype(dtype), jnp.sin(both).astype(dtype)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotate channel i with channel i + H/2 (Hugging Face's layout): x [B, T, N, H]."""
    first, second = jnp.split(x, 2, axis=-1)
    return x * cos + jnp.concatenate([-second, first], axis=-1) * sin


def widened(x: jax.Array) -> jax.Array:
    """x in float32, or as it is where that is wider."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def under(params: Params, prefix: str) -> dict[str, jax.Array]:
    """The parameters whose names begin with `prefix.`, by the rest of their names."""
    start = f"{prefix}."
    return {name.removeprefix(start): array for name, array in params.items() if name.startswith(start)}
