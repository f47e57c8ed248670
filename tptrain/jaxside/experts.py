"""The experts of a mixture (arXiv:2401.04088) without a token dropped: as HLO modules for one device.

Every pair of a token and one of its experts is a row. Rows are sorted by expert, so that all rows of an
expert lie together, and each matrix product is one product per group of rows, whatever the groups' sizes:
shapes do not depend on the routing. A device may hold some of the experts only. The rows of the others stand
behind its own, in no group; nothing is computed for them.

Shapes on one device: N tokens, K choices of each, R rows (N * K, filled up to whole tiles), E experts held,
D model, F mlp.

Tokens are brought into rows by a gather, and rows back by a gather with the inverse of the sort and a sum
over K, in both passes: each is the gradient of the other, and neither writes to one place twice, as a scatter
would. Rows in no group are never read back, so they may hold anything.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm, tgmm

from tptrain.family.facts import Activation
from tptrain.jaxside.lowering import Platform, lower_to_hlo

# A TPU's vector registers are so wide.
LANES = 128
# The most rows of a kernel's tile. A tile that two experts share is computed for both, so tiles are smaller
# where experts have few rows: with a quarter of what an expert has, a quarter more is computed.
_LARGEST_TILE_ROWS = 512
_TILES_OF_EXPERT = 4
# The most bytes of a tile of a matrix along one dim; all of a kernel's tiles then fit into 16 MiB of vector
# memory. Along the summed dim twice as many are taken where that is all of it: the matrix of an expert then
# stays while its rows go by.
_TILE_BYTES = 2048

ACTIVATIONS: dict[Activation, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu_pytorch_tanh": partial(jax.nn.gelu, approximate=True),
}


@dataclass(frozen=True)
class ExpertsCall:
    """The experts of one layer as one device sees them: everything that their programs depend on.

    tokens, choices: N and K. experts: E, those that the device holds. of_experts: all that tokens may go to.
    dtype:    of x, of the router's weights and of the matrices, by its name in numpy ("bfloat16").
    platform: "tpu", or "cpu" for the Pallas interpreter, which is for tests: it is slow.
    """

    tokens: int
    choices: int
    experts: int
    of_experts: int
    embed: int
    mlp: int
    dtype: str
    activation: Activation
    platform: Platform

    @property
    def pairs(self) -> int:
        return self.tokens * self.choices

    @property
    def tile_rows(self) -> int:
        """Rows of a kernel's tile: a power of two, by what an expert has on average."""
        wanted = self.pairs // self.of_experts // _TILES_OF_EXPERT
        return min(max(1 << wanted.bit_length() - 1 if wanted else LANES, LANES), _LARGEST_TILE_ROWS)

    @property
    def rows(self) -> int:
        return -(-self.pairs // self.tile_rows) * self.tile_rows

    def floats(self, *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.dtype(self.dtype))

    @property
    def x(self) -> jax.ShapeDtypeStruct:
        return self.floats(self.tokens, self.embed)

    @property
    def weights(self) -> jax.ShapeDtypeStruct:
        return self.floats(self.tokens, self.choices)

    @property
    def hidden(self) -> jax.ShapeDtypeStruct:
        return self.floats(self.rows, self.mlp)

    @property
    def matrices(self) -> list[jax.ShapeDtypeStruct]:
        """Of gate, up and down."""
        into, back = (self.experts, self.mlp, self.embed), (self.experts, self.embed, self.mlp)
        return [self.floats(*into), self.floats(*into), self.floats(*back)]

    @property
    def routes(self) -> list[jax.ShapeDtypeStruct]:
        """Of a sort's results, as `route_hlo` gives them."""
        shapes = [(self.rows,), (self.tokens, self.choices), (self.experts,)]
        return [jax.ShapeDtypeStruct(shape, jnp.int32) for shape in shapes]


@cache
def route_hlo(call: ExpertsCall) -> bytes:
    """The module of (choices [N, K], first [1]) -> (order [R], places [N, K], sizes [E]), all int32.

    choices: numbers of the experts that each token goes to; those held here are first .. first + E - 1.
    order:   the pair, n * K + k, that stands in each row. places: the row of each pair, the inverse.
    sizes:   rows of each expert held here; they come first.
    """
    first = jax.ShapeDtypeStruct((1,), jnp.int32)
    choices = jax.ShapeDtypeStruct((call.tokens, call.choices), jnp.int32)
    return lower_to_hlo(partial(route, call), [choices, first], call.platform)


@cache
def experts_forward_hlo(call: ExpertsCall) -> bytes:
    """The module of (x [N, D], weights [N, K], order, places, sizes, gate [E, F, D], up, down [E, D, F]) ->
    (y [N, D], gate's product [R, F], up's product [R, F]).

    y is what the experts held here give: the sum over them of weight * expert(token).
    """
    return _lower(partial(experts_forward, call), call, [call.x, call.weights, *call.routes, *call.matrices])


@cache
def experts_backward_hlo(call: ExpertsCall) -> bytes:
    """The module of (gradient of y [N, D], x, weights, order, places, sizes, gate's and up's products, gate,
    up, down) -> gradients of (x, weights, gate, up, down).

    The product of down is not needed: a weight's gradient, the product of an expert's result and the gradient
    of y, is also that of its hidden values and their gradient.
    """
    given = [call.x, call.x, call.weights, *call.routes, call.hidden, call.hidden, *call.matrices]
    return _lower(partial(experts_backward, call), call, given)


def route(call: ExpertsCall, choices: jax.Array, first: jax.Array) -> tuple[jax.Array, ...]:
    local = choices.reshape(-1) - first
    group = jnp.where((local >= 0) & (local < call.experts), local, call.experts)
    pairs = jnp.arange(call.pairs, dtype=jnp.int32)
    _, order = lax.sort_key_val(group, pairs, is_stable=True)
    _, places = lax.sort_key_val(order, pairs)
    sizes = (group[:, None] == jnp.arange(call.experts)).sum(0, dtype=jnp.int32)
    # What fills up the last tile stands for some pair; it is in no group.
    order = jnp.pad(order, (0, call.rows - call.pairs))
    return order, places.reshape(call.tokens, call.choices), sizes


def experts_forward(
    call: ExpertsCall,
    x: jax.Array,
    weights: jax.Array,
    order: jax.Array,
    places: jax.Array,
    sizes: jax.Array,
    gate: jax.Array,
    up: jax.Array,
    down: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    rows = _rows(x, order // call.choices)
    gated = _product(call, rows, gate, sizes, transposed=True)
    upped = _product(call, rows, up, sizes, transposed=True)
    hidden = _hidden(call, gated, upped).astype(x.dtype)
    results = _product(call, hidden, down, sizes, transposed=True)
    found = _mine(_rows(results, places), places, sizes)
    # Not a matrix product, which would want what was found in memory, in float32.
    y = (found * weights.astype(jnp.float32)[..., None]).sum(1)
    return y.astype(x.dtype), gated, upped


def experts_backward(
    call: ExpertsCall,
    gradient: jax.Array,
    x: jax.Array,
    weights: jax.Array,
    order: jax.Array,
    places: jax.Array,
    sizes: jax.Array,
    gated: jax.Array,
    upped: jax.Array,
    gate: jax.Array,
    up: jax.Array,
    down: jax.Array,
) -> tuple[jax.Array, ...]:
    tokens, dtype = order // call.choices, x.dtype
    gradients, rows = _rows(gradient, tokens), _rows(x, tokens)
    weight = _rows(weights.reshape(-1), order).astype(jnp.float32)[:, None]
    hidden, into = jax.vjp(partial(_hidden, call), gated, upped)
    unweighted = _product(call, gradients, down, sizes, transposed=False).astype(jnp.float32)
    of_weights = _mine(_rows((hidden * unweighted).sum(-1), places), places, sizes)
    of_gated, of_upped = into(unweighted * weight)
    of_rows = _product(call, of_gated, gate, sizes, transposed=False)
    of_rows += _product(call, of_upped, up, sizes, transposed=False)
    of_x = _mine(_rows(of_rows, places), places, sizes).sum(1)
    return (
        of_x.astype(dtype),
        of_weights.astype(dtype),
        _outer(call, of_gated, rows, sizes),
        _outer(call, of_upped, rows, sizes),
        _outer(call, gradients, (hidden * weight).astype(dtype), sizes),
    )


def _rows(x: jax.Array, index: jax.Array) -> jax.Array:
    return x.at[index].get(mode="promise_in_bounds")


def _mine(found: jax.Array, places: jax.Array, sizes: jax.Array) -> jax.Array:
    """float32 of what pairs [N, K, ...] have found in their rows; 0 for those of experts held elsewhere."""
    here = (places < sizes.sum()).reshape(*places.shape, *[1] * (found.ndim - places.ndim))
    return jnp.where(here, found.astype(jnp.float32), 0)


def _hidden(call: ExpertsCall, gated: jax.Array, upped: jax.Array) -> jax.Array:
    """activation(gate) * up, float32."""
    return ACTIVATIONS[call.activation](gated.astype(jnp.float32)) * upped.astype(jnp.float32)


def _product(
    call: ExpertsCall, rows: jax.Array, matrices: jax.Array, sizes: jax.Array, *, transposed: bool
) -> jax.Array:
    """rows [R, A] times each group's matrix, [E, A, B], or [E, B, A] transposed -> [R, B]."""
    inner, outer = rows.shape[1], matrices.shape[1 if transposed else 2]
    all_of_it = inner * rows.dtype.itemsize <= 2 * _TILE_BYTES
    return gmm(
        rows,
        matrices,
        sizes,
        rows.dtype,
        (call.tile_rows, inner if all_of_it else _tile(inner, rows.dtype), _tile(outer, rows.dtype)),
        transpose_rhs=transposed,
        interpret=call.platform == "cpu",
    )


def _outer(call: ExpertsCall, left: jax.Array, right: jax.Array, sizes: jax.Array) -> jax.Array:
    """The sum over each group's rows of left [R, A] times right [R, B] -> [E, A, B]."""
    return tgmm(
        left.T,
        right,
        sizes,
        left.dtype,
        (call.tile_rows, _tile(left.shape[1], left.dtype), _tile(right.shape[1], left.dtype)),
        interpret=call.platform == "cpu",
    )


def _tile(size: int, dtype: jnp.dtype) -> int:
    """The largest part of a dim that fits, divides it, and has whole registers; without such a part the
    kernel masks what is too much of the last one."""
    most = _TILE_BYTES // dtype.itemsize
    parts = [part for part in range(LANES, most + 1, LANES) if size % part == 0]
    return max(parts, default=min(size, most))


def _lower(function: Callable[..., Any], call: ExpertsCall, given: Sequence[jax.ShapeDtypeStruct]) -> bytes:
    # By default a TPU rounds the operands of a float32 product to bfloat16.
    precision = "highest" if call.dtype == "float32" else "default"
    with jax.default_matmul_precision(precision):
        return lower_to_hlo(function, given, call.platform)
