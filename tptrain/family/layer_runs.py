"""Where the layers of a model are cut because not the same weights of all of them are trained.

A backend that stacks layers stacks those of one run: a stack is either trained or frozen as a whole.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby

from tptrain.family.table import ParamRow

_LAYER = re.compile(r"^model\.layers\.(\d+)\.(.+)$")
_LAYERS, _EMBEDDING = "model.layers.", "model.embed_tokens.weight"


def layer_of(name: str) -> tuple[int, str] | None:
    """The layer that a row belongs to and the row's name inside it; None for a row outside of the layers."""
    match = _LAYER.match(name)
    return (int(match[1]), match[2]) if match else None


@dataclass(frozen=True)
class LayerRuns:
    """The layers in runs: the longest rows of periods of which the same weights are trained.

    period:     layers that one turn of a loop computes; each run is a multiple of it.
    runs:       the numbers of the layers of each, in order.
    first_back: the first layer of the backward pass: that of the lowest run with a trained weight, 0 where
                the embedding below is trained; the number of layers where nothing goes back through them.
    """

    period: int
    runs: tuple[range, ...]
    first_back: int

    def prefix(self, run: int) -> str:
        """What the names of a run's stacks begin with; a single run has no number."""
        return _LAYERS if len(self.runs) == 1 else f"{_LAYERS}{run}."

    def stack_of(self, name: str) -> str | None:
        """The stack that holds a row; None for a row outside of the layers.

        Layer i of a run is in turn (i - start) // period, at position i % period of it.
        """
        found = layer_of(name)
        if found is None:
            return None
        layer, inner = found
        run = next(i for i, layers in enumerate(self.runs) if layer in layers)
        return f"{self.prefix(run)}period.{layer % self.period}.{inner}"


def layer_runs(rows: Iterable[ParamRow], period: int) -> LayerRuns:
    """The runs of a table. rows: all that have data of their own, so that all parts of the state agree."""
    rows, trained = tuple(rows), dict[int, set[tuple[int, str]]]()
    for row in rows:
        if found := layer_of(row.name):
            layer, inner = found
            of_period = trained.setdefault(layer // period, set())
            if row.trainable:
                of_period.add((layer % period, inner))
    runs, back = [], []
    for weights, alike in groupby(sorted(trained), key=trained.__getitem__):
        numbers = list(alike)
        runs.append(range(numbers[0] * period, (numbers[-1] + 1) * period))
        back += [runs[-1].start] if weights else []
    if any(row.trainable for row in rows if row.name == _EMBEDDING):
        back = [0]
    return LayerRuns(period, tuple(runs), min(back, default=runs[-1].stop))
