"""Splash attention, JAX's Pallas kernel for TPUs, as HLO modules for one device.

The forward module gives the attended values and the logsumexp of every row of scores. The backward module
takes both back, so that it works from what was saved; JAX's own gradient of the kernel, taken from outside,
would run the forward kernel again.

Shapes on one device: B batch, T tokens, N heads, K kv heads, H head dim. Query heads share a kv head in
groups of N / K neighbours; the kernel reads each kv head where it is, and nothing is repeated.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import (
    BlockSizes,
    CausalMask,
    LocalMask,
    MultiHeadMask,
    SegmentIds,
    make_splash_mha,
)

# The backward pass on given residuals has no public name; jax is pinned to one version.
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_kernel import (
    SplashAttentionKernel,
    _splash_attention_bwd,
)

from tptrain.config.kernels import SplashBlocks
from tptrain.jaxside.lowering import Platform, lower_to_hlo


@dataclass(frozen=True)
class SplashCall:
    """One attention call as one device sees it: everything the program depends on.

    dtype:    of queries, keys and values, by its name in numpy ("bfloat16").
    scale, window, soft_cap: as in `tptrain.models.attention.AttentionKind`.
    platform: "tpu", or "cpu" for the Pallas interpreter, which is for tests: it is slow.
    """

    batch: int
    tokens: int
    heads: int
    kv_heads: int
    head_dim: int
    dtype: str
    scale: float
    window: int | None
    soft_cap: float | None
    blocks: SplashBlocks
    platform: Platform


@cache
def forward_hlo(call: SplashCall) -> bytes:
    """(query [B, T, N, H], key [B, T, K, H], value, segment_ids int32 [B, T]) -> (attended, logsumexp).

    attended is [B, T, N, H] in the format of the queries, logsumexp float32 [B, N, T].
    """
    kernel = _kernel(call)

    def row(query: jax.Array, key: jax.Array, value: jax.Array, ids: jax.Array) -> tuple[jax.Array, ...]:
        attended, (logsumexp,) = kernel(_scaled(query, call), key, value, SegmentIds(ids, ids))
        return attended, logsumexp

    def forward(query: jax.Array, key: jax.Array, value: jax.Array, ids: jax.Array) -> tuple[jax.Array, ...]:
        heads_first = (_swapped(x) for x in (query, key, value))
        attended, logsumexp = jax.vmap(row)(*heads_first, ids)
        return _swapped(attended), logsumexp

    return _lower(forward, call, _inputs(call))


@cache
def backward_hlo(call: SplashCall) -> bytes:
    """(query, key, value, segment_ids, attended, logsumexp, gradient of attended) -> gradients of the first 3."""
    kernel = _kernel(call)

    def row(query, key, value, ids, attended, logsumexp, gradient):  # type: ignore[no-untyped-def]
        residuals = (
            *(_scaled(query, call), key, value, SegmentIds(ids, ids), None, attended, logsumexp),
            *(kernel.dq_mask_info, kernel.dkv_mask_info),
        )
        gradients = _splash_attention_bwd(**kernel.kwargs, res=residuals, do=gradient)
        d_query, d_key, d_value = gradients[3:6]
        return _scaled(d_query, call), d_key, d_value

    def backward(query, key, value, ids, attended, logsumexp, gradient):  # type: ignore[no-untyped-def]
        query, key, value, attended, gradient = map(_swapped, (query, key, value, attended, gradient))
        gradients = jax.vmap(row)(query, key, value, ids, attended, logsumexp, gradient)
        return tuple(map(_swapped, gradients))

    saved = _struct(call, call.heads), jax.ShapeDtypeStruct((call.batch, call.heads, call.tokens), jnp.float32)
    return _lower(backward, call, [*_inputs(call), *saved, _struct(call, call.heads)])


def _kernel(call: SplashCall) -> SplashAttentionKernel:
    shape = (call.tokens, call.tokens)
    if call.window is None:
        mask: CausalMask | LocalMask = CausalMask(shape)
    else:
        mask = LocalMask(shape, window_size=(call.window - 1, 0), offset=0)
    return make_splash_mha(
        mask=MultiHeadMask([mask] * call.heads),
        block_sizes=_block_sizes(call.blocks),
        save_residuals=True,
        attn_logits_soft_cap=call.soft_cap,
        head_shards=1,
        q_seq_shards=1,
        interpret=call.platform == "cpu",
    )


def _block_sizes(blocks: SplashBlocks) -> BlockSizes:
    # The kernel for the queries' gradient has no inner loop over a tile's keys; the fused one takes its place.
    separate = not blocks.fused_backward
    return BlockSizes(
        block_q=blocks.query,
        block_kv=blocks.key,
        block_kv_compute=blocks.key_compute,
        block_q_dkv=blocks.query,
        block_kv_dkv=blocks.key,
        block_kv_dkv_compute=blocks.key_compute,
        block_q_dq=blocks.query if separate else None,
        block_kv_dq=blocks.key_compute if separate else None,
        use_fused_bwd_kernel=blocks.fused_backward,
    )


def _inputs(call: SplashCall) -> list[jax.ShapeDtypeStruct]:
    kv = _struct(call, call.kv_heads)
    ids = jax.ShapeDtypeStruct((call.batch, call.tokens), jnp.int32)
    return [_struct(call, call.heads), kv, kv, ids]


def _struct(call: SplashCall, heads: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((call.batch, call.tokens, heads, call.head_dim), jnp.dtype(call.dtype))


def _swapped(x: jax.Array) -> jax.Array:
    """[B, T, N, H] <-> [B, N, T, H]."""
    return x.swapaxes(1, 2)


def _scaled(x: jax.Array, call: SplashCall) -> jax.Array:
    return (x * call.scale).astype(x.dtype)


def _lower(function: Any, call: SplashCall, arguments: list[jax.ShapeDtypeStruct]) -> bytes:
    precision = "highest" if call.dtype == "float32" else "default"
    with jax.default_matmul_precision(precision):
        return lower_to_hlo(function, arguments, call.platform)
