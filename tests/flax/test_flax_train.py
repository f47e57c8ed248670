"""Training with Flax and optax gives the losses of tptrain's own step, and weights that Orbax keeps."""

from __future__ import annotations

import dataclasses
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx

from tests import small
from tests.flax.oracle import CONFIGS, Run, flax_decoder, params_of, relative, train_on_torch, weights_of
from tptrain.config import OptimSection, Plan
from tptrain.errors import ProblemsError
from tptrain.family import parameter_table, stored_rows
from tptrain.jaxside import flax_layers
from tptrain.jaxside.flax_decoder import FlaxDecoder, loss
from tptrain.jaxside.flax_train import make_optimizer
from tptrain.jaxside.specs import jax_mesh, named_sharding
from tptrain.models.rope import inverse_frequencies
from tptrain.train.schedule import learning_rate

STEPS, TOLERANCE, BROKEN = 20, 1e-5, 1e-4


def plan_in(format: str) -> Plan:
    """A clipping norm that some of the steps exceed, and a decay that the losses show."""
    optim = {"weight_decay": 0.3, "clip_norm": 1.5}
    return small.torch_plan(config=CONFIGS["biases"], format=format, optim=optim)


PLAN = plan_in("float32")
Curve = list[float]


@cache
def torch_run(format: str = "float32") -> Run:
    """tptrain's own step on the torch backend."""
    return train_on_torch(plan_in(format), weights_of("biases"), STEPS)


def rates(first: int = 1) -> optax.Schedule:
    """The recipe's learning rates as a function of the updates made; `first` is the step of the first."""
    recipe = PLAN.recipe
    steps = range(first, STEPS + first)
    table = [learning_rate(step, small.PLANNED_STEPS, recipe.schedule, recipe.optim) for step in steps]
    return lambda count: jnp.asarray(table)[count]


# Two programs where one would do: the gradients are compiled once for all optimizers of this file.
loss_and_gradients = nnx.jit(nnx.value_and_grad(loss))


@nnx.jit
def update(decoder: FlaxDecoder, optimizer: nnx.Optimizer, gradients: Any) -> None:
    optimizer.update(decoder, gradients)


def flax_run(transformation: optax.GradientTransformation, format: str = "float32") -> Run:
    decoder = FlaxDecoder(PLAN.facts, params_of("biases", format))
    optimizer = nnx.Optimizer(decoder, transformation, wrt=nnx.Param)
    losses, norms = [], []
    for number in range(1, STEPS + 1):
        value, gradients = loss_and_gradients(decoder, small.train_batch(number % 2))
        losses.append(value.item())
        norms.append(optax.tree.norm(gradients).item())
        update(decoder, optimizer, gradients)
    return Run(losses, norms, {name: np.asarray(array) for name, array in decoder.params().items()})


@nnx.jit
def train_step(decoder: FlaxDecoder, optimizer: nnx.Optimizer, batch: Any) -> jax.Array:
    """The same as one program."""
    value, gradients = nnx.value_and_grad(loss)(decoder, batch)
    optimizer.update(decoder, gradients)
    return value


