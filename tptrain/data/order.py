"""Which sample comes when: a pure function of (seed, cursor), with nothing to save and nothing to rewind.

Grain's MapDataset gives this (a Feistel-like permutation of the index, seeded anew for each epoch): element i
costs the same whatever i is, and no list of indices is held in memory.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple


def sample_at(cursor: int, num_samples: int, seed: int) -> int:
    """The sample of an epoch at global sample index `cursor`.

    Samples [e * num_samples, (e + 1) * num_samples) are epoch e: a permutation of them, another one for every
    epoch and every seed.
    """
    assert cursor >= 0, cursor
    # Grain's index shuffle counts in 32 bits.
    assert 0 < num_samples < 2**32, num_samples
    return int(_shuffled(num_samples, seed)[cursor])


class Place(NamedTuple):
    """A sample of a mixture: the number of its source, and how many samples of that source come before it."""

    source: int
    before: int


def mixed_at(cursor: int, shares: tuple[int, ...]) -> Place:
    """What is at global sample index `cursor` of sources that take turns by their shares.

    The sources are spread evenly: of the first n samples, each has n * share / sum(shares) to within a few.
    shares: whole numbers with a smallest one of 100 (see `whole_shares`).
    """
    assert cursor >= 0, cursor
    place: Place = _mixed(shares)[cursor]
    return place


def whole_shares(weights: Sequence[float]) -> tuple[int, ...]:
    """The weights to within half a percent of each, as the whole numbers that Grain mixes by.

    Grain scales the smallest weight to 100 and cuts the others off; so they are rounded here.

    >>> whole_shares([0.3, 0.7])
    (100, 233)
    """
    return tuple(round(100 * weight / min(weights)) for weight in weights)


@lru_cache(maxsize=8)
def _mixed(shares: tuple[int, ...]) -> Any:
    """Grain's mixture of endless streams; each element is a `Place`."""
    grain = _import_grain()
    # Of a mixture of shuffled samples themselves one could not tell which pass of its source a sample is of.
    streams = [
        grain.MapDataset.range(sys.maxsize).map(partial(Place, source)) for source in range(len(shares))
    ]
    return grain.MapDataset.mix(streams, weights=shares)


@lru_cache(maxsize=256)  # of every source of a mixture
def _shuffled(num_samples: int, seed: int) -> Any:
    """Grain's endless shuffled range of indices."""
    grain = _import_grain()
    # With repeat after shuffle, Grain's default, each repetition is shuffled by a seed of its own.
    return grain.MapDataset.range(num_samples).seed(seed).shuffle().repeat()


def _import_grain() -> Any:
    """Import Grain on first use: it imports jax (which starts no device), in about two seconds.

    Its remark about the profiling of worker processes, which are not used here, is kept off the terminal.
    """
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        import grain
    finally:
        logger.setLevel(level)
    return grain
