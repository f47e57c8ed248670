"""Batches from the cursor alone: right arrays, the same samples however they are cut."""

from __future__ import annotations

import threading
from collections import Counter

import numpy as np
import pytest

from tptrain.config.schema import DataSection, ScheduleSection
from tptrain.data.batches import Batch, Batches, RunLength, prefetch, run_length
from tptrain.data.dataset import TokenizedDataset
from tptrain.data.order import sample_at
from tptrain.data.rendered import Rendered

PAD = 99
SEQ_LEN = 7
LENGTHS = (3, 7, 2, 5, 4, 6, 3, 2, 7, 5, 4)  # of 11 records


@pytest.fixture(scope="module")
def dataset() -> TokenizedDataset:
    """Row i is i * 10, i * 10 + 1, ...; the first two tokens, and another in some rows, do not count."""
    rows = []
    for index, length in enumerate(LENGTHS):
        mask = np.arange(length) >= 2
        mask[-1] = True
        if length > 4:
            mask[3] = False
        rows.append(Rendered(np.arange(length, dtype=np.int32) + 10 * index, mask))
    return TokenizedDataset.of(rows, PAD)


def make(dataset: TokenizedDataset, rows: int, accumulation: int = 1, total: int | None = None) -> Batches:
    section = DataSection(seq_len=SEQ_LEN, batch_rows=rows, seed=4)
    return Batches(dataset, section, accumulation, total)


