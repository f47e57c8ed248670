"""Held-out loss over eight devices: what one device finds, from one program that reads the weights alone."""

from __future__ import annotations

from functools import cache

import pytest

from tests import small
from tests.held_out_rows import likely_dataset
from tptrain.backends.torch_backend import TorchBackend
from tptrain.backends.xla.backend import XlaBackend
from tptrain.eval.held_out import HeldOut, HeldOutScore, RowScorer

PERMUTED = (6, 2, 7, 3, 4, 0, 5, 1)


@cache
def unsharded() -> HeldOutScore:
    plan = small.torch_plan(format="float64")
    backend = TorchBackend(plan)
    params = backend.place(small.DictSource(small.weights_of(small.reference())))
    return HeldOut(plan, RowScorer(plan, backend), likely_dataset())(params)


@pytest.mark.parametrize(("fsdp", "tensor", "data", "chunk"), [(4, 2, 1, 8), (2, 2, 2, 0), (8, 1, 1, 16)])
def test_sharded_equals_unsharded(fsdp: int, tensor: int, data: int, chunk: int) -> None:
    """The vocabulary of 1031 is padded and split where tensor is 2, the rows over fsdp and data."""
    plan = small.small_plan(fsdp, tensor, data, chunk_tokens=chunk, remat="full")
    backend = XlaBackend(plan, PERMUTED if data == 1 else tuple(range(8)))
    params = backend.place(small.DictSource(small.weights_of(small.reference())))
    held_out = HeldOut(plan, RowScorer(plan, backend), likely_dataset())
    before = backend.compile_count()
    ours = held_out(params)
    assert backend.compile_count() == before + 1
    again = held_out(params)
    assert backend.compile_count() == before + 1, "a later evaluation compiles nothing"
    assert ours == again
    assert ours.loss == pytest.approx(unsharded().loss, rel=1e-6)
    assert (ours.token_accuracy, ours.counted_tokens) == (
        unsharded().token_accuracy,
        unsharded().counted_tokens,
    )
    weights = small.whole_rows(backend, plan, params)
    for name, theirs in small.weights_of(small.reference()).items():
        assert (weights[name][: theirs.shape[0]] == theirs).all(), "scoring leaves the weights alone"
