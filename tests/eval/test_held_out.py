"""Held-out loss and token accuracy on the torch backend: transformers' numbers, whatever the batches."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch

from tests import families, small
from tests.held_out_rows import LENGTHS, PAD, dataset, likely_dataset
from tptrain.backends.torch_backend import TorchBackend
from tptrain.config import Plan
from tptrain.config.planning import plan_recipe
from tptrain.data.batches import Batch
from tptrain.eval.held_out import HeldOut, HeldOutScore, RowScorer, RowTotals
from tptrain.models.loss import LossChunks, Projection, token_scores
from tptrain.models.marks import Marks


def with_rows(plan: Plan, rows: int) -> Plan:
    """The same plan with another number of rows in a batch."""
    return plan_recipe(replace(plan.recipe, data=replace(plan.recipe.data, batch_rows=rows)), environ={})


def score(plan: Plan) -> HeldOutScore:
    backend = TorchBackend(plan)
    params = backend.place(small.DictSource(small.weights_of(small.reference())))
    return HeldOut(plan, RowScorer(plan, backend), dataset())(params)


@cache
def of_transformers() -> HeldOutScore:
    """Row by row, unpadded: transformers' own loss of labels that are -100 where a token does not count."""
    model, loss_sum, correct, counted = small.reference(), 0.0, 0, 0
    for index in range(len(dataset())):
        ids, mask = dataset().row(index)
        tokens = torch.from_numpy(ids.astype(np.int64))[None]
        labels = torch.where(torch.from_numpy(mask.copy()), tokens, -100)
        with torch.no_grad():
            outputs = model(input_ids=tokens, labels=labels)
        is_counted = labels[0, 1:] != -100
        likeliest = outputs.logits[0, :-1].argmax(-1)
        loss_sum += outputs.loss.item() * int(is_counted.sum())
        correct += int((likeliest == labels[0, 1:])[is_counted].sum())
        counted += int(is_counted.sum())
    return HeldOutScore(loss_sum / counted, correct / counted, counted)


@pytest.mark.parametrize(("rows", "chunk"), [(8, 0), (5, 8), (2, 16), (13, 4)])
def test_it_equals_transformers_whatever_the_batch(rows: int, chunk: int) -> None:
    ours, theirs = score(with_rows(small.torch_plan(chunk_tokens=chunk), rows)), of_transformers()
    assert ours.counted_tokens == theirs.counted_tokens == int(dataset().loss_mask.sum())
    assert ours.loss == pytest.approx(theirs.loss, rel=1e-5)
    assert ours.token_accuracy == theirs.token_accuracy


