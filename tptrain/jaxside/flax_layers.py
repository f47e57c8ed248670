"""The layers of the Flax decoder: the mathematics of `tptrain.models` in JAX.

Every module takes its own parameters as a flat dict, named from itself downwards, and holds each under the
attribute path of the same name.

Shapes: B batch, T query tokens, S key tokens, D model, N heads, K kv heads, G = N / K, H head dim, F mlp,
V vocab, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tptrain.family import AttentionKind, LayerKind, ModelFacts, RopeFacts
from tptrain.family.facts import Activation

Params = Mapping[str, jax.Array]
# (activation, its name, the names of its dims) -> the same activation.
Mark = Callable[[jax.Array, str, tuple[str, ...]], jax.Array]
# (query [B, T, N, H], key [B, S, K, H], value, the layer's numbers) -> attended values [B, T, N, H].
AttentionCore = Callable[[jax.Array, jax.Array, jax.Array, AttentionKind], jax.Array]
# (segment_ids [B, T], the windows of the model's layers) -> the core for those rows.
CoreFactory = Callable[[jax.Array, Iterable[int | None]], AttentionCore]

_STREAM = ("act_batch", "act_tokens", "act_embed")
_QUERY = ("act_batch", "act_tokens", "act_heads", "act_head_dim")
_KEY = ("act_batch", "act_tokens", "act_kv_heads", "act_head_dim")
_HIDDEN = ("act_batch", "act_tokens", "act_mlp")


@dataclass
class LayerContext:
    """What every layer reads and none changes.

    rotations: cosine and sine of every rotary embedding of the model, each [B, T, 1, H].
    attention: how queries, keys and values become attended values; knows the segments of the rows.
    mark:      acts on the activations that matter, named as in `tptrain.models`.
    counted:   [B, T], 1 for the tokens of the router's loss and 0 for others; None where it is not asked for.
    """

    rotations: Mapping[RopeFacts, tuple[jax.Array, jax.Array]]
    attention: AttentionCore
    mark: Mark
    counted: jax.Array | None = None


class LayerResult(NamedTuple):
    """x [B, T, D]; the router's sums, [2, E] for each layer with experts (perhaps stacked), where they are
    asked for."""

    x: jax.Array
    router_sums: list[jax.Array]


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
    """Root-mean-square norm (arXiv:1910.07467); the mean in float32 or wider.

    How the weight acts is told by `ModelFacts.norm_scale`.
    """

    def __init__(self, facts: ModelFacts, params: Params):
        self.weight = nnx.Param(params["weight"])
        self.eps, self.scale = facts.rms_norm_eps, facts.norm_scale

    def __call__(self, x: jax.Array) -> jax.Array:
        wide, weight = widened(x), self.weight[...]
        normed = wide * jax.lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + self.eps)
        if self.scale == "after_cast":
            return weight * normed.astype(x.dtype)
        return (normed * (1 + widened(weight) if self.scale == "one_plus" else weight)).astype(x.dtype)


class Attention(nnx.Module):
    """Self-attention with grouped queries and rotary embedding; queries and keys may be normed before it."""

    def __init__(self, facts: ModelFacts, kind: LayerKind, params: Params):
        self.q_proj = Linear(under(params, "q_proj"))
        self.k_proj = Linear(under(params, "k_proj"))
        self.v_proj = Linear(under(params, "v_proj"))
        self.o_proj = Linear(under(params, "o_proj"))
        has_norms = facts.qk_norm != "none"
        self.q_norm = RMSNorm(facts, under(params, "q_norm")) if has_norms else None
        self.k_norm = RMSNorm(facts, under(params, "k_norm")) if has_norms else None
        self.head_dim, self.kind, self.rope = facts.head_dim, facts.attention_of(kind), facts.rope_of(kind)

    def __call__(self, x: jax.Array, context: LayerContext) -> jax.Array:
        """x [B, T, D] -> [B, T, D]."""
        turn = context.rotations[self.rope]
        query = rotate(_normed_heads(self._to_heads(x, self.q_proj), self.q_norm), *turn)
        key = rotate(_normed_heads(self._to_heads(x, self.k_proj), self.k_norm), *turn)
        value = self._to_heads(x, self.v_proj)
        query = context.mark(query, "query", _QUERY)
        key, value = context.mark(key, "key", _KEY), context.mark(value, "value", _KEY)
        return self._from_heads(context.attention(query, key, value, self.kind), self.o_proj)

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


def _normed_heads(heads: jax.Array, norm: RMSNorm | None) -> jax.Array:
    """heads [B, T, heads, H] normed one by one, or all of a token together: the norm's size tells."""
    if norm is None:
        return heads
    if norm.weight[...].shape[0] == heads.shape[-1]:
        return norm(heads)
    return norm(heads.reshape(*heads.shape[:2], -1)).reshape(heads.shape)