def largest_gap(ours: Curve, theirs: Curve) -> float:
    """Of two curves, relative."""
    return max(abs(a - b) / b for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize(("format", "tolerance"), [("float32", TOLERANCE), ("float64", 1e-11)])
def test_twenty_losses_equal_those_of_tptrains_step(
    format: str, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And so do gradient norms; weights in float64 alone, as Adam makes large steps of small roundings."""
    # They are float32 in both, as in transformers, and on some processors their last bits differ.
    monkeypatch.setattr(flax_layers, "inverse_frequencies", lambda *of: inverse_frequencies(*of).numpy())
    theirs = torch_run(format)
    with jax.experimental.enable_x64(format == "float64"):
        ours = flax_run(make_optimizer(PLAN.recipe.optim, rates(), PLAN.facts), format)
    assert min(theirs.norms) < PLAN.recipe.optim.clip_norm < max(theirs.norms), "not all steps are clipped"
    assert theirs.losses[-1] < 0.5 * theirs.losses[0]
    assert largest_gap(ours.losses, theirs.losses) <= tolerance
    assert largest_gap(ours.norms, theirs.norms) <= 10 * tolerance
    assert set(ours.params) == set(theirs.params)
    for name, array in theirs.params.items():
        assert ours.params[name].dtype == array.dtype == format
        assert format == "float32" or relative(ours.params[name], array) <= 1e-8, name


def changed(optim: OptimSection, **fields: Any) -> optax.GradientTransformation:
    return make_optimizer(dataclasses.replace(optim, **fields), rates(), PLAN.facts)


@pytest.mark.parametrize(
    "wrong",
    [
        changed(PLAN.recipe.optim, clip_norm=0.0),
        changed(PLAN.recipe.optim, weight_decay=0.0),
        changed(PLAN.recipe.optim, beta2=0.999),
        make_optimizer(PLAN.recipe.optim, rates(first=0), PLAN.facts),
    ],
    ids=["unclipped", "no decay", "beta2", "rate one step late"],
)
def test_another_optimizer_shows_in_the_losses(wrong: optax.GradientTransformation) -> None:
    assert largest_gap(flax_run(wrong).losses, torch_run().losses) >= BROKEN


def test_only_matrices_decay_in_a_state_and_in_a_flat_dict() -> None:
    """With gradients of zero an update is the decay alone."""
    transformation = make_optimizer(OptimSection(weight_decay=0.5), 0.01, PLAN.facts)
    params = params_of("biases")
    nothing = jax.tree.map(jnp.zeros_like, params)
    updates, _ = transformation.update(nothing, transformation.init(params), params)
    decoder = flax_decoder("biases")
    optimizer = nnx.Optimizer(decoder, transformation, wrt=nnx.Param)
    optimizer.update(decoder, jax.tree.map(jnp.zeros_like, nnx.state(decoder, nnx.Param)))
    rows = stored_rows(parameter_table(PLAN.facts))
    assert {row.decay for row in rows} == {True, False}
    for row in rows:
        old, new = params[row.name], decoder.params()[row.name]
        assert relative(new, old * (1 - 0.01 * 0.5) if row.decay else old) <= 1e-7, row.name
        assert jnp.array_equal(old + updates[row.name], new), row.name


@pytest.mark.parametrize(
    "optim", [OptimSection(name="adafactor"), OptimSection(moments_dtype="bfloat16")], ids=["name", "dtype"]
)
def test_what_optax_would_do_otherwise_is_refused(optim: OptimSection) -> None:
    with pytest.raises(ProblemsError, match="has no counterpart in the Flax loop"):
        make_optimizer(optim, 1e-3, PLAN.facts)


def test_an_updated_model_survives_orbax(tmp_path: Path) -> None:
    """The tree of a checkpoint's `params`: the same names, shapes and bits, and a decoder again."""
    decoder = flax_decoder("tied")
    optimizer = nnx.Optimizer(decoder, optax.adamw(1e-3), wrt=nnx.Param)
    batch = small.train_batch(1)
    before, after = (train_step(decoder, optimizer, batch) for _ in range(2))
    assert after < before
    params = decoder.params()
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "params", params)
    with ocp.StandardCheckpointer() as checkpointer:
        saved = checkpointer.metadata(tmp_path / "params").item_metadata.tree
        restored = checkpointer.restore(tmp_path / "params", params)
    rows = stored_rows(parameter_table(decoder.facts))
    assert {name: tuple(array.shape) for name, array in saved.items()} == {r.name: r.size for r in rows}
    given = params_of("tied")
    for name, array in params.items():
        assert jnp.array_equal(restored[name], array) and not jnp.array_equal(array, given[name]), name
    again = FlaxDecoder(decoder.facts, restored)
    assert nnx.jit(loss)(again, batch) == nnx.jit(loss)(decoder, batch)


def test_a_step_over_two_devices_has_the_same_loss_and_leaves_matrices_split() -> None:
    """Where vectors lie after a step is XLA's choice, as nothing here constrains it."""
    mesh = jax_mesh(small.small_plan(2, 1, topology="cpu-2").mesh)
    shardings = {1: named_sharding(mesh, ((),)), 2: named_sharding(mesh, ((), ("fsdp",)))}
    given = params_of("biases").items()
    decoder = FlaxDecoder(PLAN.facts, {n: jax.device_put(a, shardings[a.ndim]) for n, a in given})
    transformation = make_optimizer(PLAN.recipe.optim, rates(), PLAN.facts)
    optimizer = nnx.Optimizer(decoder, transformation, wrt=nnx.Param)
    value = train_step(decoder, optimizer, small.train_batch(1)).item()
    assert largest_gap([value], torch_run().losses[:1]) <= TOLERANCE
    for name, array in decoder.params().items():
        is_split = array.sharding.is_equivalent_to(shardings[2], 2) if array.ndim == 2 else True
        assert is_split and len(array.sharding.device_set) == 2, name
