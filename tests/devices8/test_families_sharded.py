"""Every family split over eight devices: loss and gradients equal the torch backend's on one."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests import families, small
from tptrain.backends.base import Tensors
from tptrain.backends.torch_backend import TorchBackend
from tptrain.backends.xla.backend import XlaBackend
from tptrain.config import Plan
from tptrain.train.step import loss_and_gradients

ORDER = (6, 2, 7, 3, 4, 0, 5, 1)


def gradients_of(backend: Any, plan: Plan, weights: Tensors) -> tuple[torch.Tensor, Tensors]:
    """Loss and gradients by buffer name of the first batch, not yet computed on a lazy backend."""
    decoder = backend.decoder()
    params = backend.place(small.DictSource(weights))
    working = {name: p.detach().requires_grad_(True) for name, p in params.items()}
    constants = {name: backend.put_constant(t) for name, t in decoder.constants().items()}
    inputs = small.step_inputs(backend, plan, constants, 1)
    loss, _, gradients = loss_and_gradients(decoder, {**working, **constants}, working, inputs)
    return loss, gradients


@pytest.mark.parametrize("name", families.CONFIGS)
def test_loss_and_gradients_equal_the_torch_backend(name: str) -> None:
    """Layers in loops over their period, a shorter loop for the rest of the depth, and chunks of the loss."""
    config, weights = families.CONFIGS[name], small.weights_of(families.model_of(name))
    plan = small.small_plan(4, 2, config=config, remat="full", chunk_tokens=8)
    backend = XlaBackend(plan, ORDER)
    loss, traced = gradients_of(backend, plan, weights)
    for buffer, gradient in traced.items():
        backend.mesh.mark(gradient, backend.layout.buffers[buffer].spec)
    ours = small.whole_rows(backend, plan, traced)
    oracle = small.torch_plan(config=config)
    expected_loss, expected = gradients_of(TorchBackend(oracle), oracle, weights)
    assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-6)
    assert set(ours) == set(expected)
    for row, theirs in expected.items():
        assert small.difference(ours[row][: theirs.shape[0]], theirs) <= 1e-5, row
