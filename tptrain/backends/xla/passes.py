"""What the XLA backend does to a decoder from outside: remat, shard, write, attention, experts, scan.

Scanned are the layers, and the chunks of the loss.

The decoder itself is the same plain module that the torch backend runs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
import torch_xla.core.xla_model as xm
from torch import nn
from torch.func import functional_call

from tptrain.backends.base import Layout, Tensors
from tptrain.backends.xla.experts import ExpertsKernel, GroupedExperts
from tptrain.backends.xla.scan import Keeper, scan_caches, scan_layers, scan_parts
from tptrain.backends.xla.sharding import DeviceMesh
from tptrain.backends.xla.splash import SplashKernel, splash_core
from tptrain.config.remat import KEPT
from tptrain.family import LayerRuns
from tptrain.mesh import RuleTable, spec_of
from tptrain.models.attention import KVCache
from tptrain.models.decoder import Decoder, LayerContext, LayerResult

# Marked activations that are written to memory before they are read. A matrix product that takes its operand
# through the slice of a scan's input is a fifth slower (libtpu 0.0.24's estimate for v5p).
WRITTEN = frozenset({"chunk"})
# And those whose gradients are, where products are cut up: with the derivative of the MLP's gate folded into
# its end, which gives three results, the product before it is estimated at half of the speed. Products that
# run whole are laid out better without: on v6e a copy to the other layout would take an eighth of the step.
WRITTEN_GRADIENTS = frozenset({"mlp_hidden"})


def apply_passes(
    decoder: Decoder,
    runs: LayerRuns,
    layout: Layout,
    mesh: DeviceMesh,
    rules: RuleTable,
    remat: str,
    offloaded: frozenset[str] = frozenset(),
    splash: SplashKernel | None = None,
    experts: ExpertsKernel | None = None,
    products_are_cut_up: bool = True,
) -> None:
    """Turn a decoder on `meta` into the one that runs on the mesh, in place.

    runs:      the layers that are scanned together.
    remat:     the remat policy. offloaded: what it keeps in the host's memory on these devices.
    splash:    the attention kernel; None leaves attention as the decoder states it.
    experts:   the grouped products of experts; None leaves them as the decoder states them.
    products_are_cut_up: whether the compiler may run a product in steps beside the exchange of what it needs.
    """
    keeper = Keeper(KEPT[remat], offloaded)
    decoder.marks.functions.append(keeper)
    decoder.marks.functions.append(
        lambda x, name, dims: mesh.mark_with_gradient(x, spec_of(dims, rules.acts))
    )
    decoder.marks.functions.append(lambda x, name, dims: _written(x) if name in WRITTEN else x)
    if products_are_cut_up:
        decoder.marks.functions.append(
            lambda x, name, dims: _WrittenGradient.apply(x) if name in WRITTEN_GRADIENTS else x
        )
    if splash is not None:
        decoder.attention_core = splash_core(splash, decoder.marks)
    if experts is not None:
        decoder.experts_core = GroupedExperts(experts, decoder.marks, decoder.facts.activation)
    layers = decoder.model.layers
    assert isinstance(layers, nn.ModuleList)
    assert decoder.loss_chunks is not None
    shards = decoder.loss_chunks.shards if products_are_cut_up else None
    scanned = [
        ScannedLayers(
            [layers[layer] for layer in run.layers[: run.period]],
            keeper,
            layout,
            runs.prefix(i),
            mesh,
            shards,
        )
        for i, run in enumerate(runs.runs)
    ]
    decoder.model.layers = scanned[0] if len(scanned) == 1 else ChainedRuns(scanned)
    decoder.loss_chunks = dataclasses.replace(decoder.loss_chunks, loop=scan_parts)


def _written(x: torch.Tensor) -> torch.Tensor:
    """`x` as a tensor in memory, which no operation that reads it can fold into itself."""
    x = x.clone()  # the barrier acts in place
    xm.optimization_barrier_([x])
    return x


class _WrittenGradient(torch.autograd.Function):
    """`x`, with a gradient as `_written` makes it."""

    @staticmethod
    def forward(ctx, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return _written(gradient)


class ScannedLayers(nn.Module):
    """A run of the decoder's layers as one loop over stacked parameters.

    Its own parameters are named `period.<position>.<parameter>` and have a leading layer dim.
    prefix:       what the names of its buffers begin with in the layout.
    batch_shards: into how many parts the rows of a batch are split, where gradients may be made transposed.
    """

    def __init__(
        self,
        period: Sequence[nn.Module],
        keeper: Keeper,
        layout: Layout,
        prefix: str,
        mesh: DeviceMesh,
        batch_shards: int | None,
    ):
        super().__init__()
        self.period = nn.ModuleList(period)
        self._keeper, self._layout, self._prefix, self._mesh = keeper, layout, prefix, mesh
        self._batch_shards = batch_shards

    def forward(
        self, x: torch.Tensor, context: LayerContext, caches: Sequence[KVCache] | None = None
    ) -> LayerResult:
        """x [B, T, D]; caches, if any, one per position of the period, with a leading layer dim."""
        stacked: Tensors = dict(self.named_parameters())
        if caches is not None:
            return self._cached(x, context, stacked, caches)

        def one_period(x: torch.Tensor, parameters: Tensors) -> list[torch.Tensor]:
            sums: list[torch.Tensor] = []
            for position, layer in enumerate(self.period):
                x, _, more = functional_call(layer, _part(parameters, position), (x, context))
                sums += more
            return [x, *sums]

        shards, turned = self._batch_shards, frozenset[str]()
        if shards is not None:
            turned = _turned(stacked, x.shape[0] * x.shape[1] // shards)

        def constrain(name: str, gradient: torch.Tensor) -> torch.Tensor:
            spec = self._layout.buffers[f"{self._prefix}{name}"].row_spec
            return self._mesh.mark(gradient, tuple(reversed(spec)) if name in turned else spec)

        x, *sums = scan_layers(one_period, self._keeper, constrain, x, stacked, turned)
        return LayerResult(x, [], sums)

    def _cached(
        self, x: torch.Tensor, context: LayerContext, stacked: Tensors, caches: Sequence[KVCache]
    ) -> LayerResult:
        def one_period(x, parameters, flat):
            written = []
            for position, layer in enumerate(self.period):
                cache = KVCache(flat[2 * position], flat[2 * position + 1])
                x, [cache], _ = functional_call(layer, _part(parameters, position), (x, context, cache))
                written += [cache.key, cache.value]
            return x, written

        flat = [tensor for cache in caches for tensor in (cache.key, cache.value)]
        x, flat = scan_caches(one_period, x, stacked, flat)
        return LayerResult(x, [KVCache(flat[i], flat[i + 1]) for i in range(0, len(flat), 2)], [])


class ChainedRuns(nn.ModuleList):
    """Several runs of layers, each a loop of its own; their parameters are named `<run>.period. ...`."""

    def __init__(self, runs: Sequence[ScannedLayers]):
        super().__init__(runs)

    def forward(
        self, x: torch.Tensor, context: LayerContext, caches: Sequence[KVCache] | None = None
    ) -> LayerResult:
        """x [B, T, D]; caches, if any, those of each run after those of the run below."""
        at, written, sums = 0, list[KVCache](), list[torch.Tensor]()
        for run in self:
            assert isinstance(run, ScannedLayers)
            own = None if caches is None else caches[at : at + len(run.period)]
            at += len(run.period)
            x, new, more = run(x, context, own)
            written, sums = written + new, sums + more
        return LayerResult(x, written, sums)


def _turned(stacked: Tensors, device_tokens: int) -> frozenset[str]:
    """Names of the matrices whose gradients are made transposed.

    Of the two activations that a gradient is the product of, the TPU's compiler lays the one that gives the
    rows out once more, where it cuts the product up. For a matrix with more rows than columns the other one
    is smaller; the gradient is turned back instead, which pays where a device has enough tokens: 1.81 instead
    of 1.86 s estimated for 8B at 8192 x 1 on v5p-32, and more memory for little at 2048 x 1.
    """
    return frozenset(
        name
        for name, stack in stacked.items()
        if stack.ndim == 3 and stack.shape[1] > stack.shape[2] and device_tokens >= stack.shape[2]
    )


def _part(parameters: Tensors, position: int) -> Tensors:
    """The parameters of one position of the period, under the layer's own names."""
    prefix = f"period.{position}."
    return {name[len(prefix) :]: tensor for name, tensor in parameters.items() if name.startswith(prefix)}
