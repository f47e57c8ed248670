"""A scan over stacked layers with a backward pass of our own.

The forward loop stores, per layer, its input and whichever marked activations the remat policy keeps. The
backward loop runs the layer again under autograd, but puts a kept activation in the place of the one just
computed; whatever led to it is then dead code and never reaches the compiled program. A policy is thus a set
of names, from "nothing" (full remat) to "every matrix product"; and a second set, of those whose stacks lie
in the host's memory.

torch_xla's own `scan` offers gradients through AOTAutograd: it refuses inputs that are not floating point,
and whatever all layers share (rotary tables, masks) would be stored once per layer. Here the body closes
over such tensors, and the loop below it (`_scan_impl_pytree`) hoists their leaves into loop invariants.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager

import torch
from torch_xla.experimental.scan import _scan_impl_pytree

from tptrain.backends.base import Tensors
from tptrain.backends.xla.host_memory import to_device, to_host
from tptrain.config.remat import LAYER_INPUT
from tptrain.models.loss import LoopBody, Parts

# (x, parameters of one layer) -> x, and any sums over the layer's tokens
LayerFunction = Callable[[torch.Tensor, Tensors], list[torch.Tensor]]


class _Substitute(torch.autograd.Function):
    """Goes on with the kept value; the gradient flows to the computed one."""

    @staticmethod
    def forward(ctx, computed: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return kept

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):  # type: ignore[override]
        return gradient, None


class Keeper:
    """A mark that records kept activations in the forward loop and puts them back in the backward loop.

    names: of the activations that are kept. offloaded: which of them, or LAYER_INPUT, lie in the host's
    memory between the two loops.
    """

    def __init__(self, names: frozenset[str], offloaded: frozenset[str] = frozenset()):
        self.names, self.offloaded = names, offloaded
        self._recorded: list[torch.Tensor] | None = None
        self._supply: Iterator[torch.Tensor] | None = None

    def __call__(self, x: torch.Tensor, name: str, dims: tuple[str, ...]) -> torch.Tensor:
        if name not in self.names:
            return x
        if self._recorded is not None:
            self._recorded.append(self.stored(x, name))
        elif self._supply is not None:
            return _Substitute.apply(x, self.loaded(next(self._supply), name))
        return x

    def stored(self, x: torch.Tensor, name: str) -> torch.Tensor:
        """`x` as the forward loop stacks it."""
        return to_host(x) if name in self.offloaded else x

    def loaded(self, x: torch.Tensor, name: str) -> torch.Tensor:
        """`x` from the stack as the backward loop computes with it."""
        return to_device(x) if name in self.offloaded else x

    @contextmanager
    def recording(self) -> Iterator[list[torch.Tensor]]:
        self._recorded = []
        try:
            yield self._recorded
        finally:
            self._recorded = None

    @contextmanager
    def supplying(self, kept: list[torch.Tensor]) -> Iterator[None]:
        self._supply = iter(kept)
        try:
            yield
        finally:
            self._supply = None


class _ScanLayers(torch.autograd.Function):
    @staticmethod
    def forward(ctx, function, keeper, constrain, turned, names, x, *stacked):  # type: ignore[override]
        def body(carry, layer):
            with keeper.recording() as kept:
                y, *sums = function(carry, dict(zip(names, layer, strict=True)))
            return y, (keeper.stored(carry, LAYER_INPUT), list(kept), sums)

        with torch.no_grad():
            y, (inputs, kept, sums) = _scan_impl_pytree(body, x, list(stacked))
        ctx.save_for_backward(inputs, *kept, *stacked)
        ctx.function, ctx.keeper, ctx.constrain = function, keeper, constrain
        ctx.turned, ctx.names = turned, names
        return y, *sums

    @staticmethod
    def backward(ctx, gradient, *of_sums):  # type: ignore[override]
        inputs, *rest = ctx.saved_tensors
        split = len(rest) - len(ctx.names)
        kept, stacked = rest[:split], rest[split:]
        # Frozen weights need no gradient: the loop computes none.
        needed = ctx.needs_input_grad[-len(ctx.names) :]
        wanted = [name for name, need in zip(ctx.names, needed, strict=True) if need]

        def turn(name: str, matrix: torch.Tensor) -> torch.Tensor:
            return matrix.t() if name in ctx.turned else matrix

        def body(carry, layer_inputs):
            x, layer_kept, parameters, of_layer_sums = layer_inputs
            with torch.enable_grad(), ctx.keeper.supplying(layer_kept):
                leaf = ctx.keeper.loaded(x, LAYER_INPUT).detach().requires_grad_(True)
                layer = {n: p.detach() for n, p in zip(ctx.names, parameters, strict=True)}
                trained = [turn(n, layer[n]).requires_grad_(True) for n in wanted]
                layer |= {n: turn(n, p) for n, p in zip(wanted, trained, strict=True)}
                outputs = ctx.function(leaf, layer)
                gradients = torch.autograd.grad(outputs, [leaf, *trained], [carry, *of_layer_sums])
            # Before the gradients are turned back, or XLA would undo the turning.
            constrained = map(ctx.constrain, wanted, gradients[1:])
            return gradients[0], [turn(n, g) for n, g in zip(wanted, constrained, strict=True)]

        xs = (inputs, kept, stacked, list(of_sums))
        with torch.no_grad():
            grad_x, grad_stacked = _scan_impl_pytree(body, gradient, xs, reverse=True)
        by_name = dict(zip(wanted, grad_stacked, strict=True))
        return None, None, None, None, None, grad_x, *(by_name.get(name) for name in ctx.names)


def scan_layers(
    function: LayerFunction,
    keeper: Keeper,
    constrain: Callable[[str, torch.Tensor], torch.Tensor],
    x: torch.Tensor,
    stacked: Tensors,
    turned: Collection[str] = (),
) -> list[torch.Tensor]:
    """Run `function` over the leading dim of every tensor in `stacked`, with gradients.

    Returns x of the last layer, and the sums of all layers stacked.

    Where neither `x` nor a parameter needs one, nothing is kept and there is no backward loop.

    function:  one layer; it may close over tensors that all layers share and that need no gradient.
    constrain: (name, gradient of one layer's parameter) -> the gradient, its sharding stated.
    turned:    names of matrices whose gradients are made, and handed to `constrain`, transposed.
    """
    if not (torch.is_grad_enabled() and any(t.requires_grad for t in (x, *stacked.values()))):
        return _scan_forward(function, x, stacked)
    names = tuple(stacked)
    return list(_ScanLayers.apply(function, keeper, constrain, turned, names, x, *stacked.values()))


def _scan_forward(function: LayerFunction, x: torch.Tensor, stacked: Tensors) -> list[torch.Tensor]:
    def body(carry, layer):
        y, *sums = function(carry, dict(zip(stacked, layer, strict=True)))
        return y, sums

    with torch.no_grad():
        y, sums = _scan_impl_pytree(body, x, list(stacked.values()))
    return [y, *sums]


def scan_caches(function, x: torch.Tensor, stacked: Tensors, caches: list[torch.Tensor]):
    """Run `function(x, parameters, caches) -> (x, caches)` over layers, without gradients.

    caches: tensors with a leading layer dim. Returns x and the new caches, stacked alike.
    """
    names = tuple(stacked)

    def body(carry, layer):
        parameters, layer_caches = layer
        return function(carry, dict(zip(names, parameters, strict=True)), layer_caches)

    with torch.no_grad():
        return _scan_impl_pytree(body, x, (list(stacked.values()), caches))


def scan_parts(body: LoopBody, carry: Parts, parts: Parts) -> tuple[Parts, torch.Tensor]:
    """Run `body(carry, part) -> (carry, result)` over the leading dim of `parts`, without gradients.

    What all turns share belongs in `carry`: what the body closes over is computed in every turn again.
    """
    with torch.no_grad():
        looped: tuple[Parts, torch.Tensor] = _scan_impl_pytree(body, carry, parts)
    return looped
