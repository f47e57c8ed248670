"""How the layers of a model are cut into loops: runs in which a few layers repeat.

Layers repeat where they are of the same kind and the same weights of them are trained. A backend that stacks
layers stacks those of one run that stand at the same place of its period, so a stack has one kind and is
trained or frozen as a whole.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

from tptrain.family.facts import LayerKind
from tptrain.family.table import ParamRow

_LAYER = re.compile(r"^model\.layers\.(\d+)\.(.+)$")
_LAYERS, _EMBEDDING = "model.layers.", "model.embed_tokens.weight"


def layer_of(name: str) -> tuple[int, str] | None:
    """The layer that a row belongs to and the row's name inside it; None for a row outside of the layers."""
    match = _LAYER.match(name)
    return (int(match[1]), match[2]) if match else None


@dataclass(frozen=True)
class LayerRun:
    """Layers that one loop computes, `period` of them in each turn."""

    layers: range
    period: int

    @property
    def turns(self) -> int:
        return len(self.layers) // self.period


@dataclass(frozen=True)
class LayerRuns:
    """All layers in runs, in order.

    first_back: the first layer of the backward pass, where a run begins: the lowest with a trained weight,
                0 where the embedding below is trained; the number of layers where nothing goes back.
    """

    runs: tuple[LayerRun, ...]
    first_back: int

    @property
    def traced(self) -> int:
        """Layers that a program holds: those of one turn of each run."""
        return sum(run.period for run in self.runs)

    def prefix(self, run: int) -> str:
        """What the names of a run's stacks begin with; a single run has no number."""
        return _LAYERS if len(self.runs) == 1 else f"{_LAYERS}{run}."

    def stack_of(self, name: str) -> str | None:
        """The stack that holds a row; None for a row outside of the layers.

        Layer i of a run is in turn (i - start) // period, at position (i - start) % period of it.
        """
        found = layer_of(name)
        if found is None:
            return None
        layer, inner = found
        number = next(i for i, run in enumerate(self.runs) if layer in run.layers)
        run = self.runs[number]
        return f"{self.prefix(number)}period.{(layer - run.layers.start) % run.period}.{inner}"


def layer_runs(rows: Iterable[ParamRow], kinds: Sequence[LayerKind]) -> LayerRuns:
    """The runs of a model. kinds: of its layers.

    rows: all of its table that have data of their own, so that all parts of the state agree.
    """
    rows = tuple(rows)
    trained: list[set[str]] = [set() for _ in kinds]
    for row in rows:
        found = layer_of(row.name)
        if found and row.trainable:
            trained[found[0]].add(found[1])
    alike = [(kind, frozenset(names)) for kind, names in zip(kinds, trained, strict=True)]
    back = next((layer for layer, names in enumerate(trained) if names), len(kinds))
    if any(row.trainable for row in rows if row.name == _EMBEDDING):
        back = 0
    return LayerRuns((*shortest_runs(alike[:back]), *shortest_runs(alike[back:], back)), back)


def shortest_runs(layers: Sequence[Hashable], first: int = 0) -> tuple[LayerRun, ...]:
    """The cut that has the fewest layers in its periods, since each of them is traced and compiled; of those
    with as many the one with the fewest runs.

    layers: what must be equal for layers to repeat. first: the number of the first of them.
    """
    # (layers in periods, number of runs) of the best cut of what comes before a layer, and its last run.
    best: list[tuple[tuple[int, int], LayerRun | None]] = [((0, 0), None)]
    best += [((len(layers) + 1, 0), None)] * len(layers)
    for start in range(len(layers)):
        (traced, runs), _ = best[start]
        for period in range(1, len(layers) - start + 1):
            if traced + period > best[-1][0][0]:
                break
            stop = start + period
            while stop < len(layers) and layers[stop] == layers[stop - period]:
                stop += 1
            # One turn of several layers would save no tracing, and would need the memory of all of them.
            for end in range(start + (period if period == 1 else 2 * period), stop + 1, period):
                cost = (traced + period, runs + 1)
                # Of equal cuts the one that leaves the odd layers for the end.
                if cost <= best[end][0]:
                    best[end] = (cost, LayerRun(range(first + start, first + end), period))
    found: list[LayerRun] = []
    while run := best[len(layers) - sum(len(each.layers) for each in found)][1]:
        found.append(run)
    return tuple(reversed(found))
