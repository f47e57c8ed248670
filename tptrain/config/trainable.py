"""Which weights are trained: name patterns of the recipe against the parameter table."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from fnmatch import fnmatchcase

from tptrain.config.schema import Recipe
from tptrain.errors import Problem, nearest
from tptrain.family import LayerRuns, ParamRow, stored_rows

FROZEN_DTYPE = "bfloat16"

_SETTING = "model.trainable"
_LAYER = re.compile(r"^(model\.layers\.)(\d+)(\..+)$")
# Layers in the periods of loops above which a notice says what they cost.
MOST_TRACED = 8


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


def trainable_problems(recipe: Recipe, table: Sequence[ParamRow]) -> list[Problem]:
    """Patterns that match nothing."""
    patterns = recipe.model.trainable
    if not patterns:
        return [Problem(_SETTING, "", "must name what is trained", "no pattern is given", "*")]
    names = [row.name for row in stored_rows(table)]
    unmatched = [pattern for pattern in patterns if not any(fnmatchcase(name, pattern) for name in names)]
    return [_unmatched(pattern, table, names) for pattern in unmatched]


def _unmatched(pattern: str, table: Sequence[ParamRow], names: Sequence[str]) -> Problem:
    tied = next((row for row in table if row.tied_to and fnmatchcase(row.name, pattern)), None)
    if tied is not None:
        rule, other = "must match a weight of its own", f"{tied.name} is tied to {tied.tied_to}"
        return Problem(_SETTING, pattern, rule, other, str(tied.tied_to))
    known = sorted({_LAYER.sub(r"\1*\3", name) for name in names})
    guess = nearest(pattern, known)
    fix = f"{guess} (did you mean it?)" if guess else "* or a pattern that matches one of them"
    return Problem(_SETTING, pattern, "matches no weight of the model", f"weights: {', '.join(known)}", fix)


def run_notices(recipe: Recipe, runs: LayerRuns) -> list[str]:
    """What it costs to train other weights in every few layers: the XLA backend has a loop for each run."""
    if recipe.backend != "xla" or recipe.model.trainable == ("*",) or runs.traced <= MOST_TRACED:
        return []
    return [
        f"model.trainable leaves few layers alike: the step has {len(runs.runs)} loops over layers, which"
        f" compute {runs.traced} in a turn of each. Tracing and compiling take longer with each layer in a"
        f" turn; at most {MOST_TRACED} are advised."
    ]
