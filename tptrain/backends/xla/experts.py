"""The experts of a mixture in the traced graph: JAX's grouped products on each device's piece.

The graph leaves automatic partitioning around them, as around splash attention. Before it, tokens that are
split over the axes that split the experts are collected, and matrices over the axes that split the batch.
After it, each device has a part of a sum: of a token's result, what its own experts and its columns of them
give; of a matrix's gradient, what its own tokens give. Parts get leading dims, split over the axes that hold
them, and are added up: SPMD makes reduce-scatters and all-reduces of that.

Shapes: B batch, T tokens, K choices, E experts, D model, F mlp, R rows (a token and one of its experts).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tptrain.backends.xla.jax_call import traced_call
from tptrain.backends.xla.sharding import DeviceMesh
from tptrain.family.facts import Activation
from tptrain.jaxside.experts import ExpertsCall, experts_backward_hlo, experts_forward_hlo, route_hlo
from tptrain.jaxside.lowering import Platform
from tptrain.mesh import RuleTable, Spec, spec_of
from tptrain.mesh.rules import split_count
from tptrain.models.decoder import ACTIVATIONS
from tptrain.models.marks import Marks

Dims = tuple[str, ...]

_X: Dims = ("act_batch", "act_tokens", "act_embed")
_CHOICES: Dims = ("act_batch", "act_tokens", "act_choices")
_ROWS: Dims = ("act_expert_rows", "act_expert_mlp")
_INTO: Dims = ("experts", "expert_mlp", "expert_embed")
_BACK: Dims = ("experts", "expert_embed", "expert_mlp")


@dataclass(frozen=True)
class ExpertsKernel:
    """The grouped products on a mesh.

    platform: what they are compiled for: "tpu", whatever this process runs on (a program may be traced for a
              slice that is not attached); "cpu" interprets them, for tests.
    """

    mesh: DeviceMesh
    rules: RuleTable
    platform: Platform = "tpu"

    def forward(
        self, given: Sequence[torch.Tensor], choices: torch.Tensor, activation: Activation
    ) -> list[torch.Tensor]:
        """y [B, T, D], and the products of gate and up, [R, F] each; no gradient flows through them.

        given: x [B, T, D], the router's weights [B, T, K], gate [E, F, D], up, down [E, D, F].
        """
        pieces = self._pieces(given)
        call, routes = self._routed(pieces, choices, activation)
        x, weights, *matrices = pieces
        run = traced_call("experts_forward", experts_forward_hlo(call))
        y, gate, up = run([_flat(x), _flat(weights), *routes, *matrices])
        y = self._whole_tokens(y.view(x.shape), _X)
        return [y, *(self.mesh.whole(product, self._act(_ROWS)) for product in (gate, up))]

    def backward(
        self,
        gradient: torch.Tensor,
        given: Sequence[torch.Tensor],
        choices: torch.Tensor,
        products: Sequence[torch.Tensor],
        activation: Activation,
    ) -> list[torch.Tensor]:
        """Gradients of all that was given.

        products: of gate and up, as the forward pass gave them for these choices.
        """
        pieces = self._pieces(given)
        call, routes = self._routed(pieces, choices, activation)
        x, weights, *matrices = pieces
        rows = [self.mesh.piece(product.detach(), self._act(_ROWS)) for product in products]
        of_y = self.mesh.piece(gradient.detach(), self._tokens(_X))
        run = traced_call("experts_backward", experts_backward_hlo(call))
        tokens = [_flat(piece) for piece in (of_y, x, weights)]
        of_x, of_weights, *of_matrices = run([*tokens, *routes, *rows, *matrices])
        with_dims = zip(of_matrices, (_INTO, _INTO, _BACK), strict=True)
        return [
            self._whole_tokens(of_x.view(x.shape), _X),
            self._whole_tokens(of_weights.view(weights.shape), _CHOICES),
            *(self._whole_matrix(of, dims) for of, dims in with_dims),
        ]

    def _pieces(self, given: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        specs = [self._tokens(_X), self._tokens(_CHOICES), *map(self._held, (_INTO, _INTO, _BACK))]
        return [self.mesh.piece(x.detach(), spec) for x, spec in zip(given, specs, strict=True)]

    def _routed(
        self, pieces: Sequence[torch.Tensor], choices: torch.Tensor, activation: Activation
    ) -> tuple[ExpertsCall, list[torch.Tensor]]:
        """The call as a device sees it, and its rows in order: see `route_hlo`."""
        x, weights, gate, *_ = pieces
        holders = split_count(self._expert_axes, self.mesh.axis_sizes)
        held, mlp, embed = gate.shape
        # Which experts a device holds depends on its place: a piece of the numbers of all holders.
        first = torch.arange(0, held * holders, held, dtype=torch.int32, device=choices.device)
        first = self.mesh.piece(first, (self._expert_axes,))
        call = ExpertsCall(
            tokens=x.shape[0] * x.shape[1],
            choices=weights.shape[-1],
            experts=held,
            of_experts=held * holders,
            embed=embed,
            mlp=mlp,
            dtype=str(x.dtype).removeprefix("torch."),
            activation=activation,
            platform=self.platform,
        )
        numbers = self.mesh.piece(choices.to(torch.int32), self._tokens(_CHOICES))
        return call, traced_call("experts_route", route_hlo(call))([_flat(numbers), first])

    @property
    def _expert_axes(self) -> tuple[str, ...]:
        return self.rules.params["experts"] or ()

    @property
    def _result_parts(self) -> tuple[str, ...]:
        """The axes along which devices have parts of a token's result: other experts, other columns."""
        return (*self._expert_axes, *(self.rules.params["expert_mlp"] or ()))

    @property
    def _matrix_parts(self) -> tuple[str, ...]:
        """The axes along which they have parts of a matrix's gradient: other tokens."""
        tokens = [axis for dim in ("act_batch", "act_tokens") for axis in self.rules.acts[dim] or ()]
        return _without(tokens, self._expert_axes)

    def _act(self, dims: Dims) -> Spec:
        return spec_of(dims, self.rules.acts)

    def _tokens(self, dims: Dims) -> Spec:
        """How tokens are split where every holder of experts sees those of all."""
        return tuple(_without(axes, self._expert_axes) for axes in self._act(dims))

    def _matrix(self, dims: Dims) -> Spec:
        return spec_of(dims, self.rules.params)

    def _held(self, dims: Dims) -> Spec:
        """How matrices are split where a device sees all of what it needs for its own tokens."""
        return tuple(_without(axes, self._matrix_parts) for axes in self._matrix(dims))

    def _whole_tokens(self, part: torch.Tensor, dims: Dims) -> torch.Tensor:
        return self._sum(part, self._result_parts, self._act(dims))

    def _whole_matrix(self, part: torch.Tensor, dims: Dims) -> torch.Tensor:
        return self._sum(part, self._matrix_parts, self._matrix(dims))

    def _sum(self, part: torch.Tensor, parts: Sequence[str], wanted: Spec) -> torch.Tensor:
        """The sum of what the devices along some axes have.

        parts:  those axes. wanted: how the sum is to be split: over other axes as the parts are, and then
                over some of `parts`.
        """
        # First over axes that split the sum: what is left to be added up over others is then smaller.
        scattering = {axis for axes in wanted for axis in axes}
        above_one = [axis for axis in parts if self.mesh.axis_sizes[axis] > 1]
        left = sorted(above_one, key=lambda axis: axis not in scattering)
        part = part.reshape(*[1] * len(left), *part.shape)
        x = self.mesh.whole(part, self._while_left(left, wanted))
        while left:
            del left[0]
            x = self.mesh.mark(x.sum(0, dtype=x.dtype), self._while_left(left, wanted))
        return x

    @staticmethod
    def _while_left(left: Sequence[str], wanted: Spec) -> Spec:
        """How a sum is split that still has a leading dim of parts for each of these axes."""
        return (*((axis,) for axis in left), *(_without(axes, left) for axes in wanted))


