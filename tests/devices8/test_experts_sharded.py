"""Mixtures of experts split over eight devices: the router's loss across loops, and decoding."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests import families, greedy, small
from tptrain.backends.base import Tensors
from tptrain.backends.torch_backend import TorchBackend
from tptrain.backends.xla.backend import XlaBackend
from tptrain.config import Plan
from tptrain.generate.decoding import Generator
from tptrain.train.step import loss_and_gradients

ORDER = (6, 2, 7, 3, 4, 0, 5, 1)
# Experts, an MLP, experts: three loops, two of which have sums of the router's to hand on.
CONFIG: dict[str, Any] = {
    **families.CONFIGS["qwen3_moe"],
    **{"num_experts": 5, "num_experts_per_tok": 2, "norm_topk_prob": True},
    **{"output_router_logits": True, "router_aux_loss_coef": 0.7},
}
WEIGHTS = small.weights_of(small.reference_model(CONFIG))


def gradients_of(backend: Any, plan: Plan) -> tuple[torch.Tensor, Tensors]:
    """Loss and gradients by buffer name of the first batch, not yet computed on a lazy backend."""
    decoder = backend.decoder()
    buffers = backend.layout.buffers
    # As in the step: frozen weights are stored in bfloat16, and computed with in the format of the others.
    params = {n: p.detach().float() for n, p in backend.place(small.DictSource(WEIGHTS)).items()}
    working = {n: p.requires_grad_(True) for n, p in params.items() if buffers[n].trainable}
    constants = {name: backend.put_constant(t) for name, t in decoder.constants().items()}
    inputs = small.step_inputs(backend, plan, constants, 1)
    loss, _, gradients = loss_and_gradients(decoder, {**params, **constants}, working, inputs)
    return loss, gradients


def test_the_routers_loss_over_several_loops_equals_the_torch_backends() -> None:
    """The router of a frozen layer, whose loop has no backward pass, and that of a trained one."""
    changes: dict[str, Any] = {"remat": "none", "trainable": ("model.layers.1.*", "model.layers.2.*")}
    plan = small.small_plan(4, 2, config=CONFIG, **changes)
    backend = XlaBackend(plan, ORDER)
    loss, traced = gradients_of(backend, plan)
    for name, gradient in traced.items():
        backend.mesh.mark(gradient, backend.layout.buffers[name].spec)
    ours = small.whole_rows(backend, plan, traced)
    oracle = small.torch_plan(config=CONFIG, **changes)
    expected_loss, expected = gradients_of(TorchBackend(oracle), oracle)
    assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-6)
    assert set(ours) == set(expected)
    for row, theirs in expected.items():
        assert small.difference(ours[row][: theirs.shape[0]], theirs) <= 1e-5, row


def test_greedy_answers_equal_the_torch_backends() -> None:
    answers = []
    for backend in (
        XlaBackend(plan := small.small_plan(4, 2, config=CONFIG), ORDER),
        TorchBackend(plain := small.torch_plan(config=CONFIG)),
    ):
        made = Generator(backend, plain if isinstance(backend, TorchBackend) else plan, 6, 12, 6, ())
        answers.append(made.generate(backend.place(small.DictSource(WEIGHTS)), greedy.prompts()[:6]))
    assert answers[0] == answers[1]
    assert len({tuple(answer) for answer in answers[0]}) > 3