def records_in(batch: Batch) -> list[int]:
    """Record of each row that is not empty."""
    first = batch.tokens.reshape(-1, SEQ_LEN)[:, 0]
    filled = batch.segment_ids.reshape(-1, SEQ_LEN)[:, 0] == 1
    return [int(token) // 10 for token in first[filled]]


def test_arrays_against_a_row_by_row_reference(dataset: TokenizedDataset) -> None:
    batch = make(dataset, rows=6, accumulation=3).batch_at(17)
    assert batch.tokens.shape == (3, 2, SEQ_LEN)
    for place in range(6):
        micro, row = divmod(place, 2)
        ids, mask = dataset.row(sample_at(17 + place, len(dataset), 4))
        for t in range(SEQ_LEN):
            real, has_target = t < len(ids), t + 1 < len(ids)
            assert batch.tokens[micro, row, t] == (ids[t] if real else PAD)
            assert batch.segment_ids[micro, row, t] == int(real)
            assert batch.positions[micro, row, t] == (t if real else 0)
            assert batch.targets[micro, row, t] == (ids[t + 1] if has_target else PAD)
            assert batch.weights[micro, row, t] == float(has_target and mask[t + 1])


def test_dtypes_and_counts(dataset: TokenizedDataset) -> None:
    batch = make(dataset, rows=5).batch_at(0)
    integers = (batch.tokens, batch.targets, batch.positions, batch.segment_ids)
    assert all(array.dtype == np.int32 for array in integers)
    assert batch.weights.dtype == np.float32
    rows = [dataset.row(sample_at(cursor, len(dataset), 4)) for cursor in range(5)]
    assert batch.real_tokens == sum(len(ids) for ids, _ in rows)
    assert batch.padded_tokens == 5 * SEQ_LEN - batch.real_tokens
    assert batch.counted_tokens == batch.weights.sum() == sum(int(mask[1:].sum()) for _, mask in rows)


def test_last_token_of_a_full_row_is_a_target_and_has_none(dataset: TokenizedDataset) -> None:
    batches = make(dataset, rows=11)
    batch = batches.batch_at(0)
    row = records_in(batch).index(1)  # a record of seq_len tokens
    ids, _ = dataset.row(1)
    assert batch.targets[0, row, -2] == ids[-1]
    assert batch.weights[0, row, -2] == 1
    assert batch.weights[0, row, -1] == 0


def test_accumulation_only_cuts_the_same_rows(dataset: TokenizedDataset) -> None:
    whole, cut = make(dataset, rows=8).batch_at(24), make(dataset, rows=8, accumulation=4).batch_at(24)
    for name in ("tokens", "targets", "weights", "positions", "segment_ids"):
        together = getattr(whole, name).reshape(8, SEQ_LEN)
        np.testing.assert_array_equal(getattr(cut, name).reshape(8, SEQ_LEN), together)
    assert cut.counted_tokens == whole.counted_tokens


def test_another_batch_size_goes_on_with_the_next_sample(dataset: TokenizedDataset) -> None:
    wide, narrow = make(dataset, rows=6), make(dataset, rows=3)
    straight = [record for cursor in range(0, 30, 6) for record in records_in(wide.batch_at(cursor))]
    begun = [record for cursor in range(0, 12, 6) for record in records_in(wide.batch_at(cursor))]
    resumed = [record for cursor in range(12, 30, 3) for record in records_in(narrow.batch_at(cursor))]
    assert begun + resumed == straight


def test_batch_depends_on_the_cursor_only(dataset: TokenizedDataset) -> None:
    batches = make(dataset, rows=4)
    first = batches.batch_at(8)
    batches.batch_at(100)
    again = batches.batch_at(8)
    np.testing.assert_array_equal(first.tokens, again.tokens)
    assert first.tokens is not again.tokens


@pytest.mark.parametrize("epochs", [1.0, 2.0, 3.0])
def test_each_record_counts_exactly_epochs_times(dataset: TokenizedDataset, epochs: float) -> None:
    length = run_length(len(dataset), ScheduleSection(epochs=epochs), batch_rows=4)
    batches = make(dataset, rows=4, accumulation=2, total=length.total_samples)
    seen: Counter[int] = Counter()
    counted = 0
    for cursor, batch in prefetch(batches, 0, length.total_steps):
        seen.update(records_in(batch))
        counted += batch.counted_tokens
        assert cursor < epochs * len(dataset)
    assert seen == Counter({record: int(epochs) for record in range(len(dataset))})
    assert counted == epochs * sum(int(dataset.row(index)[1][1:].sum()) for index in range(len(dataset)))


def test_rows_beyond_the_end_are_empty(dataset: TokenizedDataset) -> None:
    batches = make(dataset, rows=4, total=10)
    batch = batches.batch_at(8)
    assert len(records_in(batch)) == 2
    assert not batch.segment_ids[0, 2:].any()
    assert not batch.weights[0, 2:].any()
    assert (batch.tokens[0, 2:] == PAD).all()
    beyond = batches.batch_at(12)
    assert (beyond.real_tokens, beyond.counted_tokens, beyond.padded_tokens) == (0, 0, 4 * SEQ_LEN)


@pytest.mark.parametrize(
    ("records", "schedule", "batch_rows", "expected"),
    [
        (11, ScheduleSection(epochs=1), 4, RunLength(3, 11)),
        (12, ScheduleSection(epochs=1), 4, RunLength(3, 12)),
        (11, ScheduleSection(epochs=2), 4, RunLength(6, 22)),
        (3, ScheduleSection(epochs=1), 16, RunLength(1, 3)),
        (30, ScheduleSection(epochs=0.1), 2, RunLength(2, 3)),
        (7, ScheduleSection(epochs=0.5), 2, RunLength(2, 4)),
        (7473, ScheduleSection(epochs=3), 64, RunLength(351, 22419)),
        (11, ScheduleSection(max_steps=100), 4, RunLength(100, None)),
    ],
)
def test_run_length(records: int, schedule: ScheduleSection, batch_rows: int, expected: RunLength) -> None:
    assert run_length(records, schedule, batch_rows) == expected


@pytest.mark.parametrize("depth", [0, 1, 2, 5])
def test_prefetch_yields_the_same_batches_in_order(dataset: TokenizedDataset, depth: int) -> None:
    batches = make(dataset, rows=4)
    fetched = list(prefetch(batches, 8, num_steps=4, depth=depth))
    assert [cursor for cursor, _ in fetched] == [8, 12, 16, 20]
    for cursor, batch in fetched:
        np.testing.assert_array_equal(batch.tokens, batches.batch_at(cursor).tokens)


class FailingBatches(Batches):
    def batch_at(self, cursor: int) -> Batch:
        if cursor >= 8:
            raise RuntimeError(f"no batch at {cursor}")
        return super().batch_at(cursor)


def test_prefetch_raises_the_threads_error_in_place_of_its_batch(dataset: TokenizedDataset) -> None:
    batches = FailingBatches(dataset, DataSection(seq_len=SEQ_LEN, batch_rows=4), 1, None)
    fetched = prefetch(batches, 0, num_steps=5)
    assert [next(fetched)[0], next(fetched)[0]] == [0, 4]
    with pytest.raises(RuntimeError, match="no batch at 8"):
        next(fetched)


def test_closing_prefetch_ends_its_thread(dataset: TokenizedDataset) -> None:
    iterator = prefetch(make(dataset, rows=4), 0, num_steps=1000)
    next(iterator)
    assert any(thread.name.startswith("batches") for thread in threading.enumerate())
    iterator.close()
    assert not any(thread.name.startswith("batches") for thread in threading.enumerate())