def _without(axes: Sequence[str], others: Sequence[str]) -> tuple[str, ...]:
    return tuple(axis for axis in axes if axis not in others)


def _flat(x: torch.Tensor) -> torch.Tensor:
    """[B, T, ...] -> [N, ...]."""
    return x.flatten(0, 1)


class _Mixed(torch.autograd.Function):
    """The experts' result, as it was given, with the gradient of the grouped products.

    Only this is differentiated: the forward modules run outside. Where the products of gate and up given here
    were kept from an earlier pass, the calls that computed them anew are dead code; otherwise those of the
    layer's second forward pass are read, and only the product of down in it is dead.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        kernel: ExpertsKernel,
        activation: Activation,
        y: torch.Tensor,
        choices: torch.Tensor,
        gate_product: torch.Tensor,
        up_product: torch.Tensor,
        *given: torch.Tensor,
    ) -> torch.Tensor:
        ctx.save_for_backward(choices, gate_product, up_product, *given)
        ctx.kernel, ctx.activation = kernel, activation
        return y

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor):  # type: ignore[override]
        choices, gate, up, *given = ctx.saved_tensors
        gradients = ctx.kernel.backward(gradient, given, choices, (gate, up), ctx.activation)
        return *[None] * 6, *gradients


class GroupedExperts:
    """The core of a decoder's experts: no token is dropped, and no product made that nobody asked for."""

    def __init__(self, kernel: ExpertsKernel, marks: Marks, activation: Activation):
        self._kernel, self._marks, self._activation = kernel, marks, activation

    def __call__(
        self,
        x: torch.Tensor,
        weights: torch.Tensor,
        choices: torch.Tensor,
        gate: torch.Tensor,
        up: torch.Tensor,
        down: torch.Tensor,
        activation: Callable[[torch.Tensor], torch.Tensor],
    ) -> torch.Tensor:
        assert activation is ACTIVATIONS[self._activation], "the kernel has the model's own"
        given = [x, weights, gate, up, down]
        y, *products = self._kernel.forward(given, choices, self._activation)
        names = ("expert_gate", "expert_up")
        kept = [self._marks(rows, name, *_ROWS) for rows, name in zip(products, names, strict=True)]
        return _Mixed.apply(self._kernel, self._activation, y, choices, *kept, *given)
