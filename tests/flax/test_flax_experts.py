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
# Experts, an MLP, experts: three loops, two of which have sums of the router's to hand on.
CONFIG = {**families.CONFIGS["qwen3_moe"], **ROUTER}


def facts_of(**of_experts: Any) -> ModelFacts:
    facts = facts_from_config(CONFIG)
    assert facts.experts is not None
    return dataclasses.replace(facts, experts=dataclasses.replace(facts.experts, **of_experts))


def params_of() -> Arrays:
    return {n: jnp.asarray(t.numpy()) for n, t in small.weights_of(families.model_of("qwen3_moe")).items()}


@cache
def theirs(accumulation: int, **of_experts: Any) -> tuple[float, Tensors]:
    with torch.device("meta"):
        model = Decoder(facts_of(**of_experts))
    weights = small.weights_of(families.model_of("qwen3_moe"))
    working = {n: tensor.clone().requires_grad_(True) for n, tensor in weights.items()}
    inputs = {n: torch.from_numpy(array) for n, array in small.train_batch(1, accumulation).items()}
    value, _, gradients = loss_and_gradients(model, {**working, **model.constants()}, working, inputs)
    return value.item(), gradients


def test_loss_and_gradients_equal_the_torch_steps() -> None:
    """Of two micro-batches with unequal counts."""
    decoder = FlaxDecoder(facts_of(), params_of())
    value, state = nnx.jit(nnx.value_and_grad(loss))(decoder, small.train_batch(1, 2))
    expected, gradients = theirs(2)
    assert value.item() == pytest.approx(expected, rel=1e-6)
    found = {".".join(map(str, path)): array for path, array in nnx.to_flat_state(nnx.pure(state))}
    assert set(found) == set(gradients)
    for n, gradient in gradients.items():
        assert relative(found[n], gradient.numpy()) <= TOLERANCE, n


def test_the_scanned_decoders_loss_and_gradients_equal_them_too() -> None:
    facts, batch = facts_of(), {n: array[0] for n, array in small.train_batch(1).items()}

    @jax.jit
    def ours(stacks: Arrays) -> tuple[jax.Array, Arrays]:
        def value(stacks: Arrays) -> jax.Array:
            return ScannedDecoder(facts, stacks, Passes()).mean_loss(batch, LossChunks(8))

        return jax.value_and_grad(value)(stacks)

    value, found = ours(stack_layers(facts, params_of()))
    expected, gradients = theirs(1)
    assert value.item() == pytest.approx(expected, rel=1e-6)
    stacked = stack_layers(facts, {n: jnp.asarray(g.numpy()) for n, g in gradients.items()})
    assert set(found) == set(stacked)
    for n, gradient in stacked.items():
        assert relative(found[n], gradient) <= TOLERANCE, n


def test_the_routers_loss_is_large_enough_to_be_missed() -> None:
    without = theirs(1, router_loss_coef=0.0)[0]
    assert abs(theirs(1)[0] / without - 1) >= BROKEN
    decoder, rows = FlaxDecoder(facts_of(router_loss_coef=0.0), params_of()), small.packed_rows()
    assert decoder.with_router_loss(rows.tokens, rows.positions, rows.segment_ids)[1] is None
