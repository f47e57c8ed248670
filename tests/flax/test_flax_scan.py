"""The Flax train step over stacked layers, on a mesh, gives the losses and gradients of tptrain's own."""

from __future__ import annotations

import dataclasses
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import small
from tests.flax.oracle import CONFIGS, Run, params_of, relative, train_on_torch, weights_of
from tools.bench.flax_step import FlaxStep
from tptrain.config import Plan
from tptrain.errors import ProblemsError
from tptrain.family import LayerKind
from tptrain.jaxside.flax_layers import unmarked
from tptrain.jaxside.flax_loss import LossChunks, chunked_loss
from tptrain.jaxside.flax_scan import stack_layers
from tptrain.jaxside.specs import jax_mesh
from tptrain.train.schedule import learning_rate

STEPS, TOLERANCE, BROKEN = 3, 1e-5, 1e-3
# A clipping norm that steps exceed, and a decay that losses show.
OPTIM = {"weight_decay": 0.3, "clip_norm": 1.5}
WINDOWS = (LayerKind(5), LayerKind())


def with_period(plan: Plan, period: tuple[LayerKind, ...]) -> Plan:
    return dataclasses.replace(plan, facts=dataclasses.replace(plan.facts, layer_period=period))


def config_of(name: str) -> dict[str, Any]:
    """An even depth, so that a period of two fits."""
    return {**CONFIGS[name], "num_hidden_layers": 2}


@cache
def weights(config: str) -> dict[str, Any]:
    return {n: w for n, w in weights_of(config).items() if not n.startswith("model.layers.2.")}


@cache
def torch_run(config: str, period: tuple[LayerKind, ...]) -> Run:
    plan = with_period(small.torch_plan(config=config_of(config), optim=OPTIM), period)
    return train_on_torch(plan, weights(config), STEPS)


def flax_run(config: str, period: tuple[LayerKind, ...], remat: str, chunk_tokens: int) -> Run:
    """The same on two devices, donated state and all."""
    plan = small.small_plan(
        2, topology="cpu-2", config=config_of(config), optim=OPTIM, remat=remat, chunk_tokens=chunk_tokens
    )
    plan = with_period(plan, period)
    step = FlaxStep(plan, jax_mesh(plan.mesh), "cpu")
    shapes, _ = step.shapes()
    params = {name: array for name, array in params_of(config).items() if name in weights(config)}
    state = step.first_state(stack_layers(plan.facts, params))
    state = jax.tree.map(lambda array, shape: jax.device_put(array, shape.sharding), state, shapes)
    function, losses, norms = step.jitted(), [], []
    for number in range(1, STEPS + 1):
        rate = learning_rate(number, small.PLANNED_STEPS, plan.recipe.schedule, plan.recipe.optim)
        inputs = {**small.train_batch(number % 2), "learning_rate": jnp.float32(rate)}
        state, outputs = function(state, inputs)
        losses.append(outputs["loss"].item())
        norms.append(outputs["grad_norm"].item())
    after, before = ([leaf.sharding for leaf in jax.tree.leaves(tree)] for tree in (state, shapes))
    assert after == before
    return Run(losses, norms, state["params"])


def largest_gap(ours: list[float], theirs: list[float]) -> float:
    return max(abs(a - b) / b for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize(
    ("config", "period", "remat", "chunk_tokens"),
    [
        ("biases", WINDOWS, "full", 0),
        ("biases", WINDOWS, "dots", 8),
        ("tied", WINDOWS[1:], "attention", 4),
        ("tied", WINDOWS[1:], "none", 0),
    ],
)
def test_losses_norms_and_weights_equal_those_of_tptrains_step(
    config: str, period: tuple[LayerKind, ...], remat: str, chunk_tokens: int
) -> None:
    theirs, ours = torch_run(config, period), flax_run(config, period, remat, chunk_tokens)
    assert largest_gap(ours.losses, theirs.losses) <= TOLERANCE
    assert largest_gap(ours.norms, theirs.norms) <= 10 * TOLERANCE
    plan = with_period(small.torch_plan(config=config_of(config)), period)
    stacked = stack_layers(plan.facts, {n: jnp.asarray(a) for n, a in theirs.params.items()})
    assert set(ours.params) == set(stacked)
    # Adam makes large steps of small roundings.
    assert all(relative(ours.params[name], array) <= 1e-3 for name, array in stacked.items())
    if period == WINDOWS:
        assert largest_gap(ours.losses, torch_run(config, WINDOWS[::-1]).losses) >= BROKEN


@pytest.mark.parametrize("tokens", [12, 4])
def test_the_chunked_loss_has_the_gradients_of_the_plain_one(tokens: int) -> None:
    def inputs(*shape: int) -> jax.Array:
        return jnp.asarray(np.random.default_rng(len(shape)).normal(size=shape))

    with jax.experimental.enable_x64():
        hidden, head, weights = inputs(6, 12, 5), inputs(7, 5), jnp.abs(inputs(6, 12))
        targets = jnp.asarray(np.random.default_rng(3).integers(0, 7, (6, 12)))
        total = weights.sum()

        def plain(hidden: jax.Array, head: jax.Array) -> jax.Array:
            logs = jax.nn.log_softmax(jnp.einsum("btd,vd->btv", hidden, head))
            return 3 * -(jnp.take_along_axis(logs, targets[..., None], -1)[..., 0] * weights).sum() / total

        def ours(hidden: jax.Array, head: jax.Array) -> jax.Array:
            return 3 * chunked_loss(hidden, head, targets, weights, total, LossChunks(tokens, 2), unmarked)

        expected = jax.value_and_grad(plain, (0, 1))(hidden, head)
        found = jax.value_and_grad(ours, (0, 1))(hidden, head)
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            assert a.dtype == "float64" and relative(a, b) <= 1e-12


def test_what_the_step_would_leave_out_is_refused() -> None:
    plan = small.small_plan(1, 2, topology="cpu-2")
    with pytest.raises(ProblemsError, match="must divide the vocabulary"):
        FlaxStep(plan, jax_mesh(plan.mesh))
    plan = small.small_plan(2, topology="cpu-2", remat="offload")
    with pytest.raises(ProblemsError, match=r"remat.policy=offload: offloads, which the Flax step does not"):
        FlaxStep(plan, jax_mesh(plan.mesh))
