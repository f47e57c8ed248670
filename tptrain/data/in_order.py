"""Rows of a data set once each and in order, for an evaluation: nothing shuffled, nothing left out."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import xxhash

from tptrain.data.batches import Batch
from tptrain.data.dataset import TokenizedDataset


def batches_in_order(dataset: TokenizedDataset, rows: int, seq_len: int) -> Iterator[Batch]:
    """Every row of the data set in arrays [1, rows, seq_len]; the last batch is filled up with empty rows.

    An empty row has segment 0 and weight 0 throughout: whatever is summed by weight does not see it.
    """
    for first in range(0, len(dataset), rows):
        yield _batch(dataset, range(first, min(first + rows, len(dataset))), rows, seq_len)


def _batch(dataset: TokenizedDataset, chosen: range, rows: int, seq_len: int) -> Batch:
    shape = (1, rows, seq_len)
    tokens = np.full(shape, dataset.pad_id, dtype=np.int32)
    targets, weights = tokens.copy(), np.zeros(shape, dtype=np.float32)
    positions, segment_ids = np.zeros(shape, dtype=np.int32), np.zeros(shape, dtype=np.int32)
    digest = xxhash.xxh3_64()
    for place, index in enumerate(chosen):
        ids, mask = dataset.row(index)
        length = len(ids)
        assert length <= seq_len, f"row {index} has {length} tokens, room for {seq_len}"
        tokens[0, place, :length] = ids
        # The last token of a record has no target.
        targets[0, place, : length - 1] = ids[1:]
        weights[0, place, : length - 1] = mask[1:]
        positions[0, place, :length] = np.arange(length)
        segment_ids[0, place, :length] = 1
        digest.update(index.to_bytes(8, "little") + ids.tobytes())
    real = int(segment_ids.sum())
    return Batch(
        tokens=tokens,
        targets=targets,
        weights=weights,
        positions=positions,
        segment_ids=segment_ids,
        counted_tokens=int(np.count_nonzero(weights)),
        real_tokens=real,
        padded_tokens=rows * seq_len - real,
        rows_digest=digest.hexdigest(),
    )
