"""The decoder split over eight devices: logits equal transformers', gradients equal the torch backend's."""

from __future__ import annotations

import dataclasses
import re
from functools import cache
from typing import Any

import pytest
import torch
import torch_xla
from torch.func import functional_call

from tests import small
from tptrain.backends.base import Tensors
from tptrain.backends.torch_backend import TorchBackend
from tptrain.backends.xla.backend import XlaBackend
from tptrain.config import Plan
from tptrain.config.planning import plan_recipe
from tptrain.config.schema import CompilerSection
from tptrain.train.step import loss_and_gradients

CONFIGS = {False: small.LLAMA3, True: small.LLAMA3_TIED}
IDENTITY = tuple(range(8))
COLLECTIVE_MATMUL = "xla_jf_spmd_threshold_for_windowed_einsum_mib"
PERMUTED = (6, 2, 7, 3, 4, 0, 5, 1)

# fsdp, tensor, tied, order
CASES = {
    "8x1": (8, 1, False, IDENTITY),
    "4x2": (4, 2, False, PERMUTED),
    "2x4": (2, 4, False, IDENTITY),
    "1x8": (1, 8, False, PERMUTED),
    "4x2 tied": (4, 2, True, IDENTITY),
}


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers(case: str) -> None:
    """Packed and padded rows, compared at the real positions, relative to the largest logit."""
    fsdp, tensor, tied, order = CASES[case]
    model, rows = small.reference(tied), small.packed_rows()
    plan = small.small_plan(fsdp, tensor, config=CONFIGS[tied])
    assert plan.padded_vocab == -(-small.VOCAB // tensor) * tensor
    backend = XlaBackend(plan, order)
    decoder = backend.decoder()
    params = backend.place(small.DictSource(small.weights_of(model)))
    constants = {name: backend.put_constant(t) for name, t in decoder.constants().items()}
    batch = backend.put_batch(dict(zip(("tokens", "positions", "ids"), rows.tensors(), strict=True)))
    with torch.no_grad():
        logits = functional_call(decoder, {**params, **constants}, tuple(batch.values()))
    ours = logits.cpu()
    real = torch.from_numpy(rows.real)
    theirs = small.reference_logits(model, rows)
    assert small.difference(ours[..., : small.VOCAB][real], theirs[real]) <= 1e-5
    assert (ours[..., small.VOCAB :] == torch.finfo(torch.float32).min).all()
    assert ours.shape[-1] == plan.padded_vocab


def gradients_of(backend: Any, plan: Plan, weights: Tensors) -> tuple[torch.Tensor, Tensors]:
    """Loss and gradients by buffer name of the first batch, not yet computed on a lazy backend."""
    decoder = backend.decoder()
    params = backend.place(small.DictSource(weights))
    working = {name: p.detach().requires_grad_(True) for name, p in params.items()}
    constants = {name: backend.put_constant(t) for name, t in decoder.constants().items()}
    inputs = small.step_inputs(backend, plan, constants, 1)
    loss, _, gradients = loss_and_gradients(decoder, {**working, **constants}, working, inputs)
    return loss, gradients


@cache
def torch_gradients(tied: bool) -> tuple[float, Tensors]:
    plan = small.torch_plan(config=CONFIGS[tied])
    loss, gradients = gradients_of(TorchBackend(plan), plan, small.weights_of(small.reference(tied)))
    return loss.item(), gradients


@cache
def sharded_gradients(remat: str, tied: bool) -> tuple[float, Tensors, int]:
    """Loss, gradients by row name, and the number of matrix products in the traced program, on 4x2."""
    plan = small.small_plan(4, 2, config=CONFIGS[tied], remat=remat)
    backend = XlaBackend(plan, PERMUTED)
    loss, gradients = gradients_of(backend, plan, small.weights_of(small.reference(tied)))
    for name, gradient in gradients.items():
        backend.mesh.mark(gradient, backend.layout.buffers[name].spec)
    products = torch_xla._XLAC._get_xla_tensors_hlo([loss, *gradients.values()]).count(" dot(")
    return loss.item(), small.whole_rows(backend, plan, gradients), products


@pytest.mark.parametrize(("remat", "tied"), [("none", False), ("full", True), ("full", False)])
def test_gradients_equal_the_torch_backend(remat: str, tied: bool) -> None:
    loss, ours, _ = sharded_gradients(remat, tied)
    expected_loss, expected = torch_gradients(tied)
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    assert set(ours) == set(expected)
    for name, theirs in expected.items():
        rows = theirs.shape[0]
        assert small.difference(ours[name][:rows], theirs) <= 1e-5, name
        assert not ours[name][rows:].any(), f"the padding of {name} must not learn"


@pytest.mark.parametrize(("flags", "cut_up"), [("auto", True), (f"--{COLLECTIVE_MATMUL}=1000000", False)])
def test_gradients_are_the_same_where_tall_matrices_turn_theirs(flags: str, cut_up: bool) -> None:
    """Two rows of 64 tokens a device are more than the 120 columns of gate and up, which have 176 rows."""
    weights = small.weights_of(small.reference())
    plan = small.small_plan(4, 2, remat="full", length=64)
    recipe = dataclasses.replace(plan.recipe, compiler=CompilerSection(tpu_flags=flags))
    plan = plan_recipe(recipe, environ={})
    backend = XlaBackend(plan, PERMUTED)
    loss, ours = gradients_of(backend, plan, weights)
    module = torch_xla._XLAC._get_xla_tensors_hlo([loss, *ours.values()])
    # A sharding is stated for the gradient of down, and for those of gate and up where they are turned.
    stated = re.findall(r"f32\[120,176\]\S* custom-call\(.*custom_call_target=\"Sharding\"", module)
    assert len(stated) == (3 if cut_up else 1)
    for name, gradient in ours.items():
        backend.mesh.mark(gradient, backend.layout.buffers[name].spec)
    whole = small.whole_rows(backend, plan, ours)
    oracle = small.torch_plan(length=64)
    expected_loss, expected = gradients_of(TorchBackend(oracle), oracle, weights)
    assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-6)
    for name, theirs in expected.items():
        assert small.difference(whole[name][: theirs.shape[0]], theirs) <= 1e-5, name


def test_remat_policies_differ_in_the_products_they_compute_again() -> None:
    """A layer has 9 matrix products, the head 1, and the gradients take two for each of them.

    Full remat computes all products of a layer again but the last, whose result no gradient needs. With
    everything kept, none is computed twice.
    """
    without_remat = 3 * (9 + 1)
    assert sharded_gradients("full", False)[2] == without_remat + 8
    assert sharded_gradients("none", False)[2] == without_remat
