"""Token-weighted cross-entropy in JAX, with the logits of one chunk of tokens at a time.

As in `tptrain.models.loss`: what a token weighs is known beforehand, so the gradients with respect to hidden
states and head follow as soon as the logits of a chunk are there, in three matrix products.

Shapes: B batch, T tokens, D model, V vocab, S batch shards, P chunks, N tokens of one chunk in one shard
(B / S x T / P).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp

from tptrain.jaxside.flax_layers import Mark, soft_capped, widened

Chunk = tuple[jax.Array, ...]
Gradients = tuple[jax.Array, jax.Array]

_STREAM = ("act_batch", "act_tokens", "act_embed")
_LOGITS = ("act_batch", "act_tokens", "act_vocab")
_HEADS = ("act_batch", "act_vocab", "act_embed")


@dataclass(frozen=True)
class LossChunks:
    """How the loss walks over a batch.

    tokens: tokens of every row at a time; it divides the row.
    shards: parts of the rows that different devices hold; within each of them the head's gradient is added up
            chunk by chunk, and over them once.
    """

    tokens: int
    shards: int = 1


@partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def chunked_loss(
    hidden: jax.Array,
    head: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    total: jax.Array,
    chunks: LossChunks,
    mark: Mark,
    soft_cap: float | None = None,
) -> jax.Array:
    """Sum over tokens of weight x negative log-likelihood, over the scalar `total`; float32 or wider.

    hidden [B, T, D], head [V, D], targets [B, T] integers, weights [B, T]. Gradients flow to hidden and head.
    """
    return _forward(hidden, head, targets, weights, total, chunks, mark, soft_cap)[0]


def _forward(
    hidden: jax.Array,
    head: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    total: jax.Array,
    chunks: LossChunks,
    mark: Mark,
    soft_cap: float | None,
) -> tuple[jax.Array, Gradients]:
    """The mean, and its gradients with respect to hidden states and head."""
    head = mark(head, "head", ("act_vocab", "act_embed"))
    cut = tuple(_cut(x, chunks) for x in (hidden, targets, weights))
    one_chunk = partial(_one_chunk, head=head, total=total, mark=mark, soft_cap=soft_cap)

    def body(
        carry: tuple[jax.Array, jax.Array], chunk: Chunk
    ) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
        loss, grad_x, grad_head = one_chunk(chunk)
        return (carry[0] + loss, carry[1] + mark(grad_head, "grad_head", _HEADS)), grad_x

    if len(cut[0]) == 1:
        loss, grad_x, grad_head = one_chunk((cut[0][0], cut[1][0], cut[2][0]))
        grads = grad_x[None]
    else:
        wide = jnp.promote_types(head.dtype, jnp.float32)
        start = mark(jnp.zeros((chunks.shards, *head.shape), wide), "grad_head", _HEADS)
        (loss, grad_head), grads = jax.lax.scan(body, (jnp.zeros((), wide), start), cut)
    grad_hidden = mark(_uncut(grads, hidden.shape), "grad_hidden", _STREAM)
    return loss / total, (grad_hidden, grad_head.astype(head.dtype).sum(0))


def _backward(
    chunks: LossChunks, mark: Mark, soft_cap: float | None, gradients: Gradients, gradient: jax.Array
) -> tuple[jax.Array | None, ...]:
    grad_hidden, grad_head = (gradient.astype(g.dtype) * g for g in gradients)
    return grad_hidden, grad_head, None, None, None


chunked_loss.defvjp(_forward, _backward)


def _one_chunk(
    chunk: Chunk, head: jax.Array, total: jax.Array, mark: Mark, soft_cap: float | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Sum of the loss, gradient of the hidden states, gradient of the head within each shard [S, V, D].

    chunk: hidden states [S, N, D], targets and weights [S, N]. The gradients are those of the sum / total.
    """
    x, targets, weights = chunk
    x = mark(x, "chunk", _STREAM)
    logits = soft_capped(mark(jnp.einsum("snd,vd->snv", x, head), "logits", _LOGITS), soft_cap)
    wide = widened(logits)
    log_sum = jax.nn.logsumexp(wide, axis=-1, keepdims=True)
    is_target = jnp.arange(wide.shape[-1]) == targets[..., None]
    at_target = jnp.where(is_target, wide, 0.0).sum(-1)
    loss = ((log_sum[..., 0] - at_target) * weights).sum()
    gradient = (jnp.exp(wide - log_sum) - is_target) * (weights / total)[..., None]
    if soft_cap is not None:
        gradient = gradient * (1 - jnp.square(wide / soft_cap))
    gradient = mark(gradient.astype(logits.dtype), "grad_logits", _LOGITS)
    grad_x = jnp.einsum("snv,vd->snd", gradient, head)
    return loss, grad_x, jnp.einsum("snv,snd->svd", gradient, x)


def _cut(x: jax.Array, chunks: LossChunks) -> jax.Array:
    """[B, T, ...] -> [P, S, N, ...]: the same tokens of all rows of a shard lie together."""
    rows, tokens, *rest = x.shape
    assert tokens % chunks.tokens == 0, "chunks divide the row"
    apart = x.reshape(chunks.shards, rows // chunks.shards, -1, chunks.tokens, *rest)
    return jnp.moveaxis(apart, 2, 0).reshape(-1, chunks.shards, rows // chunks.shards * chunks.tokens, *rest)


def _uncut(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The inverse of `_cut`, for a tensor that had this shape."""
    parts, shards, _, width = x.shape
    apart = x.reshape(parts, shards, shape[0] // shards, -1, width)
    return jnp.moveaxis(apart, 0, 2).reshape(shape)
