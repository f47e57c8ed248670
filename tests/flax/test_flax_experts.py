"""Training a mixture of experts in Flax: loss and gradients with the router's part equal tptrain's step."""

from __future__ import annotations

import dataclasses
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import pytest
import torch
from flax import nnx

from tests import families, small
from tests.flax.oracle import Arrays, relative
from tptrain.backends.base import Tensors
from tptrain.family import ModelFacts, facts_from_config
from tptrain.jaxside.flax_decoder import FlaxDecoder, loss
from tptrain.jaxside.flax_loss import LossChunks
from tptrain.jaxside.flax_scan import Passes, ScannedDecoder, stack_layers
from tptrain.models.decoder import Decoder
from tptrain.train.step import loss_and_gradients

TOLERANCE, BROKEN = 1e-5, 1e-3
ROUTER = {"output_router_logits": True, "router_aux_loss_coef": 0.7}
CONFIG = {**families.CONFIGS["qwen3_moe"], **ROUTER}
# Two layers with experts; and these above one with an MLP, which makes two loops.
LAYERS = {"layers": {"num_hidden_layers": 2, "mlp_only_layers": []}, "loops": {"mlp_only_layers": [0]}}


def facts_of(layers: str, **of_experts: Any) -> ModelFacts:
    facts = facts_from_config({**CONFIG, **LAYERS[layers]})
    assert facts.experts is not None
    return dataclasses.replace(facts, experts=dataclasses.replace(facts.experts, **of_experts))


@cache
def weights_of(layers: str) -> Tensors:
    return small.weights_of(small.reference_model({**CONFIG, **LAYERS[layers]}))


def params_of(layers: str) -> Arrays:
    return {n: jnp.asarray(t.numpy()) for n, t in weights_of(layers).items()}


@cache
def theirs(layers: str, accumulation: int, **of_experts: Any) -> tuple[float, Tensors]:
    with torch.device("meta"):
        model = Decoder(facts_of(layers, **of_experts))
    working = {n: tensor.clone().requires_grad_(True) for n, tensor in weights_of(layers).items()}
    inputs = {n: torch.from_numpy(array) for n, array in small.train_batch(1, accumulation).items()}
    value, _, gradients = loss_and_gradients(model, {**working, **model.constants()}, working, inputs)
    return value.item(), gradients


def test_loss_and_gradients_equal_the_torch_steps() -> None:
    """Of two micro-batches with unequal counts."""
    decoder = FlaxDecoder(facts_of("layers"), params_of("layers"))
    value, state = nnx.jit(nnx.value_and_grad(loss))(decoder, small.train_batch(1, 2))
    expected, gradients = theirs("layers", 2)
    assert value.item() == pytest.approx(expected, rel=1e-6)
    found = {".".join(map(str, path)): array for path, array in nnx.to_flat_state(nnx.pure(state))}
    assert set(found) == set(gradients)
    for n, gradient in gradients.items():
        assert relative(found[n], gradient.numpy()) <= TOLERANCE, n


def test_the_scanned_decoders_loss_and_gradients_equal_them_too() -> None:
    facts, batch = facts_of("loops"), {n: array[0] for n, array in small.train_batch(1).items()}

    @jax.jit
    def ours(stacks: Arrays) -> tuple[jax.Array, Arrays]:
        def value(stacks: Arrays) -> jax.Array:
            return ScannedDecoder(facts, stacks, Passes()).mean_loss(batch, LossChunks(8))

        return jax.value_and_grad(value)(stacks)

    value, found = ours(stack_layers(facts, params_of("loops")))
    expected, gradients = theirs("loops", 1)
    assert value.item() == pytest.approx(expected, rel=1e-6)
    stacked = stack_layers(facts, {n: jnp.asarray(g.numpy()) for n, g in gradients.items()})
    assert set(found) == set(stacked)
    for n, gradient in stacked.items():
        assert relative(found[n], gradient) <= TOLERANCE, n


def test_the_routers_loss_is_large_enough_to_be_missed() -> None:
    without = theirs("layers", 2, router_loss_coef=0.0)[0]
    assert abs(theirs("layers", 2)[0] / without - 1) >= BROKEN


@pytest.mark.parametrize(("coefficient", "shape"), [(0.7, ()), (0.0, None)])
def test_without_a_coefficient_there_are_no_sums(coefficient: float, shape: tuple[int, ...] | None) -> None:
    decoder = FlaxDecoder(facts_of("layers", router_loss_coef=coefficient), params_of("layers"))
    rows = small.packed_rows()
    _, of_router = jax.eval_shape(decoder.with_router_loss, rows.tokens, rows.positions, rows.segment_ids)
    assert getattr(of_router, "shape", None) == shape