ACTIVATIONS: dict[Activation, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu_pytorch_tanh": partial(jax.nn.gelu, approximate=True),
}


class MLP(nnx.Module):
    """Gated MLP: down(activation(gate(x)) * up(x)), as in arXiv:2002.05202."""

    def __init__(self, facts: ModelFacts, params: Params):
        self.activation = ACTIVATIONS[facts.activation]
        self.gate_proj = Linear(under(params, "gate_proj"))
        self.up_proj = Linear(under(params, "up_proj"))
        self.down_proj = Linear(under(params, "down_proj"))

    def __call__(self, x: jax.Array, mark: Mark) -> jax.Array:
        gate, up = mark(self.gate_proj(x), "gate", _HIDDEN), mark(self.up_proj(x), "up", _HIDDEN)
        return self.down_proj(mark(self.activation(gate) * up, "mlp_hidden", _HIDDEN))


class Router(nnx.Module):
    """Probabilities of all experts: x [B, T, D] -> float32 (or wider) [B, T, E]."""

    def __init__(self, params: Params):
        self.weight = nnx.Param(params["weight"])

    def __call__(self, x: jax.Array) -> jax.Array:
        return jax.nn.softmax(widened(jnp.einsum("btd,ed->bte", x, self.weight[...])), axis=-1)


class ExpertMatrix(nnx.Module):
    """One matrix of every expert: [E, out, in]."""

    def __init__(self, params: Params):
        self.weight = nnx.Param(params["weight"])


class Experts(nnx.Module):
    """The matrices of all experts of a layer."""

    def __init__(self, params: Params):
        self.gate_proj = ExpertMatrix(under(params, "gate_proj"))
        self.up_proj = ExpertMatrix(under(params, "up_proj"))
        self.down_proj = ExpertMatrix(under(params, "down_proj"))


