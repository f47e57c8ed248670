"""Splash attention inside the scanned decoder: the same losses and gradients under every remat policy, and no
kernel run twice where its results are kept.
"""

from __future__ import annotations

import re
from functools import cache
from typing import Any

import pytest
import torch
import torch_xla
import torch_xla.distributed.spmd as xs
from jax._src.lib import xla_client
from torch_xla.core.xla_builder import create_placeholder_tensor

from tests import small
from tptrain.backends.base import Tensors
from tptrain.backends.torch_backend import TorchBackend
from tptrain.backends.xla.backend import XlaBackend
from tptrain.backends.xla.placeholders import PlaceholderBackend
from tptrain.backends.xla.sharding import partition_spec
from tptrain.backends.xla.splash import SplashKernel, splash_core
from tptrain.config import Plan
from tptrain.config.kernels import SplashBlocks
from tptrain.data.batches import Batch
from tptrain.eval.held_out import RowScorer
from tptrain.mesh import Spec, spec_of
from tptrain.train.step import loss_and_gradients

PERMUTED = (6, 2, 7, 3, 4, 0, 5, 1)
LENGTH = 256
CONFIG = small.small_config(
    "llama3",
    hidden_size=44,
    intermediate_size=56,
    num_attention_heads=4,
    num_key_value_heads=2,
    num_hidden_layers=2,
)
COUNTS = ("counted_tokens", "real_tokens", "padded_tokens")
POLICIES = ("full", "attention", "dots", "none")


@cache
def weights() -> Tensors:
    return small.weights_of(small.reference_model(CONFIG))


def traced(backend: Any, plan: Plan, interpreted: bool) -> tuple[torch.Tensor, Tensors]:
    """Loss and gradients by buffer name of the first batch, not yet computed on a lazy backend."""
    decoder = backend.decoder()
    if interpreted:
        kernel = SplashKernel(backend.mesh, plan.rules.acts, SplashBlocks(128, 256, 128), "cpu")
        decoder.attention_core = splash_core(kernel, decoder.marks)
    params = backend.place(small.DictSource(weights()))
    working = {name: p.detach().requires_grad_(True) for name, p in params.items()}
    constants = {name: backend.put_constant(t) for name, t in decoder.constants().items()}
    inputs = small.step_inputs(backend, plan, constants, 1)
    loss, _, gradients = loss_and_gradients(decoder, {**working, **constants}, working, inputs)
    return loss, gradients


@cache
def plain() -> tuple[float, Tensors]:
    plan = small.torch_plan(config=CONFIG, length=LENGTH)
    loss, gradients = traced(TorchBackend(plan), plan, interpreted=False)
    return loss.item(), gradients


@pytest.mark.parametrize("remat", POLICIES)
def test_loss_and_gradients_equal_plain_attention(remat: str) -> None:
    plan = small.small_plan(4, 2, config=CONFIG, remat=remat, length=LENGTH)
    backend = XlaBackend(plan, PERMUTED)
    loss, gradients = traced(backend, plan, interpreted=True)
    for name, gradient in gradients.items():
        backend.mesh.mark(gradient, backend.layout.buffers[name].spec)
    torch_xla.sync()
    ours = small.whole_rows(backend, plan, gradients)
    expected_loss, expected = plain()
    assert loss.item() == pytest.approx(expected_loss, rel=1e-6)
    assert set(ours) == set(expected)
    for name, theirs in expected.items():
        assert small.difference(ours[name][: theirs.shape[0]], theirs) <= 5e-6, name


@cache
def tpu_program(remat: str, attention: str = "auto") -> str:
    """The traced program of loss and gradients for a TPU slice; nothing is compiled."""
    plan = small.small_plan(
        4, 2, topology="v5e-8", config=CONFIG, remat=remat, length=LENGTH, attention=attention
    )
    backend = XlaBackend(plan, PERMUTED)
    count = backend.compile_count()
    loss, gradients = traced(backend, plan, interpreted=False)
    program = torch_xla._XLAC._get_xla_tensors_hlo([loss, *gradients.values()])
    assert backend.compile_count() == count
    return program


def kernels(program: str) -> list[str]:
    """The phase of every kernel call in a program: fwd, dkv or dq."""
    calls = [line for line in program.splitlines() if 'custom_call_target="tpu_custom_call"' in line]
    return sorted(re.search(r"splash_mha_(fwd|dkv|dq)_", line)[1] for line in calls)  # type: ignore[index]


