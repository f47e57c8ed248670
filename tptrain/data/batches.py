"""Batches of a step, as numpy arrays, from the cursor alone."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import numpy.typing as npt
import xxhash

from tptrain.config.schema import DataSection, ScheduleSection
from tptrain.data.dataset import TokenizedDataset
from tptrain.data.order import sample_at
from tptrain.data.packing import PackedRows

Int32Array = npt.NDArray[np.int32]
Int64Array = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Batch:
    """The rows of one optimizer step; every array is [accumulation, micro_rows, seq_len].

    tokens:      int32, inputs; filled up with the padding id.
    targets:     int32, the token after each input.
    weights:     float32, 1 where the target counts in the loss, else 0.
    positions:   int32, place of the token in its record; 0 in padding.
    segment_ids: int32, 1 for the tokens of a row's first record, 2 for its second, ...; 0 for padding.

    counted_tokens: targets that count. real_tokens, padded_tokens: inputs that are of a record, or are not.
    rows_digest:    hexadecimal XXH3-64 over global sample index and token ids of every row that is not empty:
                    two steps with equal digests have used the same samples in the same order.
    """

    tokens: Int32Array
    targets: Int32Array
    weights: npt.NDArray[np.float32]
    positions: Int32Array
    segment_ids: Int32Array
    counted_tokens: int
    real_tokens: int
    padded_tokens: int
    rows_digest: str


class Batches:
    """The batches of a run: `batch_at(cursor)` depends on its argument only.

    A sample is what fills a row: a record, or with `data.packing` the records that share it.

    total_samples: samples of the whole run; rows at or beyond it are empty (segment 0, weight 0).
        None: no end.
    """

    def __init__(
        self, dataset: TokenizedDataset, section: DataSection, accumulation: int, total_samples: int | None
    ):
        assert section.batch_rows % accumulation == 0, (section.batch_rows, accumulation)
        self.dataset = dataset
        self.seed = section.seed
        self.batch_rows = section.batch_rows
        self.shape = (accumulation, section.batch_rows // accumulation, section.seq_len)
        self.total_samples = total_samples
        self._packed = packed_rows(dataset, section)
        self.num_samples = len(dataset if self._packed is None else self._packed)
        # Imports Grain here, not in the thread of `prefetch`, beside whatever the main thread imports then.
        sample_at(0, self.num_samples, self.seed)

    @staticmethod
    def of_run(
        dataset: TokenizedDataset, section: DataSection, accumulation: int, schedule: ScheduleSection
    ) -> Batches:
        """The batches of a run that ends where its schedule says."""
        batches = Batches(dataset, section, accumulation, None)
        batches.total_samples = run_length(batches.num_samples, schedule, section.batch_rows).total_samples
        return batches

    def batch_at(self, cursor: int) -> Batch:
        """The batch whose first row is global sample `cursor`.

        Row r of micro-batch m is sample cursor + m * micro_rows + r.
        """
        rows, seq_len = self.batch_rows, self.shape[-1]
        tokens = np.full((rows, seq_len), self.dataset.pad_id, dtype=np.int32)
        targets = tokens.copy()
        weights = np.zeros((rows, seq_len), dtype=np.float32)
        positions = np.zeros((rows, seq_len), dtype=np.int32)
        segment_ids = np.zeros((rows, seq_len), dtype=np.int32)
        digest = xxhash.xxh3_64()
        for row in range(self._filled_rows(cursor)):
            begin = 0
            for segment, record in enumerate(self.records_of(cursor + row), start=1):
                ids, mask = self.dataset.row(int(record))
                end = begin + len(ids)
                tokens[row, begin:end] = ids
                # The last token of a record has no target.
                targets[row, begin : end - 1] = ids[1:]
                weights[row, begin : end - 1] = mask[1:]
                positions[row, begin:end] = np.arange(len(ids))
                segment_ids[row, begin:end] = segment
                begin = end
            digest.update((cursor + row).to_bytes(8, "little") + tokens[row, :begin].tobytes())
        real = int(np.count_nonzero(segment_ids))
        return Batch(
            tokens=tokens.reshape(self.shape),
            targets=targets.reshape(self.shape),
            weights=weights.reshape(self.shape),
            positions=positions.reshape(self.shape),
            segment_ids=segment_ids.reshape(self.shape),
            counted_tokens=int(np.count_nonzero(weights)),
            real_tokens=real,
            padded_tokens=rows * seq_len - real,
            rows_digest=digest.hexdigest(),
        )

    def records_of(self, cursor: int) -> Sequence[int] | Int64Array:
        """The records of global sample `cursor`, in the order of its row."""
        sample = sample_at(cursor, self.num_samples, self.seed)
        return [sample] if self._packed is None else self._packed.records(cursor // self.num_samples, sample)

    def digest(self) -> str:
        """Of the samples: of the records, and of how they are put into rows."""
        records = self.dataset.digest()
        return records if self._packed is None else f"{records}-packed-{self.shape[-1]}"

    def after(self, cursor: int) -> int:
        """The cursor after the batch at `cursor`. Rows left empty at the end of a run are no samples."""
        return cursor + self._filled_rows(cursor)

    def _filled_rows(self, cursor: int) -> int:
        if self.total_samples is None:
            return self.batch_rows
        return min(self.batch_rows, max(0, self.total_samples - cursor))


def prefetch(
    batches: Batches, start_cursor: int, num_steps: int, depth: int = 2
) -> Generator[tuple[int, Batch], None, None]:
    """(cursor, batch) of `num_steps` steps from `start_cursor` on; a thread makes them `depth` steps ahead.

    An error in the thread is raised here, in place of its batch. Closing the iterator ends the thread.
    """
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches") as thread:
        waiting: deque[tuple[int, Future[Batch]]] = deque()
        for step in range(num_steps):
            cursor = start_cursor + step * batches.batch_rows
            waiting.append((cursor, thread.submit(batches.batch_at, cursor)))
            if len(waiting) > depth:
                yield _result(waiting)
        while waiting:
            yield _result(waiting)


def _result(waiting: deque[tuple[int, Future[Batch]]]) -> tuple[int, Batch]:
    cursor, future = waiting.popleft()
    return cursor, future.result()


def packed_rows(dataset: TokenizedDataset, section: DataSection) -> PackedRows | None:
    """How the records share rows; None where each has a row of its own."""
    if section.packing == "none":
        return None
    return PackedRows(np.diff(dataset.offsets), section.seq_len, section.seed)


@dataclass(frozen=True)
class RunLength:
    """How long a run is.

    total_steps:   optimizer steps, with those done.
    total_samples: samples used, counted once per pass; None: as many as the steps take.
    """

    total_steps: int
    total_samples: int | None


def run_length(
    num_samples: int, schedule: ScheduleSection, batch_rows: int, step: int = 0, cursor: int = 0
) -> RunLength:
    """The length of a run by epochs or by steps, whichever the schedule gives.

    By epochs, the last step is filled up with empty rows, so that each record counts exactly `epochs` times;
    a part of an epoch is rounded up to a whole sample. By max_steps, samples repeat without end.

    num_samples: of one epoch, `Batches.num_samples`.
    step, cursor: steps done and samples used so far, perhaps in batches of another size.
    """
    assert (schedule.epochs is None) != (schedule.max_steps is None), "exactly one of epochs and max_steps"
    if schedule.max_steps is not None:
        return RunLength(schedule.max_steps, None)
    # The decimal number that was written: as a float, 0.1 epochs of 30 records would be 3.0000000000000004.
    total_samples = math.ceil(Fraction(repr(schedule.epochs)) * num_samples)
    remaining = max(total_samples - cursor, 0)
    return RunLength(step + math.ceil(remaining / batch_rows), total_samples)
