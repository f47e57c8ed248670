"""The check of packed rows before training: silent where records are apart, and not where anything leaks."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests import families, small
from tests.held_out_rows import dataset
from tptrain.backends.base import Tensors
from tptrain.backends.torch_backend import TorchBackend
from tptrain.config import Plan
from tptrain.config.schema import DataSection
from tptrain.data.batches import Batch, Batches
from tptrain.eval.held_out import RowScorer
from tptrain.eval.isolation import Isolation, isolation, leak_refusal
from tptrain.models import attention


def packed_batch(accumulation: int = 1) -> Batch:
    section = DataSection(seq_len=small.TOKENS, batch_rows=4, packing="best_fit")
    return Batches(dataset(), section, accumulation, None).batch_at(0)


def asked(name: str, batch: Batch) -> tuple[Plan, Isolation | None]:
    plan = small.torch_plan(config=families.CONFIGS[name])
    backend = TorchBackend(plan)
    params: Tensors = backend.place(small.DictSource(small.weights_of(families.model_of(name))))
    return plan, isolation(RowScorer(plan, backend), params, batch, plan.facts.vocab_size)


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "mixtral"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_records_that_are_apart(name: str, accumulation: int) -> None:
    batch = packed_batch(accumulation)
    plan, found = asked(name, batch)
    assert found is not None
    assert found.rows == int((batch.segment_ids[0].max(axis=-1) > 1).sum()) > 0
    assert not found.leak(is_mixture=plan.facts.experts is not None)
    assert found.first_before != found.first_after


def test_a_mask_without_segments_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    mask = attention.causal_mask
    monkeypatch.setattr(attention, "causal_mask", lambda ids, window: mask((ids > 0).int(), window))
    plan, found = asked("llama", packed_batch())
    assert found is not None and found.leak(is_mixture=False) and found.leak(is_mixture=True)
    (problem,) = leak_refusal(plan, found).problems
    assert (problem.setting, problem.rule) == ("data.packing", "must keep the records of a row apart")
    assert repr(found.before) in problem.other and repr(found.after) in problem.other


def test_numbers_that_are_none_and_a_change_that_does_not_arrive_are_no_pass() -> None:
    whole = Isolation(rows=2, before=3.5, after=3.5, first_before=1.0, first_after=1.25)
    assert not whole.leak(is_mixture=False)
    assert replace(whole, after=float("nan")).leak(is_mixture=False)
    assert replace(whole, after=3.5000002).leak(is_mixture=False)
    assert not replace(whole, after=3.5000002).leak(is_mixture=True)
    assert replace(whole, first_after=1.0).leak(is_mixture=True)


def test_rows_of_one_record_need_no_check() -> None:
    section = DataSection(seq_len=small.TOKENS, batch_rows=4)
    assert asked("llama", Batches(dataset(), section, 1, None).batch_at(0))[1] is None
