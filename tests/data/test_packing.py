"""Packed rows: dense as best-fit decreasing one by one, each record once an epoch, the same anywhere."""

from __future__ import annotations

from collections import Counter

import numpy as np
import numpy.typing as npt
import pytest

from tptrain.config.schema import DataSection, ScheduleSection
from tptrain.data.batches import Batches, prefetch, run_length
from tptrain.data.dataset import TokenizedDataset
from tptrain.data.packing import PackedRows, best_fit_decreasing
from tptrain.data.rendered import Rendered

PAD = 7
SEQ_LEN = 61
ROWS_OF_SEED_11 = [[1], [5, 2], [3, 4, 9], [0, 7, 6], [8]]


def some_lengths(count: int, longest: int, seed: int) -> npt.NDArray[np.int64]:
    drawn = np.random.default_rng(seed).lognormal(np.log(longest / 5), 0.8, count)
    return np.clip(drawn, 2, longest).astype(np.int64)


def one_by_one(lengths: npt.NDArray[np.int64], capacity: int) -> list[int]:
    """Best-fit decreasing as it is written down: the room left in each bin, sorted."""
    rooms: list[int] = []
    for length in lengths:
        fitting = [bin for bin, room in enumerate(rooms) if room >= length]
        if not fitting:
            rooms.append(capacity)
        best = min(fitting, key=lambda bin: rooms[bin]) if fitting else len(rooms) - 1
        rooms[best] -= int(length)
    return sorted(rooms)


@pytest.mark.parametrize("capacity", [2, 5, 16, 61, 200])
@pytest.mark.parametrize("count", [1, 2, 37, 400])
def test_bins_are_those_of_best_fit_decreasing(capacity: int, count: int) -> None:
    for seed in range(10):
        lengths = np.sort(some_lengths(count, capacity, seed))[::-1]
        filled = np.bincount(best_fit_decreasing(lengths, capacity), weights=lengths)
        assert sorted(capacity - filled.astype(int)) == one_by_one(lengths, capacity)


def test_each_epoch_has_each_record_once_with_other_neighbours() -> None:
    lengths = some_lengths(300, SEQ_LEN, 1)
    packed = PackedRows(lengths, SEQ_LEN, seed=5)
    epochs = [[tuple(packed.records(epoch, row)) for row in range(len(packed))] for epoch in range(3)]
    for rows in epochs:
        assert sorted(record for row in rows for record in row) == list(range(300))
        assert all(0 < lengths[list(row)].sum() <= SEQ_LEN for row in rows)
    first, second, third = (set(rows) for rows in epochs)
    assert len(first & second) < len(first) / 2 and len(second & third) < len(second) / 2
    other_seed = PackedRows(lengths, SEQ_LEN, seed=6)
    assert {tuple(other_seed.records(0, row)) for row in range(len(other_seed))} != first
    again = PackedRows(lengths, SEQ_LEN, seed=5)
    assert [tuple(again.records(2, row)) for row in range(len(again))] == epochs[2]


def test_neighbours_of_a_seed_stay_what_they_are() -> None:
    """A run goes on with another release: its rows must be the same."""
    packed = PackedRows(np.array([3, 9, 4, 4, 4, 6, 3, 3, 2, 2]), 10, seed=11)
    rows = [[int(record) for record in packed.records(3, row)] for row in range(len(packed))]
    assert rows == ROWS_OF_SEED_11


@pytest.fixture(scope="module")
def dataset() -> TokenizedDataset:
    """Record i is i * 100, i * 100 + 1, ...; a fifth of the tokens, but never the last, does not count."""
    rng = np.random.default_rng(2)
    rows = []
    for index, length in enumerate(some_lengths(83, SEQ_LEN, 3)):
        mask = rng.random(length) > 0.2
        mask[0], mask[-1] = False, True
        rows.append(Rendered(np.arange(length, dtype=np.int32) + 100 * index, mask))
    return TokenizedDataset.of(rows, PAD)


def make(dataset: TokenizedDataset, rows: int, seq_len: int = SEQ_LEN) -> Batches:
    return Batches(
        dataset, DataSection(seq_len=seq_len, batch_rows=rows, seed=4, packing="best_fit"), 1, None
    )


def test_arrays_record_by_record(dataset: TokenizedDataset) -> None:
    batches = make(dataset, 6)
    batch = batches.batch_at(11)
    for place in range(6):
        row, expected = 11 + place, 0
        records = batches.mixture.sample(row)[1]
        assert len(records) > 0
        for segment, record in enumerate(records, start=1):
            ids, mask = dataset.row(int(record))
            span = slice(expected, expected + len(ids))
            np.testing.assert_array_equal(batch.tokens[0, place, span], ids)
            np.testing.assert_array_equal(batch.positions[0, place, span], range(len(ids)))
            np.testing.assert_array_equal(batch.targets[0, place, span][:-1], ids[1:])
            np.testing.assert_array_equal(batch.weights[0, place, span], [*mask[1:], False])
            assert (batch.segment_ids[0, place, span] == segment).all()
            expected = span.stop
        rest = slice(expected, None)
        assert not batch.segment_ids[0, place, rest].any() and not batch.weights[0, place, rest].any()
        assert (batch.tokens[0, place, rest] == PAD).all()
    assert batch.real_tokens == sum(
        len(dataset.row(int(r))[0]) for c in range(11, 17) for r in batches.mixture.sample(c)[1]
    )
    assert batch.padded_tokens == 6 * SEQ_LEN - batch.real_tokens


def test_saved_on_many_rows_and_resumed_on_few(dataset: TokenizedDataset) -> None:
    wide, narrow = make(dataset, 8), make(dataset, 4)
    straight = [wide.batch_at(cursor) for cursor in range(0, 64, 8)]
    resumed = [narrow.batch_at(cursor) for cursor in range(24, 64, 4)]
    for name in ("tokens", "targets", "weights", "positions", "segment_ids"):
        whole = np.concatenate([getattr(batch, name)[0] for batch in straight[3:]])
        np.testing.assert_array_equal(np.concatenate([getattr(batch, name)[0] for batch in resumed]), whole)


def test_a_run_by_epochs_counts_each_token_exactly_so_often(dataset: TokenizedDataset) -> None:
    section = DataSection(seq_len=SEQ_LEN, batch_rows=5, seed=4, packing="best_fit")
    schedule = ScheduleSection(epochs=2)
    batches = Batches.of_run(dataset, section, 1, schedule)
    steps = run_length(batches.num_samples, schedule, 5).total_steps
    seen: Counter[int] = Counter()
    for _, batch in prefetch(batches, 0, steps):
        seen.update(batch.tokens[batch.segment_ids > 0].tolist())
    assert seen == Counter({token: 2 * often for token, often in Counter(dataset.ids.tolist()).items()})


def test_rows_are_part_of_what_a_run_goes_on_with(dataset: TokenizedDataset) -> None:
    """Another row length packs other records together; without packing it changes nothing."""
    digests = {make(dataset, 4).digest(), make(dataset, 4, SEQ_LEN + 1).digest()}
    plain = [Batches(dataset, DataSection(seq_len=SEQ_LEN + more), 1, None).digest() for more in (0, 1)]
    assert len(digests) == 2 and plain[0] == plain[1] not in digests
