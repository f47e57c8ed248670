"""Batches of a step, as numpy arrays, from the cursor alone."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Generator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from fractions import Fraction

import numpy as np
import numpy.typing as npt
import xxhash

from tptrain.config.schema import DataSection, ScheduleSection
from tptrain.data.mixture import Mixture, Sources

Int32Array = npt.NDArray[np.int32]


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
    source_tokens:  real tokens by source; none where there is only one.
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
    source_tokens: Mapping[str, int] = field(default_factory=dict)


class Batches:
    """The batches of a run: `batch_at(cursor)` depends on its argument only.

    total_samples: samples of the whole run; rows at or beyond it are empty (segment 0, weight 0).
        None: no end.
    """

    def __init__(
        self,
        sources: Sources,
        section: DataSection,
        accumulation: int,
        total_samples: int | None,
    ):
        assert section.batch_rows % accumulation == 0, (section.batch_rows, accumulation)
        self.mixture = Mixture(sources, section)
        self.batch_rows = section.batch_rows
        self.shape = (accumulation, section.batch_rows // accumulation, section.seq_len)
        self.total_samples = total_samples
        self.num_samples = self.mixture.num_samples
        self._pad_id = self.mixture.datasets[0].pad_id

    @staticmethod
    def of_run(
        sources: Sources,
        section: DataSection,
        accumulation: int,
        schedule: ScheduleSection,
    ) -> Batches:
        """The batches of a run that ends where its schedule says."""
        batches = Batches(sources, section, accumulation, None)
        batches.total_samples = run_length(batches.num_samples, schedule, section.batch_rows).total_samples
        return batches

    def batch_at(self, cursor: int) -> Batch:
        """The batch whose first row is global sample `cursor`.

        Row r of micro-batch m is sample cursor + m * micro_rows + r.
        """
        rows, seq_len = self.batch_rows, self.shape[-1]
        tokens = np.full((rows, seq_len), self._pad_id, dtype=np.int32)
        targets = tokens.copy()
        weights = np.zeros((rows, seq_len), dtype=np.float32)
        positions = np.zeros((rows, seq_len), dtype=np.int32)
        segment_ids = np.zeros((rows, seq_len), dtype=np.int32)
        digest = xxhash.xxh3_64()
        by_source = dict.fromkeys(self.mixture.names, 0)
        for row in range(self._filled_rows(cursor)):
            begin = 0
            source, records = self.mixture.sample(cursor + row)
            for segment, record in enumerate(records, start=1):
                ids, mask = self.mixture.datasets[source].row(int(record))
                end = begin + len(ids)
                tokens[row, begin:end] = ids
                # The last token of a record has no target.
                targets[row, begin : end - 1] = ids[1:]
                weights[row, begin : end - 1] = mask[1:]
                positions[row, begin:end] = np.arange(len(ids))
                segment_ids[row, begin:end] = segment
                begin = end
            by_source[self.mixture.names[source]] += begin
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
            source_tokens=by_source if len(by_source) > 1 else {},
        )

    def digest(self) -> str:
        """Of the samples: `Mixture.digest`."""
        return self.mixture.digest()

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
