"""Splash attention, JAX's Pallas kernel for TPUs: as HLO modules for one device, and as a JAX function.

The forward module gives the attended values and the logsumexp of every row of scores. The backward module
takes both back, so that it works from what was saved; JAX's own gradient of the kernel, taken from outside,
would run the forward kernel again.

Shapes on one device: B batch, T tokens, N heads, K kv heads, H head dim. Query heads share a kv head in
groups of N / K neighbours; the kernel reads each kv head where it is, and nothing is repeated.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import cast

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
    """One attention call as one device sees it: everything that its program depends on.

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

    @property
    def query(self) -> jax.ShapeDtypeStruct:
        shape = (self.batch, self.tokens, self.heads, self.head_dim)
        return jax.ShapeDtypeStruct(shape, jnp.dtype(self.dtype))

    @property
    def key(self) -> jax.ShapeDtypeStruct:
        shape = (self.batch, self.tokens, self.kv_heads, self.head_dim)
        return jax.ShapeDtypeStruct(shape, jnp.dtype(self.dtype))

    @property
    def ids(self) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((self.batch, self.tokens), jnp.int32)

    @property
    def logsumexp(self) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((self.batch, self.heads, self.tokens), jnp.float32)


@cache
def splash_forward_hlo(call: SplashCall) -> bytes:
    """The module of (query [B, T, N, H], key [B, T, K, H], value, ids [B, T]) -> (attended, logsumexp).

    attended is like the query, logsumexp float32 [B, N, T], ids int32.
    """
    return _lower(partial(_forward, call), call, [call.query, call.key, call.key, call.ids])


@cache
def splash_backward_hlo(call: SplashCall) -> bytes:
    """The module of (query, key, value, ids, attended, logsumexp, gradient of attended) -> 3 gradients."""
    given = [call.query, call.key, call.key, call.ids, call.query, call.logsumexp, call.query]
    return _lower(partial(_backward, call), call, given)


def splash_attention(
    call: SplashCall, query: jax.Array, key: jax.Array, value: jax.Array, ids: jax.Array, name: str
) -> jax.Array:
    """The kernel for a JAX program, with its gradient.

    query [B, T, N, H], key and value [B, T, K, H], ids [B, T]; returns the attended values, like the query.
    name: of the attended values and their logsumexp, for `jax.checkpoint`: a policy that saves it keeps the
          forward kernel from running again in the backward pass.
    """
    kernel = _kernel(call, save_residuals=False, residual_checkpoint_name=name)

    def one_row(query: jax.Array, key: jax.Array, value: jax.Array, ids: jax.Array) -> jax.Array:
        return cast(jax.Array, kernel(query, key, value, SegmentIds(ids, ids)))

    query, key, value = _scaled(_swapped(query), call), _swapped(key), _swapped(value)
    return _swapped(jax.vmap(one_row)(query, key, value, ids))


def _forward(
    call: SplashCall, query: jax.Array, key: jax.Array, value: jax.Array, ids: jax.Array
) -> tuple[jax.Array, jax.Array]:
    kernel = _kernel(call)

    def one_row(query: jax.Array, key: jax.Array, value: jax.Array, ids: jax.Array) -> list[jax.Array]:
        attended, (logsumexp,) = kernel(query, key, value, SegmentIds(ids, ids))
        return [attended, logsumexp]

    query, key, value = _scaled(_swapped(query), call), _swapped(key), _swapped(value)
    attended, logsumexp = jax.vmap(one_row)(query, key, value, ids)
    return _swapped(attended), logsumexp


def _backward(
    call: SplashCall,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    ids: jax.Array,
    attended: jax.Array,
    logsumexp: jax.Array,
    gradient: jax.Array,
) -> tuple[jax.Array, ...]:
    kernel = _kernel(call)
    masks = (kernel.dq_mask_info, kernel.dkv_mask_info)

    def one_row(query, key, value, ids, attended, logsumexp, gradient):  # type: ignore[no-untyped-def]
        no_sinks = None
        saved = (query, key, value, SegmentIds(ids, ids), no_sinks, attended, logsumexp, *masks)
        # The result lists the forward call's arguments: the masks, query, key, value, ...
        return _splash_attention_bwd(**kernel.kwargs, res=saved, do=gradient)[3:6]

    query, key, value = _scaled(_swapped(query), call), _swapped(key), _swapped(value)
    given = (query, key, value, ids, _swapped(attended), logsumexp, _swapped(gradient))
    of_query, of_key, of_value = jax.vmap(one_row)(*given)
    return _swapped(_scaled(of_query, call)), _swapped(of_key), _swapped(of_value)


def _kernel(
    call: SplashCall, *, save_residuals: bool = True, residual_checkpoint_name: str | None = None
) -> SplashAttentionKernel:
    shape = (call.tokens, call.tokens)
    mask: CausalMask | LocalMask = CausalMask(shape)
    if call.window is not None:
        mask = LocalMask(shape, window_size=(call.window - 1, 0), offset=0)
    return make_splash_mha(
        mask=MultiHeadMask([mask] * call.heads),
        block_sizes=_block_sizes(call.blocks),
        save_residuals=save_residuals,
        residual_checkpoint_name=residual_checkpoint_name,
        attn_logits_soft_cap=call.soft_cap,
        head_shards=1,
        q_seq_shards=1,
        interpret=call.platform == "cpu",
    )


def _block_sizes(blocks: SplashBlocks) -> BlockSizes:
    # The separate kernel for the queries' gradient works on a whole tile of keys at a time.
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


def _swapped(x: jax.Array) -> jax.Array:
    """[B, T, N, H] <-> [B, N, T, H]."""
    return x.swapaxes(1, 2)


def _scaled(x: jax.Array, call: SplashCall) -> jax.Array:
    return (x * call.scale).astype(x.dtype)


def _lower(
    function: Callable[..., object], call: SplashCall, arguments: Sequence[jax.ShapeDtypeStruct]
) -> bytes:
    # By default a TPU rounds the operands of a float32 product to bfloat16.
    precision = "highest" if call.dtype == "float32" else "default"
    with jax.default_matmul_precision(precision):
        return lower_to_hlo(function, arguments, call.platform)
