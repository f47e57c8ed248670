"""Grouped products inside the scanned decoder: the losses and gradients of the plain core, and no product is
made twice where its result is kept.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
import torch_xla

from tests import families, small
from tptrain.backends.base import Tensors
from tptrain.backends.torch_backend import TorchBackend
from tptrain.backends.xla.backend import XlaBackend
from tptrain.backends.xla.experts import ExpertsKernel, GroupedExperts
from tptrain.config import Plan
from tptrain.train.step import loss_and_gradients

PERMUTED = (6, 2, 7, 3, 4, 0, 5, 1)
IDENTITY = tuple(range(8))
# Experts that 2 and 4 divide. Its router's loss counts.
CONFIG = {**families.CONFIGS["mixtral"], "num_local_experts": 8, "num_hidden_layers": 2}
# fsdp, expert, tensor, order
MESHES = {
    "4x2x1": (4, 2, 1, PERMUTED),
    "2x4x1": (2, 4, 1, IDENTITY),
    "2x2x2": (2, 2, 2, PERMUTED),
    "4x1x2": (4, 1, 2, PERMUTED),
}
POLICIES = ("full", "attention", "dots", "none")


@cache
def weights() -> Tensors:
    return small.weights_of(small.reference_model(CONFIG))


def traced(backend: Any, plan: Plan, interpreted: bool) -> tuple[torch.Tensor, Tensors]:
    """Loss and gradients by buffer name of the first batch, not yet computed on a lazy backend."""
    decoder = backend.decoder()
    if interpreted:
        kernel = ExpertsKernel(backend.mesh, plan.rules, "cpu")
        decoder.experts_core = GroupedExperts(kernel, decoder.marks, plan.facts.activation)
    params = backend.place(small.DictSource(weights()))
    working = {name: p.detach().requires_grad_(True) for name, p in params.items()}
    constants = {name: backend.put_constant(t) for name, t in decoder.constants().items()}
    inputs = small.step_inputs(backend, plan, constants, 1)
    loss, _, gradients = loss_and_gradients(decoder, {**working, **constants}, working, inputs)
    return loss, gradients


@cache
def plain() -> tuple[float, Tensors]:
    plan = small.torch_plan(config=CONFIG)
    loss, gradients = traced(TorchBackend(plan), plan, interpreted=False)
    return loss.item(), gradients


def check(mesh: str, remat: str, interpreted: bool) -> None:
    fsdp, expert, tensor, order = MESHES[mesh]
    plan = small.small_plan(fsdp, tensor, expert=expert, config=CONFIG, remat=remat)
    backend = XlaBackend(plan, order)
    loss, gradients = traced(backend, plan, interpreted)
    for name, gradient in gradients.items():
        backend.mesh.mark(gradient, backend.layout.buffers[name].spec)
    torch_xla.sync()
    ours = small.whole_rows(backend, plan, gradients)
    expected_loss, expected = plain()
    assert loss.item() == pytest.approx(expected_loss, rel=1e-6)
    assert set(ours) == set(expected)
    for name, theirs in expected.items():
        assert small.difference(ours[name][: theirs.shape[0]], theirs) <= 1e-5, name


@pytest.mark.parametrize("remat", POLICIES)
def test_loss_and_gradients_equal_the_plain_core_under_every_policy(remat: str) -> None:
    check("4x2x1", remat, interpreted=True)


@pytest.mark.parametrize("mesh", [name for name in MESHES if name != "4x2x1"])
def test_and_on_every_mesh(mesh: str) -> None:
    check(mesh, "full", interpreted=True)


def test_the_plain_core_takes_an_expert_axis_too() -> None:
    check("2x2x2", "full", interpreted=False)
