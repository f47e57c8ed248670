"""The functions that are lowered, in JAX, against every expert for every token."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from tests.experts.routings import routing
from tptrain.jaxside.experts import ACTIVATIONS, ExpertsCall, experts_backward, experts_forward, route

# max|ours - reference| / max|reference|, in float32.
TOLERANCE = 1e-5

Arrays = list[jax.Array]


def call_of(choices: int, experts: int, **changes: object) -> ExpertsCall:
    given = {"tokens": 150, "choices": choices, "experts": experts, "of_experts": experts, "embed": 24}
    more = {"mlp": 40, "dtype": "float32", "activation": "silu", "platform": "cpu"}
    return ExpertsCall(**{**given, **more, **changes})  # type: ignore[arg-type]


def tensors(call: ExpertsCall) -> Arrays:
    """x, weights, gate, up, down and the gradient of the result."""
    shapes = [call.x, call.weights, *call.matrices, call.x]
    keys = jax.random.split(jax.random.key(call.choices), len(shapes))
    return [jax.random.normal(key, each.shape, each.dtype) for key, each in zip(keys, shapes, strict=True)]


def dense(call: ExpertsCall, choices: jax.Array, x, weights, gate, up, down):  # type: ignore[no-untyped-def]
    hidden = ACTIVATIONS[call.activation](jnp.einsum("nd,efd->nef", x, gate))
    results = jnp.einsum("nef,edf->ned", hidden * jnp.einsum("nd,efd->nef", x, up), down)
    return (jnp.take_along_axis(results, choices[..., None], 1) * weights[..., None]).sum(1)


def with_gradients(call: ExpertsCall, choices: jax.Array, given: Arrays) -> Arrays:
    *given, gradient = given
    y, back = jax.vjp(lambda *each: dense(call, choices, *each), *given)
    return [y, *back(gradient)]


def grouped(call: ExpertsCall, choices: jax.Array, given: Arrays, first: int = 0) -> Arrays:
    x, weights, *matrices, gradient = given
    routes = route(call, choices, jnp.array([first], jnp.int32))
    y, *products = experts_forward(call, x, weights, *routes, *matrices)
    return [y, *experts_backward(call, gradient, x, weights, *routes, *products, *matrices)]


def check(ours: Arrays, expected: Arrays) -> None:
    for part, (mine, theirs) in enumerate(zip(ours, expected, strict=True)):
        assert mine.dtype == theirs.dtype
        assert jnp.abs(mine - theirs).max() <= TOLERANCE * jnp.abs(theirs).max(), part


@pytest.fixture(autouse=True)
def full_precision() -> object:
    with jax.default_matmul_precision("highest"):
        yield


@pytest.mark.parametrize(
    ("choices", "experts", "kind"),
    [(1, 5, "even"), (2, 6, "even"), (8, 11, "even"), (2, 7, "empty"), (1, 4, "one"), (3, 7, "one")],
)
def test_equals_every_expert_for_every_token(choices: int, experts: int, kind: str) -> None:
    call = call_of(choices, experts)
    chosen = jnp.asarray(routing(kind, (call.tokens,), choices, experts).numpy())
    check(grouped(call, chosen, tensors(call)), with_gradients(call, chosen, tensors(call)))


def test_gelu() -> None:
    call = call_of(2, 5, activation="gelu_pytorch_tanh")
    chosen = jnp.asarray(routing("even", (call.tokens,), 2, 5).numpy())
    check(grouped(call, chosen, tensors(call)), with_gradients(call, chosen, tensors(call)))


def test_devices_with_some_experts_each_give_parts_of_the_same_sum() -> None:
    """Three devices with four experts each; one has none that was chosen."""
    whole = call_of(3, 12)
    chosen = 4 + jnp.asarray(routing("even", (whole.tokens,), 3, 8).numpy())
    x, weights, gate, up, down, gradient = tensors(whole)
    parts = []
    for first in (0, 4, 8):
        held = [matrix[first : first + 4] for matrix in (gate, up, down)]
        given = [x, weights, *held, gradient]
        parts.append(grouped(call_of(3, 4, of_experts=12), chosen, given, first))
    sums = [sum(each) for each in zip(*(part[:3] for part in parts), strict=True)]
    joined = [jnp.concatenate(each) for each in zip(*(part[3:] for part in parts), strict=True)]
    check([*sums, *joined], with_gradients(whole, chosen, tensors(whole)))  # type: ignore[list-item]
    assert not any(jnp.any(part) for part in parts[0]), "what nobody chose gives nothing"


def test_rows_lie_by_expert_and_places_are_their_inverse() -> None:
    call = call_of(2, 4, of_experts=6)
    chosen = jnp.asarray(routing("even", (call.tokens,), 2, 6).numpy())
    order, places, sizes = route(call, chosen, jnp.array([1], jnp.int32))
    experts = chosen.reshape(-1)[order[: call.pairs]]
    held = experts[: sizes.sum()]
    assert (jnp.diff(held) >= 0).all() and ((held >= 1) & (held < 5)).all()
    assert sizes.tolist() == [(chosen == expert).sum().item() for expert in range(1, 5)]
    assert (order[places.reshape(-1)] == jnp.arange(call.pairs)).all()
    assert order.shape == (call.rows,) and call.rows % call.tile_rows == 0


@pytest.mark.parametrize(
    ("tokens", "choices", "experts", "expected"),
    # Rows of an expert on average: 16, 512, 1,170, 4,096.
    [(64, 2, 8, 128), (8192, 8, 128, 128), (4096, 2, 7, 256), (8192, 4, 8, 512)],
)
def test_tiles_are_smaller_where_experts_have_few_rows(
    tokens: int, choices: int, experts: int, expected: int
) -> None:
    call = call_of(choices, experts, tokens=tokens)
    assert call.tile_rows == expected
