"""Which weights are trained: name patterns of the recipe against the parameter table."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from fnmatch import fnmatchcase

from tptrain.config.schema import Recipe
from tptrain.errors import Problem, nearest
from tptrain.family import ModelFacts, ParamRow, stored_rows

FROZEN_DTYPE = "bfloat16"

_SETTING = "model.trainable"
_LAYER = re.compile(r"^(model\.layers\.)(\d+)(\..+)$")
_MOST_NAMES = 3


def is_trained(name: str, patterns: Sequence[str]) -> bool:
    """Whether one of the patterns (as in a shell: `*` also matches dots) is or matches the name."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def with_frozen(table: Sequence[ParamRow], patterns: Sequence[str]) -> tuple[ParamRow, ...]:
    """The table with what no pattern matches frozen and held in bfloat16; a tied row goes with its own."""

    def frozen(row: ParamRow) -> ParamRow:
        if is_trained(row.tied_to or row.name, patterns):
            return row
        return dataclasses.replace(row, trainable=False, storage_dtype=FROZEN_DTYPE)

    return tuple(frozen(row) for row in table)


def trainable_problems(recipe: Recipe, facts: ModelFacts, table: Sequence[ParamRow]) -> list[Problem]:
    """Patterns that match nothing, and layers that would have to be split from the others of their buffer."""
    patterns = recipe.model.trainable
    if not patterns:
        return [Problem(_SETTING, "", "must name what is trained", "no pattern is given", "*")]
    names = [row.name for row in stored_rows(table)]
    unmatched = [pattern for pattern in patterns if not any(fnmatchcase(name, pattern) for name in names)]
    problems = [_unmatched(pattern, table, names) for pattern in unmatched]
    if recipe.backend == "xla" and not problems:
        problems += _split_problems(patterns, names, len(facts.layer_period))
    return problems


def _unmatched(pattern: str, table: Sequence[ParamRow], names: Sequence[str]) -> Problem:
    tied = next((row for row in table if row.tied_to and fnmatchcase(row.name, pattern)), None)
    if tied is not None:
        rule, other = "must match a weight of its own", f"{tied.name} is tied to {tied.tied_to}"
        return Problem(_SETTING, pattern, rule, other, str(tied.tied_to))
    known = sorted({_LAYER.sub(r"\1*\3", name) for name in names})
    guess = nearest(pattern, known)
    fix = f"{guess} (did you mean it?)" if guess else "* or a pattern that matches one of them"
    return Problem(_SETTING, pattern, "matches no weight of the model", f"weights: {', '.join(known)}", fix)


def _split_problems(patterns: Sequence[str], names: Sequence[str], period: int) -> list[Problem]:
    """Weights trained in some layers only: the XLA backend holds all layers of a weight as one array.

    period: of the layers; an array holds those with one remainder by it.
    """
    split = _split_weights(patterns, names, period)
    if not split:
        return []
    rule = "must take all layers of a weight or none, because the XLA backend holds them as one array"
    trained = [next(name for name in held if is_trained(name, patterns)) for held in split.values()]
    more = f" and {len(trained) - _MOST_NAMES} more" if len(trained) > _MOST_NAMES else ""
    other = f"not in every layer: {', '.join(trained[:_MOST_NAMES])}{more}"
    wide = [re.sub(r"^(model\.layers\.)[^.]+", r"\1*", pattern) for pattern in patterns]
    passing = [*wide, *(f"model.layers.*{suffix}" for _, suffix in _split_weights(wide, names, period))]
    fix = f"{','.join(dict.fromkeys(passing))}, or backend=torch topology=cpu-1"
    return [Problem(_SETTING, ",".join(patterns), rule, other, fix)]


def _split_weights(
    patterns: Sequence[str], names: Sequence[str], period: int
) -> dict[tuple[int, str], list[str]]:
    """(position in the period, name after the layer's number) -> all names of a weight that is split."""
    arrays: dict[tuple[int, str], list[str]] = {}
    for name in names:
        match = _LAYER.match(name)
        if match:
            arrays.setdefault((int(match[2]) % period, match[3]), []).append(name)
    return {
        key: held
        for key, held in arrays.items()
        if 0 < sum(is_trained(name, patterns) for name in held) < len(held)
    }
