"""What a run that goes on knows of its data: the cursor, and digests of all samples and of a step's rows."""

import numpy as np
import pytest

from tptrain.config import DataSection, ScheduleSection
from tptrain.data.batches import Batches, RunLength, prefetch, run_length
from tptrain.data.dataset import TokenizedDataset
from tptrain.data.rendered import Rendered

RECORDS = 11


def rows(change=None):
    """Eleven rows of 3 to 6 tokens; change: (row, token, new id or None to flip its mask)."""
    made = []
    for index in range(RECORDS):
        ids = np.arange(3 + index % 4, dtype=np.int32) + 10 * index
        mask = np.arange(len(ids)) >= 2
        if change and change[0] == index:
            if change[2] is None:
                mask[change[1]] ^= True
            else:
                ids[change[1]] = change[2]
        made.append(Rendered(ids, mask))
    return made


def batches(batch_rows, total=None, seed=4, seq_len=8, dataset=None):
    section = DataSection(seq_len=seq_len, batch_rows=batch_rows, seed=seed)
    return Batches(dataset or TokenizedDataset.of(rows(), 99), section, 1, total)


def digests(made, cursors):
    return [made.batch_at(cursor).rows_digest for cursor in cursors]


def test_the_digest_of_the_samples_sees_every_token_mask_and_border():
    whole = TokenizedDataset.of(rows(), 99).digest()
    assert whole == TokenizedDataset.of(rows(), 7).digest(), "padding is no part of a sample"
    assert len(whole) == 32
    shorter = TokenizedDataset.of(rows()[:-1], 99)
    moved = TokenizedDataset.of([*rows()[1:], rows()[0]], 99)
    a, b, *rest = rows()
    joined = Rendered(np.concatenate([a.ids, b.ids[:1]]), np.concatenate([a.loss_mask, b.loss_mask[:1]]))
    border = TokenizedDataset.of([joined, Rendered(b.ids[1:], b.loss_mask[1:]), *rest], 99)
    token = TokenizedDataset.of(rows((10, 4, 5)), 99)
    mask = TokenizedDataset.of(rows((10, 4, None)), 99)
    others = [made.digest() for made in (shorter, moved, border, token, mask)]
    assert len({whole, *others}) == 6


def test_equal_rows_have_equal_digests_whatever_their_padding_and_micro_batches():
    narrow, wide = batches(4), batches(4, seq_len=16)
    cut = Batches(TokenizedDataset.of(rows(), 7), DataSection(seq_len=8, batch_rows=4, seed=4), 2, None)
    cursors = range(0, 44, 4)
    assert digests(narrow, cursors) == digests(wide, cursors) == digests(cut, cursors)


def test_digests_of_rows_see_the_sample_and_its_place():
    """After one epoch the same records come again, in another order; two cursors never have equal digests."""
    made = digests(batches(1), range(3 * RECORDS))
    assert len(set(made)) == len(made) and len(made[0]) == 16
    other = TokenizedDataset.of(rows((6, 1, 5)), 99)
    changed = [i for i, d in enumerate(digests(batches(1, dataset=other), range(RECORDS))) if d != made[i]]
    assert len(changed) == 1
    assert digests(batches(4), [0]) != digests(batches(4, seed=5), [0])


def test_empty_rows_are_no_samples():
    made = batches(4, total=10)
    assert [made.after(cursor) for cursor in (0, 4, 8, 10)] == [4, 8, 10, 10]
    assert digests(made, [8]) == digests(batches(2), [8])
    assert batches(4).after(8) == 12


@pytest.mark.parametrize(
    ("schedule", "batch_rows", "step", "cursor", "expected"),
    [
        (ScheduleSection(epochs=2), 4, 3, 12, RunLength(6, 22)),
        (ScheduleSection(epochs=2), 3, 3, 12, RunLength(7, 22)),
        (ScheduleSection(epochs=2), 7, 3, 12, RunLength(5, 22)),
        (ScheduleSection(epochs=2), 4, 6, 22, RunLength(6, 22)),
        (ScheduleSection(epochs=1), 4, 6, 22, RunLength(6, 11)),
        (ScheduleSection(epochs=2), 4, 100, 0, RunLength(106, 22)),
        (ScheduleSection(max_steps=9), 3, 6, 22, RunLength(9, None)),
    ],
)
def test_the_length_of_a_run_that_goes_on(schedule, batch_rows, step, cursor, expected):
    assert run_length(RECORDS, schedule, batch_rows, step, cursor) == expected


def test_batches_from_a_cursor_that_no_batch_size_divides():
    made = batches(4, total=20)
    found = list(prefetch(made, 7, num_steps=4))
    assert [cursor for cursor, _ in found] == [7, 11, 15, 19]
    assert [batch.rows_digest for _, batch in found] == digests(made, [7, 11, 15, 19])
    single = batches(1)
    for cursor, batch in found:
        filled = batch.segment_ids[0, :, 0] == 1
        assert filled.sum() == min(4, 20 - cursor)
        for row in range(int(filled.sum())):
            assert (batch.tokens[0, row] == single.batch_at(cursor + row).tokens[0, 0]).all()
