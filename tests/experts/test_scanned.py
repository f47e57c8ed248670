"""Grouped products inside the scanned decoder: the losses and gradients of the plain core, and no product is
made twice where its result is kept.
"""

from __future__ import annotations

import re
from collections import Counter
from functools import cache
from typing import Any

import pytest
import torch
import torch_xla
from jax._src.lib import xla_client

from tests import families, small
from tptrain.backends.base import Tensors
from tptrain.backends.torch_backend import TorchBackend
from tptrain.backends.xla.backend import XlaBackend
from tptrain.backends.xla.experts import ExpertsKernel, GroupedExperts
from tptrain.backends.xla.placeholders import PlaceholderBackend
from tptrain.config import Plan
from tptrain.data.batches import Batch
from tptrain.eval.held_out import RowScorer
from tptrain.train.state import fresh_state, split_frozen, state_specs
from tptrain.train.step import loss_and_gradients, make_train_step, prepare_step, step_placeholders

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


def losses(backend: Any, plan: Plan, interpreted: bool) -> tuple[list[float], int]:
    """Losses of some steps of training, whose batches differ, and how many programs they took."""
    decoder = backend.decoder()
    if interpreted:
        kernel = ExpertsKernel(backend.mesh, plan.rules, "cpu")
        decoder.experts_core = GroupedExperts(kernel, decoder.marks, plan.facts.activation)
    state = fresh_state(backend, small.DictSource(weights()))
    constants = {name: backend.put_constant(t) for name, t in decoder.constants().items()}
    function = make_train_step(decoder, backend.layout, plan.recipe)
    inputs = [small.step_inputs(backend, plan, constants, number) for number in range(1, small.STEPS + 1)]
    before = backend.compile_count()
    step = backend.compile_step(function, state, inputs[0], state_specs(backend))
    found = []
    for each in inputs:
        state, outputs = step(state, each)
        found.append(backend.fetch_scalars(outputs)["loss"])
    return found, backend.compile_count() - before


def test_losses_of_training_equal_those_of_one_device_and_one_program_makes_them() -> None:
    """Weights and batches change, and with them which experts tokens go to."""
    plan = small.small_plan(2, 2, expert=2, config=CONFIG, remat="dots")
    ours, compiles = losses(XlaBackend(plan, PERMUTED), plan, interpreted=True)
    oracle = small.torch_plan(config=CONFIG)
    expected, _ = losses(TorchBackend(oracle), oracle, interpreted=False)
    assert compiles == 1
    assert ours == pytest.approx(expected, rel=1e-5)
    assert ours[-1] < 0.9 * ours[0]


@cache
def tpu_program(remat: str) -> str:
    """The traced program of loss and gradients for a TPU slice; nothing is compiled."""
    plan = small.small_plan(2, 2, expert=2, topology="v5e-8", config=CONFIG, remat=remat, attention="plain")
    assert plan.experts == "grouped"
    backend = XlaBackend(plan, IDENTITY)
    loss, gradients = traced(backend, plan, interpreted=False)
    return torch_xla._XLAC._get_xla_tensors_hlo([loss, *gradients.values()])


@pytest.mark.parametrize("remat", POLICIES)
def test_products_are_made_again_only_where_they_are_not_kept(remat: str) -> None:
    """A scan's body is in the program once, whatever the number of layers.

    Forward three products; backward three of gradients with matrices and three of gradients with rows. Where
    the products of gate and up are not kept, the forward module is called again; what it makes of down is not
    read.
    """
    again = 3 if remat in ("full", "attention") else 0
    assert products(tpu_program(remat)) == {"gmm": 3 + 3 + again, "tgmm": 3}


def products(program: str) -> Counter[str]:
    """Calls of the grouped products; those of equal shapes in one module share a computation."""
    return Counter(re.findall(r" call\(.*to_apply=%?(t?gmm)[_.]", program))


def test_no_shape_in_the_program_has_all_experts_and_all_tokens() -> None:
    """Every device has the rows of half of the batch, two for each token, whatever their experts."""
    program = tpu_program("full")
    tokens = small.ROWS // 2 * small.TOKENS
    assert f"[{2 * tokens},{CONFIG['intermediate_size'] // 2}]" in program
    for one in (tokens, small.ROWS * small.TOKENS):
        assert not re.search(rf"\[{one},8,\d+", program) and not re.search(rf"\[8,{one},\d+", program)


def test_the_plan_of_a_run_is_traced_without_data() -> None:
    """Placeholders in the place of every argument, as in a dry run."""
    plan = small.small_plan(2, 2, expert=2, topology="v5e-8", config=CONFIG, remat="full", attention="plain")
    backend = PlaceholderBackend(plan)
    function, constants = prepare_step(backend, plan)
    state, frozen = split_frozen(fresh_state(backend, backend.no_source), backend.layout)
    inputs = {**step_placeholders(backend, plan), **constants, **frozen}
    step = backend.trace_step(function, state, inputs, state_specs(backend))
    assert products(xla_client.XlaComputation(step.module).as_hlo_text()) == {"gmm": 9, "tgmm": 3}


def test_held_out_scores_have_the_grouped_products_of_a_forward_pass() -> None:
    plan = small.small_plan(2, 2, expert=2, topology="v5e-8", config=CONFIG, remat="full", attention="plain")
    backend = PlaceholderBackend(plan)
    scorer = RowScorer(plan, backend)
    counts = dict.fromkeys(("counted_tokens", "real_tokens", "padded_tokens"), 0)
    batch = Batch(**small.train_batch(1), **counts, rows_digest="")
    inputs = scorer.inputs(backend.place(backend.no_source), batch)
    step = backend.trace_step(scorer.function(), {}, inputs, {})
    assert products(xla_client.XlaComputation(step.module).as_hlo_text()) == {"gmm": 3}
