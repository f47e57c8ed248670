"""The Flax train step with splash attention, interpreted, under shard_map on eight devices."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from contextlib import contextmanager

import jax
import jax.numpy as jnp
import pytest
from jax._src.lib import xla_client

from tests import small
from tests.splash.test_scanned import CONFIG, LENGTH, weights
from tools.bench.flax_step import FlaxStep
from tptrain.backends.torch_backend import TorchBackend
from tptrain.config.kernels import SplashBlocks
from tptrain.jaxside.flax_scan import stack_layers
from tptrain.jaxside.lowering import jitted_to_hlo
from tptrain.jaxside.specs import jax_mesh
from tptrain.train.schedule import step_scalars
from tptrain.train.state import fresh_state
from tptrain.train.step import make_train_step

BLOCKS = SplashBlocks(128, 256, 128)


def flax_outputs() -> dict[str, float]:
    """Loss and gradient norm of the first step, in float32."""
    plan = dataclasses.replace(small.small_plan(4, data=2, config=CONFIG, length=LENGTH), splash=BLOCKS)
    step = FlaxStep(plan, jax_mesh(plan.mesh), "cpu")
    params = {name: jnp.asarray(tensor.numpy()) for name, tensor in weights().items()}
    state = step.first_state(stack_layers(plan.facts, params))
    state = jax.tree.map(lambda array, shape: jax.device_put(array, shape.sharding), state, step.shapes()[0])
    scalars = step_scalars(1, small.PLANNED_STEPS, plan.recipe.schedule, plan.recipe.optim)
    inputs = {**small.train_batch(1, 1, LENGTH), "learning_rate": jnp.float32(scalars["learning_rate"])}
    return {name: array.item() for name, array in step.jitted()(state, inputs)[1].items()}


def torch_outputs() -> dict[str, float]:
    plan = small.torch_plan(config=CONFIG, length=LENGTH)
    backend = TorchBackend(plan)
    decoder = backend.decoder()
    state = fresh_state(backend, small.DictSource(weights()))
    step = make_train_step(decoder, backend.layout, plan.recipe)
    _, outputs = step(state, small.step_inputs(backend, plan, decoder.constants(), 1))
    return {name: outputs[name].item() for name in ("loss", "grad_norm")}


def test_loss_and_gradient_norm_equal_those_of_plain_torch() -> None:
    assert flax_outputs() == pytest.approx(torch_outputs(), rel=1e-5)


def tpu_program(remat: str) -> str:
    """The whole step lowered for a TPU slice, as text of HLO; nothing is compiled."""
    plan = small.small_plan(4, data=2, topology="v5e-8", config=CONFIG, length=LENGTH, remat=remat)
    step = FlaxStep(plan, jax_mesh(plan.mesh))
    with gspmd():
        module = jitted_to_hlo(step.jitted(donate=False), step.shapes(), "tpu")
    text: str = xla_client.XlaComputation(module).as_hlo_text()
    return text


@contextmanager
def gspmd() -> Iterator[None]:
    """The form of shardings that a process lowers in when it lowers for the compiler."""
    jax.config.update("jax_use_shardy_partitioner", False)
    yield
    jax.config.update("jax_use_shardy_partitioner", True)


@pytest.mark.parametrize(("remat", "kernels"), [("full", 4), ("attention", 3), ("dots", 3)])
def test_kernels_run_as_often_as_in_our_own_program(remat: str, kernels: int) -> None:
    """Forward, dq, dkv, and the forward kernel again only where nothing is kept: see test_scanned."""
    assert tpu_program(remat).count('custom_call_target="tpu_custom_call"') == kernels


def test_every_weight_is_split_as_the_plan_says() -> None:
    entry = tpu_program("full").split("ENTRY")[1]
    split = re.findall(r"= f32\[[\d,]+\]\S* parameter\(\d+\), sharding=\{devices=", entry)
    assert len(split) == 1 + 3 * 9, "the weights of the loss, and nine matrices with two moments each"
