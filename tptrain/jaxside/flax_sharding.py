"""A scanned Flax decoder on a mesh: shardings by the names of dims, and splash attention on each device."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import jax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh

from tptrain.config.kernels import SplashBlocks
from tptrain.family import AttentionKind
from tptrain.jaxside.flax_layers import AttentionCore, PlainAttention
from tptrain.jaxside.flax_scan import Passes
from tptrain.jaxside.lowering import Platform
from tptrain.jaxside.specs import named_sharding, partition_spec
from tptrain.jaxside.splash import SplashCall, splash_attention
from tptrain.mesh import Spec, spec_of
from tptrain.mesh.rules import Rule

_QUERY = ("act_batch", "act_tokens", "act_heads", "act_head_dim")
_KEY = ("act_batch", "act_tokens", "act_kv_heads", "act_head_dim")
_IDS = ("act_batch", "act_tokens")


@dataclass(frozen=True)
class MeshRules:
    """How a model lies on a mesh.

    acts:   dim -> mesh axes of activations.
    stacks: name of a stack -> spec of one layer of it.
    splash: the tiles of splash attention; None for plain attention.
    """

    mesh: Mesh
    acts: Mapping[str, Rule]
    stacks: Mapping[str, Spec]
    splash: SplashBlocks | None
    platform: Platform = "tpu"

    def passes(self, remat: str) -> Passes:
        """For a `ScannedDecoder` under a remat policy."""
        attention = PlainAttention if self.splash is None else _splash_core(self, self.splash)
        return Passes(remat, self._mark, self._hold, attention)

    def _mark(self, x: jax.Array, name: str, dims: tuple[str, ...]) -> jax.Array:
        sharding = named_sharding(self.mesh, spec_of(dims, self.acts))
        return checkpoint_name(jax.lax.with_sharding_constraint(x, sharding), name)

    def _hold(self, name: str, array: jax.Array) -> jax.Array:
        return jax.lax.with_sharding_constraint(array, named_sharding(self.mesh, self.stacks[name]))


def _splash_core(
    rules: MeshRules, blocks: SplashBlocks
) -> Callable[[jax.Array, Iterable[int | None]], AttentionCore]:
    query, key, ids = (partition_spec(spec_of(dims, rules.acts)) for dims in (_QUERY, _KEY, _IDS))

    def core(segment_ids: jax.Array, windows: Iterable[int | None]) -> AttentionCore:
        def attend(q: jax.Array, k: jax.Array, v: jax.Array, kind: AttentionKind) -> jax.Array:
            def on_device(q: jax.Array, k: jax.Array, v: jax.Array, i: jax.Array) -> jax.Array:
                return splash_attention(_call(q, k, kind, blocks, rules.platform), q, k, v, i, "attended")

            # The kernel says nothing of the axes that its result varies over.
            mapped = jax.shard_map(
                on_device, mesh=rules.mesh, in_specs=(query, key, key, ids), out_specs=query, check_vma=False
            )
            return mapped(q, k, v, segment_ids)

        return attend

    return core


def _call(
    query: jax.Array, key: jax.Array, kind: AttentionKind, blocks: SplashBlocks, platform: Platform
) -> SplashCall:
    """The call for the pieces of one device."""
    batch, tokens, heads, head_dim = query.shape
    return SplashCall(
        batch=batch,
        tokens=tokens,
        heads=heads,
        kv_heads=key.shape[2],
        head_dim=head_dim,
        dtype=query.dtype.name,
        scale=kind.scale,
        window=kind.window,
        soft_cap=kind.soft_cap,
        blocks=blocks,
        platform=platform,
    )
