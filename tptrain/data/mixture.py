"""Which rows come when: those of one source, or of several that are mixed.

Every source has rows of its own, which hold its records alone. Mixed one after the other (`concat`), an epoch
is a shuffle of all rows of all sources. By weights, each source is an endless stream of its own epochs, and
the streams take turns. In either case the row at a global index is a function of the index alone, so the
cursor is all there is to save.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import xxhash

from tptrain.config.schema import DataSection
from tptrain.data.dataset import TokenizedDataset
from tptrain.data.order import mixed_at, sample_at, whole_shares
from tptrain.data.packing import PackedRows

Records = Sequence[int] | npt.NDArray[np.int64]

# The rows of the one source, or those of each by its name; all with the same padding id.
Sources = TokenizedDataset | Mapping[str, TokenizedDataset]


class Mixture:
    """The samples of a run, from one source or several.

    A sample is what fills a row: a record, or with `data.packing` the records that share it.

    names:       of the sources; ("",) where there is but the one that the section itself names.
    num_samples: of all sources, one pass over each.
    """

    def __init__(self, sources: Sources, section: DataSection):
        datasets = {"": sources} if isinstance(sources, TokenizedDataset) else sources
        assert datasets, "at least one source"
        self.names, self.datasets = tuple(datasets), tuple(datasets.values())
        self._seed = section.seed
        # Sources of equal size would else be shuffled alike. One alone has the order of a run without names.
        alone = len(datasets) == 1
        self._seeds = [section.seed if alone else _seed_of(name, section.seed) for name in datasets]
        self._packed = [
            packed_rows(each, section, seed) for each, seed in zip(self.datasets, self._seeds, strict=True)
        ]
        self._packing = "" if section.packing == "none" else f"-packed-{section.seq_len}"
        pairs = zip(self.datasets, self._packed, strict=True)
        self._sizes = [len(each if packed is None else packed) for each, packed in pairs]
        self._ends = np.cumsum(self._sizes).tolist()
        self.num_samples = int(self._ends[-1])
        self._shares = _shares(datasets, section)
        # Imports Grain here, not in the thread of `prefetch`, beside whatever the main thread imports then.
        self.sample(0)

    def sample(self, cursor: int) -> tuple[int, Records]:
        """Global sample `cursor`: the number of its source, and its records in the order of their row."""
        if self._shares is None:
            epoch, seed = cursor // self.num_samples, self._seed
            row = sample_at(cursor, self.num_samples, seed)
            source = bisect_right(self._ends, row)
            row -= self._ends[source] - self._sizes[source]
        else:
            source, before = mixed_at(cursor, self._shares)
            size = self._sizes[source]
            epoch, row = before // size, sample_at(before, size, self._seeds[source])
        packed = self._packed[source]
        return source, [row] if packed is None else packed.records(epoch, row)

    def row_shares(self) -> dict[str, float]:
        """The part of the rows that each source has."""
        weights = self._sizes if self._shares is None else self._shares
        return {name: weight / sum(weights) for name, weight in zip(self.names, weights, strict=True)}

    def digest(self) -> str:
        """Of the samples: of the records, of how they are put into rows, and of how sources are mixed."""
        digests = [dataset.digest() for dataset in self.datasets]
        if len(digests) == 1:
            return f"{digests[0]}{self._packing}"
        mixed = xxhash.xxh3_128_hexdigest(repr((self.names, digests, self._shares)).encode())
        return f"{mixed}{self._packing}"


def packed_rows(dataset: TokenizedDataset, section: DataSection, seed: int) -> PackedRows | None:
    """How the records share rows; None where each has a row of its own."""
    if section.packing == "none":
        return None
    return PackedRows(np.diff(dataset.offsets), section.seq_len, seed)


def _shares(datasets: Mapping[str, TokenizedDataset], section: DataSection) -> tuple[int, ...] | None:
    """By which sources take turns; None where all their rows are shuffled together."""
    if section.mix == "concat" or len(datasets) == 1:
        return None
    if section.mix == "temperature":
        tokens = np.array([len(dataset.ids) for dataset in datasets.values()], dtype=np.float64)
        return whole_shares((tokens ** (1 / section.mix_temperature)).tolist())
    weights = [section.sources[name].weight for name in datasets]
    assert all(weights), "a plan has a weight for each"
    return whole_shares([weight for weight in weights if weight])


def _seed_of(name: str, seed: int) -> int:
    return xxhash.xxh32_intdigest(f"{seed} {name}".encode())
