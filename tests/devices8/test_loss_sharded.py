"""The loss in chunks on eight devices: its gradients, and which logits the traced program holds."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from functools import cache

import pytest
import torch
import torch_xla

from tests import small
from tptrain.backends.base import Tensors
from tptrain.backends.torch_backend import TorchBackend
from tptrain.backends.xla.backend import XlaBackend
from tptrain.config import Plan
from tptrain.models.calling import call_method
from tptrain.train.step import LOSS_NAMES, loss_and_gradients

CONFIGS = {False: small.LLAMA3, True: small.LLAMA3_TIED}
PERMUTED = (6, 2, 7, 3, 4, 0, 5, 1)


@dataclass(frozen=True)
class Case:
    """data x fsdp x tensor must be 8."""

    fsdp: int
    tensor: int
    chunk_tokens: int
    data: int = 1
    tied: bool = False
    accumulation: int = 1
    order: tuple[int, ...] = PERMUTED

    def plan(self) -> Plan:
        return small.small_plan(
            self.fsdp,
            self.tensor,
            self.data,
            config=CONFIGS[self.tied],
            accumulation=self.accumulation,
            chunk_tokens=self.chunk_tokens,
        )


CASES = {
    "4x2": Case(4, 2, 8),
    "2x4 tied": Case(2, 4, 16, tied=True),
    "8x1 tied accumulated": Case(8, 1, 16, tied=True, accumulation=2),
    "data 2, 2x2": Case(2, 2, 8, data=2, order=tuple(range(8))),
    "all at once": Case(4, 2, small.TOKENS),
}


@cache
def plain(tied: bool, accumulation: int) -> tuple[float, Tensors]:
    """The plain loss on the torch backend, in double precision."""
    plan = small.torch_plan(config=CONFIGS[tied], accumulation=accumulation, format="float64")
    backend = TorchBackend(plan)
    decoder, constants = backend.decoder(), backend.decoder().constants()
    weights = backend.place(small.DictSource(small.weights_of(small.reference(tied))))
    working = {name: tensor.requires_grad_(True) for name, tensor in weights.items()}
    inputs = small.step_inputs(backend, plan, constants, 1)
    loss, gradients = small.plain_loss_and_gradients(decoder, {**working, **constants}, working, inputs)
    return loss.item(), gradients


@cache
def traced(case: str) -> tuple[XlaBackend, torch.Tensor, Tensors, str]:
    """Loss, gradients by buffer name, and the program that computes them."""
    plan = CASES[case].plan()
    backend = XlaBackend(plan, CASES[case].order)
    decoder = backend.decoder()
    weights = backend.place(small.DictSource(small.weights_of(small.reference(CASES[case].tied))))
    working = {name: tensor.detach().requires_grad_(True) for name, tensor in weights.items()}
    constants = {name: backend.put_constant(t) for name, t in decoder.constants().items()}
    inputs = small.step_inputs(backend, plan, constants, 1)
    loss, _, gradients = loss_and_gradients(decoder, {**working, **constants}, working, inputs)
    for name, gradient in gradients.items():
        backend.mesh.mark(gradient, backend.layout.buffers[name].spec)
    program = torch_xla._XLAC._get_xla_tensors_hlo([loss, *gradients.values()])
    return backend, loss, gradients, program


@pytest.mark.parametrize("case", [case for case in CASES if case != "all at once"])
def test_loss_and_gradients_equal_the_plain_ones(case: str) -> None:
    backend, loss, gradients, _ = traced(case)
    expected_loss, expected = plain(CASES[case].tied, CASES[case].accumulation)
    assert loss.item() == pytest.approx(expected_loss, rel=1e-6)
    ours = small.whole_rows(backend, backend.plan, gradients)
    assert set(ours) == set(expected)
    for name, theirs in expected.items():
        rows = theirs.shape[0]
        assert small.difference(ours[name][:rows], theirs) <= 1e-5, name
        assert not ours[name][rows:].any(), f"the padding of {name} must not learn"


def tokens_with_logits(program: str, vocab: int) -> set[int]:
    """For every float array of a program with a dim of the vocabulary: the product of its other dims."""
    found = set()
    for dims in re.findall(r"\b(?:f|bf)\d+\[([\d,]+)\]", program):
        sizes = [int(size) for size in dims.split(",")]
        if vocab in sizes:
            found.add(math.prod(sizes) // vocab)
    return found


def test_scores_without_gradients_hold_the_logits_of_a_chunk_too() -> None:
    plan = CASES["4x2"].plan()
    backend = XlaBackend(plan, PERMUTED)
    decoder = backend.decoder()
    weights = backend.place(small.DictSource(small.weights_of(small.reference())))
    constants = {name: backend.put_constant(t) for name, t in decoder.constants().items()}
    inputs = small.step_inputs(backend, plan, constants, 1)
    with torch.no_grad():
        arguments = tuple(inputs[name][0] for name in LOSS_NAMES)
        sums = call_method(decoder, "token_scores", {**weights, **constants}, arguments)
    program = torch_xla._XLAC._get_xla_tensors_hlo([sums])
    found = tokens_with_logits(program, backend.plan.padded_vocab)
    assert found - {1, plan.facts.hidden_size} == {small.ROWS * 8}


@pytest.mark.parametrize("case", CASES)
def test_the_program_holds_the_logits_of_a_chunk_at_a_time(case: str) -> None:
    """Beside logits, [tokens, V], there are the head and its partial gradients, [shards x D, V]."""
    backend, _, _, program = traced(case)
    chunk, width = CASES[case].chunk_tokens, backend.plan.facts.hidden_size
    found = tokens_with_logits(program, backend.plan.padded_vocab)
    weights = {1, width, width * backend.plan.batch_shards}
    assert found - weights == {small.ROWS * chunk}
