"""Which sample comes when: a pure function of (seed, cursor), with nothing to save and nothing to rewind.

Grain's MapDataset gives this (a Feistel-like permutation of the index, seeded anew for each epoch): element i
costs the same whatever i is, and no list of indices is held in memory.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any


def sample_at(cursor: int, num_samples: int, seed: int) -> int:
    """The sample of an epoch at global sample index `cursor`.

    Samples [e * num_samples, (e + 1) * num_samples) are epoch e: a permutation of them, another one for every
    epoch and every seed.
    """
    assert cursor >= 0, cursor
    # Grain's index shuffle counts in 32 bits.
    assert 0 < num_samples < 2**32, num_samples
    return int(_shuffled(num_samples, seed)[cursor])


@lru_cache(maxsize=8)
def _shuffled(num_samples: int, seed: int) -> Any:
    """Grain's endless shuffled range of indices."""
    grain = _import_grain()
    # With repeat after shuffle, Grain's default, each repetition is shuffled by a seed of its own.
    return grain.MapDataset.range(num_samples).seed(seed).shuffle().repeat()


def _import_grain() -> Any:
    """Import Grain on first use: it imports jax (which starts no device), in about two seconds.

    Its remark about the profiling of worker processes, which are not used here, is kept off the terminal.
    """
    from absl import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    try:
        import grain
    finally:
        logging.set_verbosity(verbosity)
    return grain