class MixtureOfExperts(nnx.Module):
    """Router and experts (arXiv:2401.04088), every expert computed for every token, one after the other."""

    def __init__(self, facts: ModelFacts, params: Params):
        assert facts.experts is not None, "a layer with experts is in a model that says how many"
        self.gate, self.experts = Router(under(params, "gate")), Experts(under(params, "experts"))
        self.facts, self.activation = facts.experts, ACTIVATIONS[facts.activation]

    def __call__(self, x: jax.Array, counted: jax.Array | None) -> tuple[jax.Array, jax.Array | None]:
        """x [B, T, D] -> [B, T, D], and the router's sums [2, E] over the `counted` tokens, if given.

        The sums are how often each expert was chosen, and its probabilities.
        """
        probabilities = self.gate(x)
        _, choices = jax.lax.top_k(probabilities, self.facts.num_experts_per_tok)
        chosen = (choices[..., None] == jnp.arange(self.facts.num_experts)).any(-2)
        weights = jnp.where(chosen, probabilities, 0)
        if self.facts.normalises_weights:
            weights = weights / weights.sum(-1, keepdims=True)
        experts = self.experts
        matrices = [each.weight[...] for each in (experts.gate_proj, experts.up_proj, experts.down_proj)]

        def add(total: jax.Array, expert: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
            weight, gate, up, down = expert
            hidden = self.activation(x @ gate.T) * (x @ up.T)
            return total + weight[..., None] * (hidden @ down.T), None

        by_expert = jnp.moveaxis(weights.astype(x.dtype), -1, 0)
        # Each expert's products are made again in the backward pass, or those of all would be kept.
        add = jax.checkpoint(add, prevent_cse=False)
        y = jax.lax.scan(add, jnp.zeros_like(x), (by_expert, *matrices))[0]
        if counted is None:
            return y, None
        share = counted[..., None].astype(probabilities.dtype)
        return y, jnp.stack([(each * share).sum((0, 1)) for each in (chosen, probabilities)])


def router_loss(sums: jax.Array, tokens: jax.Array) -> jax.Array:
    """From the router's sums [2, E] over `tokens`, each once per layer: see `tptrain.models.experts`."""
    chosen, probability = sums / jnp.maximum(tokens, 1)
    return sums.shape[-1] * (chosen * probability).sum()


class Block(nnx.Module):
    """One decoder layer: attention and MLP, each added to the residual stream, with norms around them."""

    def __init__(self, facts: ModelFacts, kind: LayerKind, params: Params):
        self.self_attn = Attention(facts, kind, under(params, "self_attn"))
        self.mlp = (MixtureOfExperts if kind.has_experts else MLP)(facts, under(params, "mlp"))
        self.norms = facts.block_norm_names
        for name in self.norms:
            setattr(self, name, RMSNorm(facts, under(params, name)))

    def __call__(self, x: jax.Array, context: LayerContext) -> LayerResult:
        given = context.mark(self._normed(x, self.norms.attention_input), "attention_input", _STREAM)
        attended = self._normed(self.self_attn(given, context), self.norms.attention_output)
        x = context.mark(x + attended, "after_attention", _STREAM)
        given = context.mark(self._normed(x, self.norms.mlp_input), "mlp_input", _STREAM)
        sums: jax.Array | None = None
        if isinstance(self.mlp, MixtureOfExperts):
            output, sums = self.mlp(given, context.counted)
        else:
            output = self.mlp(given, context.mark)
        x = context.mark(x + self._normed(output, self.norms.mlp_output), "after_mlp", _STREAM)
        return LayerResult(x, [] if sums is None else [sums])

    def _normed(self, x: jax.Array, norm: str | None) -> jax.Array:
        return x if norm is None else getattr(self, norm)(x)


class LayerList(nnx.List[Block]):
    """The layers, run one after the other."""

    def __call__(self, x: jax.Array, context: LayerContext) -> LayerResult:
        sums: list[jax.Array] = []
        for layer in self:
            x, more = layer(x, context)
            sums += more
        return LayerResult(x, sums)


def unmarked(x: jax.Array, name: str, dims: tuple[str, ...]) -> jax.Array:
    """The mark that does nothing."""
    return x


class PlainAttention:
    """The mathematics as it is written, with all [T, S] scores in memory.

    masks: window -> bool [B, T, S], who may look at whom.
    """

    def __init__(self, segment_ids: jax.Array, windows: Iterable[int | None]):
        self.masks = {window: causal_mask(segment_ids, window) for window in windows}

    def __call__(self, query: jax.Array, key: jax.Array, value: jax.Array, kind: AttentionKind) -> jax.Array:
        # Heads share keys by grouping, so keys are never repeated in memory.
        grouped = query.reshape(*query.shape[:2], key.shape[2], -1, query.shape[-1])
        scores = jnp.einsum("btkgh,bskh->bkgts", grouped, key)
        weights = attention_weights(scores, self.masks[kind.window], kind.scale, kind.soft_cap)
        return jnp.einsum("bkgts,bskh->btkgh", weights, value).reshape(query.shape)


class Body(nnx.Module):
    """Embedding, layers and final norm: what Hugging Face names `model`.

    layers: the blocks, as a module that runs them. attention, mark: see `LayerContext`.
    """

    def __init__(
        self,
        facts: ModelFacts,
        params: Params,
        layers: Callable[[jax.Array, LayerContext], LayerResult],
        attention: CoreFactory = PlainAttention,
        mark: Mark = unmarked,
    ):
        self.facts, self.attention, self.mark = facts, attention, mark
        self.embed_tokens = Embedding(under(params, "embed_tokens"))
        self.layers = layers
        self.norm = RMSNorm(facts, under(params, "norm"))

    def __call__(self, tokens: jax.Array, positions: jax.Array, segment_ids: jax.Array) -> jax.Array:
        """Hidden states [B, T, D] after the final norm."""
        return self._run(tokens, positions, segment_ids, None).x

    def with_router_loss(
        self, tokens: jax.Array, positions: jax.Array, segment_ids: jax.Array
    ) -> tuple[jax.Array, jax.Array | None]:
        """The same, and the router's loss over all real tokens times its coefficient: a scalar to be added to
        the training loss, or None where the coefficient is 0. See `tptrain.models.decoder`."""
        experts = self.facts.experts
        if experts is None or not experts.router_loss_coef:
            return self(tokens, positions, segment_ids), None
        counted = segment_ids > 0
        x, sums = self._run(tokens, positions, segment_ids, counted)
        layers = jnp.concatenate([each.reshape(-1, *each.shape[-2:]) for each in sums])
        return x, experts.router_loss_coef * router_loss(layers.sum(0), counted.sum() * len(layers))

    def _run(
        self, tokens: jax.Array, positions: jax.Array, segment_ids: jax.Array, counted: jax.Array | None
    ) -> LayerResult:
        x = self.embed_tokens(tokens)
        if self.facts.embedding_scale != 1:
            x = x * jnp.asarray(self.facts.embedding_scale, x.dtype)
        x = self.mark(x, "embedded", _STREAM)
        rotations = {
            rope: rotation(positions, inverse_frequencies(rope, self.facts.head_dim), x.dtype)
            for rope in self.facts.ropes
        }
        attention = self.attention(segment_ids, self.facts.windows)
        x, sums = self.layers(x, LayerContext(rotations, attention, self.mark, counted))
        return LayerResult(self.norm(x), sums)


def layer_list(facts: ModelFacts, params: Params) -> LayerList:
    """A block for every layer; params by names such as `0.mlp.up_proj.weight`."""
    return LayerList(Block(facts, kind, under(params, str(i))) for i, kind in enumerate(facts.layer_kinds))


def causal_mask(segment_ids: jax.Array, window: int | None) -> jax.Array:
    """Who may look at whom: the same segment, not later, at most `window` tokens back, itself included.

    segment_ids [B, T] -> bool [B, T, S=T]; every row of the mask allows something.
    """
    steps = jnp.arange(segment_ids.shape[1])
    back = steps[:, None] - steps[None, :]
    near = back >= 0 if window is None else (back >= 0) & (back < window)
    return near[None] & (segment_ids[:, :, None] == segment_ids[:, None, :])


def attention_weights(
    scores: jax.Array, mask: jax.Array, scale: float, soft_cap: float | None = None
) -> jax.Array:
    """Softmax over keys in float32 or wider: scores [B, K, G, T, S], mask [B, T, S] -> like scores."""
    wide = soft_capped(widened(scores * scale), soft_cap)
    blocked = jnp.finfo(wide.dtype).min
    return jax.nn.softmax(jnp.where(mask[:, None, None], wide, blocked), axis=-1).astype(scores.dtype)


def soft_capped(x: jax.Array, cap: float | None) -> jax.Array:
    """cap * tanh(x / cap), computed in float32 or wider, in the format of x; x itself for None."""
    return x if cap is None else (cap * jnp.tanh(widened(x) / cap)).astype(x.dtype)


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
