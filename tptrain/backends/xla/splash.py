"""Splash attention in the traced graph: JAX's kernel on each device's piece, and its gradient.

A device holds its rows and heads whole, so the kernel needs nothing of the others. The graph leaves automatic
partitioning around it: `DeviceMesh.piece` gives the pieces, `DeviceMesh.whole` puts results together.
Shapes: B batch, T tokens, N heads, K kv heads, H head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tptrain.backends.xla.jax_call import traced_call
from tptrain.backends.xla.sharding import DeviceMesh
from tptrain.config.kernels import SplashBlocks
from tptrain.family import AttentionKind
from tptrain.jaxside.lowering import Platform
from tptrain.jaxside.splash import SplashCall, splash_backward_hlo, splash_forward_hlo
from tptrain.mesh.rules import Rule, spec_of
from tptrain.models.attention import AttentionCore, CoreFactory
from tptrain.models.marks import Marks

Dims = tuple[str, ...]

_QUERY: Dims = ("act_batch", "act_tokens", "act_heads", "act_head_dim")
_KV: Dims = ("act_batch", "act_tokens", "act_kv_heads", "act_head_dim")
_IDS: Dims = ("act_batch", "act_tokens")
_LOGSUMEXP: Dims = ("act_batch", "act_heads", "act_tokens")


@dataclass(frozen=True)
class SplashKernel:
    """The kernel on a mesh.

    acts:     dim -> mesh axes of activations.
    platform: what it is compiled for: "tpu", whatever this process runs on (a program may be traced for a
              slice that is not attached); "cpu" interprets it, for tests.
    """

    mesh: DeviceMesh
    acts: Mapping[str, Rule]
    blocks: SplashBlocks
    platform: Platform = "tpu"

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        ids: torch.Tensor,
        kind: AttentionKind,
    ) -> list[torch.Tensor]:
        """Attended values [B, T, N, H] and logsumexp float32 [B, N, T]; no gradient flows through them."""
        given = [(query, _QUERY), (key, _KV), (value, _KV), (ids, _IDS)]
        return self._call("splash_forward", splash_forward_hlo, kind, given, [_QUERY, _LOGSUMEXP])

    def backward(
        self, saved: Sequence[torch.Tensor], gradient: torch.Tensor, kind: AttentionKind
    ) -> list[torch.Tensor]:
        """Gradients of query, key and value.

        saved: query, key, value, ids, attended values and logsumexp, as the forward pass took and gave them.
        """
        dims = [_QUERY, _KV, _KV, _IDS, _QUERY, _LOGSUMEXP, _QUERY]
        given = list(zip([*saved, gradient], dims, strict=True))
        return self._call("splash_backward", splash_backward_hlo, kind, given, [_QUERY, _KV, _KV])

    def _call(
        self,
        name: str,
        lower: Callable[[SplashCall], bytes],
        kind: AttentionKind,
        given: Sequence[tuple[torch.Tensor, Dims]],
        results: Sequence[Dims],
    ) -> list[torch.Tensor]:
        pieces = [self.mesh.piece(tensor.detach(), spec_of(dims, self.acts)) for tensor, dims in given]
        call = self._on_device(pieces[0], pieces[1], kind)
        outputs = traced_call(name, lower(call))(pieces)
        return [self.mesh.whole(x, spec_of(d, self.acts)) for x, d in zip(outputs, results, strict=True)]

    def _on_device(self, query: torch.Tensor, key: torch.Tensor, kind: AttentionKind) -> SplashCall:
        batch, tokens, heads, head_dim = query.shape
        return SplashCall(
            batch=batch,
            tokens=tokens,
            heads=heads,
            kv_heads=key.shape[2],
            head_dim=head_dim,
            dtype=str(query.dtype).removeprefix("torch."),
            scale=kind.scale,
            window=kind.window,
            soft_cap=kind.soft_cap,
            blocks=self.blocks,
            platform=self.platform,
        )


class _Attended(torch.autograd.Function):
    """The attended values, as they were given, with the kernel's gradient.

    Only this is differentiated: the forward kernel runs outside. Where the values and the logsumexp given
    here were kept from an earlier pass, the kernel call that computed them anew is dead code.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        ids: torch.Tensor,
        attended: torch.Tensor,
        logsumexp: torch.Tensor,
        kernel: SplashKernel,
        kind: AttentionKind,
    ) -> torch.Tensor:
        ctx.save_for_backward(query, key, value, ids, attended, logsumexp)
        ctx.kernel, ctx.kind = kernel, kind
        return attended

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor):  # type: ignore[override]
        gradients = ctx.kernel.backward(ctx.saved_tensors, gradient, ctx.kind)
        return *gradients, None, None, None, None, None


class SplashAttention:
    """The core of the decoder's attention for one batch of rows, without scores or masks in memory."""

    def __init__(self, segment_ids: torch.Tensor, kernel: SplashKernel, marks: Marks):
        self._ids = segment_ids.to(torch.int32)
        self._kernel, self._marks = kernel, marks

    def __call__(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, kind: AttentionKind
    ) -> torch.Tensor:
        attended, logsumexp = self._kernel.forward(query, key, value, self._ids, kind)
        attended = self._marks(attended, "attended", *_QUERY)
        logsumexp = self._marks(logsumexp, "logsumexp", *_LOGSUMEXP)
        return _Attended.apply(query, key, value, self._ids, attended, logsumexp, self._kernel, kind)


def splash_core(kernel: SplashKernel, marks: Marks) -> CoreFactory:
    """Splash attention in the form in which the decoder takes it."""

    def core(segment_ids: torch.Tensor, windows: Iterable[int | None]) -> AttentionCore:
        return SplashAttention(segment_ids, kernel, marks)

    return core