@pytest.mark.parametrize("remat", [*POLICIES, "offload", "offload_attention"])
def test_the_forward_kernel_runs_again_only_where_its_results_are_not_kept(remat: str) -> None:
    """A scan's body is in the program once, whatever the number of layers."""
    forward = 2 if remat in ("full", "offload") else 1
    assert kernels(tpu_program(remat)) == ["dkv", "dq", *["fwd"] * forward]


@pytest.mark.parametrize(("remat", "stacks"), [("attention", 0), ("offload", 1), ("offload_attention", 3)])
def test_what_is_offloaded_is_moved_to_the_host_and_back(remat: str, stacks: int) -> None:
    """The layers' inputs, and for one policy the attended values and their logsumexp."""
    program = tpu_program(remat)
    for target in ("MoveToHost", "MoveToDevice"):
        assert program.count(f'custom_call_target="{target}"') == stacks


def test_policies_differ_in_the_products_they_compute_again() -> None:
    """Beside attention a layer has 7 matrix products, the head 1, and gradients take two for each of them.
    The backward call adds one (the sum of values times their gradients)."""
    again = {policy: tpu_program(policy).count(" dot(") - (3 * (7 + 1) + 1) for policy in POLICIES}
    assert again == {"full": 6, "attention": 6, "dots": 1, "none": 0}


def test_no_score_and_no_mask_is_in_the_program() -> None:
    """No tensor has two dims of the row's length; plain attention has."""
    square = re.compile(rf"\[(\d+,)*{LENGTH},(\d+,)*{LENGTH}[\],]")
    assert not square.search(tpu_program("none"))
    assert square.search(tpu_program("none", "plain"))


def test_pieces_are_manual_and_only_gspmd_is_used() -> None:
    program = tpu_program("full")
    assert "SPMDFullToShardShape" in program and "SPMDShardToFullShape" in program
    assert "sdy." not in program


def test_the_program_is_traced_without_data() -> None:
    """Placeholders in the place of every argument, as in a dry run."""
    plan = small.small_plan(4, 2, topology="v5e-8", config=CONFIG, remat="attention", length=LENGTH)
    backend = XlaBackend(plan, PERMUTED)
    decoder = backend.decoder()

    def placeholder(shape: tuple[int, ...], spec: Spec, dtype: torch.dtype) -> torch.Tensor:
        tensor = create_placeholder_tensor(shape, dtype)
        xs.annotate_custom_sharding(tensor, backend.mesh.xla, partition_spec(spec))
        return tensor

    buffers = backend.layout.buffers.values()
    params = {b.name: placeholder(b.shape, b.spec, b.dtype) for b in buffers}
    working = {name: p.requires_grad_(True) for name, p in params.items()}
    constants = {
        n: placeholder(tuple(t.shape), ((),) * t.ndim, t.dtype) for n, t in decoder.constants().items()
    }
    rows = ((), *spec_of(("act_batch", "act_tokens"), plan.rules.acts))
    batch = {
        name: placeholder(a.shape, rows, torch.from_numpy(a).dtype)
        for name, a in small.train_batch(1, 1, LENGTH).items()
    }
    loss, _, gradients = loss_and_gradients(decoder, {**working, **constants}, working, batch)
    program = torch_xla._XLAC._get_xla_tensors_hlo([loss, *gradients.values()])
    assert kernels(program) == ["dkv", "dq", "fwd"]
    assert program.count(" dot(") == tpu_program("attention").count(" dot(")


def test_held_out_scores_run_each_forward_kernel_once_and_no_backward_one() -> None:
    """The program of an evaluation, traced for a TPU slice without data, as a dry run traces a step."""
    plan = small.small_plan(4, data=2, topology="v5e-8", config=CONFIG, length=LENGTH, remat="full")
    backend = PlaceholderBackend(plan)
    scorer = RowScorer(plan, backend)
    batch = Batch(**small.train_batch(1, 1, LENGTH), **dict.fromkeys(COUNTS, 0), rows_digest="")
    inputs = scorer.inputs(backend.place(backend.no_source), batch)
    step = backend.trace_step(scorer.function(), {}, inputs, {})
    program: str = xla_client.XlaComputation(step.module).as_hlo_text()
    assert program.count('custom_call_target="tpu_custom_call"') == 1, "in the body of the loop over layers"
    assert step.donated == frozenset() and step.outputs == ("loss_sum", "counted", "correct")