def test_accuracy_counts_the_targets_that_are_likeliest() -> None:
    """A random model has an accuracy near 0, so this one is given its own choices, at every other place."""
    plan, weights = with_rows(small.torch_plan(), 5), small.weights_of(small.reference())
    backend = TorchBackend(plan)
    found = HeldOut(plan, RowScorer(plan, backend), likely_dataset())(
        backend.place(small.DictSource(weights))
    )
    expected = sum(length // 2 for length in LENGTHS)
    hits = round(found.token_accuracy * found.counted_tokens)
    assert found.counted_tokens == sum(LENGTHS) - len(LENGTHS)
    assert expected <= hits <= expected + 3, "other places may hit by chance"


def test_of_equal_logits_the_lowest_id_is_taken_as_argmax_does() -> None:
    logits = torch.tensor([[[1.0, 3.0, 3.0, 0.5], [1.0, 3.0, 3.0, 0.5], [float("nan")] * 4, [2.0, 1, 0, -1]]])
    targets = torch.tensor([[1, 2, 0, 0]], dtype=torch.int32)
    project = Projection(lambda hidden, head: logits)
    hidden, head = torch.zeros(1, 4, 2), torch.zeros(4, 2)
    for place, expected in enumerate((1.0, 0.0, 0.0, 1.0)):
        weights = torch.zeros(1, 4)
        weights[0, place] = 1.0
        _, hits = token_scores(hidden, head, targets, weights, project, Marks(), LossChunks(4))
        assert hits == expected, place


def packed_batch(accumulation: int = 2) -> Batch:
    arrays = small.train_batch(1, accumulation)
    return Batch(**arrays, counted_tokens=0, real_tokens=0, padded_tokens=0, rows_digest="")


def test_packed_rows_of_several_micro_batches_equal_transformers() -> None:
    """Positions restart and segments do not see each other; the program is the one for a micro-batch."""
    plan, batch = small.torch_plan(accumulation=2, chunk_tokens=8), packed_batch()
    backend = TorchBackend(plan)
    params = backend.place(small.DictSource(small.weights_of(small.reference())))
    ours, theirs = RowScorer(plan, backend)(params, batch), RowTotals()
    for micro in range(2):
        rows = small.Rows(batch.tokens[micro], batch.positions[micro], batch.segment_ids[micro])
        logits, counts = small.reference_logits(small.reference(), rows), batch.weights[micro] > 0
        targets = torch.from_numpy(batch.targets[micro][counts]).long()
        loss = torch.nn.functional.cross_entropy(logits[counts], targets, reduction="sum").item()
        hits = int((logits[counts].argmax(-1) == targets).sum())
        theirs += RowTotals(loss, int(counts.sum()), hits)
    assert ours.loss_sum == pytest.approx(theirs.loss_sum, rel=1e-5)
    assert (ours.counted_tokens, ours.correct_tokens) == (theirs.counted_tokens, theirs.correct_tokens)
    assert ours.counted_tokens == np.count_nonzero(batch.weights) > 0


def test_a_routers_loss_has_no_part_in_it() -> None:
    """Training on a mixture adds it; of held-out rows the likelihoods alone are reported."""
    name = "mixtral"
    plan, batch = families.training_plan(name), packed_batch(1)
    assert plan.facts.experts is not None and plan.facts.experts.router_loss_coef > 0
    backend = TorchBackend(plan)
    params = backend.place(small.DictSource(small.weights_of(families.model_of(name))))
    ours = RowScorer(plan, backend)(params, batch)
    rows = small.Rows(batch.tokens[0], batch.positions[0], batch.segment_ids[0])
    logits, router_loss = families.outputs_of(families.model_of(name), rows)
    counts = batch.weights[0] > 0
    targets = torch.from_numpy(batch.targets[0][counts]).long()
    loss = torch.nn.functional.cross_entropy(logits[counts], targets, reduction="sum").item()
    assert ours.loss_sum == pytest.approx(loss, rel=1e-5)
    assert router_loss > 1e-3


def test_packed_rows_score_the_same_in_fewer_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = with_rows(small.torch_plan(), 2)
    data = replace(plan.recipe.data, packing="best_fit")
    packed = plan_recipe(replace(plan.recipe, data=data), environ={})
    batches, start = [], RowScorer.start
    monkeypatch.setattr(RowScorer, "start", lambda *args: batches.append(args[2]) or start(*args))
    alone = score(plan)
    assert len(batches) == -(-len(LENGTHS) // 2)
    batches.clear()
    ours = score(packed)
    assert len(batches) < 0.7 * len(LENGTHS) / 2
    assert max(batch.segment_ids.max() for batch in batches) > 1
    assert ours.loss == pytest.approx(alone.loss, rel=1e-6)
    assert (ours.token_accuracy, ours.counted_tokens) == (alone.token_accuracy, alone.counted_tokens)


def test_every_row_is_scored_once_and_empty_rows_fill_the_last_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    batches, start = [], RowScorer.start
    monkeypatch.setattr(RowScorer, "start", lambda *args: batches.append(args[2]) or start(*args))
    score(with_rows(small.torch_plan(), 5))
    assert [batch.tokens.shape for batch in batches] == 3 * [(1, 5, small.TOKENS)]
    lengths = [int(row.sum()) for batch in batches for row in batch.segment_ids[0]]
    assert sorted(lengths[:13]) == sorted(LENGTHS) and lengths[13:] == [0, 0]
    last = batches[-1]
    assert (last.tokens[0, 3:] == PAD).all() and not last.weights[0, 3:].any()
