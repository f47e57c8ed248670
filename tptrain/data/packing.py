"""Which records share a row: best-fit decreasing over all records of an epoch, by counting lengths.

Records are taken from the longest to the shortest, and each goes into the fullest row with room for it,
or else begins a new one (best-fit decreasing: Johnson 1973; at most 11/9 of the fewest rows). Records of
one length are alike for that, and so are rows with the same room left: rows are held by their room, and
all records of a length are placed at once. What is done is the same, but it takes steps by lengths
instead of by records.

The rows are cut once, by lengths alone; which of the records of a length takes which place is drawn anew for
every epoch. So an epoch has the same number of rows whenever it comes, every record once, other neighbours
each time, and row i of epoch e is a pure function of (lengths, seed, e, i).
"""

from __future__ import annotations

import itertools
from functools import lru_cache

import numpy as np
import numpy.typing as npt

Int64Array = npt.NDArray[np.int64]

_SHIFT = 40  # bits of a drawn key below the length, in one 64-bit number: ties are one in 2^40


class PackedRows:
    """Rows of whole records, none above `seq_len` tokens in all."""

    def __init__(self, lengths: Int64Array, seq_len: int, seed: int):
        """lengths: int64 [N], tokens of each record, from 1 to seq_len."""
        assert len(lengths) and lengths.min() > 0 and lengths.max() <= seq_len, "records that fit a row"
        assert seq_len < 2 ** (64 - _SHIFT), seq_len
        self._lengths = lengths
        self._seed = seed
        by_length = np.sort(lengths)[::-1]
        row_of_place = best_fit_decreasing(by_length, seq_len)
        # Places in the order of records from long to short, put together row by row.
        self._places = np.argsort(row_of_place, kind="stable")
        self._offsets = np.concatenate(([0], np.cumsum(np.bincount(row_of_place))))
        self._taken = lru_cache(maxsize=2)(self._draw)  # an epoch, and the next one at its end

    def __len__(self) -> int:
        """Rows of an epoch."""
        return len(self._offsets) - 1

    def records(self, epoch: int, row: int) -> Int64Array:
        """The records of a row, the longest first."""
        places = self._places[self._offsets[row] : self._offsets[row + 1]]
        return self._taken(epoch)[places]

    def _draw(self, epoch: int) -> Int64Array:
        """Record of each place, from long to short; those of one length in an order drawn for the epoch."""
        # A bit generator's stream is what NumPy promises to keep (NEP 19); its distributions are not.
        key = np.array([self._seed, epoch], dtype=np.uint64)
        drawn: npt.NDArray[np.uint64] = np.random.Philox(key=key).random_raw(len(self._lengths))
        shortness = (self._lengths.max() - self._lengths).astype(np.uint64)
        return np.argsort((shortness << np.uint64(_SHIFT)) | (drawn >> np.uint64(64 - _SHIFT)), kind="stable")


def best_fit_decreasing(lengths: Int64Array, capacity: int) -> Int64Array:
    """The bin of each item: int64 [N], bins counted from 0 without gaps.

    lengths: int64 [N], from the longest to the shortest, each from 1 to `capacity`.

    >>> best_fit_decreasing(np.array([7, 5, 4, 3, 1]), 10).tolist()
    [0, 1, 1, 0, 1]
    """
    bin_of: list[int] = []
    # Bins by the room left in them, and which rooms there are, as the bits of one number.
    bins_with: dict[int, list[int]] = {}
    rooms = 0
    num_bins = 0
    starts = [0, *(np.flatnonzero(np.diff(lengths)) + 1).tolist(), len(lengths)]
    for start, stop in itertools.pairwise(starts):
        length, waiting = int(lengths[start]), stop - start
        while waiting:
            # The tightest room is filled as often as the length fits: what remains is too small, or the
            # tightest again.
            if wide_enough := rooms >> length:
                room = length + (wide_enough & -wide_enough).bit_length() - 1
                bins = bins_with.pop(room)
                rooms ^= 1 << room
            else:
                room = capacity
                needed = -(-waiting // (room // length))
                bins = list(range(num_bins, num_bins + needed))
                num_bins += needed
            fits = room // length
            full, rest = divmod(min(waiting, fits * len(bins)), fits)
            filled = bins[:full]
            bin_of += filled if fits == 1 else [bin for bin in filled for _ in range(fits)]
            waiting -= full * fits
            left = [(room - fits * length, filled)]
            if rest:
                bin_of += [bins[full]] * rest
                waiting -= rest
                left.append((room - rest * length, [bins[full]]))
            left.append((room, bins[full + bool(rest) :]))
            for room, those in left:
                if room and those:
                    bins_with.setdefault(room, []).extend(those)
                    rooms |= 1 << room
    return np.asarray(bin_of, dtype=np.int64)
