"""The loss in chunks of tokens against the plain one: all logits at once, gradients by autograd."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

from tests import small
from tptrain.backends.base import Tensors
from tptrain.backends.torch_backend import TorchBackend
from tptrain.train.step import loss_and_gradients

CONFIGS = {False: small.LLAMA3, True: small.LLAMA3_TIED}


class Case:
    """A plan on the torch backend, its weights, and the first batch with a row of which nothing counts."""

    def __init__(self, tied: bool = False, **changes: Any):
        self.plan = small.torch_plan(config=CONFIGS[tied], **changes)
        self.backend = TorchBackend(self.plan)
        self.decoder = self.backend.decoder()
        weights = self.backend.place(small.DictSource(small.weights_of(small.reference(tied))))
        self.working = {name: tensor.requires_grad_(True) for name, tensor in weights.items()}
        self.constants = self.decoder.constants()
        self.inputs = small.step_inputs(self.backend, self.plan, self.constants, 1)
        self.inputs["weights"][:, 4] = 0.0
        per_row = self.inputs["weights"].sum(-1)
        assert (per_row == 0).any() and (per_row > 0).sum() > 3

    def chunked(self) -> tuple[torch.Tensor, Tensors]:
        modules = {**self.working, **self.constants}
        loss, _, gradients = loss_and_gradients(self.decoder, modules, self.working, self.inputs)
        return loss, gradients

    def plain(self) -> tuple[torch.Tensor, Tensors]:
        modules = {**self.working, **self.constants}
        return small.plain_loss_and_gradients(self.decoder, modules, self.working, self.inputs)


@cache
def plain(tied: bool, format: str, accumulation: int) -> tuple[torch.Tensor, Tensors]:
    return Case(tied, format=format, accumulation=accumulation).plain()


@pytest.mark.parametrize("chunk_tokens", [1, 8, 16, 32])
@pytest.mark.parametrize(("tied", "accumulation"), [(False, 1), (False, 2), (True, 1), (True, 2)])
@pytest.mark.parametrize(
    ("format", "loss_gap", "gradient_gap"), [("float32", 1e-6, 1e-5), ("float64", 1e-13, 1e-10)]
)
def test_loss_and_gradients_equal_the_plain_ones(
    format: str, loss_gap: float, gradient_gap: float, tied: bool, accumulation: int, chunk_tokens: int
) -> None:
    case = Case(tied, format=format, accumulation=accumulation, chunk_tokens=chunk_tokens)
    assert case.decoder.loss_chunks is not None and case.decoder.loss_chunks.tokens == chunk_tokens
    loss, gradients = case.chunked()
    expected_loss, expected = plain(tied, format, accumulation)
    assert loss.dtype == getattr(torch, format)
    assert loss.item() == pytest.approx(expected_loss.item(), rel=loss_gap)
    assert set(gradients) == set(expected)
    for name, gradient in gradients.items():
        assert small.difference(gradient, expected[name]) <= gradient_gap, name
